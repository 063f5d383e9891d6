"""FedCompass: its timetable against the paper's figure and a simulation of its own, its steps against closed forms."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.clients.availability import Always, Availability, Markov, Trace
from fedsim.clients.systems import Homogeneous, LogNormal, System
from fedsim.engine import session as sessions
from fedsim.errors import ConfigError
from fedsim.experiment import build
from fedsim.federation import Event, Federation
from fedsim.schedule import Plan, Simulated, simulate
from fedsim.strategies.fedcompass import LATE, CompassSchedule, FedCompass, Group
from fedsim.visits import read
from tests.helpers import Interrupted, Run, configure, drive, quadratics

# --- the method once more, as plainly as can be: seconds as floats, lists that are looked through ---------


@dataclass
class Update:
    """A task, and what is told of it when it is aggregated.

    Attributes:
        client: Who made it.
        steps: Local steps.
        version: The global model that it started from.
        made: Steps of the client in earlier tasks.
    """

    client: int
    steps: int
    version: int
    made: int


@dataclass(eq=False)
class Meeting:
    """An arrival group."""

    expected: float
    latest: float
    pending: list[int] = field(default_factory=list)
    arrived: list[Update] = field(default_factory=list)
    closed: bool = False
    rung: bool = False


@dataclass
class Aggregation:
    """A new global model.

    Attributes:
        time: When, seconds.
        alone: Whether it is made of a client's first contribution.
        updates: What it is made of.
        late: How many of these were late.
    """

    time: float
    alone: bool
    updates: list[Update]
    late: int

    def trace(self, version: int) -> list[tuple[int, int, int]]:
        """(client, steps, staleness), sorted."""
        return sorted((u.client, u.steps, version - u.version) for u in self.updates)


def derived(
    duration: Callable[[int, int, int], float],
    m: int,
    count: int,
    *,
    q_min: int = 20,
    q_max: int = 100,
    q_init: str = "min",
    lam: float = 1.2,
    rho: float = 0.9,
    create_ref: str = "latest",
    buffer: str = "list",
    **ignored: Any,
) -> list[Aggregation]:
    """The first ``count`` global models; ``duration`` of (client, number of its task, steps) is in seconds."""
    first = q_min if q_init == "min" else q_max
    version, events, late, groups = 0, list[Aggregation](), list[Update](), list[Meeting]()
    speed, home, numbers = [0.0] * m, [Meeting(0, 0)] * m, [1] * m
    tasks = [Update(i, first, 0, 0) for i in range(m)]
    sent, back = [0.0] * m, [duration(i, 1, first) for i in range(m)]
    nowhere = home[0]

    def assign(i: int, now: float) -> None:
        open_ones = [g for g in groups if not g.closed]
        ahead = [(math.floor((g.expected - now) / speed[i] + 1e-9), g) for g in open_ones]
        fits = [(q, g) for q, g in ahead if q_min <= q <= q_max]
        if fits:
            steps = max(q for q, _ in fits)
            group = [g for q, g in fits if q == steps][-1]
        else:
            kept = []
            for g in open_ones:
                if now < g.latest:
                    fastest = min(speed[j] for j in [*g.pending, *(u.client for u in g.arrived)])
                    again = (g.latest if create_ref == "latest" else g.expected) + fastest * q_max
                    kept.append(math.floor((again - now) / speed[i] + 1e-9))
            kept = [q for q in kept if q <= q_max]
            steps = max(q_min, *kept) if kept else q_max
            group = Meeting(now + steps * speed[i], now + lam * steps * speed[i])
            groups.append(group)
        group.pending.append(i)
        numbers[i] += 1
        tasks[i] = Update(i, steps, version, tasks[i].made + tasks[i].steps)
        home[i], sent[i], back[i] = group, now, now + duration(i, numbers[i], steps)

    def aggregate(group: Meeting, now: float) -> None:
        nonlocal version, late
        members = [u.client for u in group.arrived]
        if buffer == "overwrite":
            late = [u for u in late if u.client not in members]
        events.append(Aggregation(now, False, [*late, *group.arrived], len(late)))
        version += 1
        late, group.arrived, group.closed = [], [], True
        for i in sorted(members, key=lambda i: (speed[i], i)):
            assign(i, now)

    while len(events) < count:
        i = back.index(min(back))
        now = back[i]
        ringing = [g for g in groups if not g.rung and not g.closed and g.latest < now]
        if ringing:
            group = min(ringing, key=lambda g: g.latest)
            group.rung = True
            if group.arrived:
                aggregate(group, group.latest)
            continue
        back[i] = math.inf
        measured = (now - sent[i]) / tasks[i].steps
        speed[i] = measured if home[i] is nowhere else (1 - rho) * speed[i] + rho * measured
        group = home[i]
        if group is nowhere:
            events.append(Aggregation(now, True, [tasks[i]], 0))
            version += 1
            assign(i, now)
            continue
        group.pending.remove(i)
        if group.closed or now > group.latest:
            if not group.pending and not group.arrived:
                groups.remove(group)
            if buffer == "overwrite":
                late = [u for u in late if u.client != i]
            late.append(tasks[i])
            assign(i, now)
        else:
            group.arrived.append(tasks[i])
            if not group.pending:
                aggregate(group, now)
    return events


# --- timetables -------------------------------------------------------------------------------------------


@dataclass
class Traced(CompassSchedule):
    """Notes which tasks every global model is made of, what waits, and how many were late."""

    trace: list[tuple[int, list[tuple[int, int, int]]]] = field(default_factory=list)
    waiting: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)
    since: dict[int, int] = field(default_factory=dict)
    sent: int = 0
    late: int = 0
    replaced: int = 0

    def begin(self, num_clients: int) -> Plan:
        return self._noted(super().begin(num_clients), 0)

    def arrival(self, client: int, now: int) -> Plan:
        task = client, self.devices[client].steps, self.since[client]
        return self._noted(super().arrival(client, now), now, task)

    def dropout(self, client: int, now: int) -> Plan:
        return self._noted(super().dropout(client, now), now)

    def timer(self, tag: int, now: int) -> Plan:
        return self._noted(super().timer(tag, now), now)

    def _noted(self, plan: Plan, now: int, task: tuple[int, int, int] = (0, 0, 0)) -> Plan:
        self.replaced += sum(len(self.waiting.pop(name, [])) for name in plan.drop)
        if plan.fold is not None:
            self.waiting.setdefault(plan.fold, []).append(task)
            self.late += plan.fold == LATE
        if plan.use:
            used = [task for name in plan.use for task in self.waiting.pop(name, [])]
            self.trace.append((now, sorted((i, q, self.version - v) for i, q, v in used)))
        for client, steps in plan.send:
            assert steps is not None and self.q_min <= steps <= self.q_max
            self.since[client] = self.version + bool(plan.use)
            self.sent += 1
        return plan


@dataclass(frozen=True)
class Given:
    """Seconds per step of each client, and the distribution of a factor on every task.

    Attributes:
        speeds: Seconds per step.
        jitter: ``normal`` or ``uniform``, around 1.
        width: Its standard deviation, or half of its width.
        seed: Of the factors.
    """

    speeds: tuple[float, ...]
    jitter: str = "normal"
    width: float = 0.0
    seed: int = 0

    def duration_ns(self, client: int, visit: int | str, steps: int, bytes_down: int, bytes_up: int, seed: int) -> int:
        rng = random.Random(f"{self.seed}/{client}/{visit}")
        factor = rng.gauss(1, self.width) if self.jitter == "normal" else rng.uniform(1 - self.width, 1 + self.width)
        return round(1e9 * self.speeds[client] * steps * max(factor, 0.05))

    def lost_at(self, client: int, visit: int | str, seed: int) -> float | None:
        return None

    def seconds(self, client: int, number: int, steps: int) -> float:
        """For `derived`."""
        return self.duration_ns(client, number, steps, 0, 0, 0) / 1e9


def traced(options: Mapping[str, Any]) -> Traced:
    return Traced(**vars(FedCompass(**options).timetable(1)))


def walked(
    schedule: CompassSchedule,
    system: System,
    m: int,
    models: int,
    availability: Availability | None = None,
    nbytes: int = 0,
    seed: int = 0,
) -> Simulated:
    """The timetable up to so many global models; ``nbytes`` go each way."""
    events = simulate(schedule, m, lambda client: 0, system, availability or Always(), nbytes, nbytes, seed)
    seen = next(events)
    while schedule.version < models:
        next(events)
    return seen


FIGURE = (0.1, 0.2, 0.25, 0.4, 0.5)  # per step; minutes there, seconds here
STEADY = [(0, 100, 0), (1, 50, 0), (2, 40, 0), (3, 25, 0), (4, 20, 0)]
OPENING = [(2, [(0, 20, 0)]), (4, [(1, 20, 1)]), (5, [(2, 20, 2)]), (8, [(3, 20, 3)]), (10, [(4, 20, 4)])]
OPENING += [(12, [(0, 100, 4), (1, 40, 3), (2, 28, 2)])]
LOW = [(22, [(0, 100, 0), (1, 50, 0), (2, 40, 0), (3, 35, 2), (4, 24, 1)])]
LOW += [(time, STEADY) for time in (32, 42, 52, 62)]
HIGH = [(22, [(0, 100, 0)]), (24, [(0, 20, 0), (1, 60, 1), (2, 48, 1), (3, 40, 3), (4, 28, 2)])]
HIGH += [(time, STEADY) for time in (34, 44, 54, 64)]


@pytest.mark.parametrize(
    ("options", "after"),
    [({"lam": 1.0}, LOW), ({"create_ref": "expected"}, LOW), ({"lam": 1.2}, HIGH)],
    ids=["lam=1", "expected", "latest"],
)
def test_the_timetable_of_the_paper_s_figure(options: dict[str, Any], after: list[Any]) -> None:
    expected = [*OPENING, *after]
    schedule = traced(options)
    walked(schedule, Given(FIGURE), 5, len(expected))
    assert [(time / 1e9, tasks) for time, tasks in schedule.trace] == expected
    plain = derived(Given(FIGURE).seconds, 5, len(expected), **options)
    assert [(round(e.time, 9), e.trace(v)) for v, e in enumerate(plain)] == expected


def test_in_the_figure_clients_make_2_35_times_the_steps_of_fedavg() -> None:
    schedule = traced({"lam": 1.0})
    seen = walked(schedule, Given(FIGURE), 5, 20)
    (begin, _), (end, _) = schedule.trace[7], schedule.trace[19]
    steps = sum(task.steps for task in seen.contributions if begin < task.end <= end)
    slowest = max(Given(FIGURE).duration_ns(i, 1, 100, 0, 0, 0) for i in range(5))  # FedAvg waits for it
    assert steps * slowest == 2.35 * 500 * (end - begin)


def test_clients_of_equal_speed_make_equal_steps_whatever_floating_point_says() -> None:
    # 100 S / S is 99.99999999999999 for some of these S.
    for thousandths in range(1, 400):
        schedule = traced({})
        walked(schedule, Given((thousandths / 1000,) * 2), 2, 4)
        assert [[q for _, q, _ in tasks] for _, tasks in schedule.trace] == [[20], [20], [100, 100], [100, 100]]


def cases(count: int) -> list[Any]:
    rng = random.Random(1)
    out = []
    for k, (lam, m, tail) in enumerate(
        itertools.islice(itertools.cycle(itertools.product((1.0, 1.2, 1.5, 2.0), (3, 5, 8, 10), (False, True))), count)
    ):
        speeds = tuple(0.15 * (rng.lognormvariate(0, 1) if tail else max(0.1, rng.gauss(1, 0.3))) for _ in range(m))
        system = Given(speeds, "normal", rng.uniform(0.05, 0.35), k)
        out.append(({"lam": lam, "q_init": "max", "buffer": "overwrite"}, system, m))
    return out


def same_timetable(options: dict[str, Any], system: Given, m: int, models: int = 60) -> Traced:
    """Compares with `derived`: times, members, steps, staleness."""
    schedule = traced(options)
    walked(schedule, system, m, models)
    expected = derived(system.seconds, m, models, **options)
    assert [tasks for _, tasks in schedule.trace] == [e.trace(v) for v, e in enumerate(expected)]
    assert [time / 1e9 for time, _ in schedule.trace] == pytest.approx([e.time for e in expected], abs=1e-6)
    return schedule


def test_random_timetables_are_those_of_a_plain_simulation() -> None:
    made = [same_timetable(*case) for case in cases(300)]
    assert sum(schedule.replaced > 0 for schedule in made) > 50  # the rule about late updates was needed


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"create_ref": "expected"},
        {"q_min": 1, "q_max": 7},
        {"q_min": 40, "q_max": 40},
        {"rho": 0.3, "lam": 1.0},
        {"buffer": "overwrite", "lam": 1.1},
    ],
    ids=str,
)
def test_timetables_under_other_options_are_those_of_a_plain_simulation(options: dict[str, Any]) -> None:
    for _, system, m in cases(24):
        same_timetable(options, system, m)


def test_dispatched_tasks_are_aggregated_waiting_lost_or_under_way() -> None:
    rng = random.Random(2)
    lost = late = 0
    for k in range(50):
        schedule = traced({"lam": rng.choice((1.0, 1.2)), "buffer": rng.choice(("list", "overwrite"))})
        m = rng.randrange(2, 12)
        there = Markov(200.0, 100.0, when_off=rng.choice(("pause", "drop"))) if k % 2 else Always()
        system = LogNormal(seconds_per_step=0.15, jitter=0.4, dropout=0.1 * (k % 3))
        for seen in simulate(schedule, m, lambda client: 0, system, there, seed=k):
            used = [stale for _, counts in seen.models for stale in Counter(counts).elements()]
            held = sum(n for versions in schedule.held.values() for n in versions.values())
            gone = sum(not task.finished for task in seen.contributions)
            assert schedule.sent == len(used) + schedule.replaced + held + gone + len(seen.pending)
            assert held == sum(map(len, schedule.waiting.values()))
            for group in schedule.groups.values():
                speeds = [schedule.devices[i].speed for i in (*group.pending, *group.arrived)]
                assert group.fastest in (0, min(speeds))
            if seen.events == 250:
                break
        assert min(used) >= 0 and max(used) > 0
        assert [stale for _, tasks in schedule.trace for *_, stale in tasks if stale < 0] == []
        lost, late = lost + gone, late + schedule.late
    assert lost > 500 and late > 500


def test_nobody_waits_in_a_group_that_all_have_left() -> None:
    # Client 0 is back and waits; the other member of its group loses its work: the group is aggregated at once.
    schedule = FedCompass().timetable(2)
    schedule.begin(2)
    second = 1_000_000_000
    for client, now in ((0, 20), (1, 20)):
        schedule.count(schedule.arrival(client, now * second), 0)
    assert len({device.group for device in schedule.devices.values()}) == 1
    plan = schedule.arrival(0, 100 * second)
    schedule.count(plan, 1)
    assert plan.use == () and plan.send == []
    plan = schedule.dropout(1, 110 * second)
    assert plan.use == (1,) and plan.fold is None
    assert sorted(client for client, _ in plan.send) == [0, 1]


def test_a_first_task_that_got_lost_is_handed_out_again() -> None:
    schedule = FedCompass(q_init="max", q_max=30).timetable(1)
    schedule.begin(1)
    assert schedule.dropout(0, 5_000_000_000).send == [(0, 30)]
    assert schedule.arrival(0, 11_000_000_000).use == (-1,)
    assert schedule.devices[0].speed == pytest.approx(0.2)  # from when it was handed out the second time


# --- who is late ------------------------------------------------------------------------------------------


def late_share(lam: float, jitter: str, width: float, contributions: int, seeds: Sequence[int] = (0,)) -> float:
    """Late arrivals among these and what is aggregated: who is late is met twice, on its arrival and in the sum."""
    late = total = 0
    for seed in seeds:
        rng = random.Random(seed)
        system = Given(tuple(0.15 * max(0.1, rng.gauss(1, 0.3)) for _ in range(10)), jitter, width, seed)
        schedule = traced({"lam": lam})
        seen = Simulated()
        for seen in simulate(schedule, 10, lambda client: 0, system, Always()):
            if len(seen.contributions) == contributions:
                break
        late, total = late + schedule.late, total + len(seen.contributions) + schedule.late
    return late / total


@pytest.mark.parametrize("lam", [1.2, 1.5])
def test_nobody_is_late_within_the_bound_on_jitter(lam: float) -> None:
    bound = (lam - 1) / (lam + 1)
    assert late_share(lam, "uniform", 0.99 * bound, 4000) == 0
    assert late_share(lam, "uniform", 3 * bound, 2000) == pytest.approx(0.13, rel=0.3)


@pytest.mark.parametrize(
    ("lam", "low", "high", "seeds"),
    [(1.0, 0.31, 0.31, 1), (1.1, 0.05, 0.07, 1), (1.2, 0.002, 0.003, 4), (1.5, 0, 0, 1)],
)
def test_shares_of_late_arrivals_under_normal_jitter(lam: float, low: float, high: float, seeds: int) -> None:
    assert 0.7 * low <= late_share(lam, "normal", 0.05, 3000, range(seeds)) <= 1.3 * high


# --- steps, on quadratics ---------------------------------------------------------------------------------

A = torch.tensor([[0.5, 2.0, 1.0], [3.0, 0.7, 1.5], [1.0, 1.2, 0.4], [2.0, 2.5, 0.8], [0.6, 1.8, 2.2]]).double()
C = torch.tensor([[1.0, -2.0, 3.0], [-3.0, 1.5, 0.5], [2.0, 2.0, -1.0], [-1.0, -4.0, 1.0], [4.0, 0.5, -2.0]]).double()
START = [4.0, -3.0, 0.5]
SIZES = [1, 5, 2, 7, 3]
LR = 0.05
QUICK = {"q_min": 2, "q_max": 10}
UNEVEN = {"_target_": "fedsim.clients.systems.LogNormal", "seconds_per_step": 0.1, "sigma": 0.7, "jitter": 0.2}
EQUAL = {"_target_": "fedsim.clients.systems.Homogeneous", "seconds_per_step": 0.1}


def run(tmp_path: Path, options: Mapping[str, Any], rounds: int, system: Mapping[str, Any], **values: Any) -> Run:
    own = {f"strategy.{k}": v for k, v in options.items()}
    setup = quadratics(A.tolist(), C.tolist(), START, sizes=SIZES, client__lr=LR, rounds=rounds)
    return drive(configure(("strategy=fedcompass",), {**setup, "system": system, **own, **values}), tmp_path)


def local(i: int, w: Tensor, steps: int, lr: float = LR) -> Tensor:
    """Where client i's steps take w: c + (1 - lr a)^Q (w - c)."""
    return C[i] + (1 - lr * A[i]) ** steps * (w - C[i])


