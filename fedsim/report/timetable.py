"""``fedsim schedule``: who would work when under an event-driven method, without training."""

from __future__ import annotations

import gc
import time
from collections import Counter
from pathlib import Path

from fedsim.asynchronous import Asynchronous
from fedsim.engine.inline import InlineEngine
from fedsim.errors import ConfigError, RunError, one_line
from fedsim.experiment import Experiment
from fedsim.memory import Memory
from fedsim.report.text import align
from fedsim.report.timeline import FACTS, Task, Timeline, facts, save
from fedsim.schedule import Simulated, simulate


def simulated(exp: Experiment) -> tuple[Timeline, float]:
    """The timetable of a run up to its end: ``rounds``, ``stop.virtual_seconds`` or ``stop.contributions``.

    Args:
        exp: The experiment.

    Returns:
        The timetable, as a run's own, and how many events a second were simulated.

    Raises:
        ConfigError: The strategy works in rounds.
    """
    strategy, p, stop = exp.program.strategy, exp.program, exp.config["stop"]
    if not isinstance(strategy, Asynchronous):
        raise ConfigError(
            f"fedsim schedule is for event-driven methods, such as fedcompass, fedasync and fedbuff; "
            f"{type(strategy).__name__} works in rounds: run it, and look at it with fedsim timeline"
        )
    engine = InlineEngine(p)
    try:
        fed = exp.federation(engine, Memory(Path("unused")))
        down = fed.cost_down(strategy.init(exp.info, p.network.initial.clone()), 0)[0]
    finally:
        engine.close()
    sizes, planned = p.clients.sizes(), dict[int, int]()
    schedule = strategy.timetable(len(p.clients))

    def steps(client: int) -> int:
        if client not in planned:
            planned[client] = strategy.planned_steps(p.options, int(sizes[client]))
        return planned[client]

    began, seen, known, done, models = time.perf_counter(), Simulated(), 0, 0, 0
    for seen in simulate(
        schedule, len(p.clients), steps, exp.system, exp.availability, down, 4 * p.shared_size, exp.config["seed"]
    ):
        done += sum(c.finished for c in seen.contributions[known:])
        known = len(seen.contributions)
        if len(seen.models) == models:  # a run, too, looks at its end when the global model has changed
            continue
        models = len(seen.models)
        enough = stop.get("contributions") is not None and done >= stop["contributions"]
        late = stop["virtual_seconds"] is not None and seen.time >= stop["virtual_seconds"] * 1e9
        if models >= exp.config["rounds"] or enough or late:
            break
    return _timeline(seen), seen.events / max(time.perf_counter() - began, 1e-9)


def _timeline(seen: Simulated) -> Timeline:
    tasks: dict[int, list[Task]] = {}
    for c in seen.contributions:
        tasks.setdefault(c.client, []).append(Task(c.begin, c.end, c.steps, "done" if c.finished else "dropout"))
    for client, c in seen.pending.items():
        if c.begin < seen.time:
            tasks.setdefault(client, []).append(Task(c.begin, min(c.end, seen.time), c.steps, "unknown"))
    stale = Counter[int]()
    for _, found in seen.models:
        stale.update(found)
    return Timeline(tasks, [when for when, _ in seen.models], seen.time, stale)


def command(exp: Experiment) -> None:
    """Prints what a timetable comes to, and draws its beginning.

    What was imported so far is taken out of the garbage collector's sight: looking at it again and again would take a
    part of the time.

    Raises:
        ConfigError: The strategy works in rounds, nothing happens in it, or the picture cannot be written.
    """
    gc.freeze()
    try:
        timeline, pace = simulated(exp)
    finally:
        gc.unfreeze()
    if not timeline.tasks:
        raise ConfigError("no client is ever given a task; look at availability")
    path = Path(exp.config["run_dir"]).expanduser() / "schedule" / f"{exp.name}.png"
    try:
        save([(exp.name, timeline)], path)
    except (OSError, RunError) as exc:
        raise ConfigError(f"cannot draw {path}: {one_line(exc)}; set run_dir= to a folder that can be written") from exc
    described = exp.describe()
    rows = [[key, described[key]] for key in ("strategy", "devices")]
    rows += [[name, text] for name, text in zip(FACTS, facts(timeline), strict=True)]
    rows += [["global models", f"{len(timeline.models):,}"], ["simulated", f"{pace:,.0f} events per second"]]
    print(align([*rows, ["picture", str(path)]], left=2))
