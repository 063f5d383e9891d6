"""FedAdagrad: the mean update as a pseudo-gradient for Adagrad on the server.

Source: Reddi et al., 2021, Algorithm 2, https://arxiv.org/abs/2003.00295.
Departures:
    1. Clients count by their numbers of examples; the paper averages uniformly (``weights=uniform``).
    2. The paper starts ``v`` at a value of at least ``tau^2``; here ``v_0 = tau^2``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsim.reduce import Reduced
from fedsim.strategies.fedadam import AdamState, adaptive_init, adaptive_step, check_adaptive
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import Info


@dataclass(frozen=True)
class FedAdagrad(FedAvg):
    """FedAdagrad.

    Attributes:
        server_lr: eta, > 0.
        beta1: Decay of the first moment, in [0, 1); 0, the usual Adagrad, has no momentum.
        tau: Degree of adaptivity, > 0.
    """

    parent: ClassVar[str | None] = None
    exempt: ClassVar = {
        "one_full_batch_step_is_gradient_descent": "the first round moves every coordinate by about server_lr"
    }

    server_lr: float = 0.03
    beta1: float = 0.0
    tau: float = 1e-3

    def check(self) -> None:
        super().check()
        check_adaptive(self.server_lr, self.beta1, self.tau)

    def init(self, info: Info, w: Tensor) -> AdamState:
        return adaptive_init(w, self.tau)

    def step(self, state: AdamState, reduced: Reduced) -> AdamState:  # type: ignore[override]
        delta = reduced["delta"]
        return adaptive_step(state, delta, state.v + delta.square(), self.server_lr, self.beta1, self.tau)
