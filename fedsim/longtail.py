"""Long-tailed data: class sizes that fall, test sets with a client's own classes, and head, middle and tail.

Source: Xiao et al., 2024 ("FedLoGe"), https://arxiv.org/abs/2401.08977, with the authors' code
(https://github.com/ZackZikaiXiao/FedLoGe) for the numbers.
Departures:
    1. Where a class has fewer test images than a client's share asks for, all of that client's numbers are lowered by
       the same factor, so that its proportions stay; the official code does not say what then.
    2. A class that the test set does not have is left out of local test sets.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from fedsim.data import Dataset, IntArray, Partition, Split
from fedsim.errors import ConfigError
from fedsim.random import numpy_generator

#: Names of the groups, by the number that `groups` gives them.
GROUPS = ("head", "middle", "tail")


def profile(largest: int, num_classes: int, imbalance: float) -> list[int]:
    """Long-tailed class sizes, ``floor(n_max * imbalance^(-c / (C - 1)))`` of class c.

    Args:
        largest: Examples of class 0, n_max.
        num_classes: C, at least 2.
        imbalance: Largest over smallest class, >= 1.
    """
    share = 1 / imbalance
    # A size that is whole must not be lost to rounding: 49 * (1 / 49) is less than 1.
    return [int(largest * share ** (c / (num_classes - 1)) + 1e-9) for c in range(num_classes)]


def cut(labels: IntArray, num_classes: int, imbalance: float, rng: np.random.Generator) -> IntArray:
    """Rows of a long-tailed part of some examples, chosen at random within every class.

    n_max of `profile` is the largest number for which every class has enough examples.

    Args:
        labels: Class of every example, ``[N]``.
        num_classes: C, at least 2.
        imbalance: Largest over smallest class, >= 1.
        rng: Where the choice comes from.

    Returns:
        Rows in increasing order; none of a class for which ``floor`` gives 0.
    """
    have = np.bincount(labels, minlength=num_classes)

    def too_many(largest: int) -> bool:
        return bool((np.array(profile(largest, num_classes, imbalance)) > have).any())

    largest = bisect_left(range(1, int(have[0]) + 1), True, key=too_many)
    wanted = np.array(profile(largest, num_classes, imbalance))
    order = np.lexsort((rng.random(len(labels)), labels))  # a random order inside every class
    rank = np.arange(len(labels)) - (np.cumsum(have) - have)[labels[order]]
    rows: IntArray = np.sort(order[rank < wanted[labels[order]]])
    return rows


def long_tailed(dataset: Dataset, imbalance: float, seed: int) -> Dataset:
    """A data set whose training examples, natural keys included, are cut to long-tailed class sizes (`cut`).

    Args:
        dataset: Data with two classes or more.
        imbalance: Largest over smallest class, >= 1; 1 gives the data as they are.
        seed: The run's seed.

    Raises:
        ConfigError: Data without classes, or of clients that have their own; a class would be left without examples.
    """
    key, num_classes = f"data.imbalance={imbalance:g}", dataset.num_classes
    if dataset.clients is not None:
        raise ConfigError(
            f"{key} is not available: {dataset.name}'s examples all belong to its clients; set data.imbalance=null"
        )
    if num_classes < 2:
        found = f"{num_classes} class" if num_classes else "none (regression)"
        raise ConfigError(f"{key} needs at least two classes, and {dataset.name} has {found}; set data.imbalance=null")
    if imbalance == 1:
        return dataset
    labels = dataset.train.y.numpy()
    rows = cut(labels, num_classes, imbalance, numpy_generator(seed, "imbalance"))
    left = np.bincount(labels[rows], minlength=num_classes)
    if not left.all():
        have, c = np.bincount(labels, minlength=num_classes), int(left.argmin())
        raise ConfigError(
            f"{key} would leave class {c} ('{dataset.class_names[c]}') of {dataset.name} without training examples: "
            f"classes have {have.min():,} to {have.max():,}; lower data.imbalance"
        )
    chosen = torch.from_numpy(rows)
    return replace(
        dataset,
        train=Split(dataset.train.x[chosen], dataset.train.y[chosen]),
        keys={name: values[chosen] for name, values in dataset.keys.items()},
    )


def local_tests(labels: IntArray, part: Partition, test_labels: IntArray, seed: int) -> Partition:
    """Test examples of every client, with the class proportions of its training examples.

    Of N training examples of all clients together, client k has ``n_kc`` of class c: it gets ``floor(M n_kc / N)`` of
    the M test examples, of that class, drawn without replacement and independently of other clients. Where
    a class has fewer, the ``M / N`` of this client is lowered to the number of which that class has enough, for all its
    classes. A class that the test set lacks is left out.

    Args:
        labels: Class of every example that ``part`` numbers.
        part: Training examples of every client.
        test_labels: Class of every test example, ``[M]``.
        seed: The run's seed.

    Returns:
        Row numbers into the test set, by client; a client's are in increasing order. Clients with few examples, all
        ``M n_kc / N < 1``, have none. All clients together have M at most.
    """
    num_classes = 1 + int(max(labels.max(initial=0), test_labels.max(initial=0)))
    owners = np.repeat(np.arange(len(part)), part.sizes())
    pairs, counts = np.unique(owners * num_classes + labels[part.indices], return_counts=True)
    who, which = pairs // num_classes, pairs % num_classes
    have = np.bincount(test_labels, minlength=num_classes)[which]
    over, under = np.full(len(part), len(test_labels)), np.full(len(part), len(part.indices))  # M and N, by client
    short = np.flatnonzero((counts * over[who] // under[who] > have) & (have > 0))
    short = short[np.argsort(-have[short] / counts[short], kind="stable")]  # the scarcest class last: it stays
    over[who[short]], under[who[short]] = have[short], counts[short]
    sizes = np.where(have > 0, counts * over[who] // under[who], 0)

    by_class = np.split(np.argsort(test_labels, kind="stable"), np.cumsum(np.bincount(test_labels))[:-1])
    rows, owner, last = [np.empty(0, dtype=np.int64)], np.repeat(who, sizes), -1
    for i in np.flatnonzero(sizes):  # M at most, whatever the number of clients
        if who[i] != last:
            last = int(who[i])
            rng = numpy_generator(seed, "local test", last)
        rows.append(rng.choice(by_class[which[i]], sizes[i], replace=False, shuffle=False))
    drawn = np.concatenate(rows)
    order = np.lexsort((drawn, owner))
    return Partition.from_owners(owner[order], len(part), drawn[order])


def groups(counts: Sequence[int] | IntArray) -> IntArray:
    """Group of every class, ``[C]``: 0 head, 1 middle, 2 tail (`GROUPS`).

    From the largest class to the smallest, ties by class number: the head is the classes up to and including the one
    that reaches 75 % of all examples, the middle those up to and including the one that reaches 95 %.

    Args:
        counts: Examples of every class, ``[C]``.
    """
    n = np.asarray(counts, dtype=np.int64)
    order = np.argsort(-n, kind="stable")
    before = np.cumsum(n[order]) - n[order]  # examples of the larger classes
    out = np.empty(len(n), dtype=np.int64)
    out[order] = (4 * before >= 3 * n.sum()).astype(np.int64) + (20 * before >= 19 * n.sum())
    return out
