"""Clients trained together: the numbers of the one-by-one loop, whoever stands beside whom."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsim import batching, federation, random, tree
from fedsim.clients.batch import Batch
from fedsim.clients.lanes import Lanes
from fedsim.clients.local import Local
from fedsim.config import dump, load
from fedsim.data import Dataset, IntArray, Shard, Split
from fedsim.engine import session as sessions
from fedsim.engine.base import Done, EvalTask, Score, Task
from fedsim.engine.inline import InlineEngine
from fedsim.engine.worker import Worker
from fedsim.errors import ClientError, ConfigError
from fedsim.experiment import Experiment, build, simulate
from fedsim.federation import Federation
from fedsim.memory import Memory
from fedsim.models.standard import Classifier
from fedsim.reduce import Entry, Reduced, Sized, concat, mean, stack, tensors_in
from fedsim.replay import replay
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import ClientHalf, Grad, Model, State
from fedsim.vector import Layout
from fedsim.visits import read
from tests import helpers
from tests.cli import Fedsim
from tests.helpers import Interrupted, Run, configure, drive

EXACT = 1e-10  # float64: rounding only
SIZES = (23, 7, 41, 12, 30)
STEPS = 20


# --- data and networks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Owners:
    """A population of rows of one store, or of a store each."""

    held: tuple[tuple[Shard, Shard], ...]

    def __len__(self) -> int:
        return len(self.held)

    def sizes(self) -> IntArray:
        return np.array([len(train) for train, _ in self.held], dtype=np.int64)

    def train(self, client: int) -> Shard:
        return self.held[client][0]

    def heldout(self, client: int) -> Shard:
        return self.held[client][1]


@dataclass(frozen=True)
class Pictures:
    """Noisy images, brighter in a place that depends on the class; labels are skewed from client to client.

    Attributes:
        sizes: Training examples of every client.
        side: Height and width.
        classes: 0: targets are numbers.
        heldout: Held-out examples of every client; default: 5 each.
        apart: Whether every client has a store of its own.
    """

    sizes: list[int]
    side: int = 6
    classes: int = 4
    heldout: list[int] = field(default_factory=list)
    apart: bool = False

    def load(self, seed: int) -> Dataset:
        g = torch.Generator().manual_seed(seed)
        held, parts = self.heldout or [5] * len(self.sizes), []
        for i, n in enumerate(a + b for a, b in zip(self.sizes, held, strict=True)):
            y = torch.randint(max(self.classes - i % 2, 2), (n,), generator=g)
            x = torch.randint(180, (n, 1, self.side, self.side), generator=g)
            x[torch.arange(n), 0, y % self.side] += 70
            parts.append(Split(x.to(torch.uint8), y if self.classes else x.double().mean((1, 2, 3)) / 100))
        x, y = torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts])
        shards, place = [], 0
        for part, n in zip(parts, self.sizes, strict=True):
            rows = torch.arange(len(part)) if self.apart else torch.arange(place, place + len(part))
            store = (part.x, part.y) if self.apart else (x, y)
            shards.append((Shard(*store, rows[:n].flip(0)), Shard(*store, rows[n:])))
            place += len(part)
        test = Split(x[:20], y[:20])
        names = tuple(map(str, range(self.classes)))
        return Dataset("pictures", test, test, names, (0.4,), (0.3,), clients=Owners(tuple(shards)))


class Net(Classifier):
    """A small network.

    Args:
        input_shape: ``(1, side, side)``.
        num_classes: Outputs; for targets that are numbers, 1.
        kind: What it is made of.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, kind: str = "tanh") -> None:
        side = input_shape[-1]
        conv, flat = nn.Conv2d(1, 4, 3, padding=1), 4 * (side // 2) ** 2
        pool: list[nn.Module] = [nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()]
        made: dict[str, tuple[list[nn.Module], int]] = {
            "linear": ([nn.Flatten()], side**2),
            "tanh": ([nn.Flatten(), nn.Linear(side**2, 8), nn.Tanh()], 8),
            "average": ([conv, *pool], flat),
            "group": ([conv, nn.GroupNorm(2, 4), *pool], flat),
            "layer": ([conv, *pool, nn.LayerNorm(flat)], flat),
            "batch": ([conv, nn.BatchNorm2d(4), *pool], flat),
            "relu": ([nn.Flatten(), nn.Linear(side**2, 8), nn.ReLU()], 8),
        }
        features, width = made[kind]
        super().__init__(nn.Sequential(*features), width, max(num_classes, 1))


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(input_shape[-1], 5, batch_first=True), nn.Linear(5, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.cell(x[:, 0])[0][:, -1])
        return out


def config(
    values: Mapping[str, Any] | None = None,
    *choices: str,
    recipes: Sequence[Any] = (),
    kind: str = "tanh",
    **data: Any,
) -> dict[str, Any]:
    """A config of unequal clients in float64, all of which take part; recipes are instances of halves of this file."""
    data = {"sizes": SIZES, **data}
    nodes = {type(r).__name__.lower(): node(r) for r in recipes}
    own: dict[str, Any] = {
        "data": {"_target_": f"{__name__}.Pictures", "augment": [], "validation": 0.0}
        | {k: [*v] if isinstance(v, tuple) else v for k, v in data.items()},
        "model": {"_target_": f"{__name__}.Net", "kind": kind, "weights": None},
        "participation": {"_target_": "fedsim.clients.participation.All"},
        "precision": "float64",
        "client.batch_size": 8,
        "client.batching": 3,
        "recipe": nodes,
        **(values or {}),
    }
    return configure(choices, own)


def experiment(values: Mapping[str, Any] | None = None, *choices: str, **options: Any) -> Experiment:
    """The experiment of such a config; augmentations are also for a population with data of its own."""
    given = dict(values or {})
    augment = tuple(given.pop("data.augment", ()))
    exp = build(config(given, *choices, **options))
    exp.program.options = replace(exp.program.options, augment=augment)
    return exp


def node(half: Any) -> dict[str, Any]:
    """The config of an instance of a half of this file, or of `tests.helpers`."""
    return {"_target_": f"{type(half).__module__}.{type(half).__name__}", **vars(half)}


# --- one visit, both ways ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Visits:
    """Some clients' visits, one by one and together.

    Attributes:
        alone: What each one's visit gave.
        together: What their common visit gave.
    """

    alone: list[tuple[list[Done], dict[str, Entry]]]
    together: tuple[list[Done], dict[str, Entry]]

    def gap(self) -> float:
        """The largest difference between numbers of the two; all else is checked to be equal."""
        return max(self.gaps())

    def gaps(self) -> list[float]:
        """The largest difference of every client."""
        found = []
        made, entries = self.together
        for i, ((done,), own) in enumerate(self.alone):
            apart = [0.0]
            assert own.keys() == entries.keys()
            for name, entry in own.items():
                other = entries[name]
                assert (entry.kind, entry.nbytes) == (other.kind, other.nbytes)
                apart += differences(entry.value[0], other.value[i])
                if entry.weight is not None and other.weight is not None:
                    apart += differences(entry.weight[0], other.weight[i if len(other.weight) > 1 else 0])
            new = made[i]
            assert done.memory.keys() == new.memory.keys()
            for name, row in done.memory.items():
                apart += differences(row, new.memory[name])
            booked = [(d.steps, d.examples, d.gradients, d.scored, d.num_examples) for d in (done, new)]
            assert booked[0] == booked[1]
            found.append(max(*apart, abs(done.loss - new.loss) / max(done.scored, 1)))
        assert len(made) == len(self.alone)
        return found

    def moved(self) -> float:
        """How far the client that moved least went."""
        (entries,) = [[own["delta"].value for _, own in self.alone]]
        return min(float(v.abs().max()) for v in entries)


def differences(a: Any, b: Any) -> list[float]:
    """Of two trees of tensors, which must be of one form."""
    ours, theirs = [*tensors_in(a)], [*tensors_in(b)]
    assert [(t.shape, t.dtype) for t in ours] == [(t.shape, t.dtype) for t in theirs]
    return [float((x.double() - y.double()).abs().max()) for x, y in zip(ours, theirs, strict=True) if x.numel()]


def payload(exp: Experiment) -> dict[str, Any]:
    """What goes down, with other numbers in it than zeros."""
    network = exp.program.network
    g = torch.Generator().manual_seed(3)
    sent = exp.program.strategy.broadcast(exp.program.strategy.init(exp.info, network.initial))
    plain = {k: v.value if isinstance(v, Sized) else v for k, v in sent.items()}
    noisy = {k: v + 0.01 * torch.randn(v.shape, generator=g).to(v) for k, v in plain.items() if isinstance(v, Tensor)}
    if network.buffer_layout.d:
        noisy["buffers"] = network.initial_buffers + 0.1
    return {**plain, **noisy}


def warmed(exp: Experiment, sent: Mapping[str, Any], visits: Mapping[int, int]) -> dict[int, dict[str, Tensor]]:
    """What clients remember after visits of so many steps, one by one: they then stand at different places."""
    worker, rows = Worker(exp.program), dict[int, dict[str, Tensor]]()
    for client, steps in visits.items():
        if steps:
            outcome = worker.run(Task((client,), (1,), sent, 1, ({},), steps=steps))
            rows[client] = outcome.done[0].memory  # type: ignore[union-attr]
    return rows


def visits(
    exp: Experiment,
    clients: Sequence[int] | None = None,
    memory: Mapping[int, dict[str, Tensor]] | None = None,
    unicast: Mapping[str, Any] | None = None,
    steps: int | None = STEPS,
    **task: Any,
) -> Visits:
    """A visit of the clients one by one, and together, from equal inputs."""
    torch.set_num_threads(1)
    program, sent = exp.program, payload(exp)
    clients = range(len(program.clients)) if clients is None else clients
    rows = tuple((memory or {}).get(c, {}) for c in clients)
    whole = Task(tuple(clients), (2,) * len(clients), sent, 2, rows, dict(unicast or {}), steps=steps, **task)
    worker = Worker(program)
    lead = {k: v.unsqueeze(0) if isinstance(v, Tensor) else v for k, v in sent.items() if k != "buffers"}
    with random.torch_seeded(0, "test"):
        alone = [worker._visit(program, whole, i, i + 1, lead) for i in range(len(clients))]
        together = worker._visit(program, whole, 0, len(clients), lead)
    return Visits(alone, together)


WARM = {0: 3, 1: 0, 2: 5, 3: 1, 4: 0}  # steps that the clients have made before: their epochs have 3, 1, 6, 2, 4


def agree(exp: Experiment, bound: float = EXACT, **options: Any) -> Visits:
    """Checks one visit of lanes at different stream positions; some clients come for the first time."""
    both = visits(exp, memory=warmed(exp, payload(exp), WARM), **options)
    assert both.gap() < bound
    return both


SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"client.momentum": 0.0},
    "momentum": {},
    "nesterov": {"client.nesterov": True},
    "weight decay": {"client.weight_decay": 0.05},
    "clipping": {"client.clip_norm": 0.1},
    "adam": {"client.optimizer": "adam", "client.momentum": 0.0, "client.lr": 0.01},
    "adamw": {"client.optimizer": "adamw", "client.momentum": 0.0, "client.lr": 0.01, "client.weight_decay": 0.1},
    "adagrad": {"client.optimizer": "adagrad", "client.momentum": 0.0, "client.weight_decay": 0.01},
    "kept momentum": {"client.keep_optimizer": True},
    "kept adam": {
        "client.keep_optimizer": True,
        "client.optimizer": "adam",
        "client.momentum": 0.0,
        "client.lr": 0.01,
    },
    "drop_last": {"client.drop_last": True},
    "full batches": {"client.batch_size": None},
    "batches of one": {"client.batch_size": 1},
    "batches larger than a client": {"client.batch_size": 25},
    "lr_decay": {"client.lr_decay": 0.5},
    "flip": {"data.augment": ["flip"]},
    "flip and crop": {"data.augment": ["flip", "crop"]},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["tanh", "average"])
