"""A run on standard output: a header, progress, and a table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TextIO

from fedsim.errors import ConfigError
from fedsim.report.text import align, human_bytes, human_seconds
from fedsim.tracking import RunInfo, Status

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LINES = 20  # plain lines of a run whose rounds are quick

#: What may happen to tasks on their way, by the key that counts it.
LOST = {"dropouts": "lost on the way", "late": "too late"}


class Console:
    """Shows a run to a person: a progress bar on a terminal, plain lines in a file or a log.

    Plain lines come for the first and the last round, for about twenty rounds between (those with an evaluation, where
    there are any), and at least every ``interval_s`` seconds.

    Args:
        style: ``"bar"``, ``"plain"``, or ``"auto"``: a bar where standard output is a terminal.
        interval_s: Plain lines: the longest silence while rounds end, > 0.
        stream: Where to write; default: standard output at the time of `start`.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        style: Literal["auto", "bar", "plain"] = "auto",
        interval_s: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if style not in ("auto", "bar", "plain"):
            raise ConfigError(f"tracker.console.style must be auto, bar or plain, got {style!r}")
        if not interval_s > 0:
            raise ConfigError(f"tracker.console.interval_s must be > 0, got {interval_s}")
        self._style, self._interval_s, self._stream, self._clock = style, interval_s, stream, clock
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def start(self, run: RunInfo) -> None:
        """Prints what runs."""
        self._out = self._stream or sys.stdout
        self._run = run
        self._begin = self._last_time = self._clock()
        self._clients = 0  # trained by this process
        self._last_line = run.keep_rounds  # the round of the last plain line
        self._evaluated, self._every = run.keep_rounds, 0  # round of the latest evaluation, and rounds between two
        self._latest: Mapping[str, Any] = {}
        self._evaluation: dict[str, Any] = {}  # the latest of each, for the bar
        bar = self._out.isatty() if self._style == "auto" else self._style == "bar"
        self._print(align([*([k, v] for k, v in run.describe.items()), ["run directory", str(run.run_dir)]], left=2))
        if run.keep_rounds:
            self._print(f"resumed after round {run.keep_rounds} of {run.rounds}")
        if bar:
            self._start_bar()

    def _start_bar(self) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        # No refresh thread: on one core it would take turns with the training.
        self._progress = Progress(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=RichConsole(file=self._out, force_terminal=True),  # whoever asks for a bar gets one
            auto_refresh=False,
            expand=True,
        )
        self._progress.start()
        self._task = self._progress.add_task("", total=self._run.rounds, completed=self._run.keep_rounds, note="")
        self._progress.refresh()

    def log(self, record: Mapping[str, Any]) -> None:
        """Moves the bar, or prints a line when one is due."""
        now = self._clock()
        self._latest = record
        self._clients += int(record.get("clients") or 0)
        number = int(record["round"])
        evaluated = {k: record[k] for k in ("test_loss", "test_accuracy") if k in record}
        if evaluated:
            self._evaluation.update(evaluated)
            self._every, self._evaluated = number - self._evaluated, number
        if self._progress is not None and self._task is not None:
            last = number >= self._run.rounds
            self._progress.update(
                self._task, completed=number, note=self._note({**record, **self._evaluation}, now, short=True)
            )
            if last or now - self._last_time > 0.2:
                self._progress.refresh()
                self._last_time = now
            return
        gap, step = number - self._last_line, -(-self._run.rounds // _LINES)
        first, last = self._last_line == self._run.keep_rounds, number >= self._run.rounds
        # Where there are evaluations, a line waits for the next one.
        due = gap >= (step if evaluated else 2 * max(step, self._every))
        if first or last or due or now - self._last_time >= self._interval_s:
            self._line(record, now)

    def _line(self, record: Mapping[str, Any], now: float) -> None:
        total = str(self._run.rounds)
        self._print(f"round {record['round']:>{len(total)}}/{total}  {self._note(record, now)}")
        self._last_line, self._last_time = int(record["round"]), now

    def _note(self, record: Mapping[str, Any], now: float, short: bool = False) -> str:
        parts = []
        if "train_loss" in record:
            parts.append(f"{'' if short else 'train '}loss {_number(record['train_loss'])}")
        if "test_loss" in record and not short:  # a terminal may have 80 columns
            parts.append(f"test loss {_number(record['test_loss'])}")
        if "test_accuracy" in record:
            parts.append(f"accuracy {_percent(record['test_accuracy'])}")
        for mode in ("personal", "finetuned"):
            if f"{mode}_accuracy_mean" in record and not short:
                parts.append(f"{mode} {_percent(record[f'{mode}_accuracy_mean'])}")
        if record.get("failures"):
            parts.append(f"{record['failures']} failed")
        parts += [f"{record[key]} {words}" for key, words in LOST.items() if record.get(key)]
        if record.get("retries"):
            parts.append(f"{record['retries']} done again")
        if now > self._begin:
            parts.append(f"{self._clients / (now - self._begin):.3g} clients/s")
        return "  ".join(parts)

    def finish(self, summary: Mapping[str, Any], status: Status) -> None:
        """Prints the table, or how to go on with an unfinished run."""
        if self._progress is not None:
            self._progress.refresh()
            self._progress.stop()
            self._progress = None
        elif self._latest and self._last_line != self._latest["round"]:
            self._line(self._latest, self._clock())
        if status != "finished":
            done = self._latest.get("round", self._run.keep_rounds)
            self._print(f"{status} after round {done} of {self._run.rounds}; run directory {self._run.run_dir}")
        if summary:
            self._print(align([*summary_rows(summary), ["run directory", str(self._run.run_dir)]], left=2))

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)


