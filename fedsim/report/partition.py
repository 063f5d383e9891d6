"""What a partition looks like: figures in numbers, a bubble plot and a heat map of classes by client.

Everything but a picture's own cells is worked out in blocks of clients, so that a million clients need no
``[K, classes]`` table.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim.data import IntArray, Partition
from fedsim.errors import DataError
from fedsim.rundir import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_BUBBLE_CLIENTS = 50
MAX_COLUMNS = 250
_BLOCK = 4_000_000  # cells of a table of class counts that are held at once
_BLUE = "#0072B2"  # of Okabe and Ito's palette, like the curves


@dataclass(frozen=True)
class PartitionStats:
    """A partition in numbers. Means are over clients, each counting once.

    Attributes:
        num_clients: K.
        num_examples: Examples of all clients; one that several clients have, or one client twice, counts each time.
        num_distinct: Different ones among them.
        num_classes: C.
        size_min: Examples of the smallest client.
        size_median: Median number of examples.
        size_mean: Mean number of examples.
        size_max: Examples of the largest client.
        gini: Gini coefficient of the sizes, in [0, 1): 0 if all are equal, 1 - 1/K if one client had everything.
        classes_min: Fewest distinct classes of a client.
        classes_mean: Mean number of distinct classes.
        classes_max: Most distinct classes of a client.
        tv_mean: Mean total variation distance, half the L1 distance, between a client's class distribution and
            that of all examples together; in [0, 1), 0 if all are alike.
        kl_mean: Mean Kullback-Leibler divergence of a client's class distribution from that of all
            examples together, in nats; 0 if all are alike.
    """

    num_clients: int
    num_examples: int
    num_distinct: int
    num_classes: int
    size_min: int
    size_median: float
    size_mean: float
    size_max: int
    gini: float
    classes_min: int
    classes_mean: float
    classes_max: int
    tv_mean: float
    kl_mean: float


def statistics(partition: Partition, labels: IntArray, num_classes: int) -> PartitionStats:
    """Sizes, classes per client, and distances to the class distribution of the whole.

    Args:
        partition: Which rows belong to which client; no client is empty.
        labels: Class of every row, ``[N]``, in ``[0, num_classes)``.
        num_classes: C, at least 1.

    Raises:
        DataError: There are no classes, or a client is empty.
    """
    _check(partition, num_classes)
    sizes = partition.sizes()
    whole = np.bincount(labels[partition.indices], minlength=num_classes) / len(partition.indices)
    distinct = np.empty(len(sizes), dtype=np.int64)
    tv, kl = np.empty(len(sizes)), np.empty(len(sizes))
    for start, counts in _blocks(partition, labels, num_classes):
        block = slice(start, start + len(counts))
        share = counts / counts.sum(axis=1, keepdims=True)
        distinct[block] = (counts > 0).sum(axis=1)
        tv[block] = np.abs(share - whole).sum(axis=1) / 2
        # 0 log 0 is 0; where a client has examples, the whole has them too.
        kl[block] = (share * np.log(np.where(share > 0, share, 1) / np.where(share > 0, whole, 1))).sum(axis=1)
    return PartitionStats(
        num_clients=len(sizes),
        num_examples=int(sizes.sum()),
        num_distinct=int((np.bincount(partition.indices) > 0).sum()),
        num_classes=num_classes,
        size_min=int(sizes.min()),
        size_median=float(np.median(sizes)),
        size_mean=float(sizes.mean()),
        size_max=int(sizes.max()),
        gini=gini(sizes),
        classes_min=int(distinct.min()),
        classes_mean=float(distinct.mean()),
        classes_max=int(distinct.max()),
        tv_mean=float(tv.mean()),
        kl_mean=max(float(kl.mean()), 0.0),
    )


def gini(sizes: IntArray) -> float:
    """Gini coefficient: half the mean absolute difference of two sizes, relative to the mean size.

    Args:
        sizes: Not negative, not all zero, ``[K]``.
    """
    ordered = np.sort(sizes).astype(np.float64)
    k = len(ordered)
    return float((2 * np.arange(1, k + 1) - k - 1) @ ordered / (k * ordered.sum()))


def class_counts(partition: Partition, labels: IntArray, num_classes: int, clients: IntArray) -> NDArray[np.int64]:
    """Examples of every class at the given clients, ``[len(clients), num_classes]``.

    Args:
        partition: Which rows belong to which client.
        labels: Class of every row, ``[N]``, in ``[0, num_classes)``.
        num_classes: C.
        clients: Client numbers, increasing.
    """
    sizes = partition.sizes()[clients]
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    rows = partition.indices[np.repeat(partition.offsets[clients], sizes) + within]
    cells = np.repeat(np.arange(len(clients)), sizes) * num_classes + labels[rows]
    return np.bincount(cells, minlength=len(clients) * num_classes).reshape(len(clients), num_classes)


def plot_bubbles(
    partition: Partition, labels: IntArray, class_names: Sequence[str], path: Path, title: str = ""
) -> None:
    """Draws a disc per client and class, its area proportional to the number of examples.

    At most 50 clients are shown, evenly spaced by number; the title says so.

    Args:
        partition: Which rows belong to which client; no client is empty.
        labels: Class of every row, ``[N]``, in ``[0, len(class_names))``.
        class_names: One name per class.
        path: The PNG to write; its folder is made.
        title: First line of the title.

    Raises:
        DataError: There are no classes, or a client is empty.
        RunError: The file cannot be written.
    """
    from matplotlib.lines import Line2D

    num_classes, k = len(class_names), len(partition)
    _check(partition, num_classes)
    clients = np.unique(np.linspace(0, k - 1, min(k, MAX_BUBBLE_CLIENTS)).round().astype(np.int64))
    counts = class_counts(partition, labels, num_classes, clients)
    width = float(np.clip(8 / len(clients), 0.2, 0.5))  # of a cell, in inches
    height = _row_height(num_classes)
    figure, axes = _figure(max(width * len(clients) + 2.6, 6.0), max(height * num_classes, 1.2) + 1.5)

    largest = 0.94 * min(width, height) * 72  # diameter of the largest disc, in points
    column, row = np.nonzero(counts)
    number = counts[column, row]
    diameter = np.maximum(largest * np.sqrt(number / counts.max()), 1.0)  # a single example must be seen
    axes.scatter(column, row, s=diameter**2, color=_BLUE, linewidths=0)
    axes.set_xlim(-0.6, len(clients) - 0.4)
    axes.set_ylim(-0.6, num_classes - 0.4)
    axes.set_axisbelow(True)
    axes.grid(True, color="#E5E5E5", linewidth=0.5)
    _client_ticks(axes, clients, width)
    _class_ticks(axes, class_names, height)
    few = "" if len(clients) == k else f"{len(clients)} of {k:,} clients, evenly spaced"
    _titles(figure, axes, title, few)
    top = int(counts.max())
    shown = sorted({max(round(top * part), 1) for part in (1, 0.25, 0.05)}, reverse=True)
    handles = [
        Line2D([], [], marker="o", linestyle="", color=_BLUE, markeredgewidth=0, label=f"{n:,}",
               markersize=max(largest * math.sqrt(n / top), 1.0))
        for n in shown
    ]  # fmt: skip
    figure.legend(handles=handles, title="examples", loc="outside right upper", frameon=False, labelspacing=1.2)
    _save(figure, path)


def plot_heatmap(
    partition: Partition, labels: IntArray, class_names: Sequence[str], path: Path, title: str = ""
) -> None:
    """Draws a column per client, coloured by the share of each class among the client's examples.

    Up to 250 clients stand in the order of their numbers. More are ordered by their most frequent class, and
    every column is the mean of neighbours in that order; the axis says so.

    Args:
        partition: Which rows belong to which client; no client is empty.
        labels: Class of every row, ``[N]``, in ``[0, len(class_names))``.
        class_names: One name per class.
        path: The PNG to write; its folder is made.
        title: First line of the title.

    Raises:
        DataError: There are no classes, or a client is empty.
        RunError: The file cannot be written.
    """
    num_classes, k = len(class_names), len(partition)
    _check(partition, num_classes)
    shares = _columns(partition, labels, num_classes)
    columns = len(shares)
    width = float(np.clip(8 / columns, 0.03, 0.5))
    height = _row_height(num_classes)
    figure, axes = _figure(max(width * columns + 2.6, 6.0), max(height * num_classes, 1.2) + 1.5)
    # White for none; ColorBrewer's Blues grow darker all the way, also in grey and to colour-blind eyes.
    image = axes.imshow(
        shares.T, cmap="Blues", vmin=0, vmax=shares.max(), aspect="auto", origin="lower", interpolation="nearest"
    )
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=30)
    bar.set_label("share of the client's examples")
    _class_ticks(axes, class_names, height)
    if columns == k:
        _client_ticks(axes, np.arange(k), width)
        _titles(figure, axes, title, "")
    else:
        axes.set_xticks([])
        axes.set_xlabel(
            f"{k:,} clients, ordered by their most frequent class, in {columns} columns of about {round(k / columns):,}"
        )
        _titles(figure, axes, title, "each column is the mean of its clients")
    _save(figure, path)


def _columns(partition: Partition, labels: IntArray, num_classes: int) -> NDArray[np.float64]:
    """Class shares by column of the heat map, ``[columns, C]``."""
    k = len(partition)
    if k <= MAX_COLUMNS:
        counts = class_counts(partition, labels, num_classes, np.arange(k))
        return np.asarray(counts / counts.sum(axis=1, keepdims=True))
    mode, peak = np.empty(k, dtype=np.int64), np.empty(k)
    for start, counts in _blocks(partition, labels, num_classes):
        mode[start : start + len(counts)] = counts.argmax(axis=1)
        peak[start : start + len(counts)] = counts.max(axis=1) / counts.sum(axis=1)
    column = np.empty(k, dtype=np.int64)
    column[np.lexsort((-peak, mode))] = np.arange(k) * MAX_COLUMNS // k
    total = np.zeros((MAX_COLUMNS, num_classes))
    for start, counts in _blocks(partition, labels, num_classes):
        np.add.at(total, column[start : start + len(counts)], counts / counts.sum(axis=1, keepdims=True))
    return np.asarray(total / np.bincount(column)[:, None])


def _blocks(partition: Partition, labels: IntArray, num_classes: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """First client and class counts of consecutive blocks of clients."""
    step = max(_BLOCK // num_classes, 1)
    for start in range(0, len(partition), step):
        clients = np.arange(start, min(start + step, len(partition)))
        yield start, class_counts(partition, labels, num_classes, clients)


def _check(partition: Partition, num_classes: int) -> None:
    if num_classes < 1:
        raise DataError("a partition's classes can only be shown for data with classes; this is a regression task")
    sizes = partition.sizes()
    if len(sizes) == 0 or sizes.min() < 1:
        raise DataError(f"client {int(sizes.argmin()) if len(sizes) else 0} of {len(sizes)} has no examples")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _row_height(num_classes: int) -> float:
    """Height of a class in inches: room for its label, up to about 120 classes; a page's worth for all of them."""
    return min(float(np.clip(4 / num_classes, 0.13, 0.4)), 16 / num_classes)


def _client_ticks(axes: Axes, clients: IntArray, width: float) -> None:
    """Labels as many columns as there is room for; ``width`` of a column in inches."""
    step = math.ceil((0.08 * len(f"{clients[-1]}") + 0.08) / width)
    at = np.arange(0, len(clients), step)
    axes.set_xticks(at, [str(c) for c in clients[at]], fontsize=8)
    axes.set_xlabel("client")


def _class_ticks(axes: Axes, names: Sequence[str], height: float) -> None:
    """Labels as many rows as there is room for; ``height`` of a row in inches."""
    at = range(0, len(names), math.ceil(0.13 / height))
    axes.set_yticks(at, [_text(names[c]) for c in at], fontsize=8)
    axes.set_ylabel("class")


def _text(name: str) -> str:
    name = name if len(name) <= 24 else name[:23] + "…"
    return name.replace("$", r"\$")  # or it would be read as a formula


def _titles(figure: Figure, axes: Axes, title: str, note: str) -> None:
    letters = max(30, int((figure.get_figwidth() - 2) * 13))  # that fit over the axes, beside the legend
    lines: list[Any] = [line for line in (textwrap.fill(title, letters).replace("$", r"\$"), note) if line]
    axes.set_title("\n".join(lines), fontsize=10)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
