"""FedPer: the last layers stay with the client, the rest is averaged.

Source: Arivazhagan et al., 2019, https://arxiv.org/abs/1912.00818; stated from memory.
Departures:
    1. The private layers of all clients start from the common initial model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedsim.clients.visit import ClientOptions
from fedsim.errors import ConfigError
from fedsim.network import Network
from fedsim.parts import head_of
from fedsim.strategies.fedavg import FedAvg
from fedsim.vector import Layout


@dataclass(frozen=True)
class FedPer(FedAvg):
    """FedPer. Both parts are trained together.

    Attributes:
        private: Pattern of the parameters that stay with the client; None: none, which gives FedAvg.
    """

    batched: ClassVar = True
    parent: ClassVar = "fedavg"
    neutral: ClassVar = {"private": None}
    exempt: ClassVar = {
        "one_full_batch_step_is_gradient_descent": "the law's model has no head",
        "loss_falls_on_two_quadratic_clients": "the law's model has no head",
    }

    private: str | None = "head."

    def model(self, module: nn.Module) -> nn.Module:
        if self.private == "head.":
            head_of(module, "fedper")
        return module

    def check_network(self, network: Network, options: ClientOptions) -> None:
        if self.private is not None and len(network.layout.match(self.private)) == len(network.layout.names):
            raise ConfigError(
                f"strategy.private={self.private} leaves nothing of the model to be shared: choose a model with more "
                "layers, or strategy=local, where every client trains alone"
            )

    def parts(self, layout: Layout) -> dict[str, str]:
        return {} if self.private is None else {self.private: "private"}