def test_twenty_steps_together_are_those_of_each_client_alone(setting: str, kind: str) -> None:
    both = agree(experiment(SETTINGS[setting], kind=kind))
    assert both.moved() > 1e-3


@pytest.mark.parametrize("setting", ["momentum", "drop_last", "full batches", "flip and crop"])
def test_three_epochs_of_unequal_clients_are_those_of_each_client_alone(setting: str) -> None:
    both = agree(experiment(SETTINGS[setting]), steps=None, epochs=3)
    made = [done.steps for done in both.together[0]]
    assert len(set(made)) == 1 if setting == "full batches" else len(set(made)) > 3


@pytest.mark.parametrize("kind", ["linear", "group", "layer", "relu"])
@pytest.mark.parametrize("apart", [False, True], ids=["one store", "own stores"])
def test_every_kind_of_network_and_store(kind: str, apart: bool) -> None:
    agree(experiment(kind=kind, apart=apart))
    agree(experiment(kind=kind, apart=apart, classes=0))


def test_long_visits_are_planned_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.clients.lanes.PLANNED", 7)
    agree(experiment())
    agree(experiment({"client.keep_optimizer": True}), steps=None, epochs=4)


@pytest.mark.parametrize("buffers", ["mean", "local", "frozen"])
@pytest.mark.parametrize("size", [8, None])
def test_batch_norms_have_the_statistics_of_each_client_alone(buffers: str, size: int | None) -> None:
    # 20 = 8 + 8 + 4: the last batch of an epoch is a partial one, of all clients at once.
    exp = experiment({"client.buffers": buffers, "client.batch_size": size}, kind="batch", sizes=(20, 20, 20))
    both = visits(exp, steps=None, epochs=4, memory=warmed(exp, payload(exp), {0: 3, 1: 0, 2: 6} if size else {0: 2}))
    assert both.gap() < EXACT
    assert both.moved() > 1e-3
    statistics = [done.memory.get("buffers.local", own.get("buffers")) for (done,), own in both.alone]
    assert (statistics[0] is None) == (buffers == "frozen")
    if buffers == "local":
        assert isinstance(statistics[0], Tensor) and isinstance(statistics[1], Tensor)
        assert float((statistics[0] - statistics[1]).abs().max()) > 1e-3


def test_batch_norms_of_finished_clients_rest() -> None:
    # Batches of four without padding, in 5, 2 and 3 steps.
    exp = experiment({"client.buffers": "local", "client.batch_size": 4}, kind="batch", sizes=(20, 8, 12))
    assert visits(exp, steps=None, epochs=2).gap() < EXACT


def test_batch_norms_refuse_batches_of_different_sizes() -> None:
    exp = experiment({"client.batch_size": 8}, kind="batch", sizes=(20, 12))
    with pytest.raises(ClientError, match=r"batch norm .*cannot train on batches of different sizes.*batching=off"):
        visits(exp)


@pytest.mark.parametrize("buffers", ["mean", "frozen"])
@pytest.mark.parametrize("half", ["other points, batches and halves, and a teacher", "a schedule with gradients"])
def test_gradients_and_teachers_see_a_batch_norm_in_its_mode(buffers: str, half: str) -> None:
    values = {"strategy": node(HALVES[half]), "client.batch_size": 5, "client.buffers": buffers}
    exp = experiment(values, kind="batch", sizes=(20, 20, 20))
    assert visits(exp).gap() < EXACT


def test_frozen_batch_norms_take_batches_of_any_size() -> None:
    agree(experiment({"client.buffers": "frozen"}, kind="batch"))


