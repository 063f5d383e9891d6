"""AutoFLIP and FedPrune against closed forms on quadratics and plain PyTorch: masks, masked rounds, removal, cost."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from fedsim import federation, rounds
from fedsim.clients.local import Local
from fedsim.errors import ConfigError
from fedsim.experiment import build
from fedsim.federation import Federation
from fedsim.pruning import Chain
from fedsim.reduce import Entry
from fedsim.run import Driver
from fedsim.strategies import autoflip
from fedsim.strategies.autoflip import AutoFLIP, FlipState
from fedsim.strategies.fedlex import Explorer, guidance
from fedsim.strategies.fedprune import Masked
from fedsim.vector import Layout
from tests.helpers import Run, batches, configure, drive, flat, module_of, quadratics
from tests.test_fedlex import LR, SIZES, START, A, C, X, cohorts, explored, federated, weights_of

EVERYBODY = {"participation": {"_target_": "fedsim.clients.participation.All"}}
BRIEF: dict[str, Any] = {"explore_epochs": 2, "patience": 1}


def config(strategy: str = "autoflip", values: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """A config on digits: any values, and options of the method by name."""
    given, own = dict(values or {}), BRIEF if strategy == "autoflip" else {}
    if given.get("client.optimizer", "sgd") != "sgd":
        given["client.momentum"] = 0.0
    return configure(
        (f"strategy={strategy}",), {**given, **{f"strategy.{k}": v for k, v in {**own, **options}.items()}}
    )


def quadratic(strategy: str = "autoflip", **values: Any) -> dict[str, Any]:
    """A config on the quadratic clients of FedLEx's tests; one step of the whole data is an epoch."""
    own: dict[str, Any] = {"client__lr": LR, "sizes": SIZES, "strategy__structured": "off"}
    if strategy == "autoflip":
        own |= {"strategy__explore_epochs": 9, "strategy__patience": 3}
    return configure((f"strategy={strategy}",), quadratics(A.tolist(), C.tolist(), START, **{**own, **values}))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No pictures; plain PyTorch beside the runs does not wait for other cores."""
    monkeypatch.setattr(Driver, "_draw", lambda *_: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def states(settings: dict[str, Any], folder: Path, count: int) -> tuple[list[Any], Federation]:
    """The state before round 1, and those after so many rounds."""
    with federated(settings, folder) as (fed, exp):
        made = [rounds.first(fed, exp.info)]
        for number in range(1, count + 1):
            made.append(rounds.following(fed, made[-1], number))
        return made, fed


def spreads(fed: Federation) -> Tensor:
    """How far every client went, as it remembers it (``mask_scope=participants``), ``[K, d]``."""
    return torch.stack([row["strategy.spread"] for row in fed.memory.get(range(fed.num_clients))])


def above(G: Tensor, share: float) -> Tensor:
    """The mask by a sort: all but the ``floor(share (d - 1)) + 1`` smallest."""
    order, out = G.argsort(stable=True), torch.ones_like(G, dtype=torch.bool)
    out[order[: math.floor(share * (len(G) - 1)) + 1]] = False
    return out


def min_max(spread: Tensor) -> Tensor:
    """The guidance of one tensor."""
    return (spread - spread.min()) / (spread.max() - spread.min())


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def scored(score: Callable[[Layout], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A guidance of one's own, whatever the exploration found."""
    monkeypatch.setattr(autoflip, "guidance", lambda spread, layout: score(layout).to(spread))


