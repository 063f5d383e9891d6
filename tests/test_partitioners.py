"""Partitioners: the laws that all keep, each one's own distribution, and refusals with their numbers."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data import IntArray, Partition, Partitioner, hold_out
from fedsim.datasets.dirichlet import Dirichlet, log_dirichlet, mend
from fedsim.datasets.dirichlet_balanced import DirichletBalanced, fill
from fedsim.datasets.iid import IID
from fedsim.datasets.natural import Natural
from fedsim.datasets.pathological import Pathological, deal
from fedsim.datasets.quantity import Quantity
from fedsim.datasets.shards import Shards
from fedsim.errors import ConfigError, DataError

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)
ALPHAS = st.sampled_from([1e-300, 1e-6, 0.01, 0.3, 1.0, 50.0, 1e6, 1e300, math.inf])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def ints(values: Any) -> IntArray:
    array: IntArray = np.asarray(values, dtype=np.int64)
    return array


@st.composite
def labels_and_clients(draw: st.DrawFn, most_classes: int = 6) -> tuple[IntArray, int]:
    labels = draw(st.lists(st.integers(0, most_classes - 1), min_size=1, max_size=150))
    return ints(labels), draw(st.integers(1, len(labels)))


def assert_is_partition_of_all(partition: Partition, num_examples: int, num_clients: int) -> None:
    assert len(partition) == num_clients
    np.testing.assert_array_equal(np.sort(partition.indices), np.arange(num_examples))
    assert partition.sizes().min() >= 1
    for client in range(num_clients):
        assert (np.diff(partition[client]) > 0).all()


# What all keep


@SETTINGS
@given(drawn=labels_and_clients(), alpha=ALPHAS, kind=st.sampled_from(["iid", "dirichlet", "balanced"]))
def test_every_example_belongs_to_exactly_one_client_and_no_client_is_empty(
    drawn: tuple[IntArray, int], alpha: float, kind: str
) -> None:
    labels, k = drawn
    partitioner: Partitioner
    if kind == "iid":
        partitioner = IID(k)
    elif kind == "dirichlet":
        partitioner = Dirichlet(k, alpha)
    else:
        partitioner = DirichletBalanced(k, alpha)
    partition = partitioner(labels, {}, rng())
    assert_is_partition_of_all(partition, len(labels), k)
    if kind != "dirichlet":
        assert np.ptp(partition.sizes()) <= 1


@pytest.mark.parametrize(
    "partitioner",
    [
        IID(7),
        Dirichlet(7, 0.5),
        DirichletBalanced(7, 0.5),
        Pathological(7, 2),
        Shards(7, 3),
        Quantity(7),
        Quantity(7, "powerlaw"),
        Natural(num_clients=7),
    ],
    ids=lambda p: type(p).__name__,
)
def test_the_seed_and_nothing_else_decides(partitioner: Partitioner) -> None:
    labels, keys = rng(1).integers(0, 5, 400), {"user": rng(2).integers(0, 40, 400)}
    before = labels.copy()
    first, again, other = (partitioner(labels, keys, rng(seed)).sha256() for seed in (3, 3, 4))
    assert first == again
    assert first != other
    np.testing.assert_array_equal(labels, before)


def test_a_million_clients_are_two_arrays() -> None:
    partition = IID(1_000_000)(np.zeros(1_500_000, dtype=np.int64), {}, rng())
    assert partition.offsets.shape == (1_000_001,)
    assert partition.indices.shape == (1_500_000,)
    assert (partition.sizes().min(), partition.sizes().max()) == (1, 2)


@pytest.mark.parametrize(
    "make", [lambda k: IID(k), lambda k: Dirichlet(k, 1.0), lambda k: DirichletBalanced(k, 1.0), lambda k: Quantity(k)]
)
def test_more_clients_than_examples_are_refused_with_both_numbers(make: Any) -> None:
    with pytest.raises(DataError, match=r"partition\.num_clients=11 .*only 10"):
        make(11)(np.zeros(10, dtype=np.int64), {}, rng())


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: IID(0), "partition.num_clients"),
        (lambda: IID(2.5), "partition.num_clients"),  # type: ignore[arg-type]
        (lambda: IID(True), "partition.num_clients"),
        (lambda: Dirichlet(3, 0.0), "partition.alpha"),
        (lambda: Dirichlet(3, -1.0), "partition.alpha"),
        (lambda: Dirichlet(3, math.nan), "partition.alpha"),
        (lambda: Dirichlet(3, "a"), "partition.alpha"),  # type: ignore[arg-type]
        (lambda: Dirichlet(3, 1.0, 0), "partition.min_size"),
        (lambda: DirichletBalanced(3, 0), "partition.alpha"),
        (lambda: Pathological(3, 0), "partition.classes_per_client"),
        (lambda: Shards(0), "partition.num_clients"),
        (lambda: Shards(3, 0), "partition.shards_per_client"),
        (lambda: Quantity(0), "partition.num_clients"),
        (lambda: Quantity(3, "log-normal"), "partition.law"),
        (lambda: Quantity(3, sigma=-1.0), "partition.sigma"),
        (lambda: Quantity(3, sigma=math.inf), "partition.sigma"),
        (lambda: Quantity(3, "powerlaw", exponent=math.nan), "partition.exponent"),
        (lambda: Quantity(3, min_size=0), "partition.min_size"),
        (lambda: Natural(3), "partition.key"),  # type: ignore[arg-type]
        (lambda: Natural(num_clients=0), "partition.num_clients"),
        (lambda: Natural(min_size=-1), "partition.min_size"),
    ],
)
def test_impossible_options_are_refused_by_their_config_key(make: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        make()


# Dirichlet


@SETTINGS
@given(drawn=labels_and_clients(), alpha=ALPHAS, spare=st.integers(0, 20))
def test_dirichlet_gives_every_client_min_size(drawn: tuple[IntArray, int], alpha: float, spare: int) -> None:
    labels, k = drawn
    min_size = max(len(labels) // k - spare, 1)
    partition = Dirichlet(k, alpha, min_size)(labels, {}, rng())
    assert_is_partition_of_all(partition, len(labels), k)
    assert partition.sizes().min() >= min_size


@SETTINGS
@given(owners=st.lists(st.integers(0, 7), min_size=8, max_size=120), spare=st.integers(0, 6))
def test_mend_is_the_largest_client_giving_one_at_a_time(owners: list[int], spare: int) -> None:
    k, before = 8, ints(owners)
    min_size = max(len(owners) // k - spare, 1)
    sizes = np.bincount(before, minlength=k)
    while sizes.min() < min_size:
        largest = max(range(k), key=lambda c: (sizes[c], c))
        sizes[largest] -= 1
        sizes[sizes.argmin()] += 1
    after = before.copy()
    mend(after, k, min_size, rng())
    np.testing.assert_array_equal(np.bincount(after, minlength=k), sizes)
    moved = np.maximum(min_size - np.bincount(before, minlength=k), 0).sum()
    assert (after != before).sum() == moved  # and not one more


def test_dirichlet_refuses_more_than_there_is_with_the_numbers() -> None:
    with pytest.raises(DataError, match=r"num_clients=10 .*min_size=6 .*60 training examples.*only 59"):
        Dirichlet(10, 1.0, 6)(np.zeros(59, dtype=np.int64), {}, rng())


@pytest.mark.parametrize("alpha", [1e-300, 1e-6, 0.1, 1e6, 1e300, math.inf])
def test_log_dirichlet_is_finite_and_normalised_for_every_alpha(alpha: float) -> None:
    logs = log_dirichlet(alpha, (50, 20), rng())
    assert np.isfinite(logs).all()
    np.testing.assert_allclose(np.exp(logs).sum(axis=1), 1.0, rtol=1e-12)
    if alpha >= 1e6:
        np.testing.assert_allclose(np.exp(logs), 1 / 20, rtol=0.01)
    if alpha <= 1e-6:
        np.testing.assert_allclose(np.exp(logs).max(axis=1), 1.0, atol=1e-3)


@pytest.mark.parametrize("alpha", [0.05, 0.7, 5.0])
def test_dirichlet_shares_have_the_mean_and_variance_of_their_law(alpha: float) -> None:
    # A share is Beta(alpha, (K - 1) alpha): E p = 1/K, Var p = (K - 1) / (K^2 (alpha K + 1)).
    k, n, runs = 4, 2000, 1500
    labels = np.zeros(n, dtype=np.int64)
    stream = rng(5)
    shares = np.array([Dirichlet(k, alpha)(labels, {}, stream).sizes() for _ in range(runs)])[:, 0] / n
    raw = [math.prod((alpha + i) / (k * alpha + i) for i in range(r)) for r in range(5)]  # E p^r
    variance = (k - 1) / (k**2 * (alpha * k + 1))
    fourth = raw[4] - 4 * raw[3] / k + 6 * raw[2] / k**2 - 3 / k**4
    assert abs(shares.mean() - 1 / k) < 5 * math.sqrt(variance / runs) + 1 / n
    assert abs(shares.var() - variance) < 5 * math.sqrt((fourth - variance**2) / runs) + 4 / n


def test_dirichlet_at_infinity_shares_every_class_equally() -> None:
    labels = np.repeat(np.arange(3), [100, 37, 8])
    partition = Dirichlet(5, math.inf)(labels, {}, rng())
    for c, n in enumerate([100, 37, 8]):
        counts = [(labels[partition[k]] == c).sum() for k in range(5)]
        assert set(counts) <= {n // 5, -(-n // 5)}


def test_dirichlet_near_zero_gives_a_class_to_one_client() -> None:
    labels = np.repeat(np.arange(3), 50)
    partition = Dirichlet(4, 1e-9)(labels, {}, rng())
    # At most 4 - 1 examples were moved to clients that would be empty.
    for c in range(3):
        assert max((labels[partition[k]] == c).sum() for k in range(4)) >= 47


# Balanced Dirichlet


def test_fill_draws_from_the_mixture_restricted_to_what_is_left() -> None:
    # One example of each class: the order is Plackett and Luce's, P(a, b, c) = q_a q_b / (1 - q_a).
    q, runs = np.array([0.5, 0.3, 0.2]), 4000
    stream = rng(6)
    seen = Counter(
        tuple(int(c) for c in fill(np.zeros(3, dtype=np.int64), np.log(q)[None], np.ones(3, dtype=np.int64), stream))
        for _ in range(runs)
    )
    assert sum(seen.values()) == runs
    for a, b, c in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]:
        p = q[a] * q[b] / (1 - q[a])
        assert abs(seen[a, b, c] / runs - p) < 5 * math.sqrt(p * (1 - p) / runs)


@SETTINGS
@given(pools=st.lists(st.integers(1, 40), min_size=1, max_size=6), k=st.integers(1, 5), alpha=ALPHAS)
def test_fill_uses_every_example_of_every_class(pools: list[int], k: int, alpha: float) -> None:
    stream = rng(len(pools))
    places = stream.integers(0, k, sum(pools))
    drawn = fill(places, log_dirichlet(alpha, (k, len(pools)), stream), ints(pools), stream)
    np.testing.assert_array_equal(np.bincount(drawn, minlength=len(pools)), pools)


def test_balanced_dirichlet_follows_each_clients_own_mixture() -> None:
    # While no class runs out, a place is a plain draw. A client's share of a class then has the variance of a
    # Dirichlet-multinomial, which here is nearly the Dirichlet's own: (1/C)(1 - 1/C) / (C alpha + 1). Shares of two
    # clients are all but independent, and rationing pulls them towards the mean, never away.
    k, c, alpha = 400, 5, 0.5
    labels = np.repeat(np.arange(c), 40_000)
    partition = DirichletBalanced(k, alpha)(labels, {}, rng(7))
    shares = np.array([np.bincount(labels[partition[i]], minlength=c) for i in range(k)]) / partition.sizes()[:, None]
    variance = (1 / c) * (1 - 1 / c) / (c * alpha + 1)
    np.testing.assert_allclose(shares.mean(axis=0), 1 / c, rtol=1e-12)  # equal sizes, every example once
    assert 0.8 * variance < shares.var() < 1.1 * variance


# Pathological


@SETTINGS
@given(data=st.data(), classes=st.integers(1, 7))
def test_pathological_gives_exactly_c_classes_in_equal_parts_and_covers_all(data: st.DataObject, classes: int) -> None:
    c = data.draw(st.integers(1, classes))
    k = data.draw(st.integers(-(-classes // c), 20))
    owners = -(-k * c // classes)
    pools = data.draw(st.lists(st.integers(owners, owners + 30), min_size=classes, max_size=classes))
    labels = rng(c).permutation(np.repeat(np.arange(classes) * 3, pools))  # class numbers need not be 0, 1, 2
    partition = Pathological(k, c)(labels, {}, rng(k))
    assert_is_partition_of_all(partition, len(labels), k)
    counts = np.array([np.bincount(labels[partition[i]] // 3, minlength=classes) for i in range(k)])
    assert ((counts > 0).sum(axis=1) == c).all()
    num_owners = (counts > 0).sum(axis=0)
    assert num_owners.min() >= 1
    assert np.ptp(num_owners) <= 1
    for column in counts.T:
        assert np.ptp(column[column > 0]) <= 1


def test_pathological_treats_all_class_pairs_alike() -> None:
    runs, stream = 3000, rng(8)
    seen = Counter(tuple(sorted(int(c) for c in deal(5, 2, 5, stream)[3])) for _ in range(runs))
    for pair in combinations(range(5), 2):  # ten pairs; by symmetry each has probability 1/10
        assert abs(seen[pair] / runs - 0.1) < 5 * math.sqrt(0.09 / runs)


@pytest.mark.parametrize(
    ("k", "c", "pools", "message"),
    [
        (3, 4, [9, 9, 9], r"classes_per_client=4 .*only 3 classes"),
        (2, 1, [9, 9, 9], r"num_clients=2 .*classes_per_client=1 is 2: too few to cover 3 classes"),
        (6, 2, [9, 3, 9], r"class 1 has 3 training examples for 4 clients"),
    ],
)
def test_pathological_refuses_with_the_numbers(k: int, c: int, pools: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Pathological(k, c)(np.repeat(np.arange(len(pools)), pools), {}, rng())


# Shards


@SETTINGS
@given(drawn=labels_and_clients(), data=st.data())
def test_shards_are_equal_runs_of_the_sorted_examples(drawn: tuple[IntArray, int], data: st.DataObject) -> None:
    labels, k = drawn
    n, s = len(labels), data.draw(st.integers(1, len(labels) // k))
    partition = Shards(k, s)(labels, {}, rng(s))
    assert_is_partition_of_all(partition, n, k)
    small = n // (k * s)
    assert s * small <= partition.sizes().min()
    assert partition.sizes().max() <= s * -(-n // (k * s))
    # A class may be whole in one client's hands, but has owners enough for its examples, and not more than its shards.
    for c in np.unique(labels):
        owners = sum((labels[partition[i]] == c).any() for i in range(k))
        pool = (labels == c).sum()
        assert owners <= pool // small + 2
        assert owners * s * -(-n // (k * s)) >= pool
    if np.unique(labels, return_counts=True)[1].min() >= -(-n // (k * s)):
        assert max(len(np.unique(labels[partition[i]])) for i in range(k)) <= 2 * s


def test_shards_are_those_of_the_paper() -> None:
    # 60,000 examples of ten equal classes, 100 clients: 200 shards of 300, each of one class.
    labels = rng(1).permutation(np.repeat(np.arange(10), 6000))
    partition = Shards(100, 2)(labels, {}, rng())
    counts = np.array([np.bincount(labels[partition[i]], minlength=10) for i in range(100)])
    assert set(counts.ravel()) <= {0, 300, 600}
    assert (partition.sizes() == 600).all()


def test_shards_are_dealt_at_random() -> None:
    # 4 shards of each of 3 classes, two per client: both are of one class with probability 3/11, whoever it is;
    # and an example goes to any client with probability 1/6.
    labels, runs, stream = np.repeat(np.arange(3), 8), 3000, rng(10)
    pure, mine = np.zeros(6), np.zeros(6)
    for _ in range(runs):
        partition = Shards(6, 2)(labels, {}, stream)
        for i in range(6):
            pure[i] += len(np.unique(labels[partition[i]])) == 1
            mine[i] += 5 in partition[i]
    for p, seen in ((3 / 11, pure), (1 / 6, mine)):
        assert (np.abs(seen / runs - p) < 5 * math.sqrt(p * (1 - p) / runs)).all()


def test_shards_mix_the_examples_of_a_class() -> None:
    # Two of one class fall into one shard of 3 with probability 2/8, wherever they stand in the file.
    runs, stream = 3000, rng(11)
    together = sum(
        any({0, 1} <= set(partition[i].tolist()) for i in range(3))
        for partition in (Shards(3, 1)(np.zeros(9, dtype=np.int64), {}, stream) for _ in range(runs))
    )
    assert abs(together / runs - 1 / 4) < 5 * math.sqrt(3 / 16 / runs)


def test_shards_refuse_more_than_there_are_examples() -> None:
    with pytest.raises(DataError, match=r"num_clients=4 times partition\.shards_per_client=3 is 12 shards.*only 11"):
        Shards(4, 3)(np.zeros(11, dtype=np.int64), {}, rng())


# Quantity


@SETTINGS
@given(
    drawn=labels_and_clients(),
    law=st.sampled_from(["lognormal", "powerlaw"]),
    spread=st.sampled_from([None, 0.0, 0.3, 1.0, 3.0, 50.0, 999_999.0]),
    spare=st.integers(0, 20),
)
def test_quantity_gives_min_size_and_the_laws_share_of_the_rest(
    drawn: tuple[IntArray, int], law: str, spread: float | None, spare: int
) -> None:
    labels, k = drawn
    n, min_size = len(labels), max(len(labels) // k - spare, 1)
    partitioner = Quantity(k, law, **{"sigma" if law == "lognormal" else "exponent": spread}, min_size=min_size)
    partition = partitioner(labels, {}, rng(k))
    assert_is_partition_of_all(partition, n, k)
    shares = partitioner.shares(rng(k))  # the first thing drawn
    assert abs(shares.sum() - 1) < 1e-12
    assert (np.abs(partition.sizes() - (min_size + shares * (n - k * min_size))) < 1 + 1e-9).all()
    assert partition.sizes().min() >= min_size
    if spread == 0:
        assert np.ptp(partition.sizes()) <= 1


def test_quantity_rounds_without_a_bias() -> None:
    # Zipf's shares of 3 ranks are 6/11, 3/11, 2/11; 7 examples, one set aside for each client.
    runs, stream = 4000, rng(12)
    partitioner = Quantity(3, "powerlaw", exponent=1.0)
    sizes = np.array([partitioner(np.zeros(7, dtype=np.int64), {}, stream).sizes() for _ in range(runs)])
    exact = 1 + 4 * np.array([6, 3, 2]) / 11
    # A client's rank is uniform: its mean size is the mean over ranks. Sorted sizes mix ranks where they round alike,
    # so ranks are told apart by the variance: between ranks, and within one that of a Bernoulli variable f (1 - f).
    part = exact % 1
    variance = exact.var() + (part * (1 - part)).mean()
    assert (np.abs(sizes.mean(axis=0) - 7 / 3) < 5 * math.sqrt(variance / runs)).all()
    deviations = (sizes - 7 / 3) ** 2
    assert abs(deviations.mean() - variance) < 5 * deviations.std() / math.sqrt(runs)


def test_log_normal_shares_have_the_moments_of_their_law() -> None:
    # With K large, K p_k = exp(sigma z_k - sigma^2 / 2) nearly: ln p has deviation sigma, (K p)^2 mean e^(sigma^2).
    k, sigma = 200_000, 0.8
    shares = Quantity(k, sigma=sigma).shares(rng(13))
    assert abs(np.log(shares).std() / sigma - 1) < 5 / math.sqrt(2 * k)
    second = (k * shares) ** 2
    assert abs(second.mean() - math.exp(sigma**2)) < 5 * second.std() / math.sqrt(k)
    assert abs(np.log(k * shares).mean() + sigma**2 / 2) < 5 * math.sqrt((sigma**2 + math.expm1(sigma**2)) / k)


def test_power_law_shares_are_zipfs_and_belong_to_anyone() -> None:
    k, runs, stream = 5, 3000, rng(14)
    partitioner = Quantity(k, "powerlaw", exponent=1.5)
    expected = np.arange(1, k + 1) ** -1.5
    first = np.zeros(k)
    for _ in range(runs):
        shares = partitioner.shares(stream)
        np.testing.assert_allclose(np.sort(shares)[::-1], expected / expected.sum(), rtol=1e-12)
        first[shares.argmax()] += 1
    assert (np.abs(first / runs - 1 / k) < 5 * math.sqrt((1 / k) * (1 - 1 / k) / runs)).all()


def test_quantity_leaves_classes_as_they_are() -> None:
    # A client of n examples has n/2 of one class of two, hypergeometric: variance n/4 (N - n)/(N - 1).
    labels = np.repeat(np.arange(2), 20_000)
    partition = Quantity(50, sigma=1.0)(labels, {}, rng(15))
    for i, n in enumerate(partition.sizes()):
        assert abs(labels[partition[i]].sum() - n / 2) <= 5 * math.sqrt(n / 4 * (40_000 - n) / 39_999)


def test_quantity_refuses_what_has_no_effect_or_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"partition\.exponent=2\.0 has no effect with partition\.law=lognormal"):
        Quantity(3, exponent=2.0)
    with pytest.raises(ConfigError, match=r"partition\.sigma=1\.0 has no effect .*set partition\.law=lognormal"):
        Quantity(3, "powerlaw", sigma=1.0)
    with pytest.raises(DataError, match=r"num_clients=10 .*min_size=6 .*60 training examples.*only 59"):
        Quantity(10, min_size=6)(np.zeros(59, dtype=np.int64), {}, rng())


# Natural


def test_natural_makes_one_client_per_value_in_order() -> None:
    users = ints([7, 3, 7, 9, 3, 7])
    partition = Natural()(np.zeros(6, dtype=np.int64), {"user": users}, rng())
    assert [partition[k].tolist() for k in range(3)] == [[1, 4], [0, 2, 5], [3]]


@SETTINGS
@given(users=st.lists(st.integers(-3, 8), min_size=1, max_size=100), data=st.data())
def test_natural_samples_whole_values_that_are_large_enough(users: list[int], data: st.DataObject) -> None:
    sizes = Counter(users)
    min_size = data.draw(st.integers(1, max(sizes.values())))
    large = [u for u, n in sizes.items() if n >= min_size]
    k = data.draw(st.integers(1, len(large)))
    partition = Natural("user", k, min_size)(np.zeros(len(users), dtype=np.int64), {"user": ints(users)}, rng())
    owned = [{users[row] for row in partition[i]} for i in range(k)]
    assert all(len(values) == 1 for values in owned)
    chosen = [values.pop() for values in owned]
    assert chosen == sorted(set(chosen))
    assert partition.sizes().tolist() == [sizes[u] for u in chosen]
    assert partition.sizes().min() >= min_size


@pytest.mark.parametrize(
    ("partitioner", "keys", "message"),
    [
        (Natural(), {}, "has none"),
        (Natural(), {"user": [1], "place": [1]}, "several keys: user, place"),
        (Natural("usr"), {"user": [1], "place": [1]}, r"'usr' .*did you mean 'user'.*it has: user, place"),
        (Natural(num_clients=3), {"user": [1, 2]}, "needs 3 values of 'user' .*only 2 of 2"),
        (Natural(min_size=2), {"user": [1, 2]}, "at least 2 .*only 0 of 2"),
    ],
)
def test_natural_refuses_and_says_what_the_data_have(partitioner: Natural, keys: Any, message: str) -> None:
    keys = {k: ints(v) for k, v in keys.items()}
    with pytest.raises(DataError, match=message):
        partitioner(np.zeros(2, dtype=np.int64), keys, rng())


# Held-out examples


@SETTINGS
@given(drawn=labels_and_clients(), fraction=st.floats(0, 0.999), seed=st.integers(0, 5))
def test_hold_out_divides_every_clients_examples(drawn: tuple[IntArray, int], fraction: float, seed: int) -> None:
    labels, k = drawn
    whole = Dirichlet(k, 0.3)(labels, {}, rng(seed))
    train, held = hold_out(whole, fraction, rng(seed))
    assert len(train) == len(held) == k
    for client in range(k):
        n = len(whole[client])
        assert len(held[client]) == min(round(fraction * n), n - 1)
        both = np.concatenate([train[client], held[client]])
        np.testing.assert_array_equal(np.sort(both), whole[client])
        assert (np.diff(train[client]) > 0).all()
        assert (np.diff(held[client]) > 0).all()


def test_hold_out_chooses_every_example_equally_often() -> None:
    whole, stream, runs = Partition(ints([0, 10, 14]), np.arange(14)), rng(9), 2000
    times = np.zeros(14)
    for _ in range(runs):
        times[hold_out(whole, 0.5, stream)[1].indices] += 1
    assert (np.abs(times / runs - 0.5) < 5 * math.sqrt(0.25 / runs)).all()


@pytest.mark.parametrize("fraction", [-0.1, 1.0, math.nan])
def test_hold_out_refuses_a_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(DataError, match=r"partition\.holdout"):
        hold_out(Partition(ints([0, 2]), np.arange(2)), fraction, rng())
