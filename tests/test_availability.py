"""Availability: the trips of tasks, and when clients of each model are there."""

import logging
import math
import random
import time as real_time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedsim import plugins
from fedsim.clients.availability import (
    Always,
    Availability,
    Bernoulli,
    Diurnal,
    Markov,
    Stretch,
    Trace,
    Trip,
    trip,
)
from fedsim.clients.systems import Exponential, Homogeneous
from fedsim.compose import compose
from fedsim.config import check
from fedsim.errors import ConfigError

CONF = Path(__file__).parents[1] / "conf" / "availability"
S = 10**9
CLIENTS = 4000


@dataclass(frozen=True)
class Fixed:
    """Every task takes as long, and is lost after the same share or not at all."""

    busy: int
    lost: float | None = None

    def duration_ns(self, *_: Any) -> int:
        return self.busy

    def lost_at(self, *_: Any) -> float | None:
        return self.lost


@dataclass(frozen=True)
class Stretches:
    """Clients that are there in these stretches."""

    stretches: Sequence[Stretch]
    when_off: str = "pause"

    def check(self, num_clients: int) -> None: ...

    def interval(self, client: int, time: int, seed: int) -> Stretch | None:
        return next(((a, b) for a, b in self.stretches if b is None or b > time), None)


def go(availability: Availability, busy: int, time: int = 0, lost: float | None = None) -> Trip | None:
    return trip(
        Fixed(busy, lost), availability, client=0, visit=1, time=time, steps=1, bytes_down=0, bytes_up=0, seed=0
    )


def there(model: Availability, client: int, time: int, seed: int = 0) -> bool:
    stretch = model.interval(client, time, seed)
    return stretch is not None and stretch[0] <= time


def walk(model: Availability, client: int, until: int, seed: int = 0) -> Iterator[tuple[int, int]]:
    """The stretches that begin before ``until``."""
    time = 0
    while (stretch := model.interval(client, time, seed)) is not None and stretch[0] < until:
        begin, end = stretch
        assert end is not None
        yield begin, end
        time = end


def far_off(sample: Sequence[float], cdf: Callable[[float], float]) -> float:
    """Kolmogorov-Smirnov distance times sqrt(n): above 1.95 with probability 0.001 if the sample follows ``cdf``."""
    n = len(sample)
    at = [cdf(x) for x in sorted(sample)]
    return max(max((i + 1) / n - p, p - i / n) for i, p in enumerate(at)) * math.sqrt(n)


def near(count: float, n: int, p: float) -> bool:
    """Whether a count of n independent events of probability p is within four deviations of its mean."""
    return abs(count / n - p) < 4 * math.sqrt(p * (1 - p) / n)


# --- trips ------------------------------------------------------------------------------------------------

DAYS = ((10, 20), (30, 40), (50, 60))


@pytest.mark.parametrize(
    ("time", "busy", "lost", "pause", "drop"),
    [
        # within a stretch: it waits for the client first
        (0, 5, None, Trip(10, 15, True, 15), Trip(10, 15, True, 15)),
        (12, 5, None, Trip(12, 17, True, 17), Trip(12, 17, True, 17)),
        (20, 5, None, Trip(30, 35, True, 35), Trip(30, 35, True, 35)),
        # through exactly when the client leaves, and one nanosecond later
        (12, 8, None, Trip(12, 20, True, 20), Trip(12, 20, True, 20)),
        (12, 9, None, Trip(12, 31, True, 31), Trip(12, 20, False, 30)),
        # over several stretches: 1 + 10 + 4
        (19, 15, None, Trip(19, 54, True, 54), Trip(19, 20, False, 30)),
        # the client never comes back: 30 are there in all
        (10, 30, None, Trip(10, 60, True, 60), Trip(10, 20, False, 30)),
        (10, 31, None, Trip(10, 60, False, None), Trip(10, 20, False, 30)),
        (55, 6, None, Trip(55, 60, False, None), Trip(55, 60, False, None)),
        # a crash after half of the work, while the client is there
        (12, 8, 0.5, Trip(12, 16, False, 16), Trip(12, 16, False, 16)),
        (12, 24, 0.5, Trip(12, 34, False, 34), Trip(12, 20, False, 30)),
        # no work at all
        (25, 0, None, Trip(30, 30, True, 30), Trip(30, 30, True, 30)),
        (25, 0, 0.5, Trip(30, 30, False, 30), Trip(30, 30, False, 30)),
        # nobody comes any more
        (60, 1, None, None, None),
    ],
)
def test_trips_by_hand(time: int, busy: int, lost: float | None, pause: Trip | None, drop: Trip | None) -> None:
    assert go(Stretches(DAYS), busy, time, lost) == pause
    assert go(Stretches(DAYS, "drop"), busy, time, lost) == drop


