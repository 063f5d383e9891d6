"""Learning curves: drawn for every kind of run without a warning. How they look was judged by eye."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedsim.errors import ConfigError
from fedsim.report.curves import (
    COLOURS,
    Axis,
    Line,
    _lone_points,
    plot_against_time,
    plot_curves,
    plot_lines,
    plot_sizes,
    plot_staleness,
    seeds_line,
)

NAN = float("nan")


def metrics(rounds: int, every: int = 1, **more: Any) -> list[dict[str, Any]]:
    return [
        {"round": n, "train_loss": 2.0 / n, **more}
        | ({"test_loss": 2.5 / n, "test_accuracy": 1 - 1 / (n + 1)} if n % every == 0 else {})
        for n in range(1, rounds + 1)
    ]


@pytest.mark.parametrize(
    "runs",
    [
        [("one round", metrics(1))],
        [("200 rounds", metrics(200, every=5, validation_accuracy=0.5))],
        [("no evaluation", metrics(5, every=9))],
        [("no rounds", [])],
        [("only nan", [{"round": 1, "train_loss": NAN, "test_loss": None, "test_accuracy": NAN}])],
        [("gaps", [{"round": n, "train_loss": NAN if n % 2 else 1e9 if n == 4 else 0.1} for n in range(1, 50)])],
        [("zero", [{"round": n, "train_loss": 0.0, "test_accuracy": 1.0} for n in range(1, 5)])],
        [("$x_1 [a]", metrics(3)), ("_hidden", metrics(9)), ("ünïcode", [])],
        [(f"strategy.mu={n}", metrics(5)) for n in range(12)],
    ],
    ids=lambda runs: runs[0][0],
)
def test_a_picture_of_any_run(tmp_path: Path, runs: list[tuple[str, list[dict[str, Any]]]]) -> None:
    path = tmp_path / "figures" / "curves.png"
    plot_curves(runs, path)
    with Image.open(path) as image:
        assert image.size == (1500, 630)
        # Two white panels with ink on both sides.
        for box in ((0, 0, 750, 630), (750, 0, 1500, 630)):
            low, high = image.convert("L").crop(box).getextrema()
            assert (low < 128, high) == (True, 255)  # type: ignore[operator]
    assert [p.name for p in path.parent.iterdir()] == ["curves.png"]


def test_more_runs_and_more_rounds_change_the_picture(tmp_path: Path) -> None:
    plot_curves([("a", metrics(5))], tmp_path / "a.png")
    plot_curves([("a", metrics(6))], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_points_between_gaps_are_found() -> None:
    assert _lone_points([1.0, NAN, 2.0, 3.0, NAN, 4.0]) == [0, 5]
    assert _lone_points([1.0]) == [0]
    assert _lone_points([]) == []


def records(losses: list[float | None], seconds: float = 1.0) -> list[dict[str, Any]]:
    return [
        {"round": n, "bytes_down": 3 * 1024, "bytes_up": 1024, "wall_seconds": seconds * n, "test_loss": v}
        for n, v in enumerate(losses, start=1)
    ]


def test_seeds_become_mean_and_sample_deviation_of_the_rounds_that_all_have() -> None:
    runs = [records([1.0, 4.0, 7.0, 9.0]), records([3.0, 8.0, None]), records([5.0, 6.0, 1.0])]
    x, y, std = seeds_line(runs, "test_loss", Axis("round", "round"))
    # 1, 3, 5: mean 3, variance (4 + 0 + 4) / 2. 4, 8, 6: mean 6, variance 4. Round 3 has a gap, round 4 one run only.
    assert (x, y[:2]) == ([1, 2, 3], [3, 6]) and math.isnan(y[2])
    assert std is not None and std[:2] == pytest.approx([2, 2]) and math.isnan(std[2])
    assert seeds_line(runs[:1], "test_loss", Axis("round", "round")) == ([1, 2, 3, 4], [1, 4, 7, 9], None)
    assert seeds_line(runs, "test_accuracy", Axis("round", "round")) == ([], [], None)


def test_positions_are_in_the_unit_of_the_axis() -> None:
    runs = [records([1.0] * 40, seconds=10.0), records([1.0] * 40, seconds=20.0)]
    wall = Axis.of("wall_seconds", runs)  # at most 800 s: minutes
    assert wall is not None and wall.label == "wall time (min)"
    assert seeds_line(runs, "test_loss", wall)[0][:2] == pytest.approx([20 / 60, 30 / 60])  # at 10 s one has no value
    sent = Axis.of("bytes", runs)  # 40 rounds of 4 KiB
    assert sent is not None and sent.label.endswith("(KiB)")
    assert seeds_line(runs, "test_loss", sent)[0] == pytest.approx([4.0 * n for n in range(1, 41)])
    assert Axis.of("virtual_seconds", runs) is None


def evaluated(*points: tuple[float, float]) -> list[dict[str, Any]]:
    """A run by virtual time and test accuracy of its rounds."""
    return [
        {"round": n, "virtual_seconds": at, "test_accuracy": value} for n, (at, value) in enumerate(points, start=1)
    ]


def test_against_time_a_run_has_the_value_that_it_had_last() -> None:
    runs = [evaluated((2, 0.1), (5, 0.3), (9, 0.5)), evaluated((1, 0.0), (3, 0.2), (4, 0.6), (6, 0.4), (7, 0.8))]
    axis = Axis("virtual_seconds", "s")
    x, y, std = seeds_line(runs, "test_accuracy", axis)
    # From 2, when both have a value, to 7, where the second one ends.
    pairs = [(2, 0.1, 0.0), (3, 0.1, 0.2), (4, 0.1, 0.6), (5, 0.3, 0.6), (6, 0.3, 0.4), (7, 0.3, 0.8)]
    assert x == [at for at, _, _ in pairs]
    assert y == pytest.approx([(a + b) / 2 for _, a, b in pairs])
    assert std == pytest.approx([abs(a - b) / math.sqrt(2) for _, a, b in pairs])
    # One run alone is drawn where it was evaluated; two that never overlap have no mean.
    assert seeds_line(runs[:1], "test_accuracy", axis) == ([2, 5, 9], [0.1, 0.3, 0.5], None)
    assert seeds_line([evaluated((1, 0.1)), evaluated((2, 0.1))], "test_accuracy", axis) == ([], [], None)
    assert seeds_line([runs[0], []], "test_accuracy", axis) == ([], [], None)


def test_a_long_mean_against_time_keeps_its_ends_and_few_points() -> None:
    runs = [evaluated(*((n + shift, n / 5000) for n in range(1, 5001))) for shift in (0.0, 0.5)]
    x, y, _ = seeds_line(runs, "test_accuracy", Axis("virtual_seconds", "s"))
    assert len(x) == 1000 and (x[0], x[-1]) == (1.5, 5000)
    assert y[-1] == pytest.approx((5000 + 4999) / 2 / 5000)


def test_settings_are_drawn_against_virtual_time(tmp_path: Path) -> None:
    rows = [("a_$b$", [evaluated((1, 0.1), (5, 0.5)), evaluated((2, 0.2), (6, 0.7))]), ("b", [evaluated((3, 0.9))])]
    plot_against_time(rows, "accuracy", tmp_path / "x.svg", target=0.6)
    text = (tmp_path / "x.svg").read_text()
    assert all(colour.lower() in text for colour in COLOURS[:2]) and "stroke-dasharray" in text
    plot_against_time(rows, "accuracy", tmp_path / "y.png")
    with Image.open(tmp_path / "y.png") as image:
        assert image.size == (1280, 840)
    with pytest.raises(ConfigError, match="no run has a test loss; leave the picture out"):
        plot_against_time(rows, "loss", tmp_path / "z.png")
    with pytest.raises(ConfigError, match="no run took virtual time"):
        plot_against_time([("a", [evaluated((0, 0.1))])], "accuracy", tmp_path / "z.png")


@pytest.mark.parametrize("counts", [{0: 3}, {0: 3, 2: 1}, {7: 1}, dict.fromkeys(range(0, 4000, 7), 2)])
def test_staleness_makes_a_histogram(counts: dict[int, int]) -> None:
    text = plot_staleness(Counter(counts))
    ElementTree.fromstring(text)
    assert COLOURS[0].lower() in text and len(text) < 60_000


def test_bytes_of_rounds_without_an_evaluation_count() -> None:
    run = records([1.0, 1.0, 1.0])
    del run[1]["test_loss"]
    axis = Axis.of("bytes", [run])
    assert axis is not None and seeds_line([run], "test_loss", axis)[0] == [4.0, 12.0]


@pytest.mark.parametrize("size", [1, 5, 400])
def test_a_picture_for_a_page_holds_a_line_and_its_band(size: int) -> None:
    line = Line("a", COLOURS[1], (4, 1.6), range(1, size + 1), [0.5] * size, [0.1] * size)
    plain = Line("a", COLOURS[1], (), range(1, size + 1), [0.5] * size)
    text = plot_lines([line], "accuracy", "round", rounds=True)
    ElementTree.fromstring(text)
    assert COLOURS[1].lower() in text and "stroke-dasharray" in text and "fill-opacity: 0.18" in text
    assert "fill-opacity" not in plot_lines([plain], "accuracy", "round", rounds=True)
    assert text == plot_lines([line], "accuracy", "round", rounds=True)  # the same numbers, the same bytes


def test_a_loss_that_explodes_is_drawn_on_a_logarithm() -> None:
    x, tame, wild = [1, 2, 3], [2.0, 1.0, 0.5], [2.0, 1.0, 1e6]
    assert "{10^{" not in plot_lines([Line("a", COLOURS[0], (), x, tame)], "loss", "round")
    assert "{10^{" in plot_lines([Line("a", COLOURS[0], (), x, wild, [0.1, 5.0, 1.0])], "loss", "round")


@pytest.mark.parametrize("low", [0.0, 0.5, 0.9, 0.97, 0.999])
def test_accuracy_is_marked_in_whole_per_cents_that_differ(low: float) -> None:
    text = plot_lines([Line("a", COLOURS[0], (), [1, 2], [low, 1.0])], "accuracy", "round", rounds=True)
    found = re.findall(r">(-?[\d.]+)%<", text)
    assert len(found) >= 3 and len(set(found)) == len(found) and not any("." in mark for mark in found)


@pytest.mark.parametrize("sizes", [[1, 2], [5] * 9 + [6], list(range(1, 400)), [10, 10**6]])
def test_sizes_make_a_histogram(sizes: list[int]) -> None:
    assert COLOURS[0].lower() in plot_sizes(sizes, "Training examples")


def test_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run, got none"):
        plot_curves([], tmp_path / "x.png")
