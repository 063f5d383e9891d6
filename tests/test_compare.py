"""Several runs in one table: groups, means, labels, refusals."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedsim.errors import ConfigError
from fedsim.report.compare import Stat, compare
from fedsim.report.text import human_bytes, human_seconds

AVG = "strategy: {_target_: fedsim.strategies.fedavg.FedAvg, server_lr: 1.0}"
PROX = "strategy: {_target_: fedsim.strategies.fedprox.FedProx, server_lr: 1.0, mu: %s}"


def make_run(path: Path, seed: int, accuracy: float | None, config: str = AVG, **summary: Any) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(f"seed: {seed}\nrounds: 5\nname: {path.name}\nrun_dir: {path}\n{config}\n")
    content = {
        "final": {"test_accuracy": accuracy, "test_loss": 0.5},
        "best": {"by": "test_accuracy", "round": 4, "test_accuracy": 0.75, "test_loss": 0.5},
        "rounds": 5,
        "totals": {"bytes_down": 2048, "bytes_up": 1024, "wall_seconds": 2.0 * seed},
        "status": "finished",
        **summary,
    }
    (path / "summary.json").write_text(json.dumps(content))
    return path


def test_seeds_are_one_row_with_mean_and_sample_deviation(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"r{s}", s, a) for s, a in ((3, 0.5), (1, 0.25), (2, 0.75))]
    (row,) = compare(runs).rows
    assert row.seeds == (1, 2, 3)
    assert row.runs == (runs[1], runs[2], runs[0])
    # mean (0.25 + 0.75 + 0.5) / 3 = 0.5; deviations -0.25, 0.25, 0; variance 0.125 / 2 = 0.0625; std 0.25
    assert row.stats["final acc %"] == Stat(0.5, 0.25)
    # wall 2, 4, 6: mean 4, variance (4 + 0 + 4) / 2 = 4, std 2
    assert row.stats["wall"] == Stat(4.0, 2.0)
    assert row.stats["down"] == Stat(2048.0, 0.0)
    header, cells = compare(runs).cells()
    assert header == ["run", "seeds", "final acc %", "best acc %", "final loss", "rounds", "down", "up", "wall"]
    assert cells == [
        "strategy=FedAvg", "3", "50.00 ± 25.00", "75.00", "0.5", "5", "2.0 KiB", "1.0 KiB", "4.0 s ± 2.0 s"
    ]  # fmt: skip


def test_a_single_run_has_no_deviation(tmp_path: Path) -> None:
    (row,) = compare([make_run(tmp_path / "a", 1, 0.5)]).rows
    assert row.stats["final acc %"] == Stat(0.5, None)
    assert "±" not in compare([tmp_path / "a"]).text()


def test_engine_tracker_and_places_do_not_make_another_experiment(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", 1, 0.5, AVG + "\nengine: {_target_: x.Inline, threads: 1}\ntracker: {console: {}}")
    b = make_run(tmp_path / "b", 2, 0.5, AVG + "\nengine: {_target_: x.Ray, workers: 4}\nresume: null")
    assert len(compare([a, b]).rows) == 1


def test_rows_are_named_after_what_differs(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", 1, 0.5),
        make_run(tmp_path / "b", 1, 0.5, PROX % 0.1),
        make_run(tmp_path / "c", 1, 0.5, PROX % 1e-3),
        make_run(tmp_path / "d", 2, 0.5, PROX % 0.1),
    ]
    table = compare(runs)
    # mu tells the two FedProx apart; it is not what tells them from FedAvg.
    assert [row.label for row in table.rows] == [
        "strategy=FedAvg",
        "strategy=FedProx strategy.mu=0.1",
        "strategy=FedProx strategy.mu=0.001",
    ]
    assert [row.seeds for row in table.rows] == [(1,), (1, 2), (1,)]


def test_one_fedprox_beside_fedavg_needs_no_mu_in_its_name(tmp_path: Path) -> None:
    table = compare([make_run(tmp_path / "a", 1, 0.5), make_run(tmp_path / "b", 1, 0.5, PROX % 0.1)])
    assert [row.label for row in table.rows] == ["strategy=FedAvg", "strategy=FedProx"]


def test_one_and_one_point_zero_are_the_same_value(tmp_path: Path) -> None:
    a, b = (make_run(tmp_path / f"{mu}", i, 0.5, PROX % mu) for i, mu in enumerate(("1", "1.0")))
    assert len(compare([a, b]).rows) == 1


def test_a_key_that_only_one_has_makes_a_row(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a", 1, 0.5), make_run(tmp_path / "b", 1, 0.5, AVG + "\nstop: {patience: 3}")
    assert [row.label for row in compare([a, b]).rows] == ["(otherwise equal)", "stop.patience=3"]


def test_a_folder_stands_for_the_runs_in_it(tmp_path: Path) -> None:
    for seed in (1, 2):
        make_run(tmp_path / "sweep" / f"job{seed}" / "20260101-000000-0000", seed, 0.5)
    (tmp_path / "sweep" / ".hydra").mkdir()
    (tmp_path / "sweep" / ".hydra" / "config.yaml").write_text("not: a run")
    (row,) = compare([tmp_path / "sweep"]).rows
    assert row.seeds == (1, 2)


def test_a_number_that_became_nan_is_not_averaged_away(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", 1, 0.5), make_run(tmp_path / "b", 2, None)]
    table = compare(runs)
    assert math.isnan(table.rows[0].stats["final acc %"].mean)
    assert table.cells()[1][2] == "nan"


def test_columns_that_nobody_has_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 1, 0.5, final={"test_loss": 0.5}, best={"by": "test_loss", "round": 1})
    assert [c for c in compare([run]).cells()[0] if "acc" in c] == []


def test_terminal_and_plain_text_hold_the_same(tmp_path: Path) -> None:
    from rich.console import Console

    table = compare([make_run(tmp_path / f"r{s}", s, 0.25 * s, AVG + "\ndata: '[x]'") for s in (1, 2)])
    terminal, plain = io.StringIO(), io.StringIO()
    Console(file=terminal, width=200).print(table.rich())
    table.show(plain)
    for cell in (cell for cells in table.cells() for cell in cells):
        assert cell in terminal.getvalue()
        assert cell in plain.getvalue()


def test_refusals_name_the_run_and_what_to_do(tmp_path: Path) -> None:
    good = make_run(tmp_path / "good", 1, 0.5)
    with pytest.raises(ConfigError, match="at least one run directory"):
        compare([])
    with pytest.raises(ConfigError, match=r"goood does not exist \(did you mean 'good'\?\)"):
        compare([tmp_path / "goood"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty is not a run directory"):
        compare([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="good is named twice"):
        compare([good, tmp_path / "empty" / ".." / "good"])
    twin = make_run(tmp_path / "twin", 1, 0.5)
    with pytest.raises(ConfigError, match="same experiment with the same seed 1"):
        compare([good, twin])
    for name, status in (("broken", "failed"), ("stopped", "interrupted")):
        path = make_run(tmp_path / name, 7, 0.5, status=status)
        with pytest.raises(ConfigError, match=f"{name} is not finished; go on with `fedsim resume={path}`"):
            compare([good, path])
    (tmp_path / "stopped" / "summary.json").unlink()
    with pytest.raises(ConfigError, match="stopped is not finished"):
        compare([tmp_path / "stopped"])


@pytest.mark.parametrize("text", ["a: [", "", "- 1\n", "\x00", "seed: x\n", "rounds: 3\n"])
def test_a_damaged_config_is_said(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path / "a", 1, 0.5)
    (run / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"a/config\.yaml (is damaged|needs a whole number `seed`)"):
        compare([run])


@pytest.mark.parametrize("text", ["{", '{"final": {"test_accuracy": "high"}}'])
def test_a_damaged_summary_is_said(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path / "a", 1, 0.5)
    (run / "summary.json").write_text(text)
    with pytest.raises(ConfigError, match=r"a/summary\.json is damaged"):
        compare([run])


def test_units() -> None:
    assert [human_bytes(n) for n in (0, 1023, 1536, 1024**2 - 1, 5 * 1024**3)] == [
        "0 B", "1023 B", "1.5 KiB", "1.0 MiB", "5.0 GiB"
    ]  # fmt: skip
    assert [human_seconds(s) for s in (0.04, 59.96, 75, 3725.4)] == ["0.0 s", "1:00", "1:15", "1:02:05"]
