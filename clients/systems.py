"""System models: how long a client's visit takes in virtual time, and whether it comes through.

Nothing here sleeps or reads a clock. A duration is computed when the task is handed out, from what is planned, so
the order of events is known before any training is done and does not depend on the real speed of the machine.
"""

from __future__ import annotations

import csv
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import NamedTuple, Protocol, TypeGuard

from fedsim.clock import ns
from fedsim.errors import ConfigError, did_you_mean, require
from fedsim.random import Key, derive

SLOWEST = 1e9
"""Seconds of one local step, at most: 30 years, so that no duration overflows a float."""
SLOWEST_MBPS, FASTEST_MBPS = 1e-9, 1e12
"""Megabits per second that a link may have."""
LEAST_FACTOR = 0.05
"""Jitter never makes a task faster than this share of its planned time."""
_quantile = NormalDist().inv_cdf


class System(Protocol):
    """What virtual time asks of a system model."""

    def duration_ns(self, client: int, visit: int | str, steps: int, bytes_down: int, bytes_up: int, seed: int) -> int:
        """How long one visit keeps its client busy: download, local steps, upload.

        A pure function of its arguments and the model's hyper-parameters, in O(1) of the population: random numbers
        only from `uniform` or ``fedsim.random``, and nothing kept but what could be computed again. What belongs to
        a client for good (its speed) is keyed by ``client`` alone, what changes from visit to visit (jitter) by
        ``client`` and ``visit``. The same task therefore takes as long after a resume as before.

        Args:
            client: Client id.
            visit: Number of the task: the round, or in event-driven methods the client's task number.
            steps: Local steps planned (or, for a barrier, done), >= 0.
            bytes_down: Bytes sent to the client, >= 0.
            bytes_up: Bytes that come back, >= 0.
            seed: The run's seed.

        Returns:
            Integer nanoseconds, >= 0.
        """

    def lost_at(self, client: int, visit: int | str, seed: int) -> float | None:
        """When a task gets lost because its client crashes or its connection breaks; as pure as `duration_ns`.

        Args:
            client: Client id.
            visit: Number of the task, as for `duration_ns`.
            seed: The run's seed.

        Returns:
            The share of the visit, in (0, 1), after which the task is lost; None: it comes through.
        """


def uniform(seed: int, purpose: str, *index: Key) -> float:
    """One number, uniform in the open interval (0, 1), for ``(seed, purpose, *index)``.

    A tenth of the time that a generator takes, and enough for inverse distribution functions.
    """
    return ((derive(seed, purpose, *index) >> 11) + 0.5) * 2.0**-52  # exact: 53 bits, and neither 0 nor 1


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is an int or a float; it may still be infinite or NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Row(NamedTuple):
    """One line of a CSV file.

    Attributes:
        where: Config key, file and line, for messages.
        line: Number of the line in the file.
        fields: Text by column.
    """

    where: str
    line: int
    fields: dict[str, str]

    def client(self) -> int:
        """The column ``client``.

        Raises:
            ConfigError: It is no whole number >= 0.
        """
        text = self.fields["client"].strip()
        if not (text.isascii() and text.isdigit()):
            raise ConfigError(f"{self.where}: client must be a whole number, at least 0, got {text!r}")
        return int(text)

    def number(self, column: str, needed: str, low: float, high: float) -> float:
        """A column as a number in [low, high].

        Raises:
            ConfigError: It is none; says what was ``needed``.
        """
        text = self.fields[column].strip()
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise ConfigError(f"{self.where}: {column} must be {needed}, got {text!r}")
        return value


