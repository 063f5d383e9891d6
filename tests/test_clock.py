"""Virtual time: exact, deterministic, and the same after a restore."""

import json
import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.clock import Clock, Event, ns
from fedsim.errors import RunError

events = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from(["arrival", "timer"]), st.integers(0, 3) | st.sampled_from("ab")),
    max_size=30,
)


def drain(clock: Clock) -> list[Event]:
    return [clock.pop() for _ in range(len(clock))]


def filled(plan: list[tuple[int, str, int | str]]) -> Clock:
    clock = Clock()
    for i, (due, kind, key) in enumerate(plan):
        clock.schedule(due, kind, key, {"n": i})
    return clock


@given(plan=events)
@settings(deadline=None, derandomize=True)
def test_events_come_by_time_kind_key_and_then_as_scheduled(plan: list[tuple[int, str, int | str]]) -> None:
    order = sorted(
        range(len(plan)),
        key=lambda i: (plan[i][0], plan[i][1] == "timer", isinstance(plan[i][2], str), str(plan[i][2]), i),
    )
    assert [event.payload["n"] for event in drain(filled(plan))] == order


@given(plan=events, taken=st.integers(0, 10))
@settings(deadline=None, derandomize=True)
def test_a_restored_clock_goes_on_like_the_one_saved(plan: list[tuple[int, str, int | str]], taken: int) -> None:
    clock = filled(plan)
    for _ in range(min(taken, len(plan))):
        clock.pop()
    state = clock.state()
    restored = Clock.restore(json.loads(json.dumps(state)))  # a plain tree, lists for tuples
    assert restored.state() == state
    for one in (clock, restored):
        one.schedule(one.now, "arrival", 0, "late")
        one.schedule(one.now, "timer", 0, "late")
    assert restored.now == clock.now
    assert drain(restored) == drain(clock)


def test_equal_queues_have_equal_states_however_their_heaps_grew() -> None:
    one, other = Clock(), Clock()
    for i in range(8):
        one.schedule(10, "arrival", i)
        other.schedule(i, "timer", 0)
        one.schedule(i, "timer", 0)
        other.schedule(10, "arrival", i)
    strip = [[(due, kind, key) for due, kind, key, *_ in clock.state()["events"]] for clock in (one, other)]
    assert strip[0] == strip[1]


def test_arrivals_precede_timers_that_are_due_together() -> None:
    clock = Clock()
    clock.schedule(5, "timer", "deadline")
    clock.schedule(5, "arrival", 99)
    assert [event.kind for event in drain(clock)] == ["arrival", "timer"]
    assert clock.now == 5


def test_payloads_are_never_compared() -> None:
    clock = Clock()
    for _ in range(3):
        clock.schedule(1, "arrival", 7, {"not": "comparable"})
    assert len(drain(clock)) == 3


def test_time_passes_without_events_and_never_moves_back() -> None:
    clock = Clock()
    clock.schedule(10, "timer", 0)
    clock.advance(ns(2.5))
    assert (clock.now, clock.seconds) == (2_500_000_000, 2.5)
    event = clock.pop()  # overdue: it comes late, and says when it was due
    assert event == Event(10, "timer", 0)
    assert clock.now == 2_500_000_000
    clock.schedule(clock.now, "arrival", 1)  # now is not the past
    assert clock.pop().time == clock.now


def test_an_empty_queue_says_what_to_do() -> None:
    clock = Clock()
    clock.advance(ns(3))
    with pytest.raises(RunError, match=r"at 3 virtual seconds, but no client is at work .* dispatch a client"):
        clock.pop()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, "arrival", 3), r"arrival 3 in the past: it is due at 4 ns, now is 5 ns"),
        ((6.0, "arrival", 3), r"whole nanoseconds, got 6\.0; convert seconds with fedsim\.clock\.ns"),
        ((True, "arrival", 3), r"whole nanoseconds"),
        ((6, "alarm", 3), r"one of arrival, timer, got 'alarm'"),
        ((6, "timer", 3.0), r"client id or a tag"),
        ((6, "timer", None), r"client id or a tag"),
    ],
)
def test_impossible_events_are_refused(arguments: Any, message: str) -> None:
    clock = Clock()
    clock.advance(5)
    with pytest.raises(ValueError, match=message):
        clock.schedule(*arguments)
    assert len(clock) == 0


@pytest.mark.parametrize("duration", [-1, 1.0, True, None])
def test_only_whole_nanoseconds_pass(duration: Any) -> None:
    with pytest.raises(ValueError, match="advances by whole nanoseconds"):
        Clock().advance(duration)


# Two roundings, of n / 1e9 and of the product, are off by at most n 2^-53 nanoseconds each: together below 1/2.
@given(nanoseconds=st.integers(0, 2**51 - 1))
@settings(deadline=None, derandomize=True)
def test_ns_inverts_seconds(nanoseconds: int) -> None:
    assert ns(nanoseconds / 1e9) == nanoseconds


def test_ns_rounds_and_is_exact_for_whole_seconds() -> None:
    assert ns(0.1) == 100_000_000
    assert ns(1.4e-9) == 1
    assert ns(10**30) == 10**39


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf, -1e-12, -1, 1e308])
def test_ns_refuses_what_is_no_duration(seconds: float) -> None:
    with pytest.raises(ValueError, match="finite number of seconds >= 0"):
        ns(seconds)


def test_the_queue_handles_many_events_a_second() -> None:
    # 50,000 events in flight, each replaced as it comes: generous for a busy machine.
    clock, count = Clock(), 50_000
    begin = time.perf_counter()
    for i in range(count):
        clock.schedule((i * 7919) % count, "arrival", i)
    for _ in range(count):
        clock.pop()
    assert time.perf_counter() - begin < 2.0