def discounts(staleness: str = "polynomial", a: float = 0.5, b: float = 4.0, **ignored: Any) -> Callable[[int], float]:
    return {
        "polynomial": lambda tau: float((1 + tau) ** -a),
        "hinge": lambda tau: 1.0 if tau <= b else 1 / (a * (tau - b) + 1),
        "constant": lambda tau: 1.0,
    }[staleness]


def descended(events: list[Aggregation], options: Mapping[str, Any]) -> Tensor:
    """Where the global models end, update by update: w - alpha sum of s(staleness) p_i (w_start - w_i)."""
    alpha, beta = options.get("alpha", 0.9), options.get("momentum", 0.0)
    s = discounts(**options)
    p = [1 / 5] * 5 if options.get("weights") == "equal" else [n / sum(SIZES) for n in SIZES]
    models, m = [torch.tensor(START).double()], torch.zeros(3).double()
    for event in events:
        step = torch.zeros(3).double()
        for u in event.updates:
            w = models[u.version]
            lr = LR * options.get("lr_decay", 1.0) ** (u.made // options["q_max"])
            delta = w - local(u.client, w, u.steps, lr)
            per = u.steps if options.get("normalized") else 1
            step = step + alpha * s(len(models) - 1 - u.version) * p[u.client] * delta / per
        if options.get("normalized"):
            share = sum(p[u.client] for u in event.updates)
            step = step * sum(p[u.client] * u.steps for u in event.updates) / share
        if not event.alone:
            m = step = beta * m + step
        models.append(models[-1] - step)
    return models[-1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.4},
        {"weights": "equal"},
        {"a": 2.0},
        {"staleness": "constant"},
        {"staleness": "hinge"},
        {"staleness": "hinge", "b": 1.0},
        {"normalized": True},
        {"momentum": 0.9},
        {"normalized": True, "momentum": 0.5, "staleness": "constant"},
        {"lr_decay": 0.5},
        {"q_init": "max"},
        {"q_min": 4},
        {"q_max": 20},
        {"lam": 1.5},
        {"rho": 0.2},
        {"create_ref": "expected", "lam": 1.3},
        {"buffer": "overwrite"},
    ],
    ids=str,
)
def test_runs_take_the_steps_of_a_plain_simulation(options: dict[str, Any], tmp_path: Path) -> None:
    rounds, options = 22, {**QUICK, "lam": 1.0, **options}
    done = run(tmp_path, options, rounds, UNEVEN)
    system = done.driver.exp.system
    events = derived(lambda i, n, q: system.duration_ns(i, n, q, 0, 0, 0) / 1e9, 5, rounds, **options)
    torch.testing.assert_close(done.w, descended(events, options), rtol=1e-12, atol=1e-12)
    for version, (record, event) in enumerate(zip(done.records, events, strict=True)):
        stale = [version - u.version for u in event.updates]
        assert record["contributions"] == len(stale) and record["staleness_max"] == max(stale)
        assert record["staleness_mean"] == pytest.approx(sum(stale) / len(stale), rel=1e-12)
        assert record["virtual_seconds"] == pytest.approx(event.time, abs=1e-6)
    if options["lam"] == 1:
        assert sum(event.late for event in events) > 5
    plain: dict[str, Any] = {**QUICK, "lam": 1.0}
    if options != plain:
        before = derived(lambda i, n, q: system.duration_ns(i, n, q, 0, 0, 0) / 1e9, 5, rounds, **plain)
        assert float((descended(before, plain) - done.w).abs().max()) > 1e-6, "the option changes nothing"


