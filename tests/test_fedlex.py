"""FedLEx against closed forms on quadratics and plain PyTorch: exploration, guidance, guided rounds, what they cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim import federation, random, rounds
from fedsim.clients.local import Local
from fedsim.engine.inline import InlineEngine
from fedsim.errors import ConfigError
from fedsim.experiment import Experiment, build
from fedsim.federation import Federation
from fedsim.memory import Memory
from fedsim.reduce import Reduced
from fedsim.run import Driver
from fedsim.strategies import fedlex
from fedsim.strategies.fedlex import Explorer, FedLEx, GuidedState, choose_explorers, explore, guidance
from fedsim.strategy import ClientHalf, Grad, Info
from fedsim.vector import Layout
from tests.helpers import Interrupted, Run, batches, configure, drive, module_of, quadratics

EVERYBODY = {"_target_": "fedsim.clients.participation.All"}
TWO = {"_target_": "fedsim.clients.participation.Fixed", "clients_per_round": 2}


def config(strategy: str = "fedlex", values: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """A config on digits: any values, and options of the method by name. Only SGD has momentum."""
    given = dict(values or {})
    if given.get("client.optimizer", "sgd") != "sgd":
        given["client.momentum"] = 0.0
    return configure((f"strategy={strategy}",), {**given, **{f"strategy.{k}": v for k, v in options.items()}})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No pictures; plain PyTorch beside the runs does not wait for other cores."""
    monkeypatch.setattr(Driver, "_draw", lambda *_: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def federated(settings: dict[str, Any], folder: Path) -> Iterator[tuple[Federation, Experiment]]:
    """A federation in this process before its first round."""
    exp = build(settings)
    engine = InlineEngine(exp.program)
    try:
        fed = Federation(exp.program, engine, exp.participation, exp.system, Memory(folder))
        fed.begin_round(0)
        yield fed, exp
    finally:
        engine.close()


def prepared(settings: dict[str, Any], folder: Path) -> tuple[GuidedState, Federation, Experiment]:
    """The state before round 1, and the federation that has it."""
    with federated(settings, folder) as (fed, exp):
        return rounds.first(fed, exp.info), fed, exp


def spreads(fed: Federation) -> Tensor:
    """How far every client went, as it remembers it (``guidance_scope=participants``), ``[K, d]``."""
    return torch.stack([row["strategy.spread"] for row in fed.memory.get(range(fed.num_clients))])


def min_max(spread: Tensor) -> Tensor:
    """The guidance of one tensor: (D - min D) / (max D - min D)."""
    return (spread - spread.min()) / (spread.max() - spread.min())


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# --- quadratic clients whose explorations stop at different epochs ----------------------------------------

# In the first coordinate all converge; in the second the last three diverge (1 - LR a < -1) from more or less far away,
# so that their losses fall at first. Client 0 never stops, client 1's loss stays equal, client 2 is at its minimum.
LR = 0.125
A = torch.tensor([[4, 4, 1], [16, 16, 16], [4, 4, 4], [4, 25, 1], [4, 25, 1], [1, 25, 4]], dtype=torch.float64)
C = torch.tensor([[5, 1, 0], [-1, 2, 4], [1, -2, 3], [4, -2.03, 2], [9, -1.9, 4], [-3, -1.7, 1]], dtype=torch.float64)
START = [1.0, -2.0, 3.0]
X = torch.tensor(START, dtype=torch.float64)
Q = 1 - LR * A  # a step takes client i from x to c + q (x - c), coordinate by coordinate
EPOCHS, PATIENCE = 9, 3
SIZES = [3, 1, 2, 5, 1, 4]


def epochs_made(client: int, start: Tensor = X, epochs: int = EPOCHS, patience: int = PATIENCE) -> int:
    """After how many epochs a client stops: before its e-th step its loss is sum a / 2 q^(2e) (x - c)^2."""
    best, bad, made = math.inf, 0, 0
    while made < epochs and bad < patience:
        loss = float((A[client] / 2 * (Q[client] ** made * (start - C[client])).square()).sum())
        bad = 0 if loss < best else bad + 1
        best, made = min(best, loss), made + 1
    return made


def explored(client: int, start: Tensor = X, **limits: int) -> Tensor:
    """Where it ends: its last weights, not its best."""
    return C[client] + Q[client] ** epochs_made(client, start, **limits) * (start - C[client])


def quadratic(a: Tensor = A, c: Tensor = C, **values: Any) -> dict[str, Any]:
    """A config on the quadratic clients; one step of the whole data is an epoch."""
    own = {"strategy__explore_epochs": EPOCHS, "strategy__patience": PATIENCE, "client__lr": LR, "sizes": SIZES}
    return configure(("strategy=fedlex",), quadratics(a.tolist(), c.tolist(), START, **{**own, **values}))


# --- guidance ---------------------------------------------------------------------------------------------

LAYOUT = Layout({"weight": torch.Size([4, 3]), "bias": torch.Size([4]), "gain": torch.Size([1])}, torch.float64)


def official_guidance(base: Mapping[str, Tensor], scouts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The official mask, tensor by tensor, of scouts that are models of their own."""
    mask = {}
    for name, start in base.items():
        deviation = torch.stack([(scout[name] - start) ** 2 for scout in scouts]).mean(dim=0)
        mask[name] = (deviation - deviation.min()) / (deviation.max() - deviation.min())
    return mask


def test_guidance_is_the_official_mask_of_every_tensor() -> None:
    # Check 5: minimum 0 and maximum 1 in each tensor, biases too; a tensor of one number has no spread to compare.
    g = torch.Generator().manual_seed(3)
    base = torch.randn(17, generator=g, dtype=torch.float64)
    scale = torch.cat([torch.full((12,), 10.0), torch.full((5,), 0.01)])
    scouts = base + scale * torch.randn(5, 17, generator=g, dtype=torch.float64)
    views = [LAYOUT.views((scout - base).square()) for scout in scouts]
    spread = LAYOUT.flatten({name: torch.stack([v[name] for v in views]).mean(0) for name in LAYOUT.names})
    found = LAYOUT.views(guidance(spread, LAYOUT))
    expected = official_guidance(LAYOUT.views(base), [LAYOUT.views(scout) for scout in scouts])
    for name in ("weight", "bias"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
        assert (float(found[name].min()), float(found[name].max())) == (0.0, 1.0)
    assert bool(expected["gain"].isnan())
    assert float(found["gain"]) == 1.0
    # Scaled over the whole network the bias, which moved little, would be held everywhere.
    assert float(min_max(spread)[12:].max()) < 1e-3


def test_guidance_does_not_depend_on_the_scale_of_displacements() -> None:
    # Check 5: verified there to 1.8e-7 in float32.
    for dtype, tolerance in ((torch.float32, 1.8e-7), (torch.float64, 1e-14)):
        spread = torch.rand(17, generator=torch.Generator().manual_seed(1), dtype=dtype)
        scaled = guidance(3.7**2 * spread, LAYOUT)
        torch.testing.assert_close(scaled, guidance(spread, LAYOUT), rtol=0, atol=tolerance)


def test_guidance_is_one_where_nothing_moved() -> None:
    # Check 6: the official formula gives 0 / 0.
    nothing = torch.zeros(17, dtype=torch.float64)
    still = LAYOUT.views(nothing)
    assert bool(official_guidance(still, [still, still])["weight"].isnan().all())
    assert torch.equal(guidance(nothing, LAYOUT), torch.ones_like(nothing))
    moved = nothing.clone()
    moved[:12] = torch.arange(12.0)
    found = LAYOUT.views(guidance(moved, LAYOUT))
    assert bool((found["bias"] == 1).all())
    close(found["weight"].flatten(), torch.arange(12.0, dtype=torch.float64) / 11)


# --- exploration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["off", 3, 6])
def test_explorers_stop_one_by_one_and_keep_their_last_weights(batching: Any, tmp_path: Path) -> None:
    made = [epochs_made(i) for i in range(6)]
    assert made[:3] == [EPOCHS, 1 + PATIENCE, 1 + PATIENCE]
    assert len({*made[3:]}) == 3, "three clients should stop at three other epochs"
    settings = quadratic(client__batching=batching, strategy__guidance_scope="participants")
    _, fed, _ = prepared(settings, tmp_path)
    assert [v.steps for v in sorted(fed.done.visits, key=lambda v: v.client)] == made
    expected = torch.stack([(explored(i) - X).square() for i in range(6)])
    close(spreads(fed), expected)
    (state, _, _) = prepared(quadratic(client__batching=batching), tmp_path / "all")
    close(state.G, min_max(expected.mean(0)))


def test_a_loss_that_does_not_fall_counts_against_patience(tmp_path: Path) -> None:
    # Client 1 jumps to and fro over its minimum: equal losses, to the bit.
    for patience in (1, 2, 5):
        _, fed, _ = prepared(quadratic(strategy__patience=patience), tmp_path / str(patience))
        steps = {v.client: v.steps for v in fed.done.visits}
        assert steps == {i: epochs_made(i, patience=patience) for i in range(6)}
        assert steps[1] == 1 + patience


def plain_exploration(
    exp: Experiment, client: int, epochs: int, patience: int, by_last_batch: bool = False
) -> tuple[Tensor, int]:
    """A client's exploration with torch.optim; the displacement squared, and the epochs that it took."""
    shard, options = exp.program.shard(client), exp.program.options
    x, y = exp.program.inputs(shard.x[shard.rows]), shard.y[shard.rows]
    module, start = module_of(exp), exp.program.network.initial
    optimizer = torch.optim.SGD(module.parameters(), lr=options.lr, momentum=0.9)
    assert options.batch_size is not None
    order, steps = batches(0, client, len(y), options.batch_size, stream="explore"), -(-len(y) // options.batch_size)
    best, bad, made = math.inf, 0, 0
    while made < epochs and bad < patience:
        total = last = 0.0
        for _ in range(steps):
            rows = next(order)
            optimizer.zero_grad()
            loss = F.cross_entropy(module(x[rows]), y[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            last = float(loss.detach())
            total += last * len(rows)
        seen = last if by_last_batch else total / len(y)
        bad = 0 if seen < best else bad + 1
        best, made = min(best, seen), made + 1
    w = torch.cat([p.detach().flatten() for p in module.parameters()])
    return (w - start).square(), made


RAGGED = {
    "partition": {
        "_target_": "fedsim.datasets.dirichlet.Dirichlet",
        "num_clients": 6,
        "alpha": 0.3,
        "min_size": 20,
        "holdout": 0.0,
    },
    "precision": "float64",
    "client.lr": 0.3,
    "client.batch_size": 24,
}


def test_exploration_equals_plain_pytorch(tmp_path: Path) -> None:
    # Unequal clients, minibatches with a smaller last one, momentum that lasts from epoch to epoch.
    plain: list[tuple[Tensor, int]] = []
    for batching in ("off", 3):
        values = {**RAGGED, "client.batching": batching}
        settings = config(values=values, explore_epochs=12, patience=2, guidance_scope="participants")
        state, fed, exp = prepared(settings, tmp_path / str(batching))
        plain = plain or [plain_exploration(exp, i, 12, 2) for i in range(6)]
        made, sizes = [epochs for _, epochs in plain], exp.program.clients.sizes()
        assert {v.client: v.steps for v in fed.done.visits} == {i: made[i] * -(-int(sizes[i]) // 24) for i in range(6)}
        expected = torch.stack([spread for spread, _ in plain])
        torch.testing.assert_close(spreads(fed), expected, rtol=1e-8, atol=1e-10)
        assert torch.equal(state.w, exp.program.network.initial)
    assert len({*made}) > 2, made
    assert made != [plain_exploration(exp, i, 12, 2, by_last_batch=True)[1] for i in range(6)]


def test_an_exploration_depends_on_nobody_else(tmp_path: Path) -> None:
    # Check 7: alone, in any order, in other pieces: the same bits; together with others the same numbers.
    half = Explorer(4, 2, keep=True)

    def found(name: str, calls: Sequence[Sequence[int]], **values: Any) -> tuple[Tensor, Tensor]:
        settings = config(values={**RAGGED, **values}, explore_epochs=4, guidance_scope="participants")
        with federated(settings, tmp_path / name) as (fed, exp):
            for who in calls:
                spread = explore(fed, exp.program.network.initial, [*who], half, sequential=False)[0]
            return spreads(fed), guidance(spread, fed.layout)

    together, G = found("together", [range(6)])
    assert float(together.min()) >= 0 < float(together.max(1).values.min())
    assert torch.equal(found("alone", [[i] for i in (3, 0, 5, 1, 4, 2)])[0], together)
    assert torch.equal(found("reversed", [[5, 4, 3, 2, 1, 0]])[1], G)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(federation, "PIECE", 2)
        assert torch.equal(found("in pieces", [range(6)])[1], G)
    batched, same = found("batched", [range(6)], **{"client.batching": 3})
    assert not torch.equal(batched, together)
    torch.testing.assert_close(batched, together, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(same, G, rtol=0, atol=1e-10)


def test_partial_sums_of_spreads_give_the_same_guidance(tmp_path: Path) -> None:
    # Check 5: in float32, to 6e-8.
    values = {**RAGGED, "precision": "float32"}
    state, _, _ = prepared(config(values=values, explore_epochs=4), tmp_path / "all")
    _, fed, _ = prepared(config(values=values, explore_epochs=4, guidance_scope="participants"), tmp_path / "own")
    own = spreads(fed)
    assert own.dtype == torch.float32
    parts = [own[:2].sum(0), own[2:5].sum(0), own[5]]
    views = fed.layout.views((parts[0] + parts[1] + parts[2]) / 6)
    for name, G in fed.layout.views(state.G).items():
        torch.testing.assert_close(G, min_max(views[name]), rtol=0, atol=2 * 6e-8)  # rounded on both sides
        assert (float(G.min()), float(G.max())) == (0.0, 1.0)


def test_one_explorer_s_end_changes_the_guidance_and_nobody_else_s_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Check 7: scouts that are references to one model would all change, or none.
    work, settings = Explorer.work, quadratic(strategy__guidance_scope="participants")
    before = prepared(settings, tmp_path / "before")[1]
    G = prepared(quadratic(), tmp_path / "G")[0].G

    def pushed(self: Explorer, local: Local) -> Tensor:
        w = work(self, local)
        return w + torch.tensor([0.0, 3.0, 0.0]) if local.clients == (2,) else w

    monkeypatch.setattr(Explorer, "work", pushed)
    after = prepared(settings, tmp_path / "after")[1]
    changed = (spreads(after) != spreads(before)).any(1)
    assert changed.tolist() == [False, False, True, False, False, False]
    assert not torch.equal(prepared(quadratic(), tmp_path / "new G")[0].G, G)


def test_clients_without_examples_explore_nothing(tmp_path: Path) -> None:
    # They count as explorers that did not move, which is but a factor on all displacements.
    sizes = [3, 0, 2, 5, 0, 4]
    for batching in ("off", 3):
        settings = quadratic(sizes=sizes, client__batching=batching, strategy__base_epochs=2)
        state, fed, _ = prepared(settings, tmp_path / str(batching))
        explorers = [v for v in fed.done.visits if v.phase == "explore"]
        assert len(explorers) == 6
        assert {v.client for v in explorers if v.steps == 0} == {1, 4}
        base = C[0] + Q[0] ** 2 * (X - C[0])
        spread = torch.stack([(explored(i, base) - base).square() for i in (0, 2, 3, 5)])
        close(state.G, min_max(spread.sum(0)))
    state, _, _ = prepared(quadratic(sizes=[0, *sizes[1:]], strategy__base_epochs=2), tmp_path / "nobody")
    spread = torch.stack([(explored(i) - X).square() for i in (2, 3, 5)])
    close(state.G, min_max(spread.sum(0)))  # the first explorer has nothing to make a base model of


def test_exploration_starts_afresh_at_the_first_rounds_learning_rate(tmp_path: Path) -> None:
    # Its own optimizer, from zero, for the whole exploration: heavy-ball steps, by hand; decay begins after round 1.
    settings = quadratic(
        client__momentum=0.5, client__keep_optimizer=True, client__lr_decay=0.5, rounds=2, strategy__beta=0.0
    )
    exp, done = build(settings), drive(settings, tmp_path)
    assert exp.program.options.keep_optimizer
    ends = []
    for i in range(6):
        x, v, best, bad, made = X, torch.zeros(3), math.inf, 0, 0
        while made < EPOCHS and bad < PATIENCE:
            loss = float((A[i] / 2 * (x - C[i]).square()).sum())
            bad = 0 if loss < best else bad + 1
            best, made = min(best, loss), made + 1
            v = 0.5 * v + A[i] * (x - C[i])
            x = x - LR * v
        ends.append((x - X).square())
    G = min_max(torch.stack(ends).mean(0))
    close(done.state.G, G)
    w, v, p = X, torch.zeros(6, 3), torch.tensor(SIZES, dtype=torch.float64)[:, None] / sum(SIZES)
    for lr in (LR, LR / 2):
        v = 0.5 * v + G * A * (w - C)
        w = (p * (w - lr * v)).sum(0)
    close(done.w, w)


# --- what happens before round 1 --------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 1.0])
def test_a_share_of_the_clients_explores(share: float, tmp_path: Path) -> None:
    settings = config(values={"partition.num_clients": 12}, explorers=share, explore_epochs=1)
    _, fed, _ = prepared(settings, tmp_path)
    who = [v.client for v in fed.done.visits]
    assert len({*who}) == len(who) == {0.01: 1, 0.25: 3, 0.5: 6, 1.0: 12}[share]


def test_explorers_are_chosen_uniformly(tmp_path: Path) -> None:
    # Of 10 clients 3, 400 times: each is expected 120 times, with a standard deviation of 9.2.
    counts = [0] * 10
    with federated(config(values={"partition.num_clients": 10}), tmp_path) as (fed, _):
        for number in range(400):
            fed.round_num = number
            for i in choose_explorers(fed, 0.3):
                counts[i] += 1
    assert sum(counts) == 1200
    assert all(80 < count < 160 for count in counts), counts


def test_the_global_model_is_untouched_by_the_exploration(tmp_path: Path) -> None:
    # Check 9, in both precisions, statistics of batch norms included.
    normed: dict[str, Any] = {"model": {"_target_": "tests.helpers.Normed", "weights": None}, "client.batching": "off"}
    kinds: list[dict[str, Any]] = [{}, {"precision": "float64"}, normed]
    options: list[dict[str, Any]] = [{"base_epochs": 1}, {"sequential": True}, {"guidance_scope": "participants"}]
    for i, values in enumerate(kinds):
        for own in options:
            settings = config(values=values, explore_epochs=2, **own)
            state, fed, exp = prepared(settings, tmp_path / f"{i}{own}")
            assert torch.equal(state.w, exp.program.network.initial)
            assert not state.v.any()
            assert bool((state.G == 1).all()) == ("guidance_scope" in own)
            if values is normed:
                assert fed.buffers is not None
                assert torch.equal(fed.buffers, exp.program.network.initial_buffers)


def test_warm_start_begins_with_the_mean_of_the_explored_models(tmp_path: Path) -> None:
    state, _, _ = prepared(quadratic(strategy__warm_start=True), tmp_path)
    close(state.w, torch.stack([explored(i) for i in range(6)]).mean(0))
    close(state.G, prepared(quadratic(), tmp_path / "cold")[0].G)


def test_sequential_explorers_walk_on_from_one_another(tmp_path: Path) -> None:
    # D is the square of the whole walk, and the warm start its end.
    x = X
    for i in range(6):
        x = explored(i, x)
    state, fed, _ = prepared(quadratic(strategy__sequential=True, strategy__warm_start=True), tmp_path)
    close(state.w, x)
    close(state.G, min_max((x - X).square()))
    assert [v.client for v in fed.done.visits] == [*range(6)]
    independent = prepared(quadratic(), tmp_path / "independent")[0].G
    assert float((state.G - independent).abs().max()) > 0.01


@pytest.mark.parametrize("sequential", [False, True])
def test_base_epochs_move_the_model_that_explorers_start_from(sequential: bool, tmp_path: Path) -> None:
    # Two epochs on the first explorer's data; the spread is measured from there, and round 1 starts from w0.
    base = C[0] + Q[0] ** 2 * (X - C[0])
    x, squares = base, []
    for i in range(6):
        end = explored(i, x)
        squares.append((end - base).square())
        x = end if sequential else base
    settings = quadratic(strategy__base_epochs=2, strategy__sequential=sequential)
    state, fed, _ = prepared(settings, tmp_path)
    assert torch.equal(state.w, X)
    close(state.G, min_max(squares[-1] if sequential else torch.stack(squares).mean(0)))
    assert [(v.client, v.steps) for v in fed.done.visits if v.phase == "base"] == [(0, 2)]


# --- guided rounds ----------------------------------------------------------------------------------------


def held(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance of one value everywhere, whatever the exploration found."""
    monkeypatch.setattr(fedlex, "guidance", lambda spread, layout: torch.full_like(spread, value))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("apply", ["grad", "update"])
def test_guidance_of_one_is_fedavg_bit_for_bit(
    apply: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Check 1, in spite of an exploration before; momentum is kept, and three of seven clients take part.
    values = {"client.optimizer": optimizer, "client.keep_optimizer": True, "client.lr": 0.01, "client.clip_norm": 1.0}
    fedavg = drive(config("fedavg", values), tmp_path)
    options: dict[str, Any] = {"explore_epochs": 1, "explorers": 0.3, "beta": 0.0, "apply": apply}
    guided = drive(config(values=values, **options), tmp_path)
    assert guided.params_sha256 != fedavg.params_sha256
    held(1.0, monkeypatch)
    found = drive(config(values=values, **options), tmp_path)
    assert found.params_sha256 == fedavg.params_sha256


def test_no_exploration_is_fedavg(tmp_path: Path) -> None:
    # Check 6: with no epoch at all, and where all explorers are at their minimum already.
    none = quadratic(strategy__explore_epochs=0, strategy__beta=0.0, rounds=2)
    plain = quadratics(A.tolist(), C.tolist(), START, client__lr=LR, sizes=SIZES, rounds=2)
    fedavg = drive(configure(("strategy=fedavg",), plain), tmp_path)
    found = drive(none, tmp_path)
    assert bool((found.state.G == 1).all())
    assert found.params_sha256 == fedavg.params_sha256
    assert found.driver.progress.totals == fedavg.driver.progress.totals
    still = drive(quadratic(c=X.expand(6, 3), rounds=1), tmp_path)
    assert bool((still.state.G == 1).all())
    assert torch.equal(still.w, X)


@pytest.mark.parametrize("apply", ["grad", "update"])
def test_constant_guidance_under_sgd_is_a_smaller_learning_rate(
    apply: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Check 2: the same bits for c = 0.5, which halves without rounding, on the gradient.
    held(0.5, monkeypatch)
    plain = {"client.momentum": 0.0, "client.lr": 0.05, "precision": "float64"}
    found = drive(config(values=plain, explore_epochs=1, explorers=0.1, beta=0.0, apply=apply), tmp_path)
    slow = drive(config("fedavg", {**plain, "client.lr": 0.025}), tmp_path)
    if apply == "grad":
        assert found.params_sha256 == slow.params_sha256
    torch.testing.assert_close(found.w, slow.w, rtol=0, atol=1e-13)


def adam_run(tmp_path: Path, lr: float, strategy: str = "fedlex", **options: Any) -> Run:
    """Fifty steps of Adam on digits, one round."""
    values = {
        "client.optimizer": "adam",
        "client.lr": lr,
        "client.epochs": None,
        "client.steps": 50,
        "precision": "float64",
        "partition.num_clients": 2,
        "participation": EVERYBODY,
        "rounds": 1,
    }
    return drive(config(strategy, values, **options), tmp_path)


def test_adam_hardly_feels_a_constant_guidance_of_its_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Check 3; on its step it is half the learning rate.
    held(0.5, monkeypatch)
    options: dict[str, Any] = {"explore_epochs": 1, "beta": 0.0}
    unguided, half = adam_run(tmp_path, 1e-3, "fedavg").w, adam_run(tmp_path, 5e-4, "fedavg").w
    start = build(config(values={"precision": "float64"})).program.network.initial
    found = adam_run(tmp_path, 1e-3, **options).w
    moved = float((unguided - start).norm())
    assert 0 < float((found - unguided).norm()) / moved < 1e-3
    assert float((found - half).norm()) / moved > 0.4
    found = adam_run(tmp_path, 1e-3, **options, apply="update").w
    assert float((found - unguided).norm()) / moved > 0.4


@pytest.mark.parametrize(
    ("apply", "client"),
    [
        ("grad", {"client.optimizer": "sgd", "client.nesterov": True}),
        ("grad", {"client.optimizer": "adam", "client.lr": 0.01}),
        ("update", {"client.optimizer": "sgd", "client.weight_decay": 0.1}),
        ("update", {"client.optimizer": "adamw", "client.lr": 0.01, "client.weight_decay": 0.5}),
    ],
    ids=["sgd", "adam", "decay", "adamw"],
)
def test_parameters_without_guidance_never_move(apply: str, client: dict[str, Any], tmp_path: Path) -> None:
    # Check 4: at least one of every tensor, in every round and on every client; v starts at 0.
    values = {**client, "client.keep_optimizer": True}
    done = drive(config(values=values, explore_epochs=2, explorers=0.5, apply=apply), tmp_path)
    fedavg = drive(config("fedavg", values), tmp_path)
    exp, still = done.driver.exp, done.state.G == 0
    start, layout = exp.program.network.initial, exp.program.layout
    assert all(bool(view.any()) for view in layout.views(still).values())
    assert torch.equal(done.w[still], start[still])
    assert not done.state.v[still].any()
    assert bool((fedavg.w[still] != start[still]).any())
    assert bool((done.w[~still] != start[~still]).float().mean() > 0.9)


def weights_of(who: Sequence[int]) -> Tensor:
    p = torch.tensor([[float(SIZES[i])] for i in who], dtype=torch.float64)
    return p / p.sum()


def cohorts(done: Run) -> list[list[int]]:
    draw = done.driver.exp.participation.sample
    return [draw(6, random.numpy_generator(0, "participation", r, 0)) for r in range(1, done.driver.rounds + 1)]


@pytest.mark.parametrize("batching", ["off", 3])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_rounds_by_hand(beta: float, batching: Any, tmp_path: Path) -> None:
    # Check 2: K steps w - lr G g take client i to c + (1 - lr G a)^K (w - c); then v = beta v + (1 - beta) delta.
    some = {"_target_": "fedsim.clients.participation.Fixed", "clients_per_round": 4}
    settings = quadratic(
        participation=some,
        rounds=4,
        client__steps=3,
        client__lr_decay=0.5,
        client__batching=batching,
        strategy__beta=beta,
        strategy__explorers=0.5,
    )
    done = drive(settings, tmp_path)
    with federated(settings, tmp_path / "who") as (fed, _):
        explorers = choose_explorers(fed, 0.5)
    G = min_max(torch.stack([(explored(i) - X).square() for i in explorers]).mean(0))
    assert len({*map(tuple, cohorts(done))}) > 1
    w, v = X, torch.zeros(3, dtype=torch.float64)
    for r, who in enumerate(cohorts(done)):
        q = (1 - LR * 0.5**r * G * A[who]) ** 3
        v = beta * v + (1 - beta) * (weights_of(who) * (C[who] + q * (w - C[who]) - w)).sum(0)
        w = w + v
    close(done.state.G, G)
    close(done.w, w)
    close(done.state.v, v)


@dataclass(frozen=True)
class Pull(ClientHalf):
    """A recipe with a proximal term in its direction.

    Attributes:
        mu: Its weight.
    """

    mu: float = 0.5

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        return grad(w) + self.mu * (w - local.start)


def test_guidance_multiplies_the_whole_direction_of_a_recipe(tmp_path: Path) -> None:
    # Two steps of g = a (w - c) + mu (w - start); explorers have the same objective, without guidance.
    def steps(w: Tensor, count: int, G: Tensor) -> Tensor:
        start = w
        for _ in range(count):
            w = w - LR * G * (A * (w - C) + 0.5 * (w - start))
        return w

    recipe = {"pull": {"_target_": "tests.test_fedlex.Pull"}}
    settings = quadratic(recipe=recipe, rounds=1, client__steps=2, strategy__explore_epochs=3, strategy__beta=0.0)
    done = drive(settings, tmp_path)
    G = min_max((steps(X, 3, torch.ones(3)) - X).square().mean(0))  # three epochs are within everybody's patience
    close(done.state.G, G)
    close(done.w, (weights_of(range(6)) * steps(X, 2, G)).sum(0))


def test_gradients_are_clipped_after_the_guidance_and_updates_before(tmp_path: Path) -> None:
    # One step from X of at most a norm of 1: G g clipped, or G times g clipped.
    bound: dict[str, Any] = {"client__clip_norm": 1.0, "rounds": 1, "strategy__beta": 0.0}
    g = A * (X - C)
    found = {}
    for apply in ("grad", "update"):
        done = drive(quadratic(**bound, strategy__apply=apply), tmp_path)
        G, found[apply] = done.state.G, done.w
        d = G * g if apply == "grad" else g
        d = d * (1 / (d.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)
        d = d if apply == "grad" else G * d
        close(done.w, X - LR * (weights_of(range(6)) * d).sum(0), 1e-6)
    assert float((found["grad"] - found["update"]).abs().max()) > 1e-3


def test_guided_updates_equal_torch_optim_with_its_steps_scaled(tmp_path: Path) -> None:
    # Adam's own state sees all of the gradient; only the step that it makes is scaled.
    adam: dict[str, Any] = {
        "client__optimizer": "adam",
        "client__momentum": 0.0,
        "client__weight_decay": 0.1,
        "client__steps": 5,
    }
    settings = quadratic(**adam, rounds=1, strategy__beta=0.0, strategy__apply="update", strategy__weights="uniform")
    done = drive(settings, tmp_path)
    ends = []
    for i in range(6):
        p = X.clone().requires_grad_()
        optimizer = torch.optim.Adam([p], lr=LR, weight_decay=0.1)
        for _ in range(5):
            before, p.grad = p.detach().clone(), A[i] * (p.detach() - C[i])
            optimizer.step()
            with torch.no_grad():
                p.copy_(before + done.state.G * (p - before))
        ends.append(p.detach())
    assert 0 < float(done.state.G.median()) < 1
    close(done.w, torch.stack(ends).mean(0))


def test_under_momentum_a_fixed_guidance_scales_gradients_and_updates_alike(tmp_path: Path) -> None:
    # The buffer is linear, coordinate by coordinate; Adam's step is not.
    sgd = {"client__momentum": 0.9, "client__nesterov": True}
    for client in (sgd, {"client__optimizer": "adam"}):
        options: dict[str, Any] = {**client, "client__keep_optimizer": True, "client__steps": 4, "rounds": 3}
        grad, update = (drive(quadratic(**options, strategy__apply=apply), tmp_path).w for apply in ("grad", "update"))
        difference = float((grad - update).abs().max())
        assert difference > 1e-3 if client is not sgd else difference < 1e-12
        assert float((grad - X).abs().max()) > 0.1


@pytest.mark.parametrize("batching", ["off", 3])
def test_the_guidance_of_the_participants_by_hand(batching: Any, tmp_path: Path) -> None:
    # Round 1 runs without; after each round the guidance is made of its clients' explorations, for the next one.
    own: dict[str, Any] = {
        "strategy__guidance_scope": "participants",
        "strategy__beta": 0.5,
        "client__batching": batching,
    }
    some = {"_target_": "fedsim.clients.participation.Fixed", "clients_per_round": 3}
    done = drive(quadratic(**own, participation=some, rounds=4, client__steps=2), tmp_path)
    assert len({*map(tuple, cohorts(done))}) > 2
    w, v, G = X, torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for who in cohorts(done):
        q = (1 - LR * G * A[who]) ** 2
        v = 0.5 * v + 0.5 * (weights_of(who) * (C[who] + q * (w - C[who]) - w)).sum(0)
        w, G = w + v, min_max(torch.stack([(explored(i) - X).square() for i in who]).mean(0))
    close(done.w, w)
    close(done.state.G, G)


INFO = Info(3, 0, Layout({"w": torch.Size([2])}), 0, 5, 0.1)


def reduced(delta: float) -> Reduced:
    value = torch.full((2,), delta, dtype=torch.float64)
    return Reduced({"delta": value}, INFO.layout, (0,), 3, torch.ones(1, dtype=torch.float64))


def test_the_server_damps_its_momentum() -> None:
    # Check 8: v = beta v + (1 - beta) delta without a correction; of a constant update 1 - 0.9^t is taken.
    rule = FedLEx(beta=0.9)
    state = rule.init(INFO, torch.zeros(2, dtype=torch.float64))
    before = state.w
    for step in (0.1, 0.19, 0.271):
        state = rule.step(state, reduced(1.0))
        torch.testing.assert_close(state.w - before, torch.full((2,), step).double(), rtol=0, atol=1e-7)
        close(state.v, torch.full((2,), step, dtype=torch.float64), 1e-14)
        before = state.w
    plain = replace(rule, beta=0.0)
    state = plain.init(INFO, torch.tensor([0.1, 0.2]))
    w = state.w
    for delta in (0.3, -0.7, 1e-9):
        state, w = plain.step(state, reduced(delta)), (w.double() + delta).float()
        assert torch.equal(state.w, w)


# --- what it costs ----------------------------------------------------------------------------------------


def sent(done: Run) -> tuple[int, int]:
    """Vectors sent down and up in the whole run."""
    totals = done.driver.progress.totals
    assert totals["bytes_down"] % 12 == totals["bytes_up"] % 12 == 0
    return totals["bytes_down"] // 12, totals["bytes_up"] // 12


def test_exploration_and_guidance_are_charged(tmp_path: Path) -> None:
    # Six clients, two a round, four rounds: 8 models down, 8 up; an explorer: one down, one up.
    def run(**options: Any) -> Run:
        own = {f"strategy__{k}": v for k, v in options.items()}
        return drive(quadratic(rounds=4, participation=TWO, **own), tmp_path)

    done = run()
    who = cohorts(done)
    visited = {i for cohort in who for i in cohort}
    assert len(visited) < 8, "nobody came twice"
    assert sent(done) == (6 + 8 + len(visited), 6 + 8)  # the guidance goes once to each
    assert [r["bytes_up"] for r in done.records] == [24] * 4
    assert sent(run(explore_epochs=0)) == (8, 8)
    assert sent(run(explorers=0.5)) == (3 + 8 + len(visited), 3 + 8)
    assert sent(run(base_epochs=2)) == (7 + 8 + len(visited), 7 + 8)
    assert sent(run(sequential=True, warm_start=True)) == (6 + 8 + len(visited), 6 + 8)
    assert sent(run(apply="update", warm_start=True)) == (6 + 8 + len(visited), 6 + 8)
    # In each round anew, unless the very cohort of the last one has made it.
    assert all(a != b for a, b in pairwise(who)), who
    assert sent(run(guidance_scope="participants")) == (6 + 8 + 8, 6 + 8)


def test_steps_and_time_of_the_exploration_are_charged(tmp_path: Path) -> None:
    made = [epochs_made(i) for i in range(6)]
    done = drive(quadratic(rounds=2, client__steps=2), tmp_path)
    totals = done.driver.progress.totals
    assert totals["clients"] == 6 + 2 * 6
    assert totals["steps"] == sum(made) + 2 * 6 * 2
    assert totals["examples"] == sum((e + 2 * 2) * n for e, n in zip(made, SIZES, strict=True))
    seconds = [r["virtual_seconds"] for r in done.records]  # 10 ms per step; explorers work side by side
    assert seconds == pytest.approx([0.01 * (EPOCHS + 2), 0.01 * (EPOCHS + 4)])
    lines = (done.result.run_dir / "visits.csv").read_text().splitlines()
    explorers = [line.split(",") for line in lines if ",explore," in line]
    assert [(int(row[0]), int(row[1]), int(row[4])) for row in explorers] == [(0, i, made[i]) for i in range(6)]
    walk = drive(quadratic(rounds=1, client__steps=2, strategy__sequential=True), tmp_path)
    total = sum(v for v in walk_epochs())
    assert walk.records[0]["virtual_seconds"] == pytest.approx(0.01 * (total + 2))  # one after the other


def walk_epochs() -> list[int]:
    """Epochs of sequential explorers."""
    x, made = X, []
    for i in range(6):
        made.append(epochs_made(i, x))
        x = explored(i, x)
    return made


# --- interruptions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scope": "participants", "apply": "update", "warm_start": True},
        {"sequential": True, "base_epochs": 1, "warm_start": True},
    ],
    ids=["participants", "sequential"],
)
def test_a_killed_run_resumes_with_every_option(options: dict[str, Any], tmp_path: Path) -> None:
    values = {"client.optimizer": "adam", "client.lr": 0.01, "client.keep_optimizer": True, "client.batching": 3}
    values |= {"checkpoint.every": 1, "partition.num_clients": 9}
    settings = config(values=values, explore_epochs=2, **options)
    whole = drive(settings, tmp_path / "whole")
    with pytest.raises(Interrupted):
        drive(
            config(values={**values, "tracker.recorder.kill_at": 2}, explore_epochs=2, **options), tmp_path / "killed"
        )
    (left,) = (p.parent for p in (tmp_path / "killed").rglob("config.yaml"))
    resumed = drive(settings, tmp_path, resume=left)
    assert resumed.state_sha256 == whole.state_sha256
    assert resumed.driver.progress.totals == whole.driver.progress.totals


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"explorers": 1.5}, r"strategy\.explorers must be a share of the clients in \(0, 1\], got 1\.5"),
        ({"explorers": 7}, r"strategy\.explorers must be a share of the clients in \(0, 1\], got 7"),
        ({"explorers": 0.0}, r"strategy\.explorers must be a share of the clients in \(0, 1\], got 0"),
        ({"explorers": float("nan")}, r"strategy\.explorers must be finite"),
        ({"explore_epochs": -1}, r"strategy\.explore_epochs must be >= 0, got -1"),
        ({"explore_epochs": 1.5}, r"strategy\.explore_epochs must be a whole number, got 1\.5"),
        ({"patience": 0}, r"strategy\.patience must be >= 1, got 0"),
        ({"base_epochs": -2}, r"strategy\.base_epochs must be >= 0, got -2"),
        ({"beta": 1.0}, r"strategy\.beta must be in \[0, 1\), got 1"),
        ({"beta": -0.1}, r"strategy\.beta must be in \[0, 1\), got -0\.1"),
        ({"apply": "step"}, r"strategy\.apply must be grad or update, got '?step"),
        ({"guidance_scope": "cohort"}, r"strategy\.guidance_scope must be all or participants, got '?cohort"),
        ({"weights": "median"}, r"strategy\.weights must be examples or uniform"),
        ({"warm_start": "yes"}, r"strategy\.warm_start must be true or false"),
        (
            {"guidance_scope": "participants", "explorers": 0.5},
            r"guidance_scope=participants needs every client's own exploration: set strategy\.explorers=1\.0",
        ),
        (
            {"guidance_scope": "participants", "sequential": True},
            r"guidance_scope=participants needs .* and strategy\.sequential=false",
        ),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(config(values={}, **options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("client", "message"),
    [
        ({"client.weight_decay": 0.01}, r"client\.weight_decay=0\.01 would move parameters that the guidance holds"),
        ({"client.optimizer": "adamw", "client.weight_decay": 0.5}, r"client\.weight_decay=0\.5 would move"),
        (
            {"client.optimizer": {"_target_": "torch.optim.AdamW"}},  # its own default
            r"client\.optimizer\.weight_decay=0\.01 would move .* or client\.optimizer\.weight_decay=0",
        ),
        (
            {"client.optimizer": {"_target_": "torch.optim.SGD", "weight_decay": 0.1}},
            r"client\.optimizer\.weight_decay=0\.1 would move",
        ),
    ],
    ids=["sgd", "adamw", "torch default", "torch"],
)
def test_weight_decay_past_the_guidance_is_refused(client: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(config(values=client))
    assert "strategy.apply=update" in str(caught.value)
    build(config(values=client, apply="update"))
    build(config(values=client, explore_epochs=0))
    build(config(values={"client.optimizer": {"_target_": "torch.optim.RMSprop"}}))
