"""The pictures of a report, and what is said beside them: curves, clients, partitions."""

from __future__ import annotations

import base64
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain, cycle, repeat
from typing import TYPE_CHECKING, Any

from fedsim.report.blocks import Block, Heading, Key, Legend, Note, Picture, Pictures, Table
from fedsim.report.curves import (
    COLOURS,
    DASHES,
    MARKS,
    QUANTITIES,
    Axis,
    Line,
    Quantity,
    plot_lines,
    plot_sizes,
    plot_spread,
    plot_staleness,
    seeds_line,
)
from fedsim.report.runs import MODES, Group, Run, described
from fedsim.report.text import number, percent
from fedsim.report.timeline import FACTS, Timeline, draw, facts, png, read_timeline
from fedsim.report.timeline import NAME as TIMELINE

if TYPE_CHECKING:
    from fedsim.data import IntArray

AXES = {"round": "rounds", "bytes": "bytes sent", "virtual_seconds": "virtual time", "wall_seconds": "wall time"}
SIZES = ("Clients", "Examples", "Smallest", "Median", "Mean", "Largest")
_SHOWN = {"accuracy": percent, "loss": number}
_MANY_POINTS = 400  # of a picture of clients
_MOST_NAMED = 8  # lines in a picture's alternative text
_MOST_TIMELINES = 8  # that are drawn below each other
_MOST_PARTITIONS = 4  # that are drawn in a report of several runs


# --- curves -----------------------------------------------------------------------------------------------


def curves(groups: Sequence[Group]) -> Iterator[Block]:
    """Accuracy and loss against rounds, bytes and time: of one run together, of several a picture each."""
    runs = [run for g in groups for run in g.runs]
    legend = Legend(_keys(groups))
    if len(runs) > len(groups):
        yield Note(
            "A line is the mean over the seeds of a row, its band ± one sample standard deviation. "
            "It ends where the first of the seeds ends. Against time a run has the value that it had last."
        )
    if len(runs) > 1:
        yield legend
    for key, name in AXES.items():
        axis = Axis.of(key, [run.records for run in runs])
        if axis is None:
            yield Note(f"Against {name}: left out, because none was counted.")
        elif pictures := list(_panels(groups, axis)):
            yield Heading(f"Against {name}")
            yield Pictures(pictures)


def _panels(groups: Sequence[Group], axis: Axis) -> Iterator[Picture]:
    panels: list[tuple[str, Quantity, dict[str, str]]] = []
    for quantity in QUANTITIES:
        names = {"test": "test", "validation": "validation", "train": "training"}
        panels.append((quantity.capitalize(), quantity, {f"{k}_{quantity}": name for k, name in names.items()}))
    for quantity in QUANTITIES if axis.key == "round" else ():
        modes = {f"{prefix or 'client_'}{quantity}_mean": name for prefix, name in MODES.items()}
        panels.append((f"Mean {quantity} on clients' own examples", quantity, modes))
    for title, quantity, keys in panels:
        if _alone(groups):
            if lines := list(_lines_of_run(groups[0].runs[0], keys, axis)):
                yield _panel(title, quantity, lines, axis, _legend_of(lines))
            continue
        for key, name in keys.items():
            if (axis.key == "round" or name == "test") and (lines := list(_lines_of_groups(groups, key, axis))):
                yield _panel(f"{title}, {name}", quantity, lines, axis)


def _lines_of_run(run: Run, keys: Mapping[str, str], axis: Axis) -> Iterator[Line]:
    for (key, name), colour, dash in zip(keys.items(), COLOURS, (DASHES[0], DASHES[2], DASHES[1]), strict=False):
        x, y, _ = seeds_line([run.records], key, axis)
        if x:
            yield Line(name, colour, dash, x, y, width=1.3 if dash else 1.8)


def _lines_of_groups(groups: Sequence[Group], key: str, axis: Axis) -> Iterator[Line]:
    for style, g in zip(_keys(groups), groups, strict=True):
        x, y, std = seeds_line([run.records for run in g.runs], key, axis)
        if x:
            steps = std is not None and axis.key.endswith("seconds")
            yield Line(style.label, style.colour, style.dash, x, y, std, style.mark, style.width, steps)


def _panel(title: str, quantity: Quantity, lines: Sequence[Line], axis: Axis, legend: Sequence[Key] = ()) -> Picture:
    alt = f"{title} against {AXES[axis.key]}. From first to last: {_ends(lines, quantity)}."
    return Picture(title, alt, _data_url(plot_lines(lines, quantity, axis.label, axis.key == "round")), legend)


# --- clients ----------------------------------------------------------------------------------------------


