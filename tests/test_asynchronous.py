"""Event-driven methods: what FedAsync and FedBuff compute, who works when, and what becomes of lost tasks."""

from __future__ import annotations

import csv
import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim.asynchronous import discount
from fedsim.clients.availability import Markov, Trace
from fedsim.clients.local import Local
from fedsim.clients.systems import Exponential, Homogeneous
from fedsim.engine import session as sessions
from fedsim.errors import ClientError, ConfigError, RunError
from fedsim.experiment import build
from fedsim.federation import Federation
from fedsim.replay import replay
from fedsim.schedule import drawn, simulate
from fedsim.strategies.fedasync import FedAsync, Pool
from fedsim.strategies.fedbuff import FedBuff
from fedsim.visits import Record, read
from tests.helpers import Interrupted, Run, batches, configure, drive, examples_of, module_of, quadratics
from tests.test_resume import Lab, lab, moments_like, the_run

__all__ = ["lab"]  # a fixture

MS = 1_000_000
SPEEDS = [0.03, 0.02, 0.07, 0.011]
A, C, START = [[1.0], [2.0], [0.5], [3.0]], [[1.0], [-2.0], [4.0], [0.5]], [0.5]
LR, STEPS = 0.1, 3


def table(path: Path, header: str, rows: Sequence[Sequence[Any]]) -> str:
    """A CSV file; returns its path."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return str(path)


def speeds(folder: Path, seconds: Sequence[float] = SPEEDS, **more: Any) -> dict[str, Any]:
    """Values for `configure`: client i takes ``seconds[i]`` per local step."""
    path = table(folder / "speeds.csv", "client,seconds_per_step", list(enumerate(seconds)))
    return {"system": {"_target_": "fedsim.clients.systems.Csv", "path": path, **more}}


def present(folder: Path, stretches: Sequence[Sequence[float]], **more: Any) -> dict[str, Any]:
    """Values for `configure`: clients are there in these stretches, ``(client, on, off)`` in seconds."""
    path = table(folder / "trace.csv", "client,on,off", stretches)
    return {"availability": {"_target_": "fedsim.clients.availability.Trace", "path": path, **more}}


def run(name: str, folder: Path, values: dict[str, Any] | None = None, **options: Any) -> Run:
    """A run on the four quadratic clients of unequal speed."""
    own = {f"strategy.{k}": v for k, v in options.items()}
    devices = {} if "system" in (values or {}) else speeds(folder)
    common = quadratics(A, C, START, client__lr=LR, client__steps=STEPS)
    return drive(
        configure(
            (f"strategy={name}",),
            {**common, **devices, **own, **(values or {})},
        ),
        folder,
    )


def records(done: Run) -> list[Record]:
    return list(read(done.result.run_dir / "visits.csv"))


def local(i: int, x: float, rho: float = 0.0) -> float:
    """Where client i's steps lead from x on a_i / 2 (y - c_i)^2 + rho / 2 (y - x)^2."""
    (a,), (c,) = A[i], C[i]
    s = (a * c + rho * x) / (a + rho)
    return s + (1 - LR * (a + rho)) ** STEPS * (x - s)


def arrivals(rounds: int) -> Iterator[int]:
    """Who comes back, one after the other, if all four always work."""
    heap = [(round(STEPS * s * 1e9), i) for i, s in enumerate(SPEEDS)]
    heapq.heapify(heap)
    for _ in range(rounds):
        time, i = heapq.heappop(heap)
        yield i
        heapq.heappush(heap, (time + round(STEPS * SPEEDS[i] * 1e9), i))


# --- what they compute ------------------------------------------------------------------------------------

