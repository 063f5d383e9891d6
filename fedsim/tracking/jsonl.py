"""A line per round in ``metrics.jsonl``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import IO, Any

from fedsim.errors import RunError
from fedsim.rundir import dumps, read_metrics, write_atomic
from fedsim.tracking import RunInfo, Status

log = logging.getLogger(__name__)


class Jsonl:
    """Appends a JSON object per round; a line is written in one call, so that a reader sees whole lines.

    NaN and infinities are written as null. A resumed run keeps the lines of the rounds that its checkpoint holds and
    drops later ones, which will be computed again.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._path = ""

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
        content = "".join(dumps(r) + "\n" for r in kept).encode()
        if not path.exists() or path.read_bytes() != content:
            write_atomic(path, content)
        self._path = str(path)
        try:
            # Unbuffered: one write() a line, and nothing to lose when the process is killed.
            self._file = path.open("ab", buffering=0)
        except OSError as exc:
            raise RunError(f"cannot open {path}: {exc.strerror or exc}") from exc

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends a line."""
        assert self._file is not None, "log() before start()"
        line = (dumps(record) + "\n").encode()
        try:
            written = self._file.write(line)
            if written != len(line):  # a nearly full disk takes a part
                raise OSError(0, f"only {written} of {len(line)} bytes were written; is the disk full?")
        except OSError as exc:
            raise RunError(
                f"cannot write round {record.get('round')} to {self._path}: {exc.strerror or exc}; free some space, "
                f"then go on with fedsim resume={self._path.removesuffix('/metrics.jsonl')}"
            ) from exc

    def finish(self, summary: Mapping[str, Any], status: Status) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
