"""Several runs in one table: groups, means, labels, the best, targets, formats, refusals."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import pty
import re
import statistics
from functools import partial
from pathlib import Path

import pytest

from fedsim.errors import ConfigError
from fedsim.report.compare import Stat, Style, Table, compare, shown_as, target
from fedsim.report.text import human_bytes, human_seconds, number, percent
from fedsim.rundir import RunDir
from tests.cli import QUICK, Fedsim, process
from tests.run_dirs import AVG, DATA, PROX, make_run, rounds


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.cells()]


def best(table: Table) -> set[tuple[str, str]]:
    """Label and column of the cells in bold."""
    header, *body = table.cells()
    return {(row[0].text, header[i].text) for row in body for i, cell in enumerate(row) if cell.best}


def test_seeds_are_one_row_with_mean_and_sample_deviation(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"r{s}", s, a) for s, a in ((3, 0.5), (1, 0.25), (2, 0.75))]
    (row,) = compare(runs).rows
    assert row.seeds == (1, 2, 3)
    assert [run.path for run in row.group.runs] == [runs[1], runs[2], runs[0]]
    # mean (0.25 + 0.75 + 0.5) / 3 = 0.5; deviations -0.25, 0.25, 0; variance 0.125 / 2 = 0.0625; std 0.25
    assert row.stats["final.test_accuracy"] == Stat(0.5, 0.25, 3)
    # wall 2, 4, 6: mean 4, variance (4 + 0 + 4) / 2 = 4, std 2
    assert row.stats["totals.wall_seconds"] == Stat(4.0, 2.0, 3)
    assert row.stats["totals.bytes_down"] == Stat(2048.0, 0.0, 3)
    header, cells = texts(compare(runs))
    assert header == ["run", "seeds", "final acc %", "best acc %", "final loss", "rounds", "down", "up", "wall"]
    assert cells == [
        "strategy=fedavg", "3", "50.00 ± 25.00", "75.00", "0.5000", "5", "2.0 KiB", "1.0 KiB", "4.0 s ± 2.0 s"
    ]  # fmt: skip


def test_a_single_run_has_no_deviation(tmp_path: Path) -> None:
    (row,) = compare([make_run(tmp_path / "a", 1, 0.5)]).rows
    assert row.stats["final.test_accuracy"] == Stat(0.5, None, 1)
    assert "±" not in compare([tmp_path / "a"]).text()


def test_engine_tracker_and_places_do_not_make_another_experiment(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", 1, 0.5, AVG + "\nengine: {_target_: x.Inline, threads: 1}\ntracker: {console: {}}")
    b = make_run(
        tmp_path / "b", 2, 0.5, AVG + "\nengine: {_target_: x.Ray, workers: 4}\nresume: null\ncheckpoint: {keep: 5}"
    )
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
        "strategy=fedavg",
        "strategy=fedprox strategy.mu=0.1",
        "strategy=fedprox strategy.mu=0.001",
    ]
    assert [row.seeds for row in table.rows] == [(1,), (1, 2), (1,)]


def test_one_fedprox_beside_fedavg_needs_no_mu_in_its_name(tmp_path: Path) -> None:
    table = compare([make_run(tmp_path / "a", 1, 0.5), make_run(tmp_path / "b", 1, 0.5, PROX % 0.1)])
    assert [row.label for row in table.rows] == ["strategy=fedavg", "strategy=fedprox"]


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
    (tmp_path / "sweep" / "conf").mkdir()
    (tmp_path / "sweep" / "conf" / "config.yaml").write_text("defaults:\n  - strategy: fedavg\nrun_dir: runs\n")
    (row,) = compare([tmp_path / "sweep"]).rows
    assert row.seeds == (1, 2)


def test_a_number_that_became_nan_is_not_averaged_away(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", 1, 0.5), make_run(tmp_path / "b", 2, None)]
    table = compare(runs)
    assert math.isnan(table.rows[0].stats["final.test_accuracy"].mean)
    assert texts(table)[1][2] == "nan"


def test_columns_that_nobody_has_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 1, 0.5, final={"test_loss": 0.5}, best={"by": "test_loss", "round": 1})
    assert [c for c in texts(compare([run]))[0] if "acc" in c] == []


def test_terminal_and_plain_text_hold_the_same(tmp_path: Path) -> None:
    from rich.console import Console

    table = compare([make_run(tmp_path / f"r{s}", s, 0.25 * s, AVG + "\nparts: '[x]'") for s in (1, 2)])
    terminal, plain = io.StringIO(), io.StringIO()
    Console(file=terminal, width=200).print(table.rich())
    table.show(stream=plain)
    for cell in (cell for cells in texts(table) for cell in cells):
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


@pytest.mark.parametrize("text", ["{", "{}", '{"final": {"test_accuracy": "high"}, "rounds": 5}'])
def test_a_damaged_summary_is_said(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path / "a", 1, 0.5)
    (run / "summary.json").write_text(text)
    with pytest.raises(ConfigError, match=r"a/summary\.json is damaged"):
        compare([run])


# --- the best ---------------------------------------------------------------------------------------------


def test_best_is_higher_accuracy_and_lower_loss(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", 1, final={"test_accuracy": 0.6, "test_loss": 0.9})
    b = make_run(tmp_path / "b", 1, config=PROX % 1, final={"test_accuracy": 0.5, "test_loss": 0.4})
    assert best(compare([a, b])) == {
        ("strategy=fedavg", "final acc %"),
        ("strategy=fedprox", "final loss"),
        # 75 % both, in make_run: a tie
        ("strategy=fedavg", "best acc %"),
        ("strategy=fedprox", "best acc %"),
    }


def test_numbers_that_read_equal_are_a_tie_and_nan_is_never_best(tmp_path: Path) -> None:
    shares = {"a": 0.80001, "b": 0.80004, "c": 0.7, "d": None}
    runs = [make_run(tmp_path / n, 1, v, PROX % i, best={}) for i, (n, v) in enumerate(shares.items())]
    found = {label for label, column in best(compare(runs)) if column == "final acc %"}
    assert found == {"strategy.mu=0", "strategy.mu=1"}


def test_best_is_sought_among_rows_with_the_same_partition(tmp_path: Path) -> None:
    part = "\npartition: {_target_: x.Dirichlet, alpha: %s}"
    runs = [
        make_run(tmp_path / "a", 1, 0.5, AVG + part % 0.1),
        make_run(tmp_path / "b", 1, 0.4, PROX % 1 + part % 0.1),
        make_run(tmp_path / "c", 1, 0.9, AVG + part % 1.0),
        make_run(tmp_path / "d", 1, 0.8, PROX % 1 + part % 1.0),
        make_run(tmp_path / "e", 1, 0.99, AVG + part % 5.0),  # alone with its partition
    ]
    found = {label for label, column in best(compare(runs)) if column == "final acc %"}
    assert found == {"strategy=fedavg partition.alpha=0.1", "strategy=fedavg partition.alpha=1"}


def test_nothing_is_best_in_a_table_of_one_row_or_among_plain_costs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"r{s}", s) for s in (1, 2)]
    assert best(compare(runs)) == set()
    other = make_run(tmp_path / "other", 1, config=PROX % 1, totals={"wall_seconds": 0.1, "bytes_down": 1})
    assert {column for _, column in best(compare([*runs, other]))} <= {"final acc %", "best acc %", "final loss"}


# --- targets ----------------------------------------------------------------------------------------------


def test_rounds_and_bytes_until_the_first_evaluation_at_the_target(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", 1, records=rounds([0.1, None, 0.9, 0.2, 0.95]))
    b = make_run(tmp_path / "b", 2, records=rounds([0.1, 0.2, 0.3, 0.4, 0.9]))
    (row,) = compare([a, b], 0.9).rows
    # Rounds 3 and 5 (mean 4, deviation sqrt 2); 1,500 bytes a round.
    for key, unit in (("rounds_to", 1), ("bytes_to", 1500)):
        assert row.stats[key].mean == 4 * unit and row.stats[key].count == 2
        assert row.stats[key].std == pytest.approx(unit * math.sqrt(2))
    header, cells = texts(compare([a, b], 0.9))
    shown = dict(zip(header, cells, strict=True))
    assert shown["rounds to 90 %"] == "4 ± 1.414" and shown["bytes to 90 %"] == "5.9 KiB ± 2.1 KiB"


def timed(path: Path, seed: int, accuracies: list[float], length: float, config: str = AVG) -> Path:
    """A run with rounds of so many virtual seconds."""
    return make_run(
        path, seed, config=config, records=[r | {"virtual_seconds": length * r["round"]} for r in rounds(accuracies)]
    )


def test_time_and_contributions_until_the_first_evaluation_at_the_target(tmp_path: Path) -> None:
    a, b = timed(tmp_path / "a", 1, [0.1, 0.8, 0.2], 10.0), timed(tmp_path / "b", 2, [0.1, 0.2, 0.9], 20.0)
    (row,) = compare([a, b], 0.8).rows
    # Rounds 2 and 3: 20 and 60 seconds, mean 40, deviation 20 sqrt 2; three clients a round.
    assert (row.stats["seconds_to"].mean, row.stats["contributions_to"].mean) == (40.0, 7.5)
    assert row.stats["seconds_to"].std == pytest.approx(20 * math.sqrt(2))
    header, cells = texts(compare([a, b], 0.8))
    shown = dict(zip(header, cells, strict=True))
    assert shown["virtual time to 80 %"] == "40.0 s ± 28.3 s" and shown["contributions to 80 %"] == "7.5 ± 2.121"
    (line,) = csv.DictReader(io.StringIO(compare([a, b], 0.8).csv()))
    assert (line["seconds_to_0.8_mean"], line["contributions_to_0.8_seeds"]) == ("40.0", "2")


def test_without_virtual_time_nothing_is_said_of_it(tmp_path: Path) -> None:
    header, _ = texts(compare([timed(tmp_path / "a", 1, [0.9], 0.0)], 0.8))
    assert "rounds to 80 %" in header and not any("virtual" in name for name in header)
    # Beside a run with virtual time it is not the one that took none.
    beside = compare([tmp_path / "a", timed(tmp_path / "b", 1, [0.9], 5.0, PROX % 1)], 0.8)
    assert [row[texts(beside)[0].index("virtual time to 80 %")] for row in texts(beside)[1:]] == ["-", "5.0 s"]


def test_times_to_the_target_are_put_in_relation_to_a_strategy_in_the_same_setting(tmp_path: Path) -> None:
    for place, (factor, partition) in enumerate(((1, "0.1"), (3, "1.0"))):
        part = f"\npartition: {{_target_: x.Dirichlet, alpha: {partition}}}"
        for seed in (1, 2):
            # FedAvg needs 20 and 40 s, FedProx 5 and 10 s: 30 / 7.5 = 4, in every setting.
            timed(tmp_path / f"avg{place}{seed}", seed, [0.1, 0.9], 10.0 * seed * factor, AVG + part)
            timed(tmp_path / f"prox{place}{seed}", seed, [0.9], 5.0 * seed * factor, PROX % 1 + part)
    table = compare([tmp_path], 0.9, "fedprox")
    ratios = {row.label: row.stats["time_ratio"].mean for row in table.rows}
    assert sorted(ratios.values()) == [1, 1, 4, 4] and all(ratios[k] == 4 for k in ratios if "fedavg" in k)
    header, *body = texts(table)
    assert [row[header.index("time / fedprox")] for row in body] == ["4.00", "4.00", "1.00", "1.00"]
    assert [float(line["time_ratio_0.9"]) for line in csv.DictReader(io.StringIO(table.csv()))] == [4, 4, 1, 1]


def test_no_time_is_put_in_relation_to_seeds_of_which_some_never_arrive(tmp_path: Path) -> None:
    for seed, last in ((1, 0.9), (2, 0.3)):
        timed(tmp_path / f"avg{seed}", seed, [0.1, 0.9], 10.0)
        timed(tmp_path / f"prox{seed}", seed, [last], 5.0, PROX % 1)
    table = compare([tmp_path], 0.9, "fedprox")
    assert all("time_ratio" not in row.stats for row in table.rows)
    assert "not every seed of strategy=fedprox reached the target" in table.note
    header, *body = texts(compare([tmp_path], 0.9, "fedavg"))
    assert [row[header.index("time / fedavg")] for row in body] == ["1.00", "0.25 (1 of 2)"]  # 5 s over 20 s


def test_a_relation_that_cannot_be_is_refused(tmp_path: Path) -> None:
    a = timed(tmp_path / "a", 1, [0.9], 5.0)
    twins = [timed(tmp_path / f"p{mu}", 1, [0.9], 5.0, PROX % mu) for mu in (1, 2)]
    with pytest.raises(ConfigError, match="relative_to=fedavg is about the time to a target; add target="):
        compare([a], None, "fedavg")
    with pytest.raises(ConfigError, match=r"no run is of that strategy \(did you mean 'fedavg'\?\); there are fedavg"):
        compare([a], 0.9, "fedavgg")
    with pytest.raises(
        ConfigError, match=r"'strategy=fedavg' can stand in relation to .*mu=1, .*mu=2; name runs of one"
    ):
        compare([a, *twins], 0.9, "fedprox")


def test_a_picture_of_the_rows_is_drawn_for_a_paper(fedsim: Fedsim, tmp_path: Path) -> None:
    for seed in (1, 2):
        timed(tmp_path / "runs" / f"a{seed}", seed, [0.1, 0.9], 10.0 * seed)
    outcome = fedsim("compare", "runs", "target=0.8", "picture=x.pdf")
    assert outcome.status == 0 and (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")
    timed(tmp_path / "still" / "a", 1, [0.9], 0.0)
    assert "no run took virtual time" in fedsim("compare", "still", "picture=y.png").line
    assert "must end in .png, .pdf, .svg" in fedsim("compare", "runs", "picture=x.gif").line


def test_bytes_until_the_target_count_what_was_sent_before_round_1(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 1, records=rounds([0.1, 0.9]), totals={"bytes_before": 700})
    assert compare([run], 0.9).rows[0].stats["bytes_to"].mean == 2 * 1500 + 700


def test_seeds_that_never_reach_the_target_are_said(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"r{s}", s, records=rounds([0.1, a])) for s, a in ((1, 0.8), (2, 0.5), (3, 0.8))]
    header, cells = texts(compare(runs, 0.75))
    assert cells[header.index("rounds to 75 %")] == "2 (2 of 3)"
    header, cells = texts(compare(runs, 0.9))
    assert cells[header.index("bytes to 90 %")] == "-"


def test_fewer_rounds_are_better_but_only_if_every_seed_reaches_the_target(tmp_path: Path) -> None:
    lucky = [make_run(tmp_path / f"l{s}", s, records=rounds(r)) for s, r in ((1, [0.9]), (2, [0.1]))]
    slow = [make_run(tmp_path / f"s{s}", s, config=PROX % 1, records=rounds([0.1, 0.9])) for s in (1, 2)]
    never = [make_run(tmp_path / f"n{s}", s, config=PROX % 2, records=rounds([0.1])) for s in (1, 2)]
    table = compare([*lucky, *slow, *never], 0.9)
    assert {label for label, column in best(table) if "to 90 %" in column} == {"strategy=fedprox strategy.mu=1"}


# --- formats ----------------------------------------------------------------------------------------------


def test_markdown_is_a_table_whatever_a_label_holds(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", 1, 0.5, AVG + "\nnote: 'a|b *c* `d` \\\\ e'")
    b = make_run(tmp_path / "b", 1, 0.25, AVG + "\nnote: 'two\n\n  lines'")
    lines = compare([a, b]).markdown().splitlines()
    assert len(lines) == 4 and lines[1].startswith("| :-- | --: |")
    columns = [line.replace("\\\\", "").replace("\\|", "").count("|") for line in lines]
    assert len(set(columns)) == 1
    assert lines[2].startswith("| note=a\\|b \\*c\\* \\`d\\`") and "| **50.00** |" in lines[2]
    assert lines[3].startswith("| note=two lines |") and "| 25.00 |" in lines[3]


def test_csv_has_every_number_in_full(tmp_path: Path) -> None:
    values = (1 / 3, 2 / 7)
    runs = [
        make_run(
            tmp_path / f"r{s}", s, records=rounds([v]), final={"test_accuracy": v, "client_accuracy_worst10": v / 9}
        )
        for s, v in enumerate(values)
    ]
    other = make_run(tmp_path / "o", 5, 0.5, PROX % 1, records=rounds([0.1]))
    first, second = csv.DictReader(io.StringIO(compare([*runs, other], 0.3).csv()))
    assert (first["run"], first["seeds"], first["seed_list"]) == ("strategy=fedavg", "2", "0 1")
    assert (second["seeds"], second["seed_list"]) == ("1", "5")
    near = partial(pytest.approx, rel=1e-11)
    assert float(first["final_test_accuracy_mean"]) == near(statistics.fmean(values))
    assert float(first["final_test_accuracy_std"]) == near(statistics.stdev(values))
    assert float(first["final_client_accuracy_worst10_mean"]) == near(statistics.fmean(v / 9 for v in values))
    assert second["final_client_accuracy_worst10_mean"] == second["final_test_accuracy_std"] == ""
    assert (first["rounds_to_0.3_mean"], first["rounds_to_0.3_seeds"]) == ("1.0", "1")
    assert (second["bytes_to_0.3_mean"], second["bytes_to_0.3_seeds"]) == ("", "0")


def wide(table: Table, width: int) -> list[tuple[int, list[str]]]:
    """Width of each line on a terminal, and its words."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(table.rich(width), width=max(width, 200), crop=False)
    return [(len(line.rstrip()), line.split()) for line in out.getvalue().splitlines()]