SHAPES: dict[str, Callable[[int], float]] = {
    "polynomial": lambda t: (1 + t) ** -0.8,
    "hinge": lambda t: 1.0 if t <= 1 else 1 / (0.8 * (t - 1) + 1),
    "constant": lambda t: 1.0,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_fedasync_by_hand(shape: str, tmp_path: Path) -> None:
    # x <- (1 - alpha_t) x + alpha_t x_new with alpha_t = alpha s(t - tau), clients minimise f_i + rho / 2 |y - x|^2.
    alpha, rho = 0.7, 0.4
    options = {"alpha": alpha, "rho": rho, "staleness": shape, "a": 0.8, "b": 1.0}
    done = run("fedasync", tmp_path, {"rounds": 14}, **options)
    x, started = START[0], dict.fromkeys(range(4), (START[0], 0))
    for version, (i, record) in enumerate(zip(arrivals(14), done.records, strict=True)):
        begin, tau = started[i]
        rate = alpha * SHAPES[shape](version - tau)
        x = (1 - rate) * x + rate * local(i, begin, rho)
        assert record["staleness"] == {str(version - tau): 1}
        assert record["staleness_mean"] == record["staleness_max"] == version - tau
        started[i] = x, version + 1
    assert float(done.w) == pytest.approx(x, rel=1e-12)
    assert max(r["staleness_max"] for r in done.records) >= 6


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_fedbuff_by_hand(shape: str, size: int, tmp_path: Path) -> None:
    # w <- w + eta / K sum of s(tau) Delta over K arrivals; whoever is back starts again from the newest model.
    options = {"buffer_size": size, "server_lr": 0.5, "staleness": shape, "a": 0.8, "b": 1.0}
    done = run("fedbuff", tmp_path, {"rounds": 6}, **options)
    x, version, started, buffer = START[0], 0, dict.fromkeys(range(4), (START[0], 0)), list[tuple[float, int]]()
    for i in arrivals(6 * size):
        begin, since = started[i]
        buffer.append((local(i, begin) - begin, since))
        if len(buffer) == size:
            x += 0.5 / size * sum(SHAPES[shape](version - since) * delta for delta, since in buffer)
            tally = Counter(str(version - since) for _, since in buffer)
            assert done.records[version]["staleness"] == tally
            assert done.records[version]["staleness_mean"] == sum(int(t) * n for t, n in tally.items()) / size
            assert done.records[version]["contributions"] == size
            version, buffer = version + 1, []
        started[i] = x, version
    assert version == 6
    assert float(done.w) == pytest.approx(x, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "a", "b", "weights"),
    [
        ("polynomial", 0.5, 4.0, {0: 1.0, 3: 0.5, 8: 1 / 3}),
        ("polynomial", 0.0, 4.0, {0: 1.0, 7: 1.0}),
        ("polynomial", 2.0, 4.0, {0: 1.0, 1: 0.25, 4: 0.04}),
        ("hinge", 0.5, 4.0, {0: 1.0, 4: 1.0, 5: 2 / 3, 6: 0.5, 10: 0.25}),
        ("hinge", 1.0, 0.0, {0: 1.0, 1: 0.5, 3: 0.25}),
        ("constant", 0.5, 4.0, {0: 1.0, 100: 1.0}),
    ],
)
def test_discounts_have_their_closed_forms(kind: str, a: float, b: float, weights: dict[int, float]) -> None:
    for staleness, weight in weights.items():
        assert discount(kind, a, b, staleness) == pytest.approx(weight, rel=1e-14)


