"""Learning curves: accuracy and loss against rounds, bytes and time; and how values spread over clients."""

from __future__ import annotations

import io
import math
import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedsim.errors import ConfigError
from fedsim.report.text import human_bytes
from fedsim.rundir import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]
Quantity = Literal["accuracy", "loss"]

# Okabe and Ito's palette, which people with any colour vision can tell apart; its yellow is too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
#: Kinds of line, as lengths of dashes and gaps in widths of the line: with the colours, 35 lines that differ.
DASHES: tuple[tuple[float, ...], ...] = ((), (4, 1.6), (1, 1.4), (6, 1.4, 1, 1.4), (8, 4))
#: Marks of points, in Matplotlib's words.
MARKS = ("o", "s", "^", "D", "v")
#: What a metric is of, and its kind of line.
SPLITS = {"test": DASHES[0], "validation": DASHES[2], "train": DASHES[1]}
QUANTITIES: tuple[Quantity, ...] = ("accuracy", "loss")
_GREY = "#555555"
_MOMENTS = 1000  # of a mean over seeds against time
_MANY = 5000  # points of a picture past which its lines are pixels: a page of long runs stays small


@dataclass(frozen=True)
class Axis:
    """What curves are drawn against.

    Attributes:
        key: ``round``, ``bytes``, ``virtual_seconds`` or ``wall_seconds``.
        label: With the unit.
        unit: How many of `values` are one of that unit.
    """

    key: str
    label: str
    unit: float = 1.0

    @classmethod
    def of(cls, key: str, runs: Sequence[Records]) -> Axis | None:
        """An axis with a unit that fits all runs; None where nothing is to be told apart along it."""
        last = max((max(_positions(records, key), default=0.0) for records in runs), default=0.0)
        if last <= 0:
            return None
        if key == "round":
            return cls(key, "round")
        if key == "bytes":
            unit = human_bytes(last).split()[1]
            power = ("B", "KiB", "MiB", "GiB", "TiB", "PiB").index(unit)
            return cls(key, f"sent, down and up together ({unit})", 1024.0**power)
        unit, seconds = next(u for u in (("h", 3600.0), ("min", 60.0), ("s", 1.0)) if last >= 2 * u[1] or u[1] == 1)
        return cls(key, f"{'virtual' if key.startswith('virtual') else 'wall'} time ({unit})", seconds)

    def values(self, records: Records) -> list[float]:
        """Where each record stands, in the axis's unit: bytes are summed over the rounds until then."""
        return [v / self.unit for v in _positions(records, self.key)]


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        label: For the legend.
        colour: As ``#rrggbb``.
        dash: Of `DASHES`.
        x: Positions, increasing.
        y: Values; NaN is a gap.
        std: Half the height of a band around the curve; None: no band.
        mark: Of `MARKS`.
        width: In points.
        steps: Whether a value holds until the next position.
    """

    label: str
    colour: str
    dash: tuple[float, ...]
    x: Sequence[float]
    y: Sequence[float]
    std: Sequence[float] | None = None
    mark: str = "o"
    width: float = 1.8
    steps: bool = False


def seeds_line(runs: Sequence[Records], key: str, axis: Axis) -> tuple[list[float], list[float], list[float] | None]:
    """Mean and sample standard deviation over runs that differ in their seed.

    Against rounds and bytes, round by round; rounds that not every run has are left out: a mean over fewer runs would
    jump there. Against time, moment by moment, whatever the rounds: at each a run has the value that it had last, from
    the moment at which all have one until the first of them ends.

    Args:
        runs: Records of each run, at least one.
        key: What is drawn, such as ``test_accuracy``.
        axis: What against; positions by rounds are means over the runs.

    Returns:
        Positions, means and standard deviations (None for one run); empty if no value is finite.
    """
    found = []
    for records in runs:
        at = axis.values(records)
        found.append({int(r["round"]): (x, _value(r[key])) for x, r in zip(at, records, strict=True) if key in r})
    if len(runs) > 1 and axis.key.endswith("seconds"):
        x, columns = _moments([list(points.values()) for points in found])
    else:
        rounds = sorted(set.intersection(*(set(points) for points in found)))
        x = [statistics.fmean(points[n][0] for points in found) for n in rounds]
        columns = [[points[n][1] for points in found] for n in rounds]
    y = [math.fsum(column) / len(column) for column in columns]
    if not any(map(math.isfinite, y)):
        return [], [], None
    if len(runs) == 1:
        return x, y, None
    return x, y, [math.nan if math.isnan(m) else statistics.stdev(c) for m, c in zip(y, columns, strict=True)]


def _moments(runs: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], list[list[float]]]:
    """Moments at which a run of several changes, and the latest value of every run at each.

    Args:
        runs: Position and value of every evaluation, in order.
    """
    if not all(runs):
        return [], []
    first, last = max(points[0][0] for points in runs), min(points[-1][0] for points in runs)
    x = sorted({at for points in runs for at, _ in points if first <= at <= last})
    if len(x) > _MOMENTS:
        x = [x[round(i * (len(x) - 1) / (_MOMENTS - 1))] for i in range(_MOMENTS)]
    times = [[at for at, _ in points] for points in runs]
    return x, [[points[bisect_right(t, at) - 1][1] for points, t in zip(runs, times, strict=True)] for at in x]


def plot_lines(lines: Sequence[Line], quantity: Quantity, x_label: str, rounds: bool = False) -> str:
    """A picture of curves for a page, as SVG; its legend is the page's.

    Args:
        lines: At least one.
        quantity: Decides the vertical axis: per cent, or a logarithm where one is needed.
        x_label: For the horizontal axis.
        rounds: Whether positions are round numbers.
    """
    with _svg() as new:
        figure, axes = new()
        _draw(axes, lines)
        _frame(axes, x_label)
        if rounds:
            _round_ticks(axes, max(line.x[-1] for line in lines))
        else:
            axes.set_xlim(left=min(0.0, min(line.x[0] for line in lines)))
        _scale(axes, lines, quantity)
        return _source(figure)


def plot_spread(lines: Sequence[Line], quantity: Quantity) -> str:
    """A picture of values over clients, as SVG: each line climbs from the worst client to the best.

    Args:
        lines: Positions are the share of clients, in [0, 1].
        quantity: What is shown of each client.
    """
    from matplotlib.ticker import PercentFormatter

    with _svg() as new:
        figure, axes = new()
        _draw(axes, lines, marks=False)
        _frame(axes, "clients, from the worst to the best")
        axes.set_xlim(-0.01, 1.01)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        _scale(axes, lines, quantity)
        return _source(figure)


def plot_sizes(sizes: Sequence[int], what: str) -> str:
    """A histogram of the clients' numbers of examples, as SVG.

    Args:
        sizes: Examples of every client, not all equal.
        what: Which examples, ``"Training examples"``.
    """
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    low, high = max(min(sizes), 1), max(sizes)
    bins = min(30, high - low + 1)
    wide = high >= 100 * low  # log-normal and power laws
    edges = np.geomspace(low, high + 1, bins + 1) if wide else np.linspace(low - 0.5, high + 0.5, bins + 1)
    with _svg() as new:
        figure, axes = new()
        axes.hist(sizes, bins=edges.tolist(), color=COLOURS[0], edgecolor="white", linewidth=0.5)
        _frame(axes, f"{what[0].lower()}{what[1:]} of a client")
        axes.set_ylabel("clients", fontsize=9)
        if wide:
            axes.set_xscale("log")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        return _source(figure)


def plot_staleness(counts: Counter[int]) -> str:
    """A histogram of how old the contributions were, as SVG.

    Args:
        counts: How many were that many global models old, at least one.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    oldest, total = max(counts), counts.total()
    width = math.ceil((oldest + 1) / 50)  # models of a bar
    heights = [0.0] * (oldest // width + 1)
    for old, count in counts.items():
        heights[old // width] += count / total
    with _svg() as new:
        figure, axes = new()
        left = [i * width - 0.5 for i in range(len(heights))]
        axes.bar(left, heights, width, align="edge", color=COLOURS[0], edgecolor="white", linewidth=0.5)
        _frame(axes, "global models since the one that it started from")
        axes.set_xlim(-0.7, max(left[-1] + width, 2.5) + 0.2)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel("contributions", fontsize=9)
        return _source(figure)


def plot_against_time(
    rows: Sequence[tuple[str, Sequence[Records]]], quantity: Quantity, path: Path, target: float | None = None
) -> None:
    """Draws the test accuracy or loss of several settings against virtual time, for a paper.

    A line is the mean over a setting's runs, its band one sample standard deviation (`seeds_line`).

    Args:
        rows: Label of each setting and records of its runs, at least one of each.
        quantity: What is drawn.
        path: The ``.png``, ``.pdf`` or ``.svg`` to write; its folder is made.
        target: A level to mark.

    Raises:
        ConfigError: No run took virtual time, or none has the quantity.
        RunError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axis = Axis.of("virtual_seconds", [records for _, runs in rows for records in runs])
    if axis is None:
        raise ConfigError(f"cannot draw {path}: no run took virtual time; leave the picture out")
    lines, colours = [], _colours(len(rows))
    for i, (label, runs) in enumerate(rows):
        x, y, std = seeds_line(runs, f"test_{quantity}", axis)
        if x:
            dash, mark = DASHES[i % len(DASHES)], MARKS[i % len(MARKS)]
            lines.append(Line(_text(label), colours[i], dash, x, y, std, mark, steps=std is not None))
    if not lines:
        raise ConfigError(f"cannot draw {path}: no run has a test {quantity}; leave the picture out")
    figure = Figure(figsize=(6.4, 4.2), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw(axes, lines)
    _frame(axes, axis.label)
    axes.set_xlim(left=0)
    axes.set_ylabel(f"test {quantity}")
    _scale(axes, lines, quantity)
    if target is not None:
        axes.axhline(target, color=_GREY, linewidth=0.9, linestyle="--", zorder=1)
    for drawn, line in zip(axes.lines, lines, strict=False):
        drawn.set_label(line.label)
    columns = max(1, min(len(lines), 90 // (max(len(line.label) for line in lines) + 8)))
    figure.legend(
        handles=axes.lines[: len(lines)], loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    with replacing(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)  # in here, so that a refusal is one clear line too
        figure.savefig(temporary, format=path.suffix[1:].lower())


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
    last = max((int(r["round"]) for _, records in runs for r in records), default=1)
    splits: dict[str, tuple[float, ...]] = {}
    for axes, metric in zip(figure.subplots(1, 2), QUANTITIES, strict=True):
        lines = _split_lines(runs, metric, splits)
        axes.set_title(metric.capitalize(), fontsize=11)
        _frame(axes, "round")
        _round_ticks(axes, last)
        _draw(axes, lines)
        _scale(axes, lines, metric)
        if not lines:
            axes.grid(False)
            axes.set_yticks([])
            where = {"transform": axes.transAxes, "ha": "center", "va": "center", "color": _GREY}
            axes.text(0.5, 0.5, f"no {metric} was recorded", **where)
    if len(runs) == 1:
        figure.suptitle(_text(runs[0][0]), fontsize=12)
    _legend(figure, [label for label, _ in runs], splits)
    with replacing(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)  # in here, so that a refusal is one clear line too
        figure.savefig(temporary, format="png")


def _split_lines(
    runs: Sequence[tuple[str, Records]], metric: Quantity, seen: dict[str, tuple[float, ...]]
) -> list[Line]:
    """A line per run and split that has the metric; notes in ``seen`` which splits there are."""
    colours, lines = _colours(len(runs)), []
    for number, (label, records) in enumerate(runs):
        for which, (split, dash) in enumerate(SPLITS.items()):
            x, y, _ = seeds_line([records], f"{split}_{metric}", Axis("round", "round"))
            if x:
                seen[split] = dash
                colour, width = colours[which if len(runs) == 1 else number], 1.3 if dash else 1.8
                lines.append(Line(label, colour, dash, x, y, width=width))
    return lines


def _colours(number: int) -> list[Any]:
    if number <= len(COLOURS):
        return list(COLOURS)
    from matplotlib import colormaps

    return [colormaps["viridis"](i / (number - 1) * 0.95) for i in range(number)]


def _legend(figure: Figure, labels: Sequence[str], splits: Mapping[str, tuple[float, ...]]) -> None:
    # One for both panels, below them: inside a panel it would sooner or later lie on a curve.
    from matplotlib.lines import Line2D

    if not splits:
        return
    shown = [(split, i, dash) for i, (split, dash) in enumerate(SPLITS.items()) if split in splits]
    if len(labels) == 1:
        handles = [Line2D([], [], color=COLOURS[i], linestyle=_style(dash), label=split) for split, i, dash in shown]
    else:
        colours = _colours(len(labels))
        handles = [Line2D([], [], color=colours[i], label=_text(label)) for i, label in enumerate(labels)]
        if len(shown) > 1:
            handles += [Line2D([], [], color=_GREY, linestyle=_style(dash), label=split) for split, _, dash in shown]
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), 130 // (longest + 8)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


# --- pieces -----------------------------------------------------------------------------------------------


@contextmanager
def _svg() -> Iterator[Callable[[], tuple[Figure, Axes]]]:
    """For making small pictures whose text stays text, the same bytes for the same numbers."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    def new() -> tuple[Figure, Axes]:
        figure = Figure(figsize=(5.0, 3.1))
        FigureCanvasSVG(figure)
        return figure, figure.add_axes((0.13, 0.155, 0.845, 0.815))

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedsim", "font.size": 9}):
        yield new


def _source(figure: Figure) -> str:
    """The picture's SVG element, without what stands before it and without metadata."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=200, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _draw(axes: Axes, lines: Sequence[Line], marks: bool = True) -> None:
    many = sum(len(line.x) for line in lines) > _MANY
    for line in lines:
        few = len(line.x) <= 30
        axes.plot(
            line.x,
            line.y,
            linestyle=_style(line.dash),
            linewidth=line.width,
            color=line.colour,
            drawstyle="steps-post" if line.steps else "default",
            # Past thirty points marks hide the line, but a point between two gaps is seen only by its mark.
            marker=line.mark if marks or len(line.x) == 1 else "",
            markersize=2.2 + line.width,
            markevery=range(len(line.x)) if few else _lone_points(line.y),
            rasterized=many,
        )
        if line.std is not None:
            low, high = ([m + sign * s for m, s in zip(line.y, line.std, strict=True)] for sign in (-1, 1))
            step: Any = "post" if line.steps else None
            axes.fill_between(line.x, low, high, step=step, color=line.colour, alpha=0.18, linewidth=0, rasterized=many)


def _frame(axes: Axes, x_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _round_ticks(axes: Axes, last: float) -> None:
    from matplotlib.ticker import MaxNLocator

    margin = 0.5 if last == 1 else 0.02 * (last - 1)
    axes.set_xlim(1 - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def _scale(axes: Axes, lines: Sequence[Line], quantity: Quantity) -> None:
    means = [v for line in lines for v in line.y if math.isfinite(v)]
    if not means:
        return
    if quantity == "loss":
        # A run that diverges would press every other curve onto the axis.
        if min(means) > 0 and max(means) > 1000 * min(means):
            axes.set_yscale("log")
        return
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    bands = [(m, s) for line in lines if line.std for m, s in zip(line.y, line.std, strict=True) if math.isfinite(m)]
    low, high = min(means + [m - s for m, s in bands]), max(means + [m + s for m, s in bands])
    margin = 0.05 * max(high - low, 0.5)
    axes.set_ylim(max(low - margin, -0.02), min(high + margin, 1.02))
    # At least 4.5 % are shown, so that every step is of whole per cents.
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _style(dash: tuple[float, ...]) -> Any:
    return (0, dash) if dash else "-"


def _positions(records: Records, key: str) -> list[float]:
    if key == "bytes":
        return [float(v) for v in accumulate((r.get("bytes_down") or 0) + (r.get("bytes_up") or 0) for r in records)]
    return [float(r.get(key) or 0.0) for r in records]


def _value(value: float | None) -> float:
    return float(value) if value is not None and math.isfinite(value) else math.nan


def _lone_points(values: Sequence[float]) -> list[int]:
    gaps = [True, *(math.isnan(v) for v in values), True]
    return [i for i in range(len(values)) if gaps[i] and not gaps[i + 1] and gaps[i + 2]]


def _text(label: str) -> str:
    # "$" would start a formula, and a leading "_" would hide a curve from the legend.
    return label.replace("$", r"\$").replace("_", " ", 1) if label.startswith("_") else label.replace("$", r"\$")