# --- hooks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Personal(FedAvg):
    """Heads that clients keep; each starts from its own numbers."""

    own: bool = True

    def parts(self, layout: Layout) -> dict[str, str]:
        return {"head.": "private"}

    def memory(self, local: Local) -> dict[str, Tensor]:
        if not self.own:
            return {}
        n = local.layout.size("head.")
        drawn = [torch.randn(n, generator=g, dtype=torch.float64) for g in local.generator("private")]
        return {"private": torch.stack(drawn)}

    def work(self, local: Local) -> Tensor:
        w = local.train(local.start, only="head.", epochs=1, stream="head")
        return local.train(w)


@dataclass(frozen=True)
class Mirrored(FedAvg):
    """Memory of the size of the model, of a second model trained beside the first, and one number."""

    def memory(self, local: Local) -> dict[str, Tensor]:
        return {"v": local.start, "h": torch.zeros_like(local.start), "count": torch.zeros(1, 1)}

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        return grad(w) + 0.1 * (local.memory.h + w - local.start)

    def work(self, local: Local) -> Tensor:
        local.memory.v = local.train(local.memory.v, half=helpers.Prox(0.5), stream="second", steps=7)
        w = local.train(local.start)
        local.memory.h = local.memory.h + (w - local.start)
        local.memory.count = local.memory.count + local.num_examples
        return w


@dataclass(frozen=True)
class Probing(FedAvg):
    """Gradients at other points, on other batches, of another half, inside and outside of steps; a teacher."""

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        there = grad(local.start + 0.1)
        few = local.take(torch.arange(3).expand(len(local.clients), 3))
        return (
            grad(w)
            + 0.5 * there
            + 0.1 * grad(w, few)
            + 0.1 * grad(w, None, Squared())
            + 0.1 * grad(w, local.examples())
        )

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        z, teacher = model(batch.x), local.at(local.start - 0.1)(batch.x)
        distance: Tensor = (z.softmax(-1) - teacher.softmax(-1)).square().sum(-1)
        return local.task_loss(z, batch.y) + distance

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        return {**super().finish(w, local), "g": stack(local.grad(w, local.examples()))}


@dataclass(frozen=True)
class Squared(ClientHalf):
    """An objective per batch and not per example, ``[C]``."""

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        penalty = torch.stack([v.flatten(1).square().sum(1) for v in model.views.values()]).sum(0)
        return batch.mean(local.task_loss(model(batch.x), batch.y)) + 0.05 * penalty


@dataclass(frozen=True)
class PerBatch(FedAvg):
    """FedAvg on `Squared`."""

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        return Squared().loss(model, batch, local)


@dataclass(frozen=True)
class Averaging(FedAvg):
    """Steps whose average is sent: state of the visit that must rest with a finished lane."""

    def update(self, w: Tensor, d: Tensor, local: Local) -> Tensor:
        w = local.optimizer(w, d)
        mean_w, count = local.scratch.get("mean", (torch.zeros_like(w), 0.0 * w[:, :1]))
        count = count + local.active
        local.scratch["mean"] = torch.where(local.active, mean_w + (w - mean_w) / count.clamp(min=1), mean_w), count
        return w

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        return {**super().finish(w, local), "mean": mean(local.scratch["mean"][0], local.scratch["mean"][1])}


@dataclass(frozen=True)
class Choosing(FedAvg):
    """Trains odd clients only, then all of them, on one stream, and on one that only odd clients know."""

    def work(self, local: Local) -> Tensor:
        odd = torch.tensor([[c % 2 == 1] for c in local.clients])
        w = local.train(local.start, active=odd, steps=3)
        w = local.train(w, active=odd, steps=2, stream="odd")
        none = torch.zeros_like(odd)
        w = local.train(w, active=none, steps=2, stream="nobody")
        return local.train(w, active=torch.ones(1, 1, dtype=torch.bool))


@dataclass(frozen=True)
class Nested(FedAvg):
    """Trains something else inside of a step, for which its data are prepared anew."""

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        inner = local.train(w, half=Halved(), epochs=1, stream="inner", only="head.")
        return grad(w) + 0.1 * (w - inner)


@dataclass(frozen=True)
class Halved(ClientHalf):
    """A schedule by position: of the learning rate, and of the batch size."""

    period: int = 3

    def schedule(self, local: Local) -> dict[str, Any]:
        step = torch.as_tensor(local.step)
        return {"lr": 1 / (1.0 + step % self.period).double(), "batch_size": 3 + step % self.period}


@dataclass(frozen=True)
class Scheduled(FedAvg):
    """`Halved` with a gradient taken between steps, and a count of the calls."""

    def memory(self, local: Local) -> dict[str, Tensor]:
        return {"calls": torch.zeros(1, 1)}

    def schedule(self, local: Local) -> dict[str, Any]:
        full = local.grad(local.start, local.examples()).norm(dim=-1, keepdim=True)
        local.memory.calls = local.memory.calls + torch.where(local.active, 1.0 + local.lr, 0.0)
        return {"lr": 1 / (1 + full), "batch_size": 3 + torch.as_tensor(local.step) % 4}


@dataclass(frozen=True)
class Sized4(ClientHalf):
    """A batch size for all."""

    def schedule(self, local: Local) -> dict[str, Any]:
        return {"batch_size": 4}


@dataclass(frozen=True)
class Facts(FedAvg):
    """Sends what a hook sees of its client."""

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        sizes = torch.as_tensor(local.n).reshape(-1, 1)
        facts = [local.num_examples, torch.as_tensor(local.steps).reshape(-1, 1), local.lr_sum, sizes]
        facts += [torch.as_tensor(local.steps_per_epoch).reshape(-1, 1), local.mean_loss.double().reshape(-1, 1)]
        drawn = [torch.rand(2, generator=g) for g in local.generator("facts", 1)]
        return {
            **super().finish(w, local),
            "facts": stack(torch.cat([f.double() for f in facts], 1)),
            "counts": stack(local.class_counts),
            "drawn": stack(torch.stack(drawn)),
            "first": stack(local.take(torch.zeros(len(local.clients), 1, dtype=torch.int64)).x),
        }


@dataclass(frozen=True)
class Jitter(ClientHalf):
    """A batch hook that draws by position in the stream, and leaves some examples out."""

    def batch(self, batch: Batch, local: Local) -> Batch:
        drawn = [torch.rand(1, generator=g, dtype=torch.float64) for g in local.stream_generator("jitter")]
        batch.x = batch.x * (1 + torch.stack(drawn)[:, :, None, None, None])
        batch.keep = batch.keep & (batch.index != 2)
        batch.weight = 1.0 + (batch.index % 3).double()
        return batch


HALVES: dict[str, Any] = {
    "private parts": Personal(own=False),
    "private parts of their own": Personal(),
    "memory and a second stream": Mirrored(),
    "other points, batches and halves, and a teacher": Probing(),
    "a loss per batch": PerBatch(),
    "scratch of active lanes": Averaging(),
    "active lanes": Choosing(),
    "training inside of a step": Nested(),
    "a schedule with gradients": Scheduled(),
    "facts": Facts(),
    "frozen parts": helpers.Frozen(),
    "two heads": helpers.Heads(),
    "steps of its own": helpers.Halving(),
    "a second model": helpers.Ditto(),
}