def test_a_lone_client_with_single_full_batch_steps_descends_its_gradient(tmp_path: Path) -> None:
    own = {"strategy.q_min": 1, "strategy.q_max": 1, "strategy.alpha": 1.0}
    setup = quadratics(A[:1].tolist(), C[:1].tolist(), START, client__lr=LR, rounds=7, system=EQUAL)
    done = drive(configure(("strategy=fedcompass",), {**setup, **own}), tmp_path)
    torch.testing.assert_close(done.w, local(0, torch.tensor(START).double(), 7), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("alpha", [1.0, 0.9])
def test_clients_of_equal_speed_are_fedavg_after_their_first_groups(alpha: float, tmp_path: Path) -> None:
    # Five updates alone at the same time, a first group with staleness 4, 3, ..., 0, then everybody in every group.
    p, w = [n / sum(SIZES) for n in SIZES], [torch.tensor(START).double()]
    for i in range(5):
        w.append(w[-1] + alpha * (1 + i) ** -0.5 * p[i] * (local(i, w[0], 2) - w[0]))
    group = [(1 + 4 - i) ** -0.5 * p[i] * (local(i, w[i + 1], 10) - w[i + 1]) for i in range(5)]
    x = w[-1] + alpha * sum(group, torch.zeros(3).double())
    for _ in range(4):
        mean = sum((p[i] * local(i, x, 10) for i in range(5)), torch.zeros(3).double())
        x = (1 - alpha) * x + alpha * mean
    done = run(tmp_path, {**QUICK, "alpha": alpha}, 10, EQUAL)
    torch.testing.assert_close(done.w, x, rtol=1e-12, atol=1e-12)
    assert [r["virtual_seconds"] for r in done.records] == [0.2] * 5 + [1.2, 2.2, 3.2, 4.2, 5.2]
    stale = [{str(i): 1} for i in range(5)] + [{str(i): 1 for i in range(5)}] + [{"0": 5}] * 4
    assert [r["staleness"] for r in done.records] == stale


@pytest.mark.parametrize("alpha", [1.0, 0.9])
def test_a_full_group_on_digits_is_a_round_of_fedavg(alpha: float, tmp_path: Path) -> None:
    values = {"client.batch_size": None, "client.momentum": 0.0, "system": EQUAL, "partition.num_clients": 4}
    own = {"strategy.q_min": 2, "strategy.q_max": 6, "strategy.alpha": alpha}
    before, after = (
        drive(configure(("strategy=fedcompass",), {**values, **own, "rounds": r}), tmp_path) for r in (5, 6)
    )
    (weights,) = (p for p in tmp_path.rglob("model.safetensors") if p.is_relative_to(before.result.run_dir))
    start = {"model.weights": str(weights), "client.epochs": None, "client.steps": 6, "rounds": 1}
    everybody = {"participation": {"_target_": "fedsim.clients.participation.All"}}
    fedavg = drive(configure(("strategy=fedavg",), {**values, **start, **everybody}), tmp_path)
    torch.testing.assert_close(after.w, (1 - alpha) * before.w + alpha * fedavg.w, rtol=0, atol=3e-8)
    assert float((after.w - before.w).abs().max()) > 1e-3


def test_normalized_equals_plain_when_all_make_the_same_steps(tmp_path: Path) -> None:
    plain, normalized = (run(tmp_path, {"q_min": 6, "q_max": 6, "normalized": n}, 15, UNEVEN).w for n in (False, True))
    torch.testing.assert_close(normalized, plain, rtol=1e-12, atol=1e-12)
    other = [run(tmp_path, {**QUICK, "normalized": n}, 15, UNEVEN).w for n in (False, True)]
    assert float((other[0] - other[1]).abs().max()) > 1e-3


def test_what_waits_is_one_sum_per_start_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = [0, 0]
    carry_out = FedCompass._carry_out

    def spied(self: FedCompass, fed: Federation, state: Any, plan: Plan, event: Event | None = None) -> Any:
        assert fed.schedule is not None
        state = carry_out(self, fed, state, plan, event)
        assert {g: sorted(sums) for g, sums in state.held.items()} == {
            g: sorted(counts) for g, counts in fed.schedule.held.items()
        }
        sums = sum(map(len, state.held.values()))
        contributions = sum(n for counts in fed.schedule.held.values() for n in counts.values())
        most[:] = max(most[0], sums), max(most[1], contributions)
        return state

    monkeypatch.setattr(FedCompass, "_carry_out", spied)
    run(tmp_path, QUICK, 12, EQUAL)
    assert most == [4, 4]  # the first group's members started from different versions, and the last one is not held
    most[:] = 0, 0
    run(tmp_path, {**QUICK, "q_init": "max"}, 30, {**EQUAL, "jitter": 0.1})
    assert most[0] < most[1]


def test_batch_norm_statistics_are_averaged_over_what_is_aggregated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived: list[Tensor] = []
    after: list[Tensor | None] = []
    next_event, round_ = Federation.next_event, FedCompass.round

    def spied_event(self: Federation) -> Event:
        event = next_event(self)
        if event.buffers is not None:
            arrived.append(event.buffers.clone())
        return event

    def spied_round(self: FedCompass, fed: Federation, state: Any) -> Any:
        state = round_(self, fed, state)
        after.append(fed.buffers)
        return state

    monkeypatch.setattr(Federation, "next_event", spied_event)
    monkeypatch.setattr(FedCompass, "round", spied_round)
    model = {"_target_": "tests.helpers.Normed", "weights": None}
    values = {"model": model, "system": EQUAL, "partition.num_clients": 3, "rounds": 5, "client.drop_last": True}
    drive(configure(("strategy=fedcompass",), {**values, "strategy.q_min": 2, "strategy.q_max": 4}), tmp_path)
    expected = [*arrived[:3], torch.stack(arrived[3:6]).mean(0), torch.stack(arrived[6:9]).mean(0)]
    for found, wanted in zip(after, expected, strict=True):
        assert found is not None
        torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-6, atol=1e-6)
    assert float((arrived[3] - arrived[4]).abs().max()) > 1e-3


