"""Test-only data, models, recipes and strategies, and how tests run experiments."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from hydra.utils import get_class
from torch import Tensor, nn

from fedsim import random
from fedsim.clients.batch import Batch
from fedsim.clients.local import Local
from fedsim.clients.visit import Visit
from fedsim.compose import compose
from fedsim.config import Config, config_hash, dump
from fedsim.data import Dataset, IntArray, Shard, Split
from fedsim.engine.worker import lead
from fedsim.experiment import Experiment, build
from fedsim.federation import Federation
from fedsim.memory import Memory
from fedsim.reduce import Entry, Reduced, concat, mean, once, sized, stack, total, uniform
from fedsim.run import Driver, Result, _engine
from fedsim.rundir import RunDir
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import SERVER, ClientHalf, Grad, Info, Model, State, Strategy
from fedsim.tracking import RunInfo, Status
from fedsim.vector import Layout

# --- runs -------------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """What stands for a kill in the middle of a run."""


class Recorder:
    """A tracker that keeps the records, and may end the run.

    Args:
        kill_at: Raise after this round, before its checkpoint.
    """

    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at, self.records = kill_at, list[dict[str, Any]]()

    def start(self, run: RunInfo) -> None: ...

    def log(self, record: Mapping[str, Any]) -> None:
        if record["round"] == self.kill_at:
            raise Interrupted
        self.records.append({k: v for k, v in record.items() if k != "wall_seconds"})

    def finish(self, summary: Mapping[str, Any], status: Status) -> None: ...


@dataclass
class Run:
    """A run that has ended.

    Attributes:
        driver: Its driver.
        result: What it returned.
    """

    driver: Driver
    result: Result

    @property
    def state_sha256(self) -> str:
        found: str = self.result.summary["state_sha256"]
        return found

    @property
    def params_sha256(self) -> str:
        found: str = self.result.summary["params_sha256"]
        return found

    @property
    def records(self) -> list[dict[str, Any]]:
        """One per round, without wall-clock times."""
        recorder: Any = self.driver.exp.trackers[0]
        found: list[dict[str, Any]] = recorder.records
        return found

    @property
    def w(self) -> Tensor:
        """Final global parameters, ``[d]``."""
        return self.result.params

    @property
    def state(self) -> Any:
        return self.result.state

    @property
    def memory(self) -> Memory:
        return self.driver.memory

    def rows(self, name: str, clients: Sequence[int] | None = None) -> Tensor:
        """One row of memory of every touched client (or of some), ``[m, ...]``."""
        wanted = self.memory.clients() if clients is None else clients
        return torch.stack([row[name] for row in self.memory.get(wanted)])


# Small enough for tenths of a second, with everything that could go wrong: unequal clients, partial
# participation, partial last batches, momentum.
SMALL: dict[str, Any] = {
    "model.hidden": [12, 8],
    "partition.num_clients": 7,
    "participation": {"_target_": "fedsim.clients.participation.Fraction", "fraction": 0.5},
    "client.epochs": 1,
    "client.batch_size": 64,
    "client.momentum": 0.9,
    "client.lr": 0.05,
    "rounds": 3,
    "eval.every": 1000,
    "checkpoint.every": 0,
    "checkpoint.seconds": 0.0,
}


@functools.cache
def _composed(overrides: tuple[str, ...]) -> Config:
    return compose([*overrides])


def configure(overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> Config:
    """A config for tests: `SMALL`, then choices of groups in Hydra's grammar, then values by dotted key."""
    config = copy.deepcopy(_composed(tuple(overrides)))
    config["tracker"] = {"recorder": {"_target_": "tests.helpers.Recorder"}}
    for key, value in {**SMALL, **(values or {})}.items():
        *path, last = key.split(".")
        node = config
        for part in path:
            node = node.setdefault(part, {})
        if key == "model.hidden" and not str(node["_target_"]).endswith(".MLP"):
            continue
        node[last] = copy.deepcopy(value)
    return config


