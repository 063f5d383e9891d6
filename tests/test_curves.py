"""Learning curves: drawn for every kind of run without a warning. How they look was judged by eye."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedsim.report.curves import _lone_points, plot_curves

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


def test_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run, got none"):
        plot_curves([], tmp_path / "x.png")