def summary_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Name and value of what ``summary.json`` says; what it does not say is left out."""
    rows = []
    final, best, totals = (summary.get(key) or {} for key in ("final", "best", "totals"))
    for which, values in (("final", final), ("best", best)):
        shown = []
        if values.get("test_accuracy") is not None:
            shown.append(f"accuracy {_percent(values['test_accuracy'])}")
        if values.get("test_loss") is not None:
            shown.append(f"loss {_number(values['test_loss'])}")
        if shown and which == "best":
            shown.append(f"(round {values.get('round')}, by {values.get('by')})")
        if shown:
            rows.append([f"{which} test", "  ".join(shown)])
    for mode, name in (("client", "clients, mean"), ("personal", "personal, mean"), ("finetuned", "fine-tuned, mean")):
        if final.get(f"{mode}_accuracy_mean") is not None:
            mean, worst = (_percent(final[f"{mode}_accuracy_{kind}"]) for kind in ("mean", "worst10"))
            rows.append([name, f"accuracy {mean}  worst tenth {worst}"])
    if "rounds" in summary:
        rows.append(["rounds", str(summary["rounds"])])
    if "clients" in totals:
        rows.append(["clients trained", f"{totals['clients']:,}"])
    rows += [[words, f"{totals[key]:,} tasks"] for key, words in LOST.items() if totals.get(key)]
    if totals.get("retries"):
        rows.append(["done again", f"{totals['retries']:,}, of lost workers or failed visits"])
    if totals.get("virtual_seconds"):
        rows.append(["virtual time", human_seconds(totals["virtual_seconds"])])
    if "wall_seconds" in totals:
        rows.append(["wall time", human_seconds(totals["wall_seconds"])])
    if "bytes_down" in totals and "bytes_up" in totals:
        rows.append(["sent", f"{human_bytes(totals['bytes_down'])} down  {human_bytes(totals['bytes_up'])} up"])
    rows += [[key, str(summary[key])] for key in ("params_sha256", "state_sha256") if key in summary]
    return rows


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.3e}"


def _percent(value: float | None) -> str:
    return "nan" if value is None else f"{100 * value:.2f} %"
