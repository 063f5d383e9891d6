"""MoFedSAM: FedCM whose gradient is taken at a perturbed point.

Source: Qu et al., 2022, https://arxiv.org/abs/2206.02618; read from the code of FedSpeed's authors, where the
weight of the gradient is called ``alpha`` as well.
Departures: those of FedCM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsim.clients.local import Local
from fedsim.strategies.fedcm import FedCM
from fedsim.strategies.fedsam import sharpness_aware
from fedsim.strategy import Grad, require


@dataclass(frozen=True)
class MoFedSAM(FedCM):
    """MoFedSAM. Two gradients per step.

    Attributes:
        rho: Length of the perturbation, >= 0; 0 gives FedCM.
    """

    batched: ClassVar = True
    parent: ClassVar = "fedcm"
    parent_options: ClassVar = {}
    neutral: ClassVar = {"rho": 0.0}
    exempt: ClassVar = {
        "one_full_batch_step_is_gradient_descent": "the gradient counts alpha, and is that of another point"
    }

    rho: float = 0.1

    def check(self) -> None:
        super().check()
        require(self.rho >= 0, "strategy.rho", ">= 0", self.rho)

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        return super().direction(w, sharpness_aware(grad, self.rho), local)