# --- runs -------------------------------------------------------------------------------------------------

#: Everything that can happen to a task.
ROUGH: dict[str, Any] = {
    "system": {
        "_target_": "fedsim.clients.systems.Exponential",
        "seconds_per_step": 0.1,
        "jitter": 0.2,
        "dropout": 0.15,
        "download_mbps": 0.02,
        "upload_mbps": 0.01,
    },
    "availability": {"_target_": "fedsim.clients.availability.Markov", "on_seconds": 6.0, "off_seconds": 3.0},
    "strategy.q_min": 2,
    "strategy.q_max": 10,
    "strategy.lam": 1.05,
    "strategy.momentum": 0.5,
    "strategy.lr_decay": 0.9,
}


@pytest.mark.parametrize("when_off", ["pause", "drop"])
def test_a_simulated_timetable_is_that_of_the_run(when_off: str, tmp_path: Path) -> None:
    values = {**ROUGH, "rounds": 40, "availability.when_off": when_off, "seed": 3}
    done = drive(configure(("strategy=fedcompass",), values), tmp_path)
    exp, d = done.driver.exp, done.driver.exp.program.layout.d
    schedule = traced({k.removeprefix("strategy."): v for k, v in values.items() if k.startswith("strategy.")})
    seen = walked(schedule, exp.system, 7, 40, exp.availability, 4 * d, 3)
    rows = read(Path(done.result.run_dir) / "visits.csv")
    found = [(r.client, r.steps if r.outcome == "done" else None, r.begin, r.end) for r in rows]
    expected = [(t.client, t.steps if t.finished else None, t.begin, t.end) for t in seen.contributions]
    assert found == expected
    assert [r["virtual_seconds"] for r in done.records] == [time / 1e9 for time, _ in seen.models]
    assert [r["staleness"] for r in done.records] == [
        {str(tau): n for tau, n in sorted(stale.items())} for _, stale in seen.models
    ]
    assert schedule.late > 0 and any(not task.finished for task in seen.contributions)


