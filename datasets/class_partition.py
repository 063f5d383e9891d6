"""Class partition: every client holds a few random classes, and random parts of them.

Source: the partition of FedCompass, Li et al., 2024, https://arxiv.org/abs/2309.14675, as in its official code. Every
client draws a number of classes and as many random ones; all clients draw again until every class has an owner. Each
class is cut among its owners in lengths proportional to ``|N(10, 3^2)|``.

Departures:
    1. The official numbers of classes (`TABLE`) are for ten classes. Elsewhere they are shares: a tenth is a tenth of
       the classes that the data have, rounded half up, at least one.
    2. Draws end after `MOST_NUMBERS` random numbers, in an error that says which option to raise.
    3. An owner whose part of a class would be rounded to nothing gets one example from the largest part, so that all
       clients have the classes that they drew (`fedsim.datasets.dirichlet.mend`).
    4. Parts are rounded with one common random offset per class: an owner's expected number is exactly its share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedsim.data import IntArray, Partition
from fedsim.datasets.checks import check_int
from fedsim.datasets.dirichlet import mend
from fedsim.errors import ConfigError, DataError

TABLE = {1: (10, 10), 2: (7, 8), 3: (6, 8), 4: (5, 7), 5: (5, 6), 6: (4, 6), 7: (4, 5)}
"""Fewest and most classes of a client, of ten, by the number of clients; `MANY` for more clients."""

MANY = (3, 5)
"""Fewest and most classes of a client, of ten, from 8 clients on."""

MOST_NUMBERS = 20_000_000
"""Random numbers, clients times classes times draws, after which a search for a covering draw is given up (seconds)."""


@dataclass(frozen=True)
class ClassPartition:
    """Between ``min_classes`` and ``max_classes`` random classes per client, every class covered, parts unequal.

    Attributes:
        num_clients: Number of clients, K.
        min_classes: Fewest classes of a client; null: by `TABLE`.
        max_classes: Most classes of a client, at most the number of classes; null: by `TABLE`.
    """

    needs_classes: ClassVar = True

    num_clients: int
    min_classes: int | None = None
    max_classes: int | None = None

    def __post_init__(self) -> None:
        check_int("partition.num_clients", self.num_clients, 1, "the number of clients")
        for name in ("min_classes", "max_classes"):
            if getattr(self, name) is not None:
                check_int(f"partition.{name}", getattr(self, name), 1, "distinct classes of a client, or null")
        if self.min_classes is not None and self.max_classes is not None and self.min_classes > self.max_classes:
            raise ConfigError(
                f"partition.min_classes={self.min_classes} must be at most partition.max_classes={self.max_classes}; "
                "lower the one or raise the other"
            )

    def __call__(self, labels: IntArray, keys: dict[str, IntArray], rng: np.random.Generator) -> Partition:
        """Divides ``N`` examples (see `fedsim.data.Partitioner`).

        Raises:
            DataError: There are too few classes, clients, or examples of a class, or no draw covered all classes.
        """
        k = self.num_clients
        classes, pools = np.unique(labels, return_counts=True)
        low, high = self.limits(len(classes))
        owned = draw(k, low, high, len(classes), rng)
        num_owners = owned.sum(axis=0)
        short = np.flatnonzero(pools < num_owners)
        if len(short):
            worst = short[np.argmin(pools[short] - num_owners[short])]
            raise DataError(
                f"class {classes[worst]} has {pools[worst]} training examples for {num_owners[worst]} clients "
                f"(partition.num_clients={k}, {low} to {high} classes per client); "
                "lower partition.num_clients or partition.max_classes"
            )
        owners = np.empty(len(labels), dtype=np.int64)
        by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(pools)[:-1])
        for rows, column in zip(by_class, owned.T, strict=True):
            who = np.flatnonzero(column)
            lengths = np.abs(rng.normal(10.0, 3.0, len(who)))
            cuts = np.floor(np.cumsum(lengths) / lengths.sum() * len(rows) + rng.random()).astype(np.int64)
            cuts = np.minimum(cuts, len(rows))
            cuts[-1] = len(rows)
            parts = np.repeat(np.arange(len(who)), np.diff(cuts, prepend=0))
            mend(parts, len(who), 1, rng)
            owners[rng.permutation(rows)] = who[parts]
        return Partition.from_owners(owners, k)

    def limits(self, num_classes: int) -> tuple[int, int]:
        """Fewest and most classes of a client.

        Args:
            num_classes: Classes that the data have, C.

        Raises:
            DataError: The options do not fit C classes, or all clients together cannot cover them.
        """
        tenths = TABLE.get(self.num_clients, MANY)
        low, high = (max((2 * tenth * num_classes + 10) // 20, 1) for tenth in tenths)
        low = low if self.min_classes is None else self.min_classes
        high = high if self.max_classes is None else self.max_classes
        for name, value in (("min_classes", low), ("max_classes", high)):
            if value > num_classes:
                raise DataError(
                    f"partition.{name}={value} but the training examples have only {num_classes} classes; lower it"
                )
        if low > high:
            name, value = ("min", low) if self.max_classes is None else ("max", high)
            other = {"min": "max", "max": "min"}[name]
            raise DataError(
                f"partition.{name}_classes={value} makes {low} to {high} classes per client, since "
                f"partition.{other}_classes=null is {low + high - value} here; set both"
            )
        if self.num_clients * high < num_classes:
            raise DataError(
                f"partition.num_clients={self.num_clients} times at most {high} classes (partition.max_classes) is "
                f"{self.num_clients * high}: too few to cover {num_classes} classes; raise one of the two"
            )
        return low, high


def draw(num_clients: int, low: int, high: int, num_classes: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Random classes for every client, again and again until every class has an owner.

    Args:
        num_clients: K.
        low: Fewest classes of a client, >= 1.
        high: Most classes of a client, at most ``num_classes``.
        num_classes: C.
        rng: Where the draws come from.

    Returns:
        Who owns what, ``[K, C]``.

    Raises:
        DataError: No draw covered all classes.
    """
    ranks = np.tile(np.arange(num_classes), (num_clients, 1))
    draws = max(MOST_NUMBERS // ranks.size, 1)
    for _ in range(draws):
        count = rng.integers(low, high, (num_clients, 1), endpoint=True)
        owned = rng.permuted(ranks, axis=1) < count
        if owned.any(axis=0).all():
            return np.asarray(owned)
    raise DataError(
        f"{draws} draws of {low} to {high} of {num_classes} classes for each of {num_clients} clients left a class "
        "without an owner every time; raise partition.max_classes or partition.num_clients, or take "
        "partition=pathological"
    )
