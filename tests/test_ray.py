"""The Ray engine: the bits of the engine in one process, whatever happens to workers."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.clients.local import Local
from fedsim.config import CONF
from fedsim.engine import session as sessions
from fedsim.engine.ray import RayEngine, Stored
from fedsim.errors import ClientError, ConfigError, RunError
from fedsim.reduce import Entry, Rows, mean, stack
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import Grad
from fedsim.vector import Layout
from fedsim.visits import read
from tests.helpers import Run, configure, drive, suited
from tests.test_replay import METHODS

pytest.importorskip("ray")
STRATEGIES = sorted(path.stem for path in (CONF / "strategy").glob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One private cluster and its workers for all tests of this file."""
    with sessions.kept():
        yield


def settings(engine: str, workers: int = 2, values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Values of a config for one engine."""
    own: dict[str, Any] = {"rounds": 3, "checkpoint.seconds": 1000, **(values or {})}
    if engine == "ray":
        own |= {"engine.workers": workers, "engine.cpus_per_worker": 2 / workers}  # one cluster fits all
    return own


def run(engine: str, folder: Path, *choices: str, workers: int = 2, values: Mapping[str, Any] | None = None) -> Run:
    """Runs an experiment: choices of groups, and values by dotted key."""
    return drive(configure((*choices, f"engine={engine}"), settings(engine, workers, values)), folder)


def same(a: Run, b: Run) -> None:
    assert a.state_sha256 == b.state_sha256
    assert a.params_sha256 == b.params_sha256
    assert a.records == b.records


# --- the same bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_has_the_bits_of_one_process(name: str, tmp_path: Path) -> None:
    expected = run("inline", tmp_path, f"strategy={name}", values=suited(name))
    got = run("ray", tmp_path, f"strategy={name}", values=suited(name))
    same(got, expected)
    # As text: the mean loss of a visit without steps is NaN, which is equal to nothing.
    visits = [[*map(repr, read(r.result.run_dir / "visits.csv"))] for r in (expected, got)]
    assert visits[0] == visits[1] and visits[0]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_has_these_bits_with_any_number_of_workers(name: str, workers: int, tmp_path: Path) -> None:
    got = run("ray", tmp_path, f"strategy={name}", workers=workers, values=suited(name))
    same(got, run("inline", tmp_path, f"strategy={name}", values=suited(name)))


@dataclass(frozen=True)
class Draws(FedAvg):
    """Each client gets something of its own: random numbers, or a product of matrices.

    Attributes:
        how: ``random`` or ``product``; bits of both could depend on who else is asked for.
    """

    how: str = "random"

    def unicast(self, state: Any, clients: tuple[int, ...]) -> dict[str, Any]:
        if self.how == "random":
            return {"own": torch.randn(len(clients), 16)}
        g = torch.Generator().manual_seed(0)
        a, b = torch.randn(100, 50, generator=g), torch.randn(50, 300, generator=g)
        return {"own": (a[list(clients)] @ b)[:, :16]}

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        own: Tensor = local.sent.own
        return grad(w) + own.mean(-1, keepdim=True)


KINDS: dict[str, dict[str, Any]] = {
    **METHODS,
    "own random numbers": {"strategy": {"_target_": "tests.test_ray.Draws"}},
    "own products": {"strategy": {"_target_": "tests.test_ray.Draws", "how": "product"}},
    "two threads": {"engine.threads": 2},
    "stacked rows": {"strategy": {"_target_": "tests.helpers.Stacked"}},
    "a median of columns": {"strategy": {"_target_": "tests.helpers.Stacked", "rule": "median"}},
    "heads and trees of outputs": {"strategy": {"_target_": "tests.helpers.Heads"}},
    "frozen parameters": {"strategy": {"_target_": "tests.helpers.Frozen"}},
    "fine-tuning": {"eval.finetune_epochs": 1},
    "a recipe": {"recipe": {"noisy": {"_target_": "tests.helpers.Noisy"}}},
    "batch norm, averaged": {"model": {"_target_": "tests.helpers.Normed", "weights": None}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_method_has_the_bits_of_one_process(kind: str, tmp_path: Path) -> None:
    values = KINDS[kind]
    same(run("ray", tmp_path, values=values), run("inline", tmp_path, values=values))


def test_data_that_clients_make_themselves_are_made_by_workers(tmp_path: Path) -> None:
    data = ("data=synthetic", "strategy=scaffold")
    same(run("ray", tmp_path, *data), run("inline", tmp_path, *data))


def test_weights_from_a_file_need_not_be_on_every_node(tmp_path: Path) -> None:
    first = run("inline", tmp_path, "model=logreg")
    file = first.result.run_dir / "model.safetensors"
    expected = run("inline", tmp_path, "model=logreg", values={"model.weights": str(file)})
    config = configure(("model=logreg", "engine=ray"), settings("ray", values={"model.weights": str(file)}))
    same(drive(config, tmp_path), expected)


def test_a_run_may_change_its_engine_when_it_is_resumed(tmp_path: Path) -> None:
    expected = run("inline", tmp_path / "a", "strategy=scaffold", values={"rounds": 6})
    first = run("inline", tmp_path / "b", "strategy=scaffold", values={"rounds": 3})
    more = configure(("strategy=scaffold", "engine=ray"), settings("ray", values={"rounds": 6}))
    again = drive(more, tmp_path, resume=first.result.run_dir)
    assert again.state_sha256 == expected.state_sha256


# --- workers that are lost --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dies(FedAvg):
    """A client kills its own process, the first times that it is asked.

    Attributes:
        folder: Where it counts them.
        client: Which one.
        times: How often.
        how: ``kill``, or ``hang`` for a worker that does not answer.
    """

    folder: str = ""
    client: int = 3
    times: int = 1
    how: str = "kill"

    def work(self, local: Local) -> Tensor:
        if local.clients == (self.client,) and local.round == 2:
            path = Path(self.folder) / "deaths"
            deaths = len(path.read_text()) if path.exists() else 0
            if deaths < self.times:
                path.write_text("x" * (deaths + 1))
                if self.how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
        return super().work(local)

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        delta = local.delta(w)
        return {"delta": mean(delta, self.weight(w)), "row": stack(delta)}


EVERYBODY = {"participation": {"_target_": "fedsim.clients.participation.All"}}


def dies(folder: Path, **options: Any) -> dict[str, Any]:
    return {"strategy": {"_target_": "tests.test_ray.Dies", "folder": str(folder), **options}, **EVERYBODY}


@pytest.mark.parametrize("times", [1, 3])
def test_a_worker_that_is_lost_costs_time_and_not_bits(
    times: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = run("inline", tmp_path / "a", values=dies(tmp_path, times=0))
    got = run("ray", tmp_path / "b", values=dies(tmp_path, times=times))
    time.sleep(1.5)  # Ray would print a page about it
    assert "raylet" not in "".join(capfd.readouterr())
    assert got.result.summary["totals"]["retries"] == times
    assert got.params_sha256 == expected.params_sha256
    assert [r["retries"] for r in got.records] == [0, times, 0]
    assert [{**r, "retries": 0} for r in got.records] == expected.records


def test_work_that_always_kills_its_worker_ends_the_run_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"round 2, training, clients .*: the worker was lost 4 times .*max_retries"):
        run("ray", tmp_path, values=dies(tmp_path, times=100))


def test_a_worker_that_hangs_is_lost_too(tmp_path: Path) -> None:
    values = dies(tmp_path, how="hang") | {"engine.timeout_s": 2.0}
    got = run("ray", tmp_path / "b", values=values)
    assert [r["retries"] for r in got.records] == [0, 1, 0]
    assert got.params_sha256 == run("inline", tmp_path / "a", values=dies(tmp_path, times=0)).params_sha256


def killer(monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool]) -> list[int]:
    """Kills a worker between two tasks that are handed out; says which processes."""
    import ray

    killed: list[int] = []
    submit, count = RayEngine.submit, 0

    def also(self: RayEngine, task: Any) -> int:
        nonlocal count
        ticket = submit(self, task)
        count += 1
        if when(count):
            ready = [h for h in self._hosts if h.starting is None]
            process = ray.get(ready[count % len(ready)].actor.pid.remote())
            os.kill(process, signal.SIGKILL)
            killed.append(process)
        return ticket

    monkeypatch.setattr(RayEngine, "submit", also)
    return killed


def test_workers_may_die_in_training_and_in_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {**EVERYBODY, "eval.clients": "all"}
    expected = run("inline", tmp_path, "strategy=scaffold", values=values)
    monkeypatch.setattr("fedsim.federation.PIECE_S", 1e-9)  # many tasks
    killed = killer(monkeypatch, lambda count: count % 5 == 3)
    got = run("ray", tmp_path, "strategy=scaffold", values=values)
    assert len(killed) >= 3
    assert got.state_sha256 == expected.state_sha256


# --- clients that fail ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fails(FedAvg):
    """Some clients raise in round 2; others only the first time.

    Attributes:
        folder: Where the latter note that they did.
        always: Those who always do.
    """

    folder: str = ""
    always: str = ""

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        (client,) = local.clients
        if local.round == 2:
            if str(client) in self.always.split():
                raise ArithmeticError(f"client {client} never does it")
            note = Path(self.folder) / f"failed-{client}"
            if self.folder and client % 3 == 0 and not note.exists():
                note.touch()
                raise OSError("a disk that was away for a moment")
        delta = local.delta(w)
        return {"delta": mean(delta, self.weight(w)), "row": stack(delta)}


ENGINES = pytest.mark.parametrize("engine", ["inline", "ray"])


def fails(**options: Any) -> dict[str, Any]:
    return {"strategy": {"_target_": "tests.test_ray.Fails", **options}, **EVERYBODY}


@ENGINES
def test_a_client_that_raises_ends_the_run_with_its_own_error(engine: str, tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"round 2, client 4 .*ArithmeticError: client 4 never does it") as caught:
        run(engine, tmp_path, values=fails(always="4"))
    assert caught.value.visit == {"round": 2, "client": 4, "phase": "train", "visit": "2"}
    assert "alone: fedsim replay" in caught.value.__notes__[0]
    (note,) = tmp_path.glob("*/*/failure.json")
    assert "never does it" in note.read_text()
    assert "in finish\n" in "".join(traceback.format_exception(caught.value))  # the client's own


@ENGINES
def test_a_client_that_is_skipped_is_counted_and_changes_what_the_others_sum_to(engine: str, tmp_path: Path) -> None:
    got = run(engine, tmp_path, values=fails(always="0 4") | {"engine.on_failure": "skip"})
    assert [r["failures"] for r in got.records] == [0, 2, 0] and [r["clients"] for r in got.records] == [7, 5, 7]
    assert got.result.summary["totals"]["failures"] == 2
    # The round is that of a cohort without them.
    without = {"_target_": "tests.test_ray.Without", "out": "0 4"}
    expected = run(
        "inline", tmp_path, values={"strategy": {"_target_": "tests.test_ray.Fails"}, "participation": without}
    )
    assert torch.allclose(got.w.double(), expected.w.double(), rtol=0, atol=1e-7)
    visits = list(read(got.result.run_dir / "visits.csv"))
    assert [(r.round, r.client) for r in visits if r.outcome == "failed"] == [(2, 0), (2, 4)]
    made = [(r.round, r.client) for r in visits if r.outcome == "done"]
    assert made == [(r, c) for r in (1, 2, 3) for c in range(7) if r != 2 or c not in (0, 4)]


def test_skipping_gives_the_same_bits_on_every_engine(tmp_path: Path) -> None:
    values = fails(always="0 1 6") | {"engine.on_failure": "skip"}
    same(run("ray", tmp_path, values=values), run("inline", tmp_path, values=values))


@ENGINES
def test_a_round_of_which_nobody_is_left_ends_the_run(engine: str, tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"round 2: all clients failed; round 2, client 0 .*never does it"):
        run(engine, tmp_path, values=fails(always="0 1 2 3 4 5 6") | {"engine.on_failure": "skip"})


@ENGINES
def test_a_visit_that_is_made_again_has_the_bits_of_one_that_never_failed(engine: str, tmp_path: Path) -> None:
    expected = run("inline", tmp_path / "a", values=fails())
    got = run(engine, tmp_path / "b", values=fails(folder=str(tmp_path)) | {"engine.on_failure": "retry"})
    assert got.params_sha256 == expected.params_sha256
    assert [r["retries"] for r in got.records] == [0, 3, 0]  # clients 0, 3 and 6
    with pytest.raises(ClientError, match="never does it"):
        run(engine, tmp_path / "c", values=fails(always="2") | {"engine.on_failure": "retry"})


@dataclass(frozen=True)
class Odd(FedAvg):
    """One client sends a larger tensor than the others.

    Attributes:
        entry: How it is reduced.
    """

    entry: str = "mean"

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        odd = torch.ones(1, 2 + (local.clients == (5,)))
        return {"delta": mean(local.delta(w), self.weight(w)), "odd": mean(odd) if self.entry == "mean" else stack(odd)}


@ENGINES
@pytest.mark.parametrize("entry", ["mean", "stack"])
def test_entries_of_unequal_shapes_end_the_run_whoever_may_be_skipped(engine: str, entry: str, tmp_path: Path) -> None:
    values = {"strategy": {"_target_": "tests.test_ray.Odd", "entry": entry}, **EVERYBODY, "engine.on_failure": "skip"}
    with pytest.raises(ClientError, match=r"entry 'odd': clients sent shapes .*; they must be equal"):
        run(engine, tmp_path, values=values)


class Without:
    """Everybody; in round 2 (the second draw) not some of them."""

    def __init__(self, out: str) -> None:
        self.out, self.draws = {int(c) for c in out.split()}, 0

    def check(self, num_clients: int) -> None: ...

    def sample(self, num_clients: int, rng: Any) -> list[int]:
        self.draws += 1
        return [c for c in range(num_clients) if self.draws != 2 or c not in self.out]


# --- rows -------------------------------------------------------------------------------------------------


def test_rows_in_shared_memory_are_read_in_parts_and_copied() -> None:
    g = torch.Generator().manual_seed(0)
    whole = torch.randn(7, 6, generator=g, dtype=torch.float64)
    array = whole[:3].numpy().copy()
    array.setflags(write=False)
    n, layout = torch.arange(1.0, 8).double(), Layout.of(torch.nn.Linear(2, 2))
    rows = Rows([Stored(array, torch.device("cpu")), whole[3:]], n, layout)
    plain = Rows([whole], n, layout)
    assert len(rows) == 7 and torch.equal(rows.tensor(), whole)
    assert (
        torch.equal(rows[:, 2:5], whole[:, 2:5]) and torch.equal(rows[-1], whole[6]) and torch.equal(rows[1], whole[1])
    )
    assert torch.equal(rows.mean(), plain.mean())
    c = torch.randn(7, generator=g, dtype=torch.float64)
    assert torch.equal(rows.combine(c), plain.combine(c))
    part = rows[:, 0:2]
    part.zero_()  # the caller's own
    assert torch.equal(rows.tensor(), whole)
    with pytest.raises(IndexError):
        rows[7]


def test_a_worker_that_computes_other_bits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.engine.ray.probe", lambda device: "another")
    with pytest.raises(ConfigError, match="a worker computes other bits than the driver"):
        run("ray", tmp_path)


# --- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "needed"),
    [
        ({"engine.workers": 0}, "engine.workers must be a whole number > 0, or null, got 0"),
        ({"engine.workers": 1.5}, "engine.workers must be a whole number"),
        ({"engine.cpus_per_worker": 0}, "engine.cpus_per_worker must be > 0"),
        ({"engine.cpus_per_worker": 0.00001}, "engine.cpus_per_worker must be > 0, at least 0.0001"),
        ({"engine.cpus_per_worker": True}, "engine.cpus_per_worker must be > 0"),
        ({"engine.timeout_s": "abc"}, "engine.timeout_s must be > 0"),
        ({"engine.address": 6379}, "engine.address must be local, auto or host:port, got 6379"),
        ({"engine.address": None}, "engine.address must be local, auto or host:port, got None"),
        ({"engine.dashboard": "maybe"}, "engine.dashboard must be true or false"),
        ({"engine.dashboard": True, "engine.address": "auto"}, "engine.dashboard must be false when"),
        ({"engine.gpus_per_worker": -1}, "engine.gpus_per_worker must be >= 0"),
        ({"engine.gpus_per_worker": 1.0}, r"need 2 GPUs, but there are 0"),
        ({"engine.timeout_s": 0}, "engine.timeout_s must be > 0"),
        ({"engine.max_retries": -1}, "engine.max_retries must be a whole number, at least 0"),
        ({"engine.on_failure": "ignore"}, "engine.on_failure must be"),
        ({"engine.memory_budget": "lots"}, "engine.memory_budget must be a size such as 512MiB"),
        ({"engine.address": "127.0.0.1:1"}, r"no Ray cluster answers at 127.0.0.1:1 \(Connection refused\)"),
        ({"engine.address": "here"}, "engine.address must be local, auto or host:port, got 'here'"),
        ({"engine.adress": "auto"}, "adress"),
    ],
    ids=str,
)
def test_an_impossible_request_is_one_line_at_once(values: dict[str, Any], needed: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=needed):
        drive(configure(("engine=ray",), {**settings("ray"), **values}), tmp_path)
    assert time.monotonic() - begin < 10
    assert threading.current_thread() is threading.main_thread()
