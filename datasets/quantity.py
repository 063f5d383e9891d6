"""Quantity skew: every client a random sample of the whole, of unequal sizes.

Sources: sizes as in Li et al., 2020 ("FedProx"), https://arxiv.org/abs/1812.06127, whose synthetic data have log-normal
ones, and whose real data are dealt out by a power law; quantity skew as a benchmark: Li et al., 2022 ("NIID-Bench"),
https://arxiv.org/abs/2102.02079, which draws the shares from a Dirichlet distribution.

Departures:
    1. The papers draw sizes and take what comes. Here ``min_size`` examples are set aside for every client and the
       law divides the rest, so that every request that can be met is met, at the first draw.
    2. FedProx does not give its power law; here it is Zipf's, over ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.data import IntArray, Partition
from fedsim.datasets.checks import check_float, check_int
from fedsim.errors import ConfigError, DataError

PARAMETERS = {"lognormal": "sigma", "powerlaw": "exponent"}
"""The laws, and the option that each has."""


@dataclass(frozen=True)
class Quantity:
    """Sizes ``min_size + p_k (N - K min_size)``, rounded, with shares ``p`` from a law; classes as in the whole.

    Rounding: the shares are laid end to end and cut with one random offset, so that every size is less than one from
    its exact value, is so on average, and all add up to N.

    Attributes:
        num_clients: Number of clients, K.
        law: ``lognormal``: shares proportional to ``exp(sigma z_k)`` with z_k ~ N(0, 1), one draw per client.
            ``powerlaw``: the r-th largest share is proportional to ``r ** -exponent``, its owner drawn at random.
        sigma: Of ``lognormal``, >= 0; 0: equal sizes. null: 1.
        exponent: Of ``powerlaw``, >= 0; 0: equal sizes. null: 1.
        min_size: Fewest examples of a client.
    """

    num_clients: int
    law: str = "lognormal"
    sigma: float | None = None
    exponent: float | None = None
    min_size: int = 1

    def __post_init__(self) -> None:
        check_int("partition.num_clients", self.num_clients, 1, "the number of clients")
        if self.law not in PARAMETERS:
            raise ConfigError(f"partition.law must be {' or '.join(PARAMETERS)}, got {self.law!r}")
        for law, name in PARAMETERS.items():
            value = getattr(self, name)
            if value is not None:
                check_float(f"partition.{name}", value, 0.0, 1e6, f"how unequal {law} sizes are", strict=False)
                if law != self.law:
                    raise ConfigError(
                        f"partition.{name}={value} has no effect with partition.law={self.law}; "
                        f"remove it, or set partition.law={law}"
                    )
        check_int("partition.min_size", self.min_size, 1, "the fewest examples of a client")

    def __call__(self, labels: IntArray, keys: dict[str, IntArray], rng: np.random.Generator) -> Partition:
        """Divides ``N`` examples (see `fedsim.data.Partitioner`).

        Raises:
            DataError: There are fewer than ``num_clients * min_size`` examples.
        """
        n, k = len(labels), self.num_clients
        rest = n - k * self.min_size
        if rest < 0:
            raise DataError(
                f"partition.num_clients={k} with partition.min_size={self.min_size} needs {k * self.min_size} training "
                f"examples, but there are only {n}; lower one of the two"
            )
        cuts = np.floor(np.cumsum(self.shares(rng)) * rest + rng.random()).astype(np.int64)
        cuts = np.minimum(cuts, rest)  # the last ones may be one too large or too small by rounding errors
        cuts[-1] = rest
        owners = np.empty(n, dtype=np.int64)
        owners[rng.permutation(n)] = np.repeat(np.arange(k), self.min_size + np.diff(cuts, prepend=0))
        return Partition.from_owners(owners, k)

    def shares(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """One draw of every client's share, ``[K]``; they add up to 1.

        Args:
            rng: Where the draw comes from.
        """
        if self.law == "lognormal":
            logs = (1.0 if self.sigma is None else self.sigma) * rng.standard_normal(self.num_clients)
        else:
            exponent = 1.0 if self.exponent is None else self.exponent
            logs = -exponent * np.log1p(rng.permutation(self.num_clients))
        shares = np.exp(logs - logs.max())
        return np.asarray(shares / math.fsum(shares))
