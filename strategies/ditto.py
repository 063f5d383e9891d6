"""Ditto: FedAvg, and beside it a personal model of every client that is pulled towards the global one.

Source: Li et al., 2021, Algorithm 1, https://arxiv.org/abs/2012.04221; stated from memory.
Departures:
    1. Personal models start from what the client first received.
    2. Clients are averaged by their numbers of examples (``weights=uniform``: all alike).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedsim.clients.local import Local
from fedsim.clients.visit import ClientOptions
from fedsim.errors import ConfigError
from fedsim.network import Network
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import ClientHalf, Grad, require


@dataclass(frozen=True)
class Pull(ClientHalf):
    """Local training of ``F_k(v) + lam / 2 * |v - start|^2``.

    Attributes:
        lam: Weight of the pull.
    """

    batched: ClassVar = True

    lam: float

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        return grad(w) + self.lam * (w - local.start)


@dataclass(frozen=True)
class Ditto(FedAvg):
    """Ditto. The global model is FedAvg's, bit for bit; personal models are in the clients' memory as ``v``.

    Attributes:
        lam: Weight of ``lam / 2 * |v - w|^2`` with the received global model w, >= 0; 0: local models.
        personal_epochs: Local epochs of the personal model, >= 1; None: the configured work.
    """

    batched: ClassVar = True
    parent: ClassVar = None

    lam: float = 0.1
    personal_epochs: int | None = None

    def check(self) -> None:
        super().check()
        require(self.lam >= 0, "strategy.lam", ">= 0", self.lam)
        epochs = self.personal_epochs
        require(epochs is None or epochs >= 1, "strategy.personal_epochs", ">= 1, or null for the usual work", epochs)

    def check_network(self, network: Network, options: ClientOptions) -> None:
        if network.buffer_layout.d and options.buffers != "frozen":
            raise ConfigError(
                f"ditto trains two models in a visit, and client.buffers={options.buffers} keeps the batch-norm "
                "statistics of one: choose a model with group norm, or set client.buffers=frozen"
            )

    def planned_steps(self, options: ClientOptions, n: int) -> int:
        own = options if self.personal_epochs is None else replace(options, epochs=self.personal_epochs, steps=None)
        return options.planned_steps(n) + own.planned_steps(n)

    def memory(self, local: Local) -> dict[str, Tensor]:
        return {"v": local.start}

    def work(self, local: Local) -> Tensor:
        pull = Pull(self.lam)
        local.memory.v = local.train(local.memory.v, half=pull, epochs=self.personal_epochs, stream="personal")
        return local.train(local.start)

    def personal(self, local: Local) -> Tensor:
        return local.memory.v