@pytest.fixture(autouse=True)
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What test-only halves noted."""
    monkeypatch.setattr("fedsim.run.Driver._draw", lambda *_: None)  # a third of the time of a small run
    helpers.SEEN.clear()
    yield helpers.SEEN
    helpers.SEEN.clear()


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("work", ["steps", "epochs"])
def test_hooks_do_for_several_clients_what_they_do_for_each(half: str, work: str) -> None:
    exp = experiment({"strategy": node(HALVES[half]), "client.weight_decay": 0.01})
    memory = warmed(exp, payload(exp), {0: 3, 1: 0, 2: 5, 3: 1, 4: 2})
    both = visits(exp, memory=memory, steps=STEPS if work == "steps" else None)
    assert both.gap() < EXACT
    assert both.moved() > 1e-3


@pytest.mark.parametrize("recipe", [Jitter(), Halved(), Sized4(), helpers.Scaled(3.0), helpers.Steeper(2.0)])
def test_recipes_do_for_several_clients_what_they_do_for_each(recipe: ClientHalf) -> None:
    agree(experiment(recipes=[recipe]))
    agree(experiment({"client.drop_last": True}, recipes=[recipe], kind="average"), steps=None, epochs=2)


def test_data_that_are_prepared_inside_of_a_step_do_not_disturb_it() -> None:
    # Two steps use few of the examples, which stay as they are in the store; the epoch inside of them uses all.
    assert visits(experiment({"strategy": node(Nested())}), steps=2).gap() < EXACT


def test_labels_of_clients_with_equally_many_examples_stand_side_by_side() -> None:
    @dataclass(frozen=True)
    class Labels(FedAvg):
        def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
            return {**super().finish(w, local), "y": stack(local.y)}

    assert visits(experiment(sizes=(9, 9)), half=Labels()).gap() < EXACT


def test_a_penalty_on_the_parameters_and_targets_that_are_numbers() -> None:
    agree(experiment({"strategy": node(helpers.Ridge()), "client.lr": 0.005}, classes=0))


def test_a_phase_has_its_own_half_stream_and_payload() -> None:
    exp = experiment()
    both = visits(exp, half=helpers.Explorer(2), phase="explore", steps=None)
    assert both.gap() < EXACT
    assert "stream.explore" in both.together[0][0].memory


def test_each_lane_has_what_was_sent_to_it_alone() -> None:
    @dataclass(frozen=True)
    class Told(FedAvg):
        def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
            own: Tensor = local.sent.rate * local.sent.pair[0] + local.sent.named["bias"] * local.sent.few[:, :1]
            return grad(w) + own

    exp = experiment()
    g, d, lanes = torch.Generator().manual_seed(1), exp.program.layout.d, len(SIZES)

    def draw(size: int) -> Tensor:
        return torch.randn(lanes, size, generator=g, dtype=torch.float64)

    unicast = {
        "w": [*(exp.program.network.initial + 0.1 * draw(d))],
        "rate": [0.1, 0.2, 0.3, 0.4, 0.5],
        "pair": [(a, b) for a, b in zip(draw(d), draw(1), strict=True)],
        "named": [{"bias": b} for b in draw(1)],
        "few": [*draw(2)],
    }
    both = visits(exp, unicast=unicast, half=Told())
    assert both.gap() < EXACT
    starts = {round(float(own["delta"].value.sum()), 6) for _, own in both.alone}
    assert len(starts) == lanes


def test_memory_that_another_phase_keeps_of_some_clients_stays_as_it_is() -> None:
    exp = experiment()
    memory = {0: {"strategy.tally": torch.ones(1)}, 3: {"strategy.tally": torch.ones(1) * 4}}
    both = visits(exp, memory=memory)
    assert both.gap() < EXACT
    assert [("strategy.tally" in done.memory) for done in both.together[0]] == [True, False, False, True, False]


def test_a_client_that_has_memory_stands_beside_one_that_has_none() -> None:
    exp = experiment({"strategy": node(Mirrored()), "client.keep_optimizer": True})
    memory = warmed(exp, payload(exp), {1: 2, 3: 9})
    assert visits(exp, memory=memory).gap() < EXACT


def test_lanes_have_no_permutation_in_common_nor_ragged_labels() -> None:
    exp = experiment()
    whole = Task((0, 1), (1, 1), payload(exp), 1, ({}, {}))

    class Asks(ClientHalf):
        def work(self, local: Local) -> Tensor:
            local.permutation(0)
            return local.start

    class Labels(ClientHalf):
        def work(self, local: Local) -> Tensor:
            assert local.y.numel()
            return local.start

    for half, said in ((Asks(), "no common permutation"), (Labels(), "with 7 to 23 examples is ragged")):
        with pytest.raises(ClientError, match=said + r".*client\.batching=off"):
            Worker(exp.program).run(replace(whole, half=half, groups=(2,)))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(data=st.data())
def test_any_sizes_give_the_numbers_of_each_client_alone(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=6), label="examples")
    by_epochs = data.draw(st.booleans(), label="by epochs")
    values = {
        "client.batch_size": data.draw(st.none() | st.integers(1, 12), label="batch size"),
        "client.drop_last": data.draw(st.booleans(), label="drop_last"),
        "client.keep_optimizer": data.draw(st.booleans(), label="keep_optimizer"),
        "data.augment": data.draw(st.sampled_from([[], ["flip"]]), label="augment"),
    }
    exp = experiment(values, sizes=tuple(sizes), heldout=(1,) * len(sizes))
    before = {c: data.draw(st.integers(0, 5), label="steps before") for c in range(len(sizes))}
    clients = sorted(data.draw(st.sets(st.sampled_from(range(len(sizes))), min_size=2), label="clients"))
    memory = warmed(exp, payload(exp), before)
    many = data.draw(st.integers(1, 3 if by_epochs else 12), label="work")
    given = {"steps": None, "epochs": many} if by_epochs else {"steps": many}
    assert visits(exp, clients, memory, **given).gap() < EXACT


# --- float32 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "tanh", "average", "layer"])
def test_networks_without_kinks_agree_in_float32(kind: str) -> None:
    exp = experiment({"precision": "float32", "client.momentum": 0.0}, kind=kind, sizes=tuple(range(20, 40)))
    both = visits(exp)
    assert both.together[1]["delta"].value.abs().max() > 1e-2
    assert both.gap() < 1e-5


@pytest.mark.parametrize("model", ["mlp", "lenet5", pytest.param("cnn", marks=pytest.mark.slow)])
def test_networks_with_kinks_part_in_float32_for_few_clients_only(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # A unit whose input is 0 up to rounding is on in one loop and off in the other: a step of another direction.
    kinds = {"mlp": "MLP", "lenet5": "LeNet5", "cnn": "CNN"}
    network = {"_target_": f"fedsim.models.standard.{kinds[model]}", "weights": None}
    values = {"precision": "float32", "model": network, "client.batch_size": 10, "client.momentum": 0.0}
    exp = experiment(values, sizes=tuple(range(40, 80, 2)), side=28)
    gaps = visits(exp).gaps()
    beyond = sum(gap > 1e-5 for gap in gaps) / len(gaps)
    with capsys.disabled():
        print(f"\n{model}: {beyond:.0%} of {len(gaps)} clients beyond 1e-5, the farthest {max(gaps):.1e}")
    assert beyond < 0.5
    assert max(gaps) < 0.05


# --- whole runs -------------------------------------------------------------------------------------------

ROUNDS: dict[str, Any] = {
    "precision": "float64",
    "client.epochs": None,
    "client.steps": 3,
    "client.batch_size": 40,
    "client.keep_optimizer": True,
    "rounds": 4,
    "eval.every": 2,
    "eval.clients": "all",
}


def content(run: Run) -> dict[str, Tensor]:
    """All numbers that a run leaves."""
    driver = run.driver
    clients = driver.memory.clients()
    rows = dict(zip(map(str, clients), driver.memory.get(clients), strict=True))
    _, tensors = tree.flatten({"state": driver.progress.state, "federation": driver.fed.state(), "rows": rows})
    return {**tensors, "w": run.w}


def near(a: Run, b: Run, bound: float = EXACT) -> None:
    """Checks that two runs agree but for rounding."""
    ours, theirs = content(a), content(b)
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        assert t.dtype == theirs[name].dtype
        assert bool(torch.isclose(theirs[name], t, rtol=bound, atol=bound).all()), name
    for one, other in zip(a.records, b.records, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            exact = not isinstance(value, float)
            assert other[key] == (value if exact else pytest.approx(value, rel=100 * bound, nan_ok=True))


METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "uniform": {"strategy.weights": "uniform"},
    "own models by unicast": {"strategy": node(helpers.OwnModels())},
    "nothing for all": {"strategy": node(helpers.Lean())},
    "phases": {"strategy": node(helpers.Exploring())},
    "phases without training": {"strategy": node(helpers.Anchored())},
    "payloads with sizes": {"strategy": node(helpers.Sends())},
    "the server trains too": {"strategy": node(helpers.ServerToo()), "data.validation": 0.2},
    "another build of the network": {
        "strategy": node(helpers.Pruned()),
        "model.hidden": [12],
        "precision": "float32",
    },
    "events": {"strategy": node(helpers.Async())},
    "draws": {"strategy": node(helpers.Ditto())},
    "fine-tuned personal models": {"strategy": node(helpers.FineTuned()), "eval.finetune_epochs": 1},
    "private heads": {"strategy": node(Personal()), "eval.finetune_epochs": 1},
}


@pytest.mark.parametrize("method", METHODS)
def test_several_rounds_with_some_of_the_clients_agree(method: str, tmp_path: Path) -> None:
    off, on = (drive(configure((), {**ROUNDS, **METHODS[method], "client.batching": n}), tmp_path) for n in ("off", 3))
    near(off, on, EXACT if on.driver.exp.config["precision"] == "float64" else 1e-5)
    assert (off.state_sha256 == on.state_sha256) == (method == "events")  # clients that arrive alone are trained alone


@pytest.mark.parametrize("buffers", ["mean", "local"])
def test_batch_norms_agree_over_several_rounds(buffers: str, tmp_path: Path) -> None:
    values = {"client.buffers": buffers, "rounds": 3, "client.epochs": 2, "client.keep_optimizer": True}
    sizes = (20, 12, 20, 20, 12, 9)
    off, on = (drive(config({**values, "client.batching": n}, kind="batch", sizes=sizes), tmp_path) for n in ("off", 8))
    near(off, on)
    assert off.state_sha256 != on.state_sha256


def test_batch_norms_of_clients_in_mid_epoch_are_trained_alone(tmp_path: Path) -> None:
    # Epochs of 8 + 8 + 4 examples, visits of two steps, not everybody in every round: batches of 8 beside ones of 4.
    some = {"_target_": "fedsim.clients.participation.Fraction", "fraction": 0.5}
    values = {"participation": some, "client.epochs": None, "client.steps": 2, "rounds": 5}
    off, on = (
        drive(config({**values, "client.batching": n}, kind="batch", sizes=(20,) * 6), tmp_path) for n in ("off", 3)
    )
    assert on.state_sha256 == off.state_sha256


@settings(deadline=None, derandomize=True, max_examples=12)
@given(data=st.data())
def test_any_groups_give_the_sums_of_each_client_alone(data: st.DataObject) -> None:
    sizes = tuple(data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=9), label="examples"))
    size = data.draw(st.integers(2, 10), label="group")
    values = {"strategy": node(Mirrored()), "client.steps": data.draw(st.integers(1, 6)), "client.epochs": None}
    runs = []
    for n in ("off", size):
        exp = build(config({**values, "client.batching": n}, sizes=sizes))
        torch.set_num_threads(1)
        runs.append(_round(exp))
    one, other = runs
    assert one.clients == other.clients == tuple(range(len(sizes)))
    assert one.num_examples.tolist() == other.num_examples.tolist() == [*map(float, sizes)]
    torch.testing.assert_close(one["delta"], other["delta"], rtol=EXACT, atol=EXACT)


def _round(exp: Experiment) -> Reduced:
    """The entries of everybody's first visit."""
    engine = InlineEngine(exp.program)
    with TemporaryDirectory() as folder:
        fed = Federation(exp.program, engine, exp.participation, exp.system, Memory(Path(folder), False))
        fed.begin_round(1)
        state = exp.program.strategy.init(exp.info, exp.program.network.initial)
        return fed.train(range(fed.num_clients), state)


