"""Runs of fedsim that die at a chosen moment.

`Server` starts this file as a process that has imported everything and then forks a process for each run: a run
costs tenths of a second, and is killed for real. A *moment* is a point between two things that a run does to the
world or to its state: before and after a client trains, and around every part of writing, replacing or removing a
file. In the middle of a write half of the bytes are in the file.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        status: Exit status; ``-9`` for SIGKILL.
        moments: What it went through, in order; empty if it was killed by a signal that cannot be caught.
        output: What it printed.
    """

    status: int
    moments: list[str]
    output: str


class Server:
    """Runs command lines of fedsim, each in a process of its own."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
            text=True,
        )

    def run(
        self, args: Sequence[str], kill: int | None = None, after: float | None = None, sign: int = signal.SIGKILL
    ) -> Ended:
        """Runs ``fedsim <args>`` to its end.

        Args:
            args: The command line.
            kill: Kill it at this moment, from 0.
            after: Or kill it after so many seconds.
            sign: The signal.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([list(args), kill, after, int(sign)]) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """Ends the server."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


# --- in the server ----------------------------------------------------------------------------------------


def serve() -> None:
    """Answers requests until standard input ends."""
    import fedsim.run
    from fedsim.compose import compose

    compose([])  # Hydra's imports
    fedsim.run.Driver._draw = lambda *_: None  # type: ignore[method-assign] # half of the time of a small run
    for line in sys.stdin:
        args, kill, after, sign = json.loads(line)
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as moments:
            pid = os.fork()
            if not pid:
                _child(args, kill, sign, output, moments)
            status = _wait(pid, after, sign)
            for file in (output, moments):
                file.seek(0)
            answer = {"status": status, "moments": moments.read().splitlines(), "output": output.read()}
        print(json.dumps(answer), flush=True)


def _wait(pid: int, after: float | None, sign: int) -> int:
    deadline = None if after is None else time.monotonic() + after
    while True:
        done, status = os.waitpid(pid, 0 if deadline is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(pid, sign)
            deadline = None
        else:
            time.sleep(0.001)


def _child(args: list[str], kill: int | None, sign: int, output: IO[str], moments: IO[str]) -> None:
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdin.close()
    seen = _Moments(kill, sign)
    seen.install()
    status = 1
    try:
        from fedsim.cli import main

        main(args)
    except SystemExit as exc:
        status = int(exc.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        moments.write("\n".join(seen.names))
        moments.flush()
        os._exit(status)


class _Moments:
    def __init__(self, kill: int | None, sign: int) -> None:
        self.kill, self.sign = kill, sign
        self.names: list[str] = []

    def pass_(self, what: str, path: Any = "") -> None:
        name = re.sub(r"^\.(.*)\.\d+-[0-9a-f]{8}\.tmp$", r"\1", os.path.basename(str(path)))
        if os.path.basename(os.path.dirname(str(path))) == "memory":
            name = f"memory/{name}"
        self.names.append(f"{what} {name}".strip())
        if len(self.names) - 1 == self.kill:
            os.kill(os.getpid(), self.sign)

    def install(self) -> None:
        """Puts a moment before, after and into everything of interest, in this process."""
        import fedsim.clients.local as local

        replace, sync, unlink, rename = os.replace, os.fsync, os.unlink, os.rename
        open_, train = pathlib.Path.open, local.Local.train

        def patched_replace(a: Any, b: Any) -> None:
            self.pass_("before replacing", b)
            replace(a, b)
            self.pass_("after replacing", b)

        def patched_rename(a: Any, b: Any) -> None:
            self.pass_("before renaming", a)
            rename(a, b)
            self.pass_("after renaming", a)

        def patched_sync(descriptor: int) -> None:
            sync(descriptor)
            self.pass_("after syncing", os.readlink(f"/proc/self/fd/{descriptor}"))

        def patched_unlink(path: Any, **options: Any) -> None:
            self.pass_("before removing", path)
            unlink(path, **options)
            self.pass_("after removing", path)

        def patched_open(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            file = open_(path, mode, *args, **options)
            return _Slow(file, self, path) if mode in ("xb", "ab") else file

        def patched_train(this: Any, *args: Any, **options: Any) -> Any:
            where = f"round {this.round} {this.phase} client {this.clients[0]}"
            self.pass_("before training", where)
            out = train(this, *args, **options)
            self.pass_("after training", where)
            return out

        patches: list[tuple[Any, str, Any]] = [
            (os, "replace", patched_replace),
            (os, "rename", patched_rename),
            (os, "fsync", patched_sync),
            (os, "unlink", patched_unlink),
            (pathlib.Path, "open", patched_open),
            (local.Local, "train", patched_train),
        ]
        for owner, name, patch in patches:
            setattr(owner, name, patch)


class _Slow:
    """A file into which bytes go in two halves."""

    def __init__(self, file: Any, moments: _Moments, path: Path) -> None:
        self._file, self._moments, self._path = file, moments, path

    def __enter__(self) -> _Slow:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        self._moments.pass_("before writing", self._path)
        written = self._file.write(data[: len(data) // 2])
        self._file.flush()
        self._moments.pass_("in the middle of writing", self._path)
        written += self._file.write(data[len(data) // 2 :])
        self._file.flush()
        self._moments.pass_("after writing", self._path)
        return int(written)


if __name__ == "__main__":
    serve()