def test_columns_go_where_there_is_no_room_for_them_costs_first(tmp_path: Path) -> None:
    keys = ("test_accuracy", "test_loss", "client_accuracy_mean", "client_accuracy_worst10", "personal_accuracy_mean")
    run = make_run(tmp_path / "a", 1, records=rounds([0.5]), final=dict.fromkeys(keys, 0.5))
    table = compare([run], 0.4)
    gone = [
        "wall", "up", "down", "rounds", "worst 10 % acc %", "client acc %", "personal acc %", "best acc %",
        "final loss", "contributions to 40 %", "bytes to 40 %", "rounds to 40 %", "virtual time to 40 %",
    ]  # fmt: skip
    seen: list[list[str]] = []
    for width in range(260, 0, -1):
        left = table.left_out(width)
        if not seen or left != seen[-1]:
            seen.append(left)
            # Only the figure that a run is judged by stands where there is no room even for that.
            assert len(left) == len(gone) or max(n for n, _ in wide(table, width)) <= width
    assert [set(left) for left in seen] == [set(gone[:n]) for n in range(len(gone) + 1)]
    out = io.StringIO()
    table.show(stream=out)  # no terminal: no limit
    assert all(name in out.getvalue() for name in gone) and "no room" not in out.getvalue()


def test_the_figure_of_a_regression_always_stands(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 1, final={"test_loss": 0.5}, best={"by": "test_loss", "round": 1})
    assert [cell.text for cell in compare([run]).cells(0)[0]] == ["run", "seeds", "final loss"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_labels_are_never_broken_inside_a_word(tmp_path: Path, width: int) -> None:
    words = ["strategy=fedprox", "client.lr=0.05", "partition.alpha=0.1", "strategy.mu=0.001", "client.batch_size=128"]
    more = "client: {_target_: x.C, lr: %s, batch_size: %s}\npartition: {_target_: x.P, alpha: %s}"
    a = make_run(tmp_path / "a", 1, 0.5, f"{PROX % 0.001}\n{more % (0.05, 128, 0.1)}")
    b = make_run(tmp_path / "b", 1, 0.5, f"{PROX % 0.5}\n{more % (0.1, 64, 0.5)}")
    c = make_run(tmp_path / "c", 1, 0.5, f"{AVG}\n{more % (0.1, 64, 0.5)}")
    table = compare([a, b, c])
    lines = wide(table, width)
    assert max(n for n, _ in lines) <= width
    found = [word for _, line in lines for word in line if "=" in word]
    assert set(words) <= set(found) and all(word in table.text().split() for word in found)
    if width < 120:
        assert set(table.left_out(width)) >= {"wall", "up", "down", "rounds", "final loss", "best acc %"}


@pytest.mark.parametrize("columns", [60, 100])
def test_a_terminal_is_filled_and_a_pipe_is_not_cut(tmp_path: Path, columns: int) -> None:
    make_run(tmp_path / "a", 1)
    make_run(tmp_path / "b", 1, config=PROX % 1)
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as screen:
        env = {"COLUMNS": str(columns), "TERM": "xterm"}
        assert process("compare", "a", "b", cwd=tmp_path, env=env, stdout=theirs, stderr=theirs).status == 0
        os.close(theirs)
        text = re.sub(r"\x1b\[[\d;]*m", "", screen.read(100_000).decode()).replace("\r", "")
    assert max(map(len, text.splitlines())) <= columns
    assert ("no room for" in text) == (columns == 60) and ("wall" in text.splitlines()[0]) == (columns == 100)
    piped = process("compare", "a", "b", cwd=tmp_path, env={"COLUMNS": str(columns)})
    assert "no room for" not in piped.out and piped.out.split("\n")[0].endswith("wall")


def test_unfinished_runs_of_a_folder_are_left_out_and_named(
    fedsim: Fedsim, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "sweep" / "a", 1)
    for name in ("dead", "live"):
        (make_run(tmp_path / "sweep" / name, 2, config=PROX % 1) / "summary.json").unlink()
    with RunDir(tmp_path / "sweep" / "live").lock():
        note = "left out: sweep/dead (not finished), sweep/live (still running)"
        text, table = fedsim("compare", "sweep"), fedsim("compare", "sweep", "format=csv")
        assert (text.out.splitlines()[-1], text.err) == (note, "") and "sweep" not in text.out.splitlines()[1]
        assert len(table.out.splitlines()) == 2 and table.err == f"{note}\n"  # a program reads the table
        outcome = fedsim("compare", "sweep", "sweep/live")
        assert outcome.status == 2 and "sweep/live is named twice" in outcome.line
        outcome = fedsim("compare", "sweep/a", "sweep/live")
        assert outcome.status == 2
        assert outcome.line.endswith("sweep/live is still running; wait until it ends, or leave it out")
    (tmp_path / "sweep" / "a" / "summary.json").unlink()
    assert "no run to show; left out: sweep/a (not finished)" in fedsim("compare", "sweep").line


def test_labels_can_be_typed(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"r{i}", 1, 0.5, f"{AVG}\nmodel: {{_target_: {target}}}")
        for i, target in enumerate(("fedsim.models.standard.LogReg", "fedsim.models.resnet.ResNet", "mine.Net"))
    ]
    # Several options of `model` build a ResNet, and none builds a Net of somebody's own.
    assert [row.label for row in compare(runs).rows] == ["model=logreg", "model=ResNet", "model=Net"]


