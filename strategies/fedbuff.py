"""FedBuff: the server waits for a few updates, from whatever models they started, and takes a step along their mean.

Source: Nguyen et al., 2022 (AISTATS), https://arxiv.org/abs/2106.06639; stated from memory of the paper, which was not
at hand.

Departures:
    1. Every client gets a new task as soon as it is back. With `concurrency`, as in the paper, so many are at work, and
       whoever comes back makes room for an idle client drawn at random.
    2. No differential privacy, and no secure aggregation.
    3. A client that loses its work gets another task as soon as it can be reached; the paper knows no such clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedsim.asynchronous import Asynchronous, AsyncState, Terms, check_discount, discount, moved
from fedsim.federation import Federation
from fedsim.reduce import Reduced
from fedsim.strategies.fedasync import Pool, check_concurrency
from fedsim.strategy import require


@dataclass(frozen=True)
class FedBuff(Asynchronous):
    """Buffered asynchronous aggregation.

    Attributes:
        buffer_size: K, updates in a step of the server, >= 1.
        server_lr: Server step, > 0.
        staleness: ``polynomial``, ``hinge`` or ``constant``: how stale updates are weighted.
        a: How fast that weight falls, >= 0.
        b: Where the hinge is, >= 0.
        concurrency: Clients at work, at least 1; null: all.
    """

    quick: ClassVar = {"buffer_size": 2}

    buffer_size: int = 10
    server_lr: float = 1.0
    staleness: str = "polynomial"
    a: float = 0.5
    b: float = 4.0
    concurrency: int | None = None

    def check(self) -> None:
        """See `ClientHalf.check`."""
        require(self.buffer_size >= 1, "strategy.buffer_size", ">= 1", self.buffer_size)
        require(self.server_lr > 0, "strategy.server_lr", "> 0", self.server_lr)
        check_concurrency(self.concurrency)
        check_discount(self.staleness, self.a, self.b)

    def timetable(self, num_clients: int) -> Pool:
        """See `Asynchronous.timetable`."""
        return Pool(buffer_size=self.buffer_size, concurrency=self.concurrency)

    def terms(self, fed: Federation, update: Reduced, steps: int) -> Terms:
        """See `Asynchronous.terms`."""
        return {"delta": update["delta"]}

    def merge(self, state: AsyncState, sums: Sequence[tuple[int, Terms]], groups: tuple[int, ...]) -> AsyncState:
        """A step along the sum of the discounted updates, divided by the size of the buffer."""
        step = torch.zeros_like(state.w, dtype=torch.float64)
        for staleness, terms in sums:
            step += discount(self.staleness, self.a, self.b, staleness) * terms["delta"]
        return replace(state, w=moved(state.w, self.server_lr / self.buffer_size * step))
