"""Who was at work when, in virtual time: a timeline of the clients of a run, and a picture of one or several.

All is read from ``visits.csv`` and ``metrics.jsonl``. A task that is under way when a run ends is in neither.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedsim import visits
from fedsim.errors import ConfigError
from fedsim.report.curves import COLOURS, Axis, Records
from fedsim.report.runs import labels_of, read_runs, staleness_of
from fedsim.report.text import align, human_seconds, percent
from fedsim.rundir import read_metrics, replacing, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "timeline.csv"
_MOST_RUNS = 12  # of a picture
_ROWS = 40  # of a picture, over all its panels
_FEWEST = 6  # of a panel
_MODELS = 30  # global models of a window
_MOST_LINES = 80  # at models, past which they are a grey surface
_LOOK = {
    "done": (COLOURS[4], "done"),
    "dropout": (COLOURS[1], "lost on the way"),
    "late": (COLOURS[5], "cut off: too late"),
    "failed": (COLOURS[6], "failed"),
    "unknown": ("#D9D9D9", "at work or not: the run had ended"),
}
_NS = 1e-9


class Task(NamedTuple):
    """A stretch of a client's work.

    Attributes:
        begin: When it took the task, nanoseconds.
        end: When its upload was through, or the task was lost, nanoseconds.
        steps: Local steps.
        outcome: Of `fedsim.visits.OUTCOMES`.
    """

    begin: int
    end: int
    steps: int
    outcome: str


@dataclass(frozen=True)
class Timeline:
    """When the clients of a run were at work.

    Attributes:
        tasks: Of every client that was given one, its tasks in the order of their beginnings.
        models: When each global model was made, nanoseconds.
        end: When the run ended, nanoseconds.
        staleness: How many contributions were that many models old; empty where nothing says so.
        open_ended: Whether clients may have been at work when the run ended.
    """

    tasks: Mapping[int, Sequence[Task]]
    models: Sequence[int]
    end: int
    staleness: Counter[int]
    open_ended: bool = False

    @property
    def contributions(self) -> int:
        """Tasks that were done."""
        return sum(task.outcome == "done" for tasks in self.tasks.values() for task in tasks)

    @cached_property
    def busy(self) -> dict[int, int]:
        """Nanoseconds that each client was at work, lost work included."""
        found = {}
        for client, tasks in self.tasks.items():
            total = reached = 0
            for task in tasks:  # tasks of several phases may overlap
                total += max(0, min(task.end, self.end) - max(task.begin, reached))
                reached = max(reached, task.end)
            found[client] = total
        return found

    @cached_property
    def idle(self) -> dict[int, int]:
        """Nanoseconds that each client was not at work: it waited, was away, or was not chosen.

        They are counted from time 0 to the end of the run; where a client may have been at work then, to the end of its
        last task, because what came after it is not known.
        """
        ends = {client: max(t.end for t in tasks) for client, tasks in self.tasks.items()}
        return {c: (min(ends[c], self.end) if self.open_ended else self.end) - busy for c, busy in self.busy.items()}

    @property
    def idle_shares(self) -> list[float]:
        """Idle time of each client as a share of the time that is counted."""
        pairs = ((self.idle[c], self.busy[c]) for c in self.tasks)
        return [idle / (idle + busy) for idle, busy in pairs if idle + busy]

    def csv(self) -> str:
        """A line per client: tasks, those that were done, seconds at work and idle."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["client", "tasks", "contributions", "busy_seconds", "idle_seconds"])
        for client, tasks in sorted(self.tasks.items()):
            done = sum(task.outcome == "done" for task in tasks)
            writer.writerow([client, len(tasks), done, self.busy[client] / 1e9, self.idle[client] / 1e9])
        return out.getvalue()


