"""The sides of a comparison of whole rounds: fedsim here, pfl-research in a process of its own.

Each does one round, or one evaluation, when it is asked, so that they can take turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from fedsim import rounds
from fedsim.compose import compose
from fedsim.config import SCHEMA
from fedsim.engine.inline import InlineEngine
from fedsim.experiment import Experiment, build
from fedsim.federation import Federation
from fedsim.memory import Memory

EVERY = 10  # rounds between evaluations
#: Why there is no batched side; empty if there is one.
NO_BATCHING = "" if "client.batching" in SCHEMA else "this fedsim has no client.batching"
#: What a user adds for clients one by one, whatever the default is.
ONE_BY_ONE = () if NO_BATCHING else ("client.batching=off",)


class Side:
    """A federation on one engine.

    Args:
        exp: What it does.
        engine: Where; started, with its workers.
        folder: For what clients remember.
    """

    def __init__(self, exp: Experiment, engine: Any, folder: Path) -> None:
        self.computed = 0.0
        self._cuda = exp.program.device.type == "cuda"
        result = engine.result

        def also(ticket: Any) -> Any:
            outcome = result(ticket)
            self.computed += getattr(outcome, "seconds", 0.0)
            return outcome

        engine.result = also
        self.exp = exp
        self.fed = Federation(exp.program, engine, exp.participation, exp.system, Memory(folder))
        self.state, self.number = rounds.first(self.fed, exp.info), 0
        while any(host.starting is not None for host in getattr(engine, "_hosts", ())):
            engine._pump(0.1)  # a run begins when one worker is there; here all are

    def round(self) -> tuple[float, float]:
        """Seconds that it took, and those of them that workers trained, all of them together."""
        self.number, self.computed = self.number + 1, 0.0
        begin = time.perf_counter()
        self.state = rounds.following(self.fed, self.state, self.number)
        self._synchronize()
        return time.perf_counter() - begin, self.computed

    def evaluate(self) -> float:
        """Seconds that an evaluation of the global model on the test split takes."""
        begin = time.perf_counter()
        self.accuracy = self.fed.evaluate(self.state).get("accuracy", 0.0)
        return time.perf_counter() - begin

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def inline(overrides: Sequence[str], folder: Path) -> Side:
    """A side in this process."""
    exp = build(compose(list(overrides)))
    return Side(exp, InlineEngine(exp.program, threads=exp.config["engine"]["threads"]), folder)


class Doer(Protocol):
    """Does one round or one evaluation, and says how long it took."""

    def round(self) -> float: ...

    def evaluate(self) -> float: ...


class Ours:
    """A `Side` without its workers' share."""

    def __init__(self, side: Side) -> None:
        self.side = side

    def round(self) -> float:
        return self.side.round()[0]

    def evaluate(self) -> float:
        return self.side.evaluate()


class Peer:
    """pfl-research in another process.

    Args:
        python: Of its environment.
        case: Name of the case.
        device: Of torch.
    """

    def __init__(self, python: str, case: str, device: str = "cpu") -> None:
        command = [python, "-m", "benchmarks.pfl_baseline", f"--case={case}", f"--device={device}"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions = self._heard("versions")
        if self.versions["torch"] != torch.__version__:
            self.close()
            raise SystemExit(f"pfl's side has torch {self.versions['torch']}, and this {torch.__version__}")

    def _heard(self, what: str) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args!r}: ended with status {self._process.wait()}")
        return json.loads(line)[what]

    def _asked(self, what: str) -> float:
        assert self._process.stdin is not None
        print(what, file=self._process.stdin, flush=True)
        return float(self._heard(what))

    def round(self) -> float:
        return self._asked("round")

    def evaluate(self) -> float:
        return self._asked("evaluate")

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def peer(python: str, case: str, device: str = "cpu") -> Iterator[Peer]:
    """pfl-research, ended at the end."""
    found = Peer(python, case, device)
    try:
        yield found
    finally:
        found.close()


def turns(sides: Mapping[str, Doer], count: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of whole rounds by side, and what they are made of."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    parts: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(count + 1):
        for name, side in sides.items():
            took, evaluation = side.round(), side.evaluate()
            if turn:
                seconds[name].append(took + evaluation / EVERY)
                parts[name].append((took, evaluation))
    notes = {}
    for name, pairs in parts.items():
        took, evaluation = (1e3 * statistics.median(p[i] for p in pairs) for i in (0, 1))
        notes[name] = f"round {took:.1f} ms, evaluation {evaluation:.1f} ms"
    return seconds, notes
