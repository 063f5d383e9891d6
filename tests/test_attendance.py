"""Synchronous methods on the clock: who is asked, who is back in time, and when a round ends."""

from __future__ import annotations

import csv
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.attendance import Ended, Limits, attend, select
from fedsim.clients.availability import Always, Diurnal, Trace, Trip
from fedsim.clients.participation import All, Bernoulli, Fixed, Fraction, Participation
from fedsim.errors import ConfigError, RunError
from fedsim.experiment import build
from fedsim.federation import Federation
from fedsim.strategies.fedavg import FedAvg
from fedsim.visits import Record, read
from tests.helpers import Run, configure, drive, quadratics

SECOND = 1_000_000_000
MS = 1_000_000
SPEEDS = [0.03, 0.02, 0.07, 0.011]
A, C, START = [[1.0], [2.0], [0.5], [3.0]], [[1.0], [-2.0], [4.0], [0.5]], [0.5]
LR, STEPS = 0.1, 3  # so that clients take 90, 60, 210 and 33 ms


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
    """A run on the four quadratic clients of unequal speed; ``options`` of the group ``participation``."""
    own = {f"participation.{k}": v for k, v in options.items()}
    devices = {} if "system" in (values or {}) else speeds(folder)
    common = quadratics(A, C, START, client__lr=LR, client__steps=STEPS)
    return drive(
        configure(
            (f"strategy={name}",),
            {**common, **devices, **(values or {}), **own},
        ),
        folder,
    )


def fixed(count: int) -> dict[str, Any]:
    return {"participation": {"_target_": "fedsim.clients.participation.Fixed", "clients_per_round": count}}


def records(done: Run) -> list[Record]:
    return list(read(done.result.run_dir / "visits.csv"))


def mean_of(clients: Sequence[int], x: float) -> float:
    """FedAvg's next model, from x."""
    return sum(C[i][0] + (1 - LR * A[i][0]) ** STEPS * (x - C[i][0]) for i in clients) / len(clients)


# --- how long a round takes -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_a_round_takes_as_long_as_its_slowest(name: str, tmp_path: Path) -> None:
    done = run(name, tmp_path, {"rounds": 5, **fixed(2)})
    now = 0
    for number, record in enumerate(done.records, 1):
        visits = [r for r in records(done) if r.round == number]
        took = {r.client: round(STEPS * SPEEDS[r.client] * 1e9) for r in visits}
        assert len(took) == 2
        assert all((r.begin, r.end) == (now, now + took[r.client]) for r in visits)
        now += max(took.values())
        assert record["virtual_seconds"] == now / 1e9
    assert len({r.client for r in records(done)}) == 4


def test_transfers_count(tmp_path: Path) -> None:
    # 4 bytes down and 4 up over 1 Mb/s: 32 microseconds each.
    links = speeds(tmp_path, download_mbps=1.0, upload_mbps=1.0)
    done = run("fedavg", tmp_path, {"rounds": 1, **links})
    assert done.records[0]["virtual_seconds"] == pytest.approx(0.21 + 64e-6, abs=1e-12)
    done = run("scaffold", tmp_path, {"rounds": 1, **links})  # two vectors each way
    assert done.records[0]["virtual_seconds"] == pytest.approx(0.21 + 128e-6, abs=1e-12)


def test_a_client_that_pauses_makes_the_round_longer(tmp_path: Path) -> None:
    # Client 1 works until 20 ms, is away until 500 ms and has 40 ms left.
    there = present(tmp_path, [(0, 0, 9), (1, 0, 0.02), (1, 0.5, 9), (2, 0, 9), (3, 0, 9)])
    done = run("fedavg", tmp_path, {"rounds": 1, **there})
    assert done.records[0]["virtual_seconds"] == 0.54
    assert float(done.w) == pytest.approx(mean_of(range(4), START[0]), rel=1e-12)


# --- deadlines --------------------------------------------------------------------------------------------


