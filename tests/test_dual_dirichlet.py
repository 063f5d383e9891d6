"""`dual_dirichlet`: both laws, how they meet, whole numbers of examples, and refusals with their numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data import IntArray, Partition
from fedsim.datasets import dual_dirichlet
from fedsim.datasets.dual_dirichlet import DualDirichlet, log_dirichlet_around, whole_parts
from fedsim.errors import ConfigError, DataError
from tests.cli import Fedsim

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)
ALPHAS = st.sampled_from([1e-300, 1e-6, 0.01, 0.5, 10.0, 1e6, 1e300, math.inf])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def class_table(partition: Partition, labels: IntArray, classes: int) -> np.ndarray[Any, Any]:
    return np.array([np.bincount(labels[partition[k]], minlength=classes) for k in range(len(partition))])


# The laws


@pytest.mark.parametrize("alpha", [0.05, 0.5, 8.0, None])
def test_client_sizes_have_the_mean_and_variance_of_their_law(alpha: float | None) -> None:
    # With one class a client's share of it is its size, q_k ~ Beta(a/K, a - a/K): mean 1/K, variance
    # (1/K)(1 - 1/K) / (a + 1); null is a = K.
    k, runs, stream = 4, 4000, rng(1)
    partitioner = DualDirichlet(k, alpha)
    shares = np.array([partitioner.shares(np.ones(1), stream)[:, 0] for _ in range(runs)])
    variance = (1 / k) * (1 - 1 / k) / ((k if alpha is None else alpha) + 1)
    np.testing.assert_allclose(shares.sum(axis=1), 1.0, rtol=1e-12)
    for share in shares.T:
        assert abs(share.mean() - 1 / k) < 5 * math.sqrt(variance / runs)
        squares = (share - 1 / k) ** 2
        assert abs(squares.mean() - variance) < 5 * squares.std() / math.sqrt(runs)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 30.0])
def test_class_mixtures_have_the_mean_and_variance_of_their_law(alpha: float) -> None:
    # r_c ~ Beta(a p_c, a (1 - p_c)): mean p_c, variance p_c (1 - p_c) / (a + 1), covariance -p_b p_c / (a + 1).
    p, runs = np.array([0.6, 0.3, 0.1]), 20_000
    r = np.exp(log_dirichlet_around(alpha, p, runs, rng(2)))
    np.testing.assert_allclose(r.sum(axis=1), 1.0, rtol=1e-12)
    expected = (np.diag(p) - np.outer(p, p)) / (alpha + 1)
    for b in range(3):
        assert abs(r[:, b].mean() - p[b]) < 5 * math.sqrt(expected[b, b] / runs)
        for c in range(3):
            products = (r[:, b] - p[b]) * (r[:, c] - p[c])
            assert abs(products.mean() - expected[b, c]) < 5 * products.std() / math.sqrt(runs)


def test_near_zero_a_mixture_is_one_class_drawn_from_the_prior() -> None:
    p, runs = np.array([0.6, 0.3, 0.1]), 5000
    for alpha in (1e-9, 1e-300):
        r = np.exp(log_dirichlet_around(alpha, p, runs, rng(3)))
        assert (r.max(axis=1) > 1 - 1e-9).all()
        seen = np.bincount(r.argmax(axis=1), minlength=3) / runs
        assert (np.abs(seen - p) < 5 * np.sqrt(p * (1 - p) / runs)).all()


@pytest.mark.parametrize("alpha", [1e-300, 1e-6, 0.5, 1e6, 1e300, math.inf])
def test_mixtures_are_finite_and_add_up_for_every_concentration(alpha: float) -> None:
    p = rng(4).dirichlet(np.ones(7))
    logs = log_dirichlet_around(alpha, p, 50, rng(5))
    assert np.isfinite(logs).all()
    np.testing.assert_allclose(np.exp(logs).sum(axis=1), 1.0, rtol=1e-12)
    if alpha >= 1e300:
        np.testing.assert_allclose(np.exp(logs), np.tile(p, (50, 1)), rtol=1e-9)


# How they meet


def test_a_share_is_size_times_mixture_over_the_sum_of_all_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    q, r = np.array([5, 3, 2]), np.array([[7, 3], [1, 9], [4, 6]])  # in tenths
    asked = []

    def fixed(total: float, mean: Any, rows: int, rng: np.random.Generator) -> Any:
        asked.append((total, mean.tolist(), rows))
        return np.log((q[None] if rows == 1 else r) / 10)

    monkeypatch.setattr(dual_dirichlet, "log_dirichlet_around", fixed)
    labels = rng(6).permutation(np.repeat([2, 5], [9000, 1000]))
    partition = DualDirichlet(3, 7.0, 0.25)(labels, {}, rng(7))
    # Sizes around equal ones, mixtures around the frequencies of the data.
    assert asked == [(7.0, pytest.approx([1 / 3] * 3), 1), (0.25, [0.9, 0.1], 3)]
    counts = np.zeros((3, 2), dtype=int)
    for c, n in enumerate([9000, 1000]):
        wanted = [q[i] * r[i, c] for i in range(3)]
        counts[:2, c] = [n * w // sum(wanted) for w in wanted[:2]]
        counts[2, c] = n - counts[:2, c].sum()
    np.testing.assert_array_equal(class_table(partition, (labels == 5).astype(np.int64), 2), counts)


def test_sizes_are_drawn_around_as_many_as_there_are_clients_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    totals = []

    def law(total: float, mean: Any, rows: int, rng: np.random.Generator) -> Any:
        totals.append(total)
        return log_dirichlet_around(total, mean, rows, rng)

    monkeypatch.setattr(dual_dirichlet, "log_dirichlet_around", law)
    DualDirichlet(13)(np.zeros(40, dtype=np.int64), {}, rng())
    assert totals == [13, 0.5]


def test_with_classes_at_infinity_every_client_has_the_mixture_of_the_data() -> None:
    pools = [20_000, 5000, 1000]
    labels = np.repeat(np.arange(3), pools)
    table = class_table(DualDirichlet(5, 5.0, math.inf)(labels, {}, rng(8)), labels, 3)
    # A client's shares of all classes are one number q_k, up to one example of each class; the last up to K - 1.
    q = table[:-1] / pools
    assert (np.ptp(q, axis=1) <= 1 / 1000).all()
    assert np.ptp(q[:, 0]) > 0.05  # sizes do differ
    assert abs(table[-1, 0] / 20_000 - table[-1, 2] / 1000) <= 4 / 1000


def test_with_classes_near_zero_a_client_has_one_class() -> None:
    # Equal sizes: the clients that want a class have equal parts of it. The last also has what is left over.
    pools, k = [6000, 3000, 3000], 24
    labels = np.repeat(np.arange(3), pools)
    table = class_table(DualDirichlet(k, math.inf, 1e-9)(labels, {}, rng(9)), labels, 3)
    assert ((table[:-1] > 0).sum(axis=1) == 1).all()
    for c, n in enumerate(pools):
        parts = table[:-1, c][table[:-1, c] > 0]
        last = table[-1, c] > k  # whether the last client wants this class, too
        assert set(parts.tolist()) == {n // (len(parts) + last)}


def test_a_class_that_nobody_wants_still_goes_to_someone() -> None:
    # One client of mixture near (1, 0, 0) and another like it: classes 1 and 2 are still given out whole.
    for seed in range(20):
        shares = DualDirichlet(2, math.inf, 1e-9).shares(np.array([0.998, 0.001, 0.001]), rng(seed))
        assert np.isfinite(shares).all()
        np.testing.assert_allclose(shares.sum(axis=0), 1.0, rtol=1e-12)


# Whole numbers of examples


@SETTINGS
@given(
    parts=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    pools=st.lists(st.integers(0, 500), min_size=1, max_size=4),
)
def test_counts_are_integer_parts_and_the_rest_is_the_last_clients(parts: list[int], pools: list[int]) -> None:
    total = sum(parts)
    shares = np.tile(np.array(parts)[:, None] / total, (1, len(pools)))
    counts = whole_parts(shares, np.array(pools))
    for c, n in enumerate(pools):
        exact = [part * n // total for part in parts]  # in whole numbers: no rounding
        assert counts[:-1, c].tolist() == exact[:-1]
        assert counts[-1, c] == n - sum(exact[:-1])


@SETTINGS
@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=150),
    alpha_size=ALPHAS,
    alpha_class=ALPHAS,
    data=st.data(),
)
def test_every_example_has_one_owner_and_every_client_min_size(
    labels: list[int], alpha_size: float, alpha_class: float, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(labels)))
    min_size = data.draw(st.integers(1, len(labels) // k))
    partition = DualDirichlet(k, alpha_size, alpha_class, min_size)(np.array(labels), {}, rng(k))
    assert len(partition) == k
    np.testing.assert_array_equal(np.sort(partition.indices), np.arange(len(labels)))
    assert partition.sizes().min() >= min_size


def test_no_more_is_moved_than_empty_clients_need(monkeypatch: pytest.MonkeyPatch) -> None:
    # Shares 0, 3/5, 2/5 of both classes; ten examples each: 0, 12 and 8. The first gets 3, all from the largest.
    shares = np.array([[0.0, 0.0], [0.6, 0.6], [0.4, 0.4]])
    monkeypatch.setattr(DualDirichlet, "shares", lambda *_: shares)
    labels = np.repeat(np.arange(2), 10)
    assert DualDirichlet(3, min_size=3)(labels, {}, rng()).sizes().tolist() == [3, 9, 8]


def test_examples_of_a_class_are_dealt_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    # Four examples, two clients of two: any two of them are together with probability 1/3.
    monkeypatch.setattr(DualDirichlet, "shares", lambda *_: np.full((2, 1), 0.5))
    runs, stream = 3000, rng(10)
    together = np.zeros((4, 4))
    for _ in range(runs):
        partition = DualDirichlet(2)(np.zeros(4, dtype=np.int64), {}, stream)
        for k in range(2):
            together[np.ix_(partition[k], partition[k])] += 1
    for i in range(4):
        for j in range(i):
            assert abs(together[i, j] / runs - 1 / 3) < 5 * math.sqrt(2 / 9 / runs)


def test_the_seed_and_nothing_else_decides() -> None:
    labels = rng(1).integers(0, 5, 400)
    before = labels.copy()
    first, again, other = (DualDirichlet(7)(labels, {}, rng(seed)).sha256() for seed in (3, 3, 4))
    assert first == again != other
    np.testing.assert_array_equal(labels, before)


# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DualDirichlet(0), r"partition\.num_clients must be a whole number of at least 1"),
        (lambda: DualDirichlet(3, 0.0), r"partition\.alpha_size must be a number in \(0, inf\] .*or null\), got 0\.0"),
        (lambda: DualDirichlet(3, "a"), r"partition\.alpha_size must be .*got 'a'"),  # type: ignore[arg-type]
        (lambda: DualDirichlet(3, 1.0, -1.0), r"partition\.alpha_class must be .*got -1\.0"),
        (lambda: DualDirichlet(3, 1.0, math.nan), r"partition\.alpha_class must be .*got nan"),
        (lambda: DualDirichlet(3, min_size=0), r"partition\.min_size must be a whole number of at least 1"),
    ],
)
def test_impossible_options_are_refused_by_their_config_key(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_more_than_there_is_is_refused_with_the_numbers() -> None:
    with pytest.raises(DataError, match=r"num_clients=10 .*min_size=6 .*60 training examples.*only 59"):
        DualDirichlet(10, min_size=6)(np.zeros(59, dtype=np.int64), {}, rng())


def test_the_command_draws_it_and_says_in_one_line_what_does_not_fit(fedsim: Fedsim) -> None:
    assert fedsim("partition", "partition=dual_dirichlet", "partition.num_clients=10").status == 0
    assert "partition.alpha_class" in fedsim("partition", "partition=dual_dirichlet", "partition.alpha_class=0").line
