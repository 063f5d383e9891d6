"""`dirichlet_refill`: equal sizes, exact mixtures, whole passes over a class; and what repeats mean elsewhere."""

from __future__ import annotations

import csv
import math
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import random
from fedsim.compose import compose
from fedsim.config import options
from fedsim.data import IntArray, Partition, Partitioner, hold_out
from fedsim.datasets import dirichlet_refill
from fedsim.datasets.dirichlet_refill import DirichletRefill, draw, hand_out
from fedsim.errors import ConfigError, DataError
from fedsim.experiment import build
from fedsim.report.partition import statistics
from tests.cli import Fedsim, only_run

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)
ALPHAS = st.sampled_from([1e-300, 1e-6, 0.1, 0.6, 1.0, 1e6, math.inf])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def ints(values: Any) -> IntArray:
    array: IntArray = np.asarray(values, dtype=np.int64)
    return array


def class_table(partition: Partition, labels: IntArray, num_classes: int) -> np.ndarray[Any, Any]:
    return np.array([np.bincount(labels[partition[k]], minlength=num_classes) for k in range(len(partition))])


# The rule


@SETTINGS
@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=150).map(ints), alpha=ALPHAS, data=st.data())
def test_sizes_are_equal_and_a_class_is_used_in_whole_passes(labels: IntArray, alpha: float, data: Any) -> None:
    k = data.draw(st.integers(1, len(labels)))
    partition = DirichletRefill(k, alpha)(labels, {}, rng(k))
    assert partition.sizes().tolist() == [len(labels) // k] * k
    assert all((np.diff(partition[client]) >= 0).all() for client in range(k))
    times = np.bincount(partition.indices, minlength=len(labels))
    assert len(times) == len(labels)  # no row beyond the last
    for c in np.unique(labels):
        assert np.ptp(times[labels == c]) <= 1


@SETTINGS
@given(pools=st.lists(st.integers(1, 9), min_size=1, max_size=5), places=st.integers(1, 60), seed=st.integers(0, 9))
def test_a_pass_over_a_class_is_the_same_every_time(pools: list[int], places: int, seed: int) -> None:
    codes = rng(seed).permutation(np.repeat(np.arange(len(pools)), pools))
    drawn = ints(rng(seed + 1).integers(0, len(pools), places))
    rows = hand_out(drawn, codes, rng(seed))
    np.testing.assert_array_equal(codes[rows], drawn)  # an example of the class that was drawn
    for c, n in enumerate(pools):
        served = rows[drawn == c].tolist()
        assert len(set(served[:n])) == min(n, len(served))
        assert served[n:] == served[: max(len(served) - n, 0)]


def test_examples_of_a_class_are_handed_out_in_random_order() -> None:
    # The first of 4 examples, and the pair of the first two of 4: all equally likely.
    runs, stream = 4000, rng(3)
    first = np.zeros((4, 4))
    for _ in range(runs):
        rows = hand_out(np.zeros(2, dtype=np.int64), np.zeros(4, dtype=np.int64), stream)
        first[rows[0], rows[1]] += 1
    p = (np.ones((4, 4)) - np.eye(4)) / 12
    assert (np.abs(first / runs - p) <= 5 * np.sqrt(p * (1 - p) / runs)).all()


def test_places_are_filled_in_random_order() -> None:
    # Two clients of 4 that both have only class 0 or both only class 1, of 4 examples: every example is used twice.
    # Its two places are any two of the eight: of one client with probability 3/7. Client by client it would be never.
    labels, stream, share = np.repeat([0, 1], 4), rng(4), []
    for _ in range(4000):
        partition = DirichletRefill(2, 1e-300)(labels, {}, stream)
        if len(set(labels[partition.indices])) == 1:
            share.append(np.mean([len(set(partition[k].tolist())) for k in (0, 1)]))
    # The 4 places of a client have 4 - x examples where x are there twice, E x = 4 * 3/7 / 2; x is in 0, 1, 2.
    doubles = 4 - np.array(share)
    assert len(doubles) > 1500
    assert abs(doubles.mean() - 6 / 7) < 5 * doubles.std() / math.sqrt(len(doubles))


def test_classes_follow_the_mixture_however_rare_they_are() -> None:
    # alpha = inf: multinomial with equal probabilities, though the classes have 4000, 900, 90 and 10 examples. The sum
    # over clients of Pearson's statistic is chi-square with K (C - 1) degrees of freedom, mean k and variance 2 k.
    pools, k = [4000, 900, 90, 10], 50
    labels = rng(1).permutation(np.repeat(np.arange(4), pools))
    counts = class_table(DirichletRefill(k, math.inf)(labels, {}, rng(5)), labels, 4)
    expected = len(labels) // k / 4
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), k * 3
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


