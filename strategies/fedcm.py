"""FedCM: every local step mixes in the direction of the last round, a momentum that clients share.

Source: Xu et al., 2021, https://arxiv.org/abs/2106.10874; read from the code of FedSpeed's authors.
Departures:
    1. The momentum of a client is ``-delta / (sum of the rates used)``, the paper's ``-delta / (K eta_l)`` for a
       constant rate and equal clients; clients that do more steps do not count more for it.
    2. ``server_lr`` is the paper's ``eta_g / (K eta_l)``: at 1 the server takes the mean of the local models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.clients.local import Local
from fedsim.reduce import Entry, Reduced, mean
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import Grad, Info, require


@dataclass(frozen=True)
class ClientMomentumState:
    """All that the server carries from one round to the next.

    Attributes:
        w: Global parameters, ``[d]``.
        momentum: Mean direction of the last round's local steps, Delta in the paper, ``[d]``; 0 in the first round.
    """

    w: Tensor
    momentum: Tensor


@dataclass(frozen=True)
class FedCM(FedAvg):
    """FedCM. Sends two vectors down.

    Attributes:
        alpha: Weight of the gradient, in (0, 1]; the momentum has the rest; 1 gives FedAvg.
        server_lr: Factor on the mean update, > 0.
    """

    batched: ClassVar = True
    parent: ClassVar = "fedavg"
    parent_options: ClassVar = {"weights": "uniform"}
    neutral: ClassVar = {"alpha": 1.0}
    exempt: ClassVar = {
        "one_full_batch_step_is_gradient_descent": "the gradient counts alpha; the momentum has no value yet"
    }

    weights: str = "uniform"
    alpha: float = 0.1
    server_lr: float = 1.0

    def check(self) -> None:
        super().check()
        require(0 < self.alpha <= 1, "strategy.alpha", "in (0, 1]", self.alpha)
        require(self.server_lr > 0, "strategy.server_lr", "> 0", self.server_lr)

    def init(self, info: Info, w: Tensor) -> ClientMomentumState:
        return ClientMomentumState(w, torch.zeros_like(w))

    def broadcast(self, state: ClientMomentumState) -> dict[str, Tensor]:
        return {"w": state.w, "momentum": state.momentum}

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        shared: Tensor = local.sent.momentum
        return self.alpha * grad(w) + (1 - self.alpha) * shared

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        delta = local.delta(w)
        momentum = torch.where(local.lr_sum > 0, -delta / local.lr_sum, 0.0)
        # The server knows the rates: the momentum follows from the update, and is not charged twice.
        return {
            "delta": mean(delta, self.weight(w)),
            "momentum": replace(mean(momentum, self.weight(w)), nbytes=0),
        }

    def step(self, state: ClientMomentumState, reduced: Reduced) -> ClientMomentumState:  # type: ignore[override]
        w = (state.w + self.server_lr * reduced["delta"]).to(state.w)
        return ClientMomentumState(w, reduced["momentum"].to(state.momentum))