def test_numbers_in_csv_have_no_tails(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"r{s}", s, a) for s, a in ((1, 0.1), (2, 0.11), (3, 0.21))]
    assert repr(statistics.fmean((0.1, 0.11, 0.21))) != "0.14"  # the tail of which this is about
    (row,) = csv.DictReader(io.StringIO(compare(runs).csv()))
    assert row["final_test_accuracy_mean"] == "0.14"


def test_the_best_is_bold_on_a_terminal(tmp_path: Path) -> None:
    from rich.console import Console

    runs = [make_run(tmp_path / "a", 1, 0.5), make_run(tmp_path / "b", 1, 0.25, PROX % 1)]
    out = io.StringIO()
    Console(file=out, width=200, force_terminal=True, color_system="standard").print(compare(runs).rich(200))
    bold = re.findall(r"\x1b\[1m *([\d.]+)", out.getvalue())
    assert "50.00" in bold and "25.00" not in bold


def test_units() -> None:
    assert [human_bytes(n) for n in (0, 1023, 1536, 1024**2 - 1, 5 * 1024**3)] == [
        "0 B", "1023 B", "1.5 KiB", "1.0 MiB", "5.0 GiB"
    ]  # fmt: skip
    assert [human_seconds(s) for s in (0, 0.0449, 0.96, 59.96, 75, 3725.4)] == [
        "0 s", "0.045 s", "1.0 s", "1:00", "1:15", "1:02:05"
    ]  # fmt: skip
    assert [percent(v) for v in (0.7831, 1, None, math.nan)] == ["78.31 %", "100.00 %", "nan", "nan"]
    assert [number(v) for v in (0.5, 0, -12.3456, 1e-7, 12345, None)] == [
        "0.5000", "0.0000", "-12.3456", "1.000e-07", "1.234e+04", "nan"
    ]  # fmt: skip
    assert human_bytes(math.nan) == human_seconds(math.nan) == "nan"


