"""A round of fedsim against a plain PyTorch loop that does the same steps.

    python -m benchmarks.overhead [--repeats 15] [--models mlp cnn logreg lenet5]

10 clients, 20 steps of 32 examples each, one thread, CPU. The plain loop is what a careful person writes: one module,
the global weights copied in, data normalised beforehand as float32 and gathered by index, `torch.optim.SGD`, a
weighted running sum of the parameters. fedsim's round is `Strategy.round`: sampling, broadcast, local training from
uint8 images, reduction, server step. The two end in the same parameters, which is checked.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import alternate, ratio
from fedsim import random
from fedsim.compose import compose
from fedsim.engine.inline import InlineEngine
from fedsim.experiment import build
from fedsim.federation import Federation
from fedsim.memory import Memory

CLIENTS, STEPS, BATCH, LR = 10, 20, 32, 0.01


def sides(model: str) -> tuple[Any, Any, Any]:
    """The two rounds as functions, and a check that they end in the same place."""
    exp = build(
        compose(
            [
                f"model={model}",
                "partition=iid",
                f"partition.num_clients={CLIENTS}",
                "partition.holdout=0",
                "client.epochs=null",
                f"client.steps={STEPS}",
                f"client.batch_size={BATCH}",
                f"client.lr={LR}",
                "data._target_=benchmarks.common.RandomImages",
            ]
        )
    )
    program = exp.program
    engine = InlineEngine(program)
    folder = Path(tempfile.mkdtemp())
    fed = Federation(program, engine, exp.participation, exp.system, Memory(folder))
    first = program.strategy.init(exp.info, program.network.initial.clone())
    results: dict[str, torch.Tensor] = {}

    def fedsim_round() -> None:
        fed.begin_round(1)
        fed.memory = Memory(folder)  # every turn does the same steps
        results["fedsim"] = program.strategy.round(fed, first).w

    module = type(program.network.module)((1, 28, 28), 10)
    train = program.dataset.train
    inputs, labels = program.inputs(train.x), train.y
    rows = [program.shard(c).rows for c in range(CLIENTS)]
    start = {k: v.clone() for k, v in program.layout.views(first.w).items()}

    def plain_round() -> None:
        total = {k: torch.zeros_like(v) for k, v in start.items()}
        for client in range(CLIENTS):
            module.load_state_dict(start)
            module.train()
            optimizer = torch.optim.SGD(module.parameters(), lr=LR)
            n = len(rows[client])
            generators = [
                random.generator(0, "order", "train", client, epoch) for epoch in range(-(-STEPS * BATCH // n))
            ]
            order = torch.cat([torch.randperm(n, generator=g) for g in generators])
            steps, epoch = 0, 0
            while steps < STEPS:
                for i in range(0, n, BATCH):
                    index = rows[client][order[epoch * n + i : epoch * n + min(i + BATCH, n)]]
                    loss = F.cross_entropy(module(inputs[index]), labels[index])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    steps += 1
                    if steps == STEPS:
                        break
                epoch += 1
            for k, v in module.state_dict().items():
                total[k] += v * n
        results["plain"] = torch.cat([(v / sum(map(len, rows))).flatten() for v in total.values()])

    def check() -> float:
        return float((results["fedsim"] - results["plain"]).abs().max())

    return fedsim_round, plain_round, check


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn", "logreg"])
    options = parser.parse_args()
    print(f"{'model':8} {'plain ms':>9} {'fedsim ms':>10} {'ratio':>6} {'difference':>11}")
    for model in options.models:
        ours, plain, check = sides(model)
        seconds = alternate({"fedsim": ours, "plain": plain}, options.repeats)
        ms = {k: 1e3 * statistics.median(v) for k, v in seconds.items()}
        slower = ratio(seconds, "fedsim", "plain")
        print(f"{model:8} {ms['plain']:9.1f} {ms['fedsim']:10.1f} {slower:6.3f} {check():11.1e}", flush=True)


if __name__ == "__main__":
    main()
