"""A visit that is run again alone has the recorded bits, fails as it failed, and changes nothing."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim import tree
from fedsim.clients.local import Local
from fedsim.errors import ClientError, ConfigError, RunError
from fedsim.experiment import build, simulate
from fedsim.federation import Federation
from fedsim.reduce import Entry, mean
from fedsim.replay import Replay, replay
from fedsim.run import Result
from fedsim.rundir import GrowingFile
from fedsim.strategies.fedavg import FedAvg
from fedsim.visits import Record, Visits, read
from tests.cli import Fedsim
from tests.helpers import Async, AsyncState, Interrupted, configure, drive, examples_of, module_of

SMALL = (
    "data=digits",
    "model=logreg",
    "partition.num_clients=12",
    "participation=fixed",
    "participation.clients_per_round=5",
    "client.epochs=null",
    "client.steps=3",
    "client.momentum=0.9",
    "rounds=8",
    "tracker=[jsonl]",
)


@dataclass(frozen=True)
class Fails(FedAvg):
    """Client 3 raises from round 5 on.

    Attributes:
        phases: A phase comes first in every round, in which nobody raises.
    """

    phases: bool = False

    def round(self, fed: Federation, state: Any) -> Any:
        if self.phases:
            fed.train(fed.sample(), state, phase="explore", steps=1)
        return self.step(state, fed.train(range(fed.num_clients), state))

    def work(self, local: Local) -> Tensor:
        if local.clients == (3,) and local.round >= 5 and local.phase == "train":
            raise ArithmeticError("the third client does not like it")
        return super().work(local)


BIAS = 0.0


@dataclass(frozen=True)
class Biased(FedAvg):
    """What clients send depends on a number outside: a code change, in small."""

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        return {"delta": mean(local.delta(w) + BIAS)}


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setattr("fedsim.run.Driver._draw", lambda *_: None)  # a third of the time of a small run
    return lambda *overrides: simulate([*SMALL, f"run_dir={tmp_path}", *overrides])


def content(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def records(run: Path) -> list[Record]:
    return list(read(run / "visits.csv"))


def only(found: list[Replay]) -> Replay:
    (one,) = found
    return one


# --- the same bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["ram", "disk"])
@pytest.mark.parametrize("strategy", ["scaffold", "fedadam"])
def test_twenty_random_visits_have_the_recorded_bits(go: Callable[..., Result], strategy: str, memory: str) -> None:
    run = go(f"strategy={strategy}", f"checkpoint.memory={memory}", "checkpoint.seconds=0", "checkpoint.keep=3").run_dir
    before, all_visits = content(run), records(run)
    assert len(all_visits) == 8 * 5 and {r.round for r in all_visits} == set(range(1, 9))
    for r in random.Random(0).sample(all_visits, 20):
        found = only(replay(run, r.round, r.client))
        assert found.recorded == r and found.same is True
        done = found.done
        assert (done.steps, done.bytes_up) == (r.steps, r.bytes_up)
    assert content(run) == before


METHODS: dict[str, dict[str, Any]] = {
    "private parameters": {"strategy": {"_target_": "tests.helpers.FedRep"}},
    "rows and unicast": {"strategy": {"_target_": "tests.helpers.OwnModels"}},
    "explorers and guidance": {"strategy": {"_target_": "tests.helpers.Exploring"}},
    "the server trains too": {"strategy": {"_target_": "tests.helpers.ServerToo"}, "data.validation": 0.1},
    "pruned variants": {"strategy": {"_target_": "tests.helpers.Pruned"}, "model.hidden": [8]},
    "arrivals": {"strategy": {"_target_": "tests.helpers.Async"}},
    "phases": {"strategy": {"_target_": "tests.phase_strategy.Phases"}},
    "batch norm": {"model": {"_target_": "tests.helpers.Normed", "weights": None}, "client.buffers": "local"},
    "kept momentum": {"client.keep_optimizer": True, "participation": {"_target_": "tests.test_replay.Everyone"}},
}


class Everyone:
    """All clients, in descending order, to be sorted by whoever needs it sorted."""

    def check(self, num_clients: int) -> None: ...

    def sample(self, num_clients: int, rng: Any) -> list[int]:
        return list(range(num_clients))[::-1]


@pytest.mark.parametrize("method", METHODS)
def test_every_visit_of_every_kind_of_method_is_reproduced(tmp_path: Path, method: str) -> None:
    values = {"rounds": 3, "checkpoint.seconds": 0, **METHODS[method]}
    run = drive(configure(values=values), tmp_path).result.run_dir
    everything = records(run)
    seen = 0
    for number, client in sorted({(r.round, r.client) for r in everything}):
        found = replay(run, number, client)
        expected = [r for r in everything if (r.round, r.client) == (number, client)]
        assert [v.recorded for v in found] == expected
        assert all(v.same for v in found)
        seen += len(found)
    assert seen == len(everything) > 0
    if method == "phases":  # before round 1, and after round 3
        assert {0, 4} <= {r.round for r in everything}
        assert {r.phase for r in everything} == {"explore", "train", "polish"}
    if method == "arrivals":
        assert any(r.booked > r.round for r in everything)


def test_one_phase_of_a_round_can_be_asked_for(tmp_path: Path) -> None:
    run = drive(configure(values={"rounds": 1, "strategy": {"_target_": "tests.phase_strategy.Phases"}}), tmp_path)
    path = run.result.run_dir
    client = next(r.client for r in records(path) if r.phase == "polish")
    assert only(replay(path, 2, client, "polish")).phase == "polish"
    with pytest.raises(ConfigError, match=r"has no phase polsh in round 2 \(did you mean 'polish'\?\); it has: polish"):
        replay(path, 2, client, "polsh")


def test_personal_models_come_back_with_the_visit(tmp_path: Path) -> None:
    run = drive(configure(values={"rounds": 3, "strategy": {"_target_": "tests.helpers.FedRep"}}), tmp_path)
    last = {r.client: r for r in records(run.result.run_dir)}  # each client's last visit left what memory holds
    for client, r in last.items():
        (row,) = run.memory.get((client,))
        again = only(replay(run.result.run_dir, r.round, client)).done.memory
        assert torch.equal(again["strategy.private"], row["strategy.private"])


@pytest.mark.parametrize("keep", ["2", "null"])
def test_the_nearest_checkpoint_is_where_a_replay_starts(
    go: Callable[..., Result], keep: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fedsim")
    run = go("strategy=scaffold", "checkpoint.seconds=0", f"checkpoint.keep={keep}").run_dir
    assert len(list((run / "checkpoints").glob("*.safetensors"))) == (2 if keep == "2" else 9)
    for r in records(run)[::5]:
        assert only(replay(run, r.round, r.client)).same
        # Those after round 7 and 8 are kept, and that after round 8 is of a finished run.
        start = r.round - 1 if keep == "null" or r.round == 8 else 0
        assert f"replay starts after round {start}" in caplog.records[-1].message


def test_other_code_shows(fedsim: Fedsim, go: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    run = go("strategy._target_=tests.test_replay.Biased", "rounds=2").run_dir
    r = records(run)[0]
    assert "as recorded" in fedsim("replay", str(run), f"round={r.round}", f"client={r.client}").out
    monkeypatch.setattr("tests.test_replay.BIAS", 1e-300)  # too little for the sum: nothing changes
    assert fedsim("replay", str(run), f"round={r.round}", f"client={r.client}").status == 0
    monkeypatch.setattr("tests.test_replay.BIAS", 1e-9)
    done = fedsim("replay", str(run), f"round={r.round}", f"client={r.client}")
    assert done.status == 1 and "other bits than in the run" in done.line
    assert f"DIFFERS: {r.entries} was recorded" in done.out
    assert f"{r.memory}  as recorded" in done.out


def test_a_run_that_was_resumed_has_the_visits_of_one_that_was_not(tmp_path: Path) -> None:
    whole = drive(configure(values={"rounds": 5}), tmp_path / "whole").result.run_dir
    config = configure(values={"rounds": 5})
    config["tracker"]["recorder"]["kill_at"] = 4
    with pytest.raises(Interrupted):
        drive(config, tmp_path / "killed")
    (killed,) = (tmp_path / "killed").glob("*/*")
    assert {r.booked for r in records(killed)} == {1, 2, 3, 4}
    drive(configure(values={"rounds": 5}), tmp_path, resume=killed)
    assert (killed / "visits.csv").read_bytes() == (whole / "visits.csv").read_bytes()


def test_a_half_written_visit_is_left_out(tmp_path: Path) -> None:
    run = drive(configure(values={"rounds": 2}), tmp_path).result.run_dir
    path, before = run / "visits.csv", records(run)
    path.write_bytes(path.read_bytes()[:-9])
    assert records(run) == before[:-1]


# --- what is recorded -------------------------------------------------------------------------------------


def test_what_is_recorded_of_a_visit_is_what_was_done(tmp_path: Path) -> None:
    # One step over all examples: its loss is that of the global model that was sent.
    one = {"client.epochs": 1, "client.batch_size": None, "client.momentum": 0.0, "rounds": 1}
    config = configure(values={**one, "model.hidden": [5]})
    run, exp = drive(config, tmp_path), build(config)
    d = exp.program.layout.d
    for r in records(run.result.run_dir):
        x, y = examples_of(exp, r.client)
        expected = float(F.cross_entropy(module_of(exp)(x).detach(), y))
        assert (r.round, r.phase, r.visit, r.booked) == (1, "train", "1", 1)
        assert (r.steps, r.examples, r.bytes_down, r.bytes_up) == (1, len(y), 4 * d, 4 * d)
        assert r.loss == pytest.approx(expected, rel=1e-5)
    many = drive(configure(values={"rounds": 1, "strategy": {"_target_": "tests.helpers.Stacked"}}), tmp_path)
    for r in records(many.result.run_dir):  # one epoch of minibatches of 64: as many examples as it has, in more steps
        n = len(exp.program.shard(r.client))
        assert (r.steps, r.examples) == (-(-n // 64), n)
        assert r.bytes_up > r.bytes_down  # rows, and labels


@dataclass(frozen=True)
class Minded(FedAvg):
    """Remembers, weighs and sends what numbers outside say."""

    def memory(self, local: Local) -> dict[str, Tensor]:
        return {"number": torch.zeros(1, 1, dtype=torch.float64)}

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        local.memory.number = local.memory.number + 1 + OUTSIDE.get("memory", 0)
        weight = local.num_examples + OUTSIDE.get("weight", 0)
        return {"delta": mean(local.delta(w) + OUTSIDE.get("delta", 0), weight)}


OUTSIDE: dict[str, float] = {}


@pytest.mark.parametrize(("what", "entries", "memory"), [("memory", 1, 0), ("weight", 0, 1), ("delta", 0, 1)])
def test_fingerprints_tell_what_is_sent_its_weight_and_what_is_kept_apart(
    go: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, what: str, entries: int, memory: int
) -> None:
    run = go("strategy._target_=tests.test_replay.Minded", "rounds=2").run_dir
    r = records(run)[-1]
    monkeypatch.setitem(OUTSIDE, what, 1e-9)
    found = only(replay(run, r.round, r.client))
    assert (found.entries == r.entries, found.memory == r.memory) == (bool(entries), bool(memory))
    assert found.same is False


def test_anything_may_be_sent_in_a_tree_and_has_a_fingerprint() -> None:
    kinds: list[Any] = [np.float64(1.5), np.arange(3), {0.5: 1}, {"a": b"x"}, object(), np.arange(3.0)]
    assert len({tree.fingerprint(k) for k in kinds}) == len(kinds)
    assert tree.fingerprint(np.arange(3)) == tree.fingerprint(np.arange(3))


def test_lines_that_are_damaged_are_left_out_when_a_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "fedsim")
    run = drive(configure(values={"rounds": 2}), tmp_path).result.run_dir
    before = records(run)
    lines = (run / "visits.csv").read_text().splitlines(keepends=True)
    (run / "visits.csv").write_text("".join([*lines[:2], "1,x," + "9" * 200_000 + "\n", *lines[3:]]))
    with pytest.raises(ConfigError, match=r"visits.csv:3: damaged line"):
        records(run)
    drive(configure(values={"rounds": 3}), tmp_path, resume=run)
    after = records(run)
    assert after[: len(before) - 1] == [before[0], *before[2:]] and after[-1].round == 3
    assert "visits.csv:3: damaged line" in caplog.text
    (run / "visits.csv").unlink()
    drive(configure(values={"rounds": 4}), tmp_path, resume=run)
    assert {r.round for r in records(run)} == {4}


def test_rows_that_are_missing_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Visits(tmp_path / "visits.csv", None).close()
    Visits(tmp_path / "visits.csv", 3).close()
    assert "ends with round 0, but the checkpoint holds 3: visits are missing" in caplog.text


def test_half_a_write_ends_the_run_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: bytes) -> int:
            return len(data) - 1

    file = GrowingFile(tmp_path / "x.csv", "")
    file.close()
    monkeypatch.setattr(file, "_file", Full())
    with pytest.raises(RunError, match=r"only 4 of 5 bytes were written; is the disk full.*go on with fedsim resume="):
        file.append("1,2,\n")


# --- failures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phases", [False, True])
def test_a_client_that_raised_raises_the_same_again(
    go: Callable[..., Result], fedsim: Fedsim, tmp_path: Path, phases: bool
) -> None:
    with pytest.raises(ClientError) as ended:
        go("strategy._target_=tests.test_replay.Fails", f"+strategy.phases={phases}", "checkpoint.seconds=0")
    (run,) = tmp_path.glob("*/*/config.yaml")
    failure = json.loads((run.parent / "failure.json").read_text())
    assert failure == {"round": 5, "client": 3, "phase": "train", "visit": "5", "error": str(ended.value)}
    assert f"fedsim replay {run.parent} round=5 client=3" in " ".join(ended.value.__notes__)
    with pytest.raises(ClientError) as again:
        replay(run.parent, 5, 3)
    assert str(again.value) == str(ended.value)
    cause, first = again.value.__cause__, ended.value.__cause__
    assert type(cause) is type(first) is ArithmeticError and cause.args == first.args
    done = fedsim("replay", str(run.parent), "round=5", "client=3")
    assert done.status == 1 and done.err.count("\n") == 1 and "the third client does not like it" in done.err
    assert done.out.startswith("Traceback") and "in work" in done.out  # where in the method it was
    assert done.out.endswith("the error that ended the run\n")
    assert fedsim("replay", str(run.parent), "round=5", "client=4").status == 0  # of a round that was never finished


@dataclass(frozen=True)
class Late(Async):
    """Event-driven; a slow client's visit fails when it arrives, rounds after it was handed out.

    Attributes:
        task: Which of client 0's tasks fails; 0: none.
    """

    task: int = 1

    def prepare(self, fed: Federation, state: AsyncState) -> AsyncState:
        for i in range(fed.num_clients):
            fed.dispatch(i, state, 40 if i == 0 else 1 + i % 3)
        return state

    def work(self, local: Local) -> Tensor:
        if local.clients == (0,) and local._visit.visit == f"task.{self.task}":
            raise ArithmeticError("late, and wrong")
        return super().work(local)


@pytest.mark.parametrize("task", [1, 2])
def test_an_event_driven_client_that_raised_does_so_again(tmp_path: Path, fedsim: Fedsim, task: int) -> None:
    strategy = {"_target_": "tests.test_replay.Late", "task": task, "pause_ns": 0}
    config = configure(values={"rounds": 400, "strategy": strategy, "checkpoint.seconds": 0})
    with pytest.raises(ClientError, match="late, and wrong") as ended:
        drive(config, tmp_path / "runs")
    (file,) = (tmp_path / "runs").glob("*/*/failure.json")
    failure = json.loads(file.read_text())
    assert failure["visit"] == f"task.{task}" and failure["client"] == 0
    done = fedsim("replay", str(file.parent), f"round={failure['round']}", "client=0")
    assert done.status == 1 and done.out.endswith("the error that ended the run\n"), done
    assert str(ended.value) in done.err


def test_what_is_still_under_way_at_the_end_can_be_replayed(tmp_path: Path) -> None:
    strategy = {"_target_": "tests.test_replay.Late", "task": 0}
    run = drive(configure(values={"rounds": 3, "strategy": strategy}), tmp_path).result.run_dir
    assert 0 not in {r.client for r in records(run)}
    found = only(replay(run, 0, 0))
    assert found.same is None and found.done.steps == 40


def test_an_early_stop_is_where_a_replay_finds_the_last_phase(tmp_path: Path) -> None:
    values = {"rounds": 9, "strategy": {"_target_": "tests.phase_strategy.Phases"}, "stop.virtual_seconds": 0.05}
    run = drive(configure(values=values), tmp_path).result.run_dir
    everything = records(run)
    last = max(r.round for r in everything if r.phase == "train")
    assert last < 9
    polish = [r for r in everything if r.phase == "polish"]
    assert {r.round for r in polish} == {last + 1}
    assert only(replay(run, last + 1, polish[0].client)).same


def test_a_damaged_checkpoint_costs_a_replay_time_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fedsim")
    keep = {"checkpoint.every": 1, "checkpoint.seconds": 0, "checkpoint.keep": None}
    run = drive(configure(values={"rounds": 4, **keep}), tmp_path)
    path = run.result.run_dir
    for damaged, start in ((4, 3), (3, 2), (2, 1)):
        (file,) = (path / "checkpoints").glob(f"{damaged:08d}-*")
        file.write_bytes(file.read_bytes()[:-1])
        r = records(path)[-1]
        assert only(replay(path, r.round, r.client)).same
        assert f"replay starts after round {start}" in caplog.text
        caplog.clear()


def test_an_error_that_does_not_come_again_is_said(
    go: Callable[..., Result], fedsim: Fedsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ClientError):
        go("strategy._target_=tests.test_replay.Fails")
    (run,) = tmp_path.glob("*/*/config.yaml")
    monkeypatch.setattr(Fails, "work", FedAvg.work)
    done = fedsim("replay", str(run.parent), "round=5", "client=3")
    assert done.status == 1 and "did not come again: round 5, client 3" in done.line


def test_a_resumed_run_forgets_the_failure(
    go: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ClientError):
        go("strategy._target_=tests.test_replay.Fails")
    (run,) = tmp_path.glob("*/*/config.yaml")
    monkeypatch.setattr(Fails, "work", FedAvg.work)
    simulate([f"resume={run.parent}"])
    assert not (run.parent / "failure.json").exists()


# --- mistakes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three rounds."""
    return drive(configure(values={"rounds": 3}), tmp_path_factory.mktemp("runs")).result.run_dir


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        ((), "fedsim replay needs round=, as in"),
        (("round=1",), "fedsim replay needs client=, as in"),
        (("round=one", "client=1"), "round= takes a whole number, got 'one'"),
        (("round=1", "client=-1"), "client= takes a whole number or 'server', got '-1'"),
        (("round=1", "client=7"), "client=7: .* has clients 0 to 6"),
        (("round=9", "client=1"), "round=9: .* has done rounds 1 to 3"),
        (("round=1", "client=server"), "the server took no part in round 1"),
        (("round=1", "round=2", "client=1"), "round= is given twice"),
        (("round=1", "clint=1"), r"has no option clint= \(did you mean 'client'\?\); it takes round=, client=, phase="),
        (("round=", "client=1"), "round= needs a value"),
        (("--round", "1"), r"unknown option '--round'"),
    ],
)
def test_a_mistake_is_one_line(finished: Path, fedsim: Fedsim, words: tuple[str, ...], needed: str) -> None:
    done = fedsim("replay", str(finished), *words)
    assert done.status == 2 and re.search(needed, done.line), done.line


