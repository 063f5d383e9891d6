"""Several runs in one table, seeds together: ``fedsim compare <run>...``.

Runs whose configs are equal but for `fedsim.report.runs.NEUTRAL` keys are one row. A row is named after what tells it
from the others.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TextIO, cast

from fedsim.errors import ConfigError, did_you_mean
from fedsim.report.runs import Group, Run, group, option, read_runs
from fedsim.report.text import align, human_bytes, human_seconds, number

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Style = Literal["text", "markdown", "csv"]
STYLES = ("text", "markdown", "csv")


@dataclass(frozen=True)
class Stat:
    """One number over the runs of a row.

    Attributes:
        mean: Mean; NaN where a run's number is.
        std: Sample standard deviation (n - 1); None for a single run.
        count: Runs that have the number.
    """

    mean: float
    std: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Stat:
        """Mean and sample standard deviation of at least one value."""
        n = len(values)
        if not all(map(math.isfinite, values)):
            return cls(math.nan, math.nan if n > 1 else None, n)
        return cls(statistics.fmean(values), statistics.stdev(values) if n > 1 else None, n)


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed only.

    Attributes:
        group: The runs, and what tells them from the others.
        stats: Dotted key of the summary (``final.test_accuracy``) to number; what not every run has is absent.
            The `GOALS` are over the runs that reach the target; ``time_ratio`` is of their mean times.
    """

    group: Group
    stats: Mapping[str, Stat]

    @property
    def label(self) -> str:
        """What tells this row from the others, ``"strategy=fedprox strategy.mu=0.1"``."""
        return self.group.label

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of its runs, increasing."""
        return tuple(run.seed for run in self.group.runs)


class Cell(NamedTuple):
    """Text of a cell, and whether it is the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class _Column:
    key: str
    name: str
    show: Callable[[float], str]
    better: int = 0  # 1: higher, -1: lower, 0: neither
    rank: int = 0  # where there is no room the highest goes first; up to `_ESSENTIAL` a label is wrapped instead


def _accuracy(value: float) -> str:
    return f"{100 * value:.2f}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _ratio(value: float) -> str:
    return f"{value:.2f}"


_ESSENTIAL = 3
_COLUMNS = (
    _Column("final.test_accuracy", "final acc %", _accuracy, 1, rank=0),
    _Column("best.test_accuracy", "best acc %", _accuracy, 1, rank=6),
    _Column("final.validation_accuracy", "validation acc %", _accuracy, 1, rank=6),
    _Column("final.test_accuracy_head", "head acc %", _accuracy, 1, rank=11),
    _Column("final.test_accuracy_middle", "middle acc %", _accuracy, 1, rank=11),
    _Column("final.test_accuracy_tail", "tail acc %", _accuracy, 1, rank=11),
    _Column("final.personal_accuracy_mean", "personal acc %", _accuracy, 1, rank=7),
    _Column("final.personal_accuracy_std", "personal acc std %", _accuracy, rank=12),
    _Column("final.personal_accuracy_worst10", "personal worst 10 % acc %", _accuracy, 1, rank=12),
    _Column("final.finetuned_accuracy_mean", "fine-tuned acc %", _accuracy, 1, rank=8),
    _Column("final.client_accuracy_mean", "client acc %", _accuracy, 1, rank=9),
    _Column("final.client_accuracy_worst10", "worst 10 % acc %", _accuracy, 1, rank=10),
    _Column("final.test_loss", "final loss", number, -1, rank=5),
    _Column("rounds", "rounds", _count, rank=13),
    _Column("totals.bytes_down", "down", human_bytes, rank=14),
    _Column("totals.bytes_up", "up", human_bytes, rank=15),
    _Column("method_mean.density", "density", _count, rank=14),
    _Column("method_mean.flops_theoretical", "FLOPs in theory", _count, rank=14),
    _Column("method_mean.flops_measured", "FLOPs run", _count, rank=14),
    _Column("totals.gradients", "gradients", _count, rank=16),
    _Column("totals.wall_seconds", "wall", human_seconds, rank=17),
)
_GOAL_COLUMNS = (
    _Column("seconds_to", "virtual time to {goal}", human_seconds, -1, rank=1),
    _Column("time_ratio", "time / {relative_to}", _ratio, -1, rank=1),
    _Column("rounds_to", "rounds to {goal}", _count, -1, rank=2),
    _Column("bytes_to", "bytes to {goal}", human_bytes, -1, rank=3),
    _Column("contributions_to", "contributions to {goal}", _count, -1, rank=4),
)
GOALS = ("rounds_to", "bytes_to", "seconds_to", "contributions_to")
"""What it took until a target was first reached: rounds, bytes, virtual seconds, visits of clients that came back."""


