"""FedDyn: each client's objective is regularised so that its optimum is the global one.

Source: Acar et al., 2021, Algorithm 1, https://arxiv.org/abs/2111.04263, in the form of its dual average:
``h_i`` is the sum of all local displacements of client i (the paper's ``-grad L_i / alpha``), so nothing is
divided by alpha, and FedSpeed without its perturbation is this very function.
Departures:
    1. The dual is averaged over the population (``dual=all``, as in the paper) or over the cohort (``active``);
       ``off`` freezes every dual at 0, which is FedProx with uniform weights, and FedAvg at ``alpha=0``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.clients.local import Local
from fedsim.reduce import Entry, Reduced, mean, total, uniform
from fedsim.strategy import Grad, Info, Strategy, require


@dataclass(frozen=True)
class DualState:
    """All that the server carries from one round to the next.

    Attributes:
        w: Global parameters, ``[d]``.
        H: Sum of the duals of all clients, float64 ``[d]``.
        num_clients: m, the population.
    """

    w: Tensor
    H: Tensor
    num_clients: int


@dataclass(frozen=True)
class FedDyn(Strategy):
    """FedDyn.

    Attributes:
        alpha: Weight of the regulariser, >= 0.
        dual: ``all``, ``active`` or ``off``.
    """

    batched: ClassVar = True
    parent: ClassVar = "fedavg"
    parent_options: ClassVar = {"weights": "uniform"}
    neutral: ClassVar = {"alpha": 0.0, "dual": "off"}
    exempt: ClassVar = {
        "one_full_batch_step_is_gradient_descent": "the mean dual doubles the first step: the server adds both"
    }

    alpha: float = 0.1
    dual: str = "all"

    def check(self) -> None:
        require(self.alpha >= 0, "strategy.alpha", ">= 0", self.alpha)
        require(self.dual in ("all", "active", "off"), "strategy.dual", "all, active or off", self.dual)

    def init(self, info: Info, w: Tensor) -> DualState:
        return DualState(w, torch.zeros_like(w, dtype=torch.float64), info.num_clients)

    def memory(self, local: Local) -> dict[str, Tensor]:
        return dual_memory(local, self.dual)

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        return dual_direction(grad(w), w, self.alpha, local)

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        return dual_finish(w, local, self.dual)

    def step(self, state: DualState, reduced: Reduced) -> DualState:
        return dual_step(state, reduced, self.dual)


def dual_memory(local: Local, dual: str) -> dict[str, Tensor]:
    """A client's first dual, 0; none where all stay so."""
    return {} if dual == "off" else {"h": torch.zeros_like(local.start)}


def dual_direction(g: Tensor, w: Tensor, mu: float, local: Local) -> Tensor:
    """``g + mu (h + w - start)``: the gradient of the regularised objective, ``[C, d]``."""
    drawn = local.memory.h + w if "h" in local.memory else w
    return g + mu * (drawn - local.start)


def dual_finish(w: Tensor, local: Local, dual: str) -> dict[str, Entry]:
    """Adds the displacement to the client's dual and sends it. One vector goes up; the others follow from it."""
    delta = local.delta(w)
    if dual == "off":
        return {"delta": mean(delta, uniform(w))}
    local.memory.h = local.memory.h + delta.to(w)
    entries = {"delta": mean(delta, uniform(w)), "moved": replace(total(delta), nbytes=0)}
    if dual == "active":
        entries["dual"] = replace(mean(local.memory.h, uniform(w)), nbytes=0)
    return entries


def dual_step(state: DualState, reduced: Reduced, dual: str) -> DualState:
    """The mean local model, moved on by the mean dual."""
    if dual == "off":
        return replace(state, w=(state.w + reduced["delta"]).to(state.w))
    H = state.H + reduced["moved"]
    mean_dual = H / state.num_clients if dual == "all" else reduced["dual"]
    return replace(state, w=(state.w + reduced["delta"] + mean_dual).to(state.w), H=H)
