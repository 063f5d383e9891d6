"""The whole suite: one command, one table, one JSON file.

    python -m benchmarks [--only a,c] [--flower-python P] [--pfl-python P] [--rounds N] [--json FILE] [--device cuda]

=====  ==================================================================================  =====================
part   what                                                                                by itself
=====  ==================================================================================  =====================
a      rounds, one by one and batched, against a plain PyTorch loop                        benchmarks.overhead
b      rounds and starts of inline, one and two workers, against Flower's simulation       benchmarks.engines
c      whole rounds, with reduction and evaluation, against pfl-research                   benchmarks.whole
d      the CIFAR-10 benchmark of pfl-research (a slice of it on a CPU)                     benchmarks.cifar
e      scaling with population, cohort, model and workers                                  benchmarks.scaling
f      the floor: what the products of a step take by themselves                           benchmarks.floor
=====  ==================================================================================  =====================

Every number is the median of at least five runs; sides take turns, and a ratio is the median over neighbouring turns
(in part b, whose sides do not fit on the machine together, the ratio of medians). Nothing else should run meanwhile.
With ``--device cuda`` parts b, c and e, which are about CPUs, are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.common import CASES, FAST, Row, own_folder
from benchmarks.table import machine, show

PARTS = "abcdef"
FLOWER = "python -m venv flower && flower/bin/pip install torch=={} numpy 'flwr[simulation]'", "flower"
PFL = "python -m venv pfl && pfl/bin/pip install torch=={} 'pfl[pytorch]'", "pfl"
LEAST = 5  # runs behind a median


def missing(name: str, how: tuple[str, str]) -> str:
    """Why a part is left out, and how to get what it needs."""
    command, folder = how
    made = command.format(torch.__version__.partition("+")[0])
    return f"left out: it needs {name}: {made}; then --{folder}-python {folder}/bin/python"


def run(part: str, options: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of a part, as they are measured; imports what it needs, as a GPU machine may not have all of it."""
    device, turns = options.device, max(LEAST, options.rounds)
    if part == "a":
        from benchmarks import overhead

        for name in FAST if not options.slow else CASES:
            yield overhead.measure(name, turns, device)
    elif part == "b":
        from benchmarks import engines

        with own_folder() as folder:
            for name in engines.FLOWER:
                yield engines.table(name, engines.measure(name, 1, turns, options.flower_python, folder))
    elif part == "c":
        from benchmarks import whole

        yield from whole.rows(FAST, turns, options.pfl_python)
    elif part == "d":
        from benchmarks import cifar

        yield from cifar.rows(turns, options.pfl_python, device, root=options.cifar)
    elif part == "e":
        from benchmarks import scaling

        yield from scaling.rows(turns)
    else:
        from benchmarks import floor

        if device == "cpu":
            torch.set_num_threads(1)
        yield floor.machine_rate(turns, device)
        for name in FAST if not options.slow else CASES:
            yield floor.measure(name, turns, device)


def why_not(part: str, options: argparse.Namespace) -> str:
    """Why a part is left out, or empty."""
    if options.device != "cpu" and part in "bce":
        return "left out: it is about CPUs"
    if part == "b" and options.flower_python is None:
        return missing("Flower", FLOWER)
    if part == "c" and options.pfl_python is None:
        return missing("pfl-research", PFL)
    return ""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="The benchmark suite.")
    parser.add_argument("--only", default=PARTS, metavar="a,b", help="parts: " + ", ".join(PARTS))
    parser.add_argument("--flower-python", metavar="PATH", help="a Python that has flwr[simulation] and torch")
    parser.add_argument("--pfl-python", metavar="PATH", help="a Python that has pfl[pytorch] and torch")
    parser.add_argument("--rounds", type=int, default=7, help=f"runs behind a median, at least {LEAST}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cifar", type=Path, metavar="FOLDER", help="the real images of part d (data.root)")
    parser.add_argument("--slow", action="store_true", help="resnet18_gn too, in parts a and f")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all measurements are written")
    options = parser.parse_args(arguments)
    parts = [part for part in options.only if part not in ", "]
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--only: no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    facts, kept = machine(options.device), list[Row]()
    print("; ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    for part in parts:
        if reason := why_not(part, options):
            print(f"{part}  {reason}", flush=True)
            continue
        for found in run(part, options):
            show(found)
            kept += found
            if options.json is not None:  # after every case: what was measured outlives an interrupt
                options.json.write_text(json.dumps({"machine": facts, "rows": [asdict(r) for r in kept]}, indent=1))


if __name__ == "__main__":
    main()
