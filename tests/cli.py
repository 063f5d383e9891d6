"""How tests run the command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: A run of a fraction of a second.
QUICK = ["rounds=1", "model.hidden=[5]", "client.epochs=1", "partition=iid", "partition.num_clients=3"]


@dataclass
class Outcome:
    """How a command ended.

    Attributes:
        status: Exit status.
        out: Standard output.
        err: Standard error.
    """

    status: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The error, which must be one line."""
        assert self.err.startswith("fedsim: ") and self.err.count("\n") == 1 and self.err.endswith("\n"), self.err
        assert "Traceback" not in self.out
        return self.err.strip()


Fedsim = Callable[..., Outcome]


def process(*args: str, cwd: Path, env: Mapping[str, str] | None = None, **options: Any) -> Outcome:
    """Runs a command in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "timeout": 120}
    done = subprocess.run([sys.executable, "-m", "fedsim.cli", *args], cwd=cwd, env=env, **(pipes | options))
    return Outcome(done.returncode, done.stdout or "", done.stderr)


def only_run(folder: Path) -> Path:
    """The one run directory below a folder."""
    (found,) = folder.rglob("config.yaml")
    return found.parent