@pytest.mark.parametrize(
    ("name", "options"), [("fedasync", {"alpha": 1.0, "rho": 0.0}), ("fedbuff", {"buffer_size": 1})]
)
def test_one_client_is_gradient_descent(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    a, c, w = [0.5, 2.0, 3.0], [1.0, -2.0, 0.25], [-1.0, 3.0, 0.5]
    values = quadratics([a], [c], w, rounds=4, client__lr=0.125, client__steps=2)
    done = drive(
        configure((f"strategy={name}",), {**values, **{f"strategy.{k}": v for k, v in options.items()}}), tmp_path
    )
    expected = [m + (1 - 0.125 * k) ** 8 * (x - m) for k, m, x in zip(a, c, w, strict=True)]
    torch.testing.assert_close(done.w, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14)


def test_fedbuff_of_equally_fast_clients_is_their_average(tmp_path: Path) -> None:
    # All come back together; with a buffer for all of them every step is FedAvg's with equal weights.
    even = {"system": {"_target_": "fedsim.clients.systems.Homogeneous", "seconds_per_step": 0.01}, "rounds": 2}
    done = run("fedbuff", tmp_path, even, buffer_size=4)
    x = START[0]
    first = x + sum(local(i, x) - x for i in range(4)) / 4
    # They arrive one after the other: only the fourth finds the new model, the others begin again from the old one.
    second = first + (sum(local(i, x) - x for i in range(3)) * 2**-0.5 + local(3, first) - first) / 4
    assert [r["virtual_seconds"] for r in done.records] == [0.03, 0.06]
    assert [r["staleness"] for r in done.records] == [{"0": 4}, {"0": 1, "1": 3}]
    assert float(done.w) == pytest.approx(second, rel=1e-12)


@pytest.mark.parametrize(("name", "options", "count"), [("fedasync", {}, 1), ("fedbuff", {"buffer_size": 3}, 3)])
def test_batch_norm_statistics_are_the_mean_of_what_is_aggregated(
    name: str, options: dict[str, Any], count: int, tmp_path: Path
) -> None:
    even = {"_target_": "fedsim.clients.systems.Homogeneous", "seconds_per_step": 0.01}
    values = {"model": {"_target_": "tests.helpers.Normed", "weights": None}, "system": even, "rounds": 1}
    values |= {"client.epochs": None, "client.steps": 2} | {f"strategy.{k}": v for k, v in options.items()}
    config = configure((f"strategy={name}",), values)
    done, exp = drive(config, tmp_path), build(config)
    found = list[list[Tensor]]()
    for client in range(count):  # equally fast: those with the lowest ids come first
        module, (x, y) = module_of(exp), examples_of(exp, client)
        optimizer, order = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9), batches(0, client, len(x), 64)
        for rows in itertools.islice(order, 2):
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(module(x[rows]), y[rows]))
            optimizer.step()
        norm: Any = module.norm
        found.append([norm.running_mean, norm.running_var])
    mean, var = (torch.stack(values).double().mean(0).float() for values in zip(*found, strict=True))
    assert done.driver.fed.buffers is not None
    views = exp.program.network.buffer_layout.views(done.driver.fed.buffers)
    torch.testing.assert_close(views["norm.running_mean"], mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(views["norm.running_var"], var, rtol=1e-5, atol=1e-6)


def test_batch_norm_statistics_of_several_start_versions_count_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = Federation.next_event, list[Tensor]()

    def watched(self: Federation) -> Any:
        event = original(self)
        assert event.buffers is not None
        seen.append(event.buffers)
        return event

    monkeypatch.setattr(Federation, "next_event", watched)
    values = {"model": {"_target_": "tests.helpers.Normed", "weights": None}, "rounds": 3, "strategy.buffer_size": 5}
    values |= {"client.epochs": None, "client.steps": 1, "partition.num_clients": 4, **speeds(tmp_path)}
    done = drive(configure(("strategy=fedbuff",), values), tmp_path)
    assert len(seen) == 15 and len(done.records[-1]["staleness"]) >= 2
    assert done.driver.fed.buffers is not None
    torch.testing.assert_close(done.driver.fed.buffers.double(), torch.stack(seen[-5:]).double().mean(0).view(-1))


# --- who works when ---------------------------------------------------------------------------------------


def test_an_idle_client_is_drawn_uniformly_among_those_that_are_there() -> None:
    busy, away, draws = {2, 5}, {0, 7, 8}, 14_000
    found = Counter(drawn(3, n, 12, busy, lambda client: client not in away) for n in range(draws))
    assert found.keys() == set(range(12)) - busy - away
    expected = draws / 7
    assert sum((n - expected) ** 2 / expected for n in found.values()) < 22.5  # chi-squared with 6 degrees: p = 0.001


def test_if_no_idle_client_is_there_any_idle_one_is_drawn() -> None:
    found = Counter(drawn(0, n, 6, {1, 4}, lambda _: False) for n in range(2000))
    assert found.keys() == {0, 2, 3, 5}
    assert all(abs(n - 500) < 100 for n in found.values())
    assert {drawn(0, n, 500, set(range(500)) - {77}, lambda _: True) for n in range(5)} == {77}
    assert drawn(0, 0, 3, {0, 1, 2}, lambda _: True) is None


def test_so_many_clients_are_at_work_and_all_get_their_turn() -> None:
    there = Markov(on_seconds=2.0, off_seconds=3.0)
    waits = 0
    for seen in simulate(Pool(concurrency=7), 40, lambda _: 5, Exponential(seconds_per_step=0.05), there, seed=1):
        assert len(seen.pending) == 7
        waits += any(task.begin > seen.time for task in seen.pending.values())
        if seen.events == 3000:
            break
    assert {task.client for task in seen.contributions} == set(range(40))
    assert waits < 300  # nearly always somebody idle was there


@pytest.mark.parametrize("name", ["fedasync", "fedbuff"])
def test_a_run_keeps_to_its_concurrency(name: str, tmp_path: Path) -> None:
    done = run(name, tmp_path, {"rounds": 30}, concurrency=2)
    marks = [mark for r in records(done) for mark in ((r.begin, 1), (r.end, -1))]
    assert max(itertools.accumulate(step for _, step in sorted(marks))) == 2
    assert len(done.driver.fed.state()["flights"]) == 2
    assert {r.client for r in records(done)} == {0, 1, 2, 3}


def test_the_client_that_was_drawn_starts_from_the_newest_model(tmp_path: Path) -> None:
    done = run("fedasync", tmp_path, {"rounds": 12}, concurrency=1, alpha=0.7)
    assert all(r["staleness"] == {"0": 1} for r in done.records)
    x = START[0]
    for r in records(done):
        x += 0.7 * (local(r.client, x, 0.005) - x)
    assert float(done.w) == pytest.approx(x, rel=1e-12)


SETTING: dict[str, Any] = {
    "system": {
        "_target_": "fedsim.clients.systems.Exponential",
        "seconds_per_step": 0.05,
        "jitter": 0.2,
        "dropout": 0.15,
        "download_mbps": 1.0,
        "upload_mbps": 0.25,
    },
    "availability": {
        "_target_": "fedsim.clients.availability.Markov",
        "on_seconds": 1.0,
        "off_seconds": 0.7,
        "when_off": "drop",
    },
    "rounds": 25,
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fedasync", {}),
        ("fedasync", {"concurrency": 2}),
        ("fedbuff", {"buffer_size": 2}),
        ("fedbuff", {"buffer_size": 2, "concurrency": 3}),
    ],
)
def test_a_simulated_timetable_is_that_of_the_run(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    done = run(name, tmp_path, SETTING, **options)
    exp = done.driver.exp
    nbytes = 4 * exp.program.layout.d
    schedule: Any = exp.program.strategy
    devices = exp.system, exp.availability
    for seen in simulate(schedule.timetable(4), 4, lambda _: STEPS, *devices, nbytes, nbytes, exp.config["seed"]):
        if len(seen.models) == 25:
            break
    expected = [(t.client, t.steps if t.finished else 0, t.begin, t.end, t.finished) for t in seen.contributions]
    assert [(r.client, r.steps, r.begin, r.end, r.outcome == "done") for r in records(done)] == expected
    assert [r["virtual_seconds"] for r in done.records] == [time / 1e9 for time, _ in seen.models]
    assert [r["staleness"] for r in done.records] == [
        {str(tau): n for tau, n in stale.items()} for _, stale in seen.models
    ]
    assert sum(not t.finished for t in seen.contributions) >= 3


# --- lost tasks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedasync", "fedbuff"])
def test_a_client_that_loses_its_work_gets_another_task(name: str, tmp_path: Path) -> None:
    done = run(
        name,
        tmp_path,
        {**speeds(tmp_path, dropout=0.3), "rounds": 20},
        **({"buffer_size": 2} if name == "fedbuff" else {}),
    )
    visits = records(done)
    lost = [r for r in visits if r.outcome == "dropout"]
    assert len(lost) >= 4
    assert {r.outcome for r in visits} == {"dropout", "done"}
    assert all(r.bytes_up == r.steps == 0 and r.bytes_down > 0 and not r.entries for r in lost)
    for client in range(4):
        own = [r for r in visits if r.client == client]
        assert [r.visit for r in own] == [f"task.{n}" for n in range(1, len(own) + 1)]
        assert all(later.begin == earlier.end for earlier, later in itertools.pairwise(own))
        planned = round(STEPS * SPEEDS[client] * 1e9)
        assert all((r.end - r.begin < planned) == (r.outcome == "dropout") for r in own)
    totals = done.result.summary["totals"]
    assert totals["dropouts"] == len(lost)
    assert totals["clients"] == len(visits) - len(lost) == sum(r["contributions"] for r in done.records)


def test_a_task_that_is_dropped_when_its_client_leaves_begins_anew_when_it_is_back(tmp_path: Path) -> None:
    # Client 0 takes 90 ms and leaves after 50; it is back at 200. The others are always there.
    stretches = [(0, 0, 0.05), (0, 0.2, 9), *((i, 0, 9) for i in (1, 2, 3))]
    done = run("fedasync", tmp_path, {**present(tmp_path, stretches, when_off="drop"), "rounds": 25})
    first, second, *_ = (r for r in records(done) if r.client == 0)
    assert (first.begin, first.end, first.outcome) == (0, 50 * MS, "dropout")
    assert (second.begin, second.end, second.outcome) == (200 * MS, 290 * MS, "done")


def test_a_client_that_never_comes_is_counted_once_and_nothing_is_sent_to_it(tmp_path: Path) -> None:
    done = run("fedbuff", tmp_path, {**present(tmp_path, [(1, 0, 99), (3, 0, 99)]), "rounds": 20}, buffer_size=2)
    gone = [r for r in records(done) if r.outcome != "done"]
    assert [(r.client, r.bytes_down, r.outcome) for r in gone] == [(0, 0, "dropout"), (2, 0, "dropout")]
    assert {r.client for r in records(done) if r.outcome == "done"} == {1, 3}


def test_places_of_clients_that_never_come_go_to_others(tmp_path: Path) -> None:
    # At the start nobody is there: whoever is drawn may come later, or never. Only 0 and 1 do, after a second.
    values = {**present(tmp_path, [(0, 1, 99), (1, 1, 99)]), "rounds": 10}
    done = run("fedasync", tmp_path, values, concurrency=2)
    assert done.result.summary["rounds"] == 10
    assert {r.client for r in records(done) if r.outcome == "done" and r.begin == 1000 * MS} == {0, 1}
    exp = done.driver.exp
    for seen in simulate(Pool(concurrency=2), 4, lambda _: STEPS, exp.system, exp.availability):
        if seen.time:  # those that never come are heard of at once
            assert seen.pending.keys() == {0, 1}
        if seen.events == 10:
            break
    assert seen.events == 10


def test_lost_tasks_are_no_error_as_long_as_some_come_back(tmp_path: Path) -> None:
    done = run("fedasync", tmp_path, {**speeds(tmp_path, dropout=0.9), "rounds": 130})
    assert done.result.summary["totals"]["dropouts"] > 1001


@pytest.mark.parametrize("when_off", ["pause", "drop"])
def test_a_run_ends_when_all_clients_have_left(when_off: str, tmp_path: Path) -> None:
    # Client 1 takes 60 ms, client 3 33 ms: by 120 ms they come back two and three times, at 33, 60, 66, 99 and 120.
    there = present(tmp_path, [(1, 0, 0.12), (3, 0, 0.12)], when_off=when_off)
    done = run("fedbuff", tmp_path, {**there, "rounds": 50}, buffer_size=2, staleness="constant")
    summary = done.result.summary
    assert summary["stopped"] == "no client is available any more at 0.12 virtual seconds"
    assert (summary["status"], summary["rounds"], summary["final"]["round"]) == ("finished", 2, 2)
    assert summary["totals"]["clients"] == 5  # that at 120 ms counts, and is in no model
    x = START[0]  # client 3 begins again at 33 from the first model; at 60 the second is made, at 99 the third
    second = x + (local(3, x) - x + local(1, x) - x) / 2
    third = second + (local(3, x) - x + local(3, second) - second) / 2
    assert float(done.w) == pytest.approx(third, rel=1e-12)


def test_nobody_there_at_all_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"round 1: no client is available any more; look at availability"):
        run("fedasync", tmp_path, present(tmp_path, [(0, 0, 0.01)]))


