"""What the benchmarks share: data of a given shape, and alternating timings."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fedsim.data import Dataset, Split

# A round of `benchmarks.engines`, and of Flower beside it. The environment reaches every process of both.
CLIENTS, STEPS, BATCH, LR = 10, 20, int(os.environ.get("BENCHMARKS_BATCH", "32")), 0.01


@dataclass(frozen=True)
class RandomImages:
    """Random grey images and labels: speed does not depend on what they show."""

    num_train: int = 6000
    num_test: int = 1000
    size: int = 28
    channels: int = 1
    classes: int = 10

    def load(self, seed: int) -> Dataset:
        g = torch.Generator().manual_seed(seed)
        shape = (self.num_train + self.num_test, self.channels, self.size, self.size)
        x = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
        y = torch.randint(0, self.classes, (len(x),), generator=g)
        n = self.num_train
        names = tuple(str(c) for c in range(self.classes))
        return Dataset("random", Split(x[:n], y[:n]), Split(x[n:], y[n:]), names, (0.5,), (0.25,))


def alternate(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, run in turns; the first turn warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            begin = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(seconds: dict[str, list[float]], top: str, bottom: str) -> float:
    """Median of the ratios of neighbouring turns, which share the machine's mood."""
    return statistics.median(a / b for a, b in zip(seconds[top], seconds[bottom], strict=True))


def since_start() -> float:
    """Seconds since this process was started, to 10 ms."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class Idle:
    """The share of the machine's processor time that nobody used, since it was made or last asked."""

    def __init__(self) -> None:
        self._before = self._ticks()

    @staticmethod
    def _ticks() -> list[int]:
        return [int(n) for n in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]

    def share(self) -> float:
        now = self._ticks()
        spent = [b - a for a, b in zip(self._before, now, strict=True)]
        self._before = now
        return (spent[3] + spent[4]) / max(1, sum(spent))  # idle, and waiting for a disk


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """A temporary folder in which all else that is temporary goes: clusters too, so that the user's own is another."""
    before = os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="fb") as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = None
            os.environ.pop("TMPDIR") if before is None else os.environ.__setitem__("TMPDIR", before)


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """A cluster as ``fedsim cluster up`` starts it, with two CPUs; runs find it by ``engine.address=auto``."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "fedsim.cli", "cluster"]
    subprocess.run([*command, "up", "cpus=2", f"port={port}"], check=True, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        subprocess.run([*command, "down"], check=True, stdout=subprocess.DEVNULL)


def aim(what: str, found: float, limit: float, met: bool) -> str:
    """A line that says whether a target was met."""
    return f"  {'met   ' if met else 'MISSED'}  {what}: {found:.3g} (target {limit:g})"
