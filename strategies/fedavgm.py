"""FedAvgM: FedAvg with momentum on the server.

Source: Hsu et al., 2019, section 4.3, https://arxiv.org/abs/1909.06335.
Departures:
    1. ``server_lr`` scales the step; the paper has 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.reduce import Reduced
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import Info, require


@dataclass(frozen=True)
class MomentumState:
    """All that the server carries from one round to the next.

    Attributes:
        w: Global parameters, ``[d]``.
        v: Momentum, v in the paper, float64 ``[d]``: rounding it would make ``beta=0`` another method than FedAvg.
    """

    w: Tensor
    v: Tensor


@dataclass(frozen=True)
class FedAvgM(FedAvg):
    """FedAvgM.

    Attributes:
        server_lr: eta, > 0.
        beta: Momentum, in [0, 1); 0 gives FedAvg.
    """

    parent: ClassVar = "fedavg"
    neutral: ClassVar = {"beta": 0.0}

    server_lr: float = 1.0
    beta: float = 0.9

    def check(self) -> None:
        super().check()
        require(self.server_lr > 0, "strategy.server_lr", "> 0", self.server_lr)
        require(0 <= self.beta < 1, "strategy.beta", "in [0, 1)", self.beta)

    def init(self, info: Info, w: Tensor) -> MomentumState:
        return MomentumState(w, torch.zeros_like(w, dtype=torch.float64))

    def step(self, state: MomentumState, reduced: Reduced) -> MomentumState:  # type: ignore[override]
        v = self.beta * state.v + reduced["delta"]
        return MomentumState((state.w + self.server_lr * v).to(state.w), v)
