"""Pathological label skew: every client holds a few classes only.

Source: McMahan et al., 2017, section 3, https://arxiv.org/abs/1602.05629 (MNIST, two shards per client), in the
stricter form that later work uses: exactly ``classes_per_client`` *distinct* classes.

Departures:
    1. McMahan et al. deal out shards of label-sorted data, so that a client may get two shards of one class, or
       a shard with two classes. Here a client has exactly ``classes_per_client`` classes.
    2. Shards are cut inside a class: every class has as many owners as any other, up to one, and its owners
       get equal shares, up to one example.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedsim.data import IntArray, Partition
from fedsim.datasets.checks import check_int
from fedsim.errors import DataError


@dataclass(frozen=True)
class Pathological:
    """Exactly ``classes_per_client`` classes per client, every class covered, shares of a class equal.

    Attributes:
        num_clients: Number of clients, K.
        classes_per_client: Distinct classes of a client, from 1 to the number of classes.
    """

    needs_classes: ClassVar = True

    num_clients: int
    classes_per_client: int = 2

    def __post_init__(self) -> None:
        check_int("partition.num_clients", self.num_clients, 1, "the number of clients")
        check_int("partition.classes_per_client", self.classes_per_client, 1, "distinct classes of a client")

    def __call__(self, labels: IntArray, keys: dict[str, IntArray], rng: np.random.Generator) -> Partition:
        """Divides ``N`` examples (see `fedsim.data.Partitioner`).

        Raises:
            DataError: There are too few classes, clients, or examples of a class.
        """
        k, c = self.num_clients, self.classes_per_client
        classes, codes, pools = np.unique(labels, return_inverse=True, return_counts=True)
        if c > len(classes):
            raise DataError(
                f"partition.classes_per_client={c} but the training examples have only {len(classes)} classes; lower it"
            )
        if k * c < len(classes):
            raise DataError(
                f"partition.num_clients={k} times partition.classes_per_client={c} is {k * c}: too few to cover "
                f"{len(classes)} classes; raise one of the two"
            )
        owned = deal(k, c, len(classes), rng)
        num_owners = np.bincount(owned.ravel(), minlength=len(classes))
        short = np.flatnonzero(pools < num_owners)
        if len(short):
            worst = short[np.argmin(pools[short] - num_owners[short])]
            raise DataError(
                f"class {classes[worst]} has {pools[worst]} training examples for {num_owners[worst]} clients "
                f"(partition.num_clients={k} * partition.classes_per_client={c} / {len(classes)} classes); "
                "lower one of the two"
            )
        # Owners of each class, one class after another; a class's examples are cut into equal parts.
        order = np.argsort(owned.ravel(), kind="stable")
        owner, of = np.repeat(np.arange(k), c)[order], owned.ravel()[order]
        nth = np.arange(k * c) - np.repeat(np.cumsum(num_owners) - num_owners, num_owners)
        share = (nth + 1) * pools[of] // num_owners[of] - nth * pools[of] // num_owners[of]

        shuffled = rng.permutation(len(labels))
        rows = shuffled[np.argsort(codes[shuffled], kind="stable")]  # by class, at random inside a class
        owners = np.empty(len(labels), dtype=np.int64)
        owners[rows] = np.repeat(owner, share)
        return Partition.from_owners(owners, k)


def deal(num_clients: int, per_client: int, num_classes: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Distinct classes for every client, each class equally often up to one.

    A class starts with ``floor(K c / C)`` places, ``(K c) mod C`` random ones with one more. Clients then
    draw ``c`` classes without replacement, with chances proportional to the places left. A class
    with as many places as there are clients left must be taken by each of them; there are never more than ``c``
    such classes, nor fewer than ``c`` classes left, so that no draw has to be undone.

    Args:
        num_clients: K.
        per_client: c, at most ``num_classes``.
        num_classes: C, at most ``K c``.
        rng: Where the draws come from.

    Returns:
        Classes, ``[K, c]``.
    """
    places = np.full(num_classes, num_clients * per_client // num_classes)
    places[rng.permutation(num_classes)[: num_clients * per_client % num_classes]] += 1
    owned = np.empty((num_clients, per_client), dtype=np.int64)
    order = rng.permutation(num_clients)  # the last ones have less choice, and should be anyone
    with np.errstate(divide="ignore"):  # no places left: an arrival at infinity
        for left, client in zip(range(num_clients, 0, -1), order, strict=True):
            # The c smallest of exponential variables of rates `places` (Efraimidis and Spirakis, 2006).
            arrival = rng.standard_exponential(num_classes) / places
            arrival[places == left] = -1.0
            chosen = np.argpartition(arrival, per_client - 1)[:per_client]
            places[chosen] -= 1
            owned[client] = chosen
    return owned
