"""Long-tailed data, test sets with a client's own classes, and head, middle and tail."""

from __future__ import annotations

import csv
import math
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.compose import compose
from fedsim.config import check
from fedsim.data import Dataset, IntArray, Partition, PartitionedClients, Split
from fedsim.engine.wire import pack, unpack
from fedsim.errors import ConfigError
from fedsim.evaluation import by_group, group_accuracy
from fedsim.experiment import Shared, build, rebuild
from fedsim.longtail import cut, groups, local_tests, long_tailed, profile
from fedsim.report.compare import compare
from tests.cli import Fedsim
from tests.helpers import Run, configure, drive
from tests.run_dirs import make_run, rounds

SETTINGS = settings(deadline=None, derandomize=True, max_examples=100)
LONG = {"data.imbalance": 20, "partition.holdout": "test", "rounds": 2}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def shuffled(counts: list[int], seed: int = 0) -> IntArray:
    """Labels of so many examples of every class, in random order."""
    return rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def sizes_of(counts: list[int], imbalance: float) -> list[int]:
    """Class sizes of the largest profile that fits, found by trying every n_max from above."""
    num = len(counts)
    for largest in range(counts[0], -1, -1):
        sizes = [math.floor(largest * (1 / imbalance) ** (c / (num - 1))) for c in range(num)]
        if all(s <= n for s, n in zip(sizes, counts, strict=True)):
            return sizes
    raise AssertionError("a profile of zeros fits")


def part_of(lists: list[list[int]]) -> Partition:
    offsets = np.cumsum([0, *map(len, lists)]).astype(np.int64)
    return Partition(offsets, np.array([row for rows in lists for row in rows], dtype=np.int64))


# --- class sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("imbalance", [3, 7, 49, 60, 1000])
def test_a_whole_smallest_class_is_not_lost_to_rounding(imbalance: int) -> None:
    assert [profile(k * imbalance, 10, imbalance)[-1] for k in (1, 2, 100)] == [1, 2, 100]


