"""FedAvg with fine-tuning: a client's own model is the global one after some training on its own data.

Source: Jiang et al., 2019, https://arxiv.org/abs/1909.12488, which studies FedAvg's model as a start for fine-tuning;
stated from memory.
Departures:
    1. Fine-tuning uses the local optimizer and rate of the rounds; the paper chooses others for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsim.clients.local import Local
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import require


@dataclass(frozen=True)
class FedAvgFT(FedAvg):
    """FedAvg whose models are fine-tuned whenever they are evaluated; nothing of that is kept.

    Attributes:
        finetune_epochs: Local epochs from the global model, >= 0; 0 gives FedAvg.
    """

    batched: ClassVar = True
    parent: ClassVar = "fedavg"
    neutral: ClassVar = {"finetune_epochs": 0}

    finetune_epochs: int = 1

    def check(self) -> None:
        super().check()
        require(self.finetune_epochs >= 0, "strategy.finetune_epochs", ">= 0", self.finetune_epochs)

    def personal(self, local: Local) -> Tensor:
        if not self.finetune_epochs:
            return local.start
        return local.train(local.start, epochs=self.finetune_epochs, stream="finetune")
