"""Natural partition: one client per value of a key that came with the data (writer, speaker, user...).

Source: Caldas et al., 2018 ("LEAF"), https://arxiv.org/abs/1812.01097.
Departures: none known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsim.data import IntArray, Partition
from fedsim.datasets.checks import check_int
from fedsim.errors import ConfigError, DataError, did_you_mean


@dataclass(frozen=True)
class Natural:
    """One client per distinct value of a natural key, in the order of the values.

    Examples of values that are not chosen, or that have too few examples, are not used.

    Attributes:
        key: Name of the key; null: the only one that the data have.
        num_clients: A random sample of this many values; null: all of them.
        min_size: Values with fewer examples are left out.
    """

    key: str | None = None
    num_clients: int | None = None
    min_size: int = 1

    def __post_init__(self) -> None:
        if self.key is not None and not isinstance(self.key, str):
            raise ConfigError(f"partition.key must be the name of a key or null, got {self.key!r}")
        if self.num_clients is not None:
            check_int("partition.num_clients", self.num_clients, 1, "the number of clients, or null for all")
        check_int("partition.min_size", self.min_size, 1, "the fewest examples of a client")

    def __call__(self, labels: IntArray, keys: dict[str, IntArray], rng: np.random.Generator) -> Partition:
        """Divides the examples of the chosen values (see `fedsim.data.Partitioner`).

        Raises:
            DataError: The data have no such key, or too few values of it.
        """
        key = self._key(list(keys))
        values, codes, sizes = np.unique(keys[key], return_inverse=True, return_counts=True)
        large = np.flatnonzero(sizes >= self.min_size)
        wanted = max(len(large), 1) if self.num_clients is None else self.num_clients
        if wanted > len(large):
            raise DataError(
                f"partition=natural needs {wanted} values of '{key}' with at least {self.min_size} training examples "
                f"(partition.min_size), but only {len(large)} of {len(values)} have them; "
                "lower partition.min_size or partition.num_clients"
            )
        if wanted < len(large):
            large = np.sort(rng.choice(large, wanted, replace=False))
        client = np.full(len(values), -1, dtype=np.int64)
        client[large] = np.arange(wanted)
        owners = client[codes]
        rows = np.flatnonzero(owners >= 0)
        return Partition.from_owners(owners[rows], wanted, rows)

    def _key(self, known: list[str]) -> str:
        have = ", ".join(known) or "none"
        if not known:
            raise DataError(
                "partition=natural needs data with a natural key, and this data set has none; "
                "choose another partition, or name a column in data.keys"
            )
        if self.key is None:
            if len(known) > 1:
                raise DataError(f"partition.key is null, but this data set has several keys: {have}; name one of them")
            return known[0]
        if self.key not in known:
            raise DataError(
                f"partition.key='{self.key}' is no key of this data set{did_you_mean(self.key, known)}; it has: {have}"
            )
        return self.key
