"""However a run on Ray ends, no process and no file of it is left, and it can be resumed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from fedsim.clients.local import Local
from fedsim.engine import leftovers
from fedsim.engine import session as sessions
from fedsim.strategies.fedavg import FedAvg
from tests.cli import QUICK
from tests.rooms import Room, room, wait_for

pytest.importorskip("ray")

SLOW = "FEDSIM_TESTS_SLOW"  # names a file
RUN = [
    "model=logreg",
    "partition=iid",
    "partition.num_clients=6",
    "participation=fixed",
    "participation.clients_per_round=4",
    "client.epochs=null",
    "client.steps=2",
    "rounds=8",
    "tracker=[jsonl]",
    "checkpoint.seconds=0",
    "strategy._target_=tests.test_leftovers.Slow",
]
RAY = ["engine=ray", "engine.workers=2"]
ENDS_S = 5.0  # a run that was interrupted in a round
STARTS_S = 10.0  # the same while Ray starts, on a machine with other work


@dataclass(frozen=True)
class Slow(FedAvg):
    """Clients take their time, or raise, as long as a file says so."""

    def work(self, local: Local) -> Tensor:
        says = Path(os.environ[SLOW]).read_text() if SLOW in os.environ else ""
        if says:
            time.sleep(0.3)
        if says == "raise":
            raise ArithmeticError("never does it")
        return super().work(local)


@pytest.fixture
def here() -> Iterator[Room]:
    with room() as place:
        yield place


@pytest.fixture(scope="module")
def expected() -> str:
    """What a run ends with that nobody disturbs."""
    with room() as place:
        assert place.run(*RUN).status == 0
        return place.state_sha256()


def start(here: Room, *args: str, says: str = "slow") -> subprocess.Popen[str]:
    """A run whose clients are slow."""
    (here.path / "slow").write_text(says)
    return here.start(*RUN, *RAY, *args, **{SLOW: str(here.path / "slow")})


def calm(here: Room) -> None:
    """Clients shall take no more time than they need."""
    (here.path / "slow").write_text("")


def resume(here: Room, *args: str) -> str:
    """Goes on with the one run, if it has begun, or starts it; its hash."""
    runs = here.runs()
    done = here.run(*([f"resume={runs[0]}"] if runs else [*RUN, *RAY]), *args)
    assert done.status == 0, done.err
    return here.state_sha256()


def has(here: Room, name: str) -> bool:
    """Whether there is a process of this kind."""
    return any(name in command for command in here.processes().values())


def runs_main(here: Room) -> bool:
    """Whether a process has come as far as reading its config: it has loaded the library for that."""
    maps = []
    for pid in here.processes():
        with contextlib.suppress(OSError):
            maps.append(Path(f"/proc/{pid}/maps").read_text())
    return any("_yaml" in text for text in maps)


def lines(here: Room) -> int:
    """Rounds that were recorded."""
    return sum(
        (run / "metrics.jsonl").read_text().count("\n") for run in here.runs() if (run / "metrics.jsonl").exists()
    )


#: What to wait for, then for how many seconds at most, and how long the end may take.
MOMENTS: dict[str, tuple[Callable[[Room], object], float, float]] = {
    "imports": (runs_main, 1.0, ENDS_S),
    "Ray starts": (lambda here: has(here, "gcs_server"), 1.5, STARTS_S),
    "workers start": (lambda here: has(here, "ray::"), 1.5, STARTS_S),
    "a round": (lambda here: lines(here) >= 1, 1.0, ENDS_S),
    "rounds and checkpoints": (lambda here: lines(here) >= 2, 1.5, ENDS_S),
}


# --- ends of its own --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_success_leaves_nothing(here: Room, expected: str) -> None:
    process = start(here)
    wait_for(lambda: lines(here))
    assert len(here.processes()) > 5 and len(here.left()) > 10  # so that there is something to miss
    calm(here)
    process.communicate(timeout=60)
    assert process.returncode == 0 and here.left() == []
    assert here.state_sha256() == expected


@pytest.mark.slow
def test_a_client_that_raises_leaves_nothing(here: Room) -> None:
    process = start(here, says="raise")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and here.left() == []
    assert err.startswith("fedsim: round 1, client ") and "never does it" in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_mistake_that_is_found_after_ray_has_started_leaves_nothing(here: Room) -> None:
    done = here.run(*QUICK, *RAY, "model.weights=nowhere.safetensors")
    assert done.status == 2 and "nowhere.safetensors" in done.line and here.left() == [] and here.runs() == []


@pytest.mark.slow
@pytest.mark.parametrize("where", ["a module that is gone", "the script"])
def test_a_plug_in_that_workers_cannot_import_is_one_line_and_leaves_nothing(here: Room, where: str) -> None:
    (here.path / "plugins").mkdir()
    (here.path / "plugins" / "mine.py").write_text("from fedsim.strategies.fedavg import FedAvg as Mine\n")
    module = "mine" if where == "a module that is gone" else "__main__"
    code = (
        "import shutil, sys; sys.path.insert(0, 'plugins'); from mine import Mine; del sys.path[0]\n"
        "shutil.rmtree('plugins'); from fedsim.cli import main; main(sys.argv[1:])"
    )
    with here.start(*QUICK, *RAY, f"strategy._target_={module}.Mine", code=code) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and here.left() == [] and here.runs() == []
    assert err.count("\n") == 1 and f"a worker cannot build what the driver did: strategy._target_={module}.Mine" in err


@pytest.mark.slow
def test_two_runs_at_one_moment_do_not_meet(here: Room, expected: str) -> None:
    both = [start(here, f"run_dir={name}") for name in "ab"]
    calm(here)
    for process in both:
        assert process.communicate(timeout=120) is not None and process.returncode == 0
    assert here.left() == []
    for name in "ab":
        (summary,) = (here.path / name).glob("*/*/summary.json")
        assert f'"state_sha256": "{expected}"' in summary.read_text()


# --- signals ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_but_a_run_to_resume(
    here: Room, expected: str, sign: signal.Signals, moment: str
) -> None:
    until, further, within = MOMENTS[moment]
    process = start(here)
    wait_for(lambda: until(here))
    time.sleep(random.Random(f"{moment} {sign}").uniform(0.1, further))
    begin = time.monotonic()
    if sign == signal.SIGINT:
        os.killpg(process.pid, sign)  # as a terminal does
    else:
        process.send_signal(sign)
    process.wait(60)
    took = time.monotonic() - begin
    _, err = process.communicate()
    assert process.returncode == 130 and here.left() == []
    assert took < within
    assert "Traceback" not in err and err.splitlines()[-1].startswith("fedsim: interrupted")
    calm(here)
    if lines(here):
        assert list(here.runs()[0].glob("checkpoints/*.safetensors"))
    assert resume(here) == expected and here.left() == []


@pytest.mark.slow
def test_an_impatient_user_breaks_nothing(here: Room, expected: str) -> None:
    process = start(here)
    wait_for(lambda: lines(here) >= 2)
    for pause in (0.05, 0.1, 0.2, 0.2):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        time.sleep(pause)
    process.communicate(timeout=ENDS_S)
    assert process.returncode in (130, -signal.SIGINT)  # the last ones may come when all is done
    assert here.left() == []
    calm(here)
    assert resume(here) == expected


@pytest.mark.slow
def test_a_sweep_that_is_interrupted_leaves_nothing(here: Room) -> None:
    process = start(here, "-m", "seed=1,2,3")
    wait_for(lambda: lines(here))
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=ENDS_S)
    assert process.returncode == 130 and here.left() == []
    assert len(here.runs()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["Ray starts", "workers start", "a round"])
def test_after_a_kill_the_guard_clears_at_once(here: Room, expected: str, moment: str) -> None:
    until, further, _ = MOMENTS[moment]
    process = start(here)
    wait_for(lambda: until(here))
    time.sleep(random.Random(moment).uniform(0.1, further))
    process.kill()
    process.communicate(timeout=10)
    assert here.clean(5.0) == []
    calm(here)
    assert resume(here) == expected


@pytest.mark.slow
def test_what_a_kill_leaves_when_the_guard_dies_too_is_cleared_by_the_next_run(here: Room, expected: str) -> None:
    process = start(here)
    wait_for(lambda: lines(here))
    (guard,) = [pid for pid, command in here.processes().items() if " -c import sys" in command]
    os.kill(guard, signal.SIGKILL)
    process.kill()
    process.communicate(timeout=10)
    time.sleep(1.0)
    assert here.left()
    calm(here)
    assert resume(here) == expected and here.left() == []


# --- pieces -----------------------------------------------------------------------------------------------


def test_the_guard_waits_until_its_process_is_gone(here: Room) -> None:
    folder = here.tmp / "1-1"
    folder.mkdir()
    pid, held = leftovers.start_guard(folder)
    try:
        time.sleep(0.5)
        assert folder.exists() and os.waitpid(pid, os.WNOHANG) == (0, 0)
    finally:
        leftovers.end_guard(pid, held)
    assert not folder.exists()


def test_only_processes_of_ray_with_a_file_of_the_cluster_open_are_ended(here: Room) -> None:
    folder = here.tmp / "1-1"
    folder.mkdir()
    (here.path / "ray").mkdir()
    for script in ("ray/agent.py", "viewer.py"):
        (here.path / script).write_text(
            "import sys, time; f = open(sys.argv[1], 'a'); print(1, flush=True); time.sleep(60)"
        )
    started = [
        subprocess.Popen(
            [sys.executable, str(here.path / script), str(where / "log")], stdout=subprocess.PIPE, text=True
        )
        for script, where in (("ray/agent.py", folder), ("ray/agent.py", here.path), ("viewer.py", folder))
    ]
    for process in started:
        assert process.stdout is not None and process.stdout.readline() == "1\n"
    leftovers.remove(folder, grace_s=0)
    inside, outside, viewer = started
    assert inside.wait(5) == -signal.SIGKILL and not folder.exists()
    assert outside.poll() is None and viewer.poll() is None
    for process in started:
        process.kill()
        process.communicate()


def test_signals_wait_for_the_end_of_a_block_and_come_once() -> None:
    order = []
    with pytest.raises(KeyboardInterrupt), sessions._deferred(signal.SIGINT):
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        order.append("end")
    assert order == ["end"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_a_file_that_may_be_left_they_do_not_wait(tmp_path: Path) -> None:
    order = []
    with pytest.raises(KeyboardInterrupt), sessions._deferred(signal.SIGINT, but_in=Path(__file__).name):
        signal.raise_signal(signal.SIGINT)
        order.append("end")
    assert order == []
    # What is raised where Python drops it, as in the middle of a fork, comes at the end.
    with pytest.raises(KeyboardInterrupt), sessions._deferred(signal.SIGINT, but_in=Path(__file__).name):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            order.append("dropped")
        order.append("end")
    assert order == ["dropped", "end"]


def test_a_folder_is_swept_when_its_owner_is_dead_and_only_then(tmp_path: Path) -> None:
    alive, dead = tmp_path / "999999999-1", tmp_path / "999999998-1"  # as in another container: no such process here
    for folder in (alive, dead):
        folder.mkdir()
    lock = os.open(alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    leftovers.sweep(tmp_path)
    assert alive.exists() and not dead.exists()
    os.close(lock)
    leftovers.sweep(tmp_path)
    assert not alive.exists()


AFTER = """
import fedsim, ray
fedsim.simulate({run!r})
ray.init(num_cpus=1, include_dashboard=False)
print(ray.get(ray.put(7)))
"""


@pytest.mark.slow
def test_ray_can_be_used_by_others_after_a_run(here: Room) -> None:
    process = here.start(code=AFTER.format(run=[*QUICK, *RAY]))
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0 and out.strip().endswith("7"), err
