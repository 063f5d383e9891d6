"""FedLoGe against plain PyTorch: the fixed classifier, three classifiers in one pass, realigned heads, what travels."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim import random
from fedsim.clients.batch import Batch
from fedsim.clients.local import Local
from fedsim.data import Dataset, Shard, Split
from fedsim.errors import ConfigError
from fedsim.experiment import Experiment, build
from fedsim.federation import Federation
from fedsim.models.standard import Classifier
from fedsim.network import Point
from fedsim.program import Bound
from fedsim.reduce import Entry
from fedsim.run import Driver
from fedsim.strategies import fedloge
from fedsim.strategies.fedloge import FedLoGe, LoGeState, kept_sse_c, sse_c
from fedsim.strategy import ClientHalf, Info, Model
from fedsim.vector import Layout
from tests.helpers import FixedClients, Interrupted, Run, batches, configure, drive, local_of, module_of

EVERYBODY = {"_target_": "fedsim.clients.participation.All"}
TWO = {"_target_": "fedsim.clients.participation.Fixed", "clients_per_round": 2}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No pictures, a cache of its own; plain PyTorch beside the runs does not wait for other cores."""
    monkeypatch.setattr(Driver, "_draw", lambda *_: None)
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(values: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """A config on digits: any values, and options of the method by name."""
    own = {"sse_steps": 20, **options}
    given = {"model.hidden": [12], "precision": "float64", **(values or {})}
    return configure(("strategy=fedloge",), {**given, **{f"strategy.{k}": v for k, v in own.items()}})


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# --- the fixed classifier ---------------------------------------------------------------------------------


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def angles(W: Tensor) -> Tensor:
    """Angles between all pairs of rows, in degrees, ``[C (C - 1)]``."""
    unit = W.double() / W.double().norm(dim=1, keepdim=True)
    found: Tensor = (unit @ unit.T).clamp(-1, 1).acos().rad2deg()
    return found[~torch.eye(len(W), dtype=torch.bool)]


@pytest.mark.parametrize(("C", "dim", "angle"), [(10, 512, 96.379), (100, 512, 90.579), (10, 10, 96.379)])
def test_without_zeros_and_steps_the_fixed_classifier_is_a_simplex(C: int, dim: int, angle: float) -> None:
    # Check 1, of the rows: M^T M = C / (C - 1) (I - 1 1^T / C), sum 0, and M M^T M = C / (C - 1) M.
    W, factor = sse_c(C, dim, 0.0, 0.1, 0, generator()), C / (C - 1)
    assert W.dtype == torch.float32 and W.shape == (C, dim)
    close(W @ W.T, factor * (torch.eye(C) - 1 / C), 1e-6)
    close(W.sum(0), torch.zeros(dim), 1e-6)
    close(W.T @ W @ W.T, factor * W.T, 1e-6)
    assert float((angles(W) - angle).abs().max()) < 2e-3
    assert angle == pytest.approx(math.degrees(math.acos(-1 / (C - 1))), abs=5e-4)


@pytest.mark.parametrize(("beta", "zeros"), [(0.6, 3072), (0.5, 2560), (0.25, 1280), (0.0, 0), (0.333, 1704)])
@pytest.mark.parametrize("steps", [0, 15])
def test_a_share_of_the_whole_matrix_is_zero(beta: float, zeros: int, steps: int) -> None:
    # Check 2: floor(beta d C) zeros, before and after the steps, and not the same number in every row.
    W = sse_c(10, 512, beta, 0.1, steps, generator(1))
    assert int((W == 0).sum()) == zeros
    assert (len({*(W == 0).sum(1).tolist()}) > 1) == (beta > 0)
    assert torch.equal(W == 0, sse_c(10, 512, beta, 0.1, 0, generator(1)) == 0)


@pytest.mark.parametrize(("C", "tau"), [(5, 0.1), (5, 2.0), (2, 0.3)])
def test_the_construction_is_adam_on_norms_and_nearest_neighbours(C: int, tau: float) -> None:
    # A second derivation with torch's own Adam: sum (|m_c| - tau)^2 - mean angle to the nearest other class.
    start, steps = sse_c(C, 14, 0.4, tau, 0, generator(2)), 60
    mask, m = (start != 0).float(), nn.Parameter(start.clone())
    adam = torch.optim.Adam([m], lr=1e-4)
    for _ in range(steps):
        loss = torch.zeros(())
        for c in range(C):
            cosines = [F.cosine_similarity(m[c], m[o], dim=0) for o in range(C) if o != c]
            nearest = torch.stack(cosines).max().clip(-0.99999, 0.99999)
            loss = loss + (m[c].norm() - tau) ** 2 - nearest.arccos() / C
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        assert m.grad is not None
        m.grad *= mask
        adam.step()
    found = sse_c(C, 14, 0.4, tau, steps, generator(2))
    assert float((found - start).abs().max()) > 1e-3
    torch.testing.assert_close(found, m.detach(), rtol=0, atol=2e-6)


def test_the_construction_pushes_sparse_rows_apart() -> None:
    # Check 2 with ten classes: the angles are there after a fifth of the steps; norms are on their way to 0.1.
    before, after = (sse_c(10, 512, 0.6, 0.1, steps, generator()) for steps in (0, 2000))
    assert float(angles(before).std()) > 1.5 and float(before.norm(dim=1).mean()) > 0.6
    assert abs(float(angles(after).mean()) - 96.379) < 0.01
    assert float(angles(after).std()) < 0.3
    assert float(after.norm(dim=1).min()) >= 0.1 and float(after.norm(dim=1).max()) < 0.106


@pytest.mark.slow
def test_the_fixed_classifier_of_a_hundred_classes_has_the_published_geometry() -> None:
    # Check 2: norms 0.1000 to 0.1010, mean angle within 0.01 of the ideal, deviation below 0.3 (0.20), minimum 90.26.
    before, after = (sse_c(100, 512, 0.6, 0.1, steps, generator()) for steps in (0, 10_000))
    assert float(before.norm(dim=1).mean()) == pytest.approx(0.635, abs=0.01)
    assert float(angles(before).std()) == pytest.approx(2.3, abs=0.1)
    assert float(angles(before).min()) == pytest.approx(81.5, abs=1)
    assert int((after == 0).sum()) == int((before == 0).sum()) == 30_720
    assert float(after.norm(dim=1).min()) >= 0.1 and float(after.norm(dim=1).max()) <= 0.101
    assert abs(float(angles(after).mean()) - math.degrees(math.acos(-1 / 99))) < 0.01
    assert float(angles(after).std()) < 0.3
    assert float(angles(after).min()) == pytest.approx(90.26, abs=0.05)


def info(seed: int = 0) -> Info:
    return Info(3, 4, Layout({"head.weight": torch.Size([4, 6])}), seed, 1, 0.1)


def test_the_fixed_classifier_is_kept_on_disk_by_all_that_it_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def spy(C: int, dim: int, beta: float, tau: float, steps: int, g: torch.Generator) -> Tensor:
        made.append(steps)
        return sse_c(C, dim, beta, tau, steps - 990, g)

    monkeypatch.setattr(fedloge, "sse_c", spy)
    first = kept_sse_c(4, 6, 0.5, 0.1, 1000, info())
    assert torch.equal(kept_sse_c(4, 6, 0.5, 0.1, 1000, info()), first)
    assert len(made) == 1 and len(list((tmp_path / "cache").iterdir())) == 1
    others = [(4, 7, 0.5, 0.1, 1000), (3, 6, 0.5, 0.1, 1000), (4, 6, 0.4, 0.1, 1000), (4, 6, 0.5, 0.2, 1000)]
    found = [kept_sse_c(*other, info()) for other in [*others, (4, 6, 0.5, 0.1, 1001)]]
    found.append(kept_sse_c(4, 6, 0.5, 0.1, 1000, info(seed=1)))
    assert len(made) == 7
    assert not any(W.shape == first.shape and torch.equal(W, first) for W in found)


def test_short_constructions_are_not_kept(tmp_path: Path) -> None:
    kept_sse_c(4, 6, 0.5, 0.1, 20, info())
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("sse_bias", [False, True])
def test_the_first_state_has_the_fixed_classifier_of_the_seed(sse_bias: bool) -> None:
    exp = build(config(sse_bias=sse_bias, beta=0.3, tau=0.4))
    state: LoGeState = exp.program.strategy.init(exp.info, exp.program.network.initial)
    expected = sse_c(10, 12, 0.3, 0.4, 20, exp.info.generator("sse_c"))
    assert state.W.dtype == torch.float64 and state.psi is None
    close(state.W[:, :12], expected.double())
    assert state.W.shape[1] == 12 + sse_bias
    if sse_bias:  # as a linear layer draws: uniform within 1 / sqrt(d)
        bias = torch.cat(
            [
                FedLoGe(sse_bias=True, sse_steps=0).init(i, exp.program.network.initial).W[:, 12]
                for i in (Info(3, 10, exp.program.layout, seed, 1, 0.1) for seed in range(40))
            ]
        )
        assert float(bias.abs().max()) <= 12**-0.5
        assert float(bias.std()) == pytest.approx((1 / 36) ** 0.5, rel=0.1)


# --- rounds, by hand --------------------------------------------------------------------------------------


def cohort(exp: Experiment, number: int) -> list[int]:
    return list(
        exp.participation.sample(len(exp.program.clients), random.numpy_generator(0, "participation", number, 0))
    )


def inputs(exp: Experiment, shard: Shard) -> tuple[Tensor, Tensor]:
    """A shard's examples as the network takes them, and labels."""
    return exp.program.inputs(shard.x[shard.rows]), shard.y[shard.rows]


def first_private(exp: Experiment, client: int) -> nn.Linear:
    """The private head that a client begins with (its distribution has a test of its own)."""
    local = local_of(exp, client, W=torch.zeros(1))
    views, head = exp.program.layout.views(local.start[0]), nn.Linear(1, 1)
    head.weight, head.bias = (nn.Parameter(views[f"private.{name}"].clone()) for name in ("weight", "bias"))
    return head


def average(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum((n * t.double() for n, t in zip(weights, tensors, strict=True)), torch.zeros(())) / sum(weights)


def three_optimizers(client: Mapping[str, Any], parts: Sequence[nn.Module]) -> list[torch.optim.Optimizer]:
    if client["optimizer"] == "adam":
        return [torch.optim.Adam(p.parameters(), lr=client["lr"]) for p in parts]
    rates = {"lr": client["lr"], "momentum": client["momentum"], "weight_decay": client["weight_decay"]}
    return [torch.optim.SGD(p.parameters(), **rates) for p in parts]


@dataclass
class Plain:
    """A federation in plain PyTorch.

    Attributes:
        features: The backbone.
        head: The shared head.
        private: The private head of every client that took part.
    """

    features: nn.Module
    head: nn.Linear
    private: dict[int, nn.Linear]


def plain(exp: Experiment, W: Tensor) -> Plain:
    """Rounds as the paper has them, with three optimizers; ``W`` has its bias as one column more, if it has one."""
    client, options, K = exp.config["client"], exp.config["strategy"], len(exp.program.clients)
    module, C = module_of(exp), len(W)
    now = Plain(module.get_submodule("features"), module.get_submodule("head"), {})  # type: ignore[arg-type]
    dim = now.head.in_features
    fixed = W[:, :dim], W[:, dim] if W.shape[1] > dim else None
    data = [inputs(exp, exp.program.shard(k)) for k in range(K)]
    sizes = [min(client["batch_size"] or len(y), len(y)) or 1 for _, y in data]
    streams = [batches(0, k, len(data[k][1]), sizes[k]) for k in range(K)]
    buffers: dict[int, list[dict[str, Any]]] = {}
    for number in range(1, exp.config["rounds"] + 1):
        local, who = [], cohort(exp, number)
        for k in who:
            (x, y), own = data[k], now.private.setdefault(k, first_private(exp, k))
            parts = [copy.deepcopy(now.features).train(), copy.deepcopy(now.head), own]
            optimizers = three_optimizers(client, parts)
            if client["keep_optimizer"] and k in buffers:
                for optimizer, kept in zip(optimizers, buffers[k], strict=True):
                    optimizer.load_state_dict(kept)
            for _ in range(client["epochs"] * -(-len(y) // sizes[k])):
                rows = next(streams[k])
                h = parts[0](x[rows])
                seen = h.detach()
                for optimizer in optimizers:
                    optimizer.zero_grad()
                F.cross_entropy(F.linear(h, *fixed), y[rows]).backward()  # type: ignore[no-untyped-call]
                optimizers[0].step()  # before the heads: they see the features from before this step
                for i in (1, 2):
                    F.cross_entropy(parts[i](seen), y[rows]).backward()  # type: ignore[no-untyped-call]
                    optimizers[i].step()
            buffers[k] = [optimizer.state_dict() for optimizer in optimizers]
            local.append(parts)
        n = [float(len(data[k][1])) if options["weights"] == "examples" else 1.0 for k in who]
        with torch.no_grad():
            for name, value in now.features.state_dict().items():
                if value.is_floating_point():
                    value.copy_(average([parts[0].state_dict()[name] for parts in local], n))
            if not options["class_weights"]:
                for name, value in now.head.state_dict().items():
                    value.copy_(average([parts[1].state_dict()[name] for parts in local], n))
                continue
            for c in range(C):
                of_class = [float((data[k][1] == c).sum()) for k in who]
                if sum(of_class):
                    now.head.weight[c] = average([parts[1].weight[c] for parts in local], of_class)  # type: ignore
                    now.head.bias[c] = average([parts[1].bias[c] for parts in local], of_class)  # type: ignore
    return now


@dataclass(frozen=True)
class Unfinished(FedLoGe):
    """FedLoGe without its last act."""

    def finalize(self, fed: Federation, state: LoGeState) -> LoGeState:
        return state


def unfinished(settings: dict[str, Any]) -> dict[str, Any]:
    out = copy.deepcopy(settings)
    out["strategy"]["_target_"] = "tests.test_fedloge.Unfinished"
    return out


def flat(*parts: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for part in parts for p in part.parameters()])


def agree(done: Run, expected: Plain, tolerance: float) -> None:
    """The same backbone, shared head and private heads."""
    layout = done.driver.exp.program.layout
    shared = int(layout.slices["private.weight"].start)
    close(done.w[:shared], flat(expected.features, expected.head), tolerance)
    assert done.memory.clients() == sorted(expected.private)
    for k, head in expected.private.items():
        close(done.rows("strategy.private", [k])[0], flat(head), tolerance)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "uniform": ({}, {"weights": "uniform"}),
    "class weights": ({"partition.alpha": 0.1}, {"class_weights": True}),
    "class weights, uniform": ({"partition.alpha": 0.1}, {"class_weights": True, "weights": "uniform"}),
    "fixed bias": ({}, {"sse_bias": True}),
    "adam": ({"client.optimizer": "adam", "client.momentum": 0.0, "client.lr": 0.01}, {}),
    "kept momentum": ({"client.keep_optimizer": True}, {}),
    "weight decay": ({"client.weight_decay": 0.1}, {}),
}


@pytest.mark.parametrize("batching", ["off", 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_three_rounds_by_hand(variant: str, batching: Any, tmp_path: Path) -> None:
    # Check 4 with minibatches and momentum, check 8: psi is the mean by examples, phi lives on, W stays.
    values, options = VARIANTS[variant]
    settings = config({"client.batching": batching, **values}, **options)
    done = drive(unfinished(settings), tmp_path)
    exp = build(settings)
    assert torch.equal(done.state.W, exp.program.strategy.init(exp.info, exp.program.network.initial).W)
    agree(done, plain(exp, done.state.W), 1e-10)
    assert torch.equal(drive(settings, tmp_path).state.W, done.state.W)


@pytest.mark.parametrize("variant", ["uniform", "class weights", "fixed bias"])
def test_variants_differ(variant: str, tmp_path: Path) -> None:
    values, options = VARIANTS[variant]
    one, other = (drive(unfinished(config(values, **given)), tmp_path) for given in (options, {}))
    assert float((one.w - other.w).abs().max()) > 1e-4


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-12), ("float32", 3e-8)])
def test_full_batch_epochs_are_the_official_local_update(precision: str, tolerance: float, tmp_path: Path) -> None:
    # Check 4: five full-batch epochs of one client, and the published tolerance.
    values = {"partition.num_clients": 1, "participation": EVERYBODY, "rounds": 1, "client.epochs": 5}
    settings = config({**values, "precision": precision, "client.batch_size": None, "client.lr": 0.03})
    done = drive(unfinished(settings), tmp_path)
    expected = plain(build(settings), done.state.W)
    assert done.w.dtype == getattr(torch, precision)
    shared = int(done.driver.exp.program.layout.slices["private.weight"].start)
    for found, wanted in (
        (done.w[:shared], flat(expected.features, expected.head)),
        (done.rows("strategy.private")[0], flat(expected.private[0])),
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


class Normed(Classifier):
    """A hidden layer with batch norm."""

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        layers = nn.Flatten(), nn.Linear(math.prod(input_shape), 12), nn.BatchNorm1d(12), nn.ReLU()
        super().__init__(nn.Sequential(*layers), 12, num_classes)


@pytest.mark.parametrize("batching", ["off", 3])
def test_batch_norms_see_every_batch_once_and_their_statistics_are_averaged(batching: Any, tmp_path: Path) -> None:
    # One pass for three classifiers: a second one would move the running statistics twice.
    model = {"_target_": "tests.test_fedloge.Normed", "weights": None}
    values = {"model": model, "participation": EVERYBODY, "rounds": 2, "client.batching": batching}
    settings = config({**values, "partition.alpha": 100.0, "client.batch_size": 16})
    done = drive(unfinished(settings), tmp_path)
    expected = plain(build(settings), done.state.W)
    agree(done, expected, 1e-9)
    norm = expected.features.get_submodule("2")
    assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None and norm.running_var is not None
    buffers = done.driver.fed.buffers
    assert buffers is not None
    close(buffers, torch.cat([norm.running_mean, norm.running_var]), 1e-9)


@dataclass(frozen=True)
class Other(FedLoGe):
    """Head losses with other factors, or another objective altogether."""

    shared: float = 1.0
    own: float = 1.0
    trained: bool = False

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        h, shared, own = model(batch.x)
        if self.trained:  # an ordinary network: the head is trained with the backbone, the others are ignored
            z = h @ model.views["head.weight"].mT + model.views["head.bias"][:, None]
            return local.task_loss(z, batch.y)
        losses = local.task_loss(h @ local.sent.W.mT, batch.y)
        for factor, z in ((self.shared, shared), (self.own, own)):
            if factor:
                losses = losses + factor * local.task_loss(z, batch.y)
        return losses


def other(settings: dict[str, Any], **options: Any) -> dict[str, Any]:
    out = copy.deepcopy(settings)
    out["strategy"] |= {"_target_": "tests.test_fedloge.Other", **options}
    return out


@pytest.mark.parametrize("batching", ["off", 3])
def test_heads_leave_the_backbone_alone_bit_for_bit(batching: Any, tmp_path: Path) -> None:
    # Check 3: a factor on a head's loss is a factor on its rate under SGD; 0 removes the head.
    settings = config({"precision": "float32", "client.batching": batching, "rounds": 2})
    runs = [drive(settings, tmp_path)]
    runs += [drive(other(settings, shared=a, own=b), tmp_path) for a, b in ((1.0, 1.0), (3.0, 0.25), (0.0, 0.0))]
    layout = runs[0].driver.exp.program.layout
    end = int(layout.slices["head.weight"].start)
    assert all(torch.equal(run.w[:end], runs[0].w[:end]) for run in runs)
    assert float((runs[0].w[:end] - build(settings).program.network.initial[:end]).abs().max()) > 1e-3
    assert torch.equal(runs[1].w, runs[0].w)
    for run in runs[2:]:
        assert not torch.equal(run.state.psi, runs[0].state.psi)
        assert not torch.equal(run.rows("strategy.private"), runs[0].rows("strategy.private"))
    assert all(torch.equal(run.state.W, runs[0].state.W) for run in runs)


def test_a_trained_head_and_nothing_else_is_fedavg(tmp_path: Path) -> None:
    # Check 7.
    values = {"model.hidden": [12], "precision": "float64", "client.epochs": 2}
    avg = drive(configure(("strategy=fedavg",), values), tmp_path)
    settings = other(config(values), trained=True)
    found = drive(settings, tmp_path)
    shared = avg.driver.exp.program.layout
    views = {**found.driver.exp.program.layout.views(found.w), "head.weight": found.state.psi[:, :-1]}
    for name, value in shared.views(avg.w).items():
        close(views[name], value)


def test_one_client_is_ordinary_training_against_a_fixed_classifier(tmp_path: Path) -> None:
    # Check 7: the momentum starts at 0 in every round.
    values = {"partition.num_clients": 1, "participation": EVERYBODY, "client.epochs": 2, "rounds": 3}
    settings = config({**values, "client.momentum": 0.5})
    done = drive(settings, tmp_path)
    exp = build(settings)
    (x, y), features = inputs(exp, exp.program.shard(0)), module_of(exp).get_submodule("features")
    stream = batches(0, 0, len(y), 64)
    for _ in range(3):
        optimizer = torch.optim.SGD(features.parameters(), lr=0.05, momentum=0.5)
        for _ in range(2 * -(-len(y) // 64)):
            rows = next(stream)
            optimizer.zero_grad()
            F.cross_entropy(features(x[rows]) @ done.state.W.T, y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    expected = flat(features)
    close(done.w[: len(expected)], expected)


def test_a_recipes_loss_is_that_of_all_three_classifiers(tmp_path: Path) -> None:
    # Twice the loss is twice the rate; a loss that asks the network for other inputs gets their scores.
    settings = config({"client.lr": 0.05})
    settings["recipe"] = {"steeper": {"_target_": "tests.helpers.Steeper", "factor": 2.0}}
    again = copy.deepcopy(settings)
    again["recipe"] = {"again": {"_target_": "tests.test_fedloge.Again"}}
    fast = drive(config({"client.lr": 0.1}), tmp_path)
    for found in (drive(settings, tmp_path), drive(again, tmp_path)):
        close(found.w, fast.w)
        close(found.rows("strategy.private"), fast.rows("strategy.private"))


@dataclass(frozen=True)
class Again(ClientHalf):
    """A recipe whose loss is computed twice, the second time on a copy of the inputs."""

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        return local.loss(model, batch) + local.task_loss(model(batch.x.clone()), batch.y)


# --- private heads ----------------------------------------------------------------------------------------


def test_first_private_heads_are_drawn_as_linear_layers_are_each_its_own() -> None:
    # Uniform within 1 / sqrt(dim), weights and biases alike.
    exp = build(config({"partition.num_clients": 40}))
    heads = torch.stack([flat(first_private(exp, k)) for k in range(40)])
    assert heads.shape == (40, 10 * 12 + 10)
    assert float(heads.abs().max()) <= 12**-0.5
    assert float(heads.mean()) == pytest.approx(0, abs=0.01)
    assert float(heads.std()) == pytest.approx((1 / 36) ** 0.5, rel=0.02)
    assert len({tuple(row.tolist()) for row in heads}) == 40
    assert torch.equal(heads[3], flat(first_private(exp, 3)))


def test_private_heads_never_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Check 8: nothing of them is among the entries or in the server's state; who takes no part keeps its own.
    finish, entries = Bound.finish, list[dict[str, Entry]]()

    def spy(self: Bound, w: Tensor) -> dict[str, Entry]:
        entries.append(finish(self, w))
        return entries[-1]

    monkeypatch.setattr(Bound, "finish", spy)
    values = {"participation": TWO, "rounds": 4}
    settings = config({**values, "tracker.recorder.kill_at": None})
    done = drive(settings, tmp_path)
    start = int(done.driver.exp.program.layout.slices["private.weight"].start)
    assert len(entries) == 8
    for sent in entries:
        assert sent.keys() == {"delta"}
        assert not sent["delta"].value[:, start:].any()
        assert bool(sent["delta"].value[:, :start].any())
        assert sent["delta"].weight is None
    assert torch.equal(done.w[start:], build(settings).program.network.initial[start:])
    before = drive(config({**values, "rounds": 3}), tmp_path)
    last, exp = cohort(build(settings), 4), build(settings)
    for k in before.memory.clients():
        old, new = (run.rows("strategy.private", [k]) for run in (before, done))
        assert torch.equal(old, new) == (k not in last)
    assert set(done.memory.clients()) == {k for r in range(1, 5) for k in cohort(exp, r)}


@pytest.mark.parametrize("sse_bias", [False, True])
@pytest.mark.parametrize("class_weights", [False, True])
def test_bytes(sse_bias: bool, class_weights: bool, tmp_path: Path) -> None:
    # Backbone 64 x 12 + 12 and head 10 x 12 + 10 both ways; the fixed classifier in a client's first round.
    settings = config({"participation": TWO, "rounds": 5}, sse_bias=sse_bias, class_weights=class_weights)
    done, shared = drive(settings, tmp_path), 64 * 12 + 12 + 10 * 12 + 10
    visitors = len({k for r in range(1, 6) for k in cohort(build(settings), r)})
    assert 2 < visitors < 10
    totals = done.driver.progress.totals
    assert totals["bytes_up"] == 4 * shared * 10
    assert totals["bytes_down"] == 4 * shared * 10 + 4 * 10 * (12 + sse_bias) * visitors


# --- realignment and prediction ---------------------------------------------------------------------------


class Direct(Classifier):
    """Features that are the inputs."""

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        super().__init__(nn.Sequential(nn.Flatten()), math.prod(input_shape), num_classes)


@dataclass(frozen=True)
class Uneven:
    """Points of four classes in six dimensions: clients with 9 examples of classes 0 and 1, none, one, and all."""

    def load(self, seed: int) -> Dataset:
        y = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0, 3, 2, 1, 3, 2, 0])
        x = torch.randn(15, 6, generator=generator(4), dtype=torch.float64) + F.one_hot(y, 6)
        rows = [torch.arange(9), torch.arange(0), torch.tensor([9]), torch.arange(5, 15)]
        shards = tuple(Shard(x, y, row) for row in rows)
        return Dataset("uneven", Split(x, y), Split(x, y), ("a", "b", "c", "d"), clients=FixedClients(shards))


UNEVEN: dict[str, Any] = {
    "data": {"_target_": "tests.test_fedloge.Uneven", "augment": [], "validation": 0.0},
    "model.hidden": [5],
    "participation": EVERYBODY,
    "client.batch_size": 4,
}
DIRECT = {**UNEVEN, "model": {"_target_": "tests.test_fedloge.Direct", "weights": None}}
C, DIM = 4, 6


@dataclass
class Heads:
    """Random heads for four classes of six features."""

    psi: Tensor
    b: Tensor
    phi: Tensor
    a: Tensor
    W: Tensor
    x: Tensor

    @classmethod
    def drawn(cls, seed: int = 0) -> Heads:
        g = generator(seed)
        shapes = (C, DIM), (C,), (C, DIM), (C,), (C, DIM), (400, DIM)
        return cls(*(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes))

    @property
    def aligned(self) -> Tensor:
        """The shared head with the private one's row norms."""
        return torch.stack([p * f.square().sum().sqrt() for p, f in zip(self.psi, self.phi, strict=True)])


def predicted(
    heads: Heads, mode: str, client: int = 3, final: bool = True, x: Tensor | None = None, **options: Any
) -> Tensor:
    """Scores under the model whose features are the inputs."""
    exp = build(config(DIRECT, **options))
    layout, strategy = exp.program.layout, exp.program.strategy
    w = exp.program.network.initial.clone()
    views = layout.views(w)
    views["head.weight"].copy_(heads.psi)
    views["head.bias"].copy_(heads.b)
    state = LoGeState(w, heads.W)
    if final:
        state = strategy.finalize(SimpleNamespace(layout=layout), state)  # type: ignore[arg-type]
    sent = {name: getattr(value, "value", value) for name, value in strategy.broadcast(state).items()}
    row = torch.cat([heads.phi.flatten(), heads.a])
    local = local_of(exp, client, {"strategy.private": row}, **sent)
    local.mode = mode
    x = heads.x if x is None else x
    batch = Batch(x=x[None], y=torch.zeros(1, len(x), dtype=torch.int64), index=torch.arange(len(x))[None], weight=None)
    with torch.no_grad():
        return strategy.predict(Point(exp.program.network, local.start), batch, local)[0]


def finalized(heads: Heads, **options: Any) -> tuple[LoGeState, dict[str, Tensor], FedLoGe, Any]:
    """The state after the last act, its parameters by name, and what made it."""
    exp = build(config(DIRECT, **options))
    fed, strategy = SimpleNamespace(layout=exp.program.layout), exp.program.strategy
    assert isinstance(strategy, FedLoGe)
    w = exp.program.network.initial.clone()
    views = exp.program.layout.views(w)
    views["head.weight"].copy_(heads.psi)
    views["head.bias"].copy_(heads.b)
    state = strategy.finalize(fed, LoGeState(w, heads.W))  # type: ignore[arg-type]
    return state, exp.program.layout.views(state.w), strategy, fed


@pytest.mark.parametrize("scale", [1.7, 1.0, 0.25])
def test_realigned_rows_of_the_generic_head_have_one_length(scale: float) -> None:
    # Check 5: norms equal the scale, directions stay, a second time changes nothing; the bias stays, or goes.
    heads = Heads.drawn()
    state, views, strategy, fed = finalized(heads, scale=scale)
    close(views["head.weight"].norm(dim=1), torch.full((C,), scale, dtype=torch.float64))
    close(F.cosine_similarity(views["head.weight"], heads.psi), torch.ones(C, dtype=torch.float64))
    assert torch.equal(views["head.bias"], heads.b)
    assert torch.equal(state.W, heads.W)
    assert state.psi is not None
    assert torch.equal(state.psi, torch.cat([heads.psi, heads.b[:, None]], 1))  # what clients need
    again = strategy.finalize(fed, state)
    close(again.w, state.w, 1e-15)
    without = finalized(heads, scale=scale, keep_bias=False)[1]
    assert torch.equal(without["head.weight"], views["head.weight"]) and not without["head.bias"].any()


def test_a_row_of_zeros_stays_what_it_is() -> None:
    heads = Heads.drawn()
    heads.psi[2] = 0
    _, views, _, _ = finalized(heads)
    assert not views["head.weight"][2].any() and bool(views["head.weight"].isfinite().all())


def test_the_scale_matters_to_the_generic_model_only_with_a_bias() -> None:
    # Check 5, of the arg-max; and the scores in full.
    heads = Heads.drawn(1)
    unit = torch.stack([row / row.square().sum().sqrt() for row in heads.psi])
    found = {}
    for keep in (True, False):
        for scale in (0.2, 1.7, 20.0):
            scores = predicted(heads, "global", scale=scale, keep_bias=keep)
            close(scores, scale * heads.x @ unit.T + (heads.b if keep else 0))
            found[keep, scale] = scores.argmax(1)
    assert torch.equal(found[False, 0.2], found[False, 1.7]) and torch.equal(found[False, 20.0], found[False, 1.7])
    assert not torch.equal(found[True, 0.2], found[True, 1.7]) and not torch.equal(found[True, 20.0], found[True, 1.7])


@pytest.mark.parametrize("sse_bias", [False, True])
def test_before_the_last_act_the_fixed_classifier_is_the_generic_model(sse_bias: bool) -> None:
    heads = Heads.drawn()
    expected = heads.x @ heads.W.T
    if sse_bias:
        heads.W = torch.cat([heads.W, heads.a[:, None]], 1)
        expected = expected + heads.a
    close(predicted(heads, "global", final=False), expected)


def test_before_the_last_act_a_client_adds_its_own_head_to_the_shared_one() -> None:
    heads = Heads.drawn()
    expected = heads.x @ heads.phi.T + heads.a + heads.x @ heads.psi.T + heads.b
    for rule in fedloge.RULES:
        close(predicted(heads, "personal", final=False, rule=rule), expected)


def test_the_realigned_head_has_the_shared_directions_and_the_products_of_the_norms() -> None:
    # Check 6, on the unit vectors, which show the head itself. The shared head is not normalised first.
    heads = Heads.drawn(2)
    head = predicted(heads, "personal", x=torch.eye(DIM, dtype=torch.float64), rule="realigned").T
    close(head.norm(dim=1), heads.psi.norm(dim=1) * heads.phi.norm(dim=1))
    close(F.cosine_similarity(head, heads.psi), torch.ones(C, dtype=torch.float64))


def test_equal_private_norms_predict_as_the_shared_head_without_its_bias() -> None:
    # Check 6.
    heads = Heads.drawn(3)
    unequal = predicted(heads, "personal", rule="realigned").argmax(1)
    heads.phi = 2.5 * F.normalize(heads.phi)
    found = predicted(heads, "personal", rule="realigned").argmax(1)
    assert torch.equal(found, (heads.x @ heads.psi.T).argmax(1))
    assert not torch.equal(found, unequal)


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"keep_bias": False}])
def test_rules(options: dict[str, Any]) -> None:
    # The bias b of the shared head belongs to one rule alone; what is done to the generic model matters to none.
    heads = Heads.drawn(4)
    aligned, x = heads.aligned, heads.x
    expected = {
        "realigned": x @ aligned.T,
        "realigned+local": (x @ heads.phi.T + heads.a) + (x @ aligned.T + heads.b),
        "realigned+global": x @ aligned.T + x @ heads.psi.T,
    }
    assert expected.keys() == set(fedloge.RULES)
    for rule, scores in expected.items():
        close(predicted(heads, "personal", rule=rule, **options), scores)


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize(("client", "absent"), [(0, [2, 3]), (1, []), (2, [0, 1, 2]), (3, [])])
def test_classes_that_a_client_does_not_train_on_are_never_predicted(
    client: int, absent: list[int], final: bool
) -> None:
    # Features of both signs, where a product with 0 would let an absent class win; without examples all are left in.
    heads = Heads.drawn(5)
    heads.b = heads.b - 10  # all scores are negative
    masked, free = (predicted(heads, "personal", client, final, mask=mask) for mask in (True, False))
    present = [c for c in range(C) if c not in absent]
    assert torch.equal(masked[:, present], free[:, present])
    assert bool((masked[:, absent] == -math.inf).all())
    assert bool(free.isfinite().all())
    assert {*masked.argmax(1).tolist()} <= set(present)
    assert not absent or not {*free.argmax(1).tolist()} <= set(present)
    everything = predicted(heads, "global", client, final)
    assert bool(everything.isfinite().all())


