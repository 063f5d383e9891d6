"""FedSGD: one gradient step per visit, over all of a client's examples.

Source: McMahan et al., 2017, section 2, https://arxiv.org/abs/1602.05629, in the form that the paper gives for FedAvg
with one epoch and one batch: every client steps along its gradient at the global model, and the steps are averaged,
``w - lr sum_k n_k / n grad F_k(w)``.
Departures: none known.

It is FedAvg under ``client.epochs=1 client.batch_size=null``, bit for bit. So ``client.epochs``, ``client.steps`` and
``client.batch_size`` have no effect; whatever else is configured for a client's step (``client.lr``, its decay,
``client.clip_norm``, an optimizer other than SGD) keeps its meaning.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsim.clients.local import Local
from fedsim.federation import Federation
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import State

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FedSGD(FedAvg):
    """FedSGD. Averages like FedAvg."""

    # Not a parent by options of its own: FedAvg under other options of the client is no law that the suite knows.
    parent: ClassVar[str | None] = None

    def prepare(self, fed: Federation, state: State) -> State:
        given = {"epochs": fed.options.epochs, "steps": fed.options.steps, "batch_size": fed.options.batch_size}
        unused = [f"client.{k}={v}" for k, v in given.items() if v is not None and (k, v) != ("epochs", 1)]
        if unused:
            log.warning("%s: no effect with fedsgd, whose visit is one step over all examples", ", ".join(unused))
        return state

    def schedule(self, local: Local) -> dict[str, int]:
        return {"batch_size": local.n}

    def work(self, local: Local) -> Tensor:
        return local.train(local.start, epochs=1)
