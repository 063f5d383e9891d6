"""FedSGD: one gradient step per visit, over all of a client's examples.

Source: McMahan et al., 2017, section 2, https://arxiv.org/abs/1602.05629, in the form that the paper gives for FedAvg
with one epoch and one batch: every client steps along its gradient at the global model, and the steps are averaged,
``w - lr sum_k n_k / n grad F_k(w)``.
Departures: none known.

It is FedAvg under ``client.epochs=1 client.batch_size=null``, bit for bit. So ``client.epochs``, ``client.steps`` and
``client.batch_size`` have no effect, and giving one is refused; whatever else is configured for a client's step
(``client.lr``, its decay, ``client.clip_norm``, an optimizer other than SGD) keeps its meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsim.clients.local import Local
from fedsim.clients.visit import ClientOptions
from fedsim.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class FedSGD(FedAvg):
    """FedSGD. Averages like FedAvg."""

    # Not a parent by options of its own: FedAvg under other options of the client is no law that the suite knows.
    batched: ClassVar = True
    parent: ClassVar[str | None] = None
    unused: ClassVar = dict.fromkeys(
        ("client.epochs", "client.steps", "client.batch_size", "client.drop_last"),
        "a visit is one step over all of a client's examples",
    )

    def planned_steps(self, options: ClientOptions, n: int) -> int:
        return min(n, 1)

    def schedule(self, local: Local) -> dict[str, int]:
        return {"batch_size": local.n}

    def work(self, local: Local) -> Tensor:
        return local.train(local.start, epochs=1)