@dataclass(frozen=True)
class Table:
    """What `compare` found.

    Attributes:
        rows: In the order in which their first runs were named.
        target: The accuracy, a fraction, that the `GOALS` are about; None: there are none.
        note: What was left out of the folders that were named; empty if nothing was.
        relative_to: The strategy to whose time to the target other times are put in relation; empty: to none.
    """

    rows: tuple[Row, ...]
    target: float | None = None
    note: str = ""
    relative_to: str = ""

    def cells(self, width: float = math.inf) -> list[list[Cell]]:
        """Header and rows: label, seeds, then mean ± sample standard deviation of every column.

        Args:
            width: In characters; where the text would be wider columns are left out, costs first, and at last labels
                are counted as wrapped.
        """
        columns = self._columns()
        while len(columns) > 1:
            wrap = all(c.rank <= _ESSENTIAL for c in columns)
            if _width(self._grid(columns), wrap) <= width:
                break
            columns = [c for c in columns if c.rank < max(other.rank for other in columns)]
        return self._grid(columns)

    def left_out(self, width: float) -> list[str]:
        """Names of the columns for which `cells` has no room."""
        names = {cell.text for cell in self.cells(width)[0]}
        return [c.name for c in self._columns() if c.name not in names]

    def _columns(self) -> list[_Column]:
        columns = [c for c in _COLUMNS if any(c.key in row.stats for row in self.rows)]
        if self.target is not None:
            at = next(i for i, c in enumerate([*columns, _COLUMNS[-1]]) if not c.key.startswith(("final", "best")))
            words = {"goal": f"{100 * self.target:g} %", "relative_to": self.relative_to}
            goals = {*self._goals(), *(["time_ratio"] if self.relative_to else [])}
            columns[at:at] = [replace(c, name=c.name.format(**words)) for c in _GOAL_COLUMNS if c.key in goals]
        return columns

    def _goals(self) -> list[str]:
        """Of `GOALS`, what can be said of these runs: time only where there is virtual time."""
        timed = any(run.records[-1].get("virtual_seconds") for row in self.rows for run in row.group.runs)
        return [goal for goal in GOALS if timed or goal in ("rounds_to", "bytes_to")]

    def _grid(self, columns: Sequence[_Column]) -> list[list[Cell]]:
        best = {c.key: self._best(c) for c in columns}
        body = [
            [
                Cell(row.label),
                Cell(str(len(row.seeds))),
                *(Cell(_text(row, c), i in best[c.key]) for c in columns),
            ]
            for i, row in enumerate(self.rows)
        ]
        return [[Cell("run"), Cell("seeds"), *(Cell(c.name) for c in columns)], *body]

    def _best(self, column: _Column) -> set[int]:
        """Rows that are best in a column: each among those with its own partition, and ties all.

        What not all seeds have reached is no candidate: the mean over the luckier ones says too much.
        """
        winners: set[int] = set()
        if not column.better:
            return winners
        peers: dict[object, list[int]] = {}
        for i, row in enumerate(self.rows):
            if row.group.finished and (column.key in row.stats or column.key in GOALS):
                peers.setdefault(row.group.partition, []).append(i)
        for rows in peers.values():
            means = {i: s.mean for i in rows if (s := self.rows[i].stats.get(column.key)) and _whole(self.rows[i], s)}
            if len(rows) > 1 and means:
                top = column.show(max(means.values(), key=lambda v: column.better * v))
                winners |= {i for i, mean in means.items() if column.show(mean) == top}  # what reads equal is a tie
        return winners

    def text(self) -> str:
        """Plain text, every column of it."""
        return align([[cell.text for cell in row] for row in self.cells()])

    def markdown(self) -> str:
        """A table in GitHub's Markdown, the best of each column in bold."""
        header, *body = self.cells()
        lines = [[_escape(c.text) for c in header], [":--", *["--:"] * (len(header) - 1)]]
        lines += [[f"**{_escape(c.text)}**" if c.best else _escape(c.text) for c in row] for row in body]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def csv(self) -> str:
        """Every number of the summaries, a line per row: ``<key>_mean`` and ``<key>_std`` (of a sample).

        Fractions, bytes and seconds, to twelve significant digits. ``seeds`` is their number, as in the other formats,
        ``seed_list`` says which; ``<target>_seeds`` is the number of those that reached the target.
        Empty: a row does not have it; no deviation of a single run.
        """
        keys = dict.fromkeys(key for row in self.rows for key in row.stats)
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        names = {key: key.replace(".", "_") for key in keys if key not in (*GOALS, "time_ratio")}
        head = [f"{name}_{part}" for name in names.values() for part in ("mean", "std")]
        goals = [] if self.target is None else self._goals()
        head += [f"{goal}_{self.target:g}_{part}" for goal in goals for part in ("mean", "std", "seeds")]
        head += [f"time_ratio_{self.target:g}"] if self.relative_to else []
        writer.writerow(["run", "seeds", "seed_list", *head])
        for row in self.rows:
            line = [part for key in names for part in _plain(row.stats.get(key))]
            for goal in goals:
                stat = row.stats.get(goal)
                line += [*_plain(stat), str(stat.count if stat else 0)]
            line += _plain(row.stats.get("time_ratio"))[:1] if self.relative_to else []
            writer.writerow([row.label, len(row.seeds), " ".join(map(str, row.seeds)), *line])
        return out.getvalue().rstrip("\n")

    def rich(self, width: float = math.inf) -> RichTable:
        """The same cells as `text`, for a terminal, the best of each column in bold; as wide as `text` is.

        Args:
            width: Of the terminal, in characters. Where there is no room columns are left out, then labels continue
                on a further line, never inside a word.
        """
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        header, *body = grid = self.cells(width)
        table = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        words = _longest_word(grid)
        for i, cell in enumerate(header):
            table.add_column(
                Text(cell.text), justify="right" if i else "left", no_wrap=i > 0, min_width=None if i else words
            )
        for row in body:
            # Text: a label may hold square brackets, which rich reads as markup
            table.add_row(*(Text(cell.text, style="bold" if cell.best else "") for cell in row))
        return table

    def show(self, style: Style = "text", stream: TextIO | None = None) -> None:
        """Prints it, and what was left out below it (on standard error where the table is for a program).

        Args:
            style: ``text``: on a terminal with lines and colours, and as wide as that; plain and whole elsewhere.
            stream: Where to; default: standard output.
        """
        stream = stream or sys.stdout
        if style != "text":
            print(self.markdown() if style == "markdown" else self.csv(), file=stream)
            if self.note:
                print(self.note, file=sys.stderr)
            return
        if not stream.isatty():
            print("\n".join([self.text(), *([self.note] if self.note else [])]), file=stream)
            return
        from rich.console import Console

        console = Console(file=stream, highlight=False, markup=False)
        width, notes = console.width, [self.note] if self.note else []
        if missing := self.left_out(width):
            notes.append(f"no room for {', '.join(missing)}; format=csv has every number")
        # A word that is wider than the terminal is for the terminal to break.
        console.print(self.rich(width), width=max(width, _width(self.cells(width), wrap=True)), crop=False)
        for note in notes:
            console.print(note)


