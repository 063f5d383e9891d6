"""FedD2S (reconstruction): the method a second time in plain PyTorch, closed forms, bytes, and blocks of models."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import Tensor, nn

from fedsim import random
from fedsim.compose import compose
from fedsim.config import Config, options
from fedsim.data import Dataset, Shard, Split
from fedsim.errors import ConfigError
from fedsim.experiment import build
from fedsim.models.standard import Classifier
from fedsim.network import Network
from fedsim.parts import Blocks, blocks_of, head_of, norms_of, redraw, tail_of
from fedsim.reduce import Reduced
from fedsim.strategies import fedd2s
from fedsim.strategies.fedd2s import D2SState, FedD2S, class_means, kl, pooled, restored
from fedsim.strategy import ClientHalf, Model
from fedsim.vector import Layout
from tests.cli import Fedsim
from tests.helpers import FixedClients, Run, batches, configure, drive, local_of, module_of

ALL = {"_target_": "fedsim.clients.participation.All"}
FOUR = {"_target_": "fedsim.clients.participation.Fixed", "clients_per_round": 4}
SIZES = [7, 0, 11, 4, 6, 5]  # one client has nothing
CLASSES, DIM = 4, 5


@dataclass(frozen=True)
class Toy:
    """Clients of unequal sizes, some without examples or classes; labels follow from the inputs.

    Attributes:
        sizes: Examples of every client.
        shape: Of one input.
        classes: Number of classes.
        changed: A client whose labels are others.
        regression: Targets are numbers.
        each: Every client has its classes in order, an example of each.
    """

    sizes: Sequence[int] = tuple(SIZES)
    shape: Sequence[int] = (DIM,)
    classes: int = CLASSES
    changed: int = -1
    regression: bool = False
    each: bool = False

    def load(self, seed: int) -> Dataset:
        g, n = torch.Generator().manual_seed(5), sum(self.sizes)
        owner = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))
        y = torch.arange(n) % self.classes
        if not self.each:  # client k lacks class k mod the number of classes
            y = torch.randint(self.classes - 1, (n,), generator=g)
            y = y + (y >= owner % self.classes).long()
        x = torch.randn(self.classes, *self.shape, generator=g)[y] + torch.randn(n, *self.shape, generator=g)
        y = torch.where(owner == self.changed, (y + 1) % self.classes, y)
        split = Split(x, y.float() if self.regression else y)
        shards = tuple(Shard(split.x, split.y, (owner == k).nonzero()[:, 0]) for k in range(len(self.sizes)))
        names = () if self.regression else tuple(map(str, range(self.classes)))
        return Dataset("toy", split, split, names, clients=FixedClients(shards))


def toy(values: Mapping[str, Any] | None = None, data: Mapping[str, Any] | None = None, **strategy: Any) -> Config:
    """A run on `Toy` with a network of three blocks; keywords are the method's options."""
    name = strategy.pop("name", "fedd2s")
    own = {"stage_rounds": 2, "server_epochs": 2, "server_batch_size": 5, "lam_l": 0.7} if name == "fedd2s" else {}
    base: dict[str, Any] = {
        "data": {"_target_": "tests.test_fedd2s.Toy", "augment": [], "validation": 0.0, **(data or {})},
        "model.hidden": [6, 4],
        "participation": FOUR,
        "precision": "float64",
        "client.epochs": 2,
        "client.batch_size": 3,
        "rounds": 5,
    }
    return configure(
        (f"strategy={name}",),
        {**base, **{f"strategy.{k}": v for k, v in {**own, **strategy}.items()}, **(values or {})},
    )


# --- the method a second time -----------------------------------------------------------------------------

Params = list[tuple[Tensor, Tensor]]  # weight and bias of the blocks of an MLP


def split(layout: Layout, w: Tensor) -> Params:
    views = [v.clone() for v in layout.views(w).values()]
    return [(views[i], views[i + 1]) for i in range(0, len(views), 2)]


def outputs(params: Params, x: Tensor) -> list[Tensor]:
    """The blocks of an MLP one after the other: affine and ReLU, but for the last."""
    out = []
    for i, (w, b) in enumerate(params):
        x = x @ w.T + b
        x = x.clamp(min=0) if i + 1 < len(params) else x
        out.append(x)
    return out


def divergence(p: Tensor, z: Tensor, T: float) -> Tensor:
    return T**2 * (torch.xlogy(p, p) - p * torch.log(torch.exp(z / T) / torch.exp(z / T).sum(-1, keepdim=True))).sum(-1)