@pytest.mark.parametrize("kill_at", [3, 12])
def test_a_run_killed_amid_its_events_resumes_to_the_same_bits(kill_at: int, tmp_path: Path) -> None:
    values = {**ROUGH, "rounds": 13, "checkpoint.every": 1, "strategy.buffer": "overwrite"}
    whole = drive(configure(("strategy=fedcompass",), values), tmp_path / "whole")
    with pytest.raises(Interrupted):
        cut = {**values, "tracker.recorder.kill_at": kill_at}
        drive(configure(("strategy=fedcompass",), cut), tmp_path / "cut")
    (folder,) = (p.parent for p in (tmp_path / "cut").rglob("config.yaml"))
    resumed = drive(configure(("strategy=fedcompass",), values), tmp_path, resume=folder)
    assert resumed.state_sha256 == whole.state_sha256
    assert resumed.records == whole.records[kill_at - 1 :]


@pytest.mark.slow
def test_two_workers_have_the_bits_of_one_process(tmp_path: Path) -> None:
    values = {**ROUGH, "rounds": 30}
    alone = drive(configure(("strategy=fedcompass",), values), tmp_path)
    with sessions.kept():
        other = drive(configure(("strategy=fedcompass", "engine=ray"), {**values, "engine.workers": 2}), tmp_path)
    assert other.state_sha256 == alone.state_sha256
    assert other.records == alone.records


