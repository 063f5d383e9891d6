"""What the benchmarks share: data of a given shape, and alternating timings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedsim.data import Dataset, Split


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
