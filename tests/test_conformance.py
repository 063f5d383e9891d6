"""The laws that every method obeys; a new file in ``conf/strategy`` is held to them by itself.

A law is a test with the argument ``name``. A strategy that a law does not fit says so, with the reason, in
`Strategy.exempt`; the key is the test's name without ``test_``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from fedsim import federation, tree
from fedsim.batching import declared
from fedsim.checkpoint import Checkpoints
from fedsim.config import CONF, Config
from fedsim.engine import session as sessions
from fedsim.experiment import build
from fedsim.federation import Federation
from fedsim.program import Bound
from fedsim.reduce import Entry, Reduced, Rows, Sized
from fedsim.rounds import finalizes
from fedsim.run import Driver
from fedsim.strategy import SERVER, Strategy
from tests.helpers import Interrupted, Run, configure, drive, kind, quadratics, suited

NAMES = sorted(path.stem for path in (CONF / "strategy").glob("*.yaml"))
ENGINES = ["inline", pytest.param("ray", marks=pytest.mark.slow)]

EVERYBODY = {"participation": {"_target_": "fedsim.clients.participation.All"}, "rounds": 2}

every_engine = pytest.mark.parametrize("engine", ENGINES)
Configure = Callable[..., Config]


def config(name: str, values: Mapping[str, Any] | None = None, engine: str = "inline", **options: Any) -> Config:
    """The config of a method: what it needs, its quick options, then ``options`` of its own, then any values."""
    own = {f"strategy.{k}": v for k, v in options.items()}
    return configure((f"strategy={name}", f"engine={engine}"), {**suited(name), **own, **(values or {})})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def _exemptions(request: pytest.FixtureRequest) -> None:
    """Leaves out what a strategy says does not fit it."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and "name" in callspec.params:
        reason = kind(callspec.params["name"]).exempt.get(request.node.originalname.removeprefix("test_"))
        if reason is not None:
            pytest.skip(reason)


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    """One Ray cluster for all tests that need one."""
    with sessions.kept():
        yield


_RUNS: dict[tuple[str, str], Run] = {}


