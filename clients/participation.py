"""Who takes part in a round.

A cohort is drawn in time and memory that follow the cohort, never the population: 10 of 1,000,000 clients cost
what 10 of 1,000 cost. The generator is the round's own (`fedsim.random.numpy_generator`), so a cohort can be
recomputed alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from fedsim.errors import ConfigError


class Participation(Protocol):
    """What a round asks of a participation rule.

    Where clients are not always available, those of a cohort that are not there are left out. A rule that is to have
    others in their place says so: ``refills: ClassVar[bool] = True``.
    """

    def check(self, num_clients: int) -> None:
        """Refuse, before any work, a population that the rule cannot draw from.

        Args:
            num_clients: Size of the population, K.

        Raises:
            ConfigError: The population is empty or too small.
        """

    def sample(self, num_clients: int, rng: np.random.Generator) -> list[int]:
        """Draw one cohort.

        Args:
            num_clients: Size of the population, K.
            rng: The round's generator.

        Returns:
            Client ids in [0, K), at least one, sorted, without repeats.

        Raises:
            ConfigError: As `check`.
        """


def _check_population(num_clients: int) -> None:
    if num_clients < 1:
        raise ConfigError(f"partition.num_clients must be at least 1, got {num_clients}")


def _check_rate(name: str, value: float) -> None:
    # NaN fails the comparison too.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ConfigError(f"participation.{name} must be a number in (0, 1], got {value!r}")


def _choose(num_clients: int, size: int, rng: np.random.Generator) -> list[int]:
    """``size`` of ``num_clients`` without replacement, sorted.

    NumPy uses Floyd's method up to a twentieth of the population (time and memory follow ``size``) and shuffles
    the tail of the whole range above it (at most 20 times ``size``); ``shuffle=False`` leaves out a shuffle that
    sorting undoes.
    """
    cohort: list[int] = np.sort(rng.choice(num_clients, size, replace=False, shuffle=False)).tolist()
    return cohort


@dataclass(frozen=True)
class Fraction:
    """A fixed share of the clients, uniformly without replacement: ``max(1, floor(fraction * K))`` of K.

    Source: McMahan et al., 2017, Algorithm 1 (``m = max(C * K, 1)``), https://arxiv.org/abs/1602.05629. The
    paper does not say how C * K is rounded: here down, after adding 1e-9, so that 0.29 of 100 is 29.

    Attributes:
        fraction: C in the paper, in (0, 1].

    Raises:
        ConfigError: ``fraction`` is out of range.
    """

    refills: ClassVar[bool] = True

    fraction: float

    def __post_init__(self) -> None:
        _check_rate("fraction", self.fraction)

    def check(self, num_clients: int) -> None:
        """See `Participation.check`."""
        _check_population(num_clients)

    def sample(self, num_clients: int, rng: np.random.Generator) -> list[int]:
        """See `Participation.sample`."""
        self.check(num_clients)
        return _choose(num_clients, max(1, math.floor(self.fraction * num_clients + 1e-9)), rng)


@dataclass(frozen=True)
class Fixed:
    """The same number of clients every round, uniformly without replacement.

    Attributes:
        clients_per_round: At least 1 and at most ``partition.num_clients``.

    Raises:
        ConfigError: ``clients_per_round`` is not a positive whole number.
    """

    refills: ClassVar[bool] = True

    clients_per_round: int

    def __post_init__(self) -> None:
        count = self.clients_per_round
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"participation.clients_per_round must be a whole number, at least 1, got {count!r}")

    def check(self, num_clients: int) -> None:
        """See `Participation.check`."""
        _check_population(num_clients)
        if self.clients_per_round > num_clients:
            raise ConfigError(
                f"participation.clients_per_round={self.clients_per_round} is more than "
                f"partition.num_clients={num_clients}; lower the first or raise the second"
            )

    def sample(self, num_clients: int, rng: np.random.Generator) -> list[int]:
        """See `Participation.sample`."""
        self.check(num_clients)
        return _choose(num_clients, self.clients_per_round, rng)


@dataclass(frozen=True)
class Bernoulli:
    """Every client independently with the same probability; an empty cohort is drawn again.

    Drawn without asking each client, and without drawing again. Given that somebody takes part, the first client
    who does is geometric, cut off at K, and those after it are still independent: so the size is ``1 +
    Binomial(K - 1 - first, p)``. Given its size, every cohort is equally likely. The work is bounded however
    small ``p * K`` is (with an expected cohort of 1e-6 clients, a million redraws would be needed).

    Attributes:
        probability: In (0, 1].

    Raises:
        ConfigError: ``probability`` is out of range.
    """

    probability: float

    def __post_init__(self) -> None:
        _check_rate("probability", self.probability)

    def check(self, num_clients: int) -> None:
        """See `Participation.check`."""
        _check_population(num_clients)

    def sample(self, num_clients: int, rng: np.random.Generator) -> list[int]:
        """See `Participation.sample`."""
        self.check(num_clients)
        if self.probability == 1:
            return list(range(num_clients))
        log_absent = math.log1p(-self.probability)
        nonempty = -math.expm1(num_clients * log_absent)  # 1 - (1 - p)^K
        first = min(int(math.log1p(-rng.random() * nonempty) / log_absent), num_clients - 1)
        return _choose(num_clients, 1 + int(rng.binomial(num_clients - 1 - first, self.probability)), rng)


@dataclass(frozen=True)
class All:
    """Every client, every round."""

    def check(self, num_clients: int) -> None:
        """See `Participation.check`."""
        _check_population(num_clients)

    def sample(self, num_clients: int, rng: np.random.Generator) -> list[int]:
        """See `Participation.sample`; draws nothing from ``rng``."""
        self.check(num_clients)
        return list(range(num_clients))