class Reference:
    """FedD2S over lists and dicts of clients, one sample's soft label at a time.

    Args:
        run: Whose initial parameters, options, data and cohorts are used.
        rounds: How many.
    """

    def __init__(self, run: Run, rounds: int) -> None:
        torch.set_num_threads(1)
        self.exp, self.o = run.driver.exp, cast("FedD2S", run.driver.strategy)
        program = self.exp.program
        self.client, self.layout, self.seed = program.options, program.layout, program.seed
        shards = [program.shard(k) for k in range(len(program.clients))]
        self.data = [(s.x[s.rows].to(program.dtype), s.y[s.rows]) for s in shards]
        own = self.o.initial == "own"
        starts = [program.drawn("initial", k) if own else program.network.initial for k in range(len(shards))]
        self.models = [split(self.layout, w) for w in starts]
        self.streams: dict[tuple[str, int], Any] = {}
        self.optimizers: dict[tuple[str, int], torch.optim.Optimizer] = {}
        self.soft: dict[int, list[Tensor | None]] = {}
        self.table: dict[int, Tensor] = {}
        self.heads: dict[int, Params] = {}
        self.adam: dict[int, torch.optim.Adam] = {}
        self.floats_up: list[int] = []
        for t in range(rounds):
            self.round(t)

    def round(self, t: int) -> None:
        o, L = self.o, 3
        dropping = list(o.dropping or range(L - 1, 0, -1))
        stage = min(t // o.stage_rounds, len(dropping) - 1)
        stopped = t // o.stage_rounds >= len(dropping) and o.after == "stop"
        ell, lam = dropping[stage], o.lam_l * min(1.0, (t - stage * o.stage_rounds + 1) / (o.ramp + 1))
        who = self.exp.participation.sample(
            len(self.data), random.numpy_generator(self.seed, "participation", t + 1, 0)
        )
        pipelined = o.timing == "pipelined" and not stopped and (o.path != "head" or ell in self.heads)
        for k in who:
            self.train(k, ell, lam, "train", pipelined)
        if stopped:
            self.floats_up.append(0)
            return
        active = dropping if o.heads == "all" else [ell]
        sent = [item for k in who for item in self.extract(k, active)]
        self.floats_up.append(
            sum(sum(h.numel() for h in hs) + len(q) + 1 + (o.granularity == "class") for _, hs, q, _, _ in sent)
        )
        self.adam = {d: a for d, a in self.adam.items() if d in active}
        for d in active:
            self.fit(t, d, [item[1][active.index(d)] for item in sent], sent)
        for k in who:
            self.soft[k] = [None] * len(self.data[k][1])
        sums: dict[int, Tensor] = {}
        counts: dict[int, int] = {}
        for where, hs, _, c, n in sent:
            p = torch.softmax(outputs(self.heads[ell], hs[active.index(ell)])[-1].detach() / o.temperature, -1)
            for k, i in where:
                self.soft[k][i] = p
            sums[c], counts[c] = sums.get(c, torch.zeros_like(p)) + n * p, counts.get(c, 0) + n
        self.table.update({c: sums[c] / counts[c] for c in sums})
        if o.timing == "in_round":
            for k in who:
                self.train(k, ell, lam, "distil", True)

    def teacher(self, k: int, i: int) -> Tensor | None:
        y = int(self.data[k][1][i])
        if self.o.teacher == "class" or k not in self.soft:
            return self.table.get(y)
        return self.soft[k][i]

    def train(self, k: int, ell: int, lam: float, stream: str, distils: bool) -> None:
        """Epochs of a client; ``ell`` is the active block."""
        (x, y), options_ = self.data[k], self.client
        if not len(y):
            return
        flat = [p.requires_grad_() for pair in self.models[k] for p in pair]
        size = cast("int", options_.batch_size)
        order = self.streams.setdefault((stream, k), batches(self.seed, k, len(y), size, stream))
        if (stream, k) not in self.optimizers or not options_.keep_optimizer:
            adam = type(options_.optimizer).__name__ == "Adam"
            momentum = getattr(options_.optimizer, "momentum", 0.0)
            lr = options_.lr
            self.optimizers[stream, k] = (
                torch.optim.Adam(flat, lr=lr) if adam else torch.optim.SGD(flat, lr=lr, momentum=momentum)
            )
        for _ in range(cast("int", options_.epochs) * -(-len(y) // size)):
            rows = next(order)
            out = outputs(self.models[k], x[rows])
            loss = F.cross_entropy(out[-1], y[rows])
            extra = torch.zeros((), dtype=x.dtype)
            if distils:
                deep = [(w.detach(), b.detach()) for w, b in self.models[k][ell:]]
                known = [(j, p) for j, i in enumerate(rows.tolist()) if (p := self.teacher(k, i)) is not None]
                if known:
                    at, q = torch.tensor([j for j, _ in known]), torch.stack([p for _, p in known])
                    extra = self.extra(q, out[-1][at], out[ell - 1][at], y[rows][at], deep, ell)
            self.optimizers[stream, k].zero_grad()
            (loss + lam * extra / len(rows)).backward()  # type: ignore[no-untyped-call]
            self.optimizers[stream, k].step()

    def extra(self, q: Tensor, z: Tensor, h: Tensor, y: Tensor, deep: Params, ell: int) -> Tensor:
        """What soft labels add to the loss, summed over samples."""
        T = self.o.temperature
        if self.o.path == "full":
            return divergence(q, z, T).sum()
        if self.o.path == "masked":  # the same, with the deep parameters detached
            return divergence(q, outputs(deep, h)[-1], T).sum()
        z = outputs([(w.detach(), b.detach()) for w, b in self.heads[ell]], h)[-1]
        return F.cross_entropy(z, y, reduction="sum") + divergence(q, z, T).sum()

    def extract(self, k: int, depths: Sequence[int]) -> list[Any]:
        """What a client sends: whose samples each tuple is of, representations, soft label, class, how many."""
        (x, y), o = self.data[k], self.o
        if not len(y):
            return []
        out = [h.detach() for h in outputs(self.models[k], x)]
        hs, q = [out[d - 1] for d in depths], torch.softmax(out[-1] / o.temperature, -1)
        if o.granularity == "class":
            found = []
            for c in sorted(set(y.tolist())):
                of = [i for i in range(len(y)) if int(y[i]) == c]
                found.append(([(k, i) for i in of], [h[of].mean(0) for h in hs], q[of].mean(0), c, len(of)))
            return found
        seen: dict[int, int] = {}
        found = []
        for i, c in enumerate(y.tolist()):
            seen[c] = seen.get(c, 0) + 1
            if o.max_per_class is None or seen[c] <= o.max_per_class:
                found.append(([(k, i)], [h[i] for h in hs], q[i], c, 1))
        return found

    def fit(self, t: int, d: int, hs: Sequence[Tensor], sent: Sequence[Any]) -> None:
        o = self.o
        if d not in self.heads:
            tail = self.exp.program.tail(d)
            self.heads[d] = split(tail.layout, tail.initial)
        flat = [p.requires_grad_() for pair in self.heads[d] for p in pair]
        adam = self.adam.setdefault(d, torch.optim.Adam(flat, lr=o.server_lr))
        h, q = torch.stack([*hs]), torch.stack([item[2] for item in sent])
        y = torch.tensor([item[3] for item in sent])
        for epoch in range(o.server_epochs):
            order = torch.randperm(len(y), generator=random.generator(self.seed, "head", "server", t + 1, d, epoch))
            for rows in torch.split(order, o.server_batch_size):
                z = outputs(self.heads[d], h[rows])[-1]
                adam.zero_grad()
                (F.cross_entropy(z, y[rows]) + o.lam_g * divergence(q[rows], z, o.temperature).mean()).backward()  # type: ignore[no-untyped-call]
                adam.step()


def joined(params: Params) -> Tensor:
    return torch.cat([t.detach().flatten() for pair in params for t in pair])


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "head": {"path": "head"},
    "masked": {"path": "masked"},
    "class": {"granularity": "class"},
    "capped": {"max_per_class": 1},
    "capped_head": {"max_per_class": 1, "path": "head"},
    "in_round": {"timing": "in_round"},
    "in_round_head": {"timing": "in_round", "path": "head"},
    "teacher": {"teacher": "class"},
    "all_heads": {"heads": "all"},
    "all_heads_head": {"heads": "all", "path": "head"},
    "stop": {"stage_rounds": 1, "after": "stop"},
    "hold": {"stage_rounds": 1},
    "dropping": {"dropping": [1]},
    "ramp": {"ramp": 2, "stage_rounds": 3},
    "own": {"initial": "own"},
    "temperature": {"temperature": 1.5},
    "lam_g": {"lam_g": 0.0},
    "lam_l": {"lam_l": 2.0},
    "server": {"server_epochs": 3, "server_lr": 0.02, "server_batch_size": 3},
    "class_masked_in_round": {"granularity": "class", "path": "masked", "timing": "in_round"},
}


def same_as_reference(run: Run, rounds: int, atol: float = 1e-10) -> None:
    expected, state = Reference(run, rounds), run.state
    layout = run.driver.exp.program.layout
    for k, w in zip(run.memory.clients(), run.rows("strategy.w"), strict=True):
        torch.testing.assert_close(w, joined(expected.models[k]), rtol=0, atol=atol)
        assert w.shape == (layout.d,)
    assert state.heads.keys() == expected.heads.keys() and state.soft.keys() == expected.soft.keys()
    for d, theta in expected.heads.items():
        torch.testing.assert_close(state.heads[d], joined(theta), rtol=0, atol=atol)
    for c, row in enumerate(state.table):
        torch.testing.assert_close(row, expected.table.get(c, torch.zeros_like(row)), rtol=0, atol=atol)
    assert [r["bytes_up"] for r in run.records] == [4 * n for n in expected.floats_up]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Five rounds with some options, made once."""
    return functools.cache(lambda name: drive(toy(**OPTIONS[name]), tmp_path_factory.mktemp("ran")))


@pytest.mark.parametrize("name", OPTIONS)
def test_five_rounds_with_four_of_six_clients_by_hand(name: str, ran: Callable[[str], Run]) -> None:
    same_as_reference(ran(name), 5)


def test_every_option_changes_personal_models(ran: Callable[[str], Run]) -> None:
    rows = [ran(name).rows("strategy.w") for name in OPTIONS]
    for i, one in enumerate(rows):
        for other in rows[:i]:
            assert float((one - other).abs().max()) > 1e-6


@pytest.mark.parametrize(
    ("optimizer", "keep"), [("sgd", True), ("adam", True), pytest.param("adam", False, marks=pytest.mark.slow)]
)
def test_local_optimizers_by_hand(optimizer: str, keep: bool, tmp_path: Path) -> None:
    values: dict[str, Any] = {"client.optimizer": optimizer, "client.keep_optimizer": keep, "client.lr": 0.01}
    values |= {"client.momentum": 0.9 if optimizer == "sgd" else 0.0}
    same_as_reference(drive(toy(values), tmp_path), 5)


def test_float32_has_the_numbers_of_float64_up_to_rounding(tmp_path: Path) -> None:
    same_as_reference(drive(toy({"precision": "float32"}), tmp_path), 5, atol=2e-4)


#: Those that are also tried with clients trained together in the short suite.
TOGETHER = ("default", "head", "masked", "capped", "in_round_head", "class_masked_in_round")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in TOGETHER else pytest.mark.slow) for n in OPTIONS])
def test_clients_trained_together_have_the_numbers_of_each_alone(
    name: str, ran: Callable[[str], Run], tmp_path: Path
) -> None:
    # Check 8. Groups hold clients with soft labels of their own and without, of other sizes, and one without examples.
    one, other = ran(name), drive(toy({"client.batching": 3}, **OPTIONS[name]), tmp_path)
    assert other.driver.exp.program.options.batching == 3
    assert one.state_sha256 != other.state_sha256
    torch.testing.assert_close(one.rows("strategy.w"), other.rows("strategy.w"), rtol=0, atol=1e-10)
    torch.testing.assert_close(one.state.table, other.state.table, rtol=0, atol=1e-10)
    assert [r["bytes_up"] for r in one.records] == [r["bytes_up"] for r in other.records]


# --- training alone ---------------------------------------------------------------------------------------


PATHS = ["full", *(pytest.param(path, marks=pytest.mark.slow) for path in ("head", "masked"))]


@pytest.mark.parametrize("path", PATHS)
def test_without_soft_labels_a_client_trains_alone_whatever_others_do(path: str, tmp_path: Path) -> None:
    # Check 1: to the bit.
    alone, k = drive(toy(name="local"), tmp_path / "alone"), next(k for k in cohort(1) if SIZES[k])
    for lam_l in (0.0, 0.7):
        run, other = (
            drive(toy(data={"changed": c}, path=path, lam_l=lam_l), tmp_path / f"{lam_l}{c}") for c in (-1, k)
        )
        rest = [c for c in run.memory.clients() if c != k]
        assert not torch.equal(run.rows("strategy.w", [k]), other.rows("strategy.w", [k]))
        assert torch.equal(run.rows("strategy.w"), alone.rows("strategy.w")) == (not lam_l)
        assert torch.equal(run.rows("strategy.w", rest), other.rows("strategy.w", rest)) == (not lam_l)


def test_rounds_after_the_last_stage_and_before_the_first_soft_label_are_local_training(tmp_path: Path) -> None:
    # Check 2: round 1 has no soft labels; from round 2 on nobody takes part. Nothing is sent then.
    alone = drive(toy(name="local"), tmp_path / "alone")
    stopped = drive(toy(stage_rounds=1, dropping=[2], after="stop"), tmp_path / "stopped")
    assert torch.equal(stopped.rows("strategy.w"), alone.rows("strategy.w"))
    assert [r["bytes_up"] > 0 for r in stopped.records] == [True, False, False, False, False]
    first = [drive(toy({"rounds": 1}, path=p), tmp_path / p).rows("strategy.w") for p in ("full", "head", "masked")]
    one = drive(toy({"rounds": 1}, name="local"), tmp_path / "one").rows("strategy.w")
    assert all(torch.equal(w, one) for w in first)


def cost(z: Tensor, shard: Shard) -> float:
    return float(F.cross_entropy(z.detach(), shard.y[shard.rows], reduction="sum"))


def test_the_global_model_never_changes_and_newcomers_are_scored_with_it(tmp_path: Path) -> None:
    run = drive(toy({"rounds": 1}), tmp_path)
    program = run.driver.exp.program
    assert torch.equal(run.w, program.network.initial)
    new = [k for k in range(len(SIZES)) if k not in run.memory.clients()]
    assert new and all(k not in run.state.soft for k in new)
    (score,) = run.driver.fed.evaluate_clients(run.state, new[:1], "personal")
    shard = program.shard(new[0])
    z = module_of(run.driver.exp)(shard.x[shard.rows].double())
    assert score.loss == pytest.approx(cost(z, shard), abs=1e-10)
    trained = run.memory.clients()[0]
    (own,) = run.driver.fed.evaluate_clients(run.state, [trained], "personal")
    shard = program.shard(trained)
    z = module_of(run.driver.exp, run.rows("strategy.w", [trained])[0])(shard.x[shard.rows].double())
    assert own.loss == pytest.approx(cost(z, shard), abs=1e-10)


def test_first_models_of_their_own_are_drawn_by_the_layers_rule_and_stay_until_trained(tmp_path: Path) -> None:
    run = drive(toy({"rounds": 1}, initial="own"), tmp_path)
    program = run.driver.exp.program
    drawn = torch.stack([program.drawn("initial", k) for k in range(len(SIZES))])
    assert len({tuple(w.tolist()) for w in drawn}) == len(SIZES)
    for name, view in program.layout.views(drawn).items():
        fan_in = {"features.1": DIM, "features.3": 6, "head": 4}[name.rpartition(".")[0]]
        assert 0.5 / math.sqrt(fan_in) < float(view.abs().max()) <= 1 / math.sqrt(fan_in)
    new = next(k for k in range(len(SIZES)) if k not in run.memory.clients() and SIZES[k])
    (score,) = run.driver.fed.evaluate_clients(run.state, [new], "personal")
    shard = program.shard(new)
    z = module_of(run.driver.exp, drawn[new])(shard.x[shard.rows].double())
    assert score.loss == pytest.approx(cost(z, shard), abs=1e-10)


@pytest.mark.parametrize(
    "name", ["in_round_head", *(pytest.param(n, marks=pytest.mark.slow) for n in ("all_heads_head", "class", "own"))]
)
def test_a_run_goes_on_from_the_middle_of_a_stage_with_the_same_bits(name: str, tmp_path: Path) -> None:
    through = drive(toy({"rounds": 5}, **OPTIONS[name]), tmp_path / "through")
    first = drive(toy({"rounds": 3}, **OPTIONS[name]), tmp_path / "first")
    resumed = drive(toy({"rounds": 5}, **OPTIONS[name]), tmp_path, resume=first.result.run_dir)
    assert resumed.state_sha256 == through.state_sha256 != first.state_sha256


def cohort(t: int, m: int = 4) -> list[int]:
    """Who takes part in round t."""
    participation = instantiate({"_target_": "fedsim.clients.participation.Fixed", "clients_per_round": m})
    return [*participation.sample(len(SIZES), random.numpy_generator(0, "participation", t, 0))]


def test_a_round_whose_clients_have_no_example_leaves_heads_as_they_are(tmp_path: Path) -> None:
    sizes = [0 if k in cohort(1) else 5 for k in range(len(SIZES))]
    run = drive(toy({"rounds": 1}, {"sizes": sizes}, timing="in_round"), tmp_path)
    assert torch.equal(run.state.heads[2], run.driver.exp.program.tail(2).initial)
    assert not run.state.table.any()
    assert int(run.state.optimizer[2]["step"]) == 0
    assert run.records[0]["bytes_up"] == 0


# --- the divergence ---------------------------------------------------------------------------------------


def test_the_divergence_of_a_model_from_itself_is_zero_with_zero_gradient() -> None:
    # Check 3.
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-6)):
        z = torch.randn(50, 10, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        for T in (0.5, 1.0, 3.0):
            value = kl((z.detach() / T).softmax(-1), z, T)
            (grad,) = torch.autograd.grad(value.sum(), z)
            scale = 1.0 if dtype == torch.float64 else T  # float32 rounds a number that is then multiplied by T^2
            assert float(value.detach().abs().max()) <= tolerance * scale**2
            assert float(grad.abs().max()) <= tolerance * scale


@pytest.mark.parametrize("T", [0.5, 1.0, 3.0, 20.0])
def test_the_gradient_of_the_divergence_is_the_difference_of_probabilities(T: float) -> None:
    # Check 3.
    g = torch.Generator().manual_seed(1)
    z, p = torch.randn(9, 6, generator=g, dtype=torch.float64).requires_grad_(), torch.rand(9, 6, generator=g).double()
    p[0] = F.one_hot(torch.tensor(2), 6)  # a certain teacher
    p = p / p.sum(-1, keepdim=True)
    (grad,) = torch.autograd.grad(kl(p, z, T).sum(), z)
    torch.testing.assert_close(grad, T * ((z / T).softmax(-1) - p), rtol=0, atol=3e-8)
    torch.testing.assert_close(kl(p, z, T), divergence(p, z, T), rtol=1e-12, atol=1e-12)


def test_at_high_temperatures_the_gradient_compares_centred_logits() -> None:
    # Check 3: relative errors of 0.40, 0.052 and 0.0052 for logits of unit variance at T = 1, 10, 100.
    g = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(2000, 10, generator=g, dtype=torch.float64) for _ in range(2))
    limit = ((student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))) / 10
    for T, error in ((1.0, 0.40), (10.0, 0.052), (100.0, 0.0052)):
        z = student.clone().requires_grad_()
        (grad,) = torch.autograd.grad(kl((teacher / T).softmax(-1), z, T).sum(), z)
        found = float(((grad - limit).norm(dim=-1) / limit.norm(dim=-1)).mean())
        assert found == pytest.approx(error, rel=0.25)


def test_the_divergence_from_a_uniform_teacher() -> None:
    # Check 4: -log C - mean_c log softmax(z)_c at T = 1.
    z = torch.randn(8, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    uniform = torch.full((8, 7), 1 / 7, dtype=torch.float64)
    torch.testing.assert_close(kl(uniform, z, 1.0), -math.log(7) - z.log_softmax(-1).mean(-1), rtol=1e-12, atol=1e-12)


# --- what soft labels act on ------------------------------------------------------------------------------


def gradients(path: str, sent: Mapping[str, Any], **strategy: Any) -> dict[str, Tensor]:
    """The step direction of client 2 at its start in round 3 (block 1), less that of training alone, by parameter."""
    found = []
    for payload in (sent, {}):
        exp = build(toy({"client.batch_size": None}, path=path, **strategy))
        local = local_of(exp, 2, **payload)
        local.round = 3
        strategy_ = cast("FedD2S", exp.program.strategy)
        local._batch = local.examples()

        def grad(at: Tensor, batch: Any = None, half: ClientHalf | None = None, local: Any = local) -> Tensor:
            return cast("Tensor", local.grad(at, batch, half).clone())

        found.append(strategy_.direction(local.start, grad, local)[0])
    return dict(local.layout.views(found[0] - found[1]))


def labels(n: int = 11) -> Tensor:
    p = torch.rand(n, CLASSES, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return p / p.sum(-1, keepdim=True)


@pytest.mark.parametrize("path", ["full", "head", "masked"])
def test_soft_labels_move_the_blocks_that_their_path_reaches_and_no_others(path: str) -> None:
    # Check 5: under `head` and `masked` what is above the active block gets exactly nothing; the head is a constant.
    none = torch.empty(0, CLASSES, dtype=torch.float64)
    head = build(toy()).program.tail(1).initial.clone()
    sent: dict[str, Any] = {"own": labels(), "table": none}
    if path == "head":
        sent["heads"] = {1: head}
    found = gradients(path, sent)
    deep = {name: g for name, g in found.items() if not name.startswith("features.1.")}
    assert all(float(found[f"features.1.{key}"].abs().max()) > 1e-3 for key in ("weight", "bias"))
    assert len(deep) == 4
    for g in deep.values():
        assert (float(g.abs().max()) > 1e-3) == (path == "full")
        assert path == "full" or not g.any()
    assert not head.requires_grad and torch.equal(head, build(toy()).program.tail(1).initial)


@dataclass(frozen=True)
class Twice(ClientHalf):
    """A recipe whose objective is twice the task's."""

    def loss(self, model: Model, batch: Any, local: Any) -> Tensor:
        return 2 * cast("Tensor", local.task_loss(model(batch.x), batch.y))


@pytest.mark.parametrize("path", ["head", *(pytest.param(path, marks=pytest.mark.slow) for path in ("full", "masked"))])
def test_a_recipe_s_objective_takes_the_place_of_the_task_s_beside_soft_labels(path: str, tmp_path: Path) -> None:
    # With SGD and without momentum a step of 2 CE + lam KL at rate eta is one of CE + lam / 2 KL at 2 eta; under `head`
    # the second cross-entropy, through the server's head, belongs to the soft labels.
    values: dict[str, Any] = {"client.momentum": 0.0, "rounds": 4}
    recipe = {"recipe": {"twice": {"_target_": "tests.test_fedd2s.Twice"}}}
    one = drive(toy({**values, **recipe, "client.lr": 0.02}, path=path, lam_l=0.8), tmp_path / "one")
    other = drive(toy({**values, "client.lr": 0.04}, path=path, lam_l=0.4), tmp_path / "other")
    torch.testing.assert_close(one.rows("strategy.w"), other.rows("strategy.w"), rtol=0, atol=1e-11)


# --- what is sent -----------------------------------------------------------------------------------------


def watch(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, Any]]:
    """What every visit sends up, by client."""
    seen: list[dict[int, Any]] = []
    original = FedD2S.finish

    def finish(self: FedD2S, w: Tensor, local: Any) -> Any:
        entries = original(self, w, local)
        assert entries.keys() <= {"tuples"}
        seen.append({c: (entries["tuples"].value[i], w[i]) for i, c in enumerate(local.clients) if entries})
        return entries

    monkeypatch.setattr(FedD2S, "finish", finish)
    return seen


@pytest.mark.parametrize("batching", ["off", 3])
@pytest.mark.parametrize("granularity", ["sample", "class"])
def test_only_tuples_go_up_and_no_parameter_does(
    granularity: str, batching: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Check 9, and check 6: a class that a client does not have gives no tuple and no NaN.
    seen = watch(monkeypatch)
    values = {"participation": ALL, "client.batching": batching, "rounds": 3}
    run = drive(toy(values, granularity=granularity), tmp_path)
    for visit in seen:
        for client, (item, _) in visit.items():
            (_, y), size = _data(run, client), len(item[1])
            assert size == (len(y) if granularity == "sample" else len(set(y.tolist())))
            assert [t.shape[1:] for t in item[1:3]] == [(CLASSES,), ()] and item[0].shape[1] in (4, 6)
            assert torch.equal(item[2].long(), y if granularity == "sample" else torch.unique(y))
            assert all(bool(t.isfinite().all()) for t in item)
            if granularity == "class":
                assert item[3].tolist() == [int((y == c).sum()) for c in torch.unique(y)]


def _data(run: Run, client: int) -> tuple[Tensor, Tensor]:
    shard = run.driver.exp.program.shard(client)
    return shard.x[shard.rows], shard.y[shard.rows]


def test_what_goes_up_is_of_the_trained_model_in_parts_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Check 6: partial sums over parts of the examples are the full means, to 3e-8.
    seen = watch(monkeypatch)
    values = {"participation": ALL, "rounds": 1}
    for size in (500, 3):
        monkeypatch.setattr(fedd2s, "EXAMPLES", size)
        run = drive(toy(values, granularity="class"), tmp_path / str(size))
    whole, parts = (
        {k: v for visit in half for k, v in visit.items()} for half in (seen[: len(SIZES)], seen[len(SIZES) :])
    )
    for client, (item, w) in whole.items():
        x, y = _data(run, client)
        out = outputs(split(run.driver.exp.program.layout, w), x.double())
        for j, c in enumerate(torch.unique(y)):
            torch.testing.assert_close(item[0][j], out[1][y == c].mean(0), rtol=0, atol=3e-8)
            torch.testing.assert_close(item[1][j], (out[2][y == c] / 3).softmax(-1).mean(0), rtol=0, atol=3e-8)
        for one, other in zip(item, parts[client][0], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=3e-8)


def test_class_means_of_partial_sums() -> None:
    # Check 6, in float32.
    g = torch.Generator().manual_seed(6)
    t, y = torch.randn(1000, 3, 2, generator=g), torch.randint(5, (1000,), generator=g) * 2
    sums = torch.zeros(9, 3, 2).double()
    for part in torch.split(torch.arange(1000), 64):
        for i in part.tolist():
            sums[y[i]] += t[i].double()
    classes = torch.unique(y)
    expected = sums[classes] / torch.bincount(y)[classes].view(-1, 1, 1)
    torch.testing.assert_close(class_means(t, y, classes), expected.float(), rtol=0, atol=3e-8)
    assert class_means(t[:0], y[:0], y[:0]).shape == (0, 3, 2)


def test_with_one_sample_of_each_class_classes_and_samples_are_the_same(tmp_path: Path) -> None:
    # Check 6, to the bit.
    data = {"sizes": [CLASSES] * 3, "each": True}
    one, other = (drive(toy({"participation": ALL}, data, granularity=g), tmp_path / g) for g in ("sample", "class"))
    assert torch.equal(one.rows("strategy.w"), other.rows("strategy.w"))
    assert torch.equal(one.state.table, other.state.table)
    assert all(torch.equal(one.state.heads[d], other.state.heads[d]) for d in (1, 2))


def images(values: Mapping[str, Any] | None = None, **strategy: Any) -> Config:
    """One client with a 32x32 image of each of ten classes, blocks5, a stage per round."""
    data = {
        "_target_": "tests.test_fedd2s.Toy",
        **{"augment": [], "validation": 0.0, "sizes": [10], "shape": [3, 32, 32], "classes": 10, "each": True},
    }
    base = {"data": data, "participation": ALL, "client.batch_size": None, "rounds": 4}
    own = {"stage_rounds": 1, "server_epochs": 1, **strategy}
    return configure(
        ("strategy=fedd2s", "model=blocks5"),
        {**base, **{f"strategy.{k}": v for k, v in own.items()}, **(values or {})},
    )


WIDTHS = [256, 128 * 16, 64 * 64, 32 * 256]  # numbers in the outputs of blocks 4 to 1


def test_uploads_have_the_sizes_of_the_example(tmp_path: Path) -> None:
    # Check 9: 2,680, 20,600, 41,080 and 82,040 floats by class; a soft label for each of ten classes down.
    by_class = drive(images(granularity="class"), tmp_path / "class")
    assert [r["bytes_up"] // 4 for r in by_class.records] == [2_680, 20_600, 41_080, 82_040]
    d = by_class.driver.exp.program.layout.d
    assert [r["bytes_down"] // 4 for r in by_class.records] == [d, 100, 100, 100]


@pytest.mark.parametrize(
    ("strategy", "up", "down"),
    [
        ({}, [10 * (n + 11) for n in WIDTHS], [0, 100, 100, 100]),
        ({"heads": "all"}, [10 * (sum(WIDTHS) + 11)] * 4, [0, 100, 100, 100]),
        ({"dropping": [4, 1]}, [10 * (n + 11) for n in (256, 8192, 8192, 8192)], [0, 100, 100, 100]),
        ({"teacher": "class"}, [10 * (n + 11) for n in WIDTHS], [0, 100, 100, 100]),
        ({"timing": "in_round"}, [10 * (n + 11) for n in WIDTHS], [100] * 4),
        ({"pool": 2}, [10 * (n + 11) for n in (256, 128 * 4, 64 * 4, 32 * 4)], [0, 100, 100, 100]),
        ({"after": "stop", "dropping": [3, 2]}, [10 * (2048 + 11), 10 * (4096 + 11), 0, 0], [0, 100, 0, 0]),
        ({"lam_l": 0.0}, [0] * 4, [0] * 4),
        # The head on block 3: 524,544 + 2,570 parameters. A new stage's head exists after its first round only.
        ({"path": "head", "dropping": [3]}, [10 * (2048 + 11)] * 4, [0, *[100 + 527_114] * 3]),
        (
            {"path": "head", "dropping": [4, 3]},
            [10 * (n + 11) for n in (256, 2048, 2048, 2048)],
            [0, 0, 527_214, 527_214],
        ),
        ({"path": "head", "timing": "in_round", "dropping": [3]}, [10 * (2048 + 11)] * 4, [100 + 527_114] * 4),
    ],
)
def test_bytes_of_both_directions_by_option(
    strategy: dict[str, Any], up: list[int], down: list[int], tmp_path: Path
) -> None:
    run = drive(images(**strategy), tmp_path)
    d = run.driver.exp.program.layout.d
    assert [r["bytes_up"] for r in run.records] == [4 * n for n in up]
    assert [r["bytes_down"] for r in run.records] == [4 * (down[0] + d), *[4 * n for n in down[1:]]]


def test_a_first_model_of_one_s_own_is_not_sent(tmp_path: Path) -> None:
    run = drive(images({"rounds": 2}, initial="own"), tmp_path)
    assert [r["bytes_down"] for r in run.records] == [0, 400]


def test_who_never_took_part_gets_the_table_and_others_their_own_rows(tmp_path: Path) -> None:
    run = drive(toy({"rounds": 3}), tmp_path)
    d, seen, newcomers = run.driver.exp.program.layout.d, set[int](), 0
    for t, record in enumerate(run.records):
        who = cohort(t + 1)
        floats = sum(SIZES[k] * CLASSES if k in seen else d + (CLASSES**2 if t else 0) for k in who)
        assert record["bytes_down"] == 4 * floats
        newcomers += len(set(who) - seen) if t else 0
        seen |= set(who)
    assert newcomers


# --- maps -------------------------------------------------------------------------------------------------


def test_maps_are_averaged_and_restored_patch_by_patch() -> None:
    h = torch.arange(32.0).view(1, 2, 4, 4)
    small = pooled(h, 2)
    expected = torch.tensor([[[2.5, 4.5], [10.5, 12.5]], [[18.5, 20.5], [26.5, 28.5]]])[None]
    assert torch.equal(small, expected)
    large = restored(small, torch.Size([2, 4, 4]))
    assert torch.equal(large, expected.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert torch.equal(pooled(large, 2), small)
    for same in (pooled(h, None), pooled(h, 4), pooled(h, 7)):
        assert same is h
    flat = torch.ones(3, 5)
    assert pooled(flat, 1) is flat and restored(flat, torch.Size([5])) is flat


class Maps(Classifier):
    """Two convolutions, an average over each map, a head: blocks with maps of 6x6 and 3x3.

    Args:
        input_shape: ``(channels, 6, 6)``.
        num_classes: Number of classes.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        layers = [
            nn.Conv2d(input_shape[0], 3, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(3, 4, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Flatten(),
        ]
        super().__init__(nn.Sequential(*layers), 36, num_classes)


@pytest.mark.parametrize("path", ["full", "head"])
@pytest.mark.parametrize("batching", ["off", 3])
def test_a_head_learns_from_maps_that_were_averaged(
    path: str, batching: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two rounds by hand, full-batch steps of clients that disagree: what goes up, the head, the second round's steps.
    seen = watch(monkeypatch)
    data = {"sizes": [5, 4, 6], "shape": [2, 6, 6]}
    values = {
        "model": {"_target_": "tests.test_fedd2s.Maps", "weights": None},
        **{"participation": ALL, "rounds": 2, "client.batch_size": None, "client.epochs": 1, "client.momentum": 0.0},
        "client.batching": batching,
    }
    options_ = {"dropping": [1], "pool": 2, "path": path, "server_batch_size": 100, "server_epochs": 3}
    run = drive(toy(values, data, **options_), tmp_path)
    exp, T, lam = run.driver.exp, 3.0, 0.7
    sent = {k: v for visit in seen[: 3 if batching == "off" else 1] for k, v in visit.items()}
    models = [module_of(exp) for _ in range(3)]

    def step(k: int, extra: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> None:
        x, y = _data(run, k)
        first = cast("Any", models[k]).features[:2](x.double())
        z = cast("Any", models[k]).head(cast("Any", models[k]).features[2:](first))
        loss = F.cross_entropy(z, y) + (0 if extra is None else lam * extra(first, z, y).mean())
        grads = torch.autograd.grad(loss, [*models[k].parameters()])
        with torch.no_grad():
            for p, g in zip(models[k].parameters(), grads, strict=True):
                p.sub_(0.05 * g)

    def patches(h: Tensor) -> Tensor:
        """Means over 3x3 patches of 6x6 maps, each in its own patch."""
        small = h.unfold(2, 3, 3).unfold(3, 3, 3).mean((-1, -2))
        return small.repeat_interleave(3, 2).repeat_interleave(3, 3)

    hs, qs, ys = [], [], []
    for k in range(3):
        step(k)
        x, y = _data(run, k)
        with torch.no_grad():
            h = cast("Any", models[k]).features[:2](x.double())
            hs.append(patches(h))
            qs.append((models[k](x.double()) / T).softmax(-1))
            ys.append(y)
        assert sent[k][0][0].shape == (len(y), 3, 2, 2)
        torch.testing.assert_close(sent[k][0][0], hs[-1][:, :, ::3, ::3], rtol=0, atol=1e-12)
    head = module_of(exp)
    tail = exp.program.tail(1)
    later = [p for n, p in head.named_parameters() if not n.startswith("features.0.")]
    with torch.no_grad():
        for p, view in zip(later, tail.layout.views(tail.initial).values(), strict=True):
            p.copy_(view)

    def through(h: Tensor) -> Tensor:
        return cast("Tensor", cast("Any", head).head(cast("Any", head).features[2:](h)))

    adam = torch.optim.Adam(later, lr=1e-3)
    for _ in range(3):
        z = through(torch.cat(hs))
        adam.zero_grad()
        (F.cross_entropy(z, torch.cat(ys)) + divergence(torch.cat(qs), z, T).mean()).backward()  # type: ignore[no-untyped-call]
        adam.step()
    soft = [(through(h).detach() / T).softmax(-1) for h in hs]
    for k in range(3):
        torch.testing.assert_close(exp.program.layout.d, run.rows("strategy.w").shape[1])

        def extra(h: Tensor, z: Tensor, y: Tensor, k: int = k) -> Tensor:
            if path == "full":
                return divergence(soft[k], z, T)
            z = through(patches(h))
            return F.cross_entropy(z, y, reduction="none") + divergence(soft[k], z, T)

        step(k, extra)
        found = torch.cat([p.detach().flatten() for p in models[k].parameters()])
        torch.testing.assert_close(run.rows("strategy.w", [k])[0], found, rtol=0, atol=1e-10)


# --- the schedule, the server -----------------------------------------------------------------------------


def test_the_schedule_goes_down_and_never_up() -> None:
    # Check 7: dropping 3, 2, 1 with ten rounds a stage; the first round is t = 0.
    method = FedD2S(dropping=(3, 2, 1), stage_rounds=10)
    depths = [method.depth(t + 1, (3, 2, 1)) for t in range(100)]
    assert depths == [3] * 10 + [2] * 10 + [1] * 80
    stop = replace(method, after="stop")
    assert [stop.depth(t + 1, (3, 2, 1)) for t in range(40)] == [3] * 10 + [2] * 10 + [1] * 10 + [0] * 10
    assert FedD2S().schedule_of(5) == (4, 3, 2, 1) and FedD2S(dropping=[3, 1]).schedule_of(5) == (3, 1)


def test_the_weight_of_soft_labels_grows_at_the_start_of_every_stage() -> None:
    method = FedD2S(dropping=(2, 1), stage_rounds=4, lam_l=0.8, ramp=3)
    expected = [0.2, 0.4, 0.6, 0.8, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8]
    assert [method.strength(t + 1, 2) for t in range(10)] == pytest.approx(expected, abs=1e-15)
    assert {replace(method, ramp=0).strength(t + 1, 2) for t in range(10)} == {0.8}


def learned(lam_g: float, q: Tensor, epochs: int = 150) -> tuple[float, Tensor, Tensor]:
    """The last loss, soft labels and labels after a head has learned from separable tuples of one client."""
    method = FedD2S(lam_g=lam_g, server_epochs=epochs, server_lr=0.05, temperature=1.0, dropping=(2,))
    program = build(toy()).program
    y = torch.arange(24) % CLASSES
    h = 3 * F.one_hot(y, 4).double() + 0.01 * torch.randn(24, 4, generator=torch.Generator().manual_seed(7)).double()
    answer = Reduced({"tuples": [(h, q, y.double())]}, program.layout, (3,), 6, torch.tensor([24.0]))
    fed: Any = SimpleNamespace(
        tail=program.tail, log={}, generator=lambda *index: random.generator(0, "test", *map(str, index))
    )
    state = D2SState(program.network.initial, torch.zeros(CLASSES, CLASSES, dtype=torch.float64))
    new = method._learn(fed, state, 2, (2,), answer)
    table = torch.stack([new.soft[3][y == c].mean(0) for c in range(CLASSES)])
    torch.testing.assert_close(new.table, table, rtol=1e-12, atol=1e-12)
    return fed.log["head_loss"], new.soft[3], y


def test_a_head_learns_separable_tuples() -> None:
    # Check 10.
    uniform = torch.full((24, CLASSES), 0.25, dtype=torch.float64)
    loss, soft, y = learned(0.0, uniform)
    assert loss < 0.01 < learned(0.0, uniform, epochs=5)[0]
    assert torch.equal(soft.argmax(-1), y)


def test_a_confident_wrong_client_overrides_labels_only_with_weight() -> None:
    # Check 10: with cross-entropy to y and lam_g times that to q, the optimum is (y + lam_g q) / (1 + lam_g) at T = 1.
    y = torch.arange(24) % CLASSES
    wrong = F.one_hot((y + 1) % CLASSES, CLASSES).double()
    soft = learned(3.0, wrong, epochs=400)[1]
    expected = (F.one_hot(y, CLASSES) + 3 * wrong) / 4
    torch.testing.assert_close(soft, expected, rtol=0, atol=0.02)
    assert torch.equal(learned(0.2, wrong)[1].argmax(-1), y)


def test_the_head_of_a_new_stage_is_drawn_anew_and_its_optimizer_starts_anew(tmp_path: Path) -> None:
    run = drive(toy({"rounds": 3, "participation": ALL}), tmp_path)
    assert run.state.heads.keys() == {1, 2} and run.state.optimizer.keys() == {1}
    steps = -(-sum(SIZES) // 5) * 2
    assert int(run.state.optimizer[1]["step"]) == steps
    before = drive(toy({"rounds": 2, "participation": ALL}), tmp_path / "before").state
    assert int(before.optimizer[2]["step"]) == 2 * steps
    assert torch.equal(run.state.heads[2], before.heads[2])
    every = drive(toy({"rounds": 3, "participation": ALL}, heads="all"), tmp_path / "all").state
    assert {d: int(o["step"]) for d, o in every.optimizer.items()} == {1: 3 * steps, 2: 3 * steps}


def test_nothing_but_the_model_goes_down_for_evaluation(tmp_path: Path) -> None:
    run = drive(toy({"rounds": 3}, path="head", teacher="class"), tmp_path)
    assert run.driver.fed.payload(run.state).keys() == {"w"}
    assert not run.driver.fed.unicast(run.state, (0,))


# --- bad inputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("dropping", [1, 2], "numbers of blocks from deep to shallow"),
        ("dropping", [2, 2], "numbers of blocks from deep to shallow"),
        ("dropping", [1, 0], "numbers of blocks from deep to shallow"),
        ("dropping", [], "numbers of blocks from deep to shallow"),
        ("dropping", [2.0], "numbers of blocks from deep to shallow"),
        ("dropping", 2, "numbers of blocks from deep to shallow"),
        ("stage_rounds", 0, ">= 1"),
        ("after", "end", "hold or stop"),
        ("lam_l", -0.1, ">= 0"),
        ("lam_g", -1.0, ">= 0"),
        ("temperature", 0.0, "> 0"),
        ("ramp", -1, ">= 0"),
        ("path", "deep", "full or head or masked"),
        ("granularity", "batch", "sample or class"),
        ("max_per_class", 0, ">= 1, or null"),
        ("pool", 0, ">= 1, or null"),
        ("timing", "late", "pipelined or in_round"),
        ("teacher", "mean", "own or class"),
        ("heads", "some", "active or all"),
        ("server_epochs", -1, ">= 0"),
        ("server_lr", 0.0, "> 0"),
        ("server_batch_size", 0, ">= 1"),
        ("initial", "zero", "common or own"),
        ("server_epochs", 1.5, "a whole number"),
    ],
)
def test_impossible_options_are_refused(key: str, value: Any, needed: str) -> None:
    with pytest.raises(ConfigError, match=rf"strategy\.{key} must be {needed}"):
        build(toy(**{key: value}))


class Unnamed(nn.Module):
    """A network that does not name its blocks.

    Args:
        input_shape: Of one input.
        num_classes: Number of classes.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(math.prod(input_shape), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.head(x.flatten(1)))


class Lone(Unnamed):
    """A network of one block."""

    blocks = ("head",)


class BatchNormed(Unnamed):
    """A network with batch norm."""

    blocks = (("norm", "first"), "head")

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        super().__init__(input_shape, num_classes)
        self.norm, self.first = nn.BatchNorm1d(DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.head(self.first(self.norm(x))))


class Scaled(nn.Linear):
    """A layer that cannot draw its weights anew."""

    reset_parameters = None  # type: ignore[assignment]

    def __init__(self, before: int, after: int) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = nn.Parameter(torch.ones(after, before)), nn.Parameter(torch.zeros(after))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tests.test_fedd2s.Unnamed", "needs a model that names its blocks"),
        ("tests.test_fedd2s.Lone", "needs a block with weights before the head"),
        ("fedsim.models.standard.LogReg", "needs a block with weights before the head"),
        ("tests.test_fedd2s.BatchNormed", "no rule for the statistics of batch norms"),
    ],
)
def test_models_that_cannot_be_cut_are_refused(model: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(toy({"model": {"_target_": model, "weights": None}}))


@pytest.mark.parametrize("dropping", [[3], [4, 1]])
def test_a_dropping_set_that_names_a_missing_block_is_refused(dropping: list[int]) -> None:
    with pytest.raises(ConfigError, match=rf"names block {dropping[0]}, but .* are 1 to 2; 3 is the head"):
        build(toy(dropping=dropping))


def test_a_cap_on_samples_is_refused_where_classes_are_sent() -> None:
    with pytest.raises(ConfigError, match=r"set it to null with strategy\.granularity=class"):
        build(toy(granularity="class", max_per_class=3))


def test_numbers_as_targets_are_refused() -> None:
    exp = build(toy())
    with pytest.raises(ConfigError, match="which needs classes, and the data have none"):
        exp.program.strategy.init(replace(exp.info, num_classes=0), exp.program.network.initial)


def test_a_mistake_ends_in_one_line(fedsim: Fedsim) -> None:
    found = fedsim("strategy=fedd2s", "strategy.dropping=[3]", "rounds=1")
    assert found.status == 2
    assert found.err.count("\n") == 1 and "names block 3" in found.err


def test_the_list_of_methods_says_that_it_is_a_reconstruction(fedsim: Fedsim) -> None:
    (line,) = [line for line in fedsim("list", "strategy").out.splitlines() if line.startswith("fedd2s ")]
    assert "FedD2S (reconstruction)" in line
    page = (Path(__file__).resolve().parent.parent / "docs" / "methods" / "fedd2s.md").read_text(encoding="utf-8")
    assert "reconstruction" in page.splitlines()[0]


# --- blocks of models -------------------------------------------------------------------------------------


def made(name: str, classes: int = 5) -> tuple[nn.Module, Tensor]:
    """A standard model, and a few images for it."""
    node = {k: v for k, v in compose([f"model={name}"])["model"].items() if k != "weights"}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        shape = (3, 32, 32)
        return instantiate(node, input_shape=shape, num_classes=classes).eval(), torch.randn(3, *shape)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ("resnet18", "resnet34") else ()) for n in options("model")]
)
def test_blocks_of_a_standard_model_one_after_the_other_are_the_model(name: str) -> None:
    module, x = made(name)
    blocks = blocks_of(module, "a test")
    assert blocks[-1] == ("head",) and head_of(module, "a test").out_features == 5
    h = x
    with torch.no_grad():
        for block in blocks:
            for part in block:
                h = module.get_submodule(part)(h)
        expected = module(x)
        found = Blocks(module, blocks)(x)
    assert torch.equal(h, expected) and torch.equal(found[-1], expected)
    assert len(found) == len(blocks)
    inside = [n for n, _ in module.named_parameters()]
    assert all(sum(n.startswith(f"{part}.") for block in blocks for part in block) == 1 for n in inside)
    weighs = [any(True for part in block for _ in module.get_submodule(part).parameters()) for block in blocks]
    assert all(weighs) or name == "logreg"


@pytest.mark.parametrize("name", ["mlp", "blocks5", pytest.param("resnet18_gn", marks=pytest.mark.slow)])
def test_a_tail_continues_where_the_blocks_below_end(name: str) -> None:
    module, x = made(name)
    blocks = blocks_of(module, "a test")
    before = {n: p.clone() for n, p in module.named_parameters()}
    for first in range(1, len(blocks)):
        with torch.no_grad():
            below = Blocks(module, blocks)(x)[first - 1]
            own = Blocks(module, blocks, first)(below)
            assert torch.equal(own[-1], module(x)) and len(own) == len(blocks) - first
    first = len(blocks) - 2
    copy, _ = made(name)
    torch.manual_seed(3)
    network = Network(tail_of(copy, blocks, first))
    upper = {n for n in before if any(n.startswith(f"{part}.") for block in blocks[first:] for part in block)}
    assert {n.removeprefix("module.") for n in network.layout.names} == upper
    drawn = dict(copy.named_parameters())
    assert all(not torch.equal(drawn[n], before[n]) for n in upper if n.endswith("head.weight"))
    assert all(p.requires_grad == (n in upper) for n, p in drawn.items())


def test_heads_are_drawn_independently_and_the_same_every_time() -> None:
    one, other = build(toy()).program, build(toy()).program
    assert torch.equal(one.tail(1).initial, other.tail(1).initial) and one.tail(1) is one.tail(1)
    # The first weights of both, [4, 6] and [4, 4], are uniform in +-1 / sqrt(fan in): not the same numbers scaled.
    uniform = [one.tail(d).initial[:16] * math.sqrt(n) for d, n in ((1, 6), (2, 4))]
    assert float((uniform[0] - uniform[1]).abs().max()) > 0.1
    assert not torch.equal(one.tail(2).initial, one.network.initial[-20:])
    different = build(toy({"seed": 1})).program
    assert not torch.equal(one.tail(1).initial, different.tail(1).initial)
    torch.manual_seed(9)
    assert torch.equal(build(toy()).program.drawn("initial", 2), one.drawn("initial", 2))
    assert not torch.equal(one.drawn("initial", 1), one.drawn("initial", 2))


def test_outputs_of_blocks_are_those_of_the_network_at_a_point() -> None:
    exp = build(toy())
    local = local_of(exp, 2)
    batch, w = local.examples(), local.start + 0.1
    (x, _), params = _toy_data(exp, 2), split(exp.program.layout, w[0])
    for model in (local.at(w),):
        for found, expected in zip(model.blocks(batch.x), outputs(params, x), strict=True):
            torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-12)