def compare(paths: Sequence[Path], target: float | None = None, relative_to: str = "") -> Table:
    """Reads finished runs and puts those that differ in their seed only together.

    Args:
        paths: Run directories, or folders of them (``runs/sweep``), whose unfinished runs are left out.
        target: Test accuracy, a fraction in (0, 1]: adds what it took until it was first reached (`GOALS`).
        relative_to: A strategy, such as ``fedcompass``: adds the mean virtual time to the target as a multiple of that
            strategy's, under the same partition, system and model.

    Raises:
        ConfigError: Nothing to compare; not a run directory; a run that is named and not finished, is damaged, or is
            named twice; two runs of one experiment with one seed, which would be counted twice; runs of different data;
            a target of runs without an accuracy; no run of the strategy ``relative_to``, or several settings of it.
    """
    if not paths:
        raise ConfigError("compare needs at least one run directory, like `fedsim compare runs/sweep`")
    found = read_runs(paths)
    table = tabulate(group(found.runs), target, found.note)
    return _related(table, relative_to) if relative_to else table


def tabulate(groups: Sequence[Group], target: float | None = None, note: str = "") -> Table:
    """The table of runs that were read, as `compare` does it; unfinished ones count as far as they came."""
    if target is not None:
        for run in (run for g in groups for run in g.runs):
            if not any("test_accuracy" in r for r in run.records):
                raise ConfigError(
                    f"target={target:g}: {run.path} has no test accuracy in its metrics; leave target out"
                )
            if len(run.records) != run.records[-1]["round"]:  # bytes until a target would be too few
                raise ConfigError(
                    f"target={target:g}: {run.path}/metrics.jsonl lacks rounds: it has {len(run.records)} of "
                    f"{run.records[-1]['round']}; restore it from a copy, or leave target out"
                )
    return Table(tuple(_row(g, target) for g in groups), target, note)


