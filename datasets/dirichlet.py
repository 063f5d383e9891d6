"""Dirichlet label skew: each class is shared out among the clients in Dirichlet proportions.

Source: Yurochkin et al., 2019, section 4.1, https://arxiv.org/abs/1905.12022; as a benchmark: Li et al., 2022
("NIID-Bench", distribution-based label imbalance), https://arxiv.org/abs/2102.02079.

Departures:
    1. The reference code draws again until the smallest client has 10 examples, which changes the
       distribution and may never end. Here a draw is made once and then mended: see `mend`.
    2. It also stops giving a class to clients that already hold N/K examples; the papers do not, nor do we.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedsim.data import IntArray, Partition
from fedsim.datasets.checks import check_float, check_int
from fedsim.errors import DataError


@dataclass(frozen=True)
class Dirichlet:
    """Class proportions over clients drawn from ``Dir(alpha, ..., alpha)``, one draw per class.

    The share of a class that a client gets has mean ``1/K`` and variance
    ``(K - 1) / (K^2 (alpha K + 1))``, before mending.

    Attributes:
        num_clients: Number of clients, K.
        alpha: Concentration, > 0: near 0 a class goes to one client, large is IID; ``inf`` is allowed.
        min_size: Fewest examples of a client.
    """

    needs_classes: ClassVar = True

    num_clients: int
    alpha: float
    min_size: int = 1

    def __post_init__(self) -> None:
        check_int("partition.num_clients", self.num_clients, 1, "the number of clients")
        check_float("partition.alpha", self.alpha, 0.0, np.inf, "the Dirichlet concentration")
        check_int("partition.min_size", self.min_size, 1, "the fewest examples of a client")

    def __call__(self, labels: IntArray, keys: dict[str, IntArray], rng: np.random.Generator) -> Partition:
        """Divides ``N`` examples (see `fedsim.data.Partitioner`).

        Raises:
            DataError: There are fewer than ``num_clients * min_size`` examples.
        """
        n, k = len(labels), self.num_clients
        if k * self.min_size > n:
            raise DataError(
                f"partition.num_clients={k} with partition.min_size={self.min_size} needs {k * self.min_size} training "
                f"examples, but there are only {n}; lower one of the two"
            )
        owners = np.empty(n, dtype=np.int64)
        by_class = np.argsort(labels, kind="stable")
        for rows in np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1):
            shares = np.exp(log_dirichlet(self.alpha, (k,), rng))
            # Rounded with one common random offset: a client's expected number is exactly its share times n_c,
            # and with equal shares it is not always the same clients that get the odd example.
            cuts = np.floor(np.cumsum(shares) / shares.sum() * len(rows) + rng.random()).astype(np.int64)
            cuts = np.minimum(cuts, len(rows))
            cuts[-1] = len(rows)
            owners[rng.permutation(rows)] = np.repeat(np.arange(k), np.diff(cuts, prepend=0))
        mend(owners, k, self.min_size, rng)
        return Partition.from_owners(owners, k)


def log_dirichlet(alpha: float, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    """Logarithms of draws from ``Dir(alpha, ..., alpha)`` over the last axis; finite for every ``alpha > 0``.

    A gamma variable of shape ``alpha`` is one of shape ``alpha + 1`` times ``U^(1/alpha)``: its logarithm does
    not underflow where the variable does. An ``alpha`` below 1e-12 is taken for 1e-12 (both are one-hot).

    Args:
        alpha: Concentration, > 0 or ``inf``.
        shape: Shape of the result; the last axis is the simplex.
        rng: Where the draws come from.
    """
    if np.isinf(alpha):
        return np.full(shape, -np.log(shape[-1]))
    alpha = max(alpha, 1e-12)
    log_gamma = np.log(rng.standard_gamma(alpha + 1.0, shape)) + np.log1p(-rng.random(shape)) / alpha
    log_gamma -= log_gamma.max(axis=-1, keepdims=True)
    return np.asarray(log_gamma - np.log(np.exp(log_gamma).sum(axis=-1, keepdims=True)))


def mend(owners: IntArray, num_clients: int, min_size: int, rng: np.random.Generator) -> None:
    """Moves examples, in place, until every client has ``min_size``; no more than that takes.

    The rule: while a client is short, the largest client (of equals, the one with the highest number) gives it
    one of its examples, chosen at random. All moves are worked out at once: the largest clients are levelled
    down to a common size, and what they give is dealt at random to the clients that are short.

    Args:
        owners: Client of every example, ``[N]`` with ``N >= num_clients * min_size``; changed in place.
        num_clients: K.
        min_size: Fewest examples of a client.
        rng: Where the choice of examples comes from.
    """
    sizes = np.bincount(owners, minlength=num_clients)
    missing = np.maximum(min_size - sizes, 0)
    total = int(missing.sum())
    if total == 0:
        return
    # The lowest level at which the examples above it are no more than are missing.
    low, high = min_size, int(sizes.max())
    while low < high:
        level = (low + high) // 2
        low, high = (low, level) if np.maximum(sizes - level, 0).sum() <= total else (level + 1, high)
    gives = np.maximum(sizes - low, 0)
    one_more = np.flatnonzero(sizes >= low)[::-1][: total - int(gives.sum())]
    gives[one_more] += 1

    rows = np.flatnonzero(gives[owners] > 0)
    rows = rows[np.lexsort((rng.random(len(rows)), owners[rows]))]
    who = owners[rows]
    rank = np.arange(len(rows)) - np.searchsorted(who, who)
    moved = rows[rank < gives[who]]
    owners[rng.permutation(moved)] = np.repeat(np.arange(num_clients), missing)