def test_a_deadline_ends_the_round_and_leaves_out_who_is_late(tmp_path: Path) -> None:
    done = run("fedavg", tmp_path, {"rounds": 3}, deadline=0.1)  # client 2 takes 0.21
    x = START[0]
    for number, record in enumerate(done.records, 1):
        x = mean_of([0, 1, 3], x)
        assert record["virtual_seconds"] == pytest.approx(0.1 * number, abs=1e-12)
        assert (record["clients"], record["late"], record["dropouts"]) == (3, 1, 0)
        assert (record["bytes_down"], record["bytes_up"]) == (4 * 4, 3 * 4)  # who is late was sent the model
    assert float(done.w) == pytest.approx(x, rel=1e-12)
    late = [r for r in records(done) if r.outcome == "late"]
    assert [(r.client, r.steps, r.bytes_down, r.bytes_up, r.begin, r.end) for r in late] == [
        (2, 0, 4, 0, n * 100 * MS, (n + 1) * 100 * MS) for n in range(3)
    ]
    assert done.result.summary["totals"]["late"] == 3


def test_who_is_late_keeps_the_old_memory(tmp_path: Path) -> None:
    # 100 ms are enough for three of the four; SCAFFOLD's controls of the fourth never come to be.
    done = run("scaffold", tmp_path, {"rounds": 2}, deadline=0.1)
    assert done.memory.clients() == [0, 1, 3]
    # A deadline that all can meet in the first round, and one of them not in the second, when it pauses.
    there = present(tmp_path, [*((i, 0, 9) for i in (0, 1, 3)), (2, 0, 0.25), (2, 1, 9)])
    whole, cut = (
        run("scaffold", tmp_path, {"rounds": rounds, **there, "checkpoint.every": 1}, deadline=0.25)
        for rounds in (1, 2)
    )
    assert cut.records[1]["late"] == 1
    for client, same in ((2, True), (0, False), (1, False), (3, False)):
        (before,), (after,) = (done.memory.get((client,)) for done in (whole, cut))
        assert torch.equal(before["strategy.c"], after["strategy.c"]) == same


def test_a_round_in_which_all_are_back_ends_before_its_deadline(tmp_path: Path) -> None:
    done = run("fedavg", tmp_path, {"rounds": 2}, deadline=10)
    assert [r["virtual_seconds"] for r in done.records] == [0.21, 0.42]


def test_a_deadline_that_nobody_can_meet_is_refused_before_any_work(tmp_path: Path) -> None:
    message = r"participation\.deadline=0\.03 cannot be met by any client: the fastest needs 0\.033 virtual seconds"
    with pytest.raises(ConfigError, match=message):
        run("fedavg", tmp_path, deadline=0.03)
    run("fedavg", tmp_path, {"rounds": 1}, deadline=0.033)
    with pytest.raises(ConfigError, match="cannot be met"):  # the way of 4 bytes takes 32 microseconds
        run("fedavg", tmp_path, speeds(tmp_path, download_mbps=1.0), deadline=0.033)


def test_a_cohort_of_which_nobody_is_ever_back_is_asked_again_and_then_given_up(tmp_path: Path) -> None:
    message = (
        r"round 1: nobody of 1 clients came back within participation\.deadline=0\.05 virtual seconds, 100 times in a "
        r"row; raise it, or look at availability"
    )
    only = {"participation": {"_target_": "tests.test_attendance.Second"}}
    with pytest.raises(RunError, match=message):
        run("fedavg", tmp_path, only, deadline=0.05)
    assert len(list(tmp_path.glob("*/*/summary.json"))) == 0


class Second(All):
    """The third client, every round: the slowest."""

    def sample(self, num_clients: int, rng: np.random.Generator) -> list[int]:
        return [2]


