"""Client work on many processes and nodes, with the bits of `fedsim.engine.inline`.

Long-lived workers (Ray actors) rebuild the program from the config; data are in shared memory once per node. A worker
that dies is replaced, and its work is done again from the same seeds: results do not depend on it.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.engine import session as sessions
from fedsim.engine.base import EvalTask, Outcome, Task
from fedsim.engine.host import Crew, cores, start
from fedsim.engine.probe import probe
from fedsim.engine.wire import Message, pack, unpack
from fedsim.errors import ConfigError, FedsimError, RunError, one_line, require
from fedsim.experiment import Shared
from fedsim.program import Program

log = logging.getLogger("fedsim")

AHEAD = 2  # tasks that a worker has at a time: the next one travels while it works
START_S = 120.0  # a worker that takes longer to start never will
PATIENCE_S = 8.0  # after which it is said that none has started
FAILED_STARTS = 20  # in a row, and it is not chance


class Process:
    """What a worker process holds.

    Args:
        message: The config, packed.
        shared: `fedsim.experiment.Shared`, packed; in memory that all workers of the node share.
    """

    def __init__(self, message: Message, shared: Message) -> None:
        from fedsim.engine.worker import Worker
        from fedsim.experiment import rebuild

        config: Config = unpack(message)
        engine = config["engine"]
        torch.set_num_threads(engine["threads"])
        self._shared = shared  # tensors point into it
        program = rebuild(config, unpack(shared, copy=False))
        self._worker = Worker(program, engine["on_failure"], engine["max_retries"])
        self.probe = probe(engine["device"])

    def run(self, message: Message, sent: Message) -> tuple[Message, Any]:
        """Runs a task."""
        task: Task | EvalTask = replace(unpack(message), sent=unpack(sent))
        outcome = self._worker.run(task)
        if not isinstance(outcome, Outcome):
            return pack(outcome), None
        rows = {
            name: torch.stack(outcome.rows.pop(name)).cpu().numpy()
            for name, kind in outcome.kinds.items()
            if kind == "stack" and outcome.rows.get(name) and outcome.rows[name][0].dtype != torch.bfloat16
        }
        return pack(outcome), rows or None


@dataclass
class _Job:
    """A task on its way.

    Attributes:
        task: Without what is sent.
        sent: The payload, as an object of Ray.
        lost: How often a worker died over it.
        refs: Its results to be.
        began: When a worker began with it.
        value: The outcome.
        error: What went wrong.
        done: Whether either is there.
    """

    task: Task | EvalTask
    sent: Any
    lost: int = 0
    refs: Any = None
    began: float = 0.0
    value: Any = None
    error: Exception | None = None
    done: bool = False


@dataclass
class _Host:
    """A worker process, seen from the driver.

    Attributes:
        actor: Its handle.
        starting: The answer to `setup`, until it came.
        since: When it was started.
        jobs: Tickets of the tasks that it has, the current one first.
    """

    actor: Any
    starting: Any = None
    since: float = 0.0
    jobs: deque[int] = field(default_factory=deque)


class RayEngine:
    """Workers on a Ray cluster.

    Args:
        program: What to run.
        run_config: The resolved config, from which workers rebuild it.
        threads: Threads of torch in each worker. Part of the experiment: another number gives other bits.
        workers: Worker processes; None: as many as there are CPUs (or GPUs, with ``gpus_per_worker``) for.
        cpus_per_worker: CPUs that each takes of what Ray counts, > 0.
        gpus_per_worker: GPUs likewise, may be a fraction, >= 0.
        address: ``local``: a private cluster on this machine, for this run; ``auto`` or ``host:port``: an existing
            one, of which this machine must be a node.
        max_retries: How often work is done again whose worker was lost, before the run ends, >= 0.
        timeout_s: A worker that is silent for so long on one task is taken for lost; None: never.
        dashboard: Whether a private cluster has Ray's dashboard, on 127.0.0.1.

    Raises:
        ConfigError: There is no such cluster, it has too little, or its workers cannot build the program.
    """

    def __init__(
        self,
        program: Program,
        run_config: Config,
        threads: int = 1,
        workers: int | None = None,
        cpus_per_worker: float = 1.0,
        gpus_per_worker: float = 0.0,
        address: str = "local",
        max_retries: int = 3,
        timeout_s: float | None = None,
        dashboard: bool = False,
    ) -> None:
        crew = Crew(workers, cpus_per_worker, gpus_per_worker, address, dashboard, timeout_s)
        require(max_retries >= 0, "engine.max_retries", ">= 0", max_retries)
        self.retries = 0
        self._failed_starts = 0  # since a worker last started
        self._max_retries, self._timeout_s = max_retries, timeout_s
        self._program, self._config = program, run_config
        self._options = crew.options
        self._session = crew.lease(torch.cuda.device_count() if gpus_per_worker else 0)
        self._before = torch.get_num_threads()
        torch.set_num_threads(threads)  # the server's step too
        self._jobs: dict[int, _Job] = {}
        self._pending: deque[int] = deque()
        self._hosts: list[_Host] = []
        self._submitted = 0
        try:
            self.slots = crew.size(self._session)
            if address == "local" and self.slots * threads > cores():
                log.warning(
                    "%d workers with %d threads each share the %d cores of this machine", self.slots, threads, cores()
                )
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        import ray

        self._setup = [ray.put(pack(self._config)), ray.put(pack(Shared.of(self._program)))]
        for _ in range(self.slots):
            self._add_host()
        self._probe = probe(self._config["engine"]["device"])  # after the workers have begun
        for _, actor in self._session.idle:  # of an earlier run with more workers, or of another kind
            ray.kill(actor)
        self._session.idle.clear()
        begin, told = time.monotonic(), False
        while all(h.starting is not None for h in self._hosts):
            waited = time.monotonic() - begin
            if waited > START_S:
                raise RunError(f"no worker started within {START_S:g} s: {self._shortage()}")
            if waited > PATIENCE_S and not told and not self._session.local:
                told = True
                log.warning("no worker has started yet: %s; waits up to %g s", self._shortage(), START_S)
            self._pump(1.0)

    def _shortage(self) -> str:
        """Why workers may wait."""
        there, free = self._session.resources(), self._session.free()
        parts = [
            f"{free.get(kind, 0.0):g} of {there.get(kind, 0.0):g} {kind}s are free, and each worker needs {need:g}"
            for kind, need in (("CPU", self._options["num_cpus"]), ("GPU", self._options["num_gpus"]))
            if need
        ]
        return f"{'; '.join(parts)}; if other jobs hold the rest (see `ray status`), end them or wait for them"

    # --- the contract ---------------------------------------------------------------------------------

    def put(self, payload: dict[str, Any]) -> Any:
        import ray

        return ray.put(pack(payload))

    def submit(self, task: Task | EvalTask) -> int:
        self._submitted += 1
        self._jobs[self._submitted] = _Job(replace(task, sent=None), task.sent)
        self._pending.append(self._submitted)
        self._assign()
        return self._submitted

    def wait(self, tickets: Sequence[int]) -> int:
        while True:
            for ticket in tickets:
                if self._jobs[ticket].done:
                    return ticket
            self._pump(1.0)

    def result(self, ticket: int) -> Any:
        self.wait([ticket])
        job = self._jobs.pop(ticket)
        if job.error is not None:
            raise job.error
        return job.value

    def close(self) -> None:
        """Ends the workers, and a private cluster with them."""
        import ray

        torch.set_num_threads(self._before)
        try:
            for host in self._hosts if ray.is_initialized() else ():
                if sessions.keeps() and host.starting is None and not host.jobs:
                    self._session.idle.append((self._options, host.actor))
                else:
                    ray.kill(host.actor)
        finally:
            self._hosts, self._jobs = [], {}
            self._pending.clear()
            sessions.release(self._session)

    # --- workers --------------------------------------------------------------------------------------

    def _add_host(self) -> None:
        idle = self._session.idle
        place = next((i for i, (options, _) in enumerate(idle) if options == self._options), None)
        actor = start(self._options) if place is None else idle.pop(place)[1]
        self._hosts.append(_Host(actor, actor.setup.remote(*self._setup), time.monotonic()))

    def _lose(self, host: _Host, why: BaseException) -> None:
        """Gives a dead worker's tasks to others, and starts another worker."""
        import ray

        self._hosts.remove(host)
        ray.kill(host.actor)
        self._add_host()
        current = True
        for ticket in reversed(host.jobs):
            self._pending.appendleft(ticket)
        for ticket in host.jobs:
            job = self._jobs[ticket]
            job.refs = None
            if current:  # those behind it had not begun
                job.lost += 1
                self.retries += 1
                log.warning("a worker was lost with %s (%s); its work is done again", _what(job.task), _reason(why))
                if job.lost > self._max_retries:
                    self._pending.remove(ticket)
                    job.done = True
                    job.error = RunError(
                        f"{_what(job.task)}: the worker was lost {job.lost} times ({_reason(why)}); look at it alone "
                        f"with engine=inline, or {_remedy(why)}"
                    )
            current = False

    def _assign(self) -> None:
        """Gives tasks to workers that have answered, the least busy first."""
        while self._pending:
            ready = [h for h in self._hosts if h.starting is None and len(h.jobs) < AHEAD]
            if not ready:
                return
            host = min(ready, key=lambda h: len(h.jobs))
            ticket = self._pending.popleft()
            job = self._jobs[ticket]
            job.refs = host.actor.run.options(num_returns=2).remote(pack(job.task), job.sent)
            job.began = time.monotonic()
            host.jobs.append(ticket)

    def _pump(self, timeout_s: float) -> None:
        """Waits until something happened, at most so long, and deals with it."""
        import ray

        self._assign()
        of: dict[Any, _Host] = {}
        for host in self._hosts:
            if host.starting is not None:
                of[host.starting] = host
            elif host.jobs:
                of[self._jobs[host.jobs[0]].refs[0]] = host
        if not of:
            raise RunError("the engine waits for a task that nobody has")
        ready, _ = ray.wait(list(of), num_returns=1, timeout=timeout_s)
        for ref in ready:
            self._take(of[ref], ref)
        waits = time.monotonic() - max(h.since for h in self._hosts)
        if not ready and waits > START_S and all(h.starting is not None for h in self._hosts):
            raise RunError(f"no worker started within {START_S:g} s: {self._shortage()}")
        self._lose_silent()
        self._assign()

    def _lose_silent(self) -> None:
        """Takes for lost who has been at one task for too long, and has not just finished it."""
        import ray

        if self._timeout_s is None:
            return
        then = time.monotonic() - self._timeout_s
        late = [h for h in self._hosts if h.jobs and self._jobs[h.jobs[0]].began < then]
        refs = {self._jobs[h.jobs[0]].refs[0]: h for h in late}
        if refs:
            for ref in ray.wait(list(refs), num_returns=len(refs), timeout=0)[1]:
                self._lose(refs[ref], TimeoutError(f"silent for {self._timeout_s:g} s, engine.timeout_s"))

    def _take(self, host: _Host, ref: Any) -> None:
        """A worker has started, or finished its current task, or died."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        job = None if host.starting is not None else self._jobs[host.jobs[0]]
        try:
            answer = ray.get(ref)
            if job is None:
                self._welcome(host, answer)
            else:
                job.value = self._outcome(answer, ray.get(job.refs[1]))
        except RayTaskError as exc:
            error = (
                exc.cause if isinstance(exc.cause, FedsimError) else RunError(f"a worker failed: {one_line(exc.cause)}")
            )
            if job is None and isinstance(error, ConfigError):
                raise ConfigError(
                    f"a worker cannot build what the driver did: {error}; plug-ins must be in modules, not in the "
                    "script that runs, and installed or in a folder of the same path on every node"
                ) from exc
            if job is None:
                raise error from exc
            error.__cause__ = exc  # with the client's own traceback
            job.error = error
        except RayError as exc:
            if job is None:
                self._restart(host, exc)
            else:
                self._lose(host, exc)
            return
        if job is not None:
            job.done, job.refs = True, None
            host.jobs.popleft()
            if host.jobs:
                self._jobs[host.jobs[0]].began = time.monotonic()

    def _welcome(self, host: _Host, found: str) -> None:
        if found != self._probe:
            raise ConfigError(
                "a worker computes other bits than the driver: the nodes have different processors, versions of torch, "
                "or settings of its libraries; use nodes of one kind"
            )
        host.starting = None
        self._failed_starts = 0

    def _restart(self, host: _Host, why: BaseException) -> None:
        """Another worker for one that died while it started."""
        self.retries += 1
        self._failed_starts += 1
        if self._failed_starts > FAILED_STARTS:
            raise RunError(f"workers die while they start ({_reason(why)})") from why
        log.warning("a worker was lost while it started (%s)", _reason(why))
        self._hosts.remove(host)
        self._add_host()

    def _outcome(self, message: Message, rows: dict[str, Any] | None) -> Any:
        value = unpack(message, self._program.device if self._program.device.type != "cpu" else None)
        if rows is not None:
            for name, array in rows.items():
                value.rows[name] = Stored(array, self._program.device)
        return value


class Stored:
    """Rows of a piece, read where they are: in shared memory.

    Args:
        array: ``[k, ...]``, read-only.
        device: Where tensors shall be.
    """

    def __init__(self, array: Any, device: torch.device) -> None:
        self._array, self._device = array, device

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: Any) -> Tensor:
        """A copy of a part, in torch's own memory."""
        part = self._array[index.cpu() if isinstance(index, Tensor) else index]
        out = torch.empty(part.shape, dtype=getattr(torch, str(part.dtype)))
        out.numpy()[...] = part
        return out.to(self._device)


def _what(task: Task | EvalTask) -> str:
    kind = "training" if isinstance(task, Task) else "evaluation"
    who = f", clients {task.clients[0]} to {task.clients[-1]}" if task.clients else ""
    return f"round {task.round_num}, {kind}{who}"


def _reason(why: BaseException) -> str:
    """Why a worker was lost; of Ray's page about it what a user can use."""
    from ray.exceptions import ActorDiedError

    text = " ".join(str(why).split()) if isinstance(why, ActorDiedError) else ""
    pid, detail = re.search(r"\bpid: (\d+)", text), re.search(r"Worker exit detail: (.*?)(?: There are some|$)", text)
    if pid is not None:
        return f"process {pid[1]} died{': ' + detail[1][:200].rstrip('. ') if detail is not None else ''}"
    return one_line(why)[:200]


def _remedy(why: BaseException) -> str:
    """What to do when work keeps losing its worker."""
    from ray.exceptions import OutOfMemoryError

    if isinstance(why, OutOfMemoryError):
        return "lower engine.workers or client.batch_size, use a machine with more memory"
    if isinstance(why, TimeoutError):
        return "raise engine.timeout_s: a task may hold many clients"
    return "raise engine.max_retries, give it more memory"