def test_places_of_clients_that_left_for_good_go_to_others(tmp_path: Path) -> None:
    # Half of the clients leave within a second; those that stay are enough for the four places.
    stretches = [(i, 0, 0.05 * i if i < 20 else 1e5) for i in range(1, 40)]
    there = Trace(path=table(tmp_path / "leaving.csv", "client,on,off", stretches))
    for seen in simulate(Pool(concurrency=4), 40, lambda _: 3, Homogeneous(seconds_per_step=0.1), there):
        at_work = [task for task in seen.pending.values() if task.end > seen.time]
        assert len(at_work) <= 4
        if seen.events == 500:
            break
    assert sum(not task.finished for task in seen.contributions) > 0
    assert len(at_work) == 4


@dataclass(frozen=True)
class Fragile(FedBuff):
    """Some clients raise.

    Attributes:
        sound: Clients up to this one do not.
    """

    sound: int = 2

    def work(self, local: Local) -> Tensor:
        if local.clients[0] > self.sound:
            raise ArithmeticError("too much for me")
        return super().work(local)


def fragile(**options: Any) -> dict[str, Any]:
    return {"strategy": {"_target_": "tests.test_asynchronous.Fragile", "buffer_size": 2, **options}}


def test_a_failing_client_ends_the_run_or_is_skipped_and_counted(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="too much for me"):
        run("fedbuff", tmp_path, fragile())
    done = run("fedbuff", tmp_path, {**fragile(), "engine.on_failure": "skip", "rounds": 9})
    failed = [r for r in records(done) if r.outcome == "failed"]
    assert {r.client for r in failed} == {3}
    assert len(failed) == done.result.summary["totals"]["failures"] >= 3  # it gets other tasks
    assert all(later.begin == earlier.end for earlier, later in itertools.pairwise(failed))
    x, started, buffer = START[0], dict.fromkeys(range(4), (START[0], 0)), list[tuple[float, int]]()
    version = 0
    for i in arrivals(100):
        if i != 3 and version < 9:
            begin, since = started[i]
            buffer.append((local(i, begin) - begin, since))
            if len(buffer) == 2:
                x += sum((1 + version - since) ** -0.5 * delta for delta, since in buffer) / 2
                version, buffer = version + 1, []
            started[i] = x, version
    assert float(done.w) == pytest.approx(x, rel=1e-12)