def test_a_cohort_of_which_nobody_is_back_is_asked_again(tmp_path: Path) -> None:
    # Lost with 0.8: that all four are happens with 0.41. Each time counts and takes its time.
    done = run("fedavg", tmp_path, {"rounds": 12, **speeds(tmp_path, dropout=0.8)})
    assert all(r["clients"] >= 1 for r in done.records)
    totals = done.result.summary["totals"]
    assert totals["dropouts"] + totals["clients"] == len(records(done)) > 4 * 12
    again = {r.visit for r in records(done)}
    assert any("." in visit for visit in again)  # other visits, with random numbers of their own
    x = START[0]
    for number in range(1, 13):
        x = mean_of([r.client for r in records(done) if r.round == number and r.outcome == "done"], x)
    assert float(done.w) == pytest.approx(x, rel=1e-12)


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
@pytest.mark.parametrize(
    ("off", "rounds", "why"),
    [
        (0.5, 3, "no client is available any more"),  # two come back in the third round, which begins at 0.42
        (0.45, 2, "none of the 4 clients that are asked can be reached any more"),  # the fastest would be back at 0.453
    ],
)
def test_a_run_ends_when_all_clients_have_left(name: str, off: float, rounds: int, why: str, tmp_path: Path) -> None:
    there = present(tmp_path, [(i, 0, off) for i in range(4)])
    done = run(name, tmp_path, {**there, "rounds": 50})
    summary = done.result.summary
    assert (summary["status"], summary["rounds"], summary["final"]["round"]) == ("finished", rounds, rounds)
    assert summary["stopped"] == f"{why} at {off} virtual seconds"
    x = START[0]
    for number in range(1, rounds + 1):
        x = mean_of([r.client for r in records(done) if r.round == number and r.outcome == "done"], x)
    if name == "fedavg":
        assert float(done.w) == pytest.approx(x, rel=1e-12)


def test_dropouts_are_counted_and_the_round_waits_until_they_are_known(tmp_path: Path) -> None:
    done = run("fedavg", tmp_path, {"rounds": 20, **speeds(tmp_path, dropout=0.3)})
    system, now = done.driver.exp.system, 0
    for number, record in enumerate(done.records, 1):
        visits = [r for r in records(done) if r.round == number]
        lost = {i: system.lost_at(i, number, 0) for i in range(4)}
        assert {r.client for r in visits if r.outcome == "dropout"} == {i for i, at in lost.items() if at is not None}
        assert record["dropouts"] == sum(at is not None for at in lost.values())
        ends = [int((lost[i] or 1.0) * round(STEPS * SPEEDS[i] * 1e9)) for i in range(4)]
        now += max(ends)
        assert record["virtual_seconds"] == now / 1e9
    assert sum(r["dropouts"] for r in done.records) > 10


# --- over-selection ---------------------------------------------------------------------------------------


def test_of_more_clients_than_are_needed_the_first_count(tmp_path: Path) -> None:
    done = run("fedavg", tmp_path, {"rounds": 6, **fixed(2)}, over_selection=1.3)  # ceil(2.6) = 3 are asked
    x, now = START[0], 0
    for number, record in enumerate(done.records, 1):
        visits = [r for r in records(done) if r.round == number]
        order = sorted(visits, key=lambda r: SPEEDS[r.client])
        assert [r.outcome for r in order] == ["done", "done", "late"]
        assert (record["clients"], record["late"], record["bytes_down"]) == (2, 1, 12)
        now += round(STEPS * SPEEDS[order[1].client] * 1e9)
        assert record["virtual_seconds"] == now / 1e9
        x = mean_of([r.client for r in order[:2]], x)
    assert float(done.w) == pytest.approx(x, rel=1e-12)
    assert len({r.client for r in records(done)}) == 4


def test_of_equally_fast_clients_chance_says_who_counts(tmp_path: Path) -> None:
    even = speeds(tmp_path, [0.01] * 4)
    done = run("fedavg", tmp_path, {"rounds": 12, **even, **fixed(2)}, over_selection=2.0)
    counted = Counter(r.client for r in records(done) if r.outcome == "done")
    assert counted.keys() == {0, 1, 2, 3}  # all four are asked in every round; missing one has a chance of 4 / 2^12
    assert counted.total() == 24


@pytest.mark.parametrize(("over", "asked"), [(1.0, 30), (1.1, 33), (1.3, 39), (1.31, 40), (4.0, 100)])
def test_so_many_are_asked(over: float, asked: int) -> None:
    rng = np.random.default_rng(0)
    cohort, needed, now = select(Fixed(30), Always(), Limits(over_selection=over), 100, 5, 0, rng)
    assert (len(cohort), needed, now) == (asked, 30, 5)
    assert cohort == sorted(set(cohort))


