"""Who is there, and who is back in time: what availability, lost tasks, deadlines and over-selection do to a cohort."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fedsim.clients.availability import Always, Availability, Trip
from fedsim.clients.participation import Participation
from fedsim.clock import ns
from fedsim.errors import ConfigError, FedsimError

MOST = 10_000
"""Clients that are asked, at least, before it is said that nobody is there."""
TRIES = 100
"""How often a cohort of which nobody comes back is asked again."""


class Ended(FedsimError):
    """No client can be reached any more: the simulation is over."""


@dataclass(frozen=True)
class Limits:
    """What ends a round before all of its clients are back.

    Attributes:
        deadline: Seconds after which clients that are not back are left out; None: all are waited for.
        over_selection: How many times as many clients are asked as are needed, >= 1; those that are back first count.
    """

    deadline: float | None = None
    over_selection: float = 1.0


@dataclass(frozen=True)
class Attendance:
    """Of a cohort, who comes back.

    Attributes:
        back: Clients whose work counts.
        lost: The others, with their outcome (`fedsim.visits.OUTCOMES`).
        trips: Where each client is when; None: it never comes.
        close: When the round ends, nanoseconds.
    """

    back: tuple[int, ...]
    lost: dict[int, str]
    trips: Mapping[int, Trip | None]
    close: int


def select(
    participation: Participation,
    availability: Availability,
    limits: Limits,
    num_clients: int,
    now: int,
    seed: int,
    rng: np.random.Generator,
) -> tuple[list[int], int, int]:
    """A cohort of clients that are available.

    Rules that draw a number of clients (`Fixed`, `Fraction`) draw until they have it; the others leave out who is not
    there. At most `MOST` are asked, or a hundred times the cohort; if none of them is there, time passes until one is.

    Args:
        participation: Who takes part.
        availability: Who is there.
        limits: For over-selection.
        num_clients: Size of the population.
        now: Nanoseconds.
        seed: The run's seed.
        rng: The round's generator.

    Returns:
        The cohort in id order, how many of them are needed, and the time from which they are there.

    Raises:
        Ended: None of those that were asked will be there.
    """
    cohort = participation.sample(num_clients, rng)
    needed = len(cohort)
    asked = min(num_clients, math.ceil(limits.over_selection * needed - 1e-9))
    if isinstance(availability, Always) and asked == needed:
        return cohort, needed, now

    def there(client: int) -> bool:
        return is_there(availability, client, now, seed)

    found = [client for client in cohort if there(client)]
    wanted = asked if getattr(participation, "refills", False) else 1  # a rule that leaves out may leave out all
    tried = dict.fromkeys(cohort)
    most = min(num_clients, max(MOST, 100 * asked))
    while len(found) < wanted and len(tried) < most:
        if 2 * len(tried) > num_clients:
            more = rng.permutation([c for c in range(num_clients) if c not in tried]).tolist()
        else:
            more = [int(rng.integers(num_clients))]
        for client in more:
            if client not in tried and len(found) < wanted:
                tried[client] = None
                found += [client] if there(client) else []
    if not found:
        stretches = {client: availability.interval(client, now, seed) for client in tried}
        begins = {client: stretch[0] for client, stretch in stretches.items() if stretch is not None}
        if not begins:
            raise Ended("no client is available any more")
        now = min(begins.values())
        first = [client for client, begin in begins.items() if begin == now]  # in the order in which they were drawn
        in_cohort = [client for client in first if client in set(cohort)]
        found = first[:wanted] if wanted > 1 else in_cohort or first[:1]
    return sorted(found), min(needed, len(found)), now


def is_there(availability: Availability, client: int, now: int, seed: int) -> bool:
    """Whether a client is available at ``now``, nanoseconds."""
    stretch = availability.interval(client, now, seed)
    return stretch is not None and stretch[0] <= now


def attend(
    trips: Mapping[int, Trip | None], needed: int, now: int, deadline: float | None, lot: Callable[[int], int]
) -> Attendance:
    """Who of a cohort comes back in time.

    Args:
        trips: By client.
        needed: How many are waited for.
        now: When they were asked, nanoseconds.
        deadline: Seconds for which they are waited for; None: as long as it takes.
        lot: Number of a client: of those that are back at the same time the lowest count.
    """
    limit = math.inf if deadline is None else now + ns(deadline)
    taken = {client: way for client, way in trips.items() if way is not None}
    in_time = sorted(
        (way.end, lot(client), client) for client, way in taken.items() if way.finished and way.end <= limit
    )
    back = in_time[:needed]
    if len(back) == needed:
        close = back[-1][0]
    else:  # until the last one is back or lost, or is given up
        close = max([now, *(int(min(way.end, limit)) for way in taken.values())])
        if len(taken) < len(trips) and deadline is not None:  # who never comes is waited for as well
            close = int(limit)
    who = {client for _, _, client in back}
    lost = {}
    for client, way in trips.items():
        if client not in who:
            gone = way is None or (not way.finished and way.end <= close)
            lost[client] = "dropout" if gone else "late"
    return Attendance(tuple(sorted(who)), lost, trips, close)


def check_deadline(deadline: float, fastest: int) -> None:
    """Refuses a deadline that nobody can meet.

    Args:
        deadline: Seconds.
        fastest: The shortest visit of all clients, nanoseconds.

    Raises:
        ConfigError: It is shorter.
    """
    if fastest > ns(deadline):
        raise ConfigError(
            f"participation.deadline={deadline:g} cannot be met by any client: the fastest needs {fastest / 1e9:g} "
            "virtual seconds for a visit; raise it, or give clients less to do (client.epochs, client.steps)"
        )
