"""Rounds of fedsim, one by one and batched, against a plain PyTorch loop that does the same steps.

    python -m benchmarks.overhead [--repeats 15] [--cases mlp cnn logreg lenet5]

10 clients, 20 steps of 32 examples each (``lenet5, 50 x 10``: 50 clients, steps of 10), one thread. The plain loop is
what a careful person writes: one module, the global weights copied in, data normalised beforehand as float32 and
gathered by index, `torch.optim.SGD`, a weighted running sum of the parameters. fedsim's round is `Strategy.round`:
sampling, broadcast, local training from uint8 images, reduction, fingerprints, server step. All end in the same
parameters up to rounding: the largest difference is in the table.

Not exact: fedsim adds up in float64, the plain loop in float32; and the plain loop neither computes nor keeps losses.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.common import CASES, Case, Row, alternate, rows_of
from benchmarks.sides import NO_BATCHING, ONE_BY_ONE
from fedsim import random
from fedsim.compose import compose
from fedsim.engine.inline import InlineEngine
from fedsim.experiment import Experiment, build
from fedsim.federation import Federation
from fedsim.memory import Memory

# What issue 6 asks of CPUs, by side and case: of the plain loop's time, at most.
TARGETS = {
    "one by one": {"mlp": 1.05, "lenet5": 1.05, "cnn": 1.05},
    "batched": {"logreg": 0.5, "lenet5, 50 x 10": 0.9},
}


def fedsim_side(exp: Experiment) -> Callable[[], torch.Tensor]:
    """A function that does the first round, again each time it is called, and returns the parameters, ``[d]``."""
    program, folder = exp.program, Path(tempfile.mkdtemp())
    fed = Federation(program, InlineEngine(program), exp.participation, exp.system, Memory(folder))
    first = program.strategy.init(exp.info, program.network.initial.clone())

    def run() -> torch.Tensor:
        fed.begin_round(1)
        fed.memory = Memory(folder)  # every turn does the same steps
        after: torch.Tensor = program.strategy.round(fed, first).w
        if after.is_cuda:
            torch.cuda.synchronize()
        return after

    return run


def plain_side(exp: Experiment, case: Case) -> Callable[[], torch.Tensor]:
    """The same round by hand."""
    program = exp.program
    train = program.dataset.train
    x, labels = program.inputs(train.x), train.y.to(program.device)
    inputs = torch.empty(x.shape, device=x.device).copy_(x)  # channels first in memory, as everybody has them
    rows = [program.shard(c).rows.to(program.device) for c in range(case.clients)]
    module = program.fresh_module()
    start = {k: v.clone() for k, v in module.state_dict().items()}

    def run() -> torch.Tensor:
        total = {k: torch.zeros_like(v) for k, v in start.items()}
        for client, mine in enumerate(rows):
            module.load_state_dict(start)
            module.train()
            optimizer = torch.optim.SGD(module.parameters(), lr=case.lr)
            order = torch.randperm(len(mine), generator=random.generator(0, "order", "train", client, 0))
            for index in mine[order.to(mine.device)].split(case.batch):  # type: ignore[no-untyped-call]
                loss = F.cross_entropy(module(inputs[index]), labels[index])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            for k, v in module.state_dict().items():
                total[k] += v * len(mine)
        after = torch.cat([(v / sum(map(len, rows))).flatten() for v in total.values()])
        if after.is_cuda:
            torch.cuda.synchronize()
        return after

    return run


def measure(name: str, repeats: int, device: str = "cpu") -> list[Row]:
    """All sides of one case, in turns."""
    case = CASES[name]
    common = [*case.overrides(), f"engine.device={device}"]
    exp = build(compose([*common, *ONE_BY_ONE]))
    runs = {"plain PyTorch": plain_side(exp, case), "one by one": fedsim_side(exp)}
    if not NO_BATCHING:
        runs["batched"] = fedsim_side(build(compose([*common, f"client.batching={case.clients}"])))
    after: dict[str, torch.Tensor] = {}

    def kept(side: str) -> Callable[[], None]:
        def run() -> None:
            after[side] = runs[side]()

        return run

    seconds = alternate({side: kept(side) for side in runs}, repeats)
    plain = after["plain PyTorch"]
    notes = {s: f"differs by {float((w - plain).abs().max()):.0e}" for s, w in after.items() if w is not plain}
    targets = {side: of[name] for side, of in TARGETS.items() if name in of} if device == "cpu" else {}
    out = rows_of("a", name, seconds, "plain PyTorch", targets, notes)
    return out + ([Row("a", name, "batched", note=NO_BATCHING)] if NO_BATCHING else [])


def main(arguments: Sequence[str] | None = None) -> None:
    from benchmarks.table import show

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["mlp", "cnn", "logreg"])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    for name in options.cases:
        show(measure(name, options.repeats, options.device))


if __name__ == "__main__":
    main()