@pytest.mark.parametrize("rule", ["All", "Bernoulli"])
def test_over_selection_of_no_number_of_clients_is_refused(rule: str) -> None:
    more = {"probability": 0.5} if rule == "Bernoulli" else {}
    node = {"_target_": f"fedsim.clients.participation.{rule}", "over_selection": 1.5, **more}
    with pytest.raises(ConfigError, match=r"participation\.over_selection=1\.5 has no effect with participation="):
        build(configure((), {"participation": node}))


# --- who comes back, from trips ---------------------------------------------------------------------------

TRIPS: dict[int, Trip | None] = {
    0: Trip(10, 40, True, 40),
    1: Trip(10, 30, True, 30),
    2: Trip(10, 20, False, 25),  # lost
    3: Trip(10, 60, False, 60),  # lost later
    4: None,  # never comes
    5: Trip(10, 30, True, 30),
    6: Trip(50, 90, True, 90),  # was not there at first
}


@pytest.mark.parametrize(
    ("needed", "deadline", "back", "lost", "close"),
    [
        (1, None, (1,), {0: "late", 2: "dropout", 3: "late", 4: "dropout", 5: "late", 6: "late"}, 30),
        (2, None, (1, 5), {0: "late", 2: "dropout", 3: "late", 4: "dropout", 6: "late"}, 30),
        (3, None, (0, 1, 5), {2: "dropout", 3: "late", 4: "dropout", 6: "late"}, 40),
        (4, None, (0, 1, 5, 6), {2: "dropout", 3: "dropout", 4: "dropout"}, 90),
        (7, None, (0, 1, 5, 6), {2: "dropout", 3: "dropout", 4: "dropout"}, 90),
        (7, 30e-9, (0, 1, 5), {2: "dropout", 3: "late", 4: "dropout", 6: "late"}, 40),  # at 40, and that is in time
        (7, 29e-9, (1, 5), {0: "late", 2: "dropout", 3: "late", 4: "dropout", 6: "late"}, 39),
        (2, 29e-9, (1, 5), {0: "late", 2: "dropout", 3: "late", 4: "dropout", 6: "late"}, 30),
        (7, 1e-9, (), {0: "late", 1: "late", 2: "late", 3: "late", 4: "dropout", 5: "late", 6: "late"}, 11),
        (7, 1e-6, (0, 1, 5, 6), {2: "dropout", 3: "dropout", 4: "dropout"}, 1010),  # it waits for client 4
    ],
)
def test_who_is_back_in_time(
    needed: int, deadline: float | None, back: tuple[int, ...], lost: dict[int, str], close: int
) -> None:
    found = attend(TRIPS, needed, 10, deadline, lambda client: client)
    assert (found.back, found.lost, found.close) == (back, lost, close)


def test_a_client_that_was_not_there_in_time_was_sent_nothing(tmp_path: Path) -> None:
    # SCAFFOLD's cohort of all: client 1 comes a minute later than the deadline.
    there = present(tmp_path, [(0, 0, 99), (1, 60, 99), (2, 0, 99), (3, 0, 99)])
    everybody = {"strategy": {"_target_": "tests.test_attendance.Everybody"}, "rounds": 1}
    done = run("fedavg", tmp_path, {**everybody, **there}, deadline=0.3)
    assert [(r.client, r.outcome, r.bytes_down) for r in records(done) if r.outcome != "done"] == [(1, "late", 0)]
    assert done.records[0]["bytes_down"] == 12


@dataclass(frozen=True)
class Everybody(FedAvg):
    """FedAvg that asks all clients, there or not."""

    def round(self, fed: Federation, state: Any) -> Any:
        return self.step(state, fed.train(range(fed.num_clients), state))


# --- sampling ---------------------------------------------------------------------------------------------


