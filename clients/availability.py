"""Availability: when clients can be reached, and the trip of a task between its hand-out and its end.

A model says when a client is there; what a task that is under way does when its client leaves is the model's
``when_off``. Everything is a pure function of the client, the seed, the time and the hyper-parameters. Models keep
where they were last, to be fast, and answer the same in any order of questions.
"""

from __future__ import annotations

import logging
import math
from array import array
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from fedsim.clients.systems import System, is_number, read_table, uniform
from fedsim.clock import ns
from fedsim.errors import ConfigError, require

log = logging.getLogger("fedsim")

Stretch = tuple[int, int | None]
"""Begin and end of a stretch of being available, in nanoseconds; end None: for ever."""
FOREVER: Stretch = (0, None)
LONGEST = 4e9
"""Seconds that a time in a trace and a length may have, at most: the nanoseconds of two of them are below 2^63."""
SHORTEST = 1e-3
"""Seconds of a slot, or of a stretch on the average, at least: a task may last many of them."""


class Availability(Protocol):
    """What virtual time asks of an availability model."""

    @property
    def when_off(self) -> str:
        """What a task does when its client leaves: ``pause``, it waits for the client; ``drop``, it is lost."""

    def check(self, num_clients: int) -> None:
        """Refuses, before any work, a population that cannot take part.

        Args:
            num_clients: Size of the population.

        Raises:
            ConfigError: No client ever comes.
        """

    def interval(self, client: int, time: int, seed: int) -> Stretch | None:
        """The first stretch of being available that ends after ``time``.

        As pure as `System.duration_ns`, and in O(1) of the population. Stretches do not touch each other.

        Args:
            client: Client id.
            time: Nanoseconds since the start of the run, >= 0.
            seed: The run's seed.

        Returns:
            Begin, which may lie before ``time``, and end; None: the client never comes, or never comes back.
        """


class Trip(NamedTuple):
    """One task as virtual time sees it.

    Attributes:
        begin: When the client takes the task, nanoseconds.
        end: When its upload is through, or when it lost the task.
        finished: Whether the upload is through.
        back: When the client can be reached again: at ``end`` if it finished or lost the task while it was
            available, else when it is available the next time; None: never.
    """

    begin: int
    end: int
    finished: bool
    back: int | None


def trip(
    system: System,
    availability: Availability,
    client: int,
    visit: int | str,
    time: int,
    steps: int,
    bytes_down: int,
    bytes_up: int,
    seed: int,
) -> Trip | None:
    """What becomes of a task that is handed out at ``time``.

    The client takes it at the first moment at which it is available, and is busy with it while it is available. If
    it leaves before the task is through, ``availability.when_off`` says whether the task waits for it or is lost. A
    task that is through exactly when the stretch ends is through.

    Args:
        system: How long tasks take, and which get lost.
        availability: When clients are there.
        client: Client id.
        visit: Number of the task.
        time: When it is handed out, nanoseconds.
        steps: Local steps planned.
        bytes_down: Bytes sent to the client.
        bytes_up: Bytes that come back.
        seed: The run's seed.

    Returns:
        The trip; None: the client never comes.
    """
    stretch = availability.interval(client, time, seed)
    if stretch is None:
        return None
    left = system.duration_ns(client, visit, steps, bytes_down, bytes_up, seed)
    lost = system.lost_at(client, visit, seed)
    if lost is not None:
        left = int(lost * left)
    begin = now = max(time, stretch[0])
    while (end := stretch[1]) is not None and now + left > end:
        following = availability.interval(client, end, seed)
        if following is None:
            return Trip(begin, end, False, None)
        if availability.when_off == "drop":
            return Trip(begin, end, False, following[0])
        left -= end - now
        stretch, now = following, following[0]
    return Trip(begin, now + left, lost is None, now + left)


@dataclass(frozen=True)
class Always:
    """Every client, all the time."""

    @property
    def when_off(self) -> str:
        """Nobody leaves."""
        return "pause"

    def check(self, num_clients: int) -> None:
        """See `Availability.check`."""

    def interval(self, client: int, time: int, seed: int) -> Stretch:
        """See `Availability.interval`."""
        return FOREVER


Place = tuple[int, int]  # client, seed


def _check_seconds(name: str, value: float) -> None:
    fits = is_number(value) and SHORTEST <= value <= LONGEST
    require(fits, f"availability.{name}", f"a number of seconds in [{SHORTEST:g}, {LONGEST:g}]", value)


