"""Whole rounds, a tenth of a central evaluation included, of fedsim and pfl-research.

    python -m benchmarks.whole --pfl-python pfl/bin/python [--cases logreg mlp lenet5 cnn] [--turns 7]

A turn is one round and one evaluation (10,000 test images) of every side, one side after the other: fedsim in one
process, one by one and batched; the same with two workers on a kept cluster, whose start is not counted; pfl-research.
A whole round is the round and a tenth of the evaluation, as with evaluation every tenth round. The first turn is
dropped. What is equal on pfl's side, and what is not, is said in `benchmarks.pfl_baseline`. Neither side writes files
here: fedsim's command also adds a line to its metrics, and a checkpoint every two seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.common import CASES, Row, cluster, own_folder, rows_of
from benchmarks.sides import NO_BATCHING, ONE_BY_ONE, Doer, Ours, Side, inline, peer, turns
from fedsim.compose import compose
from fedsim.engine import session as sessions
from fedsim.experiment import build
from fedsim.run import _engine

PFL, TWO = "pfl-research", "two workers"
GROUP = 5  # clients trained together: half of ten, one group for each worker
# Parts of a CPU: the workers of two sides are there at once, though only those of one work.
RAY = ("engine=ray", "engine.workers=2", "engine.address=auto", "engine.cpus_per_worker=0.5")
INSTALL = "python -m venv pfl && pfl/bin/pip install torch==2.13.0 'pfl[pytorch]', then --pfl-python pfl/bin/python"
# How many times as fast as pfl-research issue 6 asks fedsim to be in one process; with two workers twice that.
TARGETS = {"mlp": 1.2, "lenet5": 1.5, "cnn": 1.0}


def measure(name: str, count: int, python: str | None, folder: Path) -> list[Row]:
    """All sides of one case, in turns, on a cluster that is there."""
    case = CASES[name]
    with sessions.kept(), contextlib.ExitStack() as stack:
        one = [*case.overrides(), *ONE_BY_ONE]
        sides: dict[str, Doer] = {"one by one": Ours(inline(one, folder / "one"))}
        batched = [*case.overrides(), f"client.batching={GROUP}"]
        if not NO_BATCHING:
            sides["batched"] = Ours(inline(batched, folder / "batched"))
        two = {TWO: one}
        if not NO_BATCHING:
            two[f"{TWO}, batched"] = batched
        for side, given in two.items():
            exp = build(compose([*given, *RAY]))
            sides[side] = Ours(Side(exp, stack.enter_context(_engine(exp)), folder / side))
        if python is not None:
            sides[PFL] = stack.enter_context(peer(python, name))
        seconds, notes = turns(sides, count)
    out = rows_of("c", name, seconds, PFL if python else "one by one", targets(name, seconds), notes, "whole round")
    return out + ([Row("c", name, "batched", note=NO_BATCHING)] if NO_BATCHING else [])


def targets(name: str, seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """What the fastest side in one process, and the fastest on two workers, are to take of pfl's time, at most."""
    if name not in TARGETS or PFL not in seconds:
        return {}
    out = {}
    for times, sides in ((1, [s for s in seconds if TWO not in s and s != PFL]), (2, [s for s in seconds if TWO in s])):
        out[min(sides, key=lambda s: statistics.median(seconds[s]))] = 1 / (times * TARGETS[name])
    return out


def rows(names: Sequence[str], count: int, python: str | None) -> Iterator[list[Row]]:
    """The rows of one case after the other."""
    with own_folder() as folder, cluster():
        for i, name in enumerate(names):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a process that nothing is left in
                yield pool.submit(measure, name, count, python, folder / str(i)).result()


def main() -> None:
    from benchmarks.table import show

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["logreg", "mlp", "lenet5", "cnn"])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--pfl-python", metavar="PATH", help=INSTALL)
    options = parser.parse_args()
    for found in rows(options.cases, options.turns, options.pfl_python):
        show(found)


if __name__ == "__main__":
    main()
