"""Workers, nodes and links that are lost, at any moment: they cost time, never bits."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.clients.local import Local
from fedsim.compose import compose
from fedsim.engine import session as sessions
from fedsim.engine.base import EvalTask, Task
from fedsim.engine.ray import RayEngine
from fedsim.errors import RunError
from fedsim.strategies.fedavg import FedAvg
from tests import netns
from tests.cli import QUICK, ROOT, process
from tests.helpers import configure, drive
from tests.test_cluster import Place, place

pytest.importorskip("ray")

NOTICED_S = 5.0  # a lost node is noticed sooner
ROUNDS = 4
LONG = 30  # rounds of a run that is not over before the second machine is at work
#: Client memory, messages beyond 100 kB (which Ray leaves on the node that made them), and as much evaluation as
#: training.
WORK = [
    *(
        "strategy=scaffold",
        "participation=all",
        "partition.num_clients=24",
        "model.hidden=[200,100]",
        "tracker=[jsonl]",
    ),
    *("client.epochs=2", "client.batch_size=10", "client.lr=0.01", "client.momentum=0", "checkpoint.seconds=1000"),
    *("eval.clients=all", "eval.finetune_epochs=1"),
]
TWO = ("engine=ray", "engine.workers=2")


def run(folder: Path, *words: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """A run in this process: its hash, and the retries of every round."""
    done = drive(compose([*WORK, f"rounds={rounds}", *words]), folder).result
    return {"sha": done.summary["state_sha256"], "retries": [r["retries"] for r in done.metrics]}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of the run in one process."""
    sha: str = run(tmp_path_factory.mktemp("inline"), "engine=inline")["sha"]
    return sha


# --- processes --------------------------------------------------------------------------------------------


def processes(parent: int) -> dict[int, str]:
    """Children of a process that are not dead, with their titles."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, owner, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(owner) == parent and state != "Z":
                found[int(folder.name)] = title(int(folder.name))
    return found


def raylets(parent: int) -> dict[int, str]:
    """The nodes that a process started: ids and titles of their first processes."""
    return {pid: title for pid, title in processes(parent).items() if "/raylet/raylet " in title}


def workers(parent: int) -> dict[int, str]:
    """Workers of fedsim on these nodes; before there are any, processes that will become some."""
    found = {pid: title for node in raylets(parent) for pid, title in processes(node).items()}
    hosts = {pid: title for pid, title in found.items() if is_host(title)}
    return hosts or {pid: t for pid, t in found.items() if t.startswith("ray::IDLE") or "default_worker.py" in t}


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Waits for something.

    Raises:
        TimeoutError: It does not come.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.02)


def title(process: int) -> str:
    """Its command line, which Ray changes with what it does; empty for one that has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode().rstrip()
    return ""


def is_host(title: str) -> bool:
    """Whether it is that of a worker of fedsim."""
    return title.startswith("ray::Host")


class Seen:
    """What a run is doing, as seen from its engine.

    Attributes:
        marks: When each phase of each round began; round 0 has ``start-up`` alone.
        engine: The latest engine.
    """

    engine: RayEngine

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.marks: dict[tuple[str, int], float] = {}
        start, submit = RayEngine._start, RayEngine.submit

        def began(engine: RayEngine, *args: Any) -> None:
            self.marks, self.engine = {("start-up", 0): time.monotonic()}, engine
            start(engine, *args)

        def noted(engine: RayEngine, task: Task | EvalTask) -> int:
            kind = "training" if isinstance(task, Task) else "evaluation"
            self.marks.setdefault((kind, task.round_num), time.monotonic())
            return submit(engine, task)

        monkeypatch.setattr(RayEngine, "_start", began)
        monkeypatch.setattr(RayEngine, "submit", noted)

    @property
    def now(self) -> tuple[str, int]:
        """The latest phase and its round."""
        return list(self.marks)[-1]

    def lengths(self) -> dict[tuple[str, int], float]:
        """Seconds that each phase took, but the last."""
        places, times = list(self.marks), list(self.marks.values())
        return {place: end - begin for place, begin, end in zip(places[:-1], times[:-1], times[1:], strict=True)}


class Fault(threading.Thread):
    """Something that happens beside a run, as soon as it may.

    Args:
        when: Whether it may.
        what: Does it, and says whether it was possible; otherwise it is tried again.
    """

    def __init__(self, when: Callable[[], bool], what: Callable[[], bool]) -> None:
        super().__init__(daemon=True)
        self._when, self._what, self._over, self.at = when, what, threading.Event(), 0.0

    def run(self) -> None:
        while not self._over.wait(0.005):
            if self._when():
                self.at = time.time()
                if self._what():
                    return

    def __enter__(self) -> Fault:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join(10)