def test_who_took_no_part_is_said_before_anything_is_computed(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {r.client for r in records(finished) if r.round == 2}
    absent = min(set(range(7)) - there)
    monkeypatch.setattr(Federation, "train", None)
    with pytest.raises(ConfigError, match=f"client {absent} took no part in round 2 of .*visits.csv say who did"):
        replay(finished, 2, absent)


def test_another_config_damaged_files_and_no_run_are_said(
    finished: Path, fedsim: Fedsim, tmp_path: Path, go: Callable[..., Result]
) -> None:
    words = [f"round={records(finished)[-1].round}", f"client={records(finished)[-1].client}"]
    assert "is not a directory" in fedsim("replay", str(tmp_path / "none"), *words).line
    assert "is not a run directory: it has no config.yaml" in fedsim("replay", str(tmp_path), *words).line
    assert "takes one run directory, got 2" in fedsim("replay", str(finished), str(finished), *words).line
    run = tmp_path / "copy"
    shutil.copytree(finished, run)
    (run / "visits.csv").unlink()
    assert "visits.csv does not exist" in fedsim("replay", str(run), *words).line
    (run / "visits.csv").write_text("round,client\n1,x\n")
    assert "visits.csv:1: damaged line" in fedsim("replay", str(run), *words).line
    lines = (finished / "visits.csv").read_text().splitlines(keepends=True)
    (run / "visits.csv").write_text("".join(line for line in lines if line.split(",")[11] != "3"))
    assert "visits.csv ends with round 2 of 3: it is damaged" in fedsim("replay", str(run), *words).line
    shutil.copy(finished / "visits.csv", run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("lr: 0.05", "lr: 0.5"))
    assert "belong to another config than config.yaml" in fedsim("replay", str(run), *words).line
    (run / "config.yaml").write_text(text.replace("lr: 0.05", "lr: -1"))
    assert "client.lr" in fedsim("replay", str(run), *words).line
    (run / "config.yaml").write_text(text)


# --- fingerprints -----------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 6000),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_any_one_bit_changes_a_fingerprint(n: int, dtype: torch.dtype, place: float, bit: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n * dtype.itemsize,), generator=g, dtype=torch.uint8)
    if dtype == torch.bool:
        x, bit = x % 2, 0
    y = x.clone()
    y[int(place * len(y))] ^= 1 << bit
    a, b = x.view(dtype), y.view(dtype)
    assert tree.fingerprint({"x": a}) == tree.fingerprint({"x": a.clone()}) != tree.fingerprint({"x": b})


@given(n=st.integers(2, 6000), i=st.floats(0, 1, exclude_max=True), j=st.floats(0, 1, exclude_max=True))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_two_numbers_in_each_others_place_change_a_fingerprint(n: int, i: float, j: float) -> None:
    x = torch.arange(n, dtype=torch.float64)
    y = x.clone()
    a, b = int(i * n), int(j * n)
    y[a], y[b] = x[b], x[a]
    unseen = a == b or (n >= 4 * tree.FOLD and (a - b) % tree.FOLD == 0 and max(a, b) < n // tree.FOLD * tree.FOLD)
    assert (tree.fingerprint(x) == tree.fingerprint(y)) == unseen


def test_fingerprints_tell_structure_and_types_apart_and_do_not_follow_strides() -> None:
    x = torch.arange(6000, dtype=torch.float64).view(60, 100)
    assert tree.fingerprint(x) == tree.fingerprint(x.t().contiguous().t()) != tree.fingerprint(x.t())
    kinds: list[Any] = [x, x.float(), x.view(100, 60), [x], (x,), {"a": x}, {"b": x}, None, 1, 1.0, "1", True]
    assert len({tree.fingerprint(k) for k in kinds}) == len(kinds)
    assert tree.fingerprint({"a": 1, "b": 2}) == tree.fingerprint({"b": 2, "a": 1})
    assert tree.fingerprint(torch.ones(3, requires_grad=True)) == tree.fingerprint(torch.ones(3))
