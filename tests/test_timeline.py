"""Who worked when in virtual time: times of clients, the picture, the command. How pictures look was judged by eye."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

from fedsim.errors import ConfigError
from fedsim.report.timeline import Task, Timeline, draw, facts, plot_timeline, read_timeline, write_own_timeline
from fedsim.visits import HEADER, LEAST
from tests.cli import Fedsim
from tests.run_dirs import PROX, timed_run, visit_line

S = 10**9  # nanoseconds


def tasks(*times: tuple[float, float], steps: int = 10, outcome: str = "done") -> list[Task]:
    return [Task(int(b * S), int(e * S), steps, outcome) for b, e in times]


def timeline(clients: Mapping[int, list[Task]], *models: float, open_ended: bool = False) -> Timeline:
    return Timeline(clients, [int(m * S) for m in models], int(models[-1] * S), Counter(), open_ended)


# --- times of clients -------------------------------------------------------------------------------------


def test_a_client_is_idle_before_between_and_after_its_tasks() -> None:
    found = timeline({3: tasks((1, 2), (4, 7)), 5: tasks((0, 8))}, 8)
    assert found.busy == {3: 4 * S, 5: 8 * S}
    assert found.idle == {3: 4 * S, 5: 0}  # of 3: seconds 0-1, 2-4 and 7-8
    assert found.idle_shares == [0.5, 0.0]


def test_tasks_of_two_phases_at_one_time_are_one_stretch_and_work_past_the_end_is_cut() -> None:
    found = timeline({0: tasks((0, 3), (1, 2), (2, 5)), 1: tasks((4, 9))}, 6)
    assert found.busy == {0: 5 * S, 1: 2 * S}
    assert found.idle == {0: 1 * S, 1: 4 * S}


def test_what_follows_the_last_task_of_an_event_driven_run_is_not_called_idle() -> None:
    # Client 1 is perhaps in the middle of a task when the run ends at 10.
    found = timeline({0: tasks((0, 4), (6, 10)), 1: tasks((0, 4))}, 10, open_ended=True)
    assert found.idle == {0: 2 * S, 1: 0}
    assert timeline({1: tasks((0, 4))}, 10).idle == {1: 6 * S}


def test_a_run_is_read_from_its_files(tmp_path: Path) -> None:
    run = timed_run(
        tmp_path / "a",
        [
            *((7, 5, 6, 4, "done"), (7, 1, 3, 4, "done"), (2, 0, 2, 0, "dropout"), (2, 2, 4.5, 0, "late")),
            (-1, 0, 6, 9, "done"),  # the server
        ],
        models=[3, 6],
    )
    found = read_timeline(run)
    assert found is not None
    assert found.tasks == {
        7: [Task(1 * S, 3 * S, 4, "done"), Task(5 * S, 6 * S, 4, "done")],
        2: [Task(0, 2 * S, 0, "dropout"), Task(2 * S, 4 * S + S // 2, 0, "late")],
    }
    assert (found.models, found.end, found.contributions) == ([3 * S, 6 * S], 6 * S, 2)
    assert found.idle == {7: 3 * S, 2: S + S // 2}
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    assert [list(map(float, row.values())) for row in rows] == [[2, 2, 0, 4.5, 1.5], [7, 2, 2, 3, 3]]
    assert list(rows[0]) == ["client", "tasks", "contributions", "busy_seconds", "idle_seconds"]
    # 1.5 of 6 and 3 of 6 seconds
    assert facts(found) == ["2", "2", "37.50 %", "25.00 %", "50.00 %", "–", "–", "6.0 s"]


def test_staleness_is_added_up_over_the_rounds(tmp_path: Path) -> None:
    run = timed_run(tmp_path / "a", [(0, 0, 2, 4, "done")], [1, 2, 3], [{"0": 1}, {"0": 2, "3": 1}, {}])
    found = read_timeline(run)
    assert found is not None and found.staleness == {0: 3, 3: 1} and found.open_ended
    assert facts(found)[5:7] == ["0.75", "3"]  # (0 + 0 + 0 + 3) / 4


def test_a_run_without_times_has_no_timeline(tmp_path: Path) -> None:
    visit = (0, 0.0, 2.0, 4, "done")
    assert read_timeline(timed_run(tmp_path / "no clock", [(0, 0, 0, 4, "done")], [0.0, 0.0])) is None
    assert read_timeline(timed_run(tmp_path / "visits last no time", [(0, 0, 0, 4, "done")], [1, 2])) is None
    old = timed_run(tmp_path / "old", [visit], [2])
    (old / "visits.csv").write_text(",".join(HEADER.split(",")[:LEAST]) + "\n" + visit_line(visit, LEAST))
    assert read_timeline(old) is None
    gone = timed_run(tmp_path / "gone", [visit], [2])
    (gone / "visits.csv").unlink()
    assert read_timeline(gone) is None
    assert read_timeline(timed_run(tmp_path / "whole", [visit], [2])) is not None


def test_damaged_times_are_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"client 4 begins at 2000000000 ns and ends at 1000000000 ns; restore"):
        read_timeline(timed_run(tmp_path / "a", [(4, 2, 1, 4, "done")], [3]))


@pytest.mark.parametrize("table", [[1], {"x": 1}, {"0": "many"}, {"-1": 2}, {"1": -2}, 5])
def test_a_damaged_table_of_staleness_is_said(tmp_path: Path, table: Any) -> None:
    run = timed_run(tmp_path / "a", [(4, 0, 1, 4, "done")], [3], [table])
    with pytest.raises(ConfigError, match="round 1: `staleness` must be a table of whole numbers"):
        read_timeline(run)


# --- the picture ------------------------------------------------------------------------------------------


def bars(figure: Figure, panel: int = 0) -> list[tuple[float, float, float, str]]:
    """Row, begin, end and colour of every bar."""
    from matplotlib.colors import to_hex

    found = []
    for bar in figure.axes[panel].collections:
        if isinstance(bar, PolyCollection):
            colour = to_hex(np.asarray(bar.get_facecolor())[0]).upper()
            for path in bar.get_paths():
                box = path.get_extents()
                found.append((round((box.y0 + box.y1) / 2, 6), round(box.x0, 6), round(box.x1, 6), colour))
    return sorted(found)


def models(figure: Figure, panel: int = 0) -> list[float]:
    return [
        float(segment[0][0])
        for lines in figure.axes[panel].collections
        if isinstance(lines, LineCollection)
        for segment in lines.get_segments()
    ]


def rows(figure: Figure, panel: int = 0) -> list[str]:
    return [label.get_text() for label in figure.axes[panel].get_yticklabels()]


def words(figure: Figure) -> str:
    return figure.get_suptitle()


def test_a_bar_is_a_task_and_its_colour_says_how_it_ended() -> None:
    clients = {
        1: tasks((0, 40), steps=20) + tasks((40, 70), outcome="dropout"),
        2: tasks((0, 20), steps=20) + tasks((30, 60), outcome="late"),
    }
    figure = draw([("a", timeline(clients, 40, 70))])
    assert rows(figure) == ["2", "1"]  # one and two seconds a step: the faster one first
    done, dropout, late = "#56B4E9", "#D55E00", "#E69F00"
    assert bars(figure) == [(0, 0, 20, done), (0, 30, 60, late), (1, 0, 40, done), (1, 40, 70, dropout)]
    assert models(figure) == [40, 70]
    assert [t.get_text() for t in figure.axes[0].texts] == ["20", "20"]  # steps of work that was lost say nothing
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["done", "lost on the way", "cut off: too late", "new global model"]
    assert figure.axes[0].get_xlim() == (0, 70) and "s" in figure.axes[0].get_xlabel()
    assert words(figure) == "2 clients, from the fastest to the slowest; the whole run; numbers in bars are local steps"


def test_the_unit_of_time_fits() -> None:
    for end, label, last in ((90, "(s)", 90), (600, "(min)", 10), (7200, "(h)", 2)):
        figure = draw([("a", timeline({0: tasks((0, end)), 1: tasks((0, end))}, end))])
        assert label in figure.axes[0].get_xlabel() and figure.axes[0].get_xlim()[1] == last


def test_of_many_clients_forty_are_drawn_from_the_fastest_to_the_slowest() -> None:
    # A step of client c takes 100 - c seconds, so client 99 is the fastest.
    clients = {c: tasks((0, 10 * (100 - c))) for c in range(100)}
    figure = draw([("a", timeline(clients, 1000))])
    shown = [int(c) for c in rows(figure)]
    assert len(shown) == 40 and (shown[0], shown[-1]) == (99, 0) and shown == sorted(set(shown), reverse=True)
    assert max(a - b for a, b in pairwise(shown)) <= 3  # evenly: 99 steps over 39 gaps
    assert words(figure).startswith("40 of 100 clients")


def test_of_a_long_run_the_first_thirty_models_are_drawn() -> None:
    def rounds(count: int, length: int) -> Timeline:
        times = [(length * n, length * (n + 1)) for n in range(count)]
        return timeline({0: tasks(*times), 1: tasks(*times)}, *(end for _, end in times))

    one = draw([("a", rounds(500, 1))])
    assert one.axes[0].get_xlim() == (0, 30) and len(models(one)) == 30
    assert "the first 30.0 s of 8:20" in words(one)
    asked = draw([("a", rounds(500, 1))], seconds=50)
    assert asked.axes[0].get_xlim() == (0, 50) and len(models(asked)) == 50
    # Beside a run with longer rounds three of those are seen.
    both = draw([("a", rounds(500, 1)), ("b", rounds(50, 20))])
    assert [axes.get_xlim() for axes in both.axes] == [(0, 60), (0, 60)]
    assert (len(models(both)), models(both, 1)) == (60, [20, 40, 60])
    # Lines that would be a surface are left out.
    assert models(draw([("a", rounds(500, 1))], seconds=500)) == []


def test_panels_have_the_same_rows_and_an_empty_place_where_a_run_had_ended() -> None:
    long = timeline({0: tasks((0, 20)), 1: tasks((0, 40)), 2: tasks((0, 10))}, 40)
    short = timeline({0: tasks((0, 20)), 1: tasks((0, 10))}, 20)
    figure = draw([("a", long), ("b", short)])
    # Client 2 is in one of them only. Steps of 2 s (client 0) and (40 + 10) / 20 s (client 1).
    assert rows(figure) == rows(figure, 1) == ["0", "1"]
    (after,) = figure.axes[1].patches
    assert (after.get_extents().x0, figure.axes[0].patches[:]) == (
        pytest.approx(figure.axes[1].transData.transform((20, 0))[0]),
        [],
    )


def test_the_time_after_the_last_task_of_an_event_driven_run_is_drawn_as_unknown() -> None:
    clients = {0: tasks((0, 4), (5, 10)), 1: tasks((0, 4))}
    grey = "#D9D9D9"
    assert [b for b in bars(draw([("a", timeline(clients, 10, open_ended=True))])) if b[3] == grey] == [
        (0, 4, 10, grey)
    ]
    assert [b for b in bars(draw([("a", timeline(clients, 10))])) if b[3] == grey] == []


@pytest.mark.parametrize("kind, start", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_a_picture_is_written_in_the_kind_that_its_name_says(tmp_path: Path, kind: str, start: bytes) -> None:
    run = timed_run(tmp_path / "a", [(0, 0, 2, 4, "done"), (1, 0, 1, 4, "done")], [2])
    path = tmp_path / "new" / f"x.{kind}"
    plot_timeline([("a $x_1$", run), ("b", run)], path)
    assert path.read_bytes().startswith(start) and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_run_that_ends_leaves_its_timeline_and_nothing_of_an_earlier_end(tmp_path: Path) -> None:
    run = timed_run(tmp_path / "a", [(0, 0, 2, 4, "done"), (1, 0, 1, 4, "done")], [2])
    table, picture = run / "timeline.csv", run / "figures" / "timeline.png"
    write_own_timeline(run, "a")
    assert table.read_text().splitlines()[1:] == ["0,1,1,2.0,0.0", "1,1,1,1.0,1.0"] and picture.exists()
    (run / "visits.csv").write_text(HEADER + visit_line((0, 0, 2, 4, "done")))  # one client waits for nobody
    write_own_timeline(run, "a")
    assert table.exists() and not picture.exists()
    (run / "metrics.jsonl").write_text('{"round": 1, "virtual_seconds": 0.0}\n')
    write_own_timeline(run, "a")
    assert not table.exists()


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_draws_runs_below_each_other_and_prints_how_long_clients_were_idle(
    fedsim: Fedsim, tmp_path: Path
) -> None:
    visits = [(0, 0, 2, 4, "done"), (1, 0, 1, 4, "done")]
    timed_run(tmp_path / "runs" / "a", visits, [2])
    timed_run(tmp_path / "runs" / "b", visits, [2, 4], [{"0": 1}, {"1": 1}], config=PROX % 1)
    outcome = fedsim("timeline", "runs", "out=x.png", "seconds=3")
    assert (outcome.status, outcome.err) == (0, "")
    lines = [" ".join(text.split()) for text in outcome.out.splitlines()]
    assert lines[1] == "strategy=fedavg 2 2 25.00 % 0.00 % 50.00 % – – 2.0 s"
    # Idle is counted to the end of the last task only: nobody was.
    assert lines[2] == "strategy=fedprox 2 2 0.00 % 0.00 % 0.00 % 0.50 1 4.0 s"
    assert lines[3] == "x.png" and (tmp_path / "x.png").exists()
    timed_run(tmp_path / "runs" / "c", visits, [2], seed=7)
    named = fedsim("timeline", "runs").out
    assert "strategy=fedavg seed=7" in named and "strategy=fedavg seed=1" in named and "\ntimeline.png\n" in named


@pytest.mark.parametrize(
    "args, says",
    [
        ([], "fedsim timeline needs a run directory"),
        (["run", "secs=3"], "no option secs= (did you mean 'seconds'?); it takes out=, seconds="),
        (["run", "seconds=0"], "seconds must be a virtual time > 0 in seconds, such as seconds=100, got '0'"),
        (["run", "seconds=1e999"], "got '1e999'"),
        (["run", "seconds=soon"], "got 'soon'"),
        (["run", "out=x.jpg"], "out=x.jpg: a picture's name must end in .png, .pdf, .svg"),
        (["run", "out=run"], "out=run is a folder; name a file, such as out=run/figure.png"),
        (["run", "out=no/x.png"], "there is no folder no; make it first"),
        (["run", "run"], "run is named twice"),
        (["nowhere"], "nowhere does not exist"),
        (["timeless"], "timeless has no timeline: its clients take no virtual time"),
        (["many"], "at most 12 runs in one picture, got 13; name fewer"),
    ],
)
def test_a_slip_on_the_command_line_is_one_line(fedsim: Fedsim, tmp_path: Path, args: list[str], says: str) -> None:
    timed_run(tmp_path / "run", [(0, 0, 2, 4, "done")], [2])
    timed_run(tmp_path / "timeless", [(0, 0, 0, 4, "done")], [0.0])
    for seed in range(13 if args == ["many"] else 0):
        timed_run(tmp_path / "many" / str(seed), [(0, 0, 2, 4, "done")], [2], seed=seed)
    outcome = fedsim("timeline", *args)
    assert outcome.status == 2 and says in outcome.line
    assert not list(tmp_path.rglob("*.png"))


def test_a_hundred_thousand_visits_are_drawn_in_seconds(tmp_path: Path) -> None:
    visits = [(n % 1000, n // 1000, n // 1000 + 0.5 + n % 1000 / 2000, 4, "done") for n in range(100_000)]
    run = timed_run(tmp_path / "a", visits, [float(n + 1) for n in range(100)])
    found = read_timeline(run)
    assert found is not None and found.contributions == 100_000 and len(found.tasks) == 1000
    # Client c is at work 0.5 + c / 2000 of every second.
    assert found.idle[600] == pytest.approx(100 * (0.5 - 0.3) * S)
    assert len(bars(draw([("a", found)]))) == 40 * 30
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["round"] == 100