def read_table(key: str, path: object, needed: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
    """The lines of a CSV file with a header, one by one.

    Args:
        key: The config key that names the file, for messages.
        path: The file.
        needed: Columns that it must have, in any order.
        optional: Columns that it may have. Others are refused.

    Raises:
        ConfigError: The file cannot be read, a column is missing or unknown, or a line has too few or many fields.
    """
    require(isinstance(path, str) and path != "", key, "the path of a CSV file", path)
    assert isinstance(path, str)
    columns = f"the columns {','.join(needed)}" + (f" and perhaps {','.join(optional)}" if optional else "")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            header = [name.strip() for name in next(lines, [])]
            for name in header:
                if name not in (*needed, *optional) or header.count(name) > 1:
                    raise ConfigError(
                        f"{key}={path}, line 1: a header with {columns} is needed, got column '{name}'"
                        f"{did_you_mean(name, (*needed, *optional))}"
                    )
            for name in needed:
                if name not in header:
                    raise ConfigError(f"{key}={path}, line 1: a header with {columns} is needed, '{name}' is missing")
            for fields in lines:
                if len(fields) == len(header):
                    where = f"{key}={path}, line {lines.line_num}"
                    yield Row(where, lines.line_num, dict(zip(header, fields, strict=True)))
                elif fields:  # a blank line is none
                    raise ConfigError(
                        f"{key}={path}, line {lines.line_num}: {len(header)} fields are needed, got {len(fields)}"
                    )
    except OSError as exc:
        raise ConfigError(f"{key}={path} cannot be read: {exc.strerror}; give a CSV file with {columns}") from exc
    except (UnicodeDecodeError, csv.Error) as exc:
        raise ConfigError(f"{key}={path} is no CSV file ({exc}); give one with {columns}") from exc


class Device(NamedTuple):
    """What belongs to one client for good.

    Attributes:
        step_ns: Nanoseconds per local step.
        download_mbps: Megabits (1e6 bits) per second to the client; None: transfers take no time.
        upload_mbps: The same, from the client.
    """

    step_ns: int
    download_mbps: float | None
    upload_mbps: float | None


def _transfer_ns(num_bytes: int, mbps: float | None) -> int:
    return 0 if mbps is None else ns(8 * num_bytes / (mbps * 1e6))


@dataclass(frozen=True, kw_only=True)
class Devices(ABC):
    """What all models here share: bandwidth, jitter, dropout. A model adds the speed of each client.

    Attributes:
        download_mbps: Megabits (1e6 bits) per second to the client; None: transfers take no time.
        upload_mbps: The same, from the client.
        jitter: Standard deviation of a factor on the time of a task's local steps, in [0, 10]. It is normal with
            mean 1, drawn for every task, and at least `LEAST_FACTOR`.
        dropout: Probability that a task gets lost, in [0, 1); the moment is uniform over the task.

    Raises:
        ConfigError: A value out of range.
    """

    download_mbps: float | None = None
    upload_mbps: float | None = None
    jitter: float = 0.0
    dropout: float = 0.0
    _known: dict[tuple[int, int], Device] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, mbps in (("download_mbps", self.download_mbps), ("upload_mbps", self.upload_mbps)):
            fits = mbps is None or (is_number(mbps) and SLOWEST_MBPS <= mbps <= FASTEST_MBPS)
            needed = "a positive number of megabits per second (1e-9 to 1e12), or null for no limit"
            require(fits, f"system.{name}", needed, mbps)
        fits = is_number(self.jitter) and 0 <= self.jitter <= 10
        require(fits, "system.jitter", "a standard deviation in [0, 10]", self.jitter)
        fits = is_number(self.dropout) and 0 <= self.dropout < 1
        require(fits, "system.dropout", "a probability in [0, 1)", self.dropout)

    @abstractmethod
    def seconds(self, client: int, seed: int) -> float:
        """Seconds per local step of one client, without jitter."""

    def device(self, client: int, seed: int) -> Device:
        """What belongs to one client for good; drawn once."""
        device = self._known.get((client, seed))
        if device is None:
            device = Device(ns(self.seconds(client, seed)), self.download_mbps, self.upload_mbps)
            self._known[client, seed] = device
        return device

    def duration_ns(self, client: int, visit: int | str, steps: int, bytes_down: int, bytes_up: int, seed: int) -> int:
        """See `System.duration_ns`; jitter concerns the local steps, not the transfers."""
        step_ns, download, upload = self.device(client, seed)
        work = steps * step_ns
        if self.jitter:
            factor = 1 + self.jitter * _quantile(uniform(seed, "system.jitter", client, visit))
            work = round(work * max(factor, LEAST_FACTOR))
        if download is None and upload is None:
            return work
        return _transfer_ns(bytes_down, download) + work + _transfer_ns(bytes_up, upload)

    def lost_at(self, client: int, visit: int | str, seed: int) -> float | None:
        """See `System.lost_at`."""
        if not self.dropout:
            return None
        chance = uniform(seed, "system.dropout", client, visit)
        return chance / self.dropout if chance < self.dropout else None  # below a bound, uniform up to it


@dataclass(frozen=True)
class Homogeneous(Devices):
    """Every client is equally fast.

    Attributes:
        seconds_per_step: Virtual seconds per local step, in [0, 1e9], rounded to nanoseconds.

    Raises:
        ConfigError: A value out of range.
    """

    seconds_per_step: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        value = self.seconds_per_step
        fits = is_number(value) and 0 <= value <= SLOWEST
        require(fits, "system.seconds_per_step", f"a number of seconds >= 0 (at most {SLOWEST:g})", value)

    def seconds(self, client: int, seed: int) -> float:
        """See `Devices.seconds`."""
        return self.seconds_per_step


@dataclass(frozen=True)
class Drawn(Devices):
    """Clients whose seconds per step are random multiples of ``seconds_per_step``.

    Attributes:
        seconds_per_step: mu, in (0, 1e9]. What is drawn for a client is rounded to nanoseconds.

    Raises:
        ConfigError: A value out of range.
    """

    seconds_per_step: float

    def __post_init__(self) -> None:
        super().__post_init__()
        value = self.seconds_per_step
        fits = is_number(value) and 0 < value <= SLOWEST
        require(fits, "system.seconds_per_step", f"a number of seconds > 0 (at most {SLOWEST:g})", value)


@dataclass(frozen=True)
class Normal(Drawn):
    """Seconds per step of a client: ``N(mu, (std mu)^2)``, mu being ``seconds_per_step``, given that it is positive.

    What is drawn again until it is positive has this distribution; here one number is drawn and the inverse
    distribution function of the part above zero applied to it. For std <= 0.3 a draw below zero has a probability
    under 0.05 %.

    Attributes:
        std: Standard deviation as a share of mu, in [0, 10].

    Raises:
        ConfigError: A value out of range.
    """

    std: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_number(self.std) and 0 <= self.std <= 10, "system.std", "a share of the mean in [0, 10]", self.std)

    def seconds(self, client: int, seed: int) -> float:
        """See `Devices.seconds`."""
        if not self.std:
            return self.seconds_per_step
        below = NormalDist().cdf(-1 / self.std)
        z = _quantile(below + uniform(seed, "system.speed", client) * (1 - below))
        return self.seconds_per_step * max(0.0, 1 + self.std * z)  # rounding may go below