def test_draws_follow_the_clients_own_mixture() -> None:
    q = np.array([[0.7, 0.2, 0.1], [0.05, 0.05, 0.9]])
    places = ints(rng(6).permutation(np.repeat([0, 1], 6000)))
    drawn = draw(places, np.log(q), rng(7))
    for client in (0, 1):
        seen = np.bincount(drawn[places == client], minlength=3) / 6000
        assert (np.abs(seen - q[client]) < 5 * np.sqrt(q[client] * (1 - q[client]) / 6000)).all()


@pytest.mark.parametrize("alpha", [0.1, 0.6, 5.0])
def test_shares_have_the_variance_of_a_dirichlet_multinomial(alpha: float) -> None:
    # s places, C classes: Var(n / s) = p (1 - p) / s * (s + C alpha) / (1 + C alpha), p = 1/C. Nothing is rationed, so
    # this is exact, whatever the sizes of the classes.
    k, c, s = 3000, 5, 20
    labels = np.repeat(np.arange(c), [k * s - 4000, 1000, 1000, 1000, 1000])
    shares = class_table(DirichletRefill(k, alpha)(labels, {}, rng(8)), labels, c) / s
    variance = (1 / c) * (1 - 1 / c) / s * (s + c * alpha) / (1 + c * alpha)
    for j in range(c):
        assert abs(shares[:, j].mean() - 1 / c) < 5 * math.sqrt(variance / k)
        squares = (shares[:, j] - 1 / c) ** 2
        assert abs(squares.mean() - variance) < 5 * squares.std() / math.sqrt(k)


def test_a_small_alpha_gives_every_client_one_class() -> None:
    labels = np.repeat(np.arange(10), 60)
    partition = DirichletRefill(30, 1e-9)(labels, {}, rng(9))
    counts = class_table(partition, labels, 10)
    assert ((counts > 0).sum(axis=1) == 1).all()
    assert len(set(counts.argmax(axis=1))) > 5  # not the same one


def test_where_classes_suffice_nothing_repeats_and_a_rest_is_left() -> None:
    partition = DirichletRefill(4, 0.3)(np.zeros(23, dtype=np.int64), {}, rng())
    assert partition.sizes().tolist() == [5] * 4
    assert len(set(partition.indices.tolist())) == 20
    assert not partition.repeats


def test_the_seed_decides_and_the_size_of_a_chunk_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = rng(1).integers(0, 5, 400)
    before = labels.copy()
    hashes = [DirichletRefill(7, 0.5)(labels, {}, rng(seed)).sha256() for seed in (3, 3, 4)]
    assert hashes[0] == hashes[1] != hashes[2]
    np.testing.assert_array_equal(labels, before)
    monkeypatch.setattr(dirichlet_refill, "CHUNK", 7)
    assert DirichletRefill(7, 0.5)(labels, {}, rng(3)).sha256() == hashes[0]


def test_memory_follows_examples_not_examples_times_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    # A table of a double per place and class would be 80 MB; there are a dozen arrays of 1.6 MB.
    monkeypatch.setattr(dirichlet_refill, "CHUNK", 1000)
    labels = rng().integers(0, 50, 200_000)
    tracemalloc.start()
    try:
        DirichletRefill(10, 0.5)(labels, {}, rng())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30e6


def test_impossible_requests_are_refused_with_their_numbers() -> None:
    for num_clients, alpha, key in ((0, 1.0, "num_clients"), (3, 0.0, "alpha"), (3, math.nan, "alpha")):
        with pytest.raises(ConfigError, match=rf"partition\.{key} must be"):
            DirichletRefill(num_clients, alpha)
    with pytest.raises(DataError, match=r"partition\.num_clients=11 .*only 10"):
        DirichletRefill(11, 1.0)(np.zeros(10, dtype=np.int64), {}, rng())


# Repeats, elsewhere


def configured(name: str) -> Partitioner:
    """The partitioner of a config file, for 7 clients."""
    from hydra.utils import instantiate

    node = {k: v for k, v in compose([f"partition={name}"])["partition"].items() if k != "holdout"}
    partitioner: Partitioner = instantiate({**node, "num_clients": 7})
    return partitioner


@pytest.mark.parametrize("name", options("partition"))
def test_only_a_partitioner_that_says_so_uses_an_example_twice(name: str) -> None:
    # 40 examples of the rarest class do not last for those who want them: a partitioner that refills does it here.
    labels = rng(1).permutation(np.repeat(np.arange(4), [40, 120, 120, 120]))
    partitioner = configured(name)
    partition = partitioner(labels, {"user": ints(rng(2).integers(0, 7, 400))}, rng(3))
    times = np.bincount(partition.indices, minlength=400)
    if getattr(partitioner, "repeats", False):
        assert partition.repeats
        assert times.max() > 1
    else:
        assert not partition.repeats
        assert times.tolist() == [1] * 400


def test_a_repeat_that_was_not_announced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DirichletRefill, "repeats", False)
    with pytest.raises(ConfigError, match=r"DirichletRefill uses \d+ examples more than once.*repeats: ClassVar"):
        build(compose(["partition=dirichlet_refill", "partition.alpha=0.1"]))


