"""SCAFFOLD: control variates correct the drift of local steps.

Source: Karimireddy et al., 2020, Algorithm 1, option II, https://arxiv.org/abs/1910.06378.
Departures:
    1. The local learning rate may change between steps: the new control is ``c_i - c - delta / (sum of the
       rates used)``, which is the paper's ``c_i - c + (x - y_i) / (K eta_l)`` for a constant rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.clients.local import Local
from fedsim.reduce import Entry, Reduced, mean, total
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import Grad, Info, require


@dataclass(frozen=True)
class ScaffoldState:
    """All that the server carries from one round to the next.

    Attributes:
        w: Global parameters, x in the paper, ``[d]``.
        c: Mean of all clients' controls, ``[d]``.
        num_clients: N, the population.
    """

    w: Tensor
    c: Tensor
    num_clients: int


@dataclass(frozen=True)
class Scaffold(FedAvg):
    """SCAFFOLD. Sends two vectors each way.

    Attributes:
        server_lr: eta_g, > 0.
        control: Factor on ``c - c_i``; 0 gives FedAvg.
    """

    batched: ClassVar = True
    parent: ClassVar = "fedavg"
    parent_options: ClassVar = {"weights": "uniform"}
    neutral: ClassVar = {"control": 0.0}

    weights: str = "uniform"
    server_lr: float = 1.0
    control: float = 1.0

    def check(self) -> None:
        super().check()
        require(self.server_lr > 0, "strategy.server_lr", "> 0", self.server_lr)
        require(self.control >= 0, "strategy.control", ">= 0", self.control)

    def init(self, info: Info, w: Tensor) -> ScaffoldState:
        return ScaffoldState(w, torch.zeros_like(w), info.num_clients)

    def broadcast(self, state: ScaffoldState) -> dict[str, Tensor]:
        return {"w": state.w, "c": state.c}

    def memory(self, local: Local) -> dict[str, Tensor]:
        return {"c": torch.zeros_like(local.start)}

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        correction: Tensor = local.sent.c - local.memory.c
        return grad(w) + self.control * correction

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        delta, old = local.delta(w), local.memory.c
        drift = torch.where(local.lr_sum > 0, delta / local.lr_sum, 0.0).to(old)
        local.memory.c = torch.where(local.lr_sum > 0, old - local.sent.c - drift, old)  # no step: no new estimate
        return {"delta": mean(delta, self.weight(w)), "dc": total(local.memory.c - old)}

    def step(self, state: ScaffoldState, reduced: Reduced) -> ScaffoldState:  # type: ignore[override]
        w = (state.w + self.server_lr * reduced["delta"]).to(state.w)
        return ScaffoldState(w, (state.c + reduced["dc"] / state.num_clients).to(state.c), state.num_clients)