def draw(table: Table, path: Path) -> None:
    """Draws the rows of a table against virtual time, and the target (`fedsim.report.curves.plot_against_time`).

    Raises:
        ConfigError: The runs took no virtual time.
        RunError: The file cannot be written.
    """
    from fedsim.report.curves import plot_against_time

    rows = [(row.label, [run.records for run in row.group.runs]) for row in table.rows]
    plot_against_time(rows, table.rows[0].group.runs[0].quantity, path, table.target)


def target(text: str) -> float:
    """An accuracy that a user wrote.

    Raises:
        ConfigError: It is no fraction in (0, 1].
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        hint = f"; {value:g} % is target={value / 100:g}" if 1 < value <= 100 else ", such as target=0.9"
        raise ConfigError(f"target must be an accuracy as a fraction in (0, 1], got '{text}'{hint}")
    return value


def shown_as(text: str) -> Style:
    """A format that a user wrote.

    Raises:
        ConfigError: There is no such format.
    """
    if text not in STYLES:
        raise ConfigError(f"format must be one of {', '.join(STYLES)}, got '{text}'{did_you_mean(text, STYLES)}")
    return cast(Style, text)


def _row(members: Group, target: float | None) -> Row:
    known = [column.key for column in _COLUMNS]
    numbers = [run.numbers(known) for run in members.runs]
    stats = {k: Stat.of([n[k] for n in numbers]) for k in numbers[0] if all(k in n for n in numbers)}
    if target is not None:
        hits = [found for run in members.runs if (found := reached(run, target))]
        for key in GOALS:
            if values := [found[key] for found in hits if key in found]:
                stats[key] = Stat.of(values)
    return Row(members, stats)


def reached(run: Run, target: float) -> dict[str, float] | None:
    """What the first evaluation at the target had taken, of the `GOALS`; None: it was never reached.

    Bytes are those down and up together; what was sent before round 1 counts, too, once the run is finished. There is
    no ``seconds_to`` of a run without virtual time.

    Args:
        run: A run whose metrics lack no round.
        target: The test accuracy, a fraction.
    """
    sent, contributions = run.numbers().get("totals.bytes_before", 0.0), 0.0
    for record in run.records:
        sent += (record.get("bytes_down") or 0) + (record.get("bytes_up") or 0)
        contributions += record.get("clients") or 0
        accuracy = record.get("test_accuracy")
        if accuracy is not None and accuracy >= target:
            goals = {"rounds_to": record["round"], "bytes_to": sent, "contributions_to": contributions}
            seconds = record.get("virtual_seconds")
            return goals | ({"seconds_to": seconds} if seconds else {})
    return None


def _related(table: Table, strategy: str) -> Table:
    """The table with ``time_ratio``: the time to the target over that of the row with a strategy.

    Raises:
        ConfigError: There is no target or no such row, or a row has several to be put in relation to.
    """
    if table.target is None:
        raise ConfigError(f"relative_to={strategy} is about the time to a target; add target=, such as target=0.8")
    names = [option("strategy", row.group.runs[0].leaves.get("strategy._target_", "?")) for row in table.rows]
    if strategy not in names:
        raise ConfigError(
            f"relative_to={strategy}: no run is of that strategy{did_you_mean(strategy, names)}; "
            f"there are {', '.join(dict.fromkeys(names))}"
        )
    rows, partial = [], []
    for row in table.rows:
        same = [
            r for r, name in zip(table.rows, names, strict=True) if name == strategy and _setting(r) == _setting(row)
        ]
        if len(same) > 1:
            raise ConfigError(
                f"relative_to={strategy}: '{row.label}' can stand in relation to {', '.join(r.label for r in same)}; "
                "name runs of one of them only"
            )
        stats, own = dict(row.stats), row.stats.get("seconds_to")
        base = same[0].stats.get("seconds_to") if same else None
        if base and not _whole(same[0], base):
            partial.append(same[0].label)
        elif own and base:
            stats["time_ratio"] = Stat(own.mean / base.mean, None, own.count)
        rows.append(Row(row.group, stats))
    note = [f"not every seed of {label} reached the target: no time is put in relation to it" for label in partial[:1]]
    return replace(table, rows=tuple(rows), relative_to=strategy, note="; ".join([*filter(None, [table.note]), *note]))


def _setting(row: Row) -> tuple[tuple[str, str], ...]:
    """What rows must have in common for their times to stand in relation."""
    owners = ("data", "partition", "system", "availability", "model")
    return tuple(sorted((k, v) for k, v in row.group.runs[0].essential.items() if k.partition(".")[0] in owners))


def _whole(row: Row, stat: Stat) -> bool:
    """Whether every run of the row has the number."""
    return stat.count == len(row.seeds) and not math.isnan(stat.mean)


def _text(row: Row, column: _Column) -> str:
    stat = row.stats.get(column.key)
    if stat is None:
        return "-"
    if math.isnan(stat.mean):
        return "nan"
    # No spread where there is none to see: equal bytes in every run are the rule.
    text = column.show(stat.mean) if not stat.std else f"{column.show(stat.mean)} ± {column.show(stat.std)}"
    return text if stat.count == len(row.seeds) else f"{text} ({stat.count} of {len(row.seeds)})"


def _width(grid: Sequence[Sequence[Cell]], wrap: bool = False) -> int:
    """Of the table in characters; ``wrap``: with labels on as many lines as they have words."""
    columns = [max(len(cell.text) for cell in column) for column in zip(*grid, strict=True)]
    return sum([_longest_word(grid) if wrap else columns[0], *columns[1:]]) + 2 * (len(columns) - 1)


def _longest_word(grid: Sequence[Sequence[Cell]]) -> int:
    return max(len(word) for row in grid for word in row[0].text.split())


def _plain(stat: Stat | None) -> list[str]:
    return ["", ""] if stat is None else [_digits(stat.mean), "" if stat.std is None else _digits(stat.std)]


def _digits(value: float) -> str:
    return repr(float(f"{value:.12g}"))  # without the tail of 0.27999999999999997


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]$~])", r"\\\1", text)