def kind(name: str) -> type[Strategy]:
    """The class of a strategy of ``conf/strategy``."""
    found = get_class(configure((f"strategy={name}",))["strategy"]["_target_"])
    assert issubclass(found, Strategy)
    return found


def suited(name: str) -> dict[str, Any]:
    """Values for `configure` under which a strategy runs, and takes seconds: `Strategy.needs` and `Strategy.quick`."""
    cls = kind(name)
    return {**cls.needs, **{f"strategy.{k}": v for k, v in cls.quick.items()}}


def drive(config: Config, folder: Path, resume: Path | None = None) -> Run:
    """Runs an experiment, or goes on with the run in ``resume``."""
    exp = build(config)
    if resume is None:
        run = RunDir.create(folder, exp.name, config_hash(exp.config), config=dump(exp.config))
    else:
        run = RunDir.open(resume)
    with run.lock(), _engine(exp) as engine:
        driver = Driver(exp, run, engine)
        driver._draw = lambda summary: None  # type: ignore[method-assign] # pictures take longer than a small run
        return Run(driver, driver.run())


# --- data and models in closed form -----------------------------------------------------------------------


@dataclass(frozen=True)
class FixedClients:
    """A population of given shards."""

    shards: tuple[Shard, ...]

    def __len__(self) -> int:
        return len(self.shards)

    def sizes(self) -> IntArray:
        return np.array([len(s) for s in self.shards], dtype=np.int64)

    def train(self, client: int) -> Shard:
        return self.shards[client]

    def heldout(self, client: int) -> Shard:
        return self.shards[client]


@dataclass(frozen=True)
class Quadratics:
    """Client i has the loss ``a_i / 2 (w - c_i)^2``, coordinate by coordinate, under the model `Diagonal`.

    Its examples are all alike: x is the root of ``a_i``, y that root times ``c_i``.

    Attributes:
        a: Curvature of every client, ``[K, dim]``.
        c: Minimiser of every client, ``[K, dim]``.
        sizes: Examples of every client; default: one.
    """

    a: list[list[float]]
    c: list[list[float]]
    sizes: list[int] = field(default_factory=list)

    def load(self, seed: int) -> Dataset:
        a, c = torch.tensor(self.a, dtype=torch.float64), torch.tensor(self.c, dtype=torch.float64)
        owners = torch.arange(len(a)).repeat_interleave(torch.tensor(self.sizes or [1] * len(a)))
        split = Split(a[owners].sqrt(), a[owners].sqrt() * c[owners])
        shards = tuple(Shard(split.x, split.y, (owners == i).nonzero()[:, 0]) for i in range(len(a)))
        return Dataset("quadratics", split, split, clients=FixedClients(shards))


