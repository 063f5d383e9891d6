"""FedGAMMA: SCAFFOLD whose gradient is taken at a perturbed point.

Source: Dai et al., 2023, "FedGAMMA: Federated Learning With Global Sharpness-Aware Minimization",
https://doi.org/10.1109/TNNLS.2023.3304453; as in the code of FedSpeed's authors.
Departures: those of SCAFFOLD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsim.clients.local import Local
from fedsim.strategies.fedsam import sharpness_aware
from fedsim.strategies.scaffold import Scaffold
from fedsim.strategy import Grad, require


@dataclass(frozen=True)
class FedGamma(Scaffold):
    """FedGAMMA. Two gradients per step; sends two vectors each way.

    Attributes:
        rho: Length of the perturbation, >= 0; 0 gives SCAFFOLD.
    """

    batched: ClassVar = True
    parent: ClassVar = "scaffold"
    parent_options: ClassVar = {}
    neutral: ClassVar = {"rho": 0.0}
    exempt: ClassVar = {"one_full_batch_step_is_gradient_descent": "the gradient is that of another point"}

    rho: float = 0.1

    def check(self) -> None:
        super().check()
        require(self.rho >= 0, "strategy.rho", ">= 0", self.rho)

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        return super().direction(w, sharpness_aware(grad, self.rho), local)