@pytest.mark.parametrize("when_off", ["pause", "drop"])
def test_a_stretch_without_end_lasts_as_long_as_the_task(when_off: str) -> None:
    assert go(Stretches([(5, None)], when_off), 10**30, 3) == Trip(5, 5 + 10**30, True, 5 + 10**30)
    assert go(Always(), 7, 3) == Trip(3, 10, True, 10)


def test_what_a_task_is_asked_about_reaches_the_models() -> None:
    asked = []

    class Asked(Homogeneous):
        def duration_ns(self, *arguments: Any) -> int:
            asked.append(arguments)
            return 5

        def lost_at(self, *arguments: Any) -> None:
            asked.append(arguments)

    trip(Asked(), Always(), 4, "task.2", 9, 100, 30, 40, 8)
    assert asked == [(4, "task.2", 100, 30, 40, 8), (4, "task.2", 8)]


gaps = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=8)


@given(gaps=gaps, time=st.integers(0, 100), busy=st.integers(0, 100), lost=st.none() | st.floats(0.01, 0.99))
@settings(deadline=None, derandomize=True)
def test_time_spent_while_available_is_the_duration(
    gaps: list[tuple[int, int]], time: int, busy: int, lost: float | None
) -> None:
    stretches, at = list[Stretch](), 0
    for off, on in gaps:
        stretches.append((at + off, at + off + on))
        at += off + on

    def spent(begin: int, end: int) -> int:
        return sum(any(b is not None and a <= t < b for a, b in stretches) for t in range(begin, end))

    wanted = busy if lost is None else math.floor(busy * lost)
    paused = go(Stretches(stretches), busy, time, lost)
    dropped = go(Stretches(stretches, "drop"), busy, time, lost)
    if paused is None or dropped is None:
        assert paused is dropped is None
        assert spent(time, at) == 0
        return
    assert spent(time, paused.begin) == 0 and (spent(paused.begin, paused.begin + 1) == 1)
    if paused.back is not None:
        assert spent(paused.begin, paused.end) == wanted
        assert paused.finished == (lost is None) and paused.back == paused.end
    else:  # the work that is left would not fit
        assert spent(paused.begin, at) < wanted and paused.end == at and not paused.finished
    through = spent(dropped.begin, dropped.begin + wanted) == wanted  # without a break
    assert dropped.begin == paused.begin
    assert dropped.finished == (through and lost is None)
    assert spent(dropped.begin, dropped.end) == dropped.end - dropped.begin
    if through:
        assert dropped == paused
    elif dropped.back is not None:
        assert spent(dropped.end, dropped.back) == 0 and spent(dropped.back, dropped.back + 1) == 1
    else:
        assert spent(dropped.end, at) == 0


# --- what holds for every model ---------------------------------------------------------------------------


def recording(folder: Path, text: str) -> str:
    path = folder / "trace.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


MODELS: dict[str, Callable[[str], Availability]] = {
    "rare": lambda _: Bernoulli(0.2, 60.0),
    "often": lambda _: Bernoulli(0.8, 60.0),
    "markov": lambda _: Markov(100.0, 300.0),
    "restless": lambda _: Markov(2.0, 20.0),
    "diurnal": lambda _: Diurnal(0.7, 1000.0),
    "night": lambda _: Diurnal(0.1, 1000.0, spread=0.0),
    "trace": lambda path: Trace(path, 1000.0),
}
LINES = "client,on,off\n" + "".join(f"{c},{a},{a + 50 + c}\n" for c in range(8) for a in (0, 200 + c, 940 - c))