@pytest.mark.parametrize(
    "num_classes, largest, imbalance, total",
    [(10, 5000, 50, 13_996), (10, 5000, 100, 12_406), (100, 500, 50, 12_608), (100, 500, 100, 10_847)],
)
def test_totals_are_the_published_ones(num_classes: int, largest: int, imbalance: int, total: int) -> None:
    labels = shuffled([largest] * num_classes)
    counts = np.bincount(labels[cut(labels, num_classes, imbalance, rng())])
    assert counts.sum() == total
    assert (counts[0], counts[-1]) == (largest, largest // imbalance)
    assert (np.diff(counts) <= 0).all()


@given(
    counts=st.lists(st.integers(1, 60), min_size=2, max_size=6),
    imbalance=st.floats(1.01, 40) | st.sampled_from([2, 10, 100]),
)
@SETTINGS
def test_unequal_classes_are_cut_to_the_largest_profile_that_fits(counts: list[int], imbalance: float) -> None:
    labels = shuffled(counts)
    rows = cut(labels, len(counts), imbalance, rng())
    assert (np.diff(rows) > 0).all()  # each once
    assert np.bincount(labels[rows], minlength=len(counts)).tolist() == sizes_of(counts, imbalance)


def test_every_example_of_a_class_is_as_likely_to_stay() -> None:
    labels, stream, runs = shuffled([8, 8, 8]), rng(3), 2000
    times = np.zeros(len(labels))
    for _ in range(runs):
        times[cut(labels, 3, 4, stream)] += 1
    expected = np.array([8, 4, 2])[labels] / 8
    assert (np.abs(times / runs - expected) <= 5 * np.sqrt(expected * (1 - expected) / runs)).all()


def dataset(counts: list[int]) -> Dataset:
    """Data whose inputs and natural keys are the row numbers."""
    y = torch.from_numpy(shuffled(counts))
    x = torch.arange(len(y))
    names = tuple(map(str, range(len(counts))))
    return Dataset("numbers", Split(x[:, None].float(), y), Split(x[:1, None].float(), y[:1]), names, keys={"row": x})


def test_natural_keys_are_cut_with_their_examples() -> None:
    whole = dataset([30, 40, 50])
    found = long_tailed(whole, 5, seed=1)
    rows = found.keys["row"]
    assert len(rows) == len(found.train) == sum(sizes_of([30, 40, 50], 5))
    assert torch.equal(found.train.x[:, 0], rows.float())
    assert torch.equal(found.train.y, whole.train.y[rows])
    assert found.test is whole.test


def test_the_choice_follows_from_the_seed() -> None:
    a, b, c = (long_tailed(dataset([50, 50]), 10, seed).keys["row"] for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_an_imbalance_of_1_changes_nothing() -> None:
    plain, one = (build(configure(values={"data.imbalance": value})) for value in (None, 1))
    assert plain.partition is not None
    assert one.partition is not None
    assert plain.partition.sha256() == one.partition.sha256()
    assert torch.equal(plain.program.dataset.train.y, one.program.dataset.train.y)
    assert "imbalance" not in plain.describe()["data"]
    assert "imbalance 1 (" in one.describe()["data"]


def test_validation_and_partition_see_the_cut_data() -> None:
    whole = np.bincount(build(configure()).program.dataset.train.y.numpy()).tolist()
    sizes = sizes_of(whole, 20)
    exp = build(configure(values={"data.imbalance": 20, "data.validation": 0.2, "partition.holdout": 0.0}))
    server, part = exp.program.server, exp.partition
    assert server is not None
    assert part is not None
    assert len(server) == round(0.2 * sum(sizes))
    y = exp.program.dataset.train.y
    given = torch.cat([y[torch.from_numpy(part.indices)], server.y])
    assert torch.bincount(given).tolist() == sizes
    assert f"imbalance 20 ({max(sizes)} to {min(sizes)} a class)" in exp.describe()["data"]


def test_a_config_of_before_the_key_means_no_cut() -> None:
    config = compose([])
    del config["data"]["imbalance"]
    check(config)
    assert len(build(config).program.dataset.train) == 1442


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, says",
    [
        ("data.imbalance=0.5", "data.imbalance must be a number in [1, inf), or null, got 0.5"),
        ("data.imbalance=nan", "data.imbalance must be a number in [1, inf), or null, got nan"),
        ("data.imbalance=many", "or null, got 'many'"),
        ("data.imbalance=500", "data.imbalance=500 would leave class 8 ('8') of digits without training examples"),
        ("data=synthetic data.imbalance=10", "data.imbalance=10 is not available: synthetic's examples all belong"),
        ("partition.holdout=tests", "partition.holdout must be a number in [0, 1), or test, got 'tests'"),
        ("partition.holdout=1", "partition.holdout must be a number in [0, 1), or test, got 1"),
        ("data=synthetic partition.holdout=test", "partition.holdout=test has no effect"),
    ],
)
def test_a_wrong_request_ends_in_one_line(fedsim: Fedsim, line: str, says: str) -> None:
    outcome = fedsim(*line.split())
    assert outcome.status == 2
    assert says in outcome.line


@dataclass(frozen=True)
class Few:
    """Forty examples: ``classes`` equal classes, or for 0 float targets."""

    classes: int

    def load(self, seed: int) -> Dataset:
        x = torch.arange(40.0)[:, None]
        y = x[:, 0] if self.classes == 0 else torch.arange(40) % self.classes
        return Dataset("few", Split(x, y), Split(x, y), tuple(map(str, range(self.classes))))


def few(classes: int, **values: Any) -> dict[str, Any]:
    data = {"_target_": "tests.test_longtail.Few", "classes": classes, "augment": [], "validation": 0.0}
    return configure(["partition=iid", "model=logreg"], {"data": data, **values})


@pytest.mark.parametrize("classes, found", [(0, r"none \(regression\)"), (1, "1 class;")])
def test_an_imbalance_needs_two_classes(classes: int, found: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.imbalance=10 needs at least two classes, and few has {found}"):
        build(few(classes, **{"data.imbalance": 10}))
    assert len(build(few(2, **{"data.imbalance": 10})).program.dataset.train) == 20 + 2


def test_local_tests_need_classes() -> None:
    with pytest.raises(ConfigError, match=r"partition\.holdout=test .* few has none \(regression\)"):
        build(few(0, **{"partition.holdout": "test"}))


def test_local_tests_need_a_partition() -> None:  # a preset may ask for them, where no override names the key
    with pytest.raises(ConfigError, match=r"partition\.holdout=test needs a partition, and data=synthetic"):
        build(configure(["data=synthetic"], {"partition.holdout": "test"}))


# --- local test sets --------------------------------------------------------------------------------------


def test_a_client_is_tested_on_its_own_class_proportions() -> None:
    exp = build(configure(values={"partition.holdout": "test"}))
    data, clients, part = exp.program.dataset, exp.program.clients, exp.partition
    assert part is not None
    y, test, n = data.train.y.numpy(), data.test.y.numpy(), len(data.train)
    drawn = []
    for k in range(len(clients)):
        shard = clients.heldout(k)
        assert shard.x is data.test.x
        expected = [len(test) * int((y[part[k]] == c).sum()) // n for c in range(10)]
        assert all(want <= (test == c).sum() for c, want in enumerate(expected))
        assert np.bincount(test[shard.rows], minlength=10).tolist() == expected
        assert (shard.rows.diff() > 0).all()
        assert sorted(clients.train(k).rows.tolist()) == sorted(part[k])
        drawn.append(set(shard.rows.tolist()))
    assert sum(map(len, drawn)) > len(set().union(*drawn)) > 0  # each client draws for itself


def test_a_scarce_class_lowers_all_of_a_clients_numbers() -> None:
    # 120 examples and 20 test examples: client 0 would get 90/6 = 15 and 18/6 = 3, but there are 10 of class 0. So it
    # gets 10/90 of its numbers: 10 and 2. Client 1, with 12 of class 1, keeps its share of 1/6: 2.
    labels = np.repeat([0, 1], [90, 30])
    part = part_of([[*range(90), *range(90, 108)], [*range(108, 120)]])
    test = np.repeat([0, 1], 10)
    found = local_tests(labels, part, test, seed=0)
    assert [np.bincount(test[found[k]], minlength=2).tolist() for k in (0, 1)] == [[10, 2], [0, 2]]


def test_the_scarcest_class_decides() -> None:
    # One client: 60 of each class and 6, 4, 20 test examples of them. Each would get 10; class 1 has 4/60 of its 60.
    labels, test = np.repeat([0, 1, 2], 60), np.repeat([0, 1, 2], [6, 4, 20])
    found = local_tests(labels, part_of([[*range(180)]]), test, seed=0)
    assert np.bincount(test[found[0]]).tolist() == [4, 4, 4]


def test_a_class_that_the_test_set_lacks_is_left_out() -> None:
    labels, test = np.repeat([0, 1, 2], 10), np.repeat([0, 1], 15)
    found = local_tests(labels, part_of([[*range(30)]]), test, seed=0)
    assert np.bincount(test[found[0]]).tolist() == [10, 10]


def test_every_test_example_of_a_class_is_as_likely() -> None:
    labels, test = np.repeat([0, 1], 50), shuffled([4, 6])
    part = part_of([[*range(0, 100, 2)], [*range(1, 100, 2)]])  # 25 and 25 each: floor(2.5) test examples of a class
    runs, times, same = 1000, np.zeros((2, 10)), 0
    for seed in range(runs):
        found = local_tests(labels, part, test, seed)
        for k in (0, 1):
            times[k, found[k]] += 1
        same += found[0].tolist() == found[1].tolist()
    # Clients draw independently: two of 4 and two of 6 are 6 * 15 choices, so one time in 90 theirs are the same.
    assert abs(same / runs - 1 / 90) < 5 * (1 / 90 / runs) ** 0.5
    expected = 2 / np.array([4, 6])[test]
    assert (np.abs(times / runs - expected) < 5 * np.sqrt(expected * (1 - expected) / runs)).all()


def test_clients_train_on_all_of_their_examples(tmp_path: Path) -> None:
    ours, none, share = (
        drive(configure(values={"partition.holdout": value}), tmp_path / str(value)) for value in ("test", 0.0, 0.1)
    )
    assert ours.params_sha256 == none.params_sha256 != share.params_sha256
    parts = {run.result.summary["partition_sha256"] for run in (ours, none, share)}
    assert len(parts) == 1


def table(run: Run, name: str) -> list[dict[str, str]]:
    with (run.result.run_dir / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_clients_without_a_test_example_are_left_out_of_means(tmp_path: Path) -> None:
    values = {"partition.holdout": "test", "partition.num_clients": 90, "eval.clients": "all", "rounds": 1}
    run = drive(configure(["partition=iid"], values), tmp_path)
    rows = table(run, "clients.csv")
    # Of 16 or 17 digits a client needs five of one class, 355 * 5 / 1442 >= 1, to be tested at all.
    assert {int(row["num_train"]) for row in rows} == {16, 17}
    tested = [row for row in rows if int(row["num_heldout"])]
    assert 0 < len(tested) < len(rows)
    accuracies = [float(row["accuracy"]) for row in tested]
    final = run.result.summary["final"]
    assert final["client_accuracy_mean"] == pytest.approx(np.mean(accuracies))
    weights = [int(row["num_heldout"]) for row in tested]
    assert final["client_accuracy_weighted"] == pytest.approx(np.average(accuracies, weights=weights))


def test_workers_have_the_test_set_once() -> None:
    config = configure(values=LONG)
    exp = build(config)
    sent = Shared.of(exp.program)
    assert isinstance(sent.clients, PartitionedClients)
    assert sent.clients.test is not None
    assert len(sent.clients.test) == 0
    assert len(pickle.dumps(sent.clients.heldout_part)) < 20_000
    program = rebuild(exp.config, unpack(pack(sent), copy=False))
    assert isinstance(program.clients, PartitionedClients)
    assert program.clients.test is program.dataset.test
    for k in range(len(program.clients)):
        here, there = exp.program.clients.heldout(k), program.clients.heldout(k)
        assert len(here)
        assert torch.equal(here.x[here.rows], there.x[there.rows])
        assert torch.equal(here.y[here.rows], there.y[there.rows])


@pytest.mark.slow
def test_workers_find_the_same(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    values = {**LONG, "eval.every": 1, "eval.finetune_epochs": 1}
    inline, ray = (drive(configure([f"engine={e}"], values), tmp_path / e) for e in ("inline", "ray"))
    assert inline.records == ray.records
    assert inline.state_sha256 == ray.state_sha256


# --- head, middle, tail -----------------------------------------------------------------------------------


def test_groups_of_the_published_example() -> None:
    assert groups([100, 60, 20, 10, 5, 3, 1, 1]).tolist() == [0, 0, 1, 1, 2, 2, 2, 2]


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any))
@SETTINGS
def test_groups_follow_their_definition(counts: list[int]) -> None:
    total, reached, expected = sum(counts), Fraction(0), dict[int, int]()
    for c in sorted(range(len(counts)), key=lambda c: (-counts[c], c)):
        expected[c] = 0 if reached < Fraction(3, 4) else 1 if reached < Fraction(19, 20) else 2
        reached += Fraction(counts[c], total)  # the class that reaches the limit is still inside
    assert groups(counts).tolist() == [expected[c] for c in range(len(counts))]


def test_limits_are_reached_exactly() -> None:
    assert groups([75, 20, 5]).tolist() == [0, 1, 2]  # 75 % and 95 % to the example
    assert groups([74, 20, 6]).tolist() == [0, 0, 1]  # one example less
    assert groups([5, 20, 75]).tolist() == [2, 1, 0]
    assert groups([2, 1]).tolist() == [0, 0]  # two thirds do not reach it
    assert groups([3, 3, 3, 3]).tolist() == [0, 0, 0, 1]  # ties by class number
    assert groups([96, 4]).tolist() == [0, 2]  # no middle


def test_accuracy_of_groups_is_over_their_examples() -> None:
    found = group_accuracy([8, 2, 0, 5], [8, 0, 0, 1], np.array([0, 0, 1, 2]))
    assert found[0] == 0.8
    assert math.isnan(found[1])
    assert found[2] == 0.2
    other = [0.4, math.nan, math.nan]
    means = by_group([found, other], "a")
    assert means == {"a_head": pytest.approx(0.6), "a_tail": 0.2}


def test_groups_are_reported_of_the_model_and_of_clients(tmp_path: Path) -> None:
    values = {**LONG, "data.imbalance": 5, "rounds": 6, "eval.clients": "all", "eval.finetune_epochs": 2}
    run = drive(configure(values={**values, "strategy": {"_target_": "tests.helpers.FedRep"}}), tmp_path)
    final, exp = run.result.summary["final"], run.driver.exp
    classes = table(run, "classes.csv")
    names = ["head", "middle", "tail"]
    assert [names[g] for g in groups([int(row["num_train"]) for row in classes])] == [row["group"] for row in classes]
    assert [row["group"] for row in classes] == sorted(row["group"] for row in classes)
    for name in names:
        rows = [row for row in classes if row["group"] == name]
        hits = sum(float(row["accuracy"]) * int(row["num_test"]) for row in rows)
        assert final[f"test_accuracy_{name}"] == pytest.approx(hits / sum(int(row["num_test"]) for row in rows))
    assert set(run.driver._scores) == {"global", "personal", "finetuned"}
    for mode, scores in run.driver._scores.items():
        found: dict[str, list[float]] = {name: [] for name in names}
        for k, score in enumerate(scores):
            shard = exp.program.clients.train(k)
            group = groups(torch.bincount(shard.y[shard.rows], minlength=10).tolist())
            for i, name in enumerate(names):
                inside = torch.from_numpy(group == i)
                if seen := int(score.confusion[inside].sum()):
                    found[name].append(int(score.confusion.diagonal()[inside].sum()) / seen)
        prefix = "client" if mode == "global" else mode
        means = {f"{prefix}_accuracy_{name}": pytest.approx(np.mean(v)) for name, v in found.items() if v}
        assert len(means) >= 2
        assert {k: v for k, v in final.items() if k in {f"{prefix}_accuracy_{name}" for name in names}} == means
    assert run.records[-1]["test_accuracy_tail"] == final["test_accuracy_tail"]


def test_without_an_imbalance_there_are_no_groups(tmp_path: Path) -> None:
    run = drive(configure(values={"rounds": 1}), tmp_path)
    assert not [key for key in run.result.summary["final"] if key.endswith(("_head", "_middle", "_tail"))]
    assert "group" not in table(run, "classes.csv")[0]


# --- large data, and tables -------------------------------------------------------------------------------


def lines(work: Callable[[], object]) -> int:
    """Lines of Python that were executed in this package."""
    count, before = 0, sys.gettrace()

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace if "fedsim" in frame.f_code.co_filename else None

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_a_million_examples_take_no_more_python_than_a_few() -> None:
    def work(n: int, num_clients: int) -> int:
        labels = rng(1).integers(0, 10, n)
        part = Partition.from_owners(rng(2).integers(0, num_clients, n), num_clients)
        test = rng(3).integers(0, 10, 100)
        return lines(lambda: (cut(labels, 10, 100, rng()), local_tests(labels, part, test, 0)))

    small = work(10_000, 10)
    assert work(1_000_000, 10) < 2 * small
    assert work(1_000_000, 500_000) < 2 * small


def test_tables_have_columns_for_groups_and_the_spread_of_personal_models(tmp_path: Path) -> None:
    final: Mapping[str, float] = {
        "test_accuracy": 0.5,
        "test_accuracy_head": 0.75,
        "test_accuracy_middle": 0.25,
        "test_accuracy_tail": 0.125,
        "personal_accuracy_mean": 0.625,
        "personal_accuracy_std": 0.0625,
        "personal_accuracy_worst10": 0.375,
    }
    found = compare([make_run(tmp_path / "a", 1, records=rounds([0.5]), final=final)])
    shown = dict(zip(*([cell.text for cell in row] for row in found.cells()), strict=True))
    assert (shown["head acc %"], shown["middle acc %"], shown["tail acc %"]) == ("75.00", "25.00", "12.50")
    assert (shown["personal acc std %"], shown["personal worst 10 % acc %"]) == ("6.25", "37.50")
    width = next(w for w in range(400, 0, -1) if "head acc %" in found.left_out(w))
    gone = {"personal acc std %", "personal worst 10 % acc %", "wall", "rounds", "tail acc %", "middle acc %"}
    assert gone <= set(found.left_out(width))
    assert "personal acc %" not in found.left_out(width)