@dataclass(frozen=True)
class Rowed(FedAvg):
    """Sends rows that say whose they are, and lists of different lengths."""

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        ids = torch.tensor(local.clients)
        each = [torch.full((c + 1,), float(c)) for c in local.clients]
        return {**super().finish(w, local), "who": stack(ids), "rows": stack(local.delta(w)), "each": concat(each)}

    def step(self, state: State, reduced: Reduced) -> State:
        helpers.SEEN.append(reduced)
        return super().step(state, reduced)


def test_what_came_up_is_in_the_order_of_client_ids(tmp_path: Path, seen: list[Any]) -> None:
    # By the number of steps the order is 2, 4, 0, 3, 1.
    run = drive(config({"strategy": node(Rowed()), "rounds": 1, "client.batching": 2}), tmp_path)
    assert run.driver.exp.program.options.batching == 2
    (reduced,) = seen
    assert reduced.clients == (0, 1, 2, 3, 4)
    assert reduced.num_examples.tolist() == [*SIZES]
    rows = reduced["who"]
    assert rows.tensor().tolist() == [int(rows[i]) for i in range(5)] == [0, 1, 2, 3, 4]
    assert [t.tolist() for t in reduced["each"]] == [[float(c)] * (c + 1) for c in range(5)]
    weights = reduced.num_examples / reduced.num_examples.sum()
    deltas = reduced["rows"]
    for found in (reduced["delta"], deltas.mean(), deltas.combine(weights)):
        torch.testing.assert_close(found, (weights[:, None] * deltas.tensor()).sum(0), rtol=1e-12, atol=1e-14)
    blocks = [block for _, _, block in deltas.columns()]
    assert torch.equal(torch.cat(blocks, 1), deltas.tensor())


# --- evaluation -------------------------------------------------------------------------------------------


def scores(exp: Experiment, mode: str, together: int, rows: Mapping[int, dict[str, Tensor]]) -> list[Score]:
    """Of all clients' held-out examples."""
    torch.set_num_threads(1)
    exp.program.options = replace(exp.program.options, batching=together)
    clients = tuple(range(len(exp.program.clients)))
    memory = tuple(rows.get(c, {}) for c in clients)
    sent = payload(exp)
    epochs = 2 if mode == "finetuned" else None
    found = Worker(exp.program).run(EvalTask("heldout", mode, sent, clients=clients, memory=memory, epochs=epochs))
    assert isinstance(found, list)
    return found


EVALUATED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fedavg": ({}, {}),
    "second models": ({"strategy": node(helpers.Ditto())}, {}),
    "private parts": ({"strategy": node(Personal())}, {}),
    "personal models that are trained": ({"strategy": node(helpers.FineTuned())}, {}),
    "own stores": ({}, {"apart": True}),
    "targets that are numbers": ({}, {"classes": 0}),
    "images": ({}, {"kind": "group"}),
    "local statistics": ({"client.buffers": "local"}, {"kind": "batch", "sizes": (12, 12, 20, 20, 20)}),
    "averaged statistics": ({"client.batch_size": 4}, {"kind": "batch", "sizes": (12, 12, 20, 20, 20)}),
    "two heads": ({"strategy": node(helpers.Heads())}, {}),
}