@pytest.fixture(params=MODELS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Availability]:
    path = recording(tmp_path, LINES)
    return lambda: MODELS[request.param](path)


def test_answers_do_not_depend_on_earlier_questions(make: Callable[[], Availability]) -> None:
    chance = random.Random(0)
    questions = [(chance.randrange(8), chance.randrange(3000 * S), chance.randrange(2)) for _ in range(300)]
    one = make()
    for question in questions:
        assert one.interval(*question) == make().interval(*question)
    for question in sorted(questions, reverse=True):
        assert one.interval(*question) == make().interval(*question)


def test_stretches_follow_each_other_with_gaps(make: Callable[[], Availability]) -> None:
    model, chance = make(), random.Random(0)
    for client in range(8):
        before = -1
        for begin, end in walk(model, client, 5000 * S):
            assert before < begin < end
            # The same stretch from wherever it is asked for: in the gap before it, at its ends, inside.
            for time in (max(before, 0), begin, chance.randrange(begin, end), end - 1):
                assert model.interval(client, time, 0) == (begin, end)
            before = end


@pytest.mark.parametrize("name", ["rare", "often", "markov", "diurnal"])
def test_seeds_and_clients_differ(name: str) -> None:
    model = MODELS[name]("")
    rows = {tuple(walk(model, client, 5000 * S, seed)) for client in range(8) for seed in (0, 1)}
    assert len(rows) == 16


def test_trips_do_not_depend_on_earlier_trips(make: Callable[[], Availability]) -> None:
    def ask(system: Exponential, model: Availability, task: tuple[int, int, int]) -> Trip | None:
        client, visit, time = task
        return trip(system, model, client, visit, time, 2000, 10**6, 10**6, 0)

    options = {"jitter": 0.2, "dropout": 0.3, "upload_mbps": 5.0}
    chance = random.Random(0)
    tasks = [(chance.randrange(8), chance.randrange(9), chance.randrange(5000 * S)) for _ in range(60)]
    system, model = Exponential(0.1, **options), make()
    asked = {task: ask(system, model, task) for task in tasks}
    for task in reversed(tasks):
        assert ask(system, model, task) == asked[task] == ask(Exponential(0.1, **options), make(), task)
    assert len({t.end - t.begin for t in asked.values() if t}) > 10


# --- Bernoulli --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_slots_are_independent_of_each_other_and_of_other_clients(p: float) -> None:
    model = Bernoulli(p, 10.0)
    rows = [[there(model, client, slot * 10 * S) for slot in range(4)] for client in range(CLIENTS)]
    for slot in range(4):
        assert near(sum(row[slot] for row in rows), CLIENTS, p)
    # independent: both with probability p^2, of neighbouring slots, of distant ones, and of neighbouring clients
    for one, other in ((0, 1), (1, 2), (0, 3)):
        assert near(sum(row[one] and row[other] for row in rows), CLIENTS, p * p)
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    assert near(sum(a[0] and b[0] for a, b in pairs), len(pairs), p * p)


def test_a_slot_is_there_as_a_whole() -> None:
    model = Bernoulli(0.5, 10.0)
    for slot in range(100):
        inside = {there(model, 0, slot * 10 * S + t) for t in (0, 1, 5 * S, 10 * S - 1)}
        assert len(inside) == 1, slot


