"""``visits.csv``: who did what when, a row per client visit, with the fingerprints that `fedsim.replay` compares."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, astuple, dataclass, fields
from pathlib import Path

from fedsim.errors import ConfigError
from fedsim.rundir import GrowingFile

log = logging.getLogger(__name__)

OUTCOMES = ("done", "dropout", "late", "failed")
"""``dropout``: the client lost the task; ``late``: cut off by a deadline or over-selection; ``failed``: it raised.
Nothing came back but from those that are done."""


@dataclass(frozen=True)
class Record:
    """A visit: made, or lost on the way.

    Attributes:
        round: The round in which it was handed out; 0 in `Strategy.prepare`, one past the last in `Strategy.finalize`.
        client: Client id; -1 is the server.
        phase: ``train`` or the name of a phase.
        visit: What tells the client's visits apart: the round, or its task number.
        steps: Local steps.
        examples: Examples processed, repeats counted.
        loss: Mean training loss; NaN where none was computed.
        bytes_down: Bytes sent to the client.
        bytes_up: Bytes that it sent.
        entries: Fingerprint of what it sent (`fedsim.tree.fingerprint`).
        memory: Fingerprint of what it keeps.
        booked: The round in which it counted: that of an event-driven client's arrival.
        begin: When the client took the task, in virtual nanoseconds since the start.
        end: When its upload was through, or the task was lost.
        outcome: One of `OUTCOMES`.
    """

    round: int
    client: int
    phase: str
    visit: str
    steps: int
    examples: int
    loss: float
    bytes_down: int
    bytes_up: int
    entries: str
    memory: str
    booked: int
    begin: int = 0
    end: int = 0
    outcome: str = "done"


HEADER = ",".join(f.name for f in fields(Record)) + "\n"
LEAST = sum(f.default is MISSING for f in fields(Record))  # columns of a file from before there were more


class Visits:
    """The file, open for writing.

    Args:
        path: The file.
        keep: Visits booked in rounds after this one are dropped: they will be made again. None: all are.
    """

    def __init__(self, path: Path, keep: int | None) -> None:
        kept: list[Record] = []
        if keep is not None:
            bad: list[str] = []
            found = list(_rows(path, bad)) if path.exists() else []
            kept = [r for r in found if r.booked <= keep]
            last = max((r.booked for r in kept), default=0)
            if bad:
                log.warning("%s; left out", "; ".join(bad[:3]))
            if last < keep:
                log.warning("%s ends with round %d, but the checkpoint holds %d: visits are missing", path, last, keep)
        self._file = GrowingFile(path, HEADER + _lines(kept))

    def add(self, records: Iterable[Record]) -> None:
        """Appends rows, all in one write.

        Raises:
            RunError: The disk is full.
        """
        if text := _lines(records):
            self._file.append(text)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _lines(records: Iterable[Record]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(astuple, records))
    return text.getvalue()


def read(path: Path) -> Iterator[Record]:
    """The visits of a run, in the order in which they were booked; what a killed process half wrote is left out.

    Raises:
        ConfigError: The file is missing or damaged; names the line.
    """
    bad: list[str] = []
    for record in _rows(path, bad):
        if bad:
            break
        yield record
    if bad:
        raise ConfigError(f"{bad[0]}; restore the file from a copy")


def _rows(path: Path, bad: list[str]) -> Iterator[Record]:
    """The whole lines of the file; those that are no visits are described in ``bad``.

    Raises:
        ConfigError: The file is missing or cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError as exc:
        raise ConfigError(f"{path} does not exist; is {path.parent} a run directory?") from exc
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror or exc}; restore it from a copy") from exc
    whole = text[: text.rfind("\n") + 1]
    types = [{"int": int, "float": float, "str": str}[str(f.type)] for f in fields(Record)]
    for number, line in enumerate(whole.splitlines(), start=1):
        cells = line.split(",")
        if number == 1 and cells == HEADER.strip().split(",")[: max(LEAST, len(cells))]:
            continue
        try:
            yield Record(*(kind(cell) for kind, cell in zip(types, cells, strict=len(cells) != LEAST)))
        except ValueError as exc:
            bad.append(f"{path}:{number}: damaged line ({str(exc)[:100]})")