@pytest.mark.parametrize("mode", ["global", "personal", "finetuned"])
@pytest.mark.parametrize("what", EVALUATED)
def test_models_are_scored_together_as_they_are_alone(what: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.engine.worker.EVAL_BATCH", 9)  # two to five parts
    values, options = EVALUATED[what]
    exp = experiment(values, **{"heldout": (5, 0, 11, 1, 8), **options})
    rows = warmed(exp, payload(exp), {0: 2, 1: 0, 2: 4, 3: 0, 4: 1})
    calls, score_lanes = [], Worker._score_lanes

    def counted(self: Worker, local: Lanes, w: Tensor, shards: Sequence[Shard]) -> list[Score]:
        calls.append(len(shards))
        return score_lanes(self, local, w, shards)

    monkeypatch.setattr(Worker, "_score_lanes", counted)
    alone, together = scores(exp, mode, 1, rows), scores(exp, mode, 3, rows)
    assert sum(calls) >= 2 and max(calls) > 1
    for one, other in zip(alone, together, strict=True):
        assert one.count == other.count
        assert torch.equal(one.confusion, other.confusion)
        assert other.loss == pytest.approx(one.loss, rel=1e-9, abs=1e-9)
    assert [s.count for s in alone] == [5, 0, 11, 1, 8]
    if mode == "personal" and "strategy" in values:
        assert scores(exp, "global", 3, rows)[2].loss != together[2].loss


# --- who is trained together ------------------------------------------------------------------------------


def groups(exp: Experiment, clients: Sequence[int], steps: int | None = None) -> list[tuple[int, ...]]:
    """The groups of a cohort."""
    program = exp.program
    sizes = program.clients.sizes()
    planned = {c: program.options.planned_steps(int(sizes[c])) if steps is None else steps for c in clients}
    return batching.together(program, program.hooks, planned, sizes, steps is None)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=20), most=st.integers(2, 7), data=st.data())
