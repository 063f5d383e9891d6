"""FedAdam: the mean update as a pseudo-gradient for Adam on the server.

Source: Reddi et al., 2021, Algorithm 2, https://arxiv.org/abs/2003.00295.
Departures:
    1. Clients count by their numbers of examples; the paper averages uniformly (``weights=uniform``).
    2. The paper starts ``v`` at a value of at least ``tau^2``; here ``v_0 = tau^2``. No bias correction, as there.

The algorithm's three methods differ in one line, that of ``v``; FedYogi and FedAdagrad share the functions below.
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
class AdamState:
    """All that the server carries from one round to the next.

    Attributes:
        w: Global parameters, ``[d]``.
        m: First moment, m in the paper, float64 ``[d]``.
        v: Second moment, v in the paper, float64 ``[d]``.
    """

    w: Tensor
    m: Tensor
    v: Tensor


@dataclass(frozen=True)
class FedAdam(FedAvg):
    """FedAdam.

    Attributes:
        server_lr: eta, > 0.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
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
        v = self.beta2 * state.v + (1 - self.beta2) * delta.square()
        return adaptive_step(state, delta, v, self.server_lr, self.beta1, self.tau)


def check_adaptive(server_lr: float, beta1: float, tau: float) -> None:
    """Refuses impossible values of the options that the three methods have.

    Raises:
        ConfigError: ``server_lr`` or ``tau`` is not positive, or ``beta1`` not in [0, 1).
    """
    require(server_lr > 0, "strategy.server_lr", "> 0", server_lr)
    require(0 <= beta1 < 1, "strategy.beta1", "in [0, 1)", beta1)
    require(tau > 0, "strategy.tau", "> 0", tau)


def adaptive_init(w: Tensor, tau: float) -> AdamState:
    """The first state: ``m = 0`` and ``v = tau^2``.

    Args:
        w: Initial parameters, ``[d]``.
        tau: Degree of adaptivity.
    """
    zeros = torch.zeros_like(w, dtype=torch.float64)
    return AdamState(w, zeros, zeros + tau**2)


def adaptive_step(state: AdamState, delta: Tensor, v: Tensor, server_lr: float, beta1: float, tau: float) -> AdamState:
    """``m = beta1 m + (1 - beta1) delta``, ``w = w + server_lr m / (sqrt(v) + tau)``.

    Args:
        state: From the round before.
        delta: The cohort's mean update, float64 ``[d]``.
        v: This round's second moment, float64 ``[d]``, >= 0.
        server_lr: eta.
        beta1: Decay of the first moment.
        tau: Degree of adaptivity.
    """
    m = beta1 * state.m + (1 - beta1) * delta
    return AdamState((state.w + server_lr * m / (v.sqrt() + tau)).to(state.w), m, v)
