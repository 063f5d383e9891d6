"""`class_partition`: the numbers of classes, which classes, how a class is cut, and refusals with their numbers."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data import IntArray, Partition
from fedsim.datasets import class_partition
from fedsim.datasets.class_partition import ClassPartition, draw
from fedsim.errors import ConfigError, DataError
from tests.cli import Fedsim

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def class_table(partition: Partition, labels: IntArray, classes: int) -> np.ndarray[Any, Any]:
    return np.array([np.bincount(labels[partition[k]], minlength=classes) for k in range(len(partition))])


class Lengths(np.random.Generator):
    """A generator whose normal variables are given."""

    def __init__(self, lengths: list[float]) -> None:
        super().__init__(np.random.PCG64(0))
        self.lengths = lengths

    def normal(self, *args: Any, **kwargs: Any) -> Any:
        return np.array(self.lengths)


# Numbers of classes


def test_numbers_of_classes_are_those_of_the_official_code() -> None:
    found = [ClassPartition(k).limits(10) for k in (1, 2, 3, 4, 5, 6, 7, 8, 9, 20, 1000)]
    assert found == [(10, 10), (7, 8), (6, 8), (5, 7), (5, 6), (4, 6), (4, 5), (3, 5), (3, 5), (3, 5), (3, 5)]


@pytest.mark.parametrize(
    ("k", "classes", "expected"),
    [
        (1, 7, (7, 7)),
        (2, 100, (70, 80)),
        (7, 100, (40, 50)),
        (50, 62, (19, 31)),  # 18.6 and 31
        (8, 5, (2, 3)),  # 1.5 and 2.5: halves are rounded up
        (4, 3, (2, 2)),  # 1.5 and 2.1
        (20, 2, (1, 1)),  # 0.6 and 1
        (20, 1, (1, 1)),  # 0.3 and 0.5
    ],
)
def test_of_more_or_fewer_classes_they_are_the_same_shares(k: int, classes: int, expected: tuple[int, int]) -> None:
    assert ClassPartition(k).limits(classes) == expected


@pytest.mark.parametrize("k", [*range(1, 12), 40])
@pytest.mark.parametrize("classes", [1, 2, 3, 7, 10, 13, 100])
def test_the_shares_fit_any_number_of_classes_and_can_cover_it(k: int, classes: int) -> None:
    low, high = ClassPartition(k).limits(classes)
    assert 1 <= low <= high <= classes
    assert k * high >= classes


def test_what_is_given_comes_before_the_table() -> None:
    assert ClassPartition(20, 2, 3).limits(10) == (2, 3)
    assert ClassPartition(20, min_classes=4).limits(10) == (4, 5)
    assert ClassPartition(20, max_classes=9).limits(10) == (3, 9)


# Which classes


def test_classes_follow_the_law_of_a_draw_given_that_all_are_covered() -> None:
    # Two clients, three classes, one or two each: P of a pair of sets by enumeration, then conditioned on coverage.
    sets = [s for size in (1, 2) for s in combinations(range(3), size)]
    chance = {s: Fraction(1, 2 * math.comb(3, len(s))) for s in sets}
    law = {(a, b): chance[a] * chance[b] for a, b in product(sets, sets) if {*a, *b} == {0, 1, 2}}
    total, runs, stream = sum(law.values()), 8000, rng(1)
    seen = Counter(tuple(tuple(np.flatnonzero(row).tolist()) for row in draw(2, 1, 2, 3, stream)) for _ in range(runs))
    assert set(seen) <= set(law)
    for pair, weight in law.items():
        p = float(weight / total)
        assert abs(seen[pair] / runs - p) < 5 * math.sqrt(p * (1 - p) / runs)


@SETTINGS
@given(k=st.integers(1, 12), classes=st.integers(1, 12), data=st.data())
def test_every_example_has_one_owner_and_every_client_as_many_classes_as_it_may(
    k: int, classes: int, data: st.DataObject
) -> None:
    options = {}
    if data.draw(st.booleans()):
        high = data.draw(st.integers(min(-(-classes // k) + 2, classes), classes))
        options = {"min_classes": data.draw(st.integers(min(3, high), high)), "max_classes": high}
    pools = data.draw(st.lists(st.integers(k, k + 40), min_size=classes, max_size=classes))
    labels = rng(k).permutation(np.repeat(np.arange(classes) * 3, pools))  # class numbers need not be 0, 1, 2
    partitioner = ClassPartition(k, **options)
    partition = partitioner(labels, {}, rng(classes))
    assert len(partition) == k
    np.testing.assert_array_equal(np.sort(partition.indices), np.arange(len(labels)))
    table = class_table(partition, labels // 3, classes)
    low, high = partitioner.limits(classes)
    owned = (table > 0).sum(axis=1)
    assert low <= owned.min() <= owned.max() <= high
    np.testing.assert_array_equal(table.sum(axis=0), pools)


def test_one_client_has_everything() -> None:
    assert ClassPartition(1)(rng().integers(0, 10, 50), {}, rng(1)).sizes().tolist() == [50]


def test_numbers_of_classes_are_uniform_between_the_limits() -> None:
    # 200 clients cover ten classes at any draw, so that nothing is drawn again.
    labels, k, runs = np.repeat(np.arange(10), 300), 200, 30
    owned = np.concatenate(
        [(class_table(ClassPartition(k)(labels, {}, rng(s)), labels, 10) > 0).sum(axis=1) for s in range(runs)]
    )
    for number in (3, 4, 5):
        assert abs((owned == number).mean() - 1 / 3) < 5 * math.sqrt(2 / 9 / (k * runs))


# How a class is cut


def test_a_class_is_cut_in_proportion_to_the_sizes_of_normal_numbers() -> None:
    labels = np.zeros(400, dtype=np.int64)
    partition = ClassPartition(3, 1, 1)(labels, {}, Lengths([-10.0, 10.0, 20.0]))
    assert partition.sizes().tolist() == [100, 100, 200]


def test_parts_have_the_mean_and_variance_of_their_law() -> None:
    # Two owners: a share is A / (A + B) with independent A, B ~ |N(10, 3^2)|. Its variance by quadrature.
    grid = np.linspace(-14, 34, 1601)
    weight = np.exp(-(((grid - 10) / 3) ** 2) / 2)
    weight /= weight.sum()
    a = np.abs(grid)
    square = (a[:, None] / (a[:, None] + a) - 0.5) ** 2
    variance = float(weight @ square @ weight)
    n, runs, stream = 5000, 1500, rng(2)
    labels = np.zeros(n, dtype=np.int64)
    shares = np.array([ClassPartition(2, 1, 1)(labels, {}, stream).sizes()[0] for _ in range(runs)]) / n
    assert abs(shares.mean() - 0.5) < 5 * math.sqrt(variance / runs)
    deviations = (shares - 0.5) ** 2
    assert abs(deviations.mean() - variance) < 5 * deviations.std() / math.sqrt(runs)


def test_parts_are_rounded_without_a_bias() -> None:
    # Three equal lengths and 10 examples: 3 or 4 each, every owner 10/3 on average.
    labels, runs = np.zeros(10, dtype=np.int64), 3000
    stream = Lengths([1.0, 1.0, 1.0])
    sizes = np.array([ClassPartition(3, 1, 1)(labels, {}, stream).sizes() for _ in range(runs)])
    assert set(sizes.ravel().tolist()) == {3, 4}
    assert (np.abs(sizes.mean(axis=0) - 10 / 3) < 5 * math.sqrt(2 / 9 / runs)).all()


def test_an_owner_whose_part_would_be_nothing_gets_one_example_of_the_largest() -> None:
    partition = ClassPartition(3, 1, 1)(np.zeros(8, dtype=np.int64), {}, Lengths([1e-9, 1.0, 3.0]))
    assert partition.sizes().tolist() == [1, 2, 5]


def test_examples_of_a_class_are_dealt_at_random() -> None:
    # Four examples, two owners of two: any two of them are together with probability 1/3.
    runs, stream = 3000, Lengths([1.0, 1.0])
    together = np.zeros((4, 4))
    for _ in range(runs):
        partition = ClassPartition(2, 1, 1)(np.zeros(4, dtype=np.int64), {}, stream)
        for k in range(2):
            together[np.ix_(partition[k], partition[k])] += 1
    for i, j in combinations(range(4), 2):
        assert abs(together[i, j] / runs - 1 / 3) < 5 * math.sqrt(2 / 9 / runs)


def test_the_seed_and_nothing_else_decides() -> None:
    labels = rng(1).integers(0, 5, 400)
    before = labels.copy()
    first, again, other = (ClassPartition(7)(labels, {}, rng(seed)).sha256() for seed in (3, 3, 4))
    assert first == again != other
    np.testing.assert_array_equal(labels, before)


# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassPartition(0), r"partition\.num_clients must be a whole number of at least 1"),
        (lambda: ClassPartition(3, 0), r"partition\.min_classes must be a whole number of at least 1 .*got 0"),
        (lambda: ClassPartition(3, 2, 2.5), r"partition\.max_classes must be .*, or null\), got 2\.5"),  # type: ignore[arg-type]
        (lambda: ClassPartition(3, 4, 3), r"min_classes=4 must be at most partition\.max_classes=3; lower the one"),
    ],
)
def test_impossible_options_are_refused_by_their_config_key(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("partitioner", "pools", "message"),
    [
        (ClassPartition(9, 1, 4), [9] * 3, r"partition\.max_classes=4 .*only 3 classes; lower it"),
        (ClassPartition(9, 4), [9] * 3, r"partition\.min_classes=4 .*only 3 classes; lower it"),
        (
            ClassPartition(9, 6),
            [9] * 10,
            r"min_classes=6 makes 6 to 5 .* partition\.max_classes=null is 5 here",
        ),
        (ClassPartition(9, None, 2), [9] * 10, r"max_classes=2 makes 3 to 2 .* partition\.min_classes=null is 3 here"),
        (
            ClassPartition(3, 1, 2),
            [9] * 7,
            r"num_clients=3 times at most 2 .* is 6: too few to cover 7 classes",
        ),
        (
            ClassPartition(6, 2, 2),
            [9, 5],
            r"class 1 has 5 .* for 6 clients .*num_clients=6, 2 to 2 class",
        ),
    ],
)
def test_what_the_data_do_not_give_is_refused_with_the_numbers(
    partitioner: ClassPartition, pools: list[int], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        partitioner(np.repeat(np.arange(len(pools)), pools), {}, rng())


def test_a_search_that_has_no_hope_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    # 20 clients of one class each cover 20 classes with probability 20! / 20^20 = 2e-8.
    monkeypatch.setattr(class_partition, "MOST_NUMBERS", 12_000)
    with pytest.raises(
        DataError, match=r"^30 draws of 1 to 1 of 20 classes for each of 20 .*raise partition\.max_classes"
    ):
        ClassPartition(20, 1, 1)(np.repeat(np.arange(20), 5), {}, rng())


def test_a_draw_that_covers_once_in_thousands_is_found() -> None:
    # 10! / 10^10 = 1/2756; all of 200,000 draws miss with probability e^-72.
    assert draw(10, 1, 1, 10, rng(3)).sum(axis=0).tolist() == [1] * 10


def test_the_command_draws_it_and_says_in_one_line_what_does_not_fit(fedsim: Fedsim) -> None:
    done = fedsim("partition", "partition=class_partition", "partition.num_clients=10")
    assert done.status == 0
    assert "classes per client           3 to 5 of 10" in done.out
    assert "have only 10 classes" in fedsim("partition", "partition=class_partition", "partition.max_classes=11").line