class Odd:
    """Only clients with odd ids are there; counts how often it was asked."""

    when_off = "pause"

    def __init__(self) -> None:
        self.asked = 0

    def check(self, num_clients: int) -> None: ...

    def interval(self, client: int, time: int, seed: int) -> tuple[int, int | None] | None:
        self.asked += 1
        return (0, None) if client % 2 else None


@pytest.mark.parametrize("rule", [Fixed(4), Fraction(0.2)])
@pytest.mark.parametrize("over", [1.0, 1.5])
def test_rules_with_a_number_of_clients_have_it_from_those_that_are_there(rule: Participation, over: float) -> None:
    tally, rng = Counter[int](), np.random.default_rng(7)
    for _ in range(2000):
        cohort, needed, _ = select(rule, Odd(), Limits(over_selection=over), 20, 0, 0, rng)
        assert needed == 4
        assert len(cohort) == len(set(cohort)) == math.ceil(4 * over)
        tally.update(cohort)
    assert tally.keys() == set(range(1, 20, 2))
    expected = 2000 * math.ceil(4 * over) / 10
    assert sum((n - expected) ** 2 / expected for n in tally.values()) < 27.9  # chi-squared, 9 degrees: p = 0.001


def test_if_fewer_are_there_than_are_asked_for_all_of_them_come() -> None:
    cohort, needed, _ = select(Fixed(9), Odd(), Limits(over_selection=2.0), 12, 0, 0, np.random.default_rng(0))
    assert (cohort, needed) == ([1, 3, 5, 7, 9, 11], 6)


def test_other_rules_leave_out_who_is_not_there() -> None:
    rng = np.random.default_rng(3)
    assert select(All(), Odd(), Limits(), 9, 0, 0, rng)[:2] == ([1, 3, 5, 7], 4)
    instead = Counter[int]()
    for seed in range(3000):
        drawn = Bernoulli(0.1).sample(10, np.random.default_rng(seed))
        cohort, needed, _ = select(Bernoulli(0.1), Odd(), Limits(), 10, 0, 0, np.random.default_rng(seed))
        assert needed == len(cohort)
        if any(client % 2 for client in drawn):
            assert cohort == [client for client in drawn if client % 2]
        else:
            assert len(cohort) == 1
            instead.update(cohort)
    assert instead.keys() == {1, 3, 5, 7, 9}  # where all that were drawn are away, one of the others comes
    expected = sum(instead.values()) / 5
    assert expected > 200 and sum((n - expected) ** 2 / expected for n in instead.values()) < 18.5  # 4 degrees


def test_a_cohort_costs_what_it_is_large_not_what_the_population_is() -> None:
    for num_clients in (10_000, 1_000_000):
        there, rng = Odd(), np.random.default_rng(1)
        begin = time.perf_counter()
        for _ in range(50):
            select(Fixed(10), there, Limits(over_selection=1.2), num_clients, 0, 0, rng)
        assert there.asked < 50 * 12 * 5
        assert time.perf_counter() - begin < 2


def test_time_passes_when_nobody_is_there(tmp_path: Path) -> None:
    path = table(tmp_path / "late.csv", "client,on,off", [(0, 50, 60), (1, 40, 45), (3, 70, 99)])
    there = Trace(path=path)
    rng = np.random.default_rng(0)
    assert select(All(), there, Limits(), 4, SECOND, 0, rng) == ([1], 1, 40 * SECOND)
    assert select(Fixed(2), there, Limits(), 4, 62 * SECOND, 0, rng) == ([3], 1, 70 * SECOND)
    with pytest.raises(Ended, match="no client is available any more"):
        select(All(), there, Limits(), 4, 99 * SECOND, 0, rng)


def test_a_round_begins_when_somebody_is_there(tmp_path: Path) -> None:
    done = run("fedavg", tmp_path, {"rounds": 2, **present(tmp_path, [(1, 7, 7.1), (3, 7, 7.1), (0, 9, 99)])})
    # The second round begins at 7.06: client 1 cannot be through by 7.1, client 3 is at 7.093; client 1 leaves at 7.1.
    assert [r["virtual_seconds"] for r in done.records] == [7.06, 7.1]
    assert done.records[1]["dropouts"] == 1