class Losses(logging.Handler):
    """When the engine noticed that workers were lost."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("a worker was lost"):
            self.times.append(record.created)

    def __enter__(self) -> Losses:
        logging.getLogger("fedsim").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("fedsim").removeHandler(self)


# --- workers ----------------------------------------------------------------------------------------------

MOMENTS = {"start-up": 5, "training": 8, "evaluation": 7}


@pytest.mark.slow
def test_a_worker_killed_at_any_moment_costs_time_and_not_bits(
    expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, rng = Seen(monkeypatch), random.Random(5)
    with sessions.kept():
        run(tmp_path, *TWO)  # starts the cluster
        fresh()
        assert run(tmp_path, *TWO) == {"sha": expected, "retries": [0] * ROUNDS}
        lengths = seen.lengths()
        print("asked for", "phase", "round", "process", "retries", "same bits", sep="\t")
        for phase in [phase for phase, count in MOMENTS.items() for _ in range(count)]:
            place = (phase, rng.randint(1, ROUNDS - 1) if phase != "start-up" else 0)
            delay, victims = rng.random() * lengths[place], list[tuple[str, str, int]]()

            def kill(victims: list[tuple[str, str, int]] = victims) -> bool:
                found = workers(os.getpid())
                if found:
                    pid = rng.choice(sorted(found))
                    victims.append((found[pid] if is_host(found[pid]) else "not yet a worker", *seen.now))
                    os.kill(pid, signal.SIGKILL)
                return bool(found)

            if phase == "start-up":
                fresh()
            while not victims:  # again if the run was over before it was due

                def due(place: tuple[str, int] = place, delay: float = delay) -> bool:
                    begin = seen.marks.get(place)
                    return begin is not None and time.monotonic() >= begin + delay

                seen.marks = {}
                with Fault(due, kill), Losses() as losses:
                    got = run(tmp_path, *TWO)
                delay /= 2
                if phase == "start-up" and not victims:
                    fresh()
            ((title, when, number),) = victims
            moment = f"{place[0]} {place[1]} + {2 * delay:.2f} s"
            print(moment, when, number, title, got["retries"], got["sha"] == expected, sep="\t")
            assert got["sha"] == expected
            assert sum(got["retries"]) == len(losses.times)
            if not losses.times:
                fresh()  # killed after its last work: the next run would miss it
            if is_host(title) and number < ROUNDS:  # in the last round its work may be over
                assert sum(got["retries"]) == 1
            else:  # a process that was no worker yet: Ray itself starts another
                assert sum(got["retries"]) <= 1


def fresh() -> None:
    """Ends the workers that are kept: those of the next run have to start."""
    import ray

    for session in sessions._kept:
        while session.idle:
            ray.kill(session.idle.pop()[1])
    until(lambda: not any(map(is_host, workers(os.getpid()).values())), 10, "the end of all workers")


@pytest.mark.slow
def test_a_run_that_is_left_without_workers_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)

    def strike() -> bool:
        monkeypatch.setattr("fedsim.engine.ray.START_S", 3.0)
        seen.engine._options = {"num_cpus": 99, "num_gpus": 0}  # nowhere is room for another
        (only,) = [pid for pid, title in workers(os.getpid()).items() if is_host(title)]
        os.kill(only, signal.SIGKILL)
        return True

    with sessions.kept():  # the start shall not take longer than that
        run(tmp_path, "engine=ray", "engine.workers=1", "rounds=1")
        with (
            Fault(lambda: ("training", 2) in seen.marks, strike),
            pytest.raises(
                RunError, match=r"no worker started within 3 s: 1 of 1 CPUs are free, and each worker needs 99"
            ),
        ):
            run(tmp_path, "engine=ray", "engine.workers=1")


# --- nodes of one machine ---------------------------------------------------------------------------------


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A cluster of two nodes with a CPU each, by Ray's utility for such."""
    with place() as here:
        monkeypatch.setattr(tempfile, "tempdir", str(here.tmp))
        here.up("nodes=2", "cpus=1")
        yield here


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_node_that_is_lost_costs_time_and_not_bits(
    how: signal.Signals, nodes: Place, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import worker

    seen, lost = Seen(monkeypatch), list[int]()

    def strike() -> bool:
        node: Any = worker._global_node
        own = node.raylet_socket_name
        ((other, _),) = [(pid, t) for pid, t in raylets(nodes.supervisor).items() if f"{own} " not in t]
        beside = processes(other)
        assert any(map(is_host, beside.values()))
        lost.extend([other, *beside])
        for pid in lost:
            os.kill(pid, how)
        return True

    with sessions.kept():
        assert run(tmp_path, *TWO, "engine.address=auto") == {"sha": expected, "retries": [0] * ROUNDS}
        seen.marks = {}
        try:
            with Fault(lambda: ("training", 2) in seen.marks, strike) as fault, Losses() as losses:
                got = run(tmp_path, *TWO, "engine.address=auto")
        finally:
            for pid in lost:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert got == {"sha": expected, "retries": [0, 1, 0, 0]}
    print(f"noticed after {losses.times[0] - fault.at:.2f} s")
    assert losses.times[0] - fault.at < NOTICED_S


# --- two machines -----------------------------------------------------------------------------------------


@dataclass
class Pair:
    """Two machines with a node of one Ray cluster each, as docs/ray.md says; the first is the head.

    Attributes:
        machines: They.
        folder: For Ray's files, the token and runs.
        nodes: The processes that hold the nodes.
    """

    machines: netns.Machines
    folder: Path
    nodes: dict[int, subprocess.Popen[str]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"{self.machines.addresses[0]}:6379"

    def start(self, machine: int, *options: str, **settings: str) -> None:
        """Starts the node of one."""
        log = self.folder / f"node-{machine}"
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--num-cpus=1", "--object-store-memory=100000000"]
        own = f"--node-ip-address={self.machines.addresses[machine]}"
        command = self.machines.command(machine, *ray, own, "--block", *options)
        with log.open("w") as out:
            self.nodes[machine] = self.popen(command, settings, stdout=out, stderr=subprocess.STDOUT)
        until(lambda: "Ray runtime started" in log.read_text(), 60, f"node {machine}")

    def head(self) -> None:
        health = {f"RAY_{key}": str(value) for key, value in sessions.HEALTH.items()}
        self.start(0, "--head", "--port=6379", f"--temp-dir={self.folder}/r", "--include-dashboard=false", **health)

    def join(self) -> None:
        self.start(1, f"--address={self.address}")

    def works(self, machine: int) -> bool:
        """Whether a worker of fedsim there is at work, which is not the case in its start."""
        return any("ray::Host.run" in title(pid) for pid in self.machines.processes(machine))

    def end(self, machine: int) -> None:
        """Kills all that runs on one."""
        self.machines.end(machine)
        if machine in self.nodes:
            self.nodes.pop(machine).wait(10)

    def run(self, name: str) -> subprocess.Popen[str]:
        """A run on the head, over both."""
        words = [*WORK, f"rounds={LONG}", f"name={name}", "engine=ray", f"engine.address={self.address}"]
        command = [sys.executable, "-m", "fedsim.cli", *words, "engine.workers=2"]
        return self.popen(self.machines.command(0, *command), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def popen(self, command: list[str], more: Mapping[str, str] | None = None, **pipes: Any) -> subprocess.Popen[str]:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}
        env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", **token, **(more or {})}
        return subprocess.Popen(command, cwd=self.folder, env=env, text=True, **pipes)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    if reason := netns.unavailable():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="fs", dir="/tmp"))  # sockets need a short path
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text("0" * 64)
    try:
        with netns.machines() as both:
            here = Pair(both, folder)
            try:
                here.head()
                yield here
            finally:
                here.end(1)
                here.end(0)
    finally:
        shutil.rmtree(folder)


