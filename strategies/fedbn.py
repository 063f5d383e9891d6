"""FedBN: everything that belongs to norms stays with the client, the rest is averaged.

Source: Li et al., 2021, https://arxiv.org/abs/2102.07623; stated from memory.
Departures:
    1. Norms without statistics (group, layer) stay with the client likewise; the paper has batch norms.
    2. Clients are averaged by their numbers of examples; in the paper all count alike (``strategy.weights=uniform``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedsim.clients.visit import ClientOptions
from fedsim.errors import ConfigError
from fedsim.network import Network
from fedsim.parts import norms_of
from fedsim.strategies.fedavg import FedAvg
from fedsim.vector import Layout


@dataclass(frozen=True)
class FedBN(FedAvg):
    """FedBN. Statistics of batch norms stay with the client by ``client.buffers=local``, which it asks for."""

    batched: ClassVar = True
    parent: ClassVar = None
    needs: ClassVar = {
        "model": {"_target_": "fedsim.models.resnet.ResNet", "width": 2, "groups": 1, "weights": None},
        **{"client.epochs": None, "client.steps": 2, "client.batching": "off"},
    }
    exempt: ClassVar = {
        "one_full_batch_step_is_gradient_descent": "the law's model has no norms",
        "loss_falls_on_two_quadratic_clients": "the law's model has no norms",
    }

    def model(self, module: nn.Module) -> nn.Module:
        if not norms_of(module):
            raise ConfigError(
                f"fedbn keeps the weights of norms with the client, and {type(module).__name__} has none: choose a "
                "model with norms, such as resnet18_gn"
            )
        return module

    def check_network(self, network: Network, options: ClientOptions) -> None:
        if network.buffer_layout.d and options.buffers != "local":
            raise ConfigError(
                f"fedbn keeps the statistics of norms with the client, got client.buffers={options.buffers}: set "
                "client.buffers=local"
            )

    def parts(self, layout: Layout) -> dict[str, str]:
        return dict.fromkeys(layout.norms, "private")
