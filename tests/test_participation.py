"""Cohorts have the stated distribution, and cost what the cohort costs."""

import math
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedsim.clients.participation import All, Bernoulli, Fixed, Fraction, Participation
from fedsim.errors import ConfigError
from fedsim.random import numpy_generator


def rounds(rule: Participation, num_clients: int, count: int) -> list[tuple[int, ...]]:
    """Cohorts of successive rounds, a generator for each."""
    return [tuple(rule.sample(num_clients, numpy_generator(0, "cohort", r))) for r in range(count)]


def chi_square(observed: list[int], expected: list[float]) -> float:
    return sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))


rules = st.one_of(
    st.floats(1e-9, 1).map(Fraction), st.floats(1e-9, 1).map(Bernoulli), st.just(All()), st.just(Fixed(1))
)


@given(rule=rules, num_clients=st.integers(1, 3000), seed=st.integers(0, 2**63))
@settings(deadline=None, derandomize=True)
def test_a_cohort_is_sorted_distinct_known_clients_and_never_empty(
    rule: Participation, num_clients: int, seed: int
) -> None:
    cohort = rule.sample(num_clients, numpy_generator(seed, "cohort"))
    assert cohort
    assert all(type(client) is int for client in cohort)
    assert all(a < b for a, b in zip([-1, *cohort], [*cohort, num_clients], strict=True))
    assert cohort == rule.sample(num_clients, numpy_generator(seed, "cohort"))


@pytest.mark.parametrize(
    ("fraction", "num_clients", "size"),
    [(0.1, 100, 10), (0.29, 100, 29), (0.57, 100, 57), (0.1, 3, 1), (0.1, 19, 1), (1.0, 7, 7), (1e-5, 10**6, 10)],
)
def test_a_fraction_is_rounded_down_to_at_least_one(fraction: float, num_clients: int, size: int) -> None:
    assert len(Fraction(fraction).sample(num_clients, np.random.default_rng(0))) == size


def test_full_participation_in_all_its_spellings_is_everyone() -> None:
    for rule in (Fraction(1.0), Fixed(50), Bernoulli(1.0), All()):
        assert rule.sample(50, np.random.default_rng(0)) == list(range(50))


@pytest.mark.parametrize("rule", [Fixed(2), Fraction(0.4)], ids=repr)
def test_every_subset_is_equally_likely(rule: Participation) -> None:
    counts = Counter(rounds(rule, 5, 5000))
    assert len(counts) == math.comb(5, 2)
    assert chi_square(list(counts.values()), [500.0] * 10) < 27.9  # the 0.999 quantile for 9 degrees of freedom


@pytest.mark.parametrize(("num_clients", "size"), [(40, 12), (20_000, 3000)])  # Floyd's method, and the tail shuffle
def test_every_client_is_equally_likely(num_clients: int, size: int) -> None:
    trials = 2000 if num_clients < 100 else 60
    counts = np.zeros(num_clients)
    for cohort in rounds(Fixed(size), num_clients, trials):
        counts[list(cohort)] += 1
    share = size / num_clients
    # Clients of one round exclude each other; so scaled, the sum is chi-square with K - 1 degrees of freedom.
    statistic = (
        ((counts - trials * share) ** 2).sum() / (trials * share * (1 - share)) * (num_clients - 1) / num_clients
    )
    assert abs(statistic - (num_clients - 1)) < 4 * math.sqrt(2 * (num_clients - 1))


