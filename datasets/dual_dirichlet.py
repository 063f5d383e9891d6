"""Dual Dirichlet: client sizes from one Dirichlet distribution, client class mixtures from another.

Source: the partition of FedCompass, Li et al., 2024, https://arxiv.org/abs/2309.14675, as in its official code. Sizes
``q ~ Dir(alpha_size (1/K, ..., 1/K))``; class mixtures ``r_k ~ Dir(alpha_class p)`` with the class frequencies ``p`` of
the data. Client k gets the share ``q_k r_kc / sum_j q_j r_jc`` of class c: the integer part of its share of the
examples, and the last client what is left over.

Departures:
    1. A client that gets fewer than ``min_size`` examples is given what is missing by the largest ones
       (`fedsim.datasets.dirichlet.mend`); the official code may leave it empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedsim.data import IntArray, Partition
from fedsim.datasets.checks import check_float, check_int
from fedsim.datasets.dirichlet import mend
from fedsim.errors import DataError


@dataclass(frozen=True)
class DualDirichlet:
    """Unequal sizes and label skew, each with a concentration of its own.

    Before classes are shared out, a client's size has mean ``1/K`` and variance ``(1/K) (1 - 1/K) / (alpha_size + 1)``,
    its share of class c mean ``p_c`` and variance ``p_c (1 - p_c) / (alpha_class + 1)``. Both concentrations are
    totals: ``alpha_size = K`` is uniform over the simplex.

    The last client has up to ``K - 1`` examples of each class more than its share, by the official rule: little with
    few clients and many examples, much with many clients.

    Attributes:
        num_clients: Number of clients, K.
        alpha_size: Concentration of the sizes, > 0; ``inf``: equal ones; null: K.
        alpha_class: Concentration of the class mixtures, > 0: near 0 a client wants one class; ``inf``: the data's.
        min_size: Fewest examples of a client.
    """

    needs_classes: ClassVar = True

    num_clients: int
    alpha_size: float | None = None
    alpha_class: float = 0.5
    min_size: int = 1

    def __post_init__(self) -> None:
        check_int("partition.num_clients", self.num_clients, 1, "the number of clients")
        if self.alpha_size is not None:
            check_float("partition.alpha_size", self.alpha_size, 0.0, np.inf, "the concentration of sizes, or null")
        check_float("partition.alpha_class", self.alpha_class, 0.0, np.inf, "the concentration of class mixtures")
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
        _, pools = np.unique(labels, return_counts=True)
        counts = whole_parts(self.shares(pools / n, rng), pools)
        owners = np.empty(n, dtype=np.int64)
        by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(pools)[:-1])
        for rows, column in zip(by_class, counts.T, strict=True):
            owners[rng.permutation(rows)] = np.repeat(np.arange(k), column)
        mend(owners, k, self.min_size, rng)
        return Partition.from_owners(owners, k)

    def shares(self, prior: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
        """One draw of every client's share of every class, ``[K, C]``; each class adds up to 1.

        Args:
            prior: Frequencies of the classes, ``[C]``, each > 0.
            rng: Where the draw comes from.
        """
        k = self.num_clients
        alpha_size = k if self.alpha_size is None else self.alpha_size
        log_q = log_dirichlet_around(alpha_size, np.full(k, 1 / k), 1, rng)[0]
        log_share = log_q[:, None] + log_dirichlet_around(self.alpha_class, prior, k, rng)
        # In logarithms, a class that nobody wants still goes to the client that shuns it least.
        share = np.exp(log_share - log_share.max(axis=0))
        return np.asarray(share / share.sum(axis=0))


def log_dirichlet_around(
    total: float, mean: NDArray[np.float64], rows: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Logarithms of draws from ``Dir(total * mean)``; finite for every ``total > 0``.

    As `fedsim.datasets.dirichlet.log_dirichlet`, for parameters that differ.

    Args:
        total: Sum of the parameters, > 0 or ``inf``. Below 1e-12 it is taken for 1e-12 (both are one-hot).
        mean: Mean of the distribution, ``[n]``, each > 0, of sum 1.
        rows: Number of draws.
        rng: Where the draws come from.

    Returns:
        One draw per row, ``[rows, n]``.
    """
    shape = (rows, len(mean))
    if np.isinf(total):
        return np.tile(np.log(mean), (rows, 1))
    alpha = max(total, 1e-12) * mean
    # A gamma variable of shape `alpha` is one of shape `alpha + 1` times U^(1/alpha).
    log_gamma = np.log(rng.standard_gamma(alpha + 1.0, shape)) + np.log1p(-rng.random(shape)) / alpha
    log_gamma -= log_gamma.max(axis=1, keepdims=True)
    return np.asarray(log_gamma - np.log(np.exp(log_gamma).sum(axis=1, keepdims=True)))


def whole_parts(shares: NDArray[np.float64], pools: IntArray) -> NDArray[np.int64]:
    """Integer parts of the clients' shares of each class; what is left over goes to the last client.

    Args:
        shares: Share of every client of every class, ``[K, C]``; each class adds up to 1.
        pools: Examples of each class, ``[C]``.

    Returns:
        Examples of every client of every class, ``[K, C]``; each class adds up to its pool.
    """
    counts = np.floor(shares * pools + 1e-9).astype(np.int64)  # 3 * (1/3) may come out below 1
    counts[-1] += pools - counts.sum(axis=0)
    return counts
