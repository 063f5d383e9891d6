"""FedAvg: local training, then the mean of the clients' updates.

Source: McMahan et al., 2017, Algorithm 1, https://arxiv.org/abs/1602.05629.
Departures: none known. The server adds the mean of ``local - global``, which is the mean of the local models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsim.clients.local import Local
from fedsim.reduce import Entry, Reduced, mean, uniform
from fedsim.strategy import State, Strategy, require


@dataclass(frozen=True)
class FedAvg(Strategy):
    """FedAvg, and the parent of methods that average.

    Attributes:
        weights: ``examples``: a client counts by its number of training examples; ``uniform``: all alike.
    """

    batched: ClassVar = True

    weights: str = "examples"

    def check(self) -> None:
        require(self.weights in ("examples", "uniform"), "strategy.weights", "examples or uniform", self.weights)

    def weight(self, w: Tensor) -> Tensor | None:
        """Weights of the clients of ``w``, ``[C, 1]``; None for their numbers of examples."""
        return uniform(w) if self.weights == "uniform" else None

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        return {"delta": mean(local.delta(w), self.weight(w))}

    def step(self, state: State, reduced: Reduced) -> State:
        return State((state.w + reduced["delta"]).to(state.w))
