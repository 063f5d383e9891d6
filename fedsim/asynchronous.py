"""Event-driven methods: a timetable (`fedsim.schedule`) and what it does with updates, carried out on a federation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.federation import Event, Federation
from fedsim.reduce import Reduced
from fedsim.schedule import Plan, Schedule
from fedsim.strategy import Info, Strategy, require

Terms = dict[str, Any]
"""What is summed over the contributions of one group and start version: tensors and floats, by name."""

DISCOUNTS = ("polynomial", "hinge", "constant")


@dataclass(frozen=True)
class AsyncState:
    """What the server of an event-driven method carries.

    Attributes:
        w: Global parameters, ``[d]``.
        held: Sums of contributions that wait, by group and start version.
    """

    w: Tensor
    held: dict[int, dict[int, Terms]] = field(default_factory=dict)


@dataclass(frozen=True)
class Asynchronous(Strategy):
    """The server half of an event-driven method: it gives `timetable`, `terms` and `merge`.

    A round ends when the global model changes. Clients get the newest one with every task.
    """

    exempt: ClassVar[dict[str, str]] = {
        "clients_trained_together_have_the_numbers_of_each_alone": "tasks are handed out one by one"
    }
    unused: ClassVar[dict[str, str]] = {
        f"participation.{key}": "there are no cohorts: the method itself says who works when"
        for key in ("fraction", "clients_per_round", "probability", "deadline", "over_selection")
    } | {
        "participation": "there are no cohorts: the method itself says who works when",
        "client.batching": "clients are given their tasks one by one",
    }

    def timetable(self, num_clients: int) -> Schedule:
        """A new timetable."""
        raise NotImplementedError(f"{type(self).__name__} needs `timetable`")

    def terms(self, fed: Federation, update: Reduced, steps: int) -> Terms:
        """What one contribution adds to the sums: tensors and floats by name.

        Args:
            fed: The federation.
            update: The client's entries.
            steps: Local steps that it made.
        """
        raise NotImplementedError(f"{type(self).__name__} needs `terms`")

    def merge(self, state: Any, sums: Sequence[tuple[int, Terms]], groups: tuple[int, ...]) -> Any:
        """The state with the next global model.

        Args:
            state: The state.
            sums: For every start version its staleness now, and the sums of `terms` over its contributions.
            groups: The groups that they are from.
        """
        raise NotImplementedError(f"{type(self).__name__} needs `merge`")

    def init(self, info: Info, w: Tensor) -> Any:
        """See `Strategy.init`."""
        return AsyncState(w)

    def prepare(self, fed: Federation, state: Any) -> Any:
        """Hands out the first tasks."""
        fed.schedule = self.timetable(fed.num_clients)
        return self._carry_out(fed, state, fed.schedule.begin(fed.num_clients))

    def round(self, fed: Federation, state: Any) -> Any:
        """Deals with events until the global model has changed."""
        schedule = fed.schedule
        assert schedule is not None
        version = schedule.version
        while schedule.version == version:
            event = fed.next_event()
            if event.kind == "timer":
                state = self._carry_out(fed, state, schedule.timer(int(event.tag or 0), event.time))
                continue
            assert event.client is not None
            happened = {"arrival": schedule.arrival, "dropout": schedule.dropout, "departure": schedule.gone}
            state = self._carry_out(fed, state, happened[event.kind](event.client, fed.now), event)
        return state

    def _carry_out(self, fed: Federation, state: Any, plan: Plan, event: Event | None = None) -> Any:
        schedule, start = fed.schedule, 0
        assert schedule is not None
        if event is not None and event.client is not None and event.kind != "departure":
            start = schedule.started.pop(event.client)
        if plan.drop:
            state = replace(state, held={g: sums for g, sums in state.held.items() if g not in plan.drop})
        if plan.fold is not None:
            assert event is not None and event.update is not None
            terms = self.terms(fed, event.update, event.steps)
            if event.buffers is not None:
                terms |= {"buffers": event.buffers, "count": 1.0}
            state = _added(state, plan.fold, start, terms)
        stale = schedule.count(plan, start)
        if plan.use:
            # The version is counted already: what came from the newest model is fresh, 0 models old.
            used = [item for group in plan.use for item in state.held.get(group, {}).items()]
            sums = [(schedule.version - 1 - version, terms) for version, terms in used]
            state = replace(state, held={g: sums for g, sums in state.held.items() if g not in plan.use})
            self._adopt_buffers(fed, [terms for _, terms in sums])
            state = self.merge(state, sums, plan.use)
            total = sum(stale.values())
            fed.log |= {
                "contributions": total,
                "staleness_mean": sum(tau * n for tau, n in stale.items()) / total,
                "staleness_max": max(stale),
                "staleness": {str(tau): n for tau, n in sorted(stale.items())},
            }
        for client, steps in plan.send:
            self._send(fed, state, client, steps)
        for _ in range(plan.draw):
            another = fed.idle()
            if another is not None:
                self._send(fed, state, another, None)
        for time, tag in plan.timers:
            fed.timer(time, tag)
        return state

    def _send(self, fed: Federation, state: Any, client: int, steps: int | None) -> None:
        schedule = fed.schedule
        assert schedule is not None
        schedule.started[client] = schedule.version
        fed.dispatch(client, state, steps)

    def _adopt_buffers(self, fed: Federation, sums: Sequence[Terms]) -> None:
        """Batch-norm statistics: the mean over what is aggregated, every contribution alike."""
        if fed.buffers is not None and any("buffers" in terms for terms in sums):
            total = sum(terms["buffers"] for terms in sums) / sum(terms["count"] for terms in sums)
            fed.buffers = total.to(fed.buffers.dtype)


def _added(state: Any, group: int, version: int, terms: Terms) -> Any:
    """The state with terms added to the sums of a group and start version; what was there is not changed."""
    versions = dict(state.held.get(group, {}))
    before = versions.get(version)
    versions[version] = terms if before is None else {name: before[name] + value for name, value in terms.items()}
    return replace(state, held={**state.held, group: versions})


def check_discount(kind: str, a: float, b: float) -> None:
    """Refuses impossible options of `discount`."""
    require(kind in DISCOUNTS, "strategy.staleness", f"one of {', '.join(DISCOUNTS)}", kind)
    require(a >= 0, "strategy.a", ">= 0", a)
    require(b >= 0, "strategy.b", ">= 0", b)


def discount(kind: str, a: float, b: float, staleness: int) -> float:
    """The weight of a contribution that is ``staleness`` global models old, in (0, 1].

    Args:
        kind: ``polynomial``: (1 + staleness)^-a; ``hinge``: 1 up to b, then 1 / (a (staleness - b) + 1);
            ``constant``: 1.
        a: How fast it falls, >= 0.
        b: Where the hinge is, >= 0.
        staleness: >= 0.
    """
    if kind == "polynomial":
        return math.pow(1 + staleness, -a)
    return 1 / (a * (staleness - b) + 1) if kind == "hinge" and staleness > b else 1.0


def moved(w: Tensor, step: Tensor) -> Tensor:
    """``w + step`` in float64, rounded once; ``[d]``."""
    return torch.add(w.double(), step).to(w)
