"""Virtual time: integer nanoseconds, and a queue of events to come.

Integers, because sums of floats depend on the order in which they are made, and two events that are due
together must be seen to be.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedsim.errors import RunError

KINDS = ("arrival", "timer")
"""Kinds of event; of those due at the same time, earlier kinds come first."""

Tree = Any
"""Ints, floats, strings, None, and lists, tuples and dicts of them: what a checkpoint can hold."""


def ns(seconds: float) -> int:
    """Seconds in whole nanoseconds, rounded to nearest (half to even).

    Args:
        seconds: >= 0 and finite.

    Raises:
        ValueError: ``seconds`` is NaN, negative or infinite.
    """
    if isinstance(seconds, int) and seconds >= 0:
        return seconds * 1_000_000_000  # exact, however large
    scaled = seconds * 1e9
    if not (math.isfinite(scaled) and seconds >= 0):
        raise ValueError(f"virtual time needs a finite number of seconds >= 0, got {seconds!r}")
    return round(scaled)


class Event(NamedTuple):
    """Something that happens at a point of virtual time.

    Attributes:
        time: When it was due, nanoseconds.
        kind: One of `KINDS`.
        key: The client id of an arrival, the tag of a timer.
        payload: What `Clock.schedule` was given.
    """

    time: int
    kind: str
    key: int | str
    payload: Tree = None


class Clock:
    """Virtual time and its event queue.

    Events come out by time, then kind (arrivals before timers), then key (ints before strings), then in the
    order in which they were scheduled: never by anything that depends on real speed.
    """

    def __init__(self) -> None:
        self._now = 0
        self._sequence = 0
        # (time, rank of kind, key is a string, key, sequence, payload); sequence is unique: payloads are not compared
        self._heap: list[tuple[int, int, bool, int | str, int, Tree]] = []

    @property
    def now(self) -> int:
        """Nanoseconds since the start of the run."""
        return self._now

    @property
    def seconds(self) -> float:
        """`now` in seconds, for people and plots."""
        return self._now / 1e9

    def __len__(self) -> int:
        """Number of events to come."""
        return len(self._heap)

    def schedule(self, time_ns: int, kind: str, key: int | str, payload: Tree = None) -> None:
        """Put an event into the queue.

        Args:
            time_ns: When it is due, in nanoseconds since the start, not before `now`.
            kind: One of `KINDS`.
            key: The client id of an arrival, the tag of a timer.
            payload: Comes back with the event; a plain tree, since checkpoints hold it.

        Raises:
            ValueError: The time is not a whole number or lies in the past, or the kind is unknown.
        """
        if type(time_ns) is not int:
            raise ValueError(
                f"virtual time is whole nanoseconds, got {time_ns!r}; convert seconds with fedsim.clock.ns"
            )
        if kind not in KINDS:
            raise ValueError(f"an event is one of {', '.join(KINDS)}, got {kind!r}")
        if isinstance(key, bool) or not isinstance(key, (int, str)):
            raise ValueError(f"the key of an event is a client id or a tag (int or string), got {key!r}")
        if time_ns < self._now:
            raise ValueError(
                f"cannot schedule {kind} {key!r} in the past: it is due at {time_ns} ns, now is {self._now} ns; "
                "give an absolute time, such as now + duration"
            )
        heapq.heappush(self._heap, (time_ns, KINDS.index(kind), isinstance(key, str), key, self._sequence, payload))
        self._sequence += 1

    def pop(self) -> Event:
        """The next event; time moves to it.

        Time never moves back: an event that became overdue because `advance` passed it comes out late, with
        ``event.time`` before `now`.

        Raises:
            RunError: The queue is empty.
        """
        if not self._heap:
            raise RunError(
                f"waiting for an event at {self.seconds:g} virtual seconds, but no client is at work and no timer is "
                "set, so none can come; dispatch a client or set a timer before asking for the next event"
            )
        time, rank, _, key, _, payload = heapq.heappop(self._heap)
        self._now = max(self._now, time)
        return Event(time, KINDS[rank], key, payload)

    def advance(self, duration_ns: int) -> None:
        """Let time pass without an event (what a barrier took).

        Args:
            duration_ns: Whole nanoseconds, >= 0.

        Raises:
            ValueError: ``duration_ns`` is negative or no whole number.
        """
        if type(duration_ns) is not int or duration_ns < 0:
            raise ValueError(f"virtual time advances by whole nanoseconds >= 0, got {duration_ns!r}")
        self._now += duration_ns

    def state(self) -> dict[str, Tree]:
        """Everything that `restore` needs, as a plain tree.

        Events stand in the order in which they will come, so that equal clocks have equal states.
        """
        events = [
            (time, KINDS[rank], key, sequence, payload) for time, rank, _, key, sequence, payload in sorted(self._heap)
        ]
        return {"now": self._now, "sequence": self._sequence, "events": events}

    @classmethod
    def restore(cls, tree: Mapping[str, Tree]) -> Clock:
        """The clock whose `state` this is.

        Args:
            tree: What `state` returned; lists may stand for tuples.
        """
        clock = cls()
        clock._now, clock._sequence = tree["now"], tree["sequence"]
        clock._heap = [
            (time, KINDS.index(kind), isinstance(key, str), key, sequence, payload)
            for time, kind, key, sequence, payload in tree["events"]
        ]
        heapq.heapify(clock._heap)
        return clock