# --- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("q_min", 0, ">= 1"),
        ("q_min", 101, r"<= strategy\.q_max=100"),
        ("lam", 0.99, ">= 1"),
        ("rho", 0.0, r"in \(0, 1\]"),
        ("rho", 1.1, r"in \(0, 1\]"),
        ("alpha", 0.0, r"in \(0, 1\]"),
        ("alpha", 1.5, r"in \(0, 1\]"),
        ("momentum", 1.0, r"in \[0, 1\)"),
        ("lr_decay", 0.0, r"in \(0, 1\]"),
        ("a", -0.5, ">= 0"),
        ("b", -1.0, ">= 0"),
        ("q_init", "mn", "one of min, max"),
        ("weights", "uniform", "one of examples, equal"),
        ("create_ref", "late", "one of latest, expected"),
        ("buffer", "lists", "one of list, overwrite"),
        ("staleness", "poly", "one of polynomial, hinge, constant"),
    ],
)
def test_impossible_options_are_refused(key: str, value: Any, needed: str) -> None:
    with pytest.raises(ConfigError, match=rf"^strategy\.{key} must be {needed}"):
        build(configure(("strategy=fedcompass",), {f"strategy.{key}": value}))


@pytest.mark.parametrize("given", ["client.epochs=3", "client.steps=5", "participation.fraction=0.5"])
def test_settings_without_effect_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{given} has no effect with strategy=FedCompass: .*; remove it$"):
        build(configure(("strategy=fedcompass",)), explicit=[given])


