"""Shards: data sorted by class, cut into equal shards, and so many shards dealt to every client.

Source: McMahan et al., 2017, section 3, https://arxiv.org/abs/1602.05629 ("pathological non-IID": 200 shards of 300
MNIST images, two for each of 100 clients). `fedsim.datasets.pathological` is the stricter form of later work.

Departures:
    1. Examples of one class are in random order before the cut; the paper does not say.
    2. Where the number of shards does not divide that of examples, shards differ by one example, and a client's size
       by up to ``shards_per_client``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedsim.data import IntArray, Partition
from fedsim.datasets.checks import check_int
from fedsim.datasets.iid import equal_sizes
from fedsim.errors import DataError


@dataclass(frozen=True)
class Shards:
    """``shards_per_client`` shards for every client, at random; a client may get two shards of one class.

    Attributes:
        num_clients: Number of clients, K.
        shards_per_client: Shards of a client, s. Where no class is smaller than a shard, a shard has one or two
            classes, and a client at most 2 s.
    """

    needs_classes: ClassVar = True

    num_clients: int
    shards_per_client: int = 2

    def __post_init__(self) -> None:
        check_int("partition.num_clients", self.num_clients, 1, "the number of clients")
        check_int("partition.shards_per_client", self.shards_per_client, 1, "shards of a client")

    def __call__(self, labels: IntArray, keys: dict[str, IntArray], rng: np.random.Generator) -> Partition:
        """Divides ``N`` examples (see `fedsim.data.Partitioner`).

        Raises:
            DataError: There are fewer examples than shards.
        """
        k, s, n = self.num_clients, self.shards_per_client, len(labels)
        if k * s > n:
            raise DataError(
                f"partition.num_clients={k} times partition.shards_per_client={s} is {k * s} shards, but there are "
                f"only {n} training examples; lower one of the two or choose a larger data set"
            )
        shuffled = rng.permutation(n)
        rows = shuffled[np.argsort(labels[shuffled], kind="stable")]  # by class, at random inside a class
        owners = np.empty(n, dtype=np.int64)
        owners[rows] = np.repeat(rng.permutation(np.repeat(np.arange(k), s)), equal_sizes(n, k * s))
        return Partition.from_owners(owners, k)