@pytest.mark.parametrize("rule", fedloge.RULES)
@pytest.mark.parametrize("mask", [True, False])
def test_a_run_scores_realigned_heads_of_all_clients(rule: str, mask: bool, tmp_path: Path) -> None:
    # Two of seven clients per round, so that some never took part: those have the head that they would begin with.
    settings = config(
        {"participation": TWO, "rounds": 2, "eval.clients": "all", "partition.alpha": 0.1}, rule=rule, mask=mask
    )
    done, exp = drive(settings, tmp_path), build(settings)
    model = plain(exp, done.state.W)
    assert len(model.private) < 7
    model.features.eval()
    psi, b = model.head.weight.detach(), model.head.bias.detach()
    x, y = inputs(
        exp, Shard(exp.program.dataset.test.x, exp.program.dataset.test.y, torch.arange(len(exp.program.dataset.test)))
    )
    with torch.no_grad():
        generic = model.features(x) @ (1.7 * psi / psi.norm(dim=1, keepdim=True)).T + b
        fixed = model.features(x) @ done.state.W.T
    (record,) = [r for r in done.records if "test_accuracy" in r]
    final = done.result.summary["final"]
    assert final["test_accuracy"] == pytest.approx(float((generic.argmax(1) == y).double().mean()), abs=1e-12)
    assert record["test_accuracy"] == pytest.approx(float((fixed.argmax(1) == y).double().mean()), abs=1e-12)
    found, before = list[float](), list[float]()
    for k in range(7):
        (x, y), own = inputs(exp, exp.program.shard(k, "heldout")), model.private.get(k, first_private(exp, k))
        with torch.no_grad():
            h = model.features(x)
            local, shared = h @ own.weight.T + own.bias, h @ psi.T
            realigned = h @ (psi * own.weight.norm(dim=1, keepdim=True)).T
        scores = {
            "realigned": realigned,
            "realigned+local": local + realigned + b,
            "realigned+global": realigned + shared,
        }[rule]
        absent = torch.bincount(exp.program.shard(k).y[exp.program.shard(k).rows], minlength=10) == 0
        for into, z in ((found, scores), (before, local + shared + b)):
            if mask:
                z[:, absent] = -math.inf
            if len(y):
                into.append(float((z.argmax(1) == y).double().mean()))
    assert final["personal_accuracy_mean"] == pytest.approx(sum(found) / len(found), abs=1e-12)
    assert record["personal_accuracy_mean"] == pytest.approx(sum(before) / len(before), abs=1e-12)


