"""Tasks under way in virtual time: handed out, not back yet.

What comes next is known before anything is trained, so an engine is given the tasks that come back first, a few more
than it has workers: workers have something to do, and results that wait for their turn take memory for these only.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedsim import tree
from fedsim.engine.base import Engine


@dataclass(eq=False)
class Snapshot:
    """What a global model's clients are sent. It lives as long as somebody is at work on it.

    Attributes:
        sent: The payload.
        handle: The engine's, once a task has needed it.
    """

    sent: dict[str, Any]
    handle: Any = None

    def at(self, engine: Engine) -> Any:
        """The engine's handle; put there once."""
        if self.handle is None:
            self.handle = engine.put(self.sent)
        return self.handle

    def is_of(self, sent: Mapping[str, Any]) -> bool:
        """Whether it holds these very objects."""
        return self.sent.keys() == sent.keys() and all(self.sent[name] is value for name, value in sent.items())


@dataclass(frozen=True)
class Flight:
    """A task under way: enough to compute it again after a resume.

    Attributes:
        client: Client id.
        visit: The client's task number.
        round_num: Round in which it was handed out.
        steps: Local steps, or None for the configured work.
        snapshot: What went down; empty for a task that gets lost: it is never trained.
        unicast: What went down to this client alone; the same.
        marks: Digests of the `once` payloads that are new to the client, by memory row.
        down: Bytes that were sent to the client.
        begin: When the client takes it, nanoseconds.
        end: When it is back, or lost.
        finished: Whether something comes back.
        gone: Whether the client leaves for good.
    """

    client: int
    visit: int
    round_num: int
    steps: int | None
    snapshot: Snapshot
    unicast: dict[str, Any]
    marks: dict[str, Tensor]
    down: int
    begin: int
    end: int
    finished: bool
    gone: bool


@dataclass
class Flights:
    """All tasks under way, and those of them that the engine has.

    Attributes:
        ahead: How many tasks the engine is given before they are waited for.
        under_way: By client.
        tickets: What the engine has: ``(piece, ticket)`` by client.
    """

    ahead: int
    under_way: dict[int, Flight] = field(default_factory=dict)
    tickets: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    _waiting: list[tuple[int, int, int]] = field(default_factory=list)  # end, client, visit

    def add(self, flight: Flight) -> None:
        """Takes a task."""
        self.under_way[flight.client] = flight
        if flight.finished:
            heapq.heappush(self._waiting, (flight.end, flight.client, flight.visit))

    def due(self, every: bool = False) -> Iterator[Flight]:
        """Tasks that the engine should have now, or ``every`` one; those first that are back first. The caller puts
        their tickets into `tickets`."""
        while self._waiting and (every or len(self.tickets) < self.ahead):
            _, client, visit = heapq.heappop(self._waiting)
            flight = self.under_way.get(client)
            if flight is not None and flight.visit == visit and client not in self.tickets:
                yield flight

    def saved(self) -> tuple[list[Any], list[dict[str, Any]]]:
        """Tasks and payloads as trees; equal payloads are kept once."""
        payloads: list[dict[str, Any]] = []
        places: dict[str, int] = {}
        hashes: dict[int, str] = {}
        flights: list[Any] = []
        for f in self.under_way.values():
            if id(f.snapshot) not in hashes:
                hashes[id(f.snapshot)] = tree.sha256(f.snapshot.sent)
            # By content, not by identity: after a resume equal payloads are other objects, and hashes must not change.
            if (place := places.setdefault(hashes[id(f.snapshot)], len(payloads))) == len(payloads):
                payloads.append(f.snapshot.sent)
            flights.append(
                (
                    f.client,
                    f.visit,
                    f.round_num,
                    f.steps,
                    place,
                    f.unicast,
                    f.marks,
                    f.down,
                    f.begin,
                    f.end,
                    f.finished,
                    f.gone,
                )
            )
        return flights, payloads

    @classmethod
    def restored(cls, ahead: int, flights: Iterable[Any], payloads: Iterable[dict[str, Any]]) -> Flights:
        """From what `saved` returned."""
        made, snapshots = cls(ahead), [Snapshot(sent) for sent in payloads]
        for client, visit, round_num, steps, place, *rest in flights:
            made.add(Flight(client, visit, round_num, steps, snapshots[place], *rest))
        return made