@dataclass(frozen=True, kw_only=True)
class _Leaving:
    """What the models share whose clients come and go.

    Attributes:
        when_off: ``pause`` or ``drop``, see `Availability.when_off`.

    Raises:
        ConfigError: A value out of range.
    """

    when_off: str = "pause"

    def __post_init__(self) -> None:
        require(self.when_off in ("pause", "drop"), "availability.when_off", "pause or drop", self.when_off)

    def check(self, num_clients: int) -> None:
        """See `Availability.check`; every client comes some time."""


@dataclass(frozen=True)
class Bernoulli(_Leaving):
    """Time is cut into slots; a client is there in each with the same probability, independently of the others.

    Neighbouring slots in which it is there are one stretch.

    Attributes:
        probability: In [0.001, 0.999] (a search for the next change takes a draw per slot), or 1.
        slot_seconds: Length of a slot, in [0.001, 4e9].
    """

    probability: float
    slot_seconds: float
    # Per client: the last answer, a stretch in slots, and the first slot that it is the answer for.
    _last: dict[Place, tuple[int, int, int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = is_number(self.probability) and (0.001 <= self.probability <= 0.999 or self.probability == 1)
        require(fits, "availability.probability", "a number in [0.001, 0.999], or 1", self.probability)
        _check_seconds("slot_seconds", self.slot_seconds)

    def interval(self, client: int, time: int, seed: int) -> Stretch:
        """See `Availability.interval`."""
        if self.probability == 1:
            return FOREVER
        length = ns(self.slot_seconds)
        slot = time // length
        since, first, after = self._last.get((client, seed), (0, 0, 0))
        if not since <= slot < after:
            first = slot
            while not self._on(client, first, seed):
                first += 1
            after = first + 1
            while self._on(client, after, seed):
                after += 1
            if first == slot:
                while first > 0 and self._on(client, first - 1, seed):
                    first -= 1
            self._last[client, seed] = min(slot, first), first, after
        return first * length, after * length

    def _on(self, client: int, slot: int, seed: int) -> bool:
        return uniform(seed, "availability.bernoulli", client, slot) < self.probability


@dataclass(frozen=True)
class Markov(_Leaving):
    """On and off in turns for exponential times: a two-state Markov process that starts in equilibrium.

    At any time a client is there with probability ``on_seconds / (on_seconds + off_seconds)``. The turns are walked
    through from the start of the run, once for each client that is asked for; a question about the time before the
    last answer walks again.

    Attributes:
        on_seconds: Mean length of a stretch of being available, in [0.001, 4e9].
        off_seconds: Mean length of the time between two stretches, the same.
    """

    on_seconds: float
    off_seconds: float
    # Per client: number of the stretch, end of the one before it, begin, end.
    _walk: dict[Place, tuple[int, int, int, int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_seconds("on_seconds", self.on_seconds)
        _check_seconds("off_seconds", self.off_seconds)

    def interval(self, client: int, time: int, seed: int) -> Stretch:
        """See `Availability.interval`."""
        number, before, begin, end = self._walk.get((client, seed), (0, 0, 0, 0))
        if before <= time < end:
            return begin, end
        if time < before or not number:
            number, before, begin = 1, 0, 0  # what is left of an exponential time is as long as all of it
            share = self.on_seconds / (self.on_seconds + self.off_seconds)
            if uniform(seed, "availability.markov.start", client) >= share:
                begin = self._draw(client, 0, seed, self.off_seconds)
            end = begin + self._draw(client, 1, seed, self.on_seconds)
        while end <= time:
            number, before = number + 1, end
            begin = before + self._draw(client, 2 * number - 2, seed, self.off_seconds)
            end = begin + self._draw(client, 2 * number - 1, seed, self.on_seconds)
        self._walk[client, seed] = number, before, begin, end
        return begin, end

    def _draw(self, client: int, turn: int, seed: int, mean: float) -> int:
        return max(1, ns(-mean * math.log(uniform(seed, "availability.markov", client, turn))))


@dataclass(frozen=True)
class Diurnal(_Leaving):
    """Each client is there at the same time of every day, for a part of it, such as at night on its charger.

    Attributes:
        on_share: Part of the period that a client is there, in (0, 1]; 1: always.
        period_seconds: Length of the day, in [0.001, 4e9].
        spread: Windows begin uniformly within this part of the period, in [0, 1]. 1: at any time of the day, as if
            around the globe; 0: all of them at the beginning.
    """

    on_share: float
    period_seconds: float = 86_400.0
    spread: float = 1.0
    _phase: dict[Place, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = is_number(self.on_share) and 0 < self.on_share <= 1
        require(fits, "availability.on_share", "a number in (0, 1]", self.on_share)
        _check_seconds("period_seconds", self.period_seconds)
        fits = is_number(self.spread) and 0 <= self.spread <= 1
        require(fits, "availability.spread", "a number in [0, 1]", self.spread)

    def interval(self, client: int, time: int, seed: int) -> Stretch:
        """See `Availability.interval`."""
        period = ns(self.period_seconds)
        length = max(1, round(self.on_share * period))
        if length >= period:
            return FOREVER
        phase = self._phase.get((client, seed))
        if phase is None:
            phase = int(self.spread * uniform(seed, "availability.diurnal", client) * period)
            self._phase[client, seed] = phase
        begin = phase + (time - phase - length + period) // period * period  # of the first window that ends after time
        return max(begin, 0), begin + length


@dataclass(frozen=True)
class Trace(_Leaving):
    """Stretches from a file, such as a recording of real devices.

    The file has a header and a line for each stretch: ``client,on,off``, times in seconds since the start of the
    run. A client without a line is never there. Stretches that touch are one.

    Attributes:
        path: The file.
        repeat_seconds: The trace begins again after so many seconds, in [0.001, 4e9], at or after its last ``off``;
            null: afterwards nobody comes back.

    Raises:
        ConfigError: A value out of range, or a file that is none of this form.
    """

    path: str
    repeat_seconds: float | None = None
    # Per client: begins and ends, sorted.
    _stretches: dict[int, tuple[array[int], array[int]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repeat_seconds is not None:
            _check_seconds("repeat_seconds", self.repeat_seconds)
        limit = LONGEST if self.repeat_seconds is None else self.repeat_seconds
        needed = f"a number of seconds in [0, {limit:g}]" + ("" if limit == LONGEST else " (repeat_seconds)")
        found = dict[int, list[tuple[int, int, int]]]()
        for row in read_table("availability.path", self.path, ("client", "on", "off")):
            on, off = (ns(row.number(name, needed, 0, limit)) for name in ("on", "off"))
            if on >= off:
                raise ConfigError(
                    f"{row.where}: on must be before off, got on={row.fields['on']} and off={row.fields['off']}"
                )
            found.setdefault(row.client(), []).append((on, off, row.line))
        for client, stretches in found.items():
            self._stretches[client] = self._joined(client, sorted(stretches))

    def _joined(self, client: int, stretches: list[tuple[int, int, int]]) -> tuple[array[int], array[int]]:
        begins, ends, above = array("q"), array("q"), 0
        for on, off, line in stretches:
            if ends and on < ends[-1]:
                raise ConfigError(
                    f"availability.path={self.path}, line {line}: overlaps with line {above}; client {client} can be "
                    "there only once at a time"
                )
            if ends and on == ends[-1]:
                ends[-1] = off
            else:
                begins.append(on)
                ends.append(off)
            above = line
        if self.repeat_seconds is not None and len(ends) > 1 and begins[0] == 0 and ends[-1] == ns(self.repeat_seconds):
            ends[-1] += ends[0]  # over the end of the trace into its next repeat
            del begins[0], ends[0]
        return begins, ends

    def check(self, num_clients: int) -> None:
        """Refuses a trace in which none of the clients is ever there; says how many are not.

        Raises:
            ConfigError: The file has lines of no client below ``num_clients``.
        """
        present = sum(client < num_clients for client in self._stretches)
        if not present:
            raise ConfigError(
                f"availability.path={self.path} has no line for any of the {num_clients} clients (0 to "
                f"{num_clients - 1}), so nobody would ever take part; number its clients from 0"
            )
        if present < num_clients:
            log.warning(
                "%s has no line for %d of %d clients: they never take part",
                self.path,
                num_clients - present,
                num_clients,
            )

    def interval(self, client: int, time: int, seed: int) -> Stretch | None:
        """See `Availability.interval`."""
        known = self._stretches.get(client)
        if known is None:
            return None
        begins, ends = known
        if self.repeat_seconds is None:
            i = bisect_right(ends, time)
            return (begins[i], ends[i]) if i < len(ends) else None
        period = ns(self.repeat_seconds)
        if ends[0] - begins[0] == period:
            return FOREVER
        shift = (time // period - 1) * period  # a stretch that began in the repeat before may last
        while (i := bisect_right(ends, time - shift)) == len(ends):
            shift += period
        return max(begins[i] + shift, 0), ends[i] + shift
