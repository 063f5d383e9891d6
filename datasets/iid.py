"""IID: every client holds a random sample of the whole, without replacement.

Source: McMahan et al., 2017, section 3, https://arxiv.org/abs/1602.05629.
Departures: none known; where K does not divide N, sizes differ by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsim.data import IntArray, Partition
from fedsim.datasets.checks import check_int
from fedsim.errors import DataError


@dataclass(frozen=True)
class IID:
    """Examples dealt at random; sizes differ by at most one.

    Attributes:
        num_clients: Number of clients, K.
    """

    num_clients: int

    def __post_init__(self) -> None:
        check_int("partition.num_clients", self.num_clients, 1, "the number of clients")

    def __call__(self, labels: IntArray, keys: dict[str, IntArray], rng: np.random.Generator) -> Partition:
        """Divides ``N`` examples (see `fedsim.data.Partitioner`).

        Raises:
            DataError: There are fewer examples than clients.
        """
        n = len(labels)
        sizes = equal_sizes(n, self.num_clients)
        owners = np.empty(n, dtype=np.int64)
        owners[rng.permutation(n)] = np.repeat(np.arange(self.num_clients), sizes)
        return Partition.from_owners(owners, self.num_clients)


def equal_sizes(num_examples: int, num_clients: int) -> IntArray:
    """Sizes that add up to ``num_examples`` and differ by at most one, ``[K]``.

    Raises:
        DataError: A client would be empty.
    """
    if num_clients > num_examples:
        raise DataError(
            f"partition.num_clients={num_clients} needs at least as many training examples, but there are only "
            f"{num_examples}; lower partition.num_clients or choose a larger data set"
        )
    return np.diff(np.arange(num_clients + 1, dtype=np.int64) * num_examples // num_clients)