def read_timeline(run: Path, records: Records | None = None) -> Timeline | None:
    """The timeline of a run, finished or not; None where it took no virtual time, or no visit says when it was.

    Args:
        run: The run directory.
        records: Its metrics, where the caller has them.

    Raises:
        ConfigError: ``visits.csv`` or ``metrics.jsonl`` is damaged, or there are no metrics.
    """
    records = read_metrics(run) if records is None else records
    models = [round(1e9 * float(r.get("virtual_seconds") or 0.0)) for r in records]
    path = run / "visits.csv"
    if not any(models) or not path.exists():
        return None
    tasks: dict[int, list[Task]] = {}
    for record in visits.read(path):
        if not 0 <= record.begin <= record.end:
            raise ConfigError(
                f"{path} is damaged: client {record.client} begins at {record.begin} ns and ends at {record.end} ns; "
                "restore the file from a copy"
            )
        if record.client >= 0:  # the server has no device that could wait
            tasks.setdefault(record.client, []).append(Task(record.begin, record.end, record.steps, record.outcome))
    if not any(task.end for found in tasks.values() for task in found):
        return None  # written before visits had times
    for found in tasks.values():
        found.sort()
    stale = Counter[int]()
    for r in records:
        stale.update(staleness_of(run, r))
    return Timeline(tasks, models, models[-1], stale, any("staleness" in r for r in records))


def write_own_timeline(run: Path, label: str) -> None:
    """Writes ``timeline.csv`` and, of more than one client, ``figures/timeline.png`` of a run that ends.

    Nothing is written, and what an earlier end left is removed, where no virtual time passed.

    Args:
        run: The run directory; metrics and visits are complete.
        label: The run's name, for the picture.

    Raises:
        FedsimError: The run cannot be read, or a file not be written.
    """
    found, table, picture = read_timeline(run), run / NAME, run / "figures" / "timeline.png"
    for old in (table, picture):
        old.unlink(missing_ok=True)
    if found is None:
        return
    write_atomic(table, found.csv())
    if len(found.tasks) > 1:
        _save(draw([(label, found)]), picture)


def plot_timeline(runs: Sequence[tuple[str, Path]], path: Path, seconds: float | None = None) -> None:
    """Draws who was at work when: a row per client, a panel per run, all on one axis of virtual time.

    At most 40 rows are drawn, from the fastest client to the slowest, and the first global models only where there are
    many; the picture says so.

    Args:
        runs: Label and run directory of each, at least one.
        path: The ``.png``, ``.pdf`` or ``.svg`` to write; its folder is made.
        seconds: How much of the virtual time is drawn, from its beginning; None: what fits.

    Raises:
        ConfigError: A run has no timeline, or a file is damaged.
        RunError: The file cannot be written.
    """
    if not runs:
        raise ValueError("plot_timeline needs at least one run, got none")
    _save(draw([(label, _needed(run)) for label, run in runs], seconds), path)


def command(paths: Sequence[Path], out: Path, seconds: str | None = None) -> None:
    """``fedsim timeline``: draws the runs, and prints how much their clients waited.

    Args:
        paths: Run directories, or folders of them.
        out: The picture to write.
        seconds: How much is drawn, as it was typed.

    Raises:
        ConfigError: ``seconds`` is no time, there are too many runs, or one has no timeline.
        RunError: The picture cannot be written.
    """
    shown = None if seconds is None else _seconds(seconds)
    found = read_runs(paths, unfinished=True)
    if len(found.runs) > _MOST_RUNS:
        raise ConfigError(
            f"fedsim timeline draws at most {_MOST_RUNS} runs in one picture, got {len(found.runs)}; name fewer"
        )
    essentials = [run.essential for run in found.runs]
    kinds = [e for i, e in enumerate(essentials) if e not in essentials[:i]]
    names = labels_of(kinds)
    seeds = len({run.seed for run in found.runs}) > 1
    labels = [
        names[kinds.index(e)] + (f" seed={run.seed}" if seeds else "")
        for e, run in zip(essentials, found.runs, strict=True)
    ]
    lines = [(label, _needed(run.path, run.records)) for label, run in zip(labels, found.runs, strict=True)]
    _save(draw(lines, shown), out)
    print(align([["run", *FACTS], *([label, *facts(t)] for label, t in lines)]))
    print("\n".join([str(out), *([found.note] if found.note else [])]))