def test_a_number_of_steps_is_not_one_too_small_for_rounding() -> None:
    # A client of 0.1 s per step joins a group that is expected in 0.3 s: three steps, though 0.3 / 0.1 < 3 here.
    assert 0.3 / 0.1 < 3
    schedule = CompassSchedule(q_init=1, q_min=1, q_max=10)
    schedule.begin(2)
    schedule.arrival(0, 10**8)  # a tenth of a second for one step
    schedule.groups = {1: Group(4 * 10**8, 5 * 10**8, {1})}
    schedule.devices[0].group = 0
    plan = Plan()
    schedule._assign((0,), 10**8, plan)
    assert plan.send == [(0, 3)]


def test_a_group_does_not_wait_for_a_client_that_has_left_for_good(tmp_path: Path) -> None:
    # Three clients of 0.1 s per step: first tasks of 20 steps until 2 s, then one group of 100 steps, expected at 12 s.
    # Client 2 leaves at 8 s; the group is aggregated when the other two are back, and not at its latest time, 302 s.
    path = tmp_path / "trace.csv"
    path.write_text("client,on,off\n0,0,100\n1,0,100\n2,0,8\n")
    schedule = CompassSchedule(latest=30.0)
    seen = Simulated()
    for seen in simulate(schedule, 3, lambda _: 0, Homogeneous(seconds_per_step=0.1), Trace(path=str(path))):
        if len(seen.models) == 4:
            break
    assert [time for time, _ in seen.models] == [2 * 10**9] * 3 + [12 * 10**9]
    assert sum(seen.models[-1][1].values()) == 2
    assert 2 not in seen.pending and schedule.groups and all(2 not in g.pending for g in schedule.groups.values())
