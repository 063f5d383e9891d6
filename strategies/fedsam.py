"""FedSAM: local steps along the gradient at a point perturbed towards higher loss.

Source: Qu et al., 2022, https://arxiv.org/abs/2206.02618; read from the code of FedSpeed's authors.
Departures: none known. The perturbation is ``rho g / (|g| + 1e-7)``; the 1e-7 is that code's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsim.clients.batch import Batch
from fedsim.clients.local import Local
from fedsim.clients.ops import unit
from fedsim.reduce import Reduced
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import ClientHalf, Grad, State, require


@dataclass(frozen=True)
class FedSAM(FedAvg):
    """FedSAM. Two gradients per step.

    Attributes:
        rho: Length of the perturbation, >= 0; 0 gives FedAvg.
        server_lr: eta_g, > 0.
    """

    batched: ClassVar = True
    parent: ClassVar = "fedavg"
    parent_options: ClassVar = {"weights": "uniform"}
    neutral: ClassVar = {"rho": 0.0}
    exempt: ClassVar = {"one_full_batch_step_is_gradient_descent": "the gradient is that of another point"}

    weights: str = "uniform"
    rho: float = 0.1
    server_lr: float = 1.0

    def check(self) -> None:
        super().check()
        require(self.rho >= 0, "strategy.rho", ">= 0", self.rho)
        require(self.server_lr > 0, "strategy.server_lr", "> 0", self.server_lr)

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        return sharpness_aware(grad, self.rho)(w)

    def step(self, state: State, reduced: Reduced) -> State:
        return State((state.w + self.server_lr * reduced["delta"]).to(state.w))


def sharpness_aware(grad: Grad, rho: float) -> Grad:
    """The gradient at the point ``rho`` away along the gradient, as a function like ``grad``; ``grad`` itself if 0."""

    def perturbed(at: Tensor, batch: Batch | None = None, half: ClientHalf | None = None) -> Tensor:
        return grad(at + rho * unit(grad(at, batch, half)), batch, half)

    return perturbed if rho else grad
