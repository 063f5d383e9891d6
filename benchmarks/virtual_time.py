"""Virtual time: how fast timetables are simulated, and what the clock takes of a run that trains.

    python -m benchmarks.virtual_time [--devices 10000] [--events 100000] [--runs 5]

First, events per second of `fedsim.schedule.simulate`: devices of unequal speed with jitter, whose availability is a
trace file that is written for this (on and off for an hour on the average, four days, repeated); by the clock on the
wall and by this process's own CPU time, which neighbours on the machine do not slow down. The first task of every
device is handed out before the first event, and is not counted.

Then a run that trains (digits, ten clients): the seconds inside of the timetable, the clock and the trips, and those of
handing out and booking tasks as well (payloads, client memory, bytes, the server's sums), as a share of the run's.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedsim import asynchronous, federation, rounds
from fedsim.clients.availability import Trace
from fedsim.clients.systems import Exponential
from fedsim.clock import Clock
from fedsim.compose import compose
from fedsim.engine.inline import InlineEngine
from fedsim.experiment import build
from fedsim.federation import Federation
from fedsim.memory import Memory
from fedsim.report.text import align
from fedsim.schedule import Schedule, simulate
from fedsim.strategies.fedasync import FedAsync
from fedsim.strategies.fedbuff import FedBuff
from fedsim.strategies.fedcompass import FedCompass

METHODS = {"fedasync": FedAsync(), "fedbuff": FedBuff(), "fedcompass": FedCompass()}
DAYS = 4


def write_trace(path: Path, devices: int) -> None:
    """Stretches of about an hour, on and off, for ``DAYS`` days."""
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["client", "on", "off"])
        for client in range(devices):
            turns = np.cumsum(rng.exponential(3600.0, 2 * 24 * DAYS) + 1)
            turns = turns[turns < 86_400 * DAYS]
            for on, off in zip(turns[::2], turns[1::2], strict=False):
                writer.writerow([client, f"{on:.3f}", f"{off:.3f}"])


def paces(schedule: Schedule, devices: int, events: int, trace: Path) -> tuple[float, float]:
    """Events per second on the wall, and per second of CPU time."""
    system = Exponential(seconds_per_step=0.15, jitter=0.05)
    availability = Trace(path=str(trace), repeat_seconds=86_400.0 * DAYS)
    availability.check(devices)
    seen = simulate(schedule, devices, lambda client: 100, system, availability)
    next(seen)
    gc.freeze()  # as `fedsim schedule` does
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        for _, _ in zip(range(events), seen, strict=False):
            pass
        return events / (time.perf_counter() - wall), events / (time.process_time() - cpu)
    finally:
        gc.unfreeze()


class Stopwatch:
    """Seconds inside of some functions; what one calls of the others is counted once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **options: Any) -> Any:
            self._depth += 1
            begin = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - begin

        return timed


def shares(method: str, models: int) -> tuple[float, float]:
    """Of a run's seconds those of the clock, and those of all that is not training."""
    exp = build(
        compose(
            [
                f"strategy={method}",
                "system=exponential",
                "system.seconds_per_step=0.15",
                "system.jitter=0.05",
                "availability=markov",
                "client.epochs=null",
                "client.steps=60",
                "partition.num_clients=10",
            ]
        )
    )
    clock, training = Stopwatch(), Stopwatch()
    kind = type(exp.program.strategy.timetable(1))  # type: ignore[attr-defined]
    places: list[tuple[Any, str, Stopwatch]] = [(InlineEngine, "result", training), (federation, "trip", clock)]
    places += [(Clock, "pop", clock), (Clock, "schedule", clock), (asynchronous.Schedule, "count", clock)]
    places += [(kind, name, clock) for name in ("begin", "arrival", "dropout", "timer")]
    before = [getattr(owner, name) for owner, name, _ in places]
    engine = InlineEngine(exp.program)
    try:
        for (owner, name, watch), function in zip(places, before, strict=True):
            setattr(owner, name, watch.around(function))
        with tempfile.TemporaryDirectory() as folder:
            fed: Federation = exp.federation(engine, Memory(Path(folder)))
            begin = time.perf_counter()
            state = rounds.first(fed, exp.info)
            for number in range(1, models + 1):
                state = rounds.following(fed, state, number)
            total = time.perf_counter() - begin
    finally:
        engine.close()
        for (owner, name, _), function in zip(places, before, strict=True):
            setattr(owner, name, function)
    return clock.seconds / total, 1 - training.seconds / total


def main() -> None:
    parser = argparse.ArgumentParser(description="Virtual time.")
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--models", type=int, default=40)
    given = parser.parse_args()
    table = [["method", "events/s", "events/s of CPU", "clock, share of a run", "all but training"]]
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.csv"
        write_trace(trace, given.devices)
        for method, strategy in METHODS.items():
            found = [
                paces(strategy.timetable(given.devices), given.devices, given.events, trace) for _ in range(given.runs)
            ]
            parts = [shares(method, given.models) for _ in range(given.runs)]
            wall, cpu = (statistics.median(column) for column in zip(*found, strict=True))
            clock, rest = (statistics.median(column) for column in zip(*parts, strict=True))
            table.append([method, f"{wall:,.0f}", f"{cpu:,.0f}", f"{100 * clock:.2f} %", f"{100 * rest:.1f} %"])
    print(align(table))


if __name__ == "__main__":
    main()
