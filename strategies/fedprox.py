"""FedProx: a proximal term keeps the local model near the global one.

Source: Li et al., 2020, Algorithm 2, https://arxiv.org/abs/1812.06127.
Departures:
    1. Every client does the configured work; the paper lets slow clients do less.
    2. Clients are averaged by their numbers of examples, as in the authors' code (the paper samples
       them with these probabilities and averages uniformly: ``weights=uniform``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsim.clients.local import Local
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import Grad, require


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedProx.

    Attributes:
        mu: Weight of ``mu / 2 * |w - start|^2``, >= 0; 0 gives FedAvg.
    """

    batched: ClassVar = True
    parent: ClassVar = "fedavg"
    neutral: ClassVar = {"mu": 0.0}

    mu: float = 0.01

    def check(self) -> None:
        super().check()
        require(self.mu >= 0, "strategy.mu", ">= 0", self.mu)

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        return grad(w) + self.mu * (w - local.start)
