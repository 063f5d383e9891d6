"""Cost follows the cohort: rounds over 10 of 1,000,000 clients beside rounds over 10 of 1,000.

    python -m benchmarks.population [--large 1000000] [--small 1000] [--repeats 40] [--strategy scaffold]

Synthetic data, made at a client's first touch; logistic regression; rounds of the two populations in turns, checkpoints
included. Prints the time to build, the median round of each, their ratio, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.common import alternate, ratio
from fedsim.checkpoint import Checkpoints
from fedsim.compose import compose
from fedsim.engine.inline import InlineEngine
from fedsim.experiment import build
from fedsim.federation import Federation
from fedsim.memory import Memory


class Population:
    """A federation of ``size`` clients that can be asked for one round after the other."""

    def __init__(self, size: int, strategy: str) -> None:
        begin = time.perf_counter()
        exp = build(
            compose(
                [
                    f"strategy={strategy}",
                    "data=synthetic",
                    f"data.num_clients={size}",
                    "model=logreg",
                    "participation=fixed",
                    "participation.clients_per_round=10",
                ]
            )
        )
        self.build_seconds = time.perf_counter() - begin
        folder = Path(tempfile.mkdtemp())
        memory = Memory(folder / "memory")
        self.fed = Federation(exp.program, InlineEngine(exp.program), exp.participation, exp.system, memory)
        self.checkpoints = Checkpoints(folder, memory)
        self.strategy = exp.program.strategy
        self.state = self.strategy.init(exp.info, exp.program.network.initial.clone())
        self.number = 0

    def round(self) -> None:
        self.number += 1
        self.fed.begin_round(self.number)
        self.state = self.strategy.round(self.fed, self.state)
        self.checkpoints.save(self.number, {"state": self.state, "federation": self.fed.state()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--small", type=int, default=1_000)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--strategy", default="scaffold")
    options = parser.parse_args()
    large, small = (Population(size, options.strategy) for size in (options.large, options.small))
    seconds = alternate({"large": large.round, "small": small.round}, options.repeats)
    for name, size, population in (("large", options.large, large), ("small", options.small, small)):
        ms = 1e3 * statistics.median(seconds[name])
        print(f"{size:>9,} clients: built in {population.build_seconds:.2f} s, median round {ms:.1f} ms")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"ratio of rounds {ratio(seconds, 'large', 'small'):.3f}; peak memory of the process {peak:.0f} MiB")


if __name__ == "__main__":
    main()
