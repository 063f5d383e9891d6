"""FedSMOO: FedDyn, with perturbations that a second dual pulls towards a common one.

Source: Sun et al., 2023, "Dynamic Regularized Sharpness Aware Minimization in Federated Learning",
https://arxiv.org/abs/2305.11584; the authors' code where it differs.
Departures:
    1. The global perturbation is ``s = rho * unit(mean of the cohort's mu_i)``, as in the authors' code; the paper
       takes each client's last perturbation off its ``mu_i`` first, which the code leaves out as small.
    2. The dual is kept and averaged as in `FedDyn` (``dual``): with ``rho=0`` this is that method, to the bit.
    3. The code clips ``grad + alpha (h - start)`` to a norm of 10 and adds ``alpha w`` afterwards: here
       ``client.clip_norm`` bounds the whole direction, and nothing does by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.clients.local import Local
from fedsim.clients.ops import unit
from fedsim.reduce import Entry, Reduced, mean, uniform
from fedsim.strategies.feddyn import DualState, FedDyn, dual_direction
from fedsim.strategy import Grad, Info, require


@dataclass(frozen=True)
class SmoothState(DualState):
    """All that the server carries from one round to the next.

    Attributes:
        s: The global perturbation, ``[d]``; of length rho, and 0 in the first round.
    """

    s: Tensor


@dataclass(frozen=True)
class FedSMOO(FedDyn):
    """FedSMOO. Two gradients per step; sends two vectors each way.

    Attributes:
        rho: Length of the perturbation, >= 0; 0 gives FedDyn.
    """

    batched: ClassVar = True
    parent: ClassVar = "feddyn"
    parent_options: ClassVar = {}
    neutral: ClassVar = {"rho": 0.0}

    rho: float = 0.1

    def check(self) -> None:
        super().check()
        require(self.rho >= 0, "strategy.rho", ">= 0", self.rho)

    def init(self, info: Info, w: Tensor) -> SmoothState:
        first = super().init(info, w)
        return SmoothState(first.w, first.H, first.num_clients, torch.zeros_like(w))

    def broadcast(self, state: SmoothState) -> dict[str, Tensor]:
        return {"w": state.w, "s": state.s}

    def memory(self, local: Local) -> dict[str, Tensor]:
        return {**super().memory(local), "mu": torch.zeros_like(local.start)}

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        g = grad(w)
        if self.rho:
            s, mu = local.sent.s, local.memory.mu
            e = self.rho * unit(g - mu - s)
            local.memory.mu = mu + e - s
            g = grad(w + e)
        return dual_direction(g, w, self.alpha, local)

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        return {**super().finish(w, local), "mu": mean(local.memory.mu, uniform(w))}

    def step(self, state: SmoothState, reduced: Reduced) -> SmoothState:  # type: ignore[override]
        moved = super().step(state, reduced)
        s = (self.rho * unit(reduced["mu"])).to(state.s)
        return SmoothState(moved.w, moved.H, moved.num_clients, s)
