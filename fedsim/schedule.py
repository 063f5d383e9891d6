"""Who works when, without a tensor: the timetable of an event-driven method.

A `Schedule` is told what happened (a client came back with its work or without it, a timer rang) and answers with a
`Plan`: which sum the update is added to, whether the next global model is made now and of which sums, who is given a
task. `fedsim.asynchronous` carries plans out on a federation; `simulate` carries them out without training, so that a
timetable can be drawn and tried on thousands of clients in seconds. Both see the same events.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from fedsim import random
from fedsim.attendance import is_there
from fedsim.clients.availability import Availability, Trip, trip
from fedsim.clients.systems import System
from fedsim.clock import Clock
from fedsim.errors import RunError

Staleness = dict[int, int]
"""How many contributions were aggregated that many global models after the one they started from."""


@dataclass(slots=True)
class Plan:
    """What to do after an event, in the order of the fields.

    Attributes:
        drop: Groups whose sums are forgotten.
        fold: Group to whose sum the update is added that has just arrived; None: to none.
        use: Groups from whose sums the next global model is made; empty: none is made now.
        send: Clients that get a task, and its local steps (None: the configured work).
        draw: How many more tasks go to idle clients drawn at random; for one that never comes another is drawn.
        timers: Times in nanoseconds at which to be told, each with a tag.
    """

    drop: tuple[int, ...] = ()
    fold: int | None = None
    use: tuple[int, ...] = ()
    send: list[tuple[int, int | None]] = field(default_factory=list)
    draw: int = 0
    timers: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Schedule:
    """A method's timetable, and how far it has come. A tree that checkpoints hold (`fedsim.tree`).

    Updates are kept as sums by group and start version: what is held grows with the versions under way, not with the
    clients.

    Attributes:
        version: Number of the global model.
        started: Of every client at work the version that it started from.
        held: Contributions that wait: their number by group and start version.
        draws: Number of idle clients that were drawn.
    """

    version: int = 0
    started: dict[int, int] = field(default_factory=dict)
    held: dict[int, dict[int, int]] = field(default_factory=dict)
    draws: int = 0

    def begin(self, num_clients: int) -> Plan:
        """The first tasks, at time 0."""
        raise NotImplementedError

    def arrival(self, client: int, now: int) -> Plan:
        """``client`` has brought its update at ``now`` (nanoseconds)."""
        raise NotImplementedError

    def dropout(self, client: int, now: int) -> Plan:
        """``client`` has lost its work, and can be reached again at ``now``."""
        raise NotImplementedError

    def gone(self, client: int, now: int) -> Plan:
        """``client`` has left for good with its task, or was never there to take it; it must not be sent another."""
        return Plan()

    def timer(self, tag: int, now: int) -> Plan:
        """The timer that a plan asked for rings."""
        return Plan()

    def count(self, plan: Plan, start: int) -> Staleness:
        """Books a plan's sums, before its tasks are handed out.

        Args:
            plan: The plan.
            start: Version that the arrived client started from, if one has arrived.

        Returns:
            The staleness of what is aggregated; empty if no global model is made.
        """
        for name in plan.drop:
            self.held.pop(name, None)
        if plan.fold is not None:
            group = self.held.setdefault(plan.fold, {})
            group[start] = group.get(start, 0) + 1
        stale: Staleness = {}
        for name in plan.use:
            for version, number in self.held.pop(name, {}).items():
                staleness = self.version - version
                stale[staleness] = stale.get(staleness, 0) + number
        self.version += bool(plan.use)
        return stale


def drawn(seed: int, number: int, num_clients: int, busy: Container[int], there: Callable[[int], bool]) -> int | None:
    """An idle client, uniformly among those that are available; if none of many tries is, then among all idle ones.

    Args:
        seed: The run's seed.
        number: Number of the draw in the run.
        num_clients: Size of the population.
        busy: Clients at work.
        there: Whether a client is available now.

    Returns:
        None if nobody is idle.
    """
    idle = None
    for attempt in range(64):
        client = random.derive(seed, "idle", number, attempt) % num_clients
        if client not in busy:
            if there(client):
                return client
            idle = client if idle is None else idle
    if idle is not None:
        return idle
    left = [client for client in range(num_clients) if client not in busy]
    return left[random.derive(seed, "idle", number) % len(left)] if left else None


def check_hope(fruitless: int, under_way: int) -> None:
    """Gives up where nothing ever comes back.

    Args:
        fruitless: Tasks that were lost since one came back.
        under_way: Tasks under way.

    Raises:
        RunError: Far more tasks were lost than are under way.
    """
    if fruitless > max(1000, 100 * under_way):
        raise RunError(
            f"the latest {fruitless:,} tasks were all lost: nothing comes back from clients; lower system.dropout, or "
            "look at availability and at the failures in visits.csv"
        )


class Contribution(NamedTuple):
    """A task of a simulated timetable.

    Attributes:
        client: Client id.
        steps: Local steps.
        version: The global model that it started from.
        begin: When the client took it, nanoseconds.
        end: When its upload was through, or it was lost.
        finished: Whether something came back.
    """

    client: int
    steps: int
    version: int
    begin: int
    end: int
    finished: bool


@dataclass
class Simulated:
    """What `simulate` has seen so far.

    Attributes:
        time: Virtual time, nanoseconds.
        events: Arrivals, dropouts and timers.
        models: Of every global model the time (nanoseconds) at which it was made, and the staleness of what it is
            made of.
        contributions: Tasks that are over, in the order of their ends.
        pending: Tasks under way, by client.
    """

    time: int = 0
    events: int = 0
    models: list[tuple[int, Staleness]] = field(default_factory=list)
    contributions: list[Contribution] = field(default_factory=list)
    pending: dict[int, Contribution] = field(default_factory=dict)


def simulate(
    schedule: Schedule,
    num_clients: int,
    steps: Callable[[int], int],
    system: System,
    availability: Availability,
    bytes_down: int = 0,
    bytes_up: int = 0,
    seed: int = 0,
) -> Iterator[Simulated]:
    """Carries out a timetable without training.

    Args:
        schedule: A new one; it is changed.
        num_clients: Size of the population.
        steps: Local steps of a client's configured work.
        system: How long tasks take.
        availability: When clients are there.
        bytes_down: Bytes of a task's download.
        bytes_up: Bytes of its upload.
        seed: The run's seed.

    Yields:
        The same object after every event, brought up to date; ends when no event can come.

    Raises:
        RunError: All tasks have been lost for very long.
    """
    clock, seen, visits = Clock(), Simulated(), dict[int, int]()
    left, fruitless = set[int](), 0

    def send(client: int, count: int | None) -> None:
        count = steps(client) if count is None else count
        visits[client] = visit = visits.get(client, 0) + 1
        way = trip(system, availability, client, visit, clock.now, count, bytes_down, bytes_up, seed)
        schedule.started[client] = schedule.version
        if way is None:  # it is never there to take it
            way = Trip(clock.now, clock.now, False, None)
        if way.back is None:
            left.add(client)
        seen.pending[client] = Contribution(client, count, schedule.version, way.begin, way.end, way.finished)
        clock.schedule(way.end if way.back is None else way.back, "arrival", client)

    def there(client: int) -> bool:
        return is_there(availability, client, clock.now, seed)

    def carry_out(plan: Plan, start: int) -> None:
        stale = schedule.count(plan, start)
        if plan.use:
            seen.models.append((clock.now, stale))
        for client, count in plan.send:
            send(client, count)
        for _ in range(plan.draw):
            schedule.draws += 1
            another = drawn(seed, schedule.draws, num_clients, schedule.started, there)
            if another is not None:
                send(another, None)
        for time, tag in plan.timers:
            clock.schedule(time, "timer", tag)

    carry_out(schedule.begin(num_clients), 0)
    while len(clock):
        event = clock.pop()
        start = 0
        if event.kind == "timer":
            plan = schedule.timer(int(event.key), clock.now)
        else:
            client = int(event.key)
            task = seen.pending.pop(client)
            seen.contributions.append(task)
            fruitless = 0 if task.finished else fruitless + 1
            check_hope(fruitless, len(seen.pending))
            if client in left:  # it stays among those that were sent a task: nobody draws it
                plan = schedule.gone(client, clock.now)
            else:
                start = schedule.started.pop(client)
                plan = (schedule.arrival if task.finished else schedule.dropout)(client, clock.now)
        carry_out(plan, start)
        seen.time, seen.events = clock.now, seen.events + 1
        yield seen
