"""How a cohort is cut into tasks: bits do not depend on it, time does."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.engine.inline import InlineEngine
from fedsim.experiment import build
from fedsim.federation import PIECE, Federation, cut
from fedsim.memory import Memory
from tests.helpers import configure


@given(
    planned=st.lists(st.integers(0, 500), min_size=1, max_size=200),
    slots=st.integers(1, 40),
    least=st.floats(1, 1e5),
)
def test_every_client_is_in_one_range_and_large_ranges_come_first(planned: list[int], slots: int, least: float) -> None:
    ranges = cut(planned, slots, least)
    assert [c for a, b in sorted(ranges) for c in range(a, b)] == list(range(len(planned)))
    assert all(0 < b - a <= PIECE for a, b in ranges)
    work = [sum(planned[a:b]) + b - a for a, b in ranges]
    assert work == sorted(work, reverse=True)


@given(slots=st.integers(1, 64), each=st.integers(1, 4), least=st.floats(1, 1e9))
def test_no_worker_is_without_work(slots: int, each: int, least: float) -> None:
    assert len(cut([19] * slots * each, slots, least)) >= slots


def test_short_work_is_cut_once_per_worker_and_long_work_ever_finer() -> None:
    assert cut([19] * 10, 2, least=1e6) == [(0, 5), (5, 10)]
    assert cut([19] * 10, 2) == [(0, 3), (3, 6), (6, 7), (7, 8), (8, 9), (9, 10)]
    assert cut([19] * 10, 1) == [(0, 10)]


def test_a_task_holds_no_more_parameters_than_fit(tmp_path: Path) -> None:
    program = build(configure(("model=logreg",), {})).program
    fed = Federation(program, InlineEngine(program), None, None, Memory(tmp_path))  # type: ignore[arg-type]
    assert fed._most == PIECE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsim.federation.PIECE_BYTES", 3 * 4 * program.layout.d)
        assert fed._most == 3
        patch.setattr("fedsim.federation.PIECE_BYTES", 1)
        assert fed._most == 1
