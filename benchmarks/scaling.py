"""How a round's time follows the population, the cohort, the size of the model and the number of workers.

    python -m benchmarks.scaling [--what population cohort model workers] [--turns 7]

One process, one by one, unless it says workers. All sizes of one kind take turns; ratios are to the first of them.

- population: 10 of 10^3 to 10^6 clients (synthetic data, made when a client is first touched; logistic regression);
- cohort: all of 10 to 10,000 clients, each doing one step on 10 images (logistic regression), seconds per client;
- model: 10 clients, 20 steps of 32, an MLP of two hidden layers from 50 to 1,600 units;
- workers: `lenet5` (10 clients, 20 steps of 32) on one and on two workers of a kept cluster.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.common import CASES, Case, Row, alternate, cluster, own_folder, rows_of
from benchmarks.sides import ONE_BY_ONE, Side, inline
from fedsim.compose import compose
from fedsim.engine import session as sessions
from fedsim.experiment import build
from fedsim.run import _engine

POPULATIONS = (1_000, 10_000, 100_000, 1_000_000)
COHORTS = (10, 100, 1_000, 10_000)
WIDTHS = (50, 100, 200, 400, 800, 1_600)
KINDS = ("population", "cohort", "model", "workers")


def population(turns: int, folder: Path, sizes: Sequence[int] = POPULATIONS) -> list[Row]:
    """Rounds over 10 clients."""
    sides = {}
    for size in sizes:
        data = ["data=synthetic", f"data.num_clients={size}", "model=logreg"]
        cohort = ["participation=fixed", "participation.clients_per_round=10"]
        sides[f"{size:,} clients"] = inline([*data, *cohort, *ONE_BY_ONE], folder / str(size)).round
    return _compared("10 of the population", sides, turns)


def cohort(turns: int, folder: Path, sizes: Sequence[int] = COHORTS) -> list[Row]:
    """Rounds over all clients, by the client."""
    sides = {
        f"{n:,} clients": inline([*Case("logreg", n, 1, 10).overrides(), *ONE_BY_ONE], folder / str(n)).round
        for n in sizes
    }
    return _compared("the whole cohort", sides, turns, "client", dict(zip(sides, sizes, strict=True)))


def model(turns: int, folder: Path, widths: Sequence[int] = WIDTHS) -> list[Row]:
    """Rounds with ever larger networks."""
    sides, notes = {}, {}
    for width in widths:
        side = inline([*CASES["mlp"].overrides(), *ONE_BY_ONE, f"model.hidden=[{width},{width}]"], folder / str(width))
        sides[f"two layers of {width:,}"] = side.round
        notes[f"two layers of {width:,}"] = f"{side.exp.program.layout.d:,} parameters"
    return _compared("mlp", sides, turns, notes=notes)


def workers(turns: int, folder: Path, counts: Sequence[int] = (1, 2)) -> list[Row]:
    """Rounds on a cluster that is there."""
    with sessions.kept(), contextlib.ExitStack() as stack:
        sides = {}
        for count in counts:
            # Parts of a CPU: the engines of all sides are there at once.
            ray = ["engine=ray", f"engine.workers={count}", "engine.address=auto", "engine.cpus_per_worker=0.5"]
            exp = build(compose([*CASES["lenet5"].overrides(), *ONE_BY_ONE, *ray]))
            sides[f"{count} workers"] = Side(exp, stack.enter_context(_engine(exp)), folder / str(count)).round
        return _compared("lenet5", sides, turns)


def _compared(
    case: str,
    sides: Mapping[str, Callable[[], object]],
    turns: int,
    unit: str = "round",
    divide: dict[str, int] | None = None,
    notes: dict[str, str] | None = None,
) -> list[Row]:
    seconds = alternate(sides, turns)
    if divide is not None:
        seconds = {name: [s / divide[name] for s in values] for name, values in seconds.items()}
    return rows_of("e", case, seconds, next(iter(sides)), notes=notes, unit=unit)


def rows(turns: int, kinds: Sequence[str] = KINDS) -> Iterator[list[Row]]:
    """The rows of one kind after the other, each measured in a process of its own."""
    what = {"population": population, "cohort": cohort, "model": model, "workers": workers}
    with own_folder() as folder:
        for kind in kinds:
            needed = cluster() if kind == "workers" else contextlib.nullcontext()
            with needed, ProcessPoolExecutor(1, get_context("spawn")) as pool:
                yield pool.submit(what[kind], turns, folder / kind).result()


def main() -> None:
    from benchmarks.table import show

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    for found in rows(options.turns, options.what):
        show(found)


if __name__ == "__main__":
    main()