@pytest.fixture
def plain(name: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """An ordinary run of the method, made once per process."""

    def run(engine: str = "inline") -> Run:
        if (name, engine) not in _RUNS:
            _RUNS[name, engine] = drive(config(name, engine=engine), tmp_path_factory.mktemp("plain"))
        return _RUNS[name, engine]

    return run


# --- what a strategy says of itself -----------------------------------------------------------------------


def test_declarations_are_complete(name: str) -> None:
    cls = kind(name)
    laws = {n.removeprefix("test_") for n, f in globals().items() if n.startswith("test_") and _takes_name(f)}
    assert cls.exempt.keys() <= laws, f"{name}.exempt names laws that do not exist"
    assert all(len(reason) > 10 for reason in cls.exempt.values()), f"{name}.exempt must give reasons"
    assert bool(cls.neutral) == (cls.parent is not None), f"{name}: `parent` and `neutral` come together"
    if any(base in map(kind, NAMES) for base in cls.__bases__):
        assert "parent" in vars(cls), f"{name} extends another method: it must say what its own `parent` is, or None"
    if cls.parent is not None:
        assert cls.parent in NAMES
        assert "neutral" in vars(cls), f"{name} must say with which options it is {cls.parent}"


def _takes_name(test: Any) -> bool:
    return "name" in inspect.signature(test).parameters


# --- same bits --------------------------------------------------------------------------------------------


def same(a: Run, b: Run) -> None:
    assert a.state_sha256 == b.state_sha256
    assert a.params_sha256 == b.params_sha256
    assert a.records == b.records


@every_engine
def test_a_repeated_run_has_the_same_bits(name: str, engine: str, plain: Callable[..., Run], tmp_path: Path) -> None:
    same(drive(config(name, engine=engine), tmp_path), plain())


def test_another_seed_is_another_run(name: str, plain: Callable[..., Run], tmp_path: Path) -> None:
    other = drive(config(name, {"seed": 1}), tmp_path)
    assert other.state_sha256 != plain().state_sha256
    assert other.params_sha256 != plain().params_sha256


@every_engine
def test_how_a_cohort_is_cut_does_not_matter(
    name: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for size in (32, 3, 1):
        monkeypatch.setattr(federation, "PIECE", size)
        runs.append(drive(config(name, {**EVERYBODY, "precision": "float64"}, engine), tmp_path))
    same(runs[0], runs[1])
    same(runs[0], runs[2])


def test_the_order_of_a_cohort_does_not_matter(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {**EVERYBODY, "precision": "float64"}  # in float32, sums in another order often round to the same
    sorted_run, original = drive(config(name, values), tmp_path), Federation.train

    def train(self: Federation, clients: Iterable[int], state: Any, **options: Any) -> Reduced:
        return original(self, [*clients][::-1], state, **options)

    monkeypatch.setattr(Federation, "train", train)
    same(drive(config(name, values), tmp_path), sorted_run)


def test_memory_on_disk_gives_the_same_bits(name: str, plain: Callable[..., Run], tmp_path: Path) -> None:
    same(drive(config(name, {"checkpoint.memory": "disk"}), tmp_path), plain())


def test_evaluating_changes_nothing(name: str, plain: Callable[..., Run], tmp_path: Path) -> None:
    often = drive(config(name, {"eval.every": 1, "eval.clients": "all"}), tmp_path)
    assert often.state_sha256 == plain().state_sha256
    assert often.params_sha256 == plain().params_sha256


# --- interruptions ----------------------------------------------------------------------------------------


@every_engine
@pytest.mark.parametrize("memory", ["ram", "disk"])
def test_a_killed_run_resumes_to_the_same_bits(
    name: str, engine: str, memory: str, plain: Callable[..., Run], tmp_path: Path
) -> None:
    # Killed after round 2 was done and before it was saved: the resume makes round 2 again, from the checkpoint of 1.
    values = {"checkpoint.every": 1, "checkpoint.memory": memory, "tracker.recorder.kill_at": 2}
    with pytest.raises(Interrupted):
        drive(config(name, values, engine), tmp_path)
    values["tracker.recorder.kill_at"] = None
    resumed = drive(config(name, values, engine), tmp_path, resume=_only_run(tmp_path))
    assert resumed.state_sha256 == plain().state_sha256
    assert resumed.params_sha256 == plain().params_sha256
    assert resumed.records == plain().records[1:]
    assert resumed.driver.progress.totals == plain().driver.progress.totals


@every_engine
def test_a_run_goes_on_after_its_last_round(name: str, engine: str, plain: Callable[..., Run], tmp_path: Path) -> None:
    if finalizes(plain().driver.strategy):
        pytest.skip("a finalised model takes no more rounds")
    first = drive(config(name, {"rounds": 1}, engine), tmp_path)
    resumed = drive(config(name, engine=engine), tmp_path, resume=first.result.run_dir)
    assert resumed.state_sha256 == plain().state_sha256
    assert resumed.params_sha256 == plain().params_sha256


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    name: str, plain: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Checkpoints, "save", _interrupt)
        drive(config(name), tmp_path)
    same(drive(config(name), tmp_path, resume=_only_run(tmp_path)), plain())


def _interrupt(*args: Any) -> None:
    raise Interrupted


def _only_run(folder: Path) -> Path:
    (found,) = (p.parent for p in folder.rglob("config.yaml"))
    return found


def test_saved_state_is_the_state(name: str, plain: Callable[..., Run]) -> None:
    driver = plain().driver
    content = {"state": driver.progress.state, "federation": driver.fed.state(), "info": 1}
    text, tensors = tree.flatten(content)
    read = tree.unflatten(text, load(save({k: t.contiguous().clone() for k, t in tensors.items()})))
    assert tree.sha256(read) == tree.sha256(content)
    assert type(read["state"]) is type(driver.progress.state)


# --- purity -----------------------------------------------------------------------------------------------


def test_inputs_are_not_changed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = kind(name)
    calls = dict.fromkeys(("round", "step", "prepare", "finalize", "broadcast"), 0)

    def guard(hook: str) -> None:
        original = getattr(cls, hook)

        def guarded(self: Strategy, *args: Any) -> Any:
            calls[hook] += 1
            inputs = [a for a in args if not isinstance(a, Federation)]
            before = [_hash(a) for a in inputs]
            out = original(self, *args)
            assert [_hash(a) for a in inputs] == before, f"{hook} changed its input in place"
            return out

        monkeypatch.setattr(cls, hook, guarded)

    for hook in calls:
        guard(hook)
    drive(config(name), tmp_path)
    assert calls["round"] == 3
    assert calls["broadcast"] > 0


def _hash(x: Any) -> str:
    if isinstance(x, Reduced):
        return tree.sha256({k: v.tensor().clone() if isinstance(v, Rows) else v for k, v in x.items()})
    return tree.sha256(x)


def test_clients_that_took_no_part_keep_their_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visited: set[int] = set()
    kept = 0
    train, dispatch, next_event, round_ = (
        Federation.train,
        Federation.dispatch,
        Federation.next_event,
        Driver._round,
    )

    def spy_train(self: Federation, clients: Iterable[int], state: Any, **options: Any) -> Reduced:
        clients = [*clients]
        visited.update(clients)
        return train(self, clients, state, **options)

    def spy_dispatch(self: Federation, client: int, *args: Any, **options: Any) -> int | None:
        visited.add(client)
        return dispatch(self, client, *args, **options)

    def spy_event(self: Federation) -> federation.Event:
        event = next_event(self)
        visited.update(() if event.client is None else (event.client,))
        return event

    def spy_round(self: Driver, number: int) -> dict[str, Any]:
        nonlocal kept
        before = _rows(self)
        visited.clear()
        record = round_(self, number)
        after = _rows(self)
        assert before.keys() <= after.keys()
        for client in before.keys() - visited:
            assert after[client] == before[client], f"client {client} took no part in round {number}"
            kept += 1
        assert after.keys() - before.keys() <= visited
        return record

    monkeypatch.setattr(Federation, "train", spy_train)
    monkeypatch.setattr(Federation, "dispatch", spy_dispatch)
    monkeypatch.setattr(Federation, "next_event", spy_event)
    monkeypatch.setattr(Driver, "_round", spy_round)
    drive(config(name, {"rounds": 4}), tmp_path)
    assert kept > 0


def _rows(driver: Driver) -> dict[int, str]:
    clients = driver.memory.clients()
    return {c: tree.sha256(row) for c, row in zip(clients, driver.memory.get(clients), strict=True)}


# --- bytes ------------------------------------------------------------------------------------------------


def test_reported_bytes_are_those_of_entries_and_payloads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = up = 0
    visits: list[int] = []  # clients of the call that is under way
    held: dict[tuple[int, str], str] = {}
    train, dispatch, finish, cls = Federation.train, Federation.dispatch, Bound.finish, kind(name)
    broadcast, unicast = cls.broadcast, cls.unicast

    def size(value: Any, program: Any) -> int:
        """4 bytes per shared number; other types by their own width, bools by the bit."""
        if isinstance(value, Tensor):
            numbers = value.numel()
            if value.shape[-1:] == (program.layout.d,):
                numbers = numbers // program.layout.d * program.shared_size
            if value.is_floating_point():
                return 4 * numbers
            return (numbers + 7) // 8 if value.dtype == torch.bool else numbers * value.element_size()
        if isinstance(value, dict):
            return sum(size(v, program) for v in value.values())
        if isinstance(value, list | tuple):
            return sum(size(v, program) for v in value)
        return 8 if isinstance(value, int | float) else 0

    def charge(client: int, named: Mapping[str, Any], program: Any, lane: int | None = None) -> None:
        nonlocal down
        for key, value in named.items():
            own = value.value if isinstance(value, Sized) else value
            own = own if lane is None else own[lane]
            digest = tree.sha256(own)
            if isinstance(value, Sized) and value.once:
                if held.get((client, key)) == digest:
                    continue
                held[client, key] = digest
            told = value.nbytes if isinstance(value, Sized) else None
            if client != SERVER:
                down += size(own, program) if told is None else told

    def visit(self: Federation, clients: list[int], state: Any, send: Mapping[str, Any] | None) -> None:
        program = self.program
        named = broadcast(program.strategy, state) if send is None else send
        lanes = {} if send is not None else unicast(program.strategy, state, tuple(clients))
        for i, client in enumerate(clients):
            charge(client, {k: v for k, v in named.items() if k not in lanes}, program)
            charge(client, lanes, program, i)

    def spy_train(self: Federation, clients: Iterable[int], state: Any, **options: Any) -> Reduced:
        clients = sorted(clients)
        visit(self, clients, state, options.get("send"))
        visits.extend(clients)
        return train(self, clients, state, **options)

    def spy_dispatch(self: Federation, client: int, state: Any, *args: Any, **options: Any) -> int | None:
        visit(self, [client], state, None)
        return dispatch(self, client, state, *args, **options)

    def spy_finish(self: Bound, w: Tensor) -> dict[str, Entry]:
        nonlocal up
        entries = finish(self, w)
        if self._local.clients[0] != SERVER:
            up += sum(
                size(e.value[i], self._local._program) if e.nbytes is None else e.nbytes
                for e in entries.values()
                for i in range(len(self._local.clients))
            )
        return entries

    monkeypatch.setattr(Federation, "train", spy_train)
    monkeypatch.setattr(Federation, "dispatch", spy_dispatch)
    monkeypatch.setattr(Bound, "finish", spy_finish)
    run = drive(config(name), tmp_path)
    totals = run.driver.progress.totals
    assert totals["bytes_down"] == down > 0
    assert totals["bytes_up"] == up > 0
    in_rounds = sum(r["bytes_down"] for r in run.records)
    assert in_rounds <= down if overrides_prepare(cls) else in_rounds == down


def overrides_prepare(cls: type[Strategy]) -> bool:
    return cls.prepare is not Strategy.prepare or cls.finalize is not Strategy.finalize


# --- what is computed -------------------------------------------------------------------------------------


def test_clients_trained_together_have_the_numbers_of_each_alone(name: str, tmp_path: Path) -> None:
    strategy = build(config(name)).program.strategy
    if not declared(strategy):
        pytest.skip("does not say that it is written for several clients")
    # Twenty steps of unequal clients; in the second round, from the memory and the state that the first one left.
    values = {**EVERYBODY, "precision": "float64", "client.epochs": None, "client.steps": 20, "client.batch_size": 24}
    runs = [drive(config(name, {**values, "client.batching": n}), tmp_path) for n in ("off", 3)]
    assert [run.driver.exp.program.options.batching for run in runs] == [1, 3]
    one, other = (_numbers(run.driver) for run in runs)
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert bool(torch.isclose(other[key], value, rtol=0, atol=1e-10).all()), key
    assert runs[0].state_sha256 != runs[1].state_sha256, "nobody was trained together"


def _numbers(driver: Driver) -> dict[str, Tensor]:
    """All tensors of the state and of what clients remember, but for digests of what they were sent."""
    clients = driver.memory.clients()
    rows = dict(zip(map(str, clients), driver.memory.get(clients), strict=True))
    found = tree.flatten({"state": driver.progress.state, "rows": rows})[1]
    return {key: value for key, value in found.items() if not key.rpartition("[")[2].startswith('"sent.')}


@every_engine
def test_its_neutral_setting_is_its_parent(name: str, engine: str, tmp_path: Path) -> None:
    cls = kind(name)
    if cls.parent is None:
        pytest.skip("has no parent")
    values = {**cls.needs, "rounds": 5, "client.epochs": 2}
    child = drive(config(name, values, engine, **cls.neutral), tmp_path)
    parent = drive(config(cls.parent, values, engine, **cls.parent_options), tmp_path)
    assert child.params_sha256 == parent.params_sha256
    ordinary = drive(config(name, values, engine), tmp_path)
    assert ordinary.params_sha256 != parent.params_sha256, "the method does nothing of its own by default"


@every_engine
def test_one_full_batch_step_is_gradient_descent(name: str, engine: str, tmp_path: Path) -> None:
    a, c, w, lr = [0.5, 2.0, 3.0], [1.0, -2.0, 0.25], [-1.0, 3.0, 0.5], 0.125
    run = drive(config(name, quadratics([a], [c], w, rounds=1, client__lr=lr, sizes=[5]), engine), tmp_path)
    expected = torch.tensor([x - lr * k * (x - m) for k, m, x in zip(a, c, w, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(run.w, expected, rtol=1e-14, atol=1e-14)


@every_engine
def test_loss_falls_on_two_quadratic_clients(name: str, engine: str, tmp_path: Path) -> None:
    # In two coordinates the optimum lies above, in two below the start; clients disagree in all of them.
    a = torch.tensor([[1.0, 3.0, 0.5, 1.0], [2.0, 0.5, 1.5, 1.0]], dtype=torch.float64)
    c = torch.tensor([[4.0, -2.0, 5.0, -6.0], [2.0, -5.0, 1.0, -1.0]], dtype=torch.float64)
    start = torch.zeros(4, dtype=torch.float64)
    values = quadratics(a.tolist(), c.tolist(), start.tolist(), rounds=20, client__lr=0.05, client__steps=3)
    run = drive(config(name, values, engine), tmp_path)
    optimum = (a * c).sum(0) / a.sum(0)

    def excess(w: Tensor) -> Tensor:
        return (a * (w - c).square()).sum(0) - (a * (optimum - c).square()).sum(0)

    assert bool((excess(run.w) < excess(start)).all())
    assert bool(((run.w - start) * (optimum - start) > 0).all())