def test_groups_hold_everybody_once_and_those_with_like_work_together(
    sizes: list[int], most: int, data: st.DataObject
) -> None:
    exp = _grouping(most, tuple(sizes))
    cohort = sorted(data.draw(st.sets(st.sampled_from(range(len(sizes))), min_size=1)))
    found = groups(exp, cohort)
    assert sorted(c for group in found for c in group) == cohort
    assert max(map(len, found)) <= most
    assert all(len(group) == 1 for group in found if any(sizes[c] == 0 for c in group))
    steps = [[-(-sizes[c] // 8) for c in group] for group in found]
    flat = [s for group in steps for s in group]
    assert flat == sorted(flat, reverse=True)
    busy = [c for c in cohort if sizes[c]]
    assert len(found) == -(-len(busy) // most) + len(cohort) - len(busy)


def _grouping(most: int, sizes: tuple[int, ...], **options: Any) -> Experiment:
    exp = experiment({"client.batching": most}, **options)
    population = Owners(tuple((Shard(torch.zeros(n), torch.zeros(n), torch.arange(n)),) * 2 for n in sizes))
    exp.program.clients = population
    return exp


def test_clients_of_a_batch_norm_have_batches_of_one_size() -> None:
    # In epochs: equally many examples. In steps, with clients in mid-epoch: batches that divide them, too.
    exp = _grouping(3, (20, 16, 20, 5, 16, 16, 16, 5, 20), kind="batch")
    cohort = range(9)
    assert {frozenset(g) for g in groups(exp, cohort)} == {*map(frozenset, [(0, 2, 8), (1, 4), (5, 6), (3, 7)])}
    by_steps = {frozenset(g) for g in groups(exp, cohort, steps=4)}
    assert by_steps == {*map(frozenset, [(0,), (2,), (8,), (1, 4), (5, 6), (3, 7)])}
    exp.program.options = replace(exp.program.options, buffers="frozen")
    assert [len(g) for g in groups(exp, cohort)] == [3, 3, 3]


# --- clients that stay alone ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backwards(FedAvg):
    """An order of its own."""

    def order(self, local: Local, epoch: int) -> Tensor:
        return torch.arange(local.n).flip(0)[None]


@dataclass(frozen=True)
class Loner(FedAvg):
    """Looks at one client."""

    batched: ClassVar = False

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        return {"delta": mean(local.delta(w) * float(local.n))}


ALONE: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"model": {"_target_": "tests.helpers.Dropped", "weights": None}}, r"random numbers \(dropout\)"),
    "lstm": ({"model": {"_target_": f"{__name__}.Recurrent", "weights": None}}, "the model"),
    "order": ({"strategy": {"_target_": f"{__name__}.Backwards"}}, "Backwards has an `order` of its own"),
    "batched": ({"strategy": {"_target_": f"{__name__}.Loner"}}, "Loner says batched = False"),
    "torch.optim": (
        {
            "client.optimizer": {"_target_": "torch.optim.RMSprop", "_partial_": True},
            "client.momentum": 0.0,
            "client.lr": 0.001,
        },
        "class of torch.optim",
    ),
}


@pytest.mark.parametrize("why", ALONE)
def test_what_cannot_be_batched_is_trained_one_by_one_with_one_reason(
    why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values, said = ALONE[why]
    values = {**values, "rounds": 3, "eval.every": 1, "eval.clients": "all", "eval.finetune_epochs": 1}
    off = drive(config({**values, "client.batching": "off"}), tmp_path)
    caplog.clear()
    on = drive(config({**values, "client.batching": 3}), tmp_path)
    reasons = [r.getMessage() for r in caplog.records if "one by one" in r.getMessage()]
    assert len(reasons) == 1
    assert re.search(r"clients are trained one by one: .*" + said, reasons[0])
    assert (on.state_sha256, on.params_sha256, on.records) == (off.state_sha256, off.params_sha256, off.records)
    assert on.driver.exp.config["client"]["batching"] == "off"


@dataclass(frozen=True)
class LonePhase(ClientHalf):
    """A phase that looks at one client."""

    batched: ClassVar = False

    def work(self, local: Local) -> Tensor:
        assert len(local.clients) == 1
        return local.train(local.start, steps=2 if float(local.n) > 10 else 1)


@dataclass(frozen=True)
class TwoPhases(FedAvg):
    """A phase in which clients stay alone, before one in which they do not."""

    def round(self, fed: Federation, state: State) -> State:
        state = self.step(state, fed.train(fed.sample(), state, half=LonePhase(), phase="lone"))
        return self.step(state, fed.train(fed.sample(), state))

    def work(self, local: Local) -> Tensor:
        helpers.SEEN.append(len(local.clients))
        return super().work(local)


def test_a_phase_may_be_one_by_one_in_a_run_that_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, seen: list[Any]
) -> None:
    on = drive(config({"strategy": node(TwoPhases()), "rounds": 2}), tmp_path)
    assert [r.getMessage() for r in caplog.records if "one by one" in r.getMessage()] == [
        "clients are trained one by one: LonePhase says batched = False"
    ]
    assert sorted(seen) == [2, 2, 3, 3]
    near(drive(config({"strategy": node(TwoPhases()), "rounds": 2, "client.batching": "off"}), tmp_path), on)


# --- the number of clients --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plugin(FedAvg):
    """A user's method that says nothing of several clients."""

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        return 0.5 * grad(w)


@dataclass(frozen=True)
class Declared(Plugin):
    """It says it of itself; its parent still does not."""

    batched: ClassVar = True

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        return super().finish(w, local)


@dataclass(frozen=True)
class ServerOnly(FedAvg):
    """A user's method without a hook of the client."""

    def step(self, state: State, reduced: Reduced) -> State:
        return State((state.w + 0.5 * reduced["delta"]).to(state.w))


def number(values: Mapping[str, Any], **options: Any) -> int:
    """How many clients a config trains together."""
    return experiment({"client.batching": "auto", **values}, **options).program.options.batching


def test_auto_is_for_a_linear_model_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    assert number({}, kind="linear") > 1
    assert number({}, kind="tanh") == number({}, kind="relu") == 1
    for model in ("MLP", "CNN"):
        assert number({"model": {"_target_": f"fedsim.models.standard.{model}", "weights": None}}, side=28) == 1
    assert number({"engine.on_failure": "skip"}, kind="linear") == 1
    assert number({"client.memory_budget": 1}, kind="linear") == 1
    assert number({"client.memory_budget": None}, kind="linear") == number({}, kind="linear")
    assert not caplog.records


def test_auto_takes_only_classes_that_say_so_themselves(caplog: pytest.LogCaptureFixture) -> None:
    for half in (Plugin(), Declared()):
        assert number({"strategy": node(half)}, kind="linear") == 1
        assert number({"strategy": node(half), "client.batching": 3}, kind="linear") == 3
    assert number({"strategy": node(ServerOnly())}, kind="linear") > 1
    assert number({}, kind="linear", recipes=[helpers.Scaled()]) == 1
    assert number({"client.batching": 3}, kind="linear", recipes=[helpers.Scaled()]) == 3
    # Not even a reason is given: who does not ask for it is told nothing.
    assert number({"strategy": node(Loner())}, kind="linear") == 1
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_group_is_as_large_as_the_memory_budget_allows() -> None:
    each = batching.lane_bytes(experiment(kind="linear").program)
    for fit in (1, 2, 4):
        found = number({"client.memory_budget": each * fit + each // 2}, kind="linear")
        assert found == fit
    assert number({"client.memory_budget": 3 * each, "client.batching": 3}, kind="linear") == 3
    with pytest.raises(ConfigError) as caught:
        number({"client.memory_budget": 3 * each - 1, "client.batching": 3}, kind="linear")
    text = str(caught.value)
    assert re.search(r"client\.batching=3 needs about [\d.]+ \w+, client\.memory_budget is \d+: 2 would fit", text)
    assert "set client.batching=2, or raise client.memory_budget" in text
    with pytest.raises(ConfigError, match=r"0 would fit.*set client\.batching=off"):
        number({"client.memory_budget": 10, "client.batching": 2}, kind="linear")


def test_the_estimate_covers_what_a_client_takes() -> None:
    # d parameters, gradients, momentum and so on; and every layer's outputs, which the backward pass needs.
    program = experiment(kind="tanh", side=6).program
    d, outputs = 36 * 8 + 8 + 8 * 4 + 4, 36 + 36 + 8 + 8 + 4
    assert program.layout.d == d
    assert batching._outputs(program) == outputs
    assert batching.lane_bytes(program) >= 8 * (5 * d + 2 * 8 * outputs)
    wide = experiment({"client.batch_size": 80}, kind="tanh").program
    assert batching.lane_bytes(wide) - batching.lane_bytes(program) == 3 * 72 * outputs * 8


@pytest.mark.parametrize(
    ("given", "got"), [("0", "0"), ("-1", "-1"), ("1.5", "1.5"), ("on", "'on'"), ("atuo", "'atuo'"), ("true", "true")]
)
def test_other_values_are_refused_in_one_line(given: str, got: str, fedsim: Fedsim) -> None:
    outcome = fedsim(f"client.batching={given}", "--dry-run")
    assert outcome.status == 2
    assert outcome.line.startswith("fedsim: client.batching must be auto, off, or a number of clients, at least 1")
    assert outcome.line.endswith(f"got {got}")


def test_a_number_needs_runs_that_leave_nobody_out(fedsim: Fedsim) -> None:
    outcome = fedsim("client.batching=4", "engine.on_failure=skip", "--dry-run")
    assert outcome.status == 2
    assert "set client.batching=off with engine.on_failure=skip" in outcome.line


def test_off_in_a_file_is_off_though_yaml_reads_a_flag() -> None:
    assert yaml.safe_load("batching: off")["batching"] is False
    exp = experiment({"client.batching": False})
    assert exp.program.options.batching == 1
    assert exp.config["client"]["batching"] == "off"
    assert load_text(dump(exp.config))["client"]["batching"] == "off"


def load_text(text: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(text)
    return read


LOGREG = ("data=digits", "model=logreg", "partition.num_clients=12", "client.epochs=1", "tracker=[jsonl]")


def test_the_resolved_number_is_stored_and_kept(tmp_path: Path) -> None:
    for asked, stored in (("auto", batching.DENSE), ("5", 5), ("off", "off")):
        result = simulate([*LOGREG, "rounds=1", f"client.batching={asked}", f"run_dir={tmp_path}/{asked}"])
        assert load(result.run_dir / "config.yaml")["client"]["batching"] == stored
        again = simulate([f"resume={result.run_dir}", "rounds=2"])
        assert again.summary["rounds"] == 2
        assert load(again.run_dir / "config.yaml")["client"]["batching"] == stored


def test_a_dry_run_and_a_config_are_shown(fedsim: Fedsim) -> None:
    for asked, resolved in (("auto", str(batching.DENSE)), ("7", "7"), ("off", "'off'")):
        shown = fedsim(*LOGREG, f"client.batching={asked}", "--cfg")
        assert shown.status == 0 and f"  batching: {resolved}\n" in shown.out
        assert fedsim(*LOGREG, f"client.batching={asked}", "--dry-run").status == 0


# --- the same bits ----------------------------------------------------------------------------------------

TOGETHER: dict[str, Any] = {
    "participation": {"_target_": "fedsim.clients.participation.Fraction", "fraction": 0.8},
    "client.batching": 2,
    "eval.every": 2,
    "eval.clients": "all",
    "checkpoint.every": 1,
}


def test_bits_do_not_depend_on_how_a_cohort_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for size in (32, 3, 1):
        monkeypatch.setattr(federation, "PIECE", size)
        runs.append(drive(configure(("strategy=scaffold",), {**TOGETHER, "eval.every": 1000}), tmp_path))
    assert len({run.state_sha256 for run in runs}) == 1
    assert runs[0].records == runs[1].records == runs[2].records


@pytest.mark.parametrize("strategy", ["scaffold", pytest.param("fednova", marks=pytest.mark.slow)])
def test_ray_gives_the_bits_of_one_process(strategy: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    inline = drive(configure((f"strategy={strategy}",), TOGETHER), tmp_path)
    workers = {"engine.workers": 2, "engine.cpus_per_worker": 1}
    with sessions.kept():
        ray = drive(configure((f"strategy={strategy}", "engine=ray"), {**TOGETHER, **workers}), tmp_path)
    assert (inline.state_sha256, inline.params_sha256) == (ray.state_sha256, ray.params_sha256)
    assert inline.records == ray.records
    assert [*read(inline.result.run_dir / "visits.csv")] == [*read(ray.result.run_dir / "visits.csv")]


def test_a_run_that_is_resumed_has_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    values = {**TOGETHER, "rounds": 4, "client.keep_optimizer": True, "client.epochs": None, "client.steps": 3}
    whole = drive(configure(("strategy=scaffold",), values), tmp_path / "whole")
    with pytest.raises(Interrupted):
        drive(configure(("strategy=scaffold",), {**values, "tracker.recorder.kill_at": 3}), tmp_path / "cut")
    (found,) = (path.parent for path in (tmp_path / "cut").rglob("config.yaml"))
    resumed = drive(configure(("strategy=scaffold",), values), tmp_path, resume=found)
    assert resumed.state_sha256 == whole.state_sha256
    assert resumed.records == whole.records[2:]


def test_a_visit_in_a_group_is_replayed_to_the_recorded_bits(tmp_path: Path) -> None:
    result = simulate([*LOGREG, "strategy=scaffold", "client.batching=3", "rounds=4", f"run_dir={tmp_path}"])
    visited = [record for record in read(result.run_dir / "visits.csv") if record.round == 4]
    assert len({record.entries for record in visited}) == 12
    for record in visited[::4]:
        (again,) = replay(result.run_dir, record.round, record.client)
        assert (again.entries, again.memory) == (record.entries, record.memory)
        assert again.same
        assert len(again.outcome.done) == 3


# --- errors -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exploding(ClientHalf):
    """A loss that is NaN for one client at one step of its stream."""

    client: int
    step: int = 2

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        mine = torch.tensor([[c == self.client] for c in local.clients])
        return local.loss(model, batch) * torch.where(mine & (torch.as_tensor(local.step) == self.step), math.nan, 1.0)


@dataclass(frozen=True)
class Refusing(FedAvg):
    """A hook that raises for one client, in the round's order late in its group."""

    client: int = 1
    where: str = "direction"

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        self._ask("direction", local)
        return grad(w)

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        self._ask("finish", local)
        infinite = torch.tensor([[self.where == "entry" and c == self.client] for c in local.clients])
        return {"delta": mean(torch.where(infinite, math.inf, local.delta(w)))}

    def _ask(self, where: str, local: Local) -> None:
        if where == self.where and self.client in local.clients:
            raise ArithmeticError("it does not like it")


@pytest.mark.parametrize("client", [0, 1, 3])
def test_a_loss_that_is_not_finite_names_the_client(client: int, tmp_path: Path) -> None:
    with pytest.raises(ClientError) as caught:
        drive(config({"rounds": 2, "client.epochs": 3}, recipes=[Exploding(client)]), tmp_path)
    planned = 3 * -(-SIZES[client] // 8)
    said = rf"round 1, client {client} \(seed 0\): .*loss became nan at local step 3 of {planned} \(lr 0.05\); lower "
    assert re.search(said, str(caught.value))
    assert caught.value.visit is not None and caught.value.visit["client"] == client


def test_a_loss_that_nobody_steps_along_may_be_anything(tmp_path: Path) -> None:
    # Client 1 makes one step, and is then at step 1 while the others go on.
    run = drive(config({"rounds": 1}, recipes=[Exploding(1, step=1)]), tmp_path)
    assert math.isfinite(run.records[0]["train_loss"])
    assert bool(run.w.isfinite().all())


@pytest.mark.parametrize("where", ["direction", "finish", "entry"])
@pytest.mark.parametrize("client", [0, 1, 4])
def test_a_hook_that_raises_for_one_client_names_it(where: str, client: int, tmp_path: Path) -> None:
    texts = []
    for n in (5, "off"):
        with pytest.raises(ClientError) as caught:
            values = {"strategy": node(Refusing(client=client, where=where)), "client.batching": n}
            drive(config(values), tmp_path)
        assert caught.value.visit is not None and caught.value.visit["client"] == client
        texts.append(str(caught.value).split("\n")[0])
    assert texts[0] == texts[1]
    assert f"round 1, client {client} (seed 0)" in texts[0]
    assert ("entry 'delta' is not finite" if where == "entry" else "ArithmeticError: it does not like it") in texts[0]


@dataclass(frozen=True)
class Lonely(FedAvg):
    """Written for one client, and does not say so."""

    how: str = "float"

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        if self.how == "float":
            return {"delta": mean(local.delta(w) * float(local.n))}
        return {**super().finish(w, local), "first": stack(w[:1]) if self.how == "row" else concat([w[:1]])}


@pytest.mark.parametrize("how", ["float", "row", "list"])
def test_a_hook_for_one_client_is_told_what_to_do(how: str, tmp_path: Path) -> None:
    with pytest.raises(ClientError) as caught:
        drive(config({"strategy": node(Lonely(how=how))}), tmp_path)
    line = str(caught.value).split("\n")[0]
    assert line.endswith(
        "alone none of these clients raises: a hook may be written for one client at a time; set client.batching=off"
    )


@dataclass(frozen=True)
class Ragged(FedAvg):
    """Remembers a number per example: of other shapes from client to client, from the second round on."""

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        if len(local.clients) == 1:
            local.memory.own = torch.zeros(1, local.n)
        return super().finish(w, local)


def test_memory_of_different_shapes_says_what_to_do() -> None:
    exp = experiment({"strategy": node(Ragged())})
    memory = warmed(exp, payload(exp), {0: 1, 1: 1, 2: 1})
    assert {len(row["strategy.own"]) for row in memory.values()} == {23, 7, 41}
    whole = Task((0, 1, 2), (2, 2, 2), payload(exp), 2, tuple(memory.values()), groups=(3,))
    with pytest.raises(ClientError) as caught:
        Worker(exp.program).run(whole)
    line = str(caught.value)
    assert "clients remember different shapes as memory.own" in line
    assert "client.batching=off" in line and "\n" not in line


def test_memory_of_another_shape_than_its_first_value_says_what_to_do() -> None:
    exp = experiment({"strategy": node(Mirrored())})
    whole = Task((0, 1), (2, 2), payload(exp), 2, ({"strategy.count": torch.zeros(5)}, {}), groups=(2,))
    with pytest.raises(ClientError, match=r"different shapes as memory\.count.*client\.batching=off"):
        Worker(exp.program).run(whole)


class Tangled(ClientHalf):
    """Trains on the stream of the step that is under way."""

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        return grad(w) + 0.0 * (local.train(w, half=ClientHalf(), steps=1) if len(local.clients) > 1 else w)


def test_a_stream_is_not_trained_on_inside_of_its_own_steps() -> None:
    exp = experiment()
    whole = Task((0, 1), (1, 1), payload(exp), 1, ({}, {}), groups=(2,), half=Tangled())
    with pytest.raises(ClientError, match=r"on the stream of the step that it is called from.*client\.batching=off"):
        Worker(exp.program).run(whole)


@dataclass(frozen=True)
class Greedy(FedAvg):
    """Wants more memory than there is."""

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        if len(w) > 2:
            torch.empty(2**60, dtype=torch.uint8)
        return grad(w)


@pytest.mark.parametrize(
    ("n", "said"), [(5, "about 2 would fit: set client.batching=2"), (3, "set client.batching=off")]
)
def test_running_out_of_memory_says_what_would_fit(n: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(ClientError) as caught:
        drive(config({"strategy": node(Greedy()), "client.batching": n}), tmp_path)
    assert f"out of memory with {n} clients trained together; {said}" in str(caught.value)
    drive(config({"strategy": node(Greedy()), "client.batching": 2, "rounds": 1}), tmp_path)


# --- networks that are easily computed wrongly ------------------------------------------------------------

ODD = ("Hooked", "Optional", "Alias", "Adds", "Modes", "Centred", "Width", "Padded", "Averaging")


@pytest.mark.parametrize("name", ODD)
def test_odd_networks_are_right_or_alone(name: str, tmp_path: Path) -> None:
    words = [*LOGREG, f"model._target_=tests.odd_models.{name}", "precision=float64", "rounds=2", "eval.clients=all"]
    found = [simulate([*words, f"client.batching={n}", f"run_dir={tmp_path}/{n}"]) for n in ("off", "4")]
    alone, together = found
    assert not torch.equal(alone.params, torch.zeros_like(alone.params))
    torch.testing.assert_close(together.params, alone.params, rtol=0, atol=1e-10)
    for key in ("test_loss", "test_accuracy", "train_loss"):
        assert together.metrics[-1][key] == pytest.approx(alone.metrics[-1][key], abs=1e-9)


@dataclass(frozen=True)
class Curriculum(FedAvg):
    """Trains with a half that has an order of its own."""

    def work(self, local: Local) -> Tensor:
        return local.train(local.start, half=helpers.Weighted())


def test_a_half_within_a_visit_is_looked_at_too(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"Weighted has an `order` of its own.*client.batching=off"):
        simulate(
            [
                *LOGREG,
                "strategy._target_=tests.test_batching.Curriculum",
                "client.batching=4",
                "rounds=1",
                f"run_dir={tmp_path}",
            ]
        )
