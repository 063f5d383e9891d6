"""Who is told what happens in a run. Only the driver talks to trackers.

A record is a dict: ``round`` (from 1), ``virtual_seconds``, ``wall_seconds``, ``bytes_down``, ``bytes_up``,
``clients`` (how many were trained), ``failures``, ``train_loss``; in rounds with an evaluation ``test_loss``
and ``test_accuracy`` (a fraction) and perhaps ``validation_loss`` and ``validation_accuracy``; then the method's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Status = Literal["finished", "failed", "interrupted"]


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told before the first round.

    Attributes:
        run_dir: The run directory; it exists.
        rounds: Rounds of the whole run.
        describe: What runs, for people, in the order to show: ``{"strategy": "FedAvg", "data": ...}``.
        config: The resolved config, as plain dicts and lists.
        keep_rounds: Rounds that an earlier process did and that stay (0: a new run).
        sweep: Name of the sweep that this process runs it in, or None; the jobs of a sweep share it.
    """

    run_dir: Path
    rounds: int
    describe: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    keep_rounds: int = 0
    sweep: str | None = None


class Tracker(Protocol):
    """One place that a run is told to (config group ``tracker``).

    A tracker may have a method ``check()``, called when the experiment is built: it refuses what cannot work, such as
    an account that is missing, before anything is made.
    """

    def start(self, run: RunInfo) -> None:
        """Before the first round of this process."""
        ...

    def log(self, record: Mapping[str, Any]) -> None:
        """After every round."""
        ...

    def finish(self, summary: Mapping[str, Any], status: Status) -> None:
        """Once, at the end, however the run ended.

        Args:
            summary: What is in ``summary.json``; may be empty unless ``status`` is ``"finished"``.
            status: How the run ended.
        """
        ...


class Trackers:
    """Several trackers as one.

    An error in `start` or `log` ends the run: what was asked to be recorded would be missing. `finish` reaches every
    tracker that was started, and then raises the first error.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)
        self._started: list[Tracker] = []

    def start(self, run: RunInfo) -> None:
        """Starts all."""
        for tracker in self._trackers:
            tracker.start(run)
            self._started.append(tracker)

    def log(self, record: Mapping[str, Any]) -> None:
        """Tells all."""
        for tracker in self._started:
            tracker.log(record)

    def finish(self, summary: Mapping[str, Any], status: Status) -> None:
        """Finishes all that were started, the last started first; a second call does nothing."""
        first: BaseException | None = None
        while self._started:
            try:
                self._started.pop().finish(summary, status)
            except Exception as exc:  # the others must still close their files and restore the terminal
                first = first or exc
        if first is not None:
            raise first