def result(folder: Path) -> dict[str, Any]:
    """As `run`, of a run directory."""
    retries = [json.loads(line)["retries"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"sha": json.loads((folder / "summary.json").read_text())["state_sha256"], "retries": retries}


def noticed(folder: Path) -> float:
    """When the log of a run first says that a worker was lost."""
    line = next(line for line in (folder / "log.txt").read_text().splitlines() if "a worker was lost" in line)
    seconds, milli = line[:23].split(",")
    return time.mktime(time.strptime(seconds, "%Y-%m-%d %H:%M:%S")) + int(milli) / 1000


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As `expected`, of the longer run."""
    sha: str = run(tmp_path_factory.mktemp("long"), "engine=inline", rounds=LONG)["sha"]
    return sha


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["none", "the second machine is killed", "the link is cut"])
def test_two_machines_have_the_bits_of_one_process_and_may_lose_each_other(fault: str, pair: Pair, long: str) -> None:
    pair.join()
    name = fault.replace(" ", "-")
    with pair.run(name) as driver:
        if fault != "none":
            until(lambda: pair.works(1) or driver.poll() is not None, 60, "work on the second machine")
            assert driver.poll() is None
            at = time.time()
            pair.end(1) if fault.endswith("killed") else pair.machines.cut()
        try:
            _, said = driver.communicate(timeout=120)
        finally:
            driver.kill()
            pair.end(1)
            if fault == "the link is cut":
                pair.machines.mend()
    assert driver.returncode == 0, said
    (folder,) = pair.folder.glob(f"runs/{name}/*")
    got = result(folder)
    assert got["sha"] == long
    assert sum(got["retries"]) == (fault != "none")
    if fault != "none":
        print(f"{fault}: noticed after {noticed(folder) - at:.2f} s")
        assert -0.1 < noticed(folder) - at < NOTICED_S


# --- the node of the driver -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("server", ["raylet", "gcs_server"])
def test_who_loses_the_own_node_is_told_and_resumes(server: str, tmp_path: Path) -> None:
    small = [*QUICK, "name=a", "checkpoint.seconds=0"]
    command = [sys.executable, "-m", "fedsim.cli", *small, *TWO, "rounds=100000"]
    env, pipes = {**os.environ, "PYTHONPATH": str(ROOT)}, {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, env=env, text=True, **pipes) as driver:  # type: ignore[call-overload]
        saved = "runs/a/*/checkpoints/*"
        until(lambda: len([*tmp_path.glob(saved)]) > 1 or driver.poll() is not None, 60, "the first checkpoint")
        (victim,) = [pid for pid, title in processes(driver.pid).items() if f"/{server} " in title]
        os.kill(victim, signal.SIGKILL)
        try:
            _, said = driver.communicate(timeout=20)
        finally:
            driver.kill()
    (folder,) = tmp_path.glob("runs/a/*")
    assert driver.returncode == 1
    assert "the Ray node of this process died" in said and f"fedsim resume={folder}" in said
    assert "the Ray node of this process died" in (folder / "log.txt").read_text()
    rounds = f"rounds={(folder / 'metrics.jsonl').read_text().count(chr(10)) + 2}"
    resumed = process(f"resume={folder}", "engine=inline", rounds, cwd=tmp_path)
    assert resumed.status == 0, resumed.err
    whole = process(*small, rounds, "name=b", cwd=tmp_path)
    assert whole.status == 0, whole.err
    (other,) = tmp_path.glob("runs/b/*")
    assert result(folder)["sha"] == result(other)["sha"]


@pytest.mark.slow
def test_a_machine_that_stalls_is_not_taken_for_a_lost_one(
    expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)

    def stall() -> bool:
        (node,) = raylets(os.getpid())
        os.kill(node, signal.SIGSTOP)
        time.sleep(8)
        os.kill(node, signal.SIGCONT)
        return True

    with Fault(lambda: ("training", 2) in seen.marks, stall):
        assert run(tmp_path, *TWO)["sha"] == expected


# --- memory -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Eats(FedAvg):
    """A client that takes more and more memory."""

    def work(self, local: Local) -> Tensor:
        if local.round == 2 and local.clients == (3,):
            held = []
            for _ in range(64):  # 4 GiB: all others on this machine shall not suffer if nobody stops it
                held.append(torch.ones(1 << 26, dtype=torch.uint8))
                time.sleep(0.05)
        return super().work(local)


def available() -> tuple[int, int]:
    """Bytes of main memory that are free, and in all."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, total = (1024 * int(lines[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    return free, total


@pytest.mark.slow
def test_work_that_needs_too_much_memory_ends_the_run_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, total = available()
    if free < 6 * 2**30:
        pytest.skip(f"needs 6 GiB of free memory, of which it takes 2; there are {free / 2**30:.1f}")
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{1 - (free - 2**31) / total:.4f}")  # with 2 GiB more
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "50")
    values = {"strategy": {"_target_": "tests.test_faults.Eats"}, "engine.max_retries": 1, "engine.workers": 2}
    everybody = {"participation": {"_target_": "fedsim.clients.participation.All"}}
    begin = time.monotonic()
    told = r"round 2, training, clients .*: the worker was lost 2 times \(OutOfMemoryError.*, or lower engine.workers"
    with pytest.raises(RunError, match=told) as caught:
        drive(configure(("engine=ray",), {**values, **everybody}), tmp_path)
    assert "\n" not in str(caught.value) and time.monotonic() - begin < 60
