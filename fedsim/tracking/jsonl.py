"""A line per round in ``metrics.jsonl``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fedsim.rundir import GrowingFile, dumps, read_metrics
from fedsim.tracking import RunInfo, Status

log = logging.getLogger(__name__)


class Jsonl:
    """Appends a JSON object per round; a line is written in one call, so that a reader sees whole lines.

    NaN and infinities are written as null. A resumed run keeps the lines of the rounds that its checkpoint holds and
    drops later ones, which will be computed again.
    """

    def __init__(self) -> None:
        self._file: GrowingFile | None = None

    def start(self, run: RunInfo) -> None:
        """Opens the file, cut to ``run.keep_rounds`` rounds."""
        path = run.run_dir / "metrics.jsonl"
        kept = [r for r in read_metrics(path) if r["round"] <= run.keep_rounds] if path.exists() else []
        last = kept[-1]["round"] if kept else 0
        if last < run.keep_rounds:
            log.warning(
                "%s ends with round %d, but the checkpoint holds %d rounds: the lines between are lost",
                path, last, run.keep_rounds,
            )  # fmt: skip
        self._file = GrowingFile(path, "".join(dumps(r) + "\n" for r in kept))

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends a line."""
        assert self._file is not None, "log() before start()"
        self._file.append(dumps(record) + "\n")

    def finish(self, summary: Mapping[str, Any], status: Status) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
