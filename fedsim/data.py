"""What a data source hands over, and how clients see it.

A data set is a few contiguous tensors. A client's share is a list of row numbers into them, so
that a population of any size is two arrays (`Partition`), and a batch is one gather.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import DataError

IntArray = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    Attributes:
        x: Inputs, ``[N, ...]``; images are uint8 ``[N, channels, height, width]``.
        y: Labels, int64 ``[N]`` (classification), or float targets ``[N]`` or ``[N, k]``.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Dataset:
    """A data set, loaded.

    Attributes:
        name: For logs and pictures.
        train: Training examples, to be partitioned.
        test: The server's test set.
        class_names: One name per class; empty for regression.
        mean: Per-channel mean of uint8 images scaled to [0, 1]; empty: inputs are used as they are.
        std: Per-channel standard deviation, like ``mean``.
        keys: Natural keys of the training examples, int64 ``[N]`` each (``{"writer": ...}``).
        clients: A population that generates its own data (``train`` is then empty).
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    keys: dict[str, Tensor] = field(default_factory=dict)
    clients: Clients | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for regression."""
        return len(self.class_names)


@dataclass(frozen=True)
class Shard:
    """A client's examples: rows of tensors that many clients may share.

    Attributes:
        x: The store of inputs, ``[N, ...]``.
        y: The store of labels, ``[N]``.
        rows: The client's rows in the store, int64 ``[n]``.
    """

    x: Tensor
    y: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)


class Clients(Protocol):
    """A population of data holders. ``len`` is the number of clients."""

    def __len__(self) -> int: ...

    def sizes(self) -> IntArray:
        """Training examples of every client, ``[K]``."""
        ...

    def train(self, client: int) -> Shard:
        """The examples that client ``client`` trains on."""
        ...

    def heldout(self, client: int) -> Shard:
        """The client's own held-out examples; may be empty."""
        ...


@dataclass(frozen=True)
class Partition:
    """Which examples belong to which client: two arrays, whatever the number of clients.

    Attributes:
        offsets: ``[K + 1]``; client k owns ``indices[offsets[k]:offsets[k + 1]]``.
        indices: Row numbers into the training split, ``[N]``; an example that is at several places is there as often.
    """

    offsets: IntArray
    indices: IntArray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, client: int) -> IntArray:
        if not 0 <= client < len(self):
            raise IndexError(f"client {client} of {len(self)}")
        return self.indices[self.offsets[client] : self.offsets[client + 1]]

    def sizes(self) -> IntArray:
        """Examples of every client, ``[K]``."""
        return np.diff(self.offsets)

    @property
    def repeats(self) -> bool:
        """Whether an example is at several places, of one client or of several."""
        return len(self.indices) > 0 and bool(np.bincount(self.indices).max() > 1)

    def sha256(self) -> str:
        """Hash of the content."""
        h = hashlib.sha256(self.offsets.astype("<i8").tobytes())
        h.update(self.indices.astype("<i8").tobytes())
        return h.hexdigest()

    @classmethod
    def from_owners(cls, owners: IntArray, num_clients: int, rows: IntArray | None = None) -> Partition:
        """From each example's owner; a client's examples keep their order.

        Args:
            owners: Client of every example, ``[N]``, each in ``[0, num_clients)``.
            num_clients: K.
            rows: Row number of every example, ``[N]``; default 0..N-1.
        """
        order = np.argsort(owners, kind="stable").astype(np.int64)
        offsets = np.zeros(num_clients + 1, dtype=np.int64)
        np.cumsum(np.bincount(owners, minlength=num_clients), out=offsets[1:])
        return cls(offsets, order if rows is None else rows[order])


class Partitioner(Protocol):
    """A rule that divides examples among clients (config group ``partition``).

    Two optional attributes of the class say what it needs and does: ``needs_classes = True``, labels that are classes;
    ``repeats = True``, it may give an example to several clients, or to one several times. Without the latter every
    example belongs to one client at most, and the platform refuses a partition in which one does not.
    """

    @property
    def num_clients(self) -> int | None:
        """Clients that were asked for; None: as many as the data have (natural keys)."""
        ...

    def __call__(self, labels: IntArray, keys: dict[str, IntArray], rng: np.random.Generator) -> Partition:
        """Divides the examples.

        Args:
            labels: Class of every example, ``[N]``.
            keys: Natural keys of the examples, ``[N]`` each.
            rng: Where every random number comes from.

        Returns:
            Row numbers in ``range(N)`` by client, none of which is empty.

        Raises:
            DataError: The request cannot be met; the message has the numbers that make it so.
        """
        ...


@dataclass(frozen=True)
class PartitionedClients:
    """A population that shares one training split.

    Attributes:
        split: The shared tensors.
        train_part: The examples that clients train on.
        heldout_part: The examples that clients keep for evaluation.
        test: What ``heldout_part`` numbers, if it is the server's test set; None: ``split``.
    """

    split: Split
    train_part: Partition
    heldout_part: Partition
    test: Split | None = None

    def __len__(self) -> int:
        return len(self.train_part)

    def sizes(self) -> IntArray:
        return self.train_part.sizes()

    def train(self, client: int) -> Shard:
        return Shard(self.split.x, self.split.y, torch.from_numpy(self.train_part[client].copy()))

    def heldout(self, client: int) -> Shard:
        split = self.split if self.test is None else self.test
        return Shard(split.x, split.y, torch.from_numpy(self.heldout_part[client].copy()))


def hold_out(partition: Partition, fraction: float, rng: np.random.Generator) -> tuple[Partition, Partition]:
    """Splits every client's examples into training and held-out examples, at random.

    A random part of a client's examples follows that client's own distribution. Every client keeps
    at least one training example: a client of n examples holds out ``min(round(fraction * n), n - 1)``.

    Copies of an example that one client has several times stay together, all in training or all held out: where the
    cut would part them, the client holds out that many fewer. Nothing is promised between clients: where a partition
    repeats examples, one that a client trains on may be held out by another.

    Args:
        partition: The whole.
        fraction: Share to hold out, in [0, 1).
        rng: Where the choice comes from.

    Returns:
        The training part and the held-out part; each client's examples are in increasing order.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"partition.holdout must be in [0, 1), got {fraction}")
    sizes = partition.sizes()
    held = np.minimum(np.rint(fraction * sizes).astype(np.int64), np.maximum(sizes - 1, 0))
    owners = np.repeat(np.arange(len(sizes)), sizes)
    # A random order inside every client: sort by (owner, random number).
    draw = rng.random(len(owners))
    first = _first_copy(owners, partition.indices) if partition.repeats else None
    order = np.lexsort((draw, owners) if first is None else (first, draw[first], owners))
    rank = np.arange(len(owners)) - partition.offsets[:-1][owners]
    out = rank < held[owners]
    if first is not None:
        example = first[order]
        out &= ~np.isin(example, example[~out])
    parts = []
    for chosen in (~out, out):
        rows, who = partition.indices[order[chosen]], owners[chosen]
        within = np.lexsort((rows, who))
        parts.append(Partition.from_owners(who[within], len(sizes), rows[within]))
    return parts[0], parts[1]


def _first_copy(owners: IntArray, rows: IntArray) -> IntArray:
    """For every place the first place of the same client with the same row, ``[N]``."""
    order = np.lexsort((rows, owners))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(rows[order]) != 0) | (np.diff(owners[order]) != 0)
    out = np.empty(len(order), dtype=np.int64)
    out[order] = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    return out
