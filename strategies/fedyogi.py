"""FedYogi: FedAdam whose second moment changes by a bounded amount, so that it falls slowly when updates get small.

Source: Reddi et al., 2021, Algorithm 2, https://arxiv.org/abs/2003.00295.
Departures:
    1. Clients count by their numbers of examples; the paper averages uniformly (``weights=uniform``).
    2. The paper starts ``v`` at a value of at least ``tau^2``; here ``v_0 = tau^2``. No bias correction, as there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsim.reduce import Reduced
from fedsim.strategies.fedadam import AdamState, adaptive_init, adaptive_step, check_adaptive
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import Info, require


@dataclass(frozen=True)
class FedYogi(FedAvg):
    """FedYogi.

    Attributes:
        server_lr: eta, > 0.
        beta1: Decay of the first moment, in [0, 1).
        beta2: ``1 - beta2`` is the share of ``delta^2`` that the second moment moves by, in [0, 1).
        tau: Degree of adaptivity, > 0: the larger, the closer to FedAvgM.
    """

    parent: ClassVar[str | None] = None
    exempt: ClassVar = {
        "one_full_batch_step_is_gradient_descent": "every coordinate moves by about server_lr, whatever the mean update"
    }

    server_lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def check(self) -> None:
        super().check()
        check_adaptive(self.server_lr, self.beta1, self.tau)
        require(0 <= self.beta2 < 1, "strategy.beta2", "in [0, 1)", self.beta2)

    def init(self, info: Info, w: Tensor) -> AdamState:
        return adaptive_init(w, self.tau)

    def step(self, state: AdamState, reduced: Reduced) -> AdamState:  # type: ignore[override]
        delta = reduced["delta"]
        squared = delta.square()
        v = state.v - (1 - self.beta2) * squared * (state.v - squared).sign()
        return adaptive_step(state, delta, v, self.server_lr, self.beta1, self.tau)