@pytest.mark.parametrize(("num_clients", "p"), [(8, 0.3), (8, 0.02), (5, 0.9), (3, 1e-4)])
def test_bernoulli_is_independent_participation_given_that_somebody_comes(num_clients: int, p: float) -> None:
    trials = 4000
    cohorts = rounds(Bernoulli(p), num_clients, trials)
    nonempty = 1 - (1 - p) ** num_clients
    # Sizes: the zero-truncated binomial; rare ones are pooled.
    sizes = Counter(len(cohort) for cohort in cohorts)
    observed, expected = [0], [0.0]
    for n in range(1, num_clients + 1):
        observed[-1] += sizes[n]
        expected[-1] += trials * math.comb(num_clients, n) * p**n * (1 - p) ** (num_clients - n) / nonempty
        if expected[-1] >= 5 and n < num_clients:
            observed.append(0)
            expected.append(0.0)
    if expected[-1] < 5 and len(expected) > 1:
        rest, seen = expected.pop(), observed.pop()
        expected[-1] += rest
        observed[-1] += seen
    dof = max(1, len(observed) - 1)
    assert chi_square(observed, expected) < dof + 4 * math.sqrt(2 * dof)
    # Members: each client with probability p / nonempty.
    share = p / nonempty
    for client in range(num_clients):
        hits = sum(client in cohort for cohort in cohorts)
        assert abs(hits - trials * share) < 4 * math.sqrt(trials * share * (1 - share)) + 1e-9


def test_bernoulli_has_the_mean_and_spread_of_a_binomial_in_a_large_population() -> None:
    sizes = np.array([len(cohort) for cohort in rounds(Bernoulli(1e-4), 1_000_000, 1000)])
    assert abs(sizes.mean() - 100) < 4 * 10 / math.sqrt(1000)
    assert abs(sizes.var() / 100 - 1) < 4 * math.sqrt(2 / 1000)


@pytest.mark.parametrize("p", [5e-324, 1e-300, 1e-15, 1e-9])
def test_bernoulli_needs_no_redraws_however_rare_participation_is(p: float) -> None:
    # Waiting for a cohort that is not empty would take 1 / (K p) draws.
    cohorts = rounds(Bernoulli(p), 1000, 300)
    assert all(len(cohort) == 1 for cohort in cohorts)
    assert len({cohort[0] // 100 for cohort in cohorts}) == 10


def best_time(rule: Participation, num_clients: int) -> float:
    rng = np.random.default_rng(0)
    best = math.inf
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(20):
            rule.sample(num_clients, rng)
        best = min(best, time.perf_counter() - begin)
    return best


@pytest.mark.parametrize(
    "make",
    [lambda k: Fixed(10), lambda k: Fraction(10 / k), lambda k: Bernoulli(10 / k)],
    ids=["fixed", "frac", "bern"],
)
def test_cost_follows_the_cohort_not_the_population(make: Callable[[int], Participation]) -> None:
    few, many = 1000, 1_000_000
    assert best_time(make(many), many) < 5 * best_time(make(few), few)
    rule = make(many)
    tracemalloc.start()
    rule.sample(many, np.random.default_rng(0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000  # bytes; a permutation of the population would be 8 MB


@pytest.mark.parametrize("value", [0.0, -0.1, 1.01, math.nan, math.inf, True, "0.1", None])
def test_rates_out_of_range_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=r"participation\.fraction must be a number in \(0, 1\], got"):
        Fraction(value)
    with pytest.raises(ConfigError, match=r"participation\.probability must be a number in \(0, 1\], got"):
        Bernoulli(value)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_counts_that_are_none_are_refused(value: int) -> None:
    with pytest.raises(ConfigError, match=r"participation\.clients_per_round must be a whole number, at least 1"):
        Fixed(value)


def test_a_cohort_larger_than_the_population_is_refused_with_both_numbers() -> None:
    message = r"participation\.clients_per_round=11 is more than partition\.num_clients=10"
    with pytest.raises(ConfigError, match=message):
        Fixed(11).check(10)
    with pytest.raises(ConfigError, match=message):
        Fixed(11).sample(10, np.random.default_rng(0))
    for rule in (Fraction(0.5), Fixed(1), Bernoulli(0.5), All()):
        with pytest.raises(ConfigError, match=r"partition\.num_clients must be at least 1, got 0"):
            rule.check(0)


@pytest.mark.parametrize(
    ("option", "rule"),
    [("fraction", Fraction(0.1)), ("fixed", Fixed(10)), ("bernoulli", Bernoulli(0.1)), ("all", All())],
)
def test_each_config_builds_its_rule(option: str, rule: Participation) -> None:
    path = Path(__file__).parents[1] / "conf" / "participation" / f"{option}.yaml"
    assert instantiate(OmegaConf.load(path)) == rule