@st.composite
def repeating(draw_: st.DrawFn) -> Partition:
    clients = draw_(st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=14), min_size=1, max_size=6))
    offsets = np.cumsum([0, *map(len, clients)])
    return Partition(ints(offsets), ints([row for rows in clients for row in rows]))


@SETTINGS
@given(whole=repeating(), fraction=st.floats(0, 0.99), seed=st.integers(0, 9))
def test_copies_of_an_example_at_one_client_are_held_out_together(whole: Partition, fraction: float, seed: int) -> None:
    train, held = hold_out(whole, fraction, rng(seed))
    for client in range(len(whole)):
        rows, kept, out = (part[client].tolist() for part in (whole, train, held))
        assert sorted(kept + out) == sorted(rows)
        assert not set(kept) & set(out)
        assert (kept, out) == (sorted(kept), sorted(out))
        most = min(round(fraction * len(rows)), len(rows) - 1)
        assert most - len(out) < max(map(rows.count, rows))  # fewer only by copies that would be parted
        assert len(kept) >= 1 and len(out) <= most


def test_copies_are_held_out_as_often_as_others() -> None:
    # Of {0, 0, 1, 1} half: the zeros or the ones. Of {2, 2, 3, 4}, half: drawn in a random order of examples, 2 comes
    # first (1/3: both copies), or second (1/3: it would be parted, one is held out), or third (1/3: 3 and 4 are).
    whole, stream, runs = Partition(ints([0, 4, 8]), ints([0, 0, 1, 1, 2, 2, 3, 4])), rng(9), 3000
    times = np.zeros(5)
    for _ in range(runs):
        times[np.unique(hold_out(whole, 0.5, stream)[1].indices)] += 1
    p = np.array([1 / 2, 1 / 2, 1 / 3, 1 / 3 + 1 / 6, 1 / 3 + 1 / 6])
    assert (np.abs(times / runs - p) < 5 * np.sqrt(p * (1 - p) / runs)).all()


def test_repeats_between_clients_do_not_change_what_is_held_out() -> None:
    once = Partition(ints([0, 6, 12]), np.arange(12))
    twice = Partition(ints([0, 6, 12]), np.arange(12) % 6)
    assert twice.repeats and not once.repeats
    for a, b in zip(hold_out(once, 0.5, rng(2)), hold_out(twice, 0.5, rng(2)), strict=True):
        np.testing.assert_array_equal(a.indices % 6, b.indices)
        np.testing.assert_array_equal(a.offsets, b.offsets)


def test_examples_that_the_server_keeps_are_at_no_client() -> None:
    exp = build(compose(["partition=dirichlet_refill", "partition.alpha=0.1", "data.validation=0.3", "seed=5"]))
    n = len(exp.program.dataset.train)
    assert exp.program.server is not None and exp.partition is not None
    kept = random.numpy_generator(5, "validation").permutation(n)[: round(0.3 * n)]
    assert len(exp.program.server) == len(kept)
    assert not set(exp.partition.indices.tolist()) & set(kept.tolist())
    assert exp.partition.sizes().tolist() == [(n - len(kept)) // 20] * 20


def test_figures_count_places_and_say_how_many_differ() -> None:
    # Client 0: example 0 twice, example 1. Client 1: examples 1, 2, 2. Classes 0, 0, 1: shares 1, 0 and 1/3, 2/3.
    found = statistics(Partition(ints([0, 3, 6]), ints([0, 0, 1, 1, 2, 2])), ints([0, 0, 1, 1]), 2)
    assert (found.num_examples, found.num_distinct, found.size_min, found.size_max) == (6, 3, 3, 3)
    assert found.tv_mean == pytest.approx(1 / 3)  # the whole: 2/3, 1/3


def test_commands_count_the_examples_of_a_client_and_replay_its_visit(fedsim: Fedsim, tmp_path: Path) -> None:
    given = ["partition=dirichlet_refill", "partition.alpha=0.1", "partition.holdout=0", "model=logreg"]
    shown = fedsim("partition", *given)
    found = re.search(r"clients, examples +20, 1,440, of which ([\d,]+) are different", shown.out)
    assert found and 1000 < int(found[1].replace(",", "")) < 1440
    given += ["client.epochs=2", "client.batch_size=32", "rounds=2"]
    assert "20 clients, 120 local steps" in fedsim("--dry-run", *given).out  # 72 examples: 3 batches, twice
    assert fedsim(*given).status == 0
    run = only_run(tmp_path)
    with (run / "classes.csv").open() as file:
        assert sum(int(line["num_train"]) for line in csv.DictReader(file)) == 1440
    with (run / "clients.csv").open() as file:
        assert {line["num_train"] for line in csv.DictReader(file)} == {"72"}
    replayed = fedsim("replay", str(run), "round=2", "client=7")
    assert replayed.status == 0, replayed.err
    assert "72 examples, 6 steps" in replayed.out