def scored(settings: dict[str, Any], tmp_path: Path) -> list[tuple[float, list[list[int]]]]:
    """Loss and confusion of every client's own model at the end of a run."""
    done = drive(settings, tmp_path)
    return [(s.loss, s.confusion.tolist()) for s in done.driver._scores["personal"]]


@pytest.mark.parametrize("options", [{"rule": rule} for rule in fedloge.RULES] + [{"sse_bias": True, "mask": True}])
def test_personal_models_are_scored_together_as_alone(options: dict[str, Any], tmp_path: Path) -> None:
    values = {"participation": TWO, "rounds": 2, "eval.clients": "all"}
    options = {"mask": False, **options}
    one, many = (scored(config({**values, "client.batching": n}, **options), tmp_path) for n in ("off", 3))
    assert len(one) == 7
    for (loss, table), (other_loss, other_table) in zip(one, many, strict=True):
        assert other_loss == pytest.approx(loss, abs=1e-9)
        assert table == other_table


@pytest.mark.parametrize("batching", ["off", 3])
@pytest.mark.parametrize("class_weights", [False, True])
def test_unequal_clients_and_one_without_examples(batching: Any, class_weights: bool, tmp_path: Path) -> None:
    values = {**UNEVEN, "client.batching": batching, "client.epochs": 2, "eval.clients": "all", "eval.every": 1}
    settings = config(values, class_weights=class_weights)
    done = drive(unfinished(settings), tmp_path)
    agree(done, plain(build(settings), done.state.W), 1e-10)
    close(done.rows("strategy.private", [1])[0], flat(first_private(build(settings), 1)))
    last = drive(settings, tmp_path)
    assert bool(last.w.isfinite().all())
    assert 0 <= last.result.summary["final"]["personal_accuracy_mean"] <= 1


