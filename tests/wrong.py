"""Plug-ins that are wrong, each in its own way, and one that is interrupted; named by `_target_` in tests."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.clients.local import Local
from fedsim.data import Dataset, Split
from fedsim.federation import Federation
from fedsim.reduce import Entry, Reduced, total
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import Info, State, Strategy

NUMBER = 3


def number(**_: Any) -> int:
    """Makes no plug-in at all."""
    return NUMBER


class Empty:
    """Has no method of anything."""


class Linear(nn.Module):
    """One layer for the 8x8 images of ``data=digits``; right unless asked otherwise."""

    def __init__(self, inputs: int = 64, outputs: int = 10) -> None:
        super().__init__()
        self.head = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Any:
        return self.head(x.flatten(1))


class Pair(Linear):
    """Returns a tuple."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Nothing(nn.Module):
    """Has no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 10)


class Refuses(nn.Module):
    """Cannot be built, and says so in two lines."""

    def __init__(self) -> None:
        raise RuntimeError("first line\nsecond line")


class NoServer(Strategy):
    """Has no server half."""


@dataclass(frozen=True)
class NoState(FedAvg):
    """Starts with a state that has no ``w``."""

    def init(self, info: Info, w: Tensor) -> Any:
        return {"w": w}


class Undecorated(FedAvg):
    """Has an option, and no decorator that would make it one."""

    mu: float = 0.1


@dataclass(frozen=True)
class NotRounded(FedAvg):
    """Leaves the global model in float64."""

    def step(self, state: State, reduced: Reduced) -> State:
        return State(state.w + reduced["delta"])


@dataclass(frozen=True)
class Wide(FedAvg):
    """Returns a model with a client axis."""

    def step(self, state: State, reduced: Reduced) -> State:
        return State((state.w + reduced["delta"]).to(state.w)[None])


@dataclass(frozen=True)
class Scalar(FedAvg):
    """Sends a number without a client axis."""

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        return {**super().finish(w, local), "one": total(torch.tensor(1.0))}


@dataclass(frozen=True)
class FailsOnServer(FedAvg):
    """Looks for an entry that no client sends."""

    def step(self, state: State, reduced: Reduced) -> State:
        return State(state.w + reduced["dleta"])


@dataclass(frozen=True)
class FailsOnClient(FedAvg):
    """Fails in round 2, on every client."""

    def work(self, local: Local) -> Tensor:
        return local.train(local.start) if local.round < 2 else local.start / 0 / local.scratch["missing"]


@dataclass(frozen=True)
class Interrupted(FedAvg):
    """Sends its own process a signal in round 3, unless the environment says ``GO_ON``.

    Attributes:
        signal: Its name.
    """

    signal: str = "SIGINT"

    def round(self, fed: Federation, state: State) -> State:
        if fed.round_num == 3 and "GO_ON" not in os.environ:
            os.kill(os.getpid(), signal.Signals[self.signal])
        done: State = super().round(fed, state)
        return done


@dataclass(frozen=True)
class Deaf(FedAvg):
    """Is interrupted before the first round, as within a library that drops what is raised."""

    def __post_init__(self) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


class Regression:
    """Data without classes."""

    def load(self, seed: int) -> Dataset:
        x = torch.linspace(-1, 1, 60).view(-1, 1)
        return Dataset("line", Split(x[:50], 2 * x[:50, 0]), Split(x[50:], 2 * x[50:, 0]))
