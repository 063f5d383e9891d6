"""The engine of this process: no workers, no start-up; for debugging and small runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedsim.engine.base import EvalTask, Task
from fedsim.engine.worker import Worker
from fedsim.program import Program


class InlineEngine:
    """Runs every task in this process, when its result is asked for.

    Args:
        program: What to run.
        threads: Threads of torch. Part of the experiment: another number gives other bits.
        on_failure: As for `Worker`.
        max_retries: As for `Worker`.
    """

    slots = 1
    retries = 0

    def __init__(self, program: Program, threads: int = 1, on_failure: str = "abort", max_retries: int = 3) -> None:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(threads)
        self._worker = Worker(program, on_failure, max_retries)
        self._tasks: dict[int, Task | EvalTask] = {}
        self._submitted = 0

    def put(self, payload: dict[str, Any]) -> dict[str, Any]:
        return payload

    def submit(self, task: Task | EvalTask) -> int:
        self._submitted += 1
        self._tasks[self._submitted] = task
        return self._submitted

    def wait(self, tickets: Sequence[int]) -> int:
        return tickets[0]

    def result(self, ticket: int) -> Any:
        return self._worker.run(self._tasks.pop(ticket))

    def close(self) -> None:
        torch.set_num_threads(self._threads)