FACTS = ("clients", "contributions", "idle", "least idle", "most idle", "staleness", "stalest", "virtual time")
"""Names of `facts`."""


def facts(timeline: Timeline) -> list[str]:
    """What a timeline comes to, in words: clients, contributions, idle shares, staleness, duration."""
    shares, stale = timeline.idle_shares, timeline.staleness
    idle = [percent(f(shares) if shares else None) for f in (statistics.fmean, min, max)]
    mean = sum(t * n for t, n in stale.items()) / stale.total() if stale.total() else None
    return [
        f"{len(timeline.tasks):,}",
        f"{timeline.contributions:,}",
        *idle,
        *(["–", "–"] if mean is None else [f"{mean:.2f}", f"{max(stale):,}"]),
        human_seconds(timeline.end * _NS),
    ]


def _needed(run: Path, records: Records | None = None) -> Timeline:
    found = read_timeline(run, records)
    if found is None:
        raise ConfigError(
            f"{run} has no timeline: its clients take no virtual time, or it was made before visits had times; run it "
            "with a `system` whose steps take time, or leave it out"
        )
    return found


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"seconds must be a virtual time > 0 in seconds, such as seconds=100, got '{text}'")
    return value


# --- the picture ------------------------------------------------------------------------------------------


def draw(runs: Sequence[tuple[str, Timeline]], seconds: float | None = None) -> Figure:
    """The picture of `plot_timeline`, to be saved.

    Args:
        runs: Label and timeline of each, at least one.
        seconds: How much is drawn, from the beginning; None: what fits.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    lines = [timeline for _, timeline in runs]
    end = max(timeline.end for timeline in lines)
    window = end if seconds is not None else min(end, _window(lines))
    window = min(end, round(seconds * 1e9)) if seconds is not None else window
    rows = _rows(lines, window)
    axis = Axis.of("virtual_seconds", [[{"virtual_seconds": window * _NS}]]) or Axis("virtual_seconds", "")
    unit = axis.unit * 1e9  # nanoseconds of a unit
    height = 0.16 * max(len(rows), 4) + 0.45
    figure = Figure((10, len(runs) * height + 1.0), dpi=150, layout=ConstrainedLayoutEngine(h_pad=0.04, w_pad=0.08))
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    seen: set[str] = set()
    marked = False
    for axes, (label, timeline) in zip(panels, runs, strict=True):
        marked |= _panel(axes, timeline, rows, window, unit, seen)
        axes.set_title(_title(label, timeline), fontsize=9, loc="left")
        axes.set_ylabel("client", fontsize=8)
    panels[-1].set_xlabel(axis.label, fontsize=9)
    handles: list[Any] = [Patch(color=colour, label=name) for key, (colour, name) in _LOOK.items() if key in seen]
    if marked:
        handles.append(panels[0].plot([], [], color="#444444", linewidth=0.8, label="new global model")[0])
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.suptitle(_heading(lines, rows, window, end), fontsize=9)
    return figure


def _window(lines: Sequence[Timeline]) -> int:
    """So much that the first models can be seen, of the run with the rarest ones three, and a few tasks of a client."""

    def until(timeline: Timeline, count: int) -> int:
        return timeline.models[min(count, len(timeline.models)) - 1]

    durations = [t.end - t.begin for line in lines for tasks in line.tasks.values() for t in tasks[:1]]
    least = max(max(until(line, 3) for line in lines), round(5 * statistics.median(durations)))
    return max(min(until(line, _MODELS) for line in lines), least)


def _rows(lines: Sequence[Timeline], window: int) -> list[int]:
    """Clients that are drawn, the fastest first: those that were at work, in every run if there are such."""
    clients = [{c for c, tasks in line.tasks.items() if tasks[0].begin < window} for line in lines]
    common = set.intersection(*clients)
    chosen = common if len(common) > 1 else set.union(*clients)
    ordered = sorted(chosen, key=lambda c: (_pace(lines, c), c))
    most = max(_FEWEST, _ROWS // len(lines))
    if len(ordered) <= most:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (most - 1))] for i in range(most)]


def _pace(lines: Sequence[Timeline], client: int) -> float:
    """Nanoseconds per local step; infinite where nothing was done."""
    tasks = [t for line in lines for t in line.tasks.get(client, ()) if t.outcome == "done"]
    steps = sum(t.steps for t in tasks)
    return sum(t.end - t.begin for t in tasks) / steps if steps else math.inf


def _panel(axes: Axes, timeline: Timeline, rows: Sequence[int], window: int, unit: float, seen: set[str]) -> bool:
    """One run; notes in ``seen`` which outcomes it has, and returns whether its models are marked."""
    points = 9.0 * 72 / window  # of the picture's width, per nanosecond
    shown = {y: [t for t in timeline.tasks.get(c, ()) if t.begin < window] for y, c in enumerate(rows)}
    widths = [t.end - t.begin for tasks in shown.values() for t in tasks]
    edge = 1.0 if widths and statistics.median(widths) * points > 4 else 0.0  # edges hide bars that are thinner
    for y, tasks in shown.items():
        for outcome, (colour, _) in _LOOK.items():
            bars = [(t.begin / unit, (t.end - t.begin) / unit) for t in tasks if t.outcome == outcome]
            if bars:
                seen.add(outcome)
                axes.broken_barh(
                    bars, (y - 0.36, 0.72), facecolors=colour, edgecolors="white", linewidth=edge, zorder=2
                )
        last = max((t.end for t in timeline.tasks.get(rows[y], ())), default=0)
        if timeline.open_ended and last < (end := min(timeline.end, window)):
            seen.add("unknown")
            colour = _LOOK["unknown"][0]
            axes.broken_barh([(last / unit, (end - last) / unit)], (y - 0.36, 0.72), facecolors=colour, zorder=2)
        for task in tasks:
            text, wide = str(task.steps), (min(task.end, window) - task.begin) * points
            if task.outcome == "done" and wide > 4.0 * len(text) + 3:
                middle = (task.begin + min(task.end, window)) / 2 / unit
                axes.text(middle, y, text, fontsize=6, ha="center", va="center", zorder=3)
    marks = [m for m in timeline.models if m <= window]
    marked = 0 < len(marks) <= _MOST_LINES
    if marked:  # behind the bars, whose ends must be seen
        axes.vlines([m / unit for m in marks], -0.5, len(rows) - 0.5, color="#333333", linewidth=0.8, zorder=1)
    if timeline.end < window:
        axes.axvspan(timeline.end / unit, window / unit, color="#EEEEEE", linewidth=0, zorder=0)
    axes.set_xlim(0, window / unit)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [str(c) for c in rows], fontsize=6)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return marked


def _title(label: str, timeline: Timeline) -> str:
    values = dict(zip(FACTS, facts(timeline), strict=True))
    shares = timeline.idle_shares
    words = [
        f"clients idle {statistics.fmean(shares) if shares else 0:.0%} of the time",
        f"{len(timeline.models):,} global models",
    ]
    if timeline.staleness:
        words.append(f"mean staleness {values['staleness']}")
    return ": ".join([*([label.replace("$", r"\$")] if label else []), ", ".join(words)])


def _heading(lines: Sequence[Timeline], rows: Sequence[int], window: int, end: int) -> str:
    everyone = len(set().union(*(line.tasks for line in lines)))
    who = f"{len(rows)} of {everyone:,} clients" if len(rows) < everyone else f"{everyone} clients"
    when = f"the first {human_seconds(window * _NS)} of {human_seconds(end * _NS)}" if window < end else "the whole run"
    return f"{who}, from the fastest to the slowest; {when}; numbers in bars are local steps"


def save(runs: Sequence[tuple[str, Timeline]], path: Path) -> None:
    """Draws timelines as `plot_timeline`, of which the caller has the tasks."""
    _save(draw(runs), path)


def png(figure: Figure) -> bytes:
    """A picture for a page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)  # in here, so that a refusal is one clear line too
        figure.savefig(temporary, format=path.suffix[1:].lower())
