"""Learning curves: accuracy and loss against rounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedsim.rundir import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]

# Okabe and Ito's palette, which people with any colour vision can tell apart; its yellow is too pale for a line.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_SPLITS: tuple[tuple[str, Literal["-", ":", "--"]], ...] = (("test", "-"), ("validation", ":"), ("train", "--"))
_GREY = "#555555"


def plot_curves(runs: Sequence[tuple[str, Records]], path: Path) -> None:
    """Draws accuracy and loss against rounds, for one run or for several on top of each other.

    A panel without numbers says so. In a picture of one run the colour tells test, validation and training apart; in
    one of several runs the colour is the run's, and the kind of line tells the splits apart.

    Args:
        runs: Label and records (`fedsim.rundir.read_metrics`) of each run, at least one.
        path: The PNG to write; its folder is made.

    Raises:
        ValueError: There are no runs.
        RunError: The file cannot be written.
    """
    if not runs:
        raise ValueError("plot_curves needs at least one run, got none")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(10, 4.2), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06))
    FigureCanvasAgg(figure)
    accuracy, loss = figure.subplots(1, 2)
    _panel(accuracy, runs, "accuracy")
    _panel(loss, runs, "loss")
    _scale_accuracy(accuracy)
    _scale_loss(loss)
    if len(runs) == 1:
        figure.suptitle(_text(runs[0][0]), fontsize=12)
    _legend(figure, runs)
    with replacing(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)  # in here, so that a refusal is one clear line too
        figure.savefig(temporary, format="png")


def _colours(number: int) -> list[Any]:
    if number <= len(_COLOURS):
        return list(_COLOURS)
    from matplotlib import colormaps

    return [colormaps["viridis"](i / (number - 1) * 0.95) for i in range(number)]


def _legend(figure: Figure, runs: Sequence[tuple[str, Records]]) -> None:
    # One for both panels, below them: inside a panel it would sooner or later lie on a curve.
    from matplotlib.lines import Line2D

    splits = [
        (which, split, style)
        for which, (split, style) in enumerate(_SPLITS)
        if any(_series(records, f"{split}_{metric}")[0] for _, records in runs for metric in ("accuracy", "loss"))
    ]
    if not splits:
        return
    if len(runs) == 1:
        handles = [Line2D([], [], color=_COLOURS[w], linestyle=style, label=split) for w, split, style in splits]
    else:
        colours = _colours(len(runs))
        handles = [Line2D([], [], color=colours[i], label=_text(label)) for i, (label, _) in enumerate(runs)]
        if len(splits) > 1:
            handles += [Line2D([], [], color=_GREY, linestyle=style, label=split) for _, split, style in splits]
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), 130 // (longest + 8)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _panel(axes: Axes, runs: Sequence[tuple[str, Records]], metric: str) -> None:
    from matplotlib.ticker import MaxNLocator

    colours = _colours(len(runs))
    last, drawn = 1, False
    for number, (_, records) in enumerate(runs):
        last = max([last, *(int(r["round"]) for r in records)])
        for which, (split, style) in enumerate(_SPLITS):
            rounds, values = _series(records, f"{split}_{metric}")
            if not rounds:
                continue
            drawn = True
            few = len(rounds) <= 30
            axes.plot(
                rounds,
                values,
                linestyle=style,
                linewidth=1.3 if split == "train" else 1.8,
                color=colours[which if len(runs) == 1 else number],
                # Past thirty points marks hide the line, but a point between two gaps is seen only by its mark.
                marker="o",
                markersize=4,
                markevery=range(len(rounds)) if few else _lone_points(values),
            )
    axes.set_title(metric.capitalize(), fontsize=11)
    axes.set_xlabel("round")
    axes.set_xlim(0.5 if last == 1 else 1 - 0.02 * (last - 1), last + (0.5 if last == 1 else 0.02 * (last - 1)))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    if drawn:
        axes.grid(True, color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
    else:
        axes.set_yticks([])
        axes.text(
            0.5, 0.5, f"no {metric} was recorded", transform=axes.transAxes, ha="center", va="center", color=_GREY
        )


def _series(records: Records, key: str) -> tuple[list[int], list[float]]:
    """Rounds and values of the records that have ``key``; what is not finite becomes a gap. Empty if nothing is."""
    points = [(int(r["round"]), _value(r[key])) for r in records if key in r]
    if not any(math.isfinite(value) for _, value in points):
        return [], []
    return [number for number, _ in points], [value for _, value in points]


def _value(value: float | None) -> float:
    return float(value) if value is not None and math.isfinite(value) else math.nan


def _lone_points(values: Sequence[float]) -> list[int]:
    gaps = [True, *(math.isnan(v) for v in values), True]
    return [i for i in range(len(values)) if gaps[i] and not gaps[i + 1] and gaps[i + 2]]


def _finite(axes: Axes) -> Iterable[float]:
    return (float(v) for line in axes.get_lines() for v in line.get_ydata() if math.isfinite(v))  # type: ignore[union-attr, arg-type]


def _scale_accuracy(axes: Axes) -> None:
    from matplotlib.ticker import PercentFormatter

    values = list(_finite(axes))
    if not values:
        return
    low, high = min(values), max(values)
    margin = 0.05 * max(high - low, 0.5)
    axes.set_ylim(max(low - margin, -0.02), min(high + margin, 1.02) if high <= 1 else high + margin)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _scale_loss(axes: Axes) -> None:
    values = list(_finite(axes))
    # A run that diverges would press every other curve onto the axis.
    if values and min(values) > 0 and max(values) > 1000 * min(values):
        axes.set_yscale("log")


def _text(label: str) -> str:
    # "$" would start a formula, and a leading "_" would hide a curve from the legend.
    return label.replace("$", r"\$").replace("_", " ", 1) if label.startswith("_") else label.replace("$", r"\$")