# --- what a user gets wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["90", "0", "-0.1", "1.01", "abc", "90%", "nan", "inf", "0,9"])
def test_a_target_that_is_no_fraction_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"target must be an accuracy as a fraction in \(0, 1\], got"):
        target(text)
    assert target("1") == 1.0


def test_a_target_in_per_cent_is_understood() -> None:
    with pytest.raises(ConfigError, match=r"90 % is target=0\.9"):
        target("90")


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="format must be one of text, markdown, csv, got 'pdf'"):
        shown_as("pdf")
    with pytest.raises(ConfigError, match="did you mean 'markdown'"):
        shown_as("mardkown")


@pytest.mark.parametrize(
    "one, other, says",
    [
        ("data: {_target_: a.Digits}", "data: {_target_: a.Images, path: x}", r"data=Digits and data=Images"),
        (
            "data: {_target_: a.Images, path: x}",
            "data: {_target_: a.Images, path: y}",
            r"data\.path=x and data\.path=y",
        ),
        ("data: {_target_: a.I}", "data: {_target_: a.I, max_train: 5}", "data.max_train=null and data.max_train=5"),
    ],
)
def test_runs_of_different_data_are_refused(tmp_path: Path, one: str, other: str, says: str) -> None:
    runs = [make_run(tmp_path / n, 1, 0.5, f"{AVG}\n{data}") for n, data in (("a", one), ("b", other))]
    with pytest.raises(ConfigError, match=f"a and .*/b are runs of different data \\({says}\\)"):
        compare(runs)


