"""Engines side by side: inline, Ray with one and with two workers, and Flower's simulation.

    python -m benchmarks.engines [--flower-python PATH] [--models mlp lenet5 cnn] [--turns 3] [--rounds 9]

10 clients, 20 steps of 32 examples each (``BENCHMARKS_BATCH=10`` in the environment: of 10), one thread per worker,
CPU; what is equal on Flower's side, and what is not,
is said in `benchmarks.flower_baseline`. Without ``--flower-python`` (a Python that can import flwr) it is left out.

A turn is, one after the other and nothing of one while another is measured: rounds of fedsim's three sides, each round
of one followed by one of the next, on one kept cluster; fedsim's command up to its first finished round, on that
cluster; the same with a private cluster of its own; Flower's simulation. Per-round times are of the round alone, from
sampling to the server's step, on both sides; the first two are dropped. Start-up is from the start of the process to
the end of the first round, with all that either side does for it.

Compute is what workers themselves took for the training of that very round, divided by their number; what the round
takes beyond it is the engine's. Two other figures stand beside it: one worker's round beyond an inline one, and two
workers' beyond half of one, which also holds what two processes lose by sharing caches and memory.

Two workers can be twice as fast only on a machine that has nothing else to do: its idle share is printed, of a second
before each turn (near 1 if nobody else is there) and in the rounds of each side (near 0 for two workers on two cores).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import BATCH, CLIENTS, LR, STEPS, Idle, Row, aim, cluster, own_folder, ratio
from benchmarks.sides import Side
from fedsim.compose import compose
from fedsim.engine import session as sessions
from fedsim.experiment import build
from fedsim.run import _engine

SIDES = {"inline": 0, "ray 1": 1, "ray 2": 2}  # and workers
BEYOND = "ray 2 beyond compute"
KEPT_OR_COLD = ("fedsim, kept cluster", "fedsim")
DROPPED = 2
FLOWER = {"mlp": 0.3, "lenet5": 0.45, "cnn": 1.0}  # of Flower's round, at most
SPEED_UP, OVERHEAD_MS, COLD, KEPT = 1.8, 25.0, 0.65, 0.5


def overrides(model: str, workers: int, address: str) -> list[str]:
    """One side's run as a user would ask for it; no workers: inline."""
    ray = ["engine=ray", f"engine.workers={workers}", f"engine.address={address}"]
    return [
        f"model={model}",
        "partition=iid",
        f"partition.num_clients={CLIENTS}",
        "partition.holdout=0",
        "client.epochs=null",
        f"client.steps={STEPS}",
        f"client.batch_size={BATCH}",
        f"client.lr={LR}",
        "data._target_=benchmarks.common.RandomImages",
        f"+data.num_train={CLIENTS * STEPS * BATCH}",
        *(ray if workers else []),
    ]