def _toy_data(exp: Any, client: int) -> tuple[Tensor, Tensor]:
    shard = exp.program.shard(client)
    return shard.x[shard.rows].double(), shard.y[shard.rows]


def test_parts_that_are_not_named_are_one_clear_line() -> None:
    module = Unnamed((DIM,), 3)
    with pytest.raises(ConfigError, match=r"somebody needs a model that names its blocks .*; Unnamed does not"):
        blocks_of(module, "somebody")
    with pytest.raises(ConfigError, match=r"somebody needs a model that computes head\(features\(x\)\) .*; Unnamed"):
        head_of(module, "somebody")
    with pytest.raises(ConfigError, match="Scaled cannot draw its weights anew: it needs `reset_parameters`"):
        redraw(nn.Sequential(Scaled(2, 2)))


def test_norms_are_found_by_their_layers() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Sequential(nn.GroupNorm(2, 4)), nn.BatchNorm1d(4))
    assert norms_of(module) == ("1.weight", "1.bias", "2.0.weight", "2.0.bias", "3.weight", "3.bias")
    module[1].weight.requires_grad_(False)
    assert norms_of(module)[0] == "1.bias"
    assert norms_of(nn.LayerNorm(3)) == ("weight", "bias")


# --- what it is good for ------------------------------------------------------------------------------------