def spreads(groups: Sequence[Group]) -> Iterator[Block]:
    """How accuracy, or the loss of a regression, spreads over the clients that were scored."""
    quantity, alone = groups[0].runs[0].quantity, _alone(groups)
    drawn: list[tuple[str, list[Line]]] = []
    for i, (prefix, mode) in enumerate(MODES.items()):
        lines = []
        for style, g in zip(_keys(groups), groups, strict=True):
            values = [v for run in g.runs for v in run.scores(prefix)]
            if len(values) > 1:
                look = Key(mode, COLOURS[i]) if alone else style
                lines.append(_spread_line(look, sorted(values, reverse=quantity == "loss")))
        if lines:
            drawn.append((f"{quantity.capitalize()} of each client, {mode}", lines))
    if alone and drawn:
        drawn = [(f"{quantity.capitalize()} of each client", [line for _, lines in drawn for line in lines])]
    if drawn and not alone:
        yield Note("Clients from the worst to the best; those of all seeds of a row together.")
        yield Legend(_keys(groups))
    if drawn:
        yield Pictures([_spread(title, quantity, lines, alone) for title, lines in drawn])


def _spread(title: str, quantity: Quantity, lines: Sequence[Line], alone: bool) -> Picture:
    alt = f"{title}, sorted. From the worst client to the best: {_ends(lines, quantity)}."
    return Picture(title, alt, _data_url(plot_spread(lines, quantity)), _legend_of(lines) if alone else ())


def _spread_line(look: Key, ordered: Sequence[float]) -> Line:
    last = len(ordered) - 1
    if last > _MANY_POINTS:
        ordered = [ordered[round(i * last / _MANY_POINTS)] for i in range(_MANY_POINTS + 1)]
        last = _MANY_POINTS
    x = [i / last for i in range(last + 1)]
    return Line(look.label, look.colour, look.dash, x, ordered, mark=look.mark, width=look.width)


# --- virtual time -----------------------------------------------------------------------------------------


def virtual_time(groups: Sequence[Group]) -> Iterator[Block]:
    """Which client worked when, how long clients were idle, and how old their contributions were.

    Nothing where all runs are finished and none left a timeline: every round of theirs looks the same.
    """
    if not any(run.summary is None or (run.path / TIMELINE).exists() for g in groups for run in g.runs):
        return
    runs = [(g, run, found) for g in groups for run in g.runs if (found := read_timeline(run.path, run.records))]
    if not runs:
        return
    alone, several = _alone(groups), len(runs) > len(groups)
    names = [f"{g.label}, seed {run.seed}" if several else g.label for g, run, _ in runs]
    rows = [[name, *facts(found)] for name, (_, _, found) in zip(names, runs, strict=True)]
    yield Table(
        "Clients in virtual time. Idle: the share of the time in which a client was not at work, mean, least and most; "
        "staleness: global models made since the one that a contribution started from, mean and most",
        [name.capitalize() for name in FACTS] if alone else ["run", *(name.capitalize() for name in FACTS)],
        [row[1:] for row in rows] if alone else rows,
        left=0 if alone else 1,
    )
    first = {g.label: (g.label, found) for g, _, found in reversed(runs)}
    drawn = [first[g.label] for g in groups if g.label in first][:_MOST_TIMELINES]
    if len(drawn) < len(first):
        yield Note(f"{len(drawn)} of {len(first)} are drawn; fedsim timeline draws others.")
    if max(len(found.tasks) for _, found in drawn) > 1:
        alt = "A row per client, a bar per task, from left to right in virtual time."
        title = "Who worked when" + (" (the first seed of each)" if several else "")
        yield Pictures([Picture(title, alt, _data_url(_timeline_png(groups, drawn)), wide=True)])
    stale = {g.label: sum((t.staleness for h, _, t in runs if h is g), Counter[int]()) for g in groups}
    if alone and (counts := stale[groups[0].label]):
        alt = f"Histogram of the staleness of {counts.total():,} contributions, from {min(counts)} to {max(counts)}."
        yield Pictures([Picture("Staleness of the contributions", alt, _data_url(plot_staleness(counts)))])
    elif lines := [_staleness_line(key, stale[key.label]) for key in _keys(groups) if stale[key.label]]:
        title = "Share of the contributions that were at most so many global models old"
        alt = f"{title}. From the freshest to all: {_ends(lines, 'accuracy')}."
        yield Legend([key for key in _keys(groups) if stale[key.label]])
        yield Pictures([Picture(title, alt, _data_url(plot_lines(lines, "accuracy", "staleness, at most")))])


def _timeline_png(groups: Sequence[Group], drawn: Sequence[tuple[str, Timeline]]) -> bytes:
    """``figures/timeline.png`` of a finished run, which its driver drew; what it would be of others."""
    path = groups[0].runs[0].path / "figures" / "timeline.png"
    if _alone(groups) and groups[0].finished and path.is_file():
        return path.read_bytes()
    return png(draw(drawn))