def test_a_class_that_nobody_has_keeps_its_row_of_the_shared_head(tmp_path: Path) -> None:
    # class_weights, and a cohort without classes 2 and 3 (client 0 alone).
    values = {**UNEVEN, "participation": {"_target_": "tests.test_fedloge.First"}, "rounds": 1}
    settings = unfinished(config(values, class_weights=True))
    done, exp = drive(settings, tmp_path), build(settings)
    old, new = (exp.program.layout.views(w) for w in (exp.program.network.initial, done.w))
    for name in ("head.weight", "head.bias"):
        assert torch.equal(old[name][2:], new[name][2:])
        assert bool((old[name][:2] != new[name][:2]).all())


@dataclass(frozen=True)
class First:
    """Client 0 alone takes part."""

    def check(self, num_clients: int) -> None: ...

    def sample(self, num_clients: int, rng: Any) -> list[int]:
        return [0]


# --- resuming ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{}, {"checkpoint.memory": "disk", "client.batching": 3}])
def test_a_killed_run_resumes_with_all_that_options_carry(values: dict[str, Any], tmp_path: Path) -> None:
    # The fixed classifier's bias is state, kept momentum is memory.
    options = {"sse_bias": True, "class_weights": True, "rule": "realigned+global"}
    given = {"client.keep_optimizer": True, "precision": "float32", "eval.clients": "all", **values}
    whole = drive(config(given, **options), tmp_path / "whole")
    stopped = {**given, "checkpoint.every": 1, "tracker.recorder.kill_at": 2}
    with pytest.raises(Interrupted):
        drive(config(stopped, **options), tmp_path / "killed")
    (found,) = (p.parent for p in (tmp_path / "killed").rglob("config.yaml"))
    resumed = drive(config({**stopped, "tracker.recorder.kill_at": None}, **options), tmp_path, resume=found)
    assert resumed.state_sha256 == whole.state_sha256
    assert resumed.params_sha256 == whole.params_sha256
    assert resumed.result.summary["final"] == whole.result.summary["final"]
    assert whole.state.psi.dtype == whole.state.W.dtype == whole.rows("strategy.private").dtype == torch.float32


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("beta", 1.0, r"in \[0, 1\), got 1"),
        ("beta", -0.1, r"in \[0, 1\), got -0.1"),
        ("beta", math.nan, "finite"),
        ("tau", 0.0, "> 0, got 0"),
        ("sse_steps", -1, ">= 0, got -1"),
        ("sse_steps", 2.5, "a whole number"),
        ("sse_bias", 1, "true or false"),
        ("scale", 0.0, "> 0, got 0"),
        ("scale", -1.7, "> 0, got -1.7"),
        ("keep_bias", "no", "true or false"),
        ("rule", "local", r"realigned or realigned\+local or realigned\+global, got 'local'"),
        ("mask", None, "true or false"),
        ("class_weights", 1, "true or false"),
        ("weights", "equal", "examples or uniform"),
    ],
)
def test_impossible_options_are_refused(key: str, value: Any, needed: str) -> None:
    with pytest.raises(ConfigError, match=rf"strategy\.{key} must be {needed}"):
        build(config(**{key: value}))


