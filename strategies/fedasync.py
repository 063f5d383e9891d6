"""FedAsync: the server mixes every model that comes back into the global one, less the staler it is.

Source: Xie, Koyejo and Gupta, 2019 (arXiv 1903.03934), https://arxiv.org/abs/1903.03934; stated from memory of the
paper, which was not at hand.

Departures:
    1. Tasks take what the group ``system`` says, so that staleness follows from speeds; the paper draws it uniformly.
    2. Every client gets a new task as soon as it is back. With `concurrency` so many are at work, and whoever comes
       back makes room for an idle client drawn at random; the paper's scheduler triggers clients at random times.
    3. A client that loses its work gets another task as soon as it can be reached; the paper knows no such clients.
    4. A model that started from the newest global one has staleness 0 and the full weight `alpha`. The paper's
       algorithm compares with the number of the model that is being made, by which it would be 1.
    5. Batch-norm statistics are those of the model that came back last: they are not mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedsim.asynchronous import Asynchronous, AsyncState, Terms, check_discount, discount, moved
from fedsim.clients.local import Local
from fedsim.federation import Federation
from fedsim.reduce import Entry, Reduced, mean
from fedsim.schedule import Plan, Schedule
from fedsim.strategy import Grad, require


@dataclass
class Pool(Schedule):
    """Clients always at work: whoever comes back goes on, or makes room for another.

    Attributes:
        buffer_size: Contributions that make a global model.
        concurrency: Clients at work; None: all.
        waiting: Contributions since the last global model.
    """

    buffer_size: int = 1
    concurrency: int | None = None
    waiting: int = 0

    def begin(self, num_clients: int) -> Plan:
        """See `Schedule.begin`."""
        if self.concurrency is None or self.concurrency >= num_clients:
            self.concurrency = None
            return Plan(send=[(client, None) for client in range(num_clients)])
        return Plan(draw=self.concurrency)

    def arrival(self, client: int, now: int) -> Plan:
        """See `Schedule.arrival`."""
        plan = self._next(client)
        plan.fold = 0
        self.waiting += 1
        if self.waiting == self.buffer_size:
            plan.use, self.waiting = (0,), 0
        return plan

    def dropout(self, client: int, now: int) -> Plan:
        """See `Schedule.dropout`."""
        return self._next(client)

    def gone(self, client: int, now: int) -> Plan:
        """See `Schedule.gone`."""
        return Plan() if self.concurrency is None else Plan(draw=1)

    def _next(self, client: int) -> Plan:
        return Plan(send=[(client, None)]) if self.concurrency is None else Plan(draw=1)


@dataclass(frozen=True)
class FedAsync(Asynchronous):
    """Asynchronous federated optimisation.

    Attributes:
        alpha: Weight of a fresh model in the mixture, in (0, 1].
        staleness: ``polynomial``, ``hinge`` or ``constant``: how stale models are weighted.
        a: How fast that weight falls, >= 0.
        b: Where the hinge is, >= 0.
        rho: Weight of the client's proximal term, >= 0.
        concurrency: Clients at work, at least 1; null: all.
    """

    exempt: ClassVar = Asynchronous.exempt | {
        "one_full_batch_step_is_gradient_descent": "the server moves alpha of the way"
    }

    alpha: float = 0.6
    staleness: str = "polynomial"
    a: float = 0.5
    b: float = 4.0
    rho: float = 0.005
    concurrency: int | None = None

    def check(self) -> None:
        """See `ClientHalf.check`."""
        require(0 < self.alpha <= 1, "strategy.alpha", "in (0, 1]", self.alpha)
        require(self.rho >= 0, "strategy.rho", ">= 0", self.rho)
        check_concurrency(self.concurrency)
        check_discount(self.staleness, self.a, self.b)

    def timetable(self, num_clients: int) -> Pool:
        """See `Asynchronous.timetable`."""
        return Pool(concurrency=self.concurrency)

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        """The gradient of the loss plus rho/2 times the squared distance from the start, ``[C, d]``."""
        g = grad(w)
        return g + self.rho * (w - local.start) if self.rho else g

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        """The model itself goes up: it is mixed with a global model that has moved on."""
        return {"model": mean(w)}

    def terms(self, fed: Federation, update: Reduced, steps: int) -> Terms:
        """See `Asynchronous.terms`."""
        return {"model": update["model"]}

    def merge(self, state: AsyncState, sums: Sequence[tuple[int, Terms]], groups: tuple[int, ...]) -> AsyncState:
        """``w + alpha s(staleness) (w_i - w)``."""
        ((staleness, terms),) = sums
        rate = self.alpha * discount(self.staleness, self.a, self.b, staleness)
        return replace(state, w=moved(state.w, rate * (terms["model"] - state.w)))


def check_concurrency(concurrency: int | None) -> None:
    """Refuses an impossible number of clients at work."""
    require(concurrency is None or concurrency >= 1, "strategy.concurrency", "at least 1, or null", concurrency)