def test_place_augmentation_and_validation_do_not_make_other_data(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", 1, 0.5, f"{AVG}\n{DATA}")
    other = DATA.replace("null", "/there").replace("0.0", "0.1").replace("}", ", augment: [flip], size: null}")
    assert len(compare([a, make_run(tmp_path / "b", 1, 0.5, f"{AVG}\n{other}")]).rows) == 2


def test_a_target_of_runs_without_accuracy_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 1, records=[{"round": 1, "test_loss": 0.5}])
    with pytest.raises(ConfigError, match=r"target=0\.9: .*/a has no test accuracy"):
        compare([run], 0.9)


@pytest.mark.parametrize(
    "text, says",
    [
        ('{"round": 1}\n{"rou\n{"round": 3}\n', "metrics.jsonl:2: damaged line"),
        ('{"round": 1, "test_accuracy": 0.5}\n', "metrics.jsonl is damaged: it ends with round 1, but 5 were done"),
        ("", "metrics.jsonl is damaged: it holds no round, but 5 were done"),
        ('{"round": 1, "test_accuracy": 0.5}\n{"round": 5}\n', "metrics.jsonl lacks rounds: it has 2 of 5"),
        ('{"round": 1, "test_accuracy": "high"}\n', "round 1: `test_accuracy` must be a number, got 'high'"),
        (None, "metrics.jsonl is missing, though the run is finished"),
    ],
)
def test_damaged_metrics_are_said(tmp_path: Path, text: str | None, says: str) -> None:
    run = make_run(tmp_path / "a", 1)
    if text is not None:
        (run / "metrics.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=says):
        compare([run], 0.9)
    assert compare([run]).rows  # they are read for a target only


@pytest.mark.parametrize(
    "args, says",
    [
        (["target=90"], "90 % is target=0.9"),
        (["target=abc"], "got 'abc'"),
        (["target="], "target= needs a value"),
        (["target=0.5", "target=0.6"], "target= is given twice"),
        (["format=pdf"], "format must be one of text, markdown, csv"),
        (["fromat=csv"], "did you mean 'format'"),
        (["run"], "run is named twice"),
        (["nowhere"], "nowhere does not exist"),
        (["empty"], "empty is not a run directory"),
    ],
)
def test_a_slip_on_the_command_line_is_one_line(fedsim: Fedsim, tmp_path: Path, args: list[str], says: str) -> None:
    make_run(tmp_path / "run", 1, records=rounds([0.5]))
    (tmp_path / "empty").mkdir()
    outcome = fedsim("compare", "run", *args)
    assert outcome.status == 2 and says in outcome.line and outcome.out == ""


@pytest.mark.parametrize("style", ["text", "markdown", "csv"])
def test_runs_are_compared_on_the_command_line(fedsim: Fedsim, tmp_path: Path, style: Style) -> None:
    assert fedsim("-m", *QUICK, "rounds=2", "seed=1,2", "tracker=[]").status == 0
    outcome = fedsim("compare", "runs", "target=0.01", f"format={style}")
    assert outcome.status == 0 and "strategy=fedavg" in outcome.out
    finals = [json.loads(p.read_text())["final"]["test_accuracy"] for p in tmp_path.rglob("summary.json")]
    mean = statistics.fmean(finals)
    assert (f"{mean:.12g}" if style == "csv" else f"{100 * mean:.2f}") in outcome.out
