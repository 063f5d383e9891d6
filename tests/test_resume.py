"""A driver that is killed at any moment resumes, and ends with the bits of a run that was never interrupted."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.errors import ConfigError
from fedsim.experiment import simulate
from fedsim.rundir import read_metrics, read_summary
from tests.crash import ROOT, Ended, Server

SMALL = (
    "client.batching=off",  # moments are those of single clients
    "data=digits",
    "model=logreg",
    "partition=iid",
    "partition.num_clients=6",
    "participation=fixed",
    "participation.clients_per_round=4",
    "client.epochs=null",
    "client.steps=2",
    "rounds=4",
    "tracker=[jsonl]",
    "checkpoint.seconds=0",
)
FEDAVG = (*SMALL, "strategy=fedavg")
SCAFFOLD = (*SMALL, "strategy=scaffold")  # client memory
FEDADAM = (*SMALL, "strategy=fedadam")  # server state
PHASES = (*SMALL, "strategy._target_=tests.phase_strategy.Phases", "rounds=2")
FILES = ("clients.csv", "classes.csv", "visits.csv", "partition.npz", "model.safetensors")
METHODS = pytest.mark.parametrize("args", [FEDAVG, SCAFFOLD, FEDADAM], ids=["fedavg", "scaffold", "fedadam"])


def find(root: Path) -> Path | None:
    """The one run under ``root``; None if it was killed before it had a directory."""
    found = [p for p in root.glob("*/*") if not p.name.startswith(".")]
    assert len(found) <= 1
    return found[0] if found else None


def the_run(root: Path) -> Path:
    """The one run under ``root``."""
    run = find(root)
    assert run is not None
    return run


def outcome(run: Path) -> dict[str, Any]:
    """All that a run leaves, without times."""
    summary = read_summary(run)
    assert summary["totals"].pop("wall_seconds") > 0
    return {
        "summary": {k: v for k, v in summary.items() if k != "commit"},
        "metrics": [{k: v for k, v in r.items() if k != "wall_seconds"} for r in read_metrics(run)],
        "files": {name: (run / name).read_bytes() for name in FILES if (run / name).exists()},
        "leftovers": sorted(p.name for p in run.rglob("*.tmp")),
        "checkpoints": len(list((run / "checkpoints").glob("*.safetensors"))),
    }


class Lab:
    """Starts runs, kills them and goes on with them, each time in another process."""

    def __init__(self, folder: Path) -> None:
        self.server = Server()
        self._folder = folder
        self._whole: dict[tuple[str, ...], tuple[dict[str, Any], list[str]]] = {}

    def whole(self, *args: str) -> tuple[dict[str, Any], list[str]]:
        """What an uninterrupted run leaves, and the moments that it went through; each run is done once."""
        if args not in self._whole:
            root = self._folder / str(len(self._whole))
            moments = self.start(root, args)
            self._whole[args] = outcome(the_run(root)), moments
        return self._whole[args]

    def start(self, root: Path, args: Sequence[str]) -> list[str]:
        """Does a whole run; returns its moments."""
        ended = self.server.run([*args, f"run_dir={root}"])
        assert ended.status == 0, ended.output
        return ended.moments

    def kill(self, root: Path, args: Sequence[str], **how: Any) -> Ended:
        """Starts a run, or goes on with it, until it is killed (with ``after``: if it is not too late)."""
        run = find(root)
        ended = self.server.run([*args, f"run_dir={root}"] if run is None else [f"resume={run}"], **how)
        assert ended.status == -9 or ("after" in how and ended.status == 0), ended.output
        return ended

    def resume(self, root: Path, args: Sequence[str]) -> dict[str, Any]:
        """Goes on until the end; a run that was killed before it had a directory is started again."""
        run = find(root)
        if run is None:
            self.start(root, args)
        else:
            ended = self.server.run([f"resume={run}"])
            assert ended.status == 0, ended.output
        return outcome(the_run(root))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("whole"))
    yield lab
    lab.server.close()


def moments_like(moments: Sequence[str], *parts: str) -> list[int]:
    """Those whose names hold all of the parts."""
    found = [i for i, name in enumerate(moments) if all(part in name for part in parts)]
    assert found, f"there is no moment like {parts}"
    return found


def choose(moments: Sequence[str], count: int) -> list[int]:
    """Moments of special interest, and others at equal distances between the first and the last."""
    chosen = {
        moments_like(moments, "in the middle of writing 0000")[2],  # a checkpoint
        moments_like(moments, "before replacing 0000")[-1],
        moments_like(moments, "in the middle of writing memory/")[1],  # client memory
        moments_like(moments, "in the middle of writing metrics.jsonl")[-1],
        moments_like(moments, "before writing summary.json")[0],
    }
    while len(chosen) < count:
        # The middle of the widest gap.
        points = [-1, *sorted(chosen), len(moments)]
        a, b = max(itertools.pairwise(points), key=lambda gap: gap[1] - gap[0])
        chosen.add((a + b) // 2)
    return sorted(chosen)


# --- killed anywhere --------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["ram", "disk"])
@METHODS
def test_a_killed_run_resumes_to_the_same_bits(lab: Lab, tmp_path: Path, args: tuple[str, ...], memory: str) -> None:
    args = (*args, f"checkpoint.memory={memory}")
    expected, moments = lab.whole(*args)
    for moment in choose(moments, 5)[(memory == "disk") :: 2]:
        root = tmp_path / str(moment)
        lab.kill(root, args, kill=moment)
        assert lab.resume(root, args) == expected, f"killed {moments[moment]}"


@pytest.mark.slow
@METHODS
def test_killed_at_twenty_moments(lab: Lab, tmp_path: Path, args: tuple[str, ...]) -> None:
    """Fifteen exact moments and five at random, half of the runs with memory on disk; prints a table."""
    expected, moments = lab.whole(*args)
    begin = time.monotonic()
    lab.start(tmp_path / "timed", args)
    seconds = time.monotonic() - begin
    rng = random.Random(0)
    plan: list[tuple[str, dict[str, Any]]] = [(moments[m], {"kill": m}) for m in choose(moments, 15)]
    plan += [("", {"after": rng.uniform(0.1, seconds)}) for _ in range(5)]
    same = 0
    print(f"\n{args[-1]}: state_sha256 {expected['summary']['state_sha256'][:16]}, {len(moments)} moments")
    for i, (name, how) in enumerate(plan):
        root, memory = tmp_path / str(i), ("ram", "disk")[i % 2]
        while lab.kill(root, [*args, f"checkpoint.memory={memory}"], **how).status == 0:  # it was too late
            shutil.rmtree(root)
            how["after"] *= 0.9
        name = f"after {how['after']:.3f} s" if "after" in how else name
        found = lab.resume(root, args)
        same += found == expected
        print(
            f"  {i + 1:2} {memory:4} killed {name:68} state {found['summary']['state_sha256'][:16]} "
            f"{'the same' if found == expected else 'ANOTHER'}"
        )
    print(f"{args[-1]}: {same} of {len(plan)} the same")
    assert same == len(plan) == 20


@pytest.mark.slow
@pytest.mark.parametrize("args", [SCAFFOLD, PHASES], ids=["scaffold", "phases"])
def test_killed_at_every_third_moment(lab: Lab, tmp_path: Path, args: tuple[str, ...]) -> None:
    expected, moments = lab.whole(*args)
    for moment in range(0, len(moments), 3):
        root = tmp_path / str(moment)
        lab.kill(root, args, kill=moment)
        assert lab.resume(root, args) == expected, f"killed {moments[moment]}"


@pytest.mark.parametrize("part", ["prepare", "a round", "finalize", "the end"])
def test_killed_in_any_phase(lab: Lab, tmp_path: Path, part: str) -> None:
    expected, moments = lab.whole(*PHASES)
    inside = {
        "prepare": moments_like(moments, "training round 0 explore"),
        "a round": moments_like(moments, "training round 2 train"),
        "finalize": moments_like(moments, "training round 3 polish"),
        "the end": moments_like(moments, "writing model") + moments_like(moments, "writing summary.json"),
    }[part]
    for moment in (inside[1], inside[-2]):
        root = tmp_path / str(moment)
        lab.kill(root, PHASES, kill=moment)
        assert lab.resume(root, PHASES) == expected, f"killed {moments[moment]}"


def test_a_finalize_that_was_killed_is_all_that_is_done_again(lab: Lab, tmp_path: Path) -> None:
    _, moments = lab.whole(*PHASES)
    lab.kill(tmp_path, PHASES, kill=moments_like(moments, "training round 3 polish")[2])
    again = lab.server.run([f"resume={the_run(tmp_path)}"]).moments
    assert not [m for m in again if "training" in m and "polish" not in m]


def test_killed_again_and_again(lab: Lab, tmp_path: Path) -> None:
    args = (*SCAFFOLD, "checkpoint.memory=disk")
    expected, moments = lab.whole(*args)
    lab.kill(tmp_path, args, kill=moments_like(moments, "in the middle of writing 00000002")[0])
    lab.kill(tmp_path, args, kill=0)  # at the first thing that the resume does
    lab.kill(tmp_path, args, kill=25)  # in the round after it
    lab.kill(tmp_path, args, kill=45)
    assert lab.resume(tmp_path, args) == expected


def test_killed_before_the_first_checkpoint(lab: Lab, tmp_path: Path) -> None:
    expected, moments = lab.whole(*PHASES)
    for name in ("before renaming", "after renaming", "in the middle of writing partition.npz"):
        root = tmp_path / name
        lab.kill(root, PHASES, kill=moments_like(moments, name)[0])
        run = find(root)
        assert (run is None) == (name == "before renaming")
        assert run is None or (run / "config.yaml").exists()
        assert lab.resume(root, PHASES) == expected


def test_rounds_after_the_last_checkpoint_are_done_again(lab: Lab, tmp_path: Path) -> None:
    args = (*SCAFFOLD, "checkpoint.every=3", "rounds=5")
    expected, moments = lab.whole(*args)
    for killed_in in (3, 5):
        root = tmp_path / str(killed_in)
        lab.kill(root, args, kill=moments_like(moments, f"training round {killed_in} ")[1])
        assert len(read_metrics(the_run(root))) == killed_in - 1
        assert lab.resume(root, args) == expected


def test_where_a_checkpoint_was_damaged_the_one_before_is_left(lab: Lab, tmp_path: Path) -> None:
    expected, moments = lab.whole(*SCAFFOLD)
    lab.kill(tmp_path, SCAFFOLD, kill=moments_like(moments, "training round 4 ")[3])
    run = the_run(tmp_path)
    newest = sorted((run / "checkpoints").glob("*.safetensors"))[-1]
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    ended = lab.server.run([f"resume={run}"])
    assert ended.status == 1
    assert ended.output.count("\n") == 1 and f"checkpoint {newest} is damaged" in ended.output
    newest.unlink()
    assert lab.resume(tmp_path, SCAFFOLD) == expected


# --- interrupted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_leaves_a_run_that_resumes(lab: Lab, tmp_path: Path, sign: signal.Signals) -> None:
    args = (*SCAFFOLD, "rounds=60", "eval.every=50")
    command = [sys.executable, "-m", "fedsim.cli", *args, f"run_dir={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        deadline = time.monotonic() + 60
        while (run := find(tmp_path)) is None or not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < 3:
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(sign)
        output = process.stderr.read()
    assert process.returncode == 130
    assert "interrupted" in output and "Traceback" not in output
    assert not (run / "summary.json").exists()
    assert 3 <= len(read_metrics(run)) < 60
    assert lab.resume(tmp_path, args) == lab.whole(*args)[0]


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_the_middle_of_a_write_leaves_no_half_file(lab: Lab, tmp_path: Path, sign: int) -> None:
    expected, moments = lab.whole(*SCAFFOLD)
    name = "in the middle of writing " + ("00000002" if sign == signal.SIGINT else "memory/")
    moment = moments_like(moments, name)[0]
    ended = lab.server.run([*SCAFFOLD, f"run_dir={tmp_path}"], kill=moment, sign=sign)
    assert ended.status == 130 and ended.output.count("\n") == 1, ended.output
    assert not list(tmp_path.rglob("*.tmp"))
    assert lab.resume(tmp_path, SCAFFOLD) == expected


# --- what a resume may change -----------------------------------------------------------------------------


def test_a_finished_run_stays_as_it_is(lab: Lab, tmp_path: Path) -> None:
    lab.start(tmp_path, PHASES)
    run = the_run(tmp_path)

    def snapshot() -> dict[str, tuple[int, bytes]]:
        files = (p for p in run.rglob("*") if p.is_file() and p.name != ".lock")
        return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}

    before = snapshot()
    ended = lab.server.run([f"resume={run}"])
    assert ended.status == 0, ended.output
    assert not [m for m in ended.moments if "training" in m or "writing" in m]
    assert snapshot() == before
    assert simulate([f"resume={run}"]).summary == read_summary(run)


@METHODS
def test_more_rounds_are_the_rounds_of_a_longer_run(tmp_path: Path, args: tuple[str, ...]) -> None:
    # eval.every does not divide the rounds of the first part: its last evaluation is one that the longer run lacks.
    args = (*args, "eval.every=2", "data.validation=0.1", "stop.patience=3")
    first = simulate([*args, "rounds=3", f"run_dir={tmp_path / 'a'}"])
    second = simulate([f"resume={first.run_dir}", "rounds=7"])
    straight = simulate([*args, "rounds=7", f"run_dir={tmp_path / 'b'}"])
    assert second.run_dir == first.run_dir
    for key in ("state_sha256", "params_sha256", "config_sha256", "stopped", "rounds", "final"):
        assert second.summary[key] == straight.summary[key], key
    assert second.summary["state_sha256"] != first.summary["state_sha256"]
    assert torch.equal(second.params, straight.params)
    evaluated = [[r["round"] for r in result.metrics if "test_loss" in r] for result in (second, straight)]
    assert evaluated == [[2, 3, 4, 6, 7], [2, 4, 6, 7]]
    assert read_summary(first.run_dir)["rounds"] == 7


def test_more_rounds_killed_before_their_summary(lab: Lab, tmp_path: Path) -> None:
    expected, _ = lab.whole(*FEDAVG, "rounds=6")
    lab.start(tmp_path, FEDAVG)
    run = the_run(tmp_path)
    moments = lab.server.run([f"resume={run}", "rounds=5"]).moments
    moment = moments_like(moments, "before writing model")[0] + len(moments_like(moments, "writing clients.csv"))
    assert lab.server.run([f"resume={run}", "rounds=6"], kill=moment).status == -9
    assert not (run / "summary.json").exists()  # that of fewer rounds would pass for this one's
    assert lab.resume(tmp_path, FEDAVG) == expected  # without rounds=6: the run remembers


def test_fewer_rounds_than_were_done_are_refused(tmp_path: Path) -> None:
    first = simulate([*FEDAVG, f"run_dir={tmp_path}"])
    with pytest.raises(ConfigError, match=r"rounds=3, but .* has done 4 rounds already"):
        simulate([f"resume={first.run_dir}", "rounds=3"])
    assert read_summary(first.run_dir) == first.summary


def test_a_model_that_was_finalised_takes_no_more_rounds(tmp_path: Path) -> None:
    first = simulate([*PHASES, f"run_dir={tmp_path}"])
    with pytest.raises(ConfigError, match="its strategy has finalised the model"):
        simulate([f"resume={first.run_dir}", "rounds=3"])
    assert read_summary(first.run_dir) == first.summary


@pytest.mark.parametrize("memory", ["ram", "disk"])
def test_memory_may_move_between_ram_and_disk(tmp_path: Path, memory: str) -> None:
    other = {"ram": "disk", "disk": "ram"}[memory]
    first = simulate([*SCAFFOLD, f"checkpoint.memory={memory}", f"run_dir={tmp_path / 'a'}"])
    second = simulate([f"resume={first.run_dir}", "rounds=8", f"checkpoint.memory={other}"])
    straight = simulate([*SCAFFOLD, "rounds=8", f"run_dir={tmp_path / 'b'}"])
    assert second.summary["state_sha256"] == straight.summary["state_sha256"]


@pytest.mark.parametrize(
    "optimizer",
    [
        ["client.momentum=0.9"],
        ["client.optimizer=adam", "client.lr=0.01"],
        ["client.optimizer={_target_: torch.optim.RMSprop, _partial_: true, momentum: 0.5}", "client.lr=0.01"],
    ],
    ids=["momentum", "adam", "torch.optim"],
)
@pytest.mark.filterwarnings("ignore")  # torch.optim's own, at import
def test_a_kept_optimizer_survives(tmp_path: Path, optimizer: list[str]) -> None:
    args = [*FEDAVG, *optimizer]
    first = simulate([*args, "rounds=2", "client.keep_optimizer=true", f"run_dir={tmp_path / 'a'}"])
    second = simulate([f"resume={first.run_dir}", "rounds=4"])
    straight = simulate([*args, "client.keep_optimizer=true", f"run_dir={tmp_path / 'b'}"])
    assert second.summary["state_sha256"] == straight.summary["state_sha256"]
    forgetful = simulate([*args, f"run_dir={tmp_path / 'c'}"])
    assert forgetful.summary["params_sha256"] != straight.summary["params_sha256"]


def test_what_is_compared_differs_between_runs(lab: Lab) -> None:
    found = [lab.whole(*args)[0]["summary"] for args in (FEDAVG, (*FEDAVG, "seed=1"), SCAFFOLD, FEDADAM)]
    for key in ("state_sha256", "params_sha256"):
        assert len({summary[key] for summary in found}) == len(found)


def test_a_finished_run_without_its_checkpoints_keeps_its_results(tmp_path: Path) -> None:
    first = simulate([*FEDAVG, f"run_dir={tmp_path}"])
    for folder in (shutil.rmtree, Path.mkdir):  # deleted to save space; there, but empty
        folder(first.run_dir / "checkpoints")
        before = outcome(first.run_dir)
        for more in ([], ["rounds=9"]):
            with pytest.raises(ConfigError, match=r"is finished, but has no checkpoint to go on from"):
                simulate([f"resume={first.run_dir}", *more])
        assert outcome(first.run_dir) == before


def test_an_unfinished_run_without_its_checkpoints_starts_anew_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = simulate([*FEDAVG, f"run_dir={tmp_path}"])
    expected = outcome(first.run_dir)
    (first.run_dir / "summary.json").unlink()
    shutil.rmtree(first.run_dir / "checkpoints")
    simulate([f"resume={first.run_dir}", "tracker=[console,jsonl]"])
    assert "no checkpoint was found: starts from the beginning" in capsys.readouterr().out
    assert outcome(first.run_dir) == expected
