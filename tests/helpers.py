"""Test-only data, models, recipes and strategies, and how tests run experiments."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim import random
from fedsim.clients.local import Local, Visit
from fedsim.compose import compose
from fedsim.config import Config, config_hash, dump
from fedsim.data import Dataset, IntArray, Shard, Split
from fedsim.engine.worker import lead
from fedsim.experiment import Experiment, build
from fedsim.memory import Memory
from fedsim.run import Driver, Result, _engine
from fedsim.rundir import RunDir
from fedsim.tracking import RunInfo, Status

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


def drive(config: Config, folder: Path, resume: Path | None = None) -> Run:
    """Runs an experiment, or goes on with the run in ``resume``."""
    exp = build(config)
    if resume is None:
        run = RunDir.create(folder, exp.name, config_hash(exp.config), config=dump(exp.config))
    else:
        run = RunDir.open(resume)
    with run.lock(), _engine(exp) as engine:
        driver = Driver(exp, run, engine)
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
        for rows in order.split(size):
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