def test_so_many_zeros_that_a_class_has_none_left_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"strategy\.beta must be smaller: a class keeps none of its 12 weights, got 0.9"
    ):
        sse_c(10, 12, 0.95, 0.1, 0, generator())
    exp = build(config(beta=0.95))
    with pytest.raises(ConfigError, match=r"strategy\.beta"):
        exp.program.strategy.init(exp.info, exp.program.network.initial)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model.hidden": [9]}, "fedloge places 10 classes at equal angles.*the model has 9: choose a wider one"),
        (
            {"model": {"_target_": "tests.helpers.Tupled", "weights": None}},
            r"fedloge needs a model that computes head\(features\(x\)\) with a linear head; Tupled does not",
        ),
        ({"client.clip_norm": 1.0}, "client.clip_norm=1 would let the two heads.*set client.clip_norm=null"),
    ],
)
def test_what_the_method_cannot_work_with_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        build(config(values))
    assert "\n" not in str(found.value)


def test_data_without_classes_are_refused() -> None:
    layout = Layout({"head.weight": torch.Size([3, 8])})
    with pytest.raises(ConfigError, match="fedloge needs data with classes"):
        FedLoGe(sse_steps=0).init(Info(3, 0, layout, 0, 1, 0.1), torch.zeros(24))


def test_as_many_features_as_classes_are_enough(tmp_path: Path) -> None:
    done = drive(config({"model.hidden": [10], "rounds": 1}, beta=0.3), tmp_path)
    assert done.state.W.shape == (10, 10)