@dataclass(frozen=True)
class Exponential(Drawn):
    """Seconds per step of a client: ``mu max(bin, bin ceil(x / bin))``, ``x ~ Exp(scale)``: few slow clients, far off.

    mu is ``seconds_per_step``. The speeds of the experiments with FedCompass: its code names the two parameters and
    not the formula, which is ours (`docs/virtual-time.md`).

    Attributes:
        scale: Mean of x, in (0, 1000].
        bin: Width of the bins that x is rounded up to, in [0, 1000]; 0: none, mu x.

    Raises:
        ConfigError: A value out of range.
    """

    scale: float = 0.5
    bin: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_number(self.scale) and 0 < self.scale <= 1000, "system.scale", "a number in (0, 1000]", self.scale)
        fits = is_number(self.bin) and 0 <= self.bin <= 1000
        require(fits, "system.bin", "a width in [0, 1000] (0: no bins)", self.bin)

    def seconds(self, client: int, seed: int) -> float:
        """See `Devices.seconds`."""
        x = -self.scale * math.log(uniform(seed, "system.speed", client))
        return self.seconds_per_step * (max(1, math.ceil(x / self.bin)) * self.bin if self.bin else x)


@dataclass(frozen=True)
class LogNormal(Drawn):
    """Seconds per step of a client: ``mu exp(sigma z)``, ``z ~ N(0, 1)``; mu, ``seconds_per_step``, is the median.

    Attributes:
        sigma: In [0, 10].

    Raises:
        ConfigError: A value out of range.
    """

    sigma: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_number(self.sigma) and 0 <= self.sigma <= 10, "system.sigma", "a number in [0, 10]", self.sigma)

    def seconds(self, client: int, seed: int) -> float:
        """See `Devices.seconds`."""
        return self.seconds_per_step * math.exp(self.sigma * _quantile(uniform(seed, "system.speed", client)))


