"""A partition's figures against their formulas by hand, and pictures that are there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data import Partition
from fedsim.errors import DataError
from fedsim.report import partition as report
from fedsim.report.partition import class_counts, gini, plot_bubbles, plot_heatmap, statistics


def test_figures_of_two_clients_by_hand() -> None:
    # Client 0: 3 of class 0. Client 1: 1 of class 0, 4 of class 1. The whole: 1/2, 1/2.
    labels = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    found = statistics(Partition.from_owners(np.array([0, 1, 0, 1, 0, 1, 1, 1]), 2), labels, 2)
    assert (found.num_clients, found.num_examples, found.num_classes) == (2, 8, 2)
    assert (found.size_min, found.size_median, found.size_mean, found.size_max) == (3, 4, 4, 5)
    assert (found.classes_min, found.classes_mean, found.classes_max) == (1, 1.5, 2)
    assert found.tv_mean == pytest.approx((0.5 + 0.3) / 2)
    assert found.kl_mean == pytest.approx((math.log(2) + 0.2 * math.log(0.4) + 0.8 * math.log(1.6)) / 2)
    assert found.gini == pytest.approx(2 * abs(5 - 3) / (2 * 2**2 * 4))  # sum |a - b| / (2 K^2 mean)


@settings(deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=30).filter(any))
def test_gini_is_the_mean_absolute_difference(sizes: list[int]) -> None:
    a = np.array(sizes)
    assert gini(a) == pytest.approx(np.abs(a[:, None] - a).mean() / (2 * a.mean()), abs=1e-12)


def test_figures_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 3000)
    partition = Partition.from_owners(np.concatenate([np.arange(300), rng.integers(0, 300, 2700)]), 300)
    whole, columns = statistics(partition, labels, 5), report._columns(partition, labels, 5)
    monkeypatch.setattr(report, "_BLOCK", 35)
    assert statistics(partition, labels, 5) == whole
    np.testing.assert_allclose(report._columns(partition, labels, 5), columns, rtol=1e-12)
    np.testing.assert_allclose(columns.sum(axis=1), 1.0)


def test_class_counts_of_some_clients() -> None:
    partition = Partition(np.array([0, 2, 3, 6]), np.array([5, 0, 1, 2, 3, 4]))
    counts = class_counts(partition, np.array([2, 0, 1, 1, 2, 2]), 3, np.array([0, 2]))
    np.testing.assert_array_equal(counts, [[0, 0, 2], [0, 2, 1]])


@pytest.mark.parametrize(("k", "classes"), [(1, 2), (20, 10), (300, 10), (60, 100)])
def test_pictures_are_drawn(tmp_path: Path, k: int, classes: int) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    partition = Partition.from_owners(np.concatenate([np.arange(k), rng.integers(0, k, 2000)]), k)
    labels = rng.integers(0, classes, len(partition.indices))
    names = [f"$class_{c}" for c in range(classes)]
    draw: Any
    for draw in (plot_bubbles, plot_heatmap):
        path = tmp_path / "pictures" / f"{draw.__name__}.png"
        draw(partition, labels, names, path, title="of a $partition")
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert min(image.size) >= 300
            assert len(np.unique(np.asarray(image.convert("L")))) > 3  # not blank
    assert {p.name for p in path.parent.iterdir()} == {"plot_bubbles.png", "plot_heatmap.png"}


def test_what_cannot_be_shown_is_refused() -> None:
    with pytest.raises(DataError, match="regression"):
        statistics(Partition(np.array([0, 2]), np.arange(2)), np.zeros(2, dtype=np.int64), 0)
    with pytest.raises(DataError, match="client 1 of 2 has no examples"):
        statistics(Partition(np.array([0, 2, 2]), np.arange(2)), np.zeros(2, dtype=np.int64), 1)
