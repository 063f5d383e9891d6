"""Dirichlet label skew with equal sizes and exact mixtures: a class that is used up is handed out again.

Source: the partition of the official code of FedSpeed, Sun et al., 2023, https://arxiv.org/abs/2302.10429. Client k
draws ``q_k ~ Dir(alpha, ..., alpha)`` over classes, and every one of its ``floor(N / K)`` places draws a class from
``q_k``. The examples of a class are shuffled once and handed out one after the other; when all of them are used, the
same row of examples starts again. So an example can be at several places, of several clients or of one, and another
at none; within a class the numbers of places differ by at most one.

Departures:
    1. Places are filled in a uniformly random order. The order is no matter for the mixtures; it decides who shares
       an example with whom.
    2. If K does not divide N, ``N - K floor(N / K)`` places fewer than examples are filled; the official code gives
       these places to the first client.
    3. A place whose class is used up takes an example of the refilled class; the official code draws its class again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedsim.data import IntArray, Partition
from fedsim.datasets.checks import check_float, check_int
from fedsim.datasets.dirichlet import log_dirichlet
from fedsim.datasets.dirichlet_balanced import CHUNK
from fedsim.datasets.iid import equal_sizes


@dataclass(frozen=True)
class DirichletRefill:
    """Class mixtures of clients drawn from ``Dir(alpha, ..., alpha)`` and met; all clients have ``floor(N / K)``.

    Attributes:
        num_clients: Number of clients, K.
        alpha: Concentration, > 0: near 0 a client has one class; ``inf`` is allowed: the same mixture everywhere.
    """

    needs_classes: ClassVar = True
    repeats: ClassVar = True

    num_clients: int
    alpha: float

    def __post_init__(self) -> None:
        check_int("partition.num_clients", self.num_clients, 1, "the number of clients")
        check_float("partition.alpha", self.alpha, 0.0, np.inf, "the Dirichlet concentration")

    def __call__(self, labels: IntArray, keys: dict[str, IntArray], rng: np.random.Generator) -> Partition:
        """Fills every client's places from ``N`` examples (see `fedsim.data.Partitioner`).

        Raises:
            DataError: There are fewer examples than clients.
        """
        n, k = len(labels), self.num_clients
        size = int(equal_sizes(n, k).min())
        classes, codes = np.unique(labels, return_inverse=True)
        log_q = log_dirichlet(self.alpha, (k, len(classes)), rng)
        places = rng.permutation(np.repeat(np.arange(k), size))  # whose turn it is
        drawn = draw(places, log_q, rng)
        rows = hand_out(drawn, codes, rng)
        order = np.lexsort((rows, places))
        return Partition.from_owners(places[order], k, rows[order])


def draw(places: IntArray, log_q: NDArray[np.float64], rng: np.random.Generator) -> IntArray:
    """Draws a class for every place from its client's mixture.

    Args:
        places: Client of every place, ``[M]``.
        log_q: Logarithms of the clients' mixtures, ``[K, classes]``.
        rng: Where the draws come from.

    Returns:
        The class of every place, ``[M]``.
    """
    drawn = np.empty(len(places), dtype=np.int64)
    for start in range(0, len(places), CHUNK):
        part = places[start : start + CHUNK]
        # Gumbel-max: the argmax of log q + Gumbel noise is a draw from q.
        score = log_q[part]
        score += rng.gumbel(size=score.shape)
        drawn[start : start + CHUNK] = score.argmax(axis=1)
    return drawn


def hand_out(drawn: IntArray, codes: IntArray, rng: np.random.Generator) -> IntArray:
    """Gives every place an example of its class, in whole passes over the class.

    Args:
        drawn: Class of every place, in the order in which they are served, ``[M]``.
        codes: Class of every example, ``[N]``; every class that is drawn has one.
        rng: Where the order inside the classes comes from.

    Returns:
        The example of every place, ``[M]``.
    """
    shuffled = rng.permutation(len(codes))
    pool = shuffled[np.argsort(codes[shuffled], kind="stable")]  # by class, at random inside a class
    sizes = np.bincount(codes)
    first = np.cumsum(sizes) - sizes
    served = np.argsort(drawn, kind="stable")  # by class, in order of service
    wanted = np.bincount(drawn, minlength=len(sizes))
    turn = np.arange(len(drawn)) - np.repeat(np.cumsum(wanted) - wanted, wanted)
    of = drawn[served]
    rows = np.empty(len(drawn), dtype=np.int64)
    rows[served] = pool[first[of] + turn % sizes[of]]
    return rows
