"""Figures of merit, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.engine.base import Score
from fedsim.evaluation import merge, metrics, spread

NOTHING = torch.zeros(0, 0, dtype=torch.int64)


def score(pairs: list[tuple[int, int]], classes: int, loss: float = 0.0) -> Score:
    """From (label, prediction) of every example."""
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for label, prediction in pairs:
        confusion[label, prediction] += 1
    return Score(len(pairs), loss, confusion)


@given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_metrics_follow_their_definitions(pairs: list[tuple[int, int]]) -> None:
    found = metrics(score(pairs, 4, loss=3.0 * len(pairs)))
    assert found["loss"] == 3.0
    assert found["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    f1 = []
    for k in range(4):
        tp = sum(a == b == k for a, b in pairs)
        fp, fn = (sum(pair[i] == k and pair[0] != pair[1] for pair in pairs) for i in (1, 0))
        if tp + fp + fn:
            precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
            f1.append(2 * precision * recall / (precision + recall) if tp else 0.0)
        of_class = [b for a, b in pairs if a == k]
        expected = of_class.count(k) / len(of_class) if of_class else math.nan
        assert found["class_accuracy"][k] == pytest.approx(expected, nan_ok=True)
    assert found["macro_f1"] == pytest.approx(sum(f1) / len(f1))


def test_scores_add_up_in_any_cut() -> None:
    pairs = [(0, 0), (1, 2), (2, 2), (2, 0), (1, 1), (0, 0), (1, 0)]
    losses = [1e16, 1.0, -1e16, 2.0, 0.5, 0.25, 0.25]  # a plain sum would lose the small ones
    parts = [score([p], 3, loss) for p, loss in zip(pairs, losses, strict=True)]
    whole = merge(parts)
    assert (whole.count, whole.loss) == (7, 4.0)
    assert torch.equal(whole.confusion, score(pairs, 3).confusion)


def test_regression_has_a_loss_only_and_no_examples_are_no_number() -> None:
    assert metrics(Score(4, 2.0, NOTHING)) == {"loss": 0.5}
    assert math.isnan(metrics(Score(0, 0.0, NOTHING))["loss"])
    empty = metrics(score([], 2))
    assert all(math.isnan(empty[key]) for key in ("loss", "accuracy", "macro_f1"))


def test_spread_over_clients() -> None:
    values = [float(v) for v in range(20)]
    counts = [3] * 10 + [0] + [1] * 10
    found = spread([*values[::2], math.nan, *values[1::2]], counts, "a")  # a client without examples is left out
    std = pytest.approx((399 / 12) ** 0.5)
    assert found == {"a_mean": 9.5, "a_weighted": (3 * 90 + 100) / 40, "a_std": std, "a_worst10": 0.5}
    assert spread(values, [1] * 20, "a", higher_is_better=False)["a_worst10"] == 18.5
    assert spread([3.0], [7], "a") == {"a_mean": 3.0, "a_weighted": 3.0, "a_std": 0.0, "a_worst10": 3.0}
    assert spread([math.nan], [0], "a") == {}