def some_units_low(layout: Layout) -> Tensor:
    """Scores of the network with 12 and 8 units: low for all that goes into units 1, 4, 5 and 0, 2: a quarter of all,
    so that pruning 0.4 takes some others, too."""
    scores = 0.5 + 0.5 * torch.rand(layout.d, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    views = layout.views(scores)
    names = list(layout.names)
    for weight, bias, units in ((names[0], names[1], [1, 4, 5]), (names[2], names[3], [0, 2])):
        views[weight][units] *= 1e-3
        views[bias][units] *= 1e-3
    scores[-1] = 1.0
    return scores


# --- 1: nothing to prune ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["autoflip", "fedprune"])
def test_nothing_pruned_is_fedavg_bit_for_bit_and_byte_for_byte(strategy: str, tmp_path: Path) -> None:
    # Checks 1 and 6; no exploration, whatever else is set.
    values = {"client.optimizer": "adam", "client.lr": 0.01, "client.keep_optimizer": True}
    fedavg = drive(config("fedavg", values), tmp_path)
    for structured in ("off", "dead"):
        found = drive(config(strategy, values, threshold=0.0, beta=0.0, structured=structured), tmp_path)
        assert found.params_sha256 == fedavg.params_sha256
        assert found.driver.progress.totals == fedavg.driver.progress.totals
        assert [r["density"] for r in found.records] == [1.0] * 3
        dense = 2 * (64 * 12 + 12 * 8 + 8 * 10)
        assert all(r["flops_theoretical"] == r["flops_measured"] == dense for r in found.records)


def test_the_literal_rule_would_prune_one_entry_of_every_tensor() -> None:
    # Check 1: why a threshold of 0 is a case of its own.
    layout, G = random_guidance()
    literal = G > 0.0
    assert [int((~literal[s]).sum()) for _, s in layout.blocks()] == [1, 1, 1]
    assert bool(AutoFLIP(threshold=0.0).mask(G, layout, None).all())


# --- 2: how much is pruned --------------------------------------------------------------------------------


def random_guidance() -> tuple[Layout, Tensor]:
    """Of three tensors with 2550 entries, whose displacements are distributed otherwise in each: the ones normal, the
    others far from 0."""
    layout = Layout({"a": torch.Size([50, 40]), "b": torch.Size([50]), "c": torch.Size([50, 10])}, torch.float64)
    g = torch.Generator().manual_seed(2)
    moved = torch.randn(2550, generator=g, dtype=torch.float64)
    moved[2000:] = 3 + 0.1 * torch.rand(550, generator=g, dtype=torch.float64)
    return layout, guidance(moved.square(), layout)


def test_the_pruned_share_is_the_threshold() -> None:
    # Check 2: the counts, nested masks, and one threshold for all tensors, so that sparsity differs between them.
    layout, G = random_guidance()
    before = torch.ones(2550, dtype=torch.bool)
    for share, count in ((0.1, 255), (0.2, 510), (0.3, 765), (0.4, 1020), (0.5, 1275)):
        mask = AutoFLIP(threshold=share).mask(G, layout, None)
        assert int((~mask).sum()) == count == math.floor(share * 2549) + 1
        assert bool((before | ~mask).all())
        before = mask
    mask = AutoFLIP(threshold=0.3).mask(G, layout, None)
    sparsity = [float((~mask[s]).double().mean()) for _, s in layout.blocks()]
    assert sparsity[0] > 3 * max(sparsity[1:])
    assert torch.equal(mask, above(G, 0.3))


def test_a_tensor_in_which_nothing_moved_is_not_pruned(tmp_path: Path) -> None:
    # The official formula gives 0 / 0 there.
    layout, _ = random_guidance()
    moved = torch.rand(2550, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved[layout.slices["b"]] = 0.0
    for share, left in ((0.9, 2549 - math.floor(0.9 * 2549) - 50), (0.99, 0)):  # the 52 highest are all 1
        mask = AutoFLIP(threshold=share).mask(guidance(moved, layout), layout, None)
        assert bool(mask[layout.slices["b"]].all())
        assert int(mask.sum()) == 50 + left
    minimum = quadratics(A.tolist(), X.expand(6, 3).tolist(), START, client__lr=LR, strategy__structured="off")
    still, _ = states(configure(("strategy=autoflip",), {**minimum, "strategy.mask_scope": "all"}), tmp_path, 1)
    assert bool(still[1].M.all()) and torch.equal(still[1].w, X)


# --- rounds by hand ---------------------------------------------------------------------------------------


def spread_of(who: Sequence[int]) -> Tensor:
    return torch.stack([(explored(i) - X).square() for i in who]).mean(0)


def masked_rounds(
    who: Sequence[Sequence[int]], masks: Sequence[Tensor], beta: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Rounds under masks: K steps take client i from w to c + q^K (w - c) where the mask is 1."""
    w, v = X, torch.zeros(3, dtype=torch.float64)
    for cohort, M in zip(who, masks, strict=True):
        w, v = w * M, v * M
        moved = (1 - (1 - LR * A[list(cohort)]) ** steps) * (C[list(cohort)] - w)
        v = beta * v + (1 - beta) * (weights_of(cohort) * moved).sum(0) * M
        w = w + v
    return w, v


SOME = {"_target_": "fedsim.clients.participation.Fixed", "clients_per_round": 2}


@pytest.mark.parametrize("batching", ["off", 2])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_rounds_under_one_mask_by_hand(beta: float, batching: Any, tmp_path: Path) -> None:
    options = {"strategy__mask_scope": "all", "strategy__beta": beta, "client__batching": batching}
    done = drive(quadratic(**options, participation=SOME, rounds=4, client__steps=3), tmp_path)
    M = above(min_max(spread_of(range(6))), 0.3)
    assert int(M.sum()) == 2
    w, v = masked_rounds(cohorts(done), [M] * 4, beta, 3)
    assert torch.equal(done.state.M, M)
    close(done.w, w)
    close(done.state.v, v)


@pytest.mark.parametrize("explorers", [1.0, 0.34])
def test_rounds_under_their_participants_masks_by_hand(explorers: float, tmp_path: Path) -> None:
    # A mask of the explorers in each cohort, of all explorers where there is none. One of three parameters survives: of
    # client 0 the first, of the divergent ones the second; it starts from 0 when it comes back. Clients 1 and 2 end
    # where they began, so that a mask of theirs alone prunes nothing.
    settings = quadratic(
        participation=SOME, rounds=8, strategy__explorers=explorers, strategy__threshold=0.5, client__steps=3, seed=2
    )
    made, _ = states(settings, tmp_path, 8)
    explored_by = {*made[0].explorers}
    assert len(explored_by) == round(explorers * 6)
    who = _cohorts_seen(settings, tmp_path / "again")
    masks = []
    for cohort in who:
        own = sorted({*cohort} & explored_by) or sorted(explored_by)
        spread = spread_of(own)
        masks.append(above(min_max(spread), 0.5) if bool(spread.any()) else torch.ones(3, dtype=torch.bool))
    assert len({tuple(M.tolist()) for M in masks}) > 1, "no mask ever changed"
    if explorers < 1:
        assert any(not {*cohort} & explored_by for cohort in who), "every cohort has an explorer"
    w, v = masked_rounds(who, masks, 0.9, 3)
    assert torch.equal(made[-1].M, masks[-1])
    close(made[-1].w, w)
    close(made[-1].v, v)


def _cohorts_seen(settings: dict[str, Any], folder: Path) -> list[list[int]]:
    """Who takes part in each round, drawn again as the run draws it."""
    with federated(settings, folder) as (fed, _):
        seen = []
        for number in range(1, settings["rounds"] + 1):
            fed.begin_round(number)
            seen.append(fed.sample())
        return seen


def test_warm_start_and_sequential_explorers(tmp_path: Path) -> None:
    ends = torch.stack([explored(i) for i in range(6)])
    warm, _ = states(quadratic(strategy__mask_scope="all", strategy__warm_start=True), tmp_path / "warm", 0)
    M = above(min_max(spread_of(range(6))), 0.3)
    close(warm[0].w, ends.mean(0) * M)
    x = X
    for i in range(6):
        x = explored(i, x)
    options: dict[str, Any] = {
        "strategy__mask_scope": "all",
        "strategy__sequential": True,
        "strategy__warm_start": True,
    }
    walk, _ = states(quadratic(**options), tmp_path / "walk", 0)
    M = above(min_max((x - X).square()), 0.3)
    assert torch.equal(walk[0].M, M)
    close(walk[0].w, x * M)
    dense, _ = states(quadratic(strategy__threshold=0.0, strategy__warm_start=True), tmp_path / "dense", 0)
    close(dense[0].w, ends.mean(0))
    assert bool(dense[0].M.all())


def test_the_absolute_rule_prunes_what_has_a_lower_guidance(tmp_path: Path) -> None:
    G = min_max(spread_of(range(6)))
    at = float(G.sort().values[1])
    for share, left in ((at - 1e-9, 2), (at + 1e-9, 1)):
        options: dict[str, Any] = {
            "strategy__rule": "absolute",
            "strategy__threshold": share,
            "strategy__mask_scope": "all",
        }
        made, _ = states(quadratic(**options), tmp_path / str(left), 0)
        assert torch.equal(made[0].M, share <= G)
        assert int(made[0].M.sum()) == left


def test_magnitudes_are_pruned_once_at_the_start_of_their_round(tmp_path: Path) -> None:
    # Round 1 is FedAvg's; before round 2 the two smallest of three fall, and do not come back.
    settings = quadratic("fedprune", **EVERYBODY, rounds=3, client__steps=2, strategy__start=2, strategy__threshold=0.5)
    made, _ = states(settings, tmp_path, 3)
    everybody = range(6)
    dense, _ = masked_rounds([everybody], [torch.ones(3, dtype=torch.bool)], 0.0, 2)
    close(made[1].w, dense)
    assert bool(made[1].M.all())
    M = dense.abs() == dense.abs().max()
    assert torch.equal(made[2].M, M) and torch.equal(made[3].M, M)
    w, _ = masked_rounds([everybody] * 3, [torch.ones(3, dtype=torch.bool), M, M], 0.0, 2)
    close(made[3].w, w)


def test_random_masks_are_drawn_once_or_in_every_round(tmp_path: Path) -> None:
    for redraw in (False, True):
        settings = config("fedprune", by="random", threshold=0.4, redraw=redraw, beta=0.5)
        made, fed = states(settings, tmp_path / str(redraw), 4)
        pruned = math.floor(0.4 * (fed.layout.d - 1)) + 1
        assert [int((~state.M).sum()) for state in made] == [0, *[pruned] * 4]
        changes = [not torch.equal(a.M, b.M) for a, b in pairwise(made[1:])]
        assert changes == [redraw] * 3
        assert all(not state.w[~state.M].any() and not state.v[~state.M].any() for state in made)
        if redraw:  # independent: of what survives twice 0.6 squared, within five standard deviations
            both = float((made[1].M & made[2].M).double().mean())
            assert abs(both - 0.36) < 5 * math.sqrt(0.36 * 0.64 / fed.layout.d)
        for _, s in fed.layout.blocks():
            if s.stop - s.start > 90:
                assert abs(float(made[1].M[s].double().mean()) - 0.6) < 5 * math.sqrt(0.24 / (s.stop - s.start))


# --- 3: the support ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "client",
    [
        {"client.momentum": 0.9, "client.weight_decay": 0.1},
        {"client.optimizer": "adam", "client.lr": 0.01, "client.weight_decay": 0.1},
    ],
    ids=["momentum", "adam"],
)
@pytest.mark.parametrize("scope", ["all", "participants"])
def test_masked_parameters_are_zero_everywhere(
    scope: str, client: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Check 3: after every step of a client, in what it sends, in the global model and in its momentum.
    looked, update, finish = [0], Masked.update, Masked.finish

    def spy_update(self: Masked, w: Tensor, d: Tensor, local: Local) -> Tensor:
        new = update(self, w, d, local)
        gone = ~local.sent.M[0]
        assert not local.start[:, gone].any() and not new[:, gone].any()
        assert bool(d[:, gone].any()), "gradients are dense"
        looked[0] += 1
        return new

    def spy_finish(self: Masked, w: Tensor, local: Local) -> dict[str, Entry]:
        entries = finish(self, w, local)
        assert not entries["delta"].value[:, ~local.sent.M[0]].any()
        return entries

    monkeypatch.setattr(Masked, "update", spy_update)
    monkeypatch.setattr(Masked, "finish", spy_finish)
    settings = config(values=client, mask_scope=scope, structured="off", threshold=0.5)
    made, _ = states(settings, tmp_path, 4)
    for before, state in pairwise(made):
        assert not state.w[~state.M].any() and not state.v[~state.M].any()
        assert float(state.M.double().mean()) == pytest.approx(0.5, abs=0.01)
        assert bool((state.w[state.M] != before.w[state.M]).double().mean() > 0.8)
    assert len({tuple(s.M.tolist()) for s in made[1:]}) == (1 if scope == "all" else 4)
    assert looked[0] > 20


# --- 4: what masking after each step is -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_masked_rounds_equal_torch_pruning_and_masked_gradients(kind: str, tmp_path: Path) -> None:
    # Check 4: one client; torch's parametrisation by a mask inside the loop, and gradients and weights masked.
    values: dict[str, Any] = {"precision": "float64", "partition.num_clients": 1, **EVERYBODY, "rounds": 1}
    values |= {"client.epochs": 2, "client.momentum": 0.9 if kind == "momentum" else 0.0}
    values |= {"client.optimizer": "adam", "client.lr": 0.01} if kind == "adam" else {}
    settings = config("fedprune", values, by="random", threshold=0.5)
    done = drive(settings, tmp_path)
    exp, M = done.driver.exp, done.state.M
    shard = exp.program.shard(0)
    x, y = exp.program.inputs(shard.x[shard.rows]), shard.y[shard.rows]
    masks, lr = exp.program.layout.views(M), exp.program.options.lr

    def trained(module: nn.Module, before_step: Callable[[], None], after_step: Callable[[], None]) -> None:
        parameters = list(module.parameters())
        optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=lr, momentum=values["client.momentum"])
        if kind == "adam":
            optimizer = torch.optim.Adam(parameters, lr=lr)
        order = batches(0, 0, len(y), 64)
        for _ in range(2 * -(-len(y) // 64)):
            rows = next(order)
            optimizer.zero_grad()
            F.cross_entropy(module(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            before_step()
            optimizer.step()
            after_step()

    start = exp.program.network.initial * M
    pruned = module_of(exp, start)
    for name, layer in [*pruned.named_modules()]:
        for key, _ in [*layer.named_parameters(recurse=False)]:
            prune.custom_from_mask(layer, key, masks[f"{name}.{key}"])  # type: ignore[no-untyped-call]
    trained(pruned, lambda: None, lambda: None)
    for layer in [*pruned.modules()]:
        for key in [k.removesuffix("_orig") for k, _ in layer.named_parameters(recurse=False)]:
            prune.remove(layer, key)  # type: ignore[no-untyped-call]
    views = {name: p.detach() for name, p in pruned.named_parameters()}
    both = module_of(exp, start)
    named = dict(both.named_parameters())

    def mask_gradients() -> None:
        for name, p in named.items():
            assert p.grad is not None
            p.grad.mul_(masks[name])

    def mask_weights() -> None:
        with torch.no_grad():
            for name, p in named.items():
                p.mul_(masks[name])

    trained(both, mask_gradients, mask_weights)
    assert float((done.w - start).abs().max()) > 1e-2
    close(done.w, torch.cat([views[name].flatten() for name in exp.program.layout.names]), 1e-13)
    close(done.w, flat(both), 1e-13)


# --- 5: units that are removed ----------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["off", 3])
@pytest.mark.parametrize("client", [{}, {"client.optimizer": "adam", "client.lr": 0.01}], ids=["momentum", "adam"])
def test_rounds_of_the_smaller_network_are_those_of_the_whole_one(
    client: dict[str, Any], batching: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Dead units alone: their gradients are 0. The server's momentum and averages go on in the whole vector.
    scored(some_units_low, monkeypatch)
    values = {**client, "precision": "float64", "client.batching": batching, "client.clip_norm": 1.0, "rounds": 3}
    small = drive(config(values=values, threshold=0.4, structured="dead", mask_scope="all"), tmp_path)
    whole = drive(config(values=values, threshold=0.4, structured="off", mask_scope="all"), tmp_path)
    assert [r["units_removed"] for r in small.records] == [5] * 3
    assert [r["units_removed"] for r in whole.records] == [0] * 3
    assert float((small.w - whole.w)[small.state.M].abs().max()) < 1e-12
    assert torch.equal(small.w, small.w * small.state.M)
    gone = whole.state.M & ~small.state.M
    assert bool(gone.any()), "outgoing weights of removed units leave the mask"
    assert bool((whole.w[gone] != 0).all())
    start = small.driver.exp.program.network.initial
    assert bool((small.w != start)[small.state.M].double().mean() > 0.9)
    # Nine and six of 12 and 8 units are left.
    dense, left = 2 * (64 * 12 + 12 * 8 + 8 * 10), 2 * (64 * 9 + 9 * 6 + 6 * 10)
    assert [r["flops_measured"] for r in small.records] == [left] * 3
    assert [r["flops_measured"] for r in whole.records] == [dense] * 3
    weights = [s for n, s in small.driver.exp.program.layout.blocks() if n.endswith("weight")]
    for run in (small, whole):
        surviving = sum(int(run.state.M[s].sum()) for s in weights)
        assert [r["flops_theoretical"] for r in run.records] == [2 * surviving] * 3
    assert small.result.summary["final"]["test_accuracy"] == whole.result.summary["final"]["test_accuracy"]


def test_a_bias_that_survives_is_folded_before_the_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Check 5, in the run: the masked model of round 1 computes the same with and without removal.
    def biased(layout: Layout) -> Tensor:
        scores = some_units_low(layout)
        for name in layout.names:
            if name.endswith("bias"):
                layout.views(scores)[name][:] = 1.0 - 1e-3 / len(name)
        return scores

    scored(biased, monkeypatch)
    values = {"precision": "float64"}
    made = {}
    for structured in ("dead", "off"):
        settings = config(values=values, threshold=0.4, structured=structured, mask_scope="all")
        (state,), _ = states(settings, tmp_path / structured, 0)
        module = module_of(build(settings), state.w)
        made[structured] = (
            state,
            module(torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).double()).detach(),
        )
    close(made["dead"][1], made["off"][1], 1e-13)
    chain = Chain.of(module)
    assert [len(k) for k in chain.kept(made["dead"][0].M, 0.4)] == [9, 6]
    assert [len(k) for k in chain.kept(made["off"][0].M, 0.4)] == [12, 8]
    assert not torch.equal(made["dead"][0].w * made["off"][0].M, made["off"][0].w * made["dead"][0].M)


def test_units_with_a_low_mean_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Unit 0 of the first layer has one high weight among low ones: `dead` keeps it, `mean` does not.
    def scores(layout: Layout) -> Tensor:
        out = some_units_low(layout)
        layout.views(out)[layout.names[0]][0] = 0.01
        out[0] = 0.99
        return out

    scored(scores, monkeypatch)
    removed = {}
    for structured in ("off", "dead", "mean"):
        settings = config(threshold=0.4, structured=structured, mask_scope="all")
        done = drive(config(threshold=0.4, structured=structured, mask_scope="all"), tmp_path)
        removed[structured] = done.records[0]["units_removed"]
        assert settings["strategy"]["structured"] == structured
    assert removed == {"off": 0, "dead": 5, "mean": 6}


def test_units_that_come_back_start_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Masks that change every round, removal included: what is in again was 0, momentum too.
    def scores(layout: Layout) -> Tensor:
        calls.append(1)
        return some_units_low(layout) if len(calls) % 2 else some_units_low(layout).roll(200)

    calls: list[int] = []
    scored(scores, monkeypatch)
    made, _ = states(config(threshold=0.4, beta=0.5), tmp_path, 3)
    assert not torch.equal(made[1].M, made[2].M)
    back = made[2].M & ~made[1].M
    assert bool(back.any()) and not made[1].w[back].any()
    assert bool(made[2].w[back].any())


@pytest.mark.slow
def test_ray_trains_the_smaller_network_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored(some_units_low, monkeypatch)
    runs = []
    for engine, values in (("inline", {}), ("ray", {"engine.workers": 2})):
        own = {f"strategy.{k}": v for k, v in {**BRIEF, "threshold": 0.4}.items()}
        runs.append(drive(configure(("strategy=autoflip", f"engine={engine}"), {**own, **values}), tmp_path))
    assert runs[0].records[-1]["units_removed"] == 5
    assert runs[0].state_sha256 == runs[1].state_sha256


# --- 6: bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", ["off", "dead"])
def test_surviving_values_and_a_bitmap_are_charged(
    structured: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Check 6: 4 bytes for each survivor, down and up, and a bit per parameter once; an explorer: 1 vector each way.
    scored(some_units_low, monkeypatch)
    done = drive(config(values={"rounds": 5}, threshold=0.4, structured=structured, mask_scope="all"), tmp_path)
    d, left = done.driver.exp.program.layout.d, int(done.state.M.sum())
    survivors = d - math.floor(0.4 * (d - 1)) - 1
    assert left < survivors if structured == "dead" else left == survivors
    who = _cohorts_seen(config(values={"rounds": 5}), tmp_path / "who")
    seen: set[int] = set()
    for record, cohort in zip(done.records, who, strict=True):
        assert record["bytes_up"] == 4 * left * len(cohort)
        assert record["bytes_down"] == 4 * left * len(cohort) + len({*cohort} - seen) * -(-d // 8)
        seen |= {*cohort}
    totals, rounds_up = done.driver.progress.totals, sum(r["bytes_up"] for r in done.records)
    assert totals["bytes_up"] == rounds_up + 7 * 4 * d
    assert totals["bytes_down"] == sum(r["bytes_down"] for r in done.records) + 7 * 4 * d


def test_what_the_server_knows_already_is_not_charged(tmp_path: Path) -> None:
    # mask_scope=participants: the exploration's spreads are looked up with the clients, which costs no byte.
    done = drive(config(values={**EVERYBODY, "rounds": 2}, structured="off"), tmp_path)
    d, left = done.driver.exp.program.layout.d, int(done.state.M.sum())
    assert [r["bytes_up"] for r in done.records] == [4 * left * 7] * 2
    assert [r["bytes_down"] for r in done.records] == [7 * (4 * left + -(-d // 8)), 7 * 4 * left]  # the same mask


# --- 7 and 8: what the mask does not depend on ------------------------------------------------------------


def test_the_mask_does_not_depend_on_the_scale_of_displacements() -> None:
    # Check 7.
    layout, _ = random_guidance()
    moved = torch.randn(2550, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    rule = AutoFLIP(threshold=0.3)
    masks = [rule.mask(guidance((c * moved).square(), layout), layout, None) for c in (1.0, 1e-3, 3.7)]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


def test_the_mask_does_not_depend_on_who_explores_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Check 7: partial sums of the spreads over 7, 3 and 1 clients.
    made: list[FlipState] = []
    for size in (32, 3, 1):
        monkeypatch.setattr(federation, "PIECE", size)
        made += states(config(mask_scope="all", structured="off"), tmp_path / str(size), 0)[0]
    assert torch.equal(made[0].M, made[1].M) and torch.equal(made[0].M, made[2].M)
    _, fed = states(config(structured="off", values={"precision": "float64"}), tmp_path / "own", 0)
    own = spreads(fed)
    parts = (own[:3].sum(0) + own[3:5].sum(0) + own[5:].sum(0)) / 7
    (whole,), _ = states(
        config(mask_scope="all", structured="off", values={"precision": "float64"}), tmp_path / "64", 0
    )
    G = guidance(parts, fed.layout)
    at = G.sort().values[math.floor(0.3 * (len(G) - 1))]
    clear = (G - at).abs() > 1e-9  # sums in another order may differ in their last bit
    assert torch.equal((at < G)[clear], whole.M[clear]) and float(clear.double().mean()) > 0.95


def test_participants_masks_are_the_mask_of_all_where_all_take_part(tmp_path: Path) -> None:
    # Check 8.
    values = {**EVERYBODY, "precision": "float64"}
    own, _ = states(config(values=values, structured="off"), tmp_path / "own", 3)
    (everybody,), _ = states(config(values=values, structured="off", mask_scope="all"), tmp_path / "all", 0)
    assert bool(own[0].M.all()) and not bool(everybody.M.all())
    assert all(torch.equal(state.M, everybody.M) for state in own[1:])
    assert own[0].D.shape == everybody.M.shape and everybody.D.numel() == 0


# --- 9: nearly nothing left -------------------------------------------------------------------------------


def test_a_model_of_which_nothing_is_left_still_runs_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Check 9: of distinct scores only the highest survives; outputs are the same for every input.
    scored(lambda layout: torch.arange(layout.d).double() / layout.d, monkeypatch)
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        done = drive(config(threshold=0.99999, structured="off", mask_scope="all"), tmp_path)
    layout = done.driver.exp.program.layout
    assert done.state.M.nonzero().tolist() == [[layout.d - 1]]
    (record, *_) = done.records
    assert (record["density"], record["flops_theoretical"]) == (1 / layout.d, 0)
    assert record["tensors_empty"] == len(layout.names) - 1
    assert "the mask leaves nothing of 5 tensors: features.1.weight" in caplog.text
    outputs = module_of(done.driver.exp, done.w)(torch.randn(4, 64))
    assert torch.equal(outputs, outputs[:1].expand(4, 10))
    assert math.isfinite(record["train_loss"]) and float(done.w[-1]) != 0


def test_removing_all_units_of_a_layer_is_refused_by_name(tmp_path: Path) -> None:
    message = (
        r"strategy\.threshold=0\.99999 leaves none of the 12 units of layer features\.1; lower strategy\.threshold, or "
        r"set strategy\.structured=off"
    )
    for strategy in ("autoflip", "fedprune"):
        with pytest.raises(ConfigError, match=message):
            states(config(strategy, threshold=0.99999, structured="dead"), tmp_path / strategy, 1)


# --- refusals ---------------------------------------------------------------------------------------------

ADAM: dict[str, Any] = {"_target_": "torch.optim.Adam"}


@pytest.mark.parametrize(
    ("strategy", "options", "values", "message"),
    [
        (
            "autoflip",
            {"threshold": 1.0},
            {},
            r"strategy\.threshold must be a share of the parameters in \[0, 1\), got 1",
        ),
        ("fedprune", {"threshold": -0.1}, {}, r"strategy\.threshold must be a share of the parameters in \[0, 1\)"),
        ("autoflip", {"structured": "units"}, {}, r"strategy\.structured must be dead, mean or off, got 'units'"),
        ("autoflip", {"beta": 1.0}, {}, r"strategy\.beta must be in \[0, 1\), got 1"),
        ("autoflip", {"explorers": 0.0}, {}, r"strategy\.explorers must be a share of the clients in \(0, 1\]"),
        ("autoflip", {"explore_epochs": 0}, {}, r"strategy\.explore_epochs must be >= 1, got 0"),
        ("autoflip", {"patience": 0}, {}, r"strategy\.patience must be >= 1, got 0"),
        ("autoflip", {"mask_scope": "some"}, {}, r"strategy\.mask_scope must be participants or all, got 'some'"),
        ("autoflip", {"rule": "top"}, {}, r"strategy\.rule must be quantile or absolute, got 'top'"),
        ("autoflip", {"sequential": True}, {}, r"each client's own exploration.*set strategy\.mask_scope=all"),
        ("fedprune", {"by": "gradient"}, {}, r"strategy\.by must be magnitude or random, got 'gradient'"),
        ("fedprune", {"start": 0}, {}, r"strategy\.start must be a round, >= 1, got 0"),
        ("fedprune", {"redraw": True}, {}, r"strategy\.redraw=true is for strategy\.by=random"),
        ("autoflip", {}, {"client.keep_optimizer": True}, r"client\.keep_optimizer=true .* strategy\.structured=off"),
        ("autoflip", {}, {"client.optimizer": ADAM}, r"client\.optimizer by _target_ .* strategy\.structured=off"),
    ],
)
def test_impossible_options_are_refused(
    strategy: str, options: dict[str, Any], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(config(strategy, values, **options))
    assert "\n" not in str(caught.value)


def test_optimizers_that_survive_are_allowed_where_the_network_keeps_its_size(tmp_path: Path) -> None:
    build(config(values={"client.keep_optimizer": True}, structured="off"))
    build(config(values={"client.keep_optimizer": True}, threshold=0.0))
    build(config(values={"client.optimizer": ADAM}, structured="off"))


def test_networks_whose_units_cannot_be_removed_are_refused_before_the_exploration(tmp_path: Path) -> None:
    model = {"_target_": "tests.helpers.Normed", "weights": None}
    with federated(config(values={"model": model}), tmp_path) as (fed, exp):
        with pytest.raises(ConfigError, match=r"Normed is another network: .*; set strategy\.structured=off"):
            rounds.first(fed, exp.info)
        assert not fed.done.visits
    drive(config(values={"model": model, "rounds": 1}, structured="off"), tmp_path / "off")


def test_the_smallest_and_the_wholly_pruned_state_are_named_in_the_metrics(tmp_path: Path) -> None:
    done: Run = drive(config("fedprune", threshold=0.3), tmp_path)
    d = done.driver.exp.program.layout.d
    record = done.records[-1]
    assert record["density"] == 1 - (math.floor(0.3 * (d - 1)) + 1) / d
    assert record["flops_measured"] == 2 * (64 * 12 + 12 * 8 + 8 * 10) > record["flops_theoretical"]


def test_a_client_whose_exploration_failed_is_no_explorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its zeros would be taken for "nothing moved", and nothing pruned in the rounds that have no other client.
    work = Explorer.work

    def failing(self: Explorer, local: Local) -> Tensor:
        if local.clients == (1,):
            raise RuntimeError("cannot")
        return work(self, local)

    monkeypatch.setattr(Explorer, "work", failing)
    one = {"_target_": "fedsim.clients.participation.Fixed", "clients_per_round": 1}
    values = {"participation": one, "rounds": 10, "engine.on_failure": "skip", "client.batching": "off"}
    found = drive(config(values=values, threshold=0.5, structured="off", explorers=1.0), tmp_path)
    assert found.driver.progress.state.explorers == (0, 2, 3, 4, 5, 6)
    assert 1 in found.driver.memory.clients()  # it took part in a round
    assert all(0.4 < record["density"] < 0.51 for record in found.records)
