"""Runs with a temporary folder, a home and an environment of their own, so that what they leave can be told."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.cli import ROOT, Outcome

MARK = "FEDSIM_TESTS_ROOM"
OTHERS = (Path("/dev/shm"), Path("/tmp/ray"))  # where Ray might leave something besides


def _names(folder: Path) -> set[str]:
    shared = folder.iterdir() if folder.exists() else ()
    return {p.name for p in shared if not p.name.startswith("sem.")}  # those are of other programs


def _within(process: Path, mark: str, folder: str) -> bool:
    """Whether a process has the mark in its environment, or the folder in its command line or among its files."""
    with contextlib.suppress(OSError):
        if (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return False
    for name, wanted in (("environ", mark), ("cmdline", folder)):
        with contextlib.suppress(OSError):
            if wanted.encode() in (process / name).read_bytes():
                return True
    with contextlib.suppress(OSError):
        for link in (process / "cwd", *(process / "fd").iterdir()):
            with contextlib.suppress(OSError):
                if os.readlink(link).startswith(folder):
                    return True
    return False


@dataclass
class Room:
    """A place for runs.

    Attributes:
        path: Where they are started: the current folder.
        tmp: Their temporary folder; its path is short, for sockets.
        mark: What every process that was started in it has in its environment.
        before: What was in folders that all share.
    """

    path: Path
    tmp: Path
    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    before: dict[Path, set[str]] = field(default_factory=lambda: {p: _names(p) for p in OTHERS})

    @property
    def env(self) -> dict[str, str]:
        """Of its processes; without what this process may have of Ray."""
        plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        own = {"TMPDIR": str(self.tmp), "HOME": str(self.path), "PYTHONPATH": str(ROOT), MARK: self.mark}
        return {**plain, **own, "OMP_NUM_THREADS": "1"}

    def processes(self) -> dict[int, str]:
        """Ids and command lines of those that live; who has none is being taken apart by the kernel."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            if int(process.name) != os.getpid() and _within(process, self.mark, f"{self.tmp}/"):
                with contextlib.suppress(OSError):
                    if line := (process / "cmdline").read_bytes().replace(b"\0", b" ").decode():
                        found[int(process.name)] = line
        return found

    def left(self) -> list[str]:
        """Processes, files of the temporary folder and of others; empty if there are none."""
        found = [
            os.path.join(folder, name)
            for top in (self.tmp, self.path / ".ray")
            for folder, folders, files in os.walk(top)  # which does not mind what vanishes
            for name in (*folders, *files)
        ]
        files = [name for name in found if name != str(self.tmp / f"fedsim-{os.getuid()}")]
        more = self._shared()
        if more:  # others come and go there; what is left stays
            time.sleep(1.0)
            more &= self._shared()
        return [*files, *more, *(f"{pid}: {name}" for pid, name in self.processes().items())]

    def _shared(self) -> set[str]:
        return {str(p / name) for p, names in self.before.items() for name in _names(p) - names}

    def clean(self, seconds: float = 0.0) -> list[str]:
        """What is left after so long."""
        deadline = time.monotonic() + seconds
        while (found := self.left()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def run(self, *args: str, **env: str) -> Outcome:
        """Runs a command to its end."""
        with self.start(*args, **env) as process:
            out, err = process.communicate(timeout=120)
        return Outcome(process.returncode, out, err)

    def start(self, *args: str, code: str = "", **env: str) -> subprocess.Popen[str]:
        """Starts ``fedsim <args>``, or Python with ``code``; as a shell does, in a process group of its own."""
        command = [sys.executable, *(["-c", code] if code else ["-m", "fedsim.cli"]), *args]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.path, env=self.env | env, process_group=0, stdout=pipe, stderr=pipe, text=True
        )

    def runs(self) -> list[Path]:
        """Run directories."""
        return sorted(p.parent for p in (self.path / "runs").glob("*/*/config.yaml"))

    def state_sha256(self) -> str:
        """Of the one run, which has finished."""
        (run,) = self.runs()
        return str(json.loads((run / "summary.json").read_text())["state_sha256"])

    def end(self) -> None:
        """Ends what is left, by id, and removes the room."""
        while found := self.processes():
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for folder in (self.path, self.tmp):
            shutil.rmtree(folder)


@contextlib.contextmanager
def room() -> Iterator[Room]:
    """A room for the time of a block."""
    here = Room(Path(tempfile.mkdtemp(prefix="fs", dir="/tmp")), Path(tempfile.mkdtemp(prefix="fs", dir="/tmp")))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # of a job in the background it would be ignored, for ever
    try:
        yield here
    finally:
        here.end()


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Waits until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