def fedsim_rounds(model: str, count: int, folder: Path) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every round (and of two workers' beyond their compute), and the machine's idle share."""
    seconds: dict[str, list[float]] = {name: [] for name in (*SIDES, BEYOND)}
    idle: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
    with sessions.kept(), contextlib.ExitStack() as stack:
        sides = {}
        for name, workers in SIDES.items():
            parts = ["engine.cpus_per_worker=0.5"] if workers else []  # two engines have to fit two CPUs
            exp = build(compose([*overrides(model, workers, "auto"), *parts]))
            sides[name] = Side(exp, stack.enter_context(_engine(exp)), folder / name)
        for turn in range(DROPPED + count):
            for name, side in sides.items():
                clock = Idle()
                took, computed = side.round()
                if turn >= DROPPED:
                    if SIDES[name] == 2:
                        seconds[BEYOND].append(took - computed / 2)
                    seconds[name].append(took)
                    idle[name].append((took, clock.share()))
    mean = {name: sum(t * share for t, share in parts) / sum(t for t, _ in parts) for name, parts in idle.items()}
    return seconds, mean


def first_round(model: str, address: str, folder: Path) -> float:
    """Seconds from the start of ``fedsim`` to its first finished round, on two workers."""
    own = ["rounds=2", "eval.every=2", "tracker.console.style=plain", f"run_dir={folder}"]
    command = [sys.executable, "-m", "fedsim.cli", *overrides(model, 2, address), *own]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seconds = 0.0
        for line in process.stdout:
            if line.startswith("round 1/"):
                seconds = time.perf_counter() - begin
    if process.returncode or not seconds:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return seconds


def flower(python: str, model: str, count: int) -> dict[str, Any]:
    """What `benchmarks.flower_baseline` measured."""
    command = [python, "-m", "benchmarks.flower_baseline", f"--model={model}", f"--rounds={count + DROPPED}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    for name in [n for n in environment if n.startswith("RAY_")]:
        del environment[name]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {ran.returncode}\n{ran.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(ran.stdout.strip().split("\n")[-1])
    return found


def at_rest() -> float:
    """The machine's idle share in a second in which this program does nothing."""
    clock = Idle()
    time.sleep(1.0)
    return clock.share()


@dataclass
class Found:
    """All turns of one model.

    Attributes:
        seconds: Of every round, by side.
        starts: Seconds up to the first finished round, by side.
        idle: The machine's idle share, by turn.
        beside: Two workers over Flower, by turn.
        versions: On Flower's side.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: {n: [] for n in (*SIDES, BEYOND, "flower")})
    starts: dict[str, list[float]] = field(default_factory=lambda: {n: [] for n in (*KEPT_OR_COLD, "flower")})
    idle: dict[str, list[float]] = field(default_factory=lambda: {n: [] for n in ("at rest", *SIDES)})
    beside: list[float] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)


def measure(model: str, turns: int, count: int, python: str | None, folder: Path) -> Found:
    """All turns of one model."""
    all_of = Found()
    seconds, starts, idle, beside = all_of.seconds, all_of.starts, all_of.idle, all_of.beside
    first_round(model, "local", folder / "runs")  # not counted: files come from a cold disk
    if python is not None:
        all_of.versions = flower(python, model, 0)["versions"]
        theirs = all_of.versions["torch"]
        if theirs != torch.__version__:
            raise SystemExit(f"Flower's side has torch {theirs}, and this {torch.__version__}: install the same build")
    for turn in range(turns):
        idle["at rest"].append(at_rest())
        with cluster():
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a process that nothing is left in
                took, shares = pool.submit(fedsim_rounds, model, count, folder / f"{model}-{turn}").result()
            starts["fedsim, kept cluster"].append(first_round(model, "auto", folder / "runs"))
        starts["fedsim"].append(first_round(model, "local", folder / "runs"))
        if python is not None:
            found = flower(python, model, count)
            took["flower"] = found["seconds"][DROPPED:]
            starts["flower"].append(found["first"])
            beside.append(statistics.median(took["ray 2"]) / statistics.median(took["flower"]))
        for name, values in took.items():
            seconds[name] += values
        for name, share in shares.items():
            idle[name].append(share)
    return all_of


def table(model: str, found: Found) -> list[Row]:
    """Medians as rows; turns of the sides are not neighbours, so ratios are those of medians."""
    base = "flower" if found.seconds["flower"] else "inline"
    out = []
    for kind, unit in ((found.seconds, "round"), (found.starts, "first round")):
        against = base if kind.get(base) else "fedsim"
        for name, values in kind.items():
            if not values:
                continue
            middle = statistics.median(values)
            other = None if name == against else middle / statistics.median(kind[against])
            if name == "ray 2" and found.beside:
                other = statistics.median(found.beside)
            target = FLOWER[model] if (name, against) == ("ray 2", "flower") else None
            of = "" if other is None else against
            out.append(Row("b", model, name, middle, unit, other, of, target, len(values), all=values))
    return out


def report(model: str, found: Found) -> None:
    """Prints what was found, and which targets were met."""
    seconds, starts, idle, beside = found.seconds, found.starts, found.idle, found.beside
    print(f"\n{model}: seconds per round" + " " * 14 + "median      best     worst   machine idle")
    for name, values in seconds.items():
        if values:
            share = f"{statistics.median(idle[name]):14.0%}" if name in idle else ""
            line = f"{statistics.median(values):10.4f}{min(values):10.4f}{max(values):10.4f}"
            print(f"  {name:34} {line} {share}")
    print(f"  idle before the turns: {', '.join(f'{share:.0%}' for share in idle['at rest'])}")
    for name, values in starts.items():
        if values:
            shown = ", ".join(f"{s:.2f}" for s in values)
            print(f"  first round of {name:22} after {statistics.median(values):.2f} s ({shown})")
    two, one, inline = (seconds[name] for name in ("ray 2", "ray 1", "inline"))
    beyond = 1e3 * statistics.median(seconds[BEYOND])
    half = 1e3 * statistics.median(a - b / 2 for a, b in zip(two, inline, strict=True))
    alone = 1e3 * statistics.median(a - b for a, b in zip(one, inline, strict=True))
    print(f"  one worker's round beyond an inline one: {alone:.1f} ms; two workers' beyond half of one: {half:.1f} ms")
    print(
        f"  two workers are {ratio(seconds, 'ray 1', 'ray 2'):.2f} times as fast as one (median of neighbouring rounds)"
    )
    if model == "cnn":
        best = min(one) / min(two)
        print(aim(f"two workers over one, best of {len(one)} rounds each", best, SPEED_UP, best >= SPEED_UP))
    if model == "mlp":
        print(aim("ms of two workers' round beyond compute", beyond, OVERHEAD_MS, beyond <= OVERHEAD_MS))
    if beside:
        cold, kept = (ratio(starts, name, "flower") for name in ("fedsim", "fedsim, kept cluster"))
        for what, found_share, most in (
            ("two workers' round over Flower's", statistics.median(beside), FLOWER[model]),
            ("first round over Flower's", cold, COLD),
            ("first round on a kept cluster over Flower's cold one", kept, KEPT),
        ):
            print(aim(what, found_share, most, found_share <= most))
    if found.versions:
        print(f"  Flower's side: {', '.join(f'{name} {version}' for name, version in found.versions.items())}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="Engines side by side.")
    parser.add_argument("--models", nargs="+", choices=FLOWER, default=list(FLOWER))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=9, help="of each side in a turn, after the two that are dropped")
    parser.add_argument("--flower-python", metavar="PATH", help="a Python that has flwr[simulation] and torch")
    options = parser.parse_args()
    if options.flower_python is None:
        print("Flower's side is left out: --flower-python names no Python that has it")
    with own_folder() as folder:
        for model in options.models:
            report(model, measure(model, options.turns, options.rounds, options.flower_python, folder))


if __name__ == "__main__":
    main()