def test_clients_that_all_fail_are_not_asked_for_ever(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the latest 1,001 tasks were all lost: nothing comes back from clients"):
        run("fedbuff", tmp_path, {**fragile(sound=-1), "engine.on_failure": "skip"})


# --- memory -----------------------------------------------------------------------------------------------


def test_what_is_held_follows_the_versions_under_way_not_the_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, most = Federation.next_event, Counter[str]()

    def watched(self: Federation) -> Any:
        assert self.schedule is not None
        flights = [f for f in self._flights.under_way.values() if f.finished]
        snapshots = {id(f.snapshot) for f in flights}
        assert len(snapshots) == len({self.schedule.started[f.client] for f in flights})
        assert len(self._flights.tickets) <= self._flights.ahead
        most["snapshots"] = max(most["snapshots"], len(snapshots))
        most["waiting"] = max(most["waiting"], sum(map(sum, (v.values() for v in self.schedule.held.values()))))
        return original(self)

    monkeypatch.setattr(Federation, "next_event", watched)
    values = {"partition.num_clients": 60, "rounds": 8, "client.epochs": None, "client.steps": 1}
    system = {"_target_": "fedsim.clients.systems.Exponential", "seconds_per_step": 1.0, "bin": 0.0}
    options = {"strategy.buffer_size": 25, "system": system}
    done = drive(configure(("strategy=fedbuff",), {**values, **options}), tmp_path)
    assert most["waiting"] == 24
    assert 3 <= most["snapshots"] <= 9
    state = done.state
    sums = [terms for versions in state.held.values() for terms in versions.values()]
    assert all(tensor.shape == done.w.shape for terms in sums for tensor in terms.values())


def test_sums_are_kept_by_start_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = FedBuff.merge, list[tuple[int, ...]]()

    def watched(self: FedBuff, state: Any, sums: Any, groups: Any) -> Any:
        seen.append(tuple(staleness for staleness, _ in sums))
        return original(self, state, sums, groups)

    monkeypatch.setattr(FedBuff, "merge", watched)
    run("fedbuff", tmp_path, {"rounds": 6}, buffer_size=5)
    assert all(len(set(stale)) == len(stale) < 5 for stale in seen)


def test_a_task_that_gets_lost_holds_no_model(tmp_path: Path) -> None:
    stretches = [(0, 0, 0.01), (1, 0, 0.02), (2, 0, 99), (3, 0, 99)]
    done = run("fedasync", tmp_path, {**present(tmp_path, stretches), "rounds": 9})
    flights = done.driver.fed._flights.under_way
    assert sorted(flights) == [0, 1, 2, 3]  # two of them for ever
    assert [client for client, f in flights.items() if not f.snapshot.sent] == [0, 1]


# --- same bits --------------------------------------------------------------------------------------------

ROUGH = {
    "fedasync": {"strategy.concurrency": 3, **SETTING},
    "fedbuff": {"strategy.buffer_size": 3, **SETTING},
    "fedcompass": {"strategy.q_min": 2, "strategy.q_max": 9, **SETTING},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray cluster for all tests that need one."""
    with sessions.kept():
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("name", ROUGH)
def test_ray_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    inline = drive(configure((f"strategy={name}",), ROUGH[name]), tmp_path)
    assert inline.result.summary["totals"]["dropouts"] > 0
    for workers in (1, 2):
        values = {**ROUGH[name], "engine.workers": workers}
        other = drive(configure((f"strategy={name}", "engine=ray"), values), tmp_path)
        assert other.state_sha256 == inline.state_sha256
        assert other.records == inline.records


@pytest.mark.parametrize("name", ROUGH)
def test_a_run_cut_off_in_the_middle_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    values = {**ROUGH[name], "checkpoint.every": 1, "rounds": 11}
    whole = drive(configure((f"strategy={name}",), values), tmp_path / "whole")
    with pytest.raises(Interrupted):
        drive(configure((f"strategy={name}",), {**values, "tracker.recorder.kill_at": 6}), tmp_path / "cut")
    (cut,) = (p.parent for p in (tmp_path / "cut").rglob("config.yaml"))
    resumed = drive(configure((f"strategy={name}",), values), tmp_path, resume=cut)
    assert resumed.state_sha256 == whole.state_sha256
    assert resumed.records == whole.records[5:]
    assert _visits(resumed) == _visits(whole)
    assert resumed.driver.progress.totals == whole.driver.progress.totals


def _visits(done: Run) -> str:
    return (done.result.run_dir / "visits.csv").read_text()


KILLED = (
    "data=digits",
    "model=logreg",
    "partition=iid",
    "partition.num_clients=6",
    "client.epochs=null",
    "client.steps=2",
    "system=exponential",
    "system.dropout=0.2",
    "system.jitter=0.1",
    "availability=markov",
    "availability.on_seconds=0.05",
    "availability.off_seconds=0.02",
    "strategy=fedbuff",
    "strategy.buffer_size=3",
    "strategy.concurrency=4",
    "rounds=8",
    "tracker=[jsonl]",
    "checkpoint.seconds=0",
)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(lab: Lab, tmp_path: Path) -> None:
    expected, moments = lab.whole(*KILLED)
    trained = moments_like(moments, "train")
    for moment in (trained[len(trained) // 2], moments_like(moments, "before replacing 0000")[4]):
        root = tmp_path / str(moment)
        lab.kill(root, KILLED, kill=moment)
        assert not (the_run(root) / "summary.json").exists()
        assert lab.resume(root, KILLED) == expected, f"killed {moments[moment]}"


@pytest.mark.parametrize("name", ["fedasync", "fedbuff"])
def test_visits_can_be_replayed_also_those_that_are_under_way(name: str, tmp_path: Path) -> None:
    values = {"checkpoint.every": 1, "checkpoint.keep": None, "rounds": 7}
    done = drive(configure((f"strategy={name}",), {**ROUGH[name], **values}), tmp_path)
    folder, ended = done.result.run_dir, [r for r in records(done) if r.outcome == "done"]
    for r in (ended[0], ended[len(ended) // 2], ended[-1]):
        found = [f for f in replay(folder, r.round, r.client) if f.recorded == r]
        assert len(found) == 1 and found[0].same is True
    flights = [f for f in done.driver.fed._flights.under_way.values() if f.finished]
    found = replay(folder, flights[0].round_num, flights[0].client)
    assert found[-1].same is None and found[-1].done.steps > 0


# --- when a run ends, and when it is scored ---------------------------------------------------------------


def test_a_run_may_end_after_so_many_contributions(tmp_path: Path) -> None:
    done = run("fedbuff", tmp_path, {"rounds": 99, "stop.contributions": 10}, buffer_size=4)
    assert done.result.summary["totals"]["clients"] == 12
    assert (done.result.summary["rounds"], done.result.summary["stopped"]) == (3, "12 visits came back")


def test_models_are_scored_after_every_so_many_virtual_seconds(tmp_path: Path) -> None:
    # One client, a model every 0.1 s: of exact multiples each is due, though 0.3 // 0.1 is 2.
    values = quadratics(A[:1], C[:1], START, client__steps=1, rounds=12)
    system = {"_target_": "fedsim.clients.systems.Homogeneous", "seconds_per_step": 0.1}
    for every, due in ((0.1, list(range(1, 13))), (0.3, [3, 6, 9, 12]), (0.25, [3, 5, 8, 10, 12])):
        timed = {**values, "system": system, "eval.virtual_seconds": every}
        done = drive(configure(("strategy=fedasync",), timed), tmp_path)
        assert [r["round"] for r in done.records if "test_loss" in r] == due


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedAsync(alpha=0.0), r"strategy\.alpha must be in \(0, 1\], got 0"),
        (lambda: FedAsync(alpha=1.5), r"strategy\.alpha must be in \(0, 1\], got 1\.5"),
        (lambda: FedAsync(rho=-1.0), r"strategy\.rho must be >= 0"),
        (lambda: FedAsync(staleness="none"), r"strategy\.staleness must be one of polynomial, hinge, constant"),
        (lambda: FedAsync(a=-0.1), r"strategy\.a must be >= 0"),
        (lambda: FedAsync(b=-1.0), r"strategy\.b must be >= 0"),
        (lambda: FedAsync(concurrency=0), r"strategy\.concurrency must be at least 1, or null"),
        (lambda: FedBuff(buffer_size=0), r"strategy\.buffer_size must be >= 1"),
        (lambda: FedBuff(server_lr=0.0), r"strategy\.server_lr must be > 0"),
        (lambda: FedBuff(concurrency=-3), r"strategy\.concurrency must be at least 1, or null"),
        (lambda: FedBuff(staleness="x"), r"strategy\.staleness must be one of"),
        (lambda: FedBuff(a=-1.0), r"strategy\.a must be >= 0"),
    ],
)
def test_impossible_options_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("name", ["fedasync", "fedbuff", "fedcompass"])
@pytest.mark.parametrize("given", ["participation=fixed", "participation.deadline=3", "participation.over_selection=2"])
def test_cohorts_are_refused_where_there_are_none(name: str, given: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{given} has no effect with strategy=.*: there are no cohorts.*; remove it"
    ):
        build(configure((f"strategy={name}",)), [given])