def test_a_cohort_is_of_clients_that_are_there() -> None:
    there, rng = Diurnal(on_share=0.3, period_seconds=1000.0), np.random.default_rng(0)
    for now in range(0, 3000, 37):
        cohort, _, since = select(Fixed(5), there, Limits(), 60, now * SECOND, 4, rng)
        assert since == now * SECOND
        for client in cohort:
            begin, end = there.interval(client, since, 4)
            assert end is not None and begin <= since < end


# --- without all that -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_options_that_change_nothing_leave_the_bits(name: str, tmp_path: Path) -> None:
    slow = {"system": {"_target_": "fedsim.clients.systems.Homogeneous", "seconds_per_step": 0.01}}
    config = (f"strategy={name}",)
    plain = drive(configure(config, slow), tmp_path)
    always = table(tmp_path / "always.csv", "client,on,off", [(i, 0, 1e9) for i in range(7)])
    for more in (
        {"participation.deadline": 1e6},
        {"availability": {"_target_": "fedsim.clients.availability.Trace", "path": always}},
        {"availability": {"_target_": "fedsim.clients.availability.Always"}, "participation.over_selection": 1.0},
    ):
        other = drive(configure(config, {**slow, **more}), tmp_path)
        assert other.state_sha256 == plain.state_sha256
        assert other.records == plain.records


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"participation.deadline": 0}, r"participation\.deadline must be a number in \(0, inf\), or null, got 0"),
        ({"participation.deadline": -1.5}, r"participation\.deadline must be a number in \(0, inf\)"),
        ({"participation.over_selection": 0.9}, r"participation\.over_selection must be a number in \[1, inf\)"),
        ({"eval.virtual_seconds": 0}, r"eval\.virtual_seconds must be a number in \(0, inf\), or null"),
        ({"eval.target_accuracy": 1.2}, r"eval\.target_accuracy must be a number in \(0, 1\], or null"),
        ({"stop.contributions": 0}, r"stop\.contributions must be a whole number, at least 1, or null"),
        ({"system.seconds_per_step": -0.1}, r"system\.seconds_per_step must be a number of seconds >= 0"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(configure((), values))


def test_a_negative_speed_and_a_trace_of_nobody_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"seconds_per_step must be a number of seconds in \[0, 1e\+09\], got '-0.1'"):
        run("fedavg", tmp_path, speeds(tmp_path, [0.1, -0.1, 0.1, 0.1]))
    with pytest.raises(ConfigError, match=r"no line for any of the 4 clients"):
        run("fedavg", tmp_path, present(tmp_path, [(4, 0, 1), (9, 0, 1)]))


def test_a_round_lasts_as_long_as_what_was_really_done_whatever_was_planned(tmp_path: Path) -> None:
    # SCAFFOLD sends two vectors up; one is planned. A chance of losing a task that never comes true changes nothing.
    system = {"_target_": "fedsim.clients.systems.Homogeneous", "seconds_per_step": 0.01, "upload_mbps": 0.001}
    plain = run("scaffold", tmp_path / "plain", {"rounds": 2, "system": system})
    ready = run("scaffold", tmp_path / "ready", {"rounds": 2, "system": {**system, "dropout": 1e-12}})
    seconds = [r["virtual_seconds"] for r in plain.records]
    assert [r["virtual_seconds"] for r in ready.records] == seconds
    assert [(r.begin, r.end) for r in records(ready)] == [(r.begin, r.end) for r in records(plain)]


def test_a_deadline_is_for_training_and_not_for_other_phases(tmp_path: Path) -> None:
    # All clients explore for 30 epochs before round 1, which takes longer than a round may.
    values = {"rounds": 1, "client.steps": 1, "strategy.explore_epochs": 30, "strategy.patience": 30}
    done = run("fedlex", tmp_path, {**values, **speeds(tmp_path, [0.01] * 4)}, deadline=0.05)
    longest = {r.phase: r.end - r.begin for r in records(done)}
    assert done.records[0]["late"] == 0
    assert longest.pop("train") == 10**7
    assert longest and min(longest.values()) > 5 * 10**7