def test_stretches_of_slots_have_geometric_lengths() -> None:
    # A stretch has the length k with probability p^(k - 1) (1 - p); the first is left out, it may have begun before 0.
    p, model = 0.6, Bernoulli(0.6, 10.0)
    lengths = [(b - a) // (10 * S) for client in range(20) for a, b in list(walk(model, client, 5000 * S))[1:]]
    for k in range(1, 6):
        assert near(lengths.count(k), len(lengths), p ** (k - 1) * (1 - p)), k


def test_a_probability_of_one_is_always() -> None:
    assert Bernoulli(1, 10.0).interval(3, 5, 0) == Always().interval(3, 5, 0) == (0, None)


# --- Markov -----------------------------------------------------------------------------------------------


def test_turns_start_and_stay_in_equilibrium_and_forget_exponentially() -> None:
    # P(on at 0 and at t) = q^2 + q (1 - q) exp(-(1/on + 1/off) t), q = on / (on + off)
    on, off = 100.0, 300.0
    q, model = on / (on + off), Markov(on, off)
    times = (0, 20, 75, 2000)
    rows = [[there(model, client, t * S) for t in times] for client in range(CLIENTS)]
    for i, t in enumerate(times):
        assert near(sum(row[i] for row in rows), CLIENTS, q), t
        both = q * q + q * (1 - q) * math.exp(-(1 / on + 1 / off) * t)
        assert near(sum(row[0] and row[i] for row in rows), CLIENTS, both), t


def test_turns_have_exponential_lengths() -> None:
    model = Markov(100.0, 300.0)
    rows = [list(walk(model, client, 20_000 * S)) for client in range(100)]
    # A few turns of each client, by number: chosen by their place in time, long ones would be seen more often.
    on = [(b - a) / S for row in rows for a, b in row[1:11]]
    off = [(c - b) / S for row in rows for (_, b), (c, _) in pairwise(row[:11])]
    assert len(on) == len(off) == 1000
    assert far_off(on, lambda x: 1 - math.exp(-x / 100)) < 1.95
    assert far_off(off, lambda x: 1 - math.exp(-x / 300)) < 1.95


def test_a_turn_tells_nothing_about_the_next_ones() -> None:
    # Two turns are both shorter than their medians, ln 2 times the mean, with probability 1/4 if they are independent.
    model, short = Markov(100.0, 300.0), math.log(2) * S
    rows = [list(walk(model, client, 20_000 * S))[:11] for client in range(200)]
    turns = [(c - b < 300 * short, d - c < 100 * short) for row in rows for (_, b), (c, d) in pairwise(row)]
    assert near(sum(off and on for off, on in turns), len(turns), 0.25)
    assert near(sum(a[1] and b[1] for a, b in pairwise(turns)), len(turns) - 1, 0.25)
    assert near(sum(a[1] and b[0] for a, b in pairwise(turns)), len(turns) - 1, 0.25)


# --- diurnal ----------------------------------------------------------------------------------------------


def test_at_any_time_the_share_of_a_spread_population_is_there() -> None:
    model = Diurnal(0.3, 1000.0)
    for t in (0, 1, 250, 999, 12_345):
        assert near(sum(there(model, client, t * S) for client in range(CLIENTS)), CLIENTS, 0.3), t


@pytest.mark.parametrize("spread", [1.0, 0.25])
def test_windows_begin_uniformly_in_the_part_of_the_day_asked_for(spread: float) -> None:
    model = Diurnal(0.3, 1000.0, spread)
    begins = [stretch[0] % (1000 * S) for c in range(CLIENTS) if (stretch := model.interval(c, 5000 * S, 0))]
    assert far_off([begin / (1000 * S) for begin in begins], lambda x: min(1.0, x / spread)) < 1.95


def test_a_client_comes_at_the_same_time_of_every_day() -> None:
    model = Diurnal(0.3, 1000.0)
    for client in range(50):
        days = list(walk(model, client, 6000 * S))[1:]  # the first may have begun before the run
        assert [b - a for a, b in days] == [300 * S] * len(days)
        assert {c - a for (a, _), (c, _) in pairwise(days)} == {1000 * S}


def test_windows_that_began_before_the_run_are_there_at_its_start() -> None:
    model = Diurnal(0.3, 1000.0)
    wrapped = [c for c in range(200) if there(model, c, 0)]
    assert len(wrapped) > 30
    for client in wrapped:
        (begin, end), again, *_ = walk(model, client, 2000 * S)
        assert begin == 0 and 0 < end <= 300 * S and again == (end + 700 * S, end + 1000 * S)


def test_without_spread_all_clients_come_at_the_start_of_the_day() -> None:
    model = Diurnal(0.25, 1000.0, spread=0)
    assert {tuple(walk(model, c, 3000 * S)) for c in range(50)} == {
        ((0, 250 * S), (1000 * S, 1250 * S), (2000 * S, 2250 * S))
    }


def test_the_whole_day_is_always() -> None:
    assert Diurnal(1).interval(3, 5, 0) == (0, None)


# --- traces -----------------------------------------------------------------------------------------------


def test_a_trace_is_read_in_any_order_and_touching_lines_are_one_stretch(tmp_path: Path) -> None:
    model = Trace(recording(tmp_path, "client,on,off\n5,30.5,40\n1,0,10\n5,10,20\n5,20,25\n"))
    assert list(walk(model, 5, 100 * S)) == [(10 * S, 25 * S), (30 * S + S // 2, 40 * S)]
    assert list(walk(model, 1, 100 * S)) == [(0, 10 * S)]
    assert model.interval(5, 40 * S, 0) is None
    assert model.interval(2, 0, 0) is None


def test_a_stretch_goes_on_over_the_end_of_the_trace_into_its_repeat(tmp_path: Path) -> None:
    model = Trace(recording(tmp_path, "client,on,off\n0,90,100\n0,0,10\n0,40,50\n1,0,60\n1,60,100\n"), 100)
    wanted = [(0, 10), (40, 50), (90, 110), (140, 150), (190, 210), (240, 250), (290, 310)]
    assert list(walk(model, 0, 300 * S)) == [(a * S, b * S) for a, b in wanted]
    assert model.interval(1, 0, 0) == model.interval(1, 250 * S, 0) == (0, None)


PATTERNS = st.lists(st.booleans(), min_size=12, max_size=12).filter(lambda pattern: any(pattern) and not all(pattern))


@given(pattern=PATTERNS)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_a_repeated_trace_is_the_same_in_every_period(pattern: list[bool], tmp_path_factory: Any) -> None:
    # A line for every second of twelve in which the client is there.
    lines = "client,on,off\n" + "".join(f"0,{i},{i + 1}\n" for i, on in enumerate(pattern) if on)
    model = Trace(recording(tmp_path_factory.mktemp("trace"), lines), 12.0)
    on = [pattern[t % 12] for t in range(60)]
    assert [there(model, 0, t * S) for t in range(60)] == on
    for begin, end in walk(model, 0, 40 * S):
        assert all(on[t] for t in range(begin // S, end // S))
        assert not on[end // S] and (begin == 0 or not on[begin // S - 1])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("0,10,20\n0,15,25\n", r"line 3: overlaps with line 2; client 0 can be there only once at a time"),
        ("0,15,25\n0,10,20\n", r"line 2: overlaps with line 3"),
        ("0,10,20\n1,15,25\n0,10,20\n", r"line 4: overlaps with line 2"),
        ("0,10,20\n0,20,10\n", r"line 3: on must be before off, got on=20 and off=10"),
        ("0,10,10\n", r"line 2: on must be before off"),
        ("0,-1,10\n", r"line 2: on must be a number of seconds in \[0, 4e\+09\], got '-1'"),
        ("0,1,inf\n", r"line 2: off must be a number of seconds .* got 'inf'"),
        ("0,1,\n", r"line 2: off must be a number of seconds .* got ''"),
        ("0,morning,noon\n", r"line 2: on must be a number of seconds .* got 'morning'"),
        ("a,1,2\n", r"line 2: client must be a whole number, at least 0, got 'a'"),
        ("0,1\n", r"line 2: 3 fields are needed, got 2"),
    ],
)
def test_lines_that_say_nothing_clear_are_refused_by_number(lines: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^availability\.path=.*trace\.csv, line") as caught:
        Trace(recording(tmp_path, "client,on,off\n" + lines))
    caught.match(message)
    assert "\n" not in str(caught.value)


def test_a_stretch_beyond_the_repeat_is_refused(tmp_path: Path) -> None:
    path = recording(tmp_path, "client,on,off\n0,10,60\n")
    Trace(path, 60)
    with pytest.raises(ConfigError, match=r"line 2: off must be .* in \[0, 59\] \(repeat_seconds\), got '60'"):
        Trace(path, 59)


def test_a_trace_of_other_clients_is_refused(tmp_path: Path) -> None:
    model = Trace(recording(tmp_path, "client,on,off\n7,0,10\n"))
    with pytest.raises(ConfigError, match=r"no line for any of the 7 clients \(0 to 6\), so nobody would ever take"):
        model.check(7)
    with pytest.raises(ConfigError, match=r"no line for any"):
        Trace(recording(tmp_path, "client,on,off\n")).check(7)


def test_clients_without_a_line_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Trace(recording(tmp_path, "client,on,off\n0,0,10\n2,0,10\n9,0,10\n"))
    with caplog.at_level(logging.WARNING, "fedsim"):
        model.check(8)
    assert "has no line for 6 of 8 clients" in caplog.text


def test_a_missing_trace_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"availability\.path=none\.csv cannot be read: No such file"):
        Trace("none.csv")


# --- config, cost -----------------------------------------------------------------------------------------


def test_every_config_builds_its_model(tmp_path: Path) -> None:
    built: dict[str, Any] = {path.stem: OmegaConf.load(path) for path in CONF.glob("*.yaml")}
    built["trace"]["path"] = recording(tmp_path, LINES)
    models = {name: instantiate(config) for name, config in built.items()}
    assert {name: type(model).__name__ for name, model in models.items()} == {
        "always": "Always",
        "bernoulli": "Bernoulli",
        "diurnal": "Diurnal",
        "markov": "Markov",
        "trace": "Trace",
    }
    for model in models.values():
        model.check(8)
        assert model.when_off == "pause"


@pytest.mark.parametrize("value", [-0.1, 0, math.nan, math.inf, "1", True])
def test_impossible_values_are_refused_by_config_key(value: Any) -> None:
    cases: list[tuple[str, Callable[[], Availability]]] = [
        ("slot_seconds", lambda: Bernoulli(0.5, value)),
        ("on_seconds", lambda: Markov(value, 1.0)),
        ("off_seconds", lambda: Markov(1.0, value)),
        ("period_seconds", lambda: Diurnal(0.5, value)),
        ("repeat_seconds", lambda: Trace("none.csv", value)),
    ]
    for name, build in cases:
        with pytest.raises(
            ConfigError, match=rf"availability\.{name} must be a number of seconds in \[0\.001, 4e\+09\]"
        ):
            build()
    with pytest.raises(ConfigError, match=r"availability\.probability must be a number in \[0\.001, 0\.999\], or 1"):
        Bernoulli(0.9999 if value is True else value, 1.0)
    with pytest.raises(ConfigError, match=r"availability\.on_share must be a number in \(0, 1\]"):
        Diurnal(value)
    if value != 0:
        with pytest.raises(ConfigError, match=r"availability\.spread must be a number in \[0, 1\]"):
            Diurnal(0.5, spread=value)


@pytest.mark.parametrize("model", [Bernoulli, Markov, Diurnal])
@pytest.mark.parametrize("when_off", ["stop", None, False])
def test_what_happens_to_tasks_is_pause_or_drop(model: Any, when_off: Any) -> None:
    with pytest.raises(ConfigError, match=r"availability\.when_off must be pause or drop, got"):
        model(0.5, 1.0, when_off=when_off)


def test_configs_of_older_runs_have_no_availability() -> None:
    config = compose([])
    assert config["availability"]["_target_"] == "fedsim.clients.availability.Always"
    del config["availability"]
    check(config)
    with pytest.raises(ConfigError, match="availability must be a config with a `_target_`"):
        check(config | {"availability": 3})


def test_an_availability_without_its_methods_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"methods check, interval; Empty has no check"):
        plugins.instantiate({"_target_": "tests.wrong.Empty"}, "availability")


def test_trips_are_fast() -> None:
    # 10 us each where they were measured; generous for a busy machine.
    system, model = Exponential(0.15, jitter=0.05, dropout=0.1), Markov(3600.0, 3600.0)
    now = [0] * 1000
    begin = real_time.perf_counter()
    for i in range(20_000):
        made = trip(system, model, i % 1000, i, now[i % 1000], 200, 10**4, 10**4, 0)
        assert made is not None and made.back is not None
        now[i % 1000] = made.back
    assert real_time.perf_counter() - begin < 2.0
