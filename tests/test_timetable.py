"""``fedsim schedule``: the timetable of a run, without the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.compose import compose
from fedsim.experiment import build, simulate
from fedsim.report.timeline import Task, read_timeline
from fedsim.report.timetable import simulated
from tests.cli import QUICK, Fedsim

DEVICES = [
    "partition.num_clients=5",
    "system=exponential",
    "system.jitter=0.2",
    "system.dropout=0.2",
    "system.upload_mbps=1",
    "availability=markov",
    "availability.on_seconds=1",
    "availability.off_seconds=0.5",
]
PLACE = "partition.num_clients=3"
SMALL = ["model.hidden=[5]", "partition=iid", *DEVICES]


@pytest.mark.parametrize(
    ("method", "end"),
    [("fedasync", "rounds=20"), ("fedbuff", "stop.contributions=30"), ("fedcompass", "stop.virtual_seconds=1.5")],
)
def test_it_is_that_of_the_run_and_ends_where_the_run_ends(method: str, end: str, tmp_path: Path) -> None:
    overrides = [f"strategy={method}", *SMALL, end, f"run_dir={tmp_path}", "tracker=[]"]
    overrides += [] if end.startswith("rounds") else ["rounds=1000"]
    simulate(overrides)
    run = next(tmp_path.glob("*/*/summary.json")).parent
    real, (planned, _) = read_timeline(run), simulated(build(compose(overrides)))
    assert real is not None
    assert planned.models == real.models
    assert planned.staleness == real.staleness
    assert planned.end == real.end
    assert {"done", "dropout"} == {task.outcome for found in real.tasks.values() for task in found}
    for client, found in planned.tasks.items():
        known = [(t.begin, t.end, t.outcome) for t in real.tasks.get(client, [])]
        assert [(t.begin, t.end, t.outcome) for t in found][: len(known)] == known
        under_way: list[Task] = list(found[len(known) :])
        assert len(under_way) <= 1 and all(t.end <= planned.end for t in under_way)


def test_the_command_prints_it_and_draws_it(fedsim: Fedsim, tmp_path: Path) -> None:
    done = fedsim("schedule", "strategy=fedcompass", "system=normal", "rounds=20", PLACE, f"run_dir={tmp_path}")
    assert done.status == 0
    rows = dict(line.split("  ", 1) for line in done.out.splitlines())
    assert rows["global models"].strip() == "20"
    assert rows["clients"].strip() == "3"
    assert Path(rows["picture"].strip()) == tmp_path / "schedule" / "fedcompass-digits.png"
    assert (tmp_path / "schedule" / "fedcompass-digits.png").read_bytes()[:4] == b"\x89PNG"


def test_what_has_no_timetable_is_refused_in_one_line(fedsim: Fedsim, tmp_path: Path) -> None:
    done = fedsim("schedule", *QUICK, "strategy=fedprox")
    assert done.status == 2
    assert "is for event-driven methods, such as fedcompass, fedasync and fedbuff; FedProx works in rounds" in done.line
    (tmp_path / "file").write_text("")
    done = fedsim("schedule", *QUICK, "strategy=fedasync", f"run_dir={tmp_path / 'file'}")
    assert done.status == 2 and "set run_dir= to a folder that can be written" in done.line
