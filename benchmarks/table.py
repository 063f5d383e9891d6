"""The table on the terminal, and the facts of the machine that stand beside it in the JSON file."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Row

PACKAGES = ("numpy", "ray", "hydra-core")


def show(rows: Sequence[Row]) -> None:
    """Prints rows, at once."""
    for row in rows:
        print(line(row), flush=True)


def line(row: Row) -> str:
    """A row as it is printed: ratios are of the row's time to that of the side it is compared with."""
    time = "" if row.seconds is None else f"{_shown(row.seconds)} / {row.unit}"
    ratio = "" if row.ratio is None else f"{row.ratio:6.3f} of {row.against}"
    if row.ratio is not None and row.target is not None:
        ratio += f" ({'met' if row.ratio <= row.target else 'MISSED'}: {row.target:.3g})"
    return f"{row.part}  {row.case:22} {row.side:24} {time:>20}  {ratio:42} {row.note}".rstrip()


def _shown(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{1e6 * seconds:.1f} us"
    return f"{1e3 * seconds:.2f} ms" if seconds < 1 else f"{seconds:.3f} s"


def machine(device: str) -> dict[str, Any]:
    """Versions, processor, cores, threads, date."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": 1,  # of torch, in every process
        "device": device,
    }
    if device != "cpu":
        facts["gpu"] = torch.cuda.get_device_name(device)
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:  # a GPU machine may lack ray
            facts[name] = None
    return facts


def cpu_model() -> str:
    """What the processor calls itself."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor())