@dataclass(frozen=True)
class Csv(Devices):
    """Speeds, and perhaps bandwidths, from a file, so that measured devices can be simulated.

    The file has a header and a line for each of the clients 0, 1, 2, ..., in any order.

    Attributes:
        path: The file; columns ``client,seconds_per_step`` and, if wanted, ``download_mbps,upload_mbps``. Where a
            line leaves a bandwidth empty, that of the model counts.
        repeat: Clients beyond the file are like those in it: client i has the line of client i modulo the number of
            lines.

    Raises:
        ConfigError: A value out of range, or a file that is none of this form.
    """

    path: str
    repeat: bool = False
    _rows: list[Device] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.repeat, bool), "system.repeat", "true or false", self.repeat)
        rows = dict[int, Device]()
        rates = ("download_mbps", "upload_mbps")
        for row in read_table("system.path", self.path, ("client", "seconds_per_step"), rates):
            client = row.client()
            if client in rows:
                raise ConfigError(f"{row.where}: client {client} has a line already")
            seconds = row.number("seconds_per_step", f"a number of seconds in [0, {SLOWEST:g}]", 0, SLOWEST)
            rows[client] = Device(ns(seconds), *(self._rate(row, name) for name in rates))
        for client in range(len(rows)):
            if client not in rows:
                raise ConfigError(
                    f"system.path={self.path} has no line for client {client}; number the clients from 0 without gaps"
                )
        if not rows:
            raise ConfigError(f"system.path={self.path} has no lines; give one for each client")
        self._rows.extend(rows[client] for client in range(len(rows)))

    def _rate(self, row: Row, name: str) -> float | None:
        if not row.fields.get(name, "").strip():
            common: float | None = getattr(self, name)
            return common
        return row.number(
            name, "a positive number of megabits per second (1e-9 to 1e12), or empty", SLOWEST_MBPS, FASTEST_MBPS
        )

    def check(self, num_clients: int) -> None:
        """Refuses, before any work, a population that is larger than the file, unless lines are used again.

        Args:
            num_clients: Size of the population.

        Raises:
            ConfigError: There are more clients than lines.
        """
        if num_clients > len(self._rows) and not self.repeat:
            raise ConfigError(
                f"system.path={self.path} has lines for {len(self._rows)} clients, but there are {num_clients}; add "
                "lines, lower the number of clients, or use lines again with system.repeat=true"
            )

    def seconds(self, client: int, seed: int) -> float:
        """See `Devices.seconds`."""
        return self.device(client, seed).step_ns / 1e9

    def device(self, client: int, seed: int) -> Device:
        """What the file says about a client.

        Raises:
            ConfigError: As `check`.
        """
        if client >= len(self._rows):
            self.check(client + 1)
            client %= len(self._rows)
        return self._rows[client]