class Shares(FixedClients):
    """A population whose held-out examples are others, in the proportions of the training examples.

    Args:
        train: Of every client.
        heldout: Of every client.
    """

    def __init__(self, train: Sequence[Shard], heldout: Sequence[Shard]) -> None:
        super().__init__(tuple(train))
        object.__setattr__(self, "_heldout", tuple(heldout))

    def heldout(self, client: int) -> Shard:
        found: Shard = self._heldout[client]  # type: ignore[attr-defined]
        return found


@dataclass(frozen=True)
class Gaussians:
    """Ten Gaussian classes in 20 dimensions, 12 clients of 60 examples in Dirichlet(0.3) proportions of their own."""

    def load(self, seed: int) -> Dataset:
        g, draw = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        means = torch.randn(10, 20, generator=g)
        shares = [draw.dirichlet([0.3] * 10) for _ in range(12)]

        def split_of(each: int) -> tuple[Split, list[Shard]]:
            y = torch.from_numpy(np.concatenate([draw.choice(10, each, p=p) for p in shares]))
            x = means[y] + 1.5 * torch.randn(len(y), 20, generator=g)
            return Split(x, y), [Shard(x, y, torch.arange(k * each, (k + 1) * each)) for k in range(12)]

        train, own = split_of(60)
        test, heldout = split_of(200)
        return Dataset("gaussians", train, test, tuple(map(str, range(10))), clients=Shares(own, heldout))


def accuracy(seed: int, folder: Path, **strategy: Any) -> float:
    """Mean personal accuracy after 40 rounds with all clients."""
    name = strategy.pop("name", "fedd2s")
    values = {
        "data": {"_target_": "tests.test_fedd2s.Gaussians", "augment": [], "validation": 0.0},
        "model.hidden": [64, 64, 64],
        **{"participation": ALL, "rounds": 40, "seed": seed, "eval.clients": "all", "client.batching": 12},
        **{"client.epochs": 5, "client.batch_size": 64, "client.lr": 0.01, "client.momentum": 0.9},
        **{f"strategy.{k}": v for k, v in strategy.items()},
    }
    run = drive(configure((f"strategy={name}",), values), folder)
    scores = run.driver.fed.evaluate_clients(run.state, range(12), "personal")
    return sum(float(s.confusion.diagonal().sum()) / s.count for s in scores) / 12


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_distillation_with_dropping_beats_training_alone(seed: int, tmp_path: Path) -> None:
    found = accuracy(seed, tmp_path / "run", dropping=[3, 2, 1], stage_rounds=10, lam_l=1.0)
    assert found > accuracy(seed, tmp_path / "alone", name="local")