def _staleness_line(look: Key, counts: Counter[int]) -> Line:
    x = sorted(counts)
    y = [share / counts.total() for share in accumulate(counts[old] for old in x)]
    return Line(look.label, look.colour, look.dash, x, y, mark=look.mark, width=look.width, steps=True)


# --- partition --------------------------------------------------------------------------------------------


def partition(run: Run) -> Iterator[Block]:
    """How the data of a run are divided."""
    sizes, what, pictures = *_sizes(run), []
    if sizes is not None:
        yield Table(f"{what} of each client", SIZES, [_size_row(sizes)], left=0)
        if sizes.min() < sizes.max():
            alt = f"Histogram of the clients' {what[0].lower()}{what[1:]}, from {sizes.min():,} to {sizes.max():,}."
            pictures.append(Picture("Sizes of the clients", alt, _data_url(plot_sizes(sizes.tolist(), what))))
    pictures += _class_picture(run, "Classes of the clients")
    if pictures:
        yield Pictures(pictures)
    if run.summary is None and run.quantity == "accuracy" and run.config.get("partition"):
        yield Note("Which classes each client has is drawn when the run finishes; fedsim partition shows it at once.")


def partitions(groups: Sequence[Group]) -> Iterator[Block]:
    """How the data of several runs are divided: the draw of the first seed for every rule."""
    first = {g.partition: g.runs[0] for g in reversed(groups)}
    pictures: list[Picture] = []
    rows: dict[str, list[list[str]]] = {}
    for run in reversed(first.values()):
        sizes, what = _sizes(run)
        if sizes is not None:
            rule = described(run.config.get("partition")) or "the data's own clients"
            rows.setdefault(what, []).append([rule, str(run.seed), *_size_row(sizes)])
        pictures += _class_picture(run, f"Classes of the clients, seed {run.seed}")
    for what, lines in rows.items():
        yield Table(f"{what} of each client", ["Partition", "Seed", *SIZES], lines)
    if pictures:
        yield Pictures(pictures[:_MOST_PARTITIONS])
    if len(pictures) > _MOST_PARTITIONS:
        yield Note(
            f"{_MOST_PARTITIONS} of {len(pictures)} partitions are drawn; the others are in their runs' reports."
        )


def _size_row(sizes: IntArray) -> list[str]:
    import numpy as np

    counts = [f"{n:,}" for n in (len(sizes), int(sizes.sum()), int(sizes.min()), int(sizes.max()))]
    return [*counts[:3], f"{np.median(sizes):,.1f}", f"{sizes.mean():,.1f}", counts[3]]


def _sizes(run: Run) -> tuple[IntArray | None, str]:
    """Examples of every client, and which; None where there is no ``partition.npz``."""
    import numpy as np

    path = run.path / "partition.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            whole = "offsets" in file  # clients that come with the data count what they train on
            sizes: Any = np.diff(file["offsets"]) if whole else file["sizes"]
        if sizes.ndim != 1 or not len(sizes) or not np.issubdtype(sizes.dtype, np.integer):
            raise ValueError("it holds no sizes of clients")
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as exc:
        raise run.damaged(path.name, str(exc)) from exc
    found: IntArray = sizes
    return found, "Training and held-out examples" if whole else "Training examples"


def _class_picture(run: Run, title: str) -> list[Picture]:
    """``figures/partition.png``, which the driver draws: it has the labels, a run directory has not."""
    path = run.path / "figures" / "partition.png"
    if not path.is_file():
        return []
    alt = f"{described(run.config.get('partition'))}: clients from left to right, classes from bottom to top."
    return [Picture(title, alt, _data_url(path.read_bytes()), wide=True)]


# --- pieces -----------------------------------------------------------------------------------------------


def _alone(groups: Sequence[Group]) -> bool:
    return len(groups) == 1 and len(groups[0].runs) == 1


def _keys(groups: Sequence[Group]) -> list[Key]:
    """A colour, a kind of line and a mark for every row; later ones are thinner, to be seen on top of equal curves."""
    widths = chain([3.2 if len(groups) > 1 else 1.8], repeat(1.6))
    kinds = zip(cycle(COLOURS), cycle(DASHES), cycle(MARKS), widths, strict=False)
    return [Key(g.label, *kind) for g, kind in zip(groups, kinds, strict=False)]


def _legend_of(lines: Sequence[Line]) -> list[Key]:
    return [Key(line.label, line.colour, line.dash, line.mark, line.width) for line in lines]


def _ends(lines: Sequence[Line], quantity: Quantity) -> str:
    show = _SHOWN[quantity]
    named = [f"{line.label} {show(line.y[0])} to {show(line.y[-1])}" for line in lines[:_MOST_NAMED]]
    return ", ".join([*named, *([f"and {len(lines) - _MOST_NAMED} more"] if len(lines) > _MOST_NAMED else [])])


def _data_url(content: str | bytes) -> str:
    kind, data = ("svg+xml", content.encode()) if isinstance(content, str) else ("png", content)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
