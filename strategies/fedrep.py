"""FedRep: a common representation under private heads, the two trained in turn.

Source: Collins et al., 2021, Algorithm 1, https://arxiv.org/abs/2102.07078; stated from memory.
Departures:
    1. The head is trained for whole epochs; the paper counts its steps.
    2. The private heads of all clients start from the common initial model.
    3. The representation makes the configured local work, and clients are averaged by their numbers of examples; in the
       paper it makes one step, and all clients count alike (``client.epochs=null client.steps=1``,
       ``strategy.weights=uniform``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from fedsim.clients.local import Local
from fedsim.clients.visit import ClientOptions
from fedsim.errors import ConfigError
from fedsim.parts import head_of
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import require
from fedsim.vector import Layout, trainable


@dataclass(frozen=True)
class FedRep(FedAvg):
    """FedRep. A visit trains the head under fixed features, then the features under the new head.

    Attributes:
        head_epochs: Local epochs of the head, >= 1; those of the features are the configured work.
    """

    batched: ClassVar = True
    parent: ClassVar = None
    exempt: ClassVar = {
        "one_full_batch_step_is_gradient_descent": "the law's model has no head",
        "loss_falls_on_two_quadratic_clients": "the law's model has no head",
    }

    head_epochs: int = 1

    def check(self) -> None:
        super().check()
        require(self.head_epochs >= 1, "strategy.head_epochs", ">= 1", self.head_epochs)

    def model(self, module: nn.Module) -> nn.Module:
        head_of(module, "fedrep")
        if other := [n for n in trainable(module) if not n.startswith(("head.", "features."))]:
            raise ConfigError(
                f"fedrep trains features and head, and '{other[0]}' is in neither: move it into one of them"
            )
        if not any(n.startswith("features.") for n in trainable(module)):
            raise ConfigError("fedrep needs features with weights, which its clients share: choose another model")
        return module

    def planned_steps(self, options: ClientOptions, n: int) -> int:
        head = replace(options, epochs=self.head_epochs, steps=None)
        return head.planned_steps(n) + options.planned_steps(n)

    def parts(self, layout: Layout) -> dict[str, str]:
        return {"head.": "private"}

    def work(self, local: Local) -> Tensor:
        w = local.train(local.start, only="head.", epochs=self.head_epochs, stream="head")
        return local.train(w, only="features.")
