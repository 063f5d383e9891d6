"""What the benchmarks share: data of a given shape, rounds of a given size, alternating timings, rows of the table."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
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


@dataclass(frozen=True)
class Case:
    """A round that every side of a comparison does: FedAvg, every client holds ``steps * batch`` examples of its own.

    Attributes:
        model: As in ``model=<name>``.
        clients: Clients of a round.
        steps: Local steps of each: one epoch.
        batch: Examples of a step.
        population: Clients that there are; None: those of a round.
        size: Height and width of an image.
        channels: Of an image.
        lr: Of local SGD.
        num_test: Examples of the central evaluation.
        target: Class of the model, if it is none of fedsim's; ``model`` then only gives a config without fields.
        dropout: Whether a model of `benchmarks.models` has its dropout.
    """

    model: str
    clients: int = 10
    steps: int = 20
    batch: int = 32
    population: int | None = None
    size: int = 28
    channels: int = 1
    lr: float = 0.01
    num_test: int = 10_000
    target: str = ""
    dropout: bool = True

    @property
    def num_clients(self) -> int:
        """Size of the population."""
        return self.population or self.clients

    @property
    def examples(self) -> int:
        """Training examples of one client."""
        return self.steps * self.batch

    @property
    def data(self) -> RandomImages:
        """The data of all clients."""
        return RandomImages(self.num_clients * self.examples, self.num_test, self.size, self.channels)

    def overrides(self) -> list[str]:
        """The round as a user of fedsim asks for it."""
        some = [] if self.population is None else [f"participation.clients_per_round={self.clients}"]
        own = [f"model._target_={self.target}", f"+model.dropout={self.dropout}"] if self.target else []
        return [
            *(f"model={self.model}", *own),
            *("data._target_=benchmarks.common.RandomImages", f"+data.num_train={self.num_clients * self.examples}"),
            *(f"+data.num_test={self.num_test}", f"+data.size={self.size}", f"+data.channels={self.channels}"),
            *("partition=iid", f"partition.num_clients={self.num_clients}", "partition.holdout=0"),
            *(("participation=fixed", *some) if some else ()),
            *("client.epochs=1", f"client.batch_size={self.batch}", f"client.lr={self.lr}"),
        ]


CASES = {
    "logreg": Case("logreg"),
    "mlp": Case("mlp"),
    "lenet5": Case("lenet5"),
    "cnn": Case("cnn"),
    "lenet5, 50 x 10": Case("lenet5", clients=50, batch=10),
    "resnet18_gn": Case("resnet18_gn", clients=2, steps=3, size=32, channels=3, num_test=500),
}
#: Those that take seconds.
FAST = tuple(name for name in CASES if name != "resnet18_gn")

# The CIFAR-10 benchmark of pfl-research: its network as published, the same without dropout (with it no two clients can
# be computed as one), and fedsim's nearest standard one.
_PFL_CNN = "benchmarks.models.PflCNN"
_CIFAR = Case("lenet5", clients=50, steps=5, batch=10, population=1000, size=32, channels=3, lr=0.1, target=_PFL_CNN)
CIFAR = {
    "pfl's CNN": _CIFAR,
    "pfl's CNN, no dropout": replace(_CIFAR, dropout=False),
    "twocnn": replace(_CIFAR, model="twocnn", target=""),
}


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        part: Letter of the part.
        case: What is done.
        side: Who does it.
        seconds: Median.
        unit: Of what: a round, a step, ...
        ratio: To the side ``against``, median over neighbouring turns; or None.
        against: That side.
        target: The ratio is to be at most this; None: no target.
        runs: Of how many runs the medians are.
        note: Anything else.
        all: Every measurement, in seconds.
    """

    part: str
    case: str
    side: str
    seconds: float | None = None
    unit: str = "round"
    ratio: float | None = None
    against: str = ""
    target: float | None = None
    runs: int = 0
    note: str = ""
    all: list[float] = field(default_factory=list)


def rows_of(
    part: str,
    case: str,
    seconds: dict[str, list[float]],
    against: str,
    targets: dict[str, float] | None = None,
    notes: dict[str, str] | None = None,
    unit: str = "round",
) -> list[Row]:
    """A row for each side.

    Args:
        part: Letter of the part.
        case: What is done.
        seconds: Every measurement of every side, by turn.
        against: The side that others are compared with.
        targets: What the ratio of a side is to be at most.
        notes: Of a side.
        unit: What was measured.
    """
    out = []
    for side, values in seconds.items():
        compared = side != against and against in seconds
        out.append(
            Row(
                part,
                case,
                side,
                statistics.median(values),
                unit,
                ratio(seconds, side, against) if compared else None,
                against if compared else "",
                (targets or {}).get(side) if compared else None,
                len(values),
                (notes or {}).get(side, ""),
                values,
            )
        )
    return out


def alternate(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
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