class Diagonal(nn.Module):
    """``w * x``, coordinate by coordinate; with `Quadratics` every client's loss is a parabola in w.

    Args:
        input_shape: ``(dim,)``.
        start: First value of w.
    """

    def __init__(self, input_shape: Sequence[int], start: Sequence[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x


def quadratics(
    a: Sequence[Sequence[float]], c: Sequence[Sequence[float]], start: Sequence[float], **values: Any
) -> dict[str, Any]:
    """Values for `configure`: full-batch steps on `Quadratics`, in float64."""
    return {
        "data": {
            "_target_": "tests.helpers.Quadratics",
            "a": [[*row] for row in a],
            "c": [[*row] for row in c],
            "sizes": list(values.pop("sizes", [])),
            "augment": [],
            "validation": 0.0,
        },
        "model": {"_target_": "tests.helpers.Diagonal", "start": [*start], "weights": None},
        "participation": {"_target_": "fedsim.clients.participation.All"},
        "precision": "float64",
        "client.batch_size": None,
        "client.epochs": None,
        "client.steps": 1,
        "client.momentum": 0.0,
        **{k.replace("__", "."): v for k, v in values.items()},
    }


# --- plain PyTorch, to compare with -----------------------------------------------------------------------


def module_of(exp: Experiment, w: Tensor | None = None) -> nn.Module:
    """The experiment's network as an ordinary module with parameters of its own, at ``w`` (default: initial)."""
    module = exp.program.fresh_module()
    views = exp.program.layout.views(exp.program.network.initial if w is None else w)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(views[name])
    return module


def examples_of(exp: Experiment, client: int) -> tuple[Tensor, Tensor]:
    """A client's training inputs, normalised, and labels."""
    shard, data = exp.program.shard(client), exp.program.dataset
    x, y = shard.x[shard.rows], shard.y[shard.rows]
    if x.dtype == torch.uint8:
        x = x.float() * (1 / (255 * data.std[0])) + (-data.mean[0] / data.std[0])
    return x, y


def batches(seed: int, client: int, n: int, size: int, stream: str = "train", drop_last: bool = False) -> Iterator[Any]:
    """The minibatches of a client's stream, for ever: int64 ``[B]`` each."""
    epoch = 0
    while True:
        order = torch.randperm(n, generator=random.generator(seed, "order", stream, client, epoch))
        for rows in torch.split(order, size):
            if len(rows) == size or not drop_last or n < size:
                yield rows
        epoch += 1


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def local_of(exp: Experiment, client: int = 0, memory: dict[str, Tensor] | None = None, **sent: Any) -> Local:
    """What hooks see of a client in round 1, outside of any engine."""
    torch.set_num_threads(1)
    network = exp.program.network
    network.bind_buffers(network.initial_buffers.clone())
    payload = {"w": network.initial.clone(), **sent}
    return Local(exp.program, Visit(client, 1, "train", 1, memory=memory or {}), lead(payload))


# --- halves that show what happens inside a visit ---------------------------------------------------------

SEEN: list[Any] = []
"""What hooks of test-only halves saw; for runs in this process. Cleared by the fixture `seen`."""


@dataclass(frozen=True)
class Watch(ClientHalf):
    """A recipe that notes every step: its number, learning rate and the examples of its batch."""

    def batch(self, batch: Batch, local: Local) -> Batch:
        SEEN.append((local.clients[0], local.step, local.lr, batch.index[0].tolist()))
        return batch


@dataclass(frozen=True)
class Plan(ClientHalf):
    """A schedule: at step t the rate is ``lr[t]`` times the configured one, and the batch has ``size[t]`` examples."""

    lr: tuple[float, ...] = ()
    size: tuple[int, ...] = ()

    def schedule(self, local: Local) -> dict[str, Any]:
        out: dict[str, Any] = {}
        if self.lr:
            out["lr"] = self.lr[local.step % len(self.lr)]
        if self.size:
            out["batch_size"] = self.size[local.step % len(self.size)]
        return out


@dataclass(frozen=True)
class Weighted(ClientHalf):
    """An order that takes the examples backwards, example i with the weight ``weights[i]``."""

    weights: tuple[float, ...] = ()

    def order(self, local: Local, epoch: int) -> tuple[Tensor, Tensor]:
        index = torch.arange(local.n).flip(0)[None]
        return index, torch.tensor([*self.weights], dtype=local.start.dtype)[index]


@dataclass(frozen=True)
class Keep(ClientHalf):
    """A batch hook that leaves examples above a number out of the objective."""

    below: int = 0

    def batch(self, batch: Batch, local: Local) -> Batch:
        batch.keep = batch.index < self.below
        return batch


@dataclass(frozen=True)
class Noisy(ClientHalf):
    """A batch hook that adds noise to the inputs, drawn by position in the stream."""

    scale: float = 0.5

    def batch(self, batch: Batch, local: Local) -> Batch:
        (g,) = local.stream_generator("noise")
        batch.x = batch.x + self.scale * torch.randn(batch.x.shape, generator=g).to(batch.x)
        return batch


class Dropped(nn.Module):
    """A linear model behind dropout.

    Args:
        input_shape: Of one input.
        num_classes: Number of classes.
        p: Share that is dropped.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, p: float = 0.5) -> None:
        super().__init__()
        self.drop, self.head = nn.Dropout(p), nn.Linear(math.prod(input_shape), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.drop(x.flatten(1)))
        return out


class Normed(nn.Module):
    """A linear model behind batch normalisation of the inputs.

    Args:
        input_shape: Of one input.
        num_classes: Number of classes (outputs).
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(math.prod(input_shape)), nn.Linear(math.prod(input_shape), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(x.flatten(1)))
        return out


@dataclass(frozen=True)
class Pooled(Quadratics):
    """One client that has the examples of all."""

    def load(self, seed: int) -> Dataset:
        many = super().load(seed)
        shard = Shard(many.train.x, many.train.y, torch.arange(len(many.train)))
        return replace(many, clients=FixedClients((shard,)))


@dataclass(frozen=True)
class Diverging(ClientHalf):
    """A loss that is NaN for one client at one step of its stream."""

    client: int = 0
    round_num: int = 1
    step: int = 0

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        hit = (local.clients[0], local.round, local.step) == (self.client, self.round_num, self.step)
        return local.loss(model, batch) * (math.nan if hit else 1.0)


@dataclass(frozen=True)
class InPlace(FedAvg):
    """Writes into what was sent, or into what it remembers."""

    where: str = "start"

    def broadcast(self, state: Any) -> dict[str, Tensor]:
        return {"w": state.w, "extra": torch.zeros_like(state.w)}

    def memory(self, local: Local) -> dict[str, Tensor]:
        return {"h": torch.zeros_like(local.start)}

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        target: Tensor = {"start": local.start, "sent": local.sent.extra, "memory": local.memory.h}[self.where]
        target.add_(1.0)
        return super().finish(w, local)


# --- strategies in the shapes that methods have -----------------------------------------------------------


@dataclass(frozen=True)
class Explorer(ClientHalf):
    """The half of a phase: trains longer than a visit, and sends the square of where it got."""

    epochs: int = 2

    def work(self, local: Local) -> Tensor:
        return local.train(local.start, epochs=self.epochs)

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        return {"spread": mean(local.delta(w).square(), uniform(w))}


@dataclass(frozen=True)
class ExploreState:
    """Global parameters ``w`` and what the phase found, ``G``."""

    w: Tensor
    G: Tensor


@dataclass(frozen=True)
class Exploring(FedAvg):
    """FedAvg after a phase of exploration whose result is only kept."""

    explorers: int = 2

    def init(self, info: Info, w: Tensor) -> ExploreState:
        return ExploreState(w, torch.zeros_like(w))

    def prepare(self, fed: Federation, state: ExploreState) -> ExploreState:
        if not self.explorers:
            return state
        who = torch.randperm(fed.num_clients, generator=fed.generator("explorers"))[: self.explorers]
        found = fed.train(who.tolist(), state, half=Explorer(), send={"w": state.w}, phase="explore")
        return replace(state, G=found["spread"].to(state.w))

    def step(self, state: ExploreState, reduced: Reduced) -> ExploreState:  # type: ignore[override]
        return replace(state, w=(state.w + reduced["delta"]).to(state.w))


@dataclass(frozen=True)
class Prox(ClientHalf):
    """A pull towards what was sent."""

    lam: float = 0.1

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        return grad(w) + self.lam * (w - local.start)


@dataclass(frozen=True)
class Ditto(FedAvg):
    """A personal model beside FedAvg's, trained in the same visit and pulled towards the global one."""

    lam: float = 0.5

    def memory(self, local: Local) -> dict[str, Tensor]:
        return {"v": local.start}

    def work(self, local: Local) -> Tensor:
        local.memory.v = local.train(local.memory.v, half=Prox(self.lam), stream="personal")
        return local.train(local.start)

    def personal(self, local: Local) -> Tensor:
        return local.memory.v


@dataclass(frozen=True)
class FineTuned(FedAvg):
    """FedAvg whose personal models are trained when they are evaluated."""

    def personal(self, local: Local) -> Tensor:
        return local.train(local.start, epochs=3)


@dataclass(frozen=True)
class FedRep(FedAvg):
    """Heads that clients keep; first the head is trained, then the rest."""

    head_epochs: int = 1

    def parts(self, layout: Layout) -> dict[str, str]:
        return {"head.": "private"}

    def work(self, local: Local) -> Tensor:
        w = local.train(local.start, only="head.", epochs=self.head_epochs, stream="head")
        return local.train(w, only="features.")


@dataclass(frozen=True)
class OwnDraw(FedRep):
    """Heads that start from each client's own random numbers."""

    def memory(self, local: Local) -> dict[str, Tensor]:
        n = local.layout.size("head.")
        return {"private": torch.stack([torch.rand(n, generator=g) for g in local.generator("private")])}


@dataclass(frozen=True)
class Frozen(FedAvg):
    """The features stay as they are."""

    def parts(self, layout: Layout) -> dict[str, str]:
        return {"features.": "frozen"}


class ThreeHeads(nn.Module):
    """Features, their head, and a second head; returns all three.

    Args:
        base: A network with ``features`` and ``head``.
    """

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.features, self.head = base.features, base.head
        self.second = nn.Linear(base.head.in_features, base.head.out_features)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.features(x)
        return h, self.head(h), self.second(h.detach())


@dataclass(frozen=True)
class Heads(FedAvg):
    """A model hook with tuple outputs, a loss over all of them, and a rule for prediction."""

    predicts: bool = True

    def model(self, module: nn.Module) -> nn.Module:
        return ThreeHeads(module)

    def parts(self, layout: Layout) -> dict[str, str]:
        return {"second.": "private"}

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        _, z, second = model(batch.x)
        return local.task_loss(z, batch.y) + local.task_loss(second, batch.y)

    def predict(self, model: Model, batch: Batch, local: Local) -> Tensor:
        if not self.predicts:
            return super().predict(model, batch, local)
        _, z, second = model(batch.x)
        SEEN.append((local.mode, local.clients[0]))
        out: Tensor = z if local.mode == "global" else z + second
        return out


@dataclass(frozen=True)
class Stacked(FedAvg):
    """FedAvg over stacked rows: the server sees every update."""

    rule: str = "mean"

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        delta = local.delta(w)
        return {"delta": stack(delta), "same": mean(delta), "label": concat([local.examples().y[0]])}

    def step(self, state: State, reduced: Reduced) -> State:
        rows, n = reduced["delta"], reduced.num_examples
        SEEN.append((reduced.clients, rows, reduced["same"], reduced["label"], n))
        if self.rule == "median":
            w = state.w.clone()
            for _, s, block in rows.columns():
                w[s] = (state.w[s] + block.median(0).values).to(w)
            return State(w)
        delta = rows.mean() if self.rule == "mean" else rows.combine(n / n.sum())
        return State((state.w + delta).to(state.w))


@dataclass(frozen=True)
class Guided(ExploreState):
    """With the number of rounds done."""

    rounds: int = 0


@dataclass(frozen=True)
class Sends(FedAvg):
    """Sends a vector that is new to a client only now and then, and another that says its own size."""

    every: int = 2

    def init(self, info: Info, w: Tensor) -> Guided:
        return Guided(w, torch.ones_like(w))

    def broadcast(self, state: Guided) -> dict[str, Any]:
        return {"w": sized(state.w, 100), "G": once(state.G), "mask": state.G > 0}

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        return {"delta": sized(mean(local.delta(w)), 7), "flags": stack(torch.ones(len(w), 9, dtype=torch.bool))}

    def step(self, state: Guided, reduced: Reduced) -> Guided:  # type: ignore[override]
        rounds = state.rounds + 1
        G = state.G if rounds % self.every else state.G + 1
        return Guided((state.w + reduced["delta"]).to(state.w), G, rounds)


@dataclass(frozen=True)
class OwnState:
    """The mean model ``w`` and every client's own, ``thetas``."""

    w: Tensor
    thetas: Tensor


@dataclass(frozen=True)
class OwnModels(Strategy):
    """Decentralised averaging: every client has its own model at the server; nearest neighbours are averaged."""

    keep: int = 2

    def init(self, info: Info, w: Tensor) -> OwnState:
        return OwnState(w, w.expand(info.num_clients, -1) + torch.arange(info.num_clients).to(w)[:, None])

    def unicast(self, state: OwnState, clients: tuple[int, ...]) -> dict[str, Any]:
        return {"w": state.thetas[list(clients)]}

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        return {"theta": stack(w)}

    def round(self, fed: Federation, state: OwnState) -> OwnState:
        thetas = fed.train(range(fed.num_clients), state)["theta"].tensor()
        apart = torch.cdist(thetas, thetas, compute_mode="donot_use_mm_for_euclid_dist")
        near = apart.argsort(stable=True)[:, : self.keep]
        thetas = thetas[near].mean(1)
        return OwnState(thetas.mean(0), thetas)

    def personal(self, local: Local) -> Tensor:
        return local.start


@dataclass(frozen=True)
class Lean(OwnModels):
    """With nothing for everybody, not even the global model."""

    def broadcast(self, state: OwnState) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Drawing(FedAvg):
    """Sends random numbers."""

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        return {"draw": stack(torch.stack([torch.rand(3, generator=g) for g in local.generator("draw", 1)]))}


@dataclass(frozen=True)
class Tally(ClientHalf):
    """The half of a phase with memory of its own: how often it came by."""

    def memory(self, local: Local) -> dict[str, Tensor]:
        return {"tally": torch.zeros(1, 1)}

    def work(self, local: Local) -> Tensor:
        return local.start

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        local.memory.tally = local.memory.tally + 1
        return {"tally": total(local.memory.tally)}


@dataclass(frozen=True)
class ServerToo(FedAvg):
    """FedAvg, and after each round an epoch on the server's own data."""

    def round(self, fed: Federation, state: State) -> State:
        state = self.step(state, fed.train(fed.sample(), state))
        return self.step(state, fed.train([SERVER], state, half=ClientHalf(), phase="server", epochs=1))


@dataclass(frozen=True)
class AsyncState:
    """Global parameters, their version, and the version that each client started from."""

    w: Tensor
    version: int
    started: dict[int, int]


@dataclass(frozen=True)
class Async(Strategy):
    """Asynchronous averaging: every arrival moves the global model, less the staler it is; a timer sends clients
    that came back to work again."""

    alpha: float = 0.6
    pause_ns: int = 3_000_000

    def init(self, info: Info, w: Tensor) -> AsyncState:
        return AsyncState(w, 0, dict.fromkeys(range(info.num_clients), 0))

    def prepare(self, fed: Federation, state: AsyncState) -> AsyncState:
        for i in range(fed.num_clients - 2):
            fed.dispatch(i, state, 1 + i % 3)
        for i in range(fed.num_clients - 2, fed.num_clients):  # these start late, from the same model
            fed.timer(1_000_000, i)
        return state

    def round(self, fed: Federation, state: AsyncState) -> AsyncState:
        while True:
            event = fed.next_event()
            SEEN.append((fed.round_num, event.kind, event.time, event.client if event.kind == "arrival" else event.tag))
            if event.kind == "timer":
                assert isinstance(event.tag, int)
                fed.dispatch(event.tag, state, 1 + event.tag % 3)
                state = replace(state, started={**state.started, event.tag: state.version})
                continue
            assert event.client is not None and event.update is not None
            rate = self.alpha / (1 + state.version - state.started[event.client])
            w = (state.w + rate * event.update["delta"]).to(state.w)
            fed.timer(event.time + self.pause_ns, event.client)
            fed.log["staleness"] = state.version - state.started[event.client]
            return replace(state, w=w, version=state.version + 1)


@dataclass(frozen=True)
class Remembering(ClientHalf):
    """A recipe with a number per example in memory, under the very name that FedDyn uses, written in its loss."""

    def memory(self, local: Local) -> dict[str, Tensor]:
        return {"h": torch.zeros(1, local.n, dtype=torch.float64)}

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        losses = local.loss(model, batch)
        with torch.no_grad():
            local.memory.h = local.memory.h.scatter(1, batch.index, local.memory.h.gather(1, batch.index) + 1)
        return losses


@dataclass(frozen=True)
class Scaled(ClientHalf):
    """A recipe that multiplies what the strategy's ``grad`` returns."""

    factor: float = 2.0

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        return self.factor * grad(w)


@dataclass(frozen=True)
class Steeper(ClientHalf):
    """A recipe that multiplies the loss."""

    factor: float = 2.0

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        return self.factor * local.loss(model, batch)


@dataclass(frozen=True)
class Shifted(ClientHalf):
    """A recipe that scales the targets and then shifts them."""

    scale: float = 1.0
    shift: float = 0.0

    def batch(self, batch: Batch, local: Local) -> Batch:
        batch.y = self.scale * batch.y + self.shift
        return batch


@dataclass(frozen=True)
class Ridge(FedAvg):
    """FedAvg whose own loss adds a penalty to the recipe's or the task's."""

    lam: float = 0.25

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        penalty = sum(v.flatten(1).square().sum(1) for v in model.views.values())
        return local.loss(model, batch) + self.lam / 2 * cast(Tensor, penalty)[:, None]

    def batch(self, batch: Batch, local: Local) -> Batch:
        batch.y = batch.y + 1.0
        return batch

    def schedule(self, local: Local) -> dict[str, Any]:
        return {"lr": 0.5}


@dataclass(frozen=True)
class Masked(ClientHalf):
    """A recipe that takes its own steps."""

    def update(self, w: Tensor, d: Tensor, local: Local) -> Tensor:
        return local.optimizer(w, d) * 1.0


@dataclass(frozen=True)
class Halving(FedAvg):
    """Steps of its own: after every step the last parameter is 0."""

    def update(self, w: Tensor, d: Tensor, local: Local) -> Tensor:
        w = local.optimizer(w, d)
        w[:, -1] = 0.0
        return w


@dataclass(frozen=True)
class Narrow:
    """A build of the network with one hidden layer less wide: for ``fed.train(model=...)``."""

    width: int

    def __call__(self, module: Any) -> nn.Module:
        first, head = module.features[1], module.head
        module.features = nn.Sequential(nn.Flatten(), nn.Linear(first.in_features, self.width), nn.ReLU())
        module.head = nn.Linear(self.width, head.out_features)
        return cast(nn.Module, module)


@dataclass(frozen=True)
class Pruned(FedAvg):
    """Trains a narrower network whose units are some of the global one's."""

    width: int = 5

    def round(self, fed: Federation, state: State) -> State:
        keep = self.places(fed)
        small = state.w[keep]
        delta = fed.train(fed.sample(), state, send={"w": small}, model=Narrow(self.width))["delta"]
        w = state.w.clone()
        w[keep] = (small + delta).to(w)
        return State(w)

    def places(self, fed: Federation) -> Tensor:
        """Where the narrow network's parameters stand in the global vector."""
        views = fed.layout.views(torch.arange(fed.layout.d))
        names = [*views]
        first, bias, head, last = (views[n] for n in names)
        parts = first[: self.width], bias[: self.width], head[:, : self.width], last
        return torch.cat([p.reshape(-1) for p in parts])


@dataclass(frozen=True)
class Final:
    """Global parameters, and after the last round the temperature that predictions use."""

    w: Tensor
    sign: float | None = None


@dataclass(frozen=True)
class Flipping(FedAvg):
    """Predicts the least likely class once it is finalised."""

    def init(self, info: Info, w: Tensor) -> Final:
        return Final(w)

    def broadcast(self, state: Final) -> dict[str, Any]:
        return {"w": state.w} | ({} if state.sign is None else {"sign": state.sign})

    def step(self, state: Final, reduced: Reduced) -> Final:  # type: ignore[override]
        return Final((state.w + reduced["delta"]).to(state.w))

    def finalize(self, fed: Federation, state: Final) -> Final:
        return replace(state, sign=-1.0)

    def predict(self, model: Model, batch: Batch, local: Local) -> Tensor:
        z: Tensor = model(batch.x)
        return z * local.sent.sign if "sign" in vars(local.sent) else z


@dataclass(frozen=True)
class Anchor(ClientHalf):
    """A phase without training: the gradient of all examples, remembered, and how it changed."""

    def work(self, local: Local) -> Tensor:
        return local.start

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        old = local.memory.v
        local.memory.v = local.grad(w, local.examples())
        return {"dv": total(local.memory.v - old)}


@dataclass(frozen=True)
class AnchorState:
    """Global parameters and the mean of all remembered gradients."""

    w: Tensor
    v: Tensor


@dataclass(frozen=True)
class Anchored(Strategy):
    """FedAMD's shape: some clients refresh their gradient, the others take variance-reduced steps."""

    def init(self, info: Info, w: Tensor) -> AnchorState:
        return AnchorState(w, torch.zeros_like(w))

    def broadcast(self, state: AnchorState) -> dict[str, Any]:
        return {"w": state.w, "v": state.v}

    def memory(self, local: Local) -> dict[str, Tensor]:
        return {"v": torch.zeros_like(local.start)}

    def refresh(self, fed: Federation, state: AnchorState, who: list[int]) -> AnchorState:
        change = fed.train(who, state, half=Anchor(), send={"w": state.w}, phase="anchor")["dv"]
        return replace(state, v=state.v + change.to(state.v) / fed.num_clients)

    def prepare(self, fed: Federation, state: AnchorState) -> AnchorState:
        return self.refresh(fed, state, [*range(fed.num_clients)])

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        y, g = local.scratch.get("y", local.start), local.scratch.get("g", local.sent.v)
        local.scratch["g"] = g - grad(y) + grad(w)
        local.scratch["y"] = w.clone()
        out: Tensor = local.scratch["g"]
        return out

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        return {"delta": mean(local.delta(w), uniform(w))}

    def round(self, fed: Federation, state: AnchorState) -> AnchorState:
        who = fed.sample()
        miners, anchors = who[::2], who[1::2]
        w = (state.w + fed.train(miners, state)["delta"]).to(state.w)
        return replace(self.refresh(fed, state, anchors), w=w)


class Tupled(nn.Module):
    """A model that returns two outputs.

    Args:
        input_shape: Of one input.
        num_classes: Number of classes.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(math.prod(input_shape), num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.head(x.flatten(1))
        return z, z


@dataclass(frozen=True)
class Sending(ClientHalf):
    """A recipe that sends what the strategy sends already."""

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        return {"delta": mean(local.delta(w))}


@dataclass(frozen=True)
class Bare(FedAvg):
    """Forgets to say how its entry is reduced."""

    def finish(self, w: Tensor, local: Local) -> Any:
        return {"delta": local.delta(w)}


@dataclass(frozen=True)
class Moody(FedAvg):
    """Sends something else from its last client."""

    shapes: bool = False

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        odd, entries = local.clients[0] == 5, super().finish(w, local)
        if self.shapes:
            return {**entries, "x": mean(torch.ones(1, 2 if odd else 1))}
        return {**entries, "x": total(w[:, :1]) if odd else mean(w[:, :1])}


@dataclass(frozen=True)
class Lossless(Heads):
    """Forgets that its network has several outputs."""

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        return local.loss(model, batch)


@dataclass(frozen=True)
class Letters(FedAvg):
    """Sends every client something of its own: of its own length, of a size of its own, and only once."""

    def unicast(self, state: State, clients: tuple[int, ...]) -> dict[str, Any]:
        numbers = torch.tensor(clients).to(state.w)
        return {
            "rows": [torch.full((i + 1, 2), float(i)) for i in clients],
            "note": sized(numbers[:, None], 5),
            "kept": once(numbers[:, None].expand(-1, 4)),
        }

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        SEEN.append((local.clients[0], local.sent.rows, local.sent.note, local.sent.kept))
        return super().finish(w, local)
