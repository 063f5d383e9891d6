"""Cost follows the cohort: rounds over 10 of 1,000,000 clients beside rounds over 10 of 1,000; and 1,000 idle clients.

    python -m benchmarks.population [--engine ray] [--large 1000000] [--small 1000] [--repeats 40] [--strategy scaffold]

Synthetic data, made at a client's first touch; logistic regression; rounds of the two populations in turns, checkpoints
included. Prints the time to build, the median round of each, their ratio, and the peak memory of the process. The round
of a third side, over 10 of the large population too, is the same but for local training, which it leaves out: what
remains is what a round costs beyond training (sampling, memory there and back, dispatch, sums, the server's step, the
checkpoint).

Then rounds over 1,000 clients that do not train, by the client: logistic regression on images (d = 7,850), and beside
it the MLP (d = 199,210), where hashes and sums of the clients' vectors are what takes time.

``--engine ray``: two workers, on a cluster that is there already.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.common import aim, alternate, cluster, own_folder, ratio
from fedsim import rounds
from fedsim.checkpoint import Checkpoints
from fedsim.clients.local import Local
from fedsim.compose import compose
from fedsim.engine import session as sessions
from fedsim.engine.base import Engine
from fedsim.experiment import Experiment, build
from fedsim.federation import Federation
from fedsim.memory import Memory
from fedsim.run import _engine
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.scaffold import Scaffold

IDLE = {"fedavg": "benchmarks.population.IdleFedAvg", "scaffold": "benchmarks.population.IdleScaffold"}
ROUND_MS, MEMORY_GB, CLIENT_MS = 100.0, 2.0, 0.5


@dataclass(frozen=True)
class IdleFedAvg(FedAvg):
    """FedAvg whose clients do not train."""

    def work(self, local: Local) -> Tensor:
        return local.start


@dataclass(frozen=True)
class IdleScaffold(Scaffold):
    """SCAFFOLD whose clients do not train; their memory travels all the same."""

    def work(self, local: Local) -> Tensor:
        return local.start


class Population:
    """A federation that can be asked for one round after the other."""

    def __init__(self, exp: Experiment, engine: Engine, folder: Path) -> None:
        memory = Memory(folder / "memory")
        self.fed = Federation(exp.program, engine, exp.participation, exp.system, memory)
        self.checkpoints = Checkpoints(folder, memory)
        self.state, self.number = rounds.first(self.fed, exp.info), 0

    def round(self) -> None:
        self.number += 1
        self.state = rounds.following(self.fed, self.state, self.number)
        self.checkpoints.save(self.number, {"state": self.state, "federation": self.fed.state()})


def enter(stack: contextlib.ExitStack, engine: str, overrides: list[str]) -> tuple[Population, float]:
    """A population on an engine that the stack closes, and the seconds that it took to build, without the engine."""
    # Parts of a CPU: the engines of all sides are there at once.
    ray = ["engine=ray", "engine.workers=2", "engine.cpus_per_worker=0.25", "engine.address=auto"]
    begin = time.perf_counter()
    exp = build(compose([*overrides, *(ray if engine == "ray" else [])]))
    built = time.perf_counter() - begin
    running: Any = stack.enter_context(_engine(exp))
    while any(host.starting is not None for host in getattr(running, "_hosts", ())):
        running._pump(0.1)
    return Population(exp, running, Path(tempfile.mkdtemp())), built


def populations(engine: str, large: int, small: int, repeats: int, strategy: str) -> None:
    """Rounds over 10 clients."""
    idle = [f"strategy._target_={IDLE[strategy]}"] if strategy in IDLE else []
    sides: dict[str, tuple[int, list[str]]] = {"large": (large, []), "small": (small, [])}
    if idle:
        sides["idle"] = (large, idle)
    with sessions.kept(), contextlib.ExitStack() as stack:
        made = {}
        for name, (size, more) in sides.items():
            common = [f"strategy={strategy}", "data=synthetic", f"data.num_clients={size}", "model=logreg"]
            cohort = ["participation=fixed", "participation.clients_per_round=10"]
            made[name], built = enter(stack, engine, [*common, *cohort, *more])
            print(f"{engine}: {name} population of {size:,} clients: built in {built:.2f} s", flush=True)
        seconds = alternate({name: population.round for name, population in made.items()}, repeats)
    ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    print(f"median round: large {ms['large']:.1f} ms, small {ms['small']:.1f} ms; ", end="")
    print(f"ratio of rounds {ratio(seconds, 'large', 'small'):.3f}")
    if "idle" in ms:
        print(aim("round over 10 without training, ms", ms["idle"], ROUND_MS, ms["idle"] <= ROUND_MS))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(aim("peak memory of the driver, GB", peak, MEMORY_GB, peak <= MEMORY_GB), flush=True)


def idle_clients(engine: str, repeats: int) -> None:
    """Rounds over 1,000 clients that do not train."""
    count = 1000
    with sessions.kept(), contextlib.ExitStack() as stack:
        sides = {}
        for model in ("logreg", "mlp"):
            data = ["data._target_=benchmarks.common.RandomImages", "partition=iid", "partition.holdout=0"]
            more = [f"partition.num_clients={count}", f"strategy._target_={IDLE['fedavg']}", f"model={model}"]
            population, _ = enter(stack, engine, [*data, *more])
            sides[model] = population.round
        seconds = alternate(sides, repeats)
    for model, values in seconds.items():
        each = 1e3 * statistics.median(values) / count
        if model == "logreg":
            print(aim(f"{engine}, {count:,} idle clients, ms each, {model}", each, CLIENT_MS, each <= CLIENT_MS))
        else:
            print(f"  beside it, {model}: {each:.3g} ms each", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost follows the cohort.")
    parser.add_argument("--engine", choices=("inline", "ray"), default="inline")
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--small", type=int, default=1_000)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--strategy", default="scaffold")
    options = parser.parse_args()
    with own_folder(), cluster() if options.engine == "ray" else contextlib.nullcontext():
        # In a process of its own each: peak memory is that of one, and a cluster ends after those that were on it.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            sizes = (options.large, options.small)
            pool.submit(populations, options.engine, *sizes, options.repeats, options.strategy).result()
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(idle_clients, options.engine, max(1, options.repeats // 8)).result()


if __name__ == "__main__":
    main()
