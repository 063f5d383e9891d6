"""What a run would cost, without running it (``fedsim --dry-run``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.asynchronous import Asynchronous
from fedsim.engine.base import Task
from fedsim.engine.inline import InlineEngine
from fedsim.engine.worker import Worker
from fedsim.experiment import Experiment
from fedsim.memory import Memory
from fedsim.random import numpy_generator
from fedsim.reduce import tensors_in
from fedsim.report.text import align, human_bytes
from fedsim.strategy import Strategy


def estimate(exp: Experiment) -> dict[str, Any]:
    """Bytes, steps and memory of a run.

    One local step of one client is tried and thrown away: it shows what the method sends up and remembers,
    and that the model and the loss work.

    Returns:
        ``cohort`` (clients of a typical round; 1 for event-driven methods, of which one task is counted), ``steps``,
        ``bytes_down`` and ``bytes_up`` per round, the same with ``total_`` for the run, ``memory_per_client`` and
        ``model_bytes``.
    """
    program, rounds = exp.program, exp.config["rounds"]
    rng = numpy_generator(program.seed, "participation", 1, 0)
    events = isinstance(program.strategy, Asynchronous)
    cohort = [0] if events else exp.participation.sample(len(program.clients), rng)
    steps = float(
        np.mean([program.strategy.planned_steps(program.options, int(n)) for n in program.clients.sizes()[cohort]])
    ) * len(cohort)
    engine = InlineEngine(program, exp.config["engine"]["threads"])
    try:
        state = program.strategy.init(exp.info, program.network.initial.clone())
        fed = exp.federation(engine, Memory(Path("unused")))
        fed.begin_round(1)
        client = cohort[0]
        down, later = fed.cost_down(state, client)
        unicast = fed.unicast(state, (client,))
        task = Task((client,), (1,), fed.payload(state), 1, memory=({},), unicast=unicast, steps=1)
        outcome = Worker(program).run(task)
    finally:
        engine.close()
    assert not isinstance(outcome, list)
    up = outcome.done[0].bytes_up
    kept = sum(t.numel() * t.element_size() for t in tensors_in(outcome.done[0].memory))
    size = program.layout.d * program.layout.dtype.itemsize
    population = len(program.clients)
    newcomers = population * (1 - (1 - len(cohort) / population) ** rounds)  # expected clients that take part at all
    return {
        "cohort": len(cohort),
        "steps": round(steps),
        "bytes_down": down * len(cohort),
        "bytes_up": up * len(cohort),
        "total_steps": round(steps) * rounds,
        "total_bytes_down": later * len(cohort) * rounds + round((down - later) * newcomers),
        "total_bytes_up": up * len(cohort) * rounds,
        "memory_per_client": kept,
        "model_bytes": size,
    }


def report(exp: Experiment) -> str:
    """What runs and what it costs, as text."""
    e = estimate(exp)
    clients = len(exp.program.clients)
    kept = e["memory_per_client"]
    rows = [[k, v] for k, v in exp.describe().items()]
    events = isinstance(exp.program.strategy, Asynchronous)
    if events:
        rows += [["per task", _work(e, "")], ["whole run", "fedsim schedule says how many tasks there will be"]]
    else:
        rows += [["per round", f"{e['cohort']:,} clients, {_work(e, '')}"], ["whole run", _work(e, "total_")]]
    rows += [
        ["client memory", f"{human_bytes(kept)} per client that took part, at most {human_bytes(kept * clients)}"],
        ["model", human_bytes(e["model_bytes"])],
        ["dry run", "nothing was trained and nothing was written"],
    ]
    kind = type(exp.program.strategy)
    left_out = []
    if not events and (kind.prepare is not Strategy.prepare or kind.finalize is not Strategy.finalize):
        left_out.append("what the method does before round 1 or after the last")
    if not events and kind.round is not Strategy.round:
        left_out.append("what its later rounds may do otherwise than the first")
    if left_out:
        rows.append(["not counted", ", ".join(left_out)])
    return align(rows, left=2)


def _work(e: Mapping[str, Any], prefix: str) -> str:
    steps, down, up = (e[prefix + name] for name in ("steps", "bytes_down", "bytes_up"))
    return f"{steps:,} local steps, {human_bytes(down)} down, {human_bytes(up)} up"
