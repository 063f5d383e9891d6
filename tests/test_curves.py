"""Learning curves: drawn for every kind of run without a warning. How they look was judged by eye."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedsim.report.curves import COLOURS, Axis, Line, _lone_points, plot_curves, plot_lines, plot_sizes, seeds_line

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


def test_positions_are_means_over_seeds_in_the_unit_of_the_axis() -> None:
    runs = [records([1.0] * 40, seconds=10.0), records([1.0] * 40, seconds=20.0)]
    wall = Axis.of("wall_seconds", runs)  # at most 800 s: minutes
    assert wall is not None and wall.label == "wall time (min)"
    assert seeds_line(runs, "test_loss", wall)[0][:2] == pytest.approx([15 / 60, 30 / 60])
    sent = Axis.of("bytes", runs)  # 40 rounds of 4 KiB
    assert sent is not None and sent.label.endswith("(KiB)")
    assert seeds_line(runs, "test_loss", sent)[0] == pytest.approx([4.0 * n for n in range(1, 41)])
    assert Axis.of("virtual_seconds", runs) is None


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
