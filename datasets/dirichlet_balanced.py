"""Dirichlet label skew with equal sizes: every client draws its own class mixture.

Source: the ``Dirichlet`` rule of the code of Acar et al., 2021 ("FedDyn"), https://openreview.net/forum?id=B7v4QMR6Z9w,
used since by FedDC, FedSpeed and others. Client k draws ``q_k ~ Dir(alpha, ..., alpha)`` over classes; then, in
random order, every place of every client draws a class from ``q_k``, restricted to the classes that still
have examples.

Departures:
    1. Places are filled in a uniformly random order; the reference draws a client at random, and again if that
       client is full. The order is all that differs.
    2. The reference draws again until it hits a class that is left, which takes for ever at a small ``alpha``;
       here such a place draws from ``q_k`` restricted and renormalised, which is the same law.
    3. N need not be a multiple of K: sizes differ by at most one, and no example is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedsim.data import IntArray, Partition
from fedsim.datasets.checks import check_float, check_int
from fedsim.datasets.dirichlet import log_dirichlet
from fedsim.datasets.iid import equal_sizes

CHUNK = 1 << 17  # places drawn at once: bounds memory at CHUNK * num_classes doubles


@dataclass(frozen=True)
class DirichletBalanced:
    """Class mixtures of clients drawn from ``Dir(alpha, ..., alpha)``; sizes differ by at most one.

    Because every example is used once, the mixtures can only be met as far as the classes last: the places
    filled last take what is left.

    Attributes:
        num_clients: Number of clients, K.
        alpha: Concentration, > 0: near 0 a client has few classes, large is IID; ``inf`` is allowed.
    """

    needs_classes: ClassVar = True

    num_clients: int
    alpha: float

    def __post_init__(self) -> None:
        check_int("partition.num_clients", self.num_clients, 1, "the number of clients")
        check_float("partition.alpha", self.alpha, 0.0, np.inf, "the Dirichlet concentration")

    def __call__(self, labels: IntArray, keys: dict[str, IntArray], rng: np.random.Generator) -> Partition:
        """Divides ``N`` examples (see `fedsim.data.Partitioner`).

        Raises:
            DataError: There are fewer examples than clients.
        """
        n, k = len(labels), self.num_clients
        sizes = equal_sizes(n, k)
        classes, codes = np.unique(labels, return_inverse=True)
        log_q = log_dirichlet(self.alpha, (k, len(classes)), rng)
        places = rng.permutation(np.repeat(np.arange(k), sizes))  # whose turn it is
        drawn = fill(places, log_q, np.bincount(codes), rng)

        owners = np.empty(n, dtype=np.int64)
        shuffled = rng.permutation(n)
        rows = shuffled[np.argsort(codes[shuffled], kind="stable")]  # by class, at random inside a class
        owners[rows] = places[np.argsort(drawn, kind="stable")]
        return Partition.from_owners(owners, k)


def fill(places: IntArray, log_q: NDArray[np.float64], pools: IntArray, rng: np.random.Generator) -> IntArray:
    """Draws a class for every place, in order, from its client's mixture over the classes that are left.

    A place whose class has run out draws again; one whose class is left keeps it, since that draw already
    follows the restricted law. So a pass up to the next exhausted class serves all its places at once, and
    there are at most as many passes as classes.

    Args:
        places: Client of every place, ``[N]``.
        log_q: Logarithms of the clients' mixtures, ``[K, classes]``.
        pools: Examples of every class, ``[classes]`` (at most 65,536), adding up to N.
        rng: Where the draws come from.

    Returns:
        The class of every place, ``[N]``, each class exactly as often as its pool says.
    """
    left = pools.copy()
    open_classes = np.flatnonzero(left > 0)
    drawn = np.empty(len(places), dtype=np.int64)
    redraw, start = np.arange(len(places)), 0
    while start < len(places):
        for part in np.array_split(redraw, -(-len(redraw) // CHUNK) or 1):
            # Gumbel-max: the argmax of log q + Gumbel noise is a draw from q, restricted to the open classes.
            score = log_q[places[part]][:, open_classes] + rng.gumbel(size=(len(part), len(open_classes)))
            drawn[part] = open_classes[score.argmax(axis=1)]
        # Up to the place at which the first class runs out, every draw stands. One does at the latest at the last
        # place, since as many examples are left as places. (Two-byte integers sort in linear time.)
        order = np.argsort(drawn[start:].astype(np.uint16), kind="stable")
        counts = np.bincount(drawn[start:], minlength=len(left))
        out = np.flatnonzero((left > 0) & (counts >= left))
        stop = start + int(order[(np.cumsum(counts) - counts)[out] + left[out] - 1].min()) + 1
        left -= np.bincount(drawn[start:stop], minlength=len(left))
        open_classes = np.flatnonzero(left > 0)
        redraw, start = stop + np.flatnonzero(left[drawn[stop:]] == 0), stop
    return drawn
