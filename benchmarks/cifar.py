"""The CIFAR-10 benchmark of pfl-research: 1,000 clients of 50 examples, 50 in a round, steps of 10, one local epoch.

    python -m benchmarks.cifar --pfl-python pfl/bin/python [--turns 5]
    python -m benchmarks.cifar --device cuda [--rounds 1500] [--cifar FOLDER]

Learning rate 0.1, evaluation on 10,000 test images every 10th round, 1,500 rounds (Granqvist et al., 2024,
https://arxiv.org/abs/2404.06430). On a CPU a slice: rounds and evaluations of all sides in turns, as in
`benchmarks.whole`. On a GPU all rounds of one side after the other, with the total, the GPU's utilisation (sampled
every 10th round) and the accuracy at round 200.

Images are random, of CIFAR's shape: speed does not depend on what they show. ``--cifar`` names a folder with the real
ones (``data.root``); only then accuracies mean anything.

Three networks: the one published, which has dropout; the same without, as no two clients with dropout are computed as
one; and fedsim's `twocnn`, the nearest of its standard ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.common import CIFAR, Case, Row, own_folder, rows_of
from benchmarks.sides import EVERY, NO_BATCHING, ONE_BY_ONE, Doer, Ours, Side, inline, peer, turns

PFL = "pfl-research"
ROUNDS = 1500
GROUP = {"cpu": 10, "cuda": 50}  # clients that the batched side computes as one
BUDGET = "client.memory_budget=16GiB"  # 50 of them need about 5
SHOWN = 200  # the round whose accuracy is in the table


def overrides(case: Case, device: str, root: Path | None) -> list[str]:
    """The benchmark as a user of fedsim asks for it."""
    given = [o for o in case.overrides() if root is None or "data." not in o]
    return [*given, f"engine.device={device}", *(["data=cifar10", f"data.root={root}"] if root else [])]


def one_by_one(
    name: str, device: str, root: Path | None, group: int | None, folder: Path
) -> Iterator[tuple[str, Side]]:
    """fedsim's sides, built when they are asked for."""
    case = CIFAR[name]
    yield "one by one", inline([*overrides(case, device, root), *ONE_BY_ONE], folder / "one")
    if not NO_BATCHING and not (case.target and case.dropout):
        size = group or GROUP[device.partition(":")[0]]
        given = [*overrides(case, device, root), f"client.batching={size}", BUDGET]
        yield f"batched ({size})", inline(given, folder / "batched")


def a_slice(name: str, count: int, python: str | None, group: int | None, root: Path | None, folder: Path) -> list[Row]:
    """Rounds and evaluations of all sides in turns, on a CPU."""
    with contextlib.ExitStack() as stack:
        sides: dict[str, Doer] = {n: Ours(s) for n, s in one_by_one(name, "cpu", root, group, folder)}
        if python is not None:
            sides[PFL] = stack.enter_context(peer(python, name))
        seconds, notes = turns(sides, count)
    out = rows_of("d", name, seconds, PFL if python else "one by one", notes=notes, unit="whole round")
    return out + ([Row("d", name, "batched", note=NO_BATCHING)] if NO_BATCHING else [])


def utilisation(device: str) -> float | str:
    """Per cent of the last moments in which the GPU was busy, or why that is not known."""
    try:
        return float(torch.cuda.utilization(device))
    except (ModuleNotFoundError, RuntimeError) as exc:
        return f"utilisation unknown ({str(exc).splitlines()[0]})"


def all_rounds(name: str, side: str, doer: Doer, rounds: int, device: str) -> Row:
    """All rounds of one side, evaluations included."""
    busy: list[float | str] = []
    seconds: list[float] = []
    accuracy, began = "", time.perf_counter()
    for number in range(1, rounds + 1):
        seconds.append(doer.round())
        if number % EVERY == 0:
            busy.append(utilisation(device))  # before the evaluation, so that it is of rounds
            seconds[-1] += doer.evaluate()
            if number == SHOWN and isinstance(doer, Ours):
                accuracy = f", accuracy {doer.side.accuracy:.4f} after {SHOWN}"
    total = time.perf_counter() - began
    known = [b for b in busy if isinstance(b, float)]
    use = f"GPU busy {statistics.mean(known):.0f}%" if known else str(next(iter(busy), "utilisation not sampled"))
    note = f"{rounds} rounds in {total:.1f} s, {use}{accuracy}"
    return Row("d", name, side, total / rounds, "whole round", runs=rounds, note=note, all=seconds)


def on_gpu(
    name: str, rounds: int, python: str | None, group: int | None, root: Path | None, device: str, folder: Path
) -> Iterator[list[Row]]:
    """All rounds, one side after the other."""
    alone: float | None = None
    for side, federation in one_by_one(name, device, root, group, folder):
        federation.round()  # warms up
        row = all_rounds(name, side, Ours(federation), rounds, device)
        alone = alone or row.seconds
        yield [against(row, "one by one", alone, 0.1 if side.startswith("batched") else None)]
    if python is not None:
        with peer(python, name, device) as theirs:
            yield [against(all_rounds(name, PFL, theirs, rounds, device), "one by one", alone)]


def against(row: Row, side: str, seconds: float | None, target: float | None = None) -> Row:
    """The row with its ratio to another side; that side's own row stays."""
    if row.side == side or not seconds or row.seconds is None:
        return row
    return Row(**{**row.__dict__, "ratio": row.seconds / seconds, "against": side, "target": target})


def rows(
    count: int,
    python: str | None,
    device: str = "cpu",
    rounds: int = ROUNDS,
    root: Path | None = None,
    names: list[str] | None = None,
    group: int | None = None,
) -> Iterator[list[Row]]:
    """The rows of one network after the other.

    Args:
        count: Turns, on a CPU.
        python: Of pfl's environment, or None.
        device: Of torch.
        rounds: On a GPU.
        root: Folder of the real images, or None.
        names: Of networks; None: all.
        group: Clients that the batched side computes as one; None: 10 on a CPU, all 50 on a GPU.
    """
    with own_folder() as folder:
        for name in names or CIFAR:
            if device == "cpu":
                yield a_slice(name, count, python, group, root, folder / name)
            else:
                yield from on_gpu(name, rounds, python, group, root, device, folder / name)


def main() -> None:
    from benchmarks.table import show

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=CIFAR, default=list(CIFAR))
    parser.add_argument("--turns", type=int, default=5, help="on a CPU")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="on a GPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--group", type=int, help="clients that the batched side computes as one")
    parser.add_argument("--cifar", type=Path, metavar="FOLDER", help="of the real images")
    parser.add_argument("--pfl-python", metavar="PATH", help="a Python that has pfl[pytorch] and torch")
    parser.add_argument("--json", type=Path, metavar="FILE")
    o = parser.parse_args()
    kept: list[Row] = []
    for found in rows(o.turns, o.pfl_python, o.device, o.rounds, o.cifar, o.networks, o.group):
        show(found)
        kept += found
    if o.json is not None:
        o.json.write_text(json.dumps([row.__dict__ for row in kept]))


if __name__ == "__main__":
    main()
