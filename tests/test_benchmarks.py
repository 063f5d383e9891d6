"""The benchmarks compare what they say they compare. Nothing here looks at a clock's reading."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import benchmarks.__main__ as suite
from benchmarks import cifar, common, engines, floor, overhead, scaling, sides, table, whole
from benchmarks.common import CASES, CIFAR, Case, Row, rows_of
from benchmarks.models import PflCNN
from fedsim.compose import compose
from fedsim.experiment import build

SMALL = Case("logreg", clients=3, steps=2, batch=4, num_test=20)


def test_ratios_are_those_of_neighbouring_turns() -> None:
    # Medians of neighbours: 2/1, 3/3, 8/2 have the median 2; the ratio of medians would be 3/2.
    seconds = {"ours": [2.0, 3.0, 8.0], "theirs": [1.0, 3.0, 2.0]}
    ours, theirs = rows_of("x", "case", seconds, "theirs", {"ours": 1.9, "theirs": 0.0}, {"ours": "a note"})
    assert (ours.seconds, ours.ratio, ours.target, ours.note) == (3.0, 2.0, 1.9, "a note")
    assert (theirs.seconds, theirs.ratio, theirs.target) == (2.0, None, None)
    assert "2.000 of theirs (MISSED: 1.9)" in table.line(ours)


@pytest.mark.parametrize("name", [*CASES, *CIFAR])
def test_a_case_is_the_round_that_it_says(name: str) -> None:
    case = replace({**CASES, **CIFAR}[name], num_test=20)
    if case.population is not None:
        case = replace(case, population=2 * case.clients)  # 1,000 clients' images take seconds to draw
    exp = build(compose(case.overrides()))
    assert exp.program.clients.sizes().tolist() == [case.steps * case.batch] * case.num_clients
    assert exp.program.options.planned_steps(case.examples) == case.steps
    assert len(exp.participation.sample(case.num_clients, np.random.default_rng(0))) == case.clients
    assert tuple(exp.program.dataset.test.x.shape) == (case.num_test, case.channels, case.size, case.size)


def test_all_sides_of_the_overhead_end_in_the_same_parameters() -> None:
    common_overrides = SMALL.overrides()
    exp = build(compose([*common_overrides, *sides.ONE_BY_ONE]))
    plain = overhead.plain_side(exp, SMALL)()
    torch.testing.assert_close(overhead.fedsim_side(exp)(), plain)
    if not sides.NO_BATCHING:
        batched = build(compose([*common_overrides, "client.batching=3"]))
        torch.testing.assert_close(overhead.fedsim_side(batched)(), plain)


def test_the_network_of_pfl_has_the_published_size() -> None:
    # Weights and biases: 3x3 convolutions 3 -> 32 -> 64, then 64 * 14 * 14 -> 128 -> 10.
    layers = [(27, 32), (288, 64), (64 * 14 * 14, 128), (128, 10)]
    module = PflCNN((3, 32, 32), 10)
    assert sum(p.numel() for p in module.parameters()) == sum((i + 1) * o for i, o in layers) == 1_626_442
    dropped = [m.p for m in module.modules() if isinstance(m, nn.Dropout)]
    assert dropped == [0.25, 0.5]
    assert not [m for m in PflCNN((3, 32, 32), 10, dropout=False).modules() if isinstance(m, nn.Dropout)]


def test_products_of_a_step_are_counted_by_the_formula() -> None:
    # Linear: 2 B i o a product, two for the first layer (its inputs need no gradient), three for the others.
    module = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    found = floor.products(module, torch.randn(4, 5))
    assert sum(p.flops for p in found) == 2 * (2 * 4 * 5 * 7) + 3 * (2 * 4 * 7 * 3)
    # A 3x3 convolution of 2 to 6 channels over 8x8 images without padding: 36 places, 18 multiplications each.
    found = floor.products(nn.Sequential(nn.Conv2d(2, 6, 3)), torch.randn(4, 2, 8, 8))
    assert sum(p.flops for p in found) == 2 * (2 * 4 * 6 * 36 * 18)
    for product in found:
        product.run()


def test_the_products_are_those_of_the_backward_pass() -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(5, 5), nn.Conv2d(1, 2, 3)), torch.randn(3, 1, 5, 5, requires_grad=True)
    module(x).square().sum().backward()
    named = {p.name: p.run() for p in floor.products(module, x.detach())}
    assert set(named) == {"0 forward", "0 weight", "1 forward", "1 backward"}
    backward = named["1 backward"]
    assert isinstance(backward, tuple)
    assert backward[0].shape == (3, 1, 5, 5) and backward[1].shape == module[1].weight.shape


def test_the_share_of_products_is_that_of_the_same_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "small", SMALL)
    monkeypatch.setattr(floor, "LOOP_S", 0.0)
    products, *others = floor.measure("small", 2)
    assert products.side == floor.PRODUCTS and products.runs == 2
    assert [row.side for row in others] == ["one by one"] + ([] if sides.NO_BATCHING else ["batched"])
    shares = [b / a for a, b in zip(products.all, others[0].all, strict=True)]
    assert others[0].ratio == pytest.approx(sum(shares) / 2)  # the median of two


def test_whole_rounds_count_a_tenth_of_the_evaluation() -> None:
    class Fixed:
        def __init__(self, took: float, evaluation: float) -> None:
            self.took, self.evaluation, self.asked = took, evaluation, 0

        def round(self) -> float:
            self.asked += 1
            return self.took

        def evaluate(self) -> float:
            return self.evaluation

    a, b = Fixed(2.0, 10.0), Fixed(1.0, 0.0)
    seconds, notes = sides.turns({"a": a, "b": b}, 5)
    assert seconds == {"a": [3.0] * 5, "b": [1.0] * 5}
    assert a.asked == b.asked == 6  # the first turn warms up
    assert notes["a"] == "round 2000.0 ms, evaluation 10000.0 ms"


def test_rows_of_engines_are_compared_with_flower_by_turn() -> None:
    found = engines.Found(beside=[0.25])
    found.seconds.update({"inline": [4.0], "ray 2": [2.0], "flower": [6.0]})
    found.starts.update({"fedsim": [3.0], "flower": [4.0]})
    rows = {(row.side, row.unit): row for row in engines.table("lenet5", found)}
    assert rows["inline", "round"].ratio == pytest.approx(4 / 6)
    assert (rows["ray 2", "round"].ratio, rows["ray 2", "round"].target) == (0.25, engines.FLOWER["lenet5"])
    assert rows["flower", "round"].ratio is None and ("ray 1", "round") not in rows  # what was not measured has no row
    assert rows["fedsim", "first round"].ratio == 0.75


def test_targets_fall_on_the_fastest_of_one_process_and_of_two_workers() -> None:
    both = f"{whole.TWO}, batched"
    seconds = {"one by one": [3.0], "batched": [2.0], whole.TWO: [1.0], both: [1.5], whole.PFL: [4.0]}
    assert whole.targets("lenet5", seconds) == {"batched": pytest.approx(2 / 3), whole.TWO: pytest.approx(1 / 3)}
    assert whole.targets("logreg", seconds) == {}


def test_scaling_is_relative_to_the_first_size(tmp_path: Path) -> None:
    cohort = scaling.cohort(1, tmp_path, (2, 4))
    assert [row.side for row in cohort] == ["2 clients", "4 clients"]
    assert cohort[0].ratio is None and cohort[1].against == "2 clients"


def test_a_slice_of_the_cifar_benchmark_runs_both_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "pfl's CNN, no dropout"
    monkeypatch.setitem(CIFAR, name, replace(CIFAR[name], clients=2, population=4, steps=1, batch=2, num_test=4))
    found = cifar.a_slice(name, 1, None, 2, None, tmp_path)
    assert [row.side for row in found] == ["one by one", "batched" if sides.NO_BATCHING else "batched (2)"]
    assert found[0].runs == 1


def test_the_suite_prints_a_table_and_writes_all_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overhead, "measure", lambda name, *_: [Row("a", name, "ours", 0.5, runs=5, all=[0.5] * 5)])
    suite.main(["--only", "a,b,c", f"--json={tmp_path / 'out.json'}"])
    printed = capsys.readouterr().out
    assert "--flower-python flower/bin/python" in printed and "--pfl-python pfl/bin/python" in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["case"] for row in written["rows"]] == list(common.FAST)
    assert written["rows"][0]["all"] == [0.5] * 5
    assert {"date", "torch", "cpu", "cores", "threads", "python"} <= written["machine"].keys()


def test_a_part_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main(["--only", "a,z"])
    assert "no part 'z'" in capsys.readouterr().err
