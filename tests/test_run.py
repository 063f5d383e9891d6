"""What a run does around its rounds: stop, choose the best, evaluate, and write down what happened."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fedsim.checkpoint import Checkpoints
from fedsim.compose import compose
from fedsim.errors import ClientError
from fedsim.evaluation import spread
from fedsim.experiment import Experiment, build, simulate
from fedsim.federation import Federation
from fedsim.report import curves, html, partition
from fedsim.run import Driver, Result
from fedsim.rundir import read_metrics, read_summary

SMALL = (
    "data=digits",
    "model=logreg",
    "partition=iid",
    "partition.num_clients=8",
    "participation=fixed",
    "participation.clients_per_round=3",
    "client.epochs=null",
    "client.steps=2",
    "rounds=6",
    "tracker=[jsonl]",
)


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Pictures that were asked for; drawing them takes longer than a small run."""
    paths: list[Path] = []
    monkeypatch.setattr(curves, "plot_curves", lambda runs, path: paths.append(path))
    monkeypatch.setattr(partition, "plot_bubbles", lambda part, labels, names, path, title: paths.append(path))
    monkeypatch.setattr(html, "write_own_report", lambda path, summary: paths.append(path / "report.html"))
    return paths


@pytest.fixture
def go(tmp_path: Path) -> Callable[..., Result]:
    """Runs a small experiment."""
    return lambda *overrides: simulate([*SMALL, f"run_dir={tmp_path}", *overrides])


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes evaluations say what a test wants, round by round."""

    def script(**figures: list[float]) -> None:
        def evaluate(self: Driver, number: int) -> dict[str, Any]:
            return {"round": number, **{name: values[number - 1] for name, values in figures.items()}}

        monkeypatch.setattr(Driver, "_evaluate", evaluate)

    return script


def evaluated(result: Result) -> list[int]:
    return [r["round"] for r in result.metrics if "test_loss" in r]


# --- stop rules -------------------------------------------------------------------------------------------

LOSSES = [1.0, 0.8, 0.9, 0.7, 0.7, 0.75]
ACCURACIES = [0.1, 0.5, 0.45, 0.6, 0.61, 0.9]


@pytest.mark.parametrize(("patience", "rounds"), [(1, 3), (2, 6), (3, 6)])
def test_patience_counts_evaluations_without_a_better_validation_loss(
    go: Callable[..., Result], scripted: Callable[..., None], patience: int, rounds: int
) -> None:
    # Better at rounds 1, 2, 4; worse at 3; equal at 5; worse at 6.
    scripted(validation_loss=LOSSES, validation_accuracy=ACCURACIES, test_loss=LOSSES)
    result = go("data.validation=0.1", f"stop.patience={patience}")
    assert result.summary["rounds"] == len(result.metrics) == rounds
    stopped = f"no better validation loss in {patience} evaluations" if patience < 3 else None
    assert result.summary["stopped"] == stopped


def test_patience_counts_evaluations_and_not_rounds(go: Callable[..., Result], scripted: Callable[..., None]) -> None:
    # Evaluated at 2, 4, 6, 8: better at 2 and 4, worse at 6 and 8.
    losses = [9.0, 0.8, 0.1, 0.7, 0.1, 0.9, 0.1, 0.9, 0.1, 0.1]
    scripted(validation_loss=losses, test_loss=losses)
    result = go("data.validation=0.1", "stop.patience=2", "eval.every=2", "rounds=10")
    assert result.summary["rounds"] == 8


def test_an_evaluation_that_only_the_last_round_caused_does_not_stop_a_resumed_run(
    go: Callable[..., Result], scripted: Callable[..., None]
) -> None:
    # Of the evaluations at 2, 4, 6 only that at 4 is no better than those before; the one at 3 is extra.
    losses = [9.0, 0.5, 0.9, 0.6, 9.0, 0.4]
    scripted(validation_loss=losses, test_loss=losses)
    first = go("data.validation=0.1", "stop.patience=2", "eval.every=2", "rounds=3")
    second = simulate([f"resume={first.run_dir}", "rounds=6"])
    assert second.summary["rounds"] == 6 and second.summary["stopped"] is None


@pytest.mark.parametrize(("target", "rounds"), [(0.5, 2), (0.55, 4), (0.95, 6)])
def test_a_run_stops_at_its_target_accuracy(
    go: Callable[..., Result], scripted: Callable[..., None], target: float, rounds: int
) -> None:
    scripted(validation_loss=LOSSES, validation_accuracy=ACCURACIES, test_loss=LOSSES, test_accuracy=[0.99] * 6)
    result = go("data.validation=0.1", f"stop.target_accuracy={target}")
    assert result.summary["rounds"] == len(result.metrics) == rounds
    assert result.summary["stopped"] == (f"validation accuracy reached {target:g}" if rounds < 6 else None)


@pytest.mark.parametrize(("limit", "rounds"), [(0.02, 1), (0.03, 2), (0.1, 5), (5, 6)])
def test_a_run_stops_when_virtual_time_is_spent(go: Callable[..., Result], limit: float, rounds: int) -> None:
    result = go(f"stop.virtual_seconds={limit}", "system.seconds_per_step=0.01", "eval.every=4")  # 0.02 s a round
    assert result.summary["rounds"] == len(result.metrics) == rounds
    assert result.summary["totals"]["virtual_seconds"] == pytest.approx(0.02 * rounds)
    assert evaluated(result) == sorted({4, rounds} & {rounds, *range(rounds)})
    assert result.summary["final"]["round"] == rounds
    assert result.summary["stopped"] == (f"virtual time reached {limit:g} s" if rounds < 6 else None)


def test_a_run_that_stopped_early_is_the_beginning_of_the_whole_run(go: Callable[..., Result]) -> None:
    args = ("data.validation=0.1", "client.lr=0.5", "rounds=8")
    whole = go(*args)
    accuracy = [r["validation_accuracy"] for r in whole.metrics]
    target = sorted(accuracy)[4]
    first = next(i for i, a in enumerate(accuracy, 1) if a >= target)
    assert 1 <= first < 8
    short = go(*args, f"stop.target_accuracy={target}")
    assert short.summary["rounds"] == first

    def untimed(result: Result) -> list[dict[str, Any]]:
        return [{k: v for k, v in r.items() if k != "wall_seconds"} for r in result.metrics]

    assert untimed(short) == untimed(whole)[:first]
    assert short.summary["params_sha256"] == go(*args, f"rounds={first}").summary["params_sha256"]


# --- the best ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figures", "by", "best"),
    [
        (
            {"validation_accuracy": [0.1, 0.5, 0.5, 0.3], "test_accuracy": [0.9, 0.2, 0.3, 0.4]},
            "validation_accuracy",
            2,
        ),
        ({"validation_loss": [3.0, 1.0, 2.0, 1.0], "test_loss": [1.0, 9.0, 9.0, 9.0]}, "validation_loss", 2),
        ({"test_accuracy": [0.1, 0.2, 0.7, 0.6], "test_loss": [1.0, 2.0, 3.0, 4.0]}, "test_accuracy", 3),
        ({"test_loss": [4.0, 3.0, 1.0, 2.0]}, "test_loss", 3),
        ({"test_loss": [math.nan, 3.0, math.nan, 2.0]}, "test_loss", 4),
    ],
)
def test_the_best_is_chosen_on_validation_data_where_there_are_any(
    go: Callable[..., Result], scripted: Callable[..., None], figures: dict[str, list[float]], by: str, best: int
) -> None:
    scripted(**figures)
    found = go("rounds=4").summary["best"]
    assert found == {"by": by, "round": best, **{name: values[best - 1] for name, values in figures.items()}}


def test_the_best_model_is_that_of_its_round(go: Callable[..., Result], scripted: Callable[..., None]) -> None:
    scripted(validation_accuracy=[0.1, 0.2, 0.7, 0.6], validation_loss=[1.0] * 4, test_loss=[1.0] * 4)
    result = go("rounds=4", "data.validation=0.1")
    best = load_file(result.run_dir / "model_best.safetensors")
    at_three = load_file(go("rounds=3", "data.validation=0.1").run_dir / "model.safetensors")
    final = load_file(result.run_dir / "model.safetensors")
    assert best.keys() == at_three.keys() == final.keys()
    assert all(torch.equal(best[name], at_three[name]) for name in best)
    assert not all(torch.equal(best[name], final[name]) for name in best)


def test_without_validation_data_no_model_is_called_best(go: Callable[..., Result]) -> None:
    assert not (go("rounds=2").run_dir / "model_best.safetensors").exists()  # it would be chosen on the test set


# --- what is evaluated ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "rounds"), [(1, [1, 2, 3, 4, 5, 6]), (4, [4, 6]), (3, [3, 6]), (100, [6])])
def test_the_last_round_is_always_evaluated(go: Callable[..., Result], every: int, rounds: list[int]) -> None:
    result = go(f"eval.every={every}")
    assert evaluated(result) == rounds
    last = {k: v for k, v in result.metrics[-1].items() if k in result.summary["final"]}
    assert last.items() <= result.summary["final"].items()
    assert result.summary["final"]["round"] == 6


@pytest.mark.parametrize("mode", ["global", "personal"])
def test_nothing_is_evaluated_twice(go: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    calls: list[str] = []
    for name in ("evaluate", "evaluate_clients"):
        original = getattr(Federation, name)

        def counted(self: Federation, *args: Any, original: Any = original, name: str = name) -> Any:
            calls.append(f"{name} {args[-1] if isinstance(args[-1], str) else 'test'}")
            return original(self, *args)

        monkeypatch.setattr(Federation, name, counted)
    strategy = ("strategy._target_=tests.helpers.FineTuned",) if mode == "personal" else ()
    go("rounds=5", "eval.every=2", "data.validation=0.1", *strategy)
    once = ["evaluate test", "evaluate validation", "evaluate_clients global"]
    assert calls == 3 * (once + ["evaluate_clients personal"] * bool(strategy))  # rounds 2, 4, 5; clients.csv: none


@pytest.mark.parametrize("which", ["all", 3, 100])
def test_clients_are_evaluated_as_asked(go: Callable[..., Result], which: str | int) -> None:
    rows = read_clients(go("rounds=2", f"eval.clients={which}"))
    clients = [int(row["client"]) for row in rows]
    assert clients == sorted(set(clients)) and set(clients) <= set(range(8))
    assert len(clients) == (3 if which == 3 else 8)
    assert clients == [int(row["client"]) for row in read_clients(go("rounds=3", f"eval.clients={which}"))]


def test_participants_are_those_of_the_latest_round(
    go: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cohorts: list[list[int]] = []
    sample = Federation.sample

    def seen(self: Federation) -> list[int]:
        cohorts.append(sample(self))
        return cohorts[-1]

    monkeypatch.setattr(Federation, "sample", seen)
    result = go("eval.clients=participants")
    assert [int(row["client"]) for row in read_clients(result)] == cohorts[-1]
    assert len(set().union(*cohorts)) > 3


@pytest.mark.parametrize("strategy", ["fedavg.FedAvg", "FineTuned"])
def test_what_is_written_last_is_the_same_after_a_kill(go: Callable[..., Result], strategy: str) -> None:
    # Personal models are trained when they are evaluated, with the learning rate of the round.
    target = f"tests.helpers.{strategy}" if strategy == "FineTuned" else f"fedsim.strategies.{strategy}"
    result = go(f"strategy._target_={target}", "client.lr_decay=0.5", "eval.clients=participants")
    text = (result.run_dir / "clients.csv").read_bytes()
    assert (b"personal" in text) == (strategy == "FineTuned")
    for name in ("clients.csv", "summary.json"):
        (result.run_dir / name).unlink()
    again = simulate([f"resume={result.run_dir}"])
    assert (again.run_dir / "clients.csv").read_bytes() == text
    assert {**again.summary, "totals": {}} == {**result.summary, "totals": {}}


def test_the_worst_tenth_is_the_bad_end() -> None:
    values = [math.nan, *(float(v) for v in range(20))]
    assert spread(values, [1] * 21, "accuracy")["accuracy_worst10"] == 0.5
    assert spread(values, [1] * 21, "loss", higher_is_better=False)["loss_worst10"] == 18.5
    assert spread([math.nan], [0], "accuracy") == {}


def test_validation_data_are_nobody_elses(tmp_path: Path) -> None:
    exp = build(compose([*SMALL, "data.validation=0.2"]))
    data, server = exp.program.dataset, exp.program.server
    assert exp.partition is not None and server is not None
    shards = [exp.program.shard(c, part) for c in range(8) for part in ("train", "heldout")]
    rows = torch.cat([s.rows for s in shards])
    assert len(rows) == len(set(rows.tolist())) == len(exp.partition.indices)  # clients share nothing with each other
    rest = np.setdiff1d(np.arange(len(data.train)), rows.numpy())
    assert len(rest) == len(server) == round(0.2 * len(data.train))
    assert torch.equal(server.x, data.train.x[rest]) and torch.equal(server.y, data.train.y[rest])
    known = {x.numpy().tobytes() for x in data.train.x}
    assert not any(x.numpy().tobytes() in known for x in data.test.x)


# --- what is written --------------------------------------------------------------------------------------


def read_clients(result: Result) -> list[dict[str, str]]:
    with (result.run_dir / "clients.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def logits(exp: Experiment, params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Outputs of logistic regression, from the numbers in the file."""
    weight, bias = (params[next(n for n in params if n.endswith(end))] for end in ("weight", "bias"))
    pixels = (x.double() / 255).flatten(1)
    if exp.program.dataset.mean:
        pixels = (pixels - exp.program.dataset.mean[0]) / exp.program.dataset.std[0]
    return pixels @ weight.double().T + bias.double()


def test_clients_csv_can_be_computed_by_hand(go: Callable[..., Result]) -> None:
    result = go("partition=dirichlet", "partition.num_clients=8", "partition.alpha=0.5", "client.lr=0.5")
    exp = build(compose([*SMALL, "partition=dirichlet", "partition.num_clients=8", "partition.alpha=0.5"]))
    params = load_file(result.run_dir / "model.safetensors")
    rows = read_clients(result)
    assert [int(r["client"]) for r in rows] == list(range(8))
    accuracies = []
    for row in rows:
        train, held = (exp.program.shard(int(row["client"]), part) for part in ("train", "heldout"))
        assert (int(row["num_train"]), int(row["num_heldout"])) == (len(train), len(held))
        x, y = held.x[held.rows], held.y[held.rows]
        out = logits(exp, params, x)
        assert float(row["loss"]) == pytest.approx(float(F.cross_entropy(out, y)), rel=1e-5)
        predicted = out.argmax(1)
        accuracies.append(float((predicted == y).double().mean()))
        assert float(row["accuracy"]) == pytest.approx(accuracies[-1])
        f1 = [
            2 * float(((predicted == c) & (y == c)).sum()) / float((predicted == c).sum() + (y == c).sum())
            for c in range(10)
            if ((predicted == c) | (y == c)).any()
        ]
        assert float(row["macro_f1"]) == pytest.approx(sum(f1) / len(f1))
    assert len(set(accuracies)) > 3
    final = result.summary["final"]
    assert final["client_accuracy_mean"] == pytest.approx(np.mean(accuracies))
    assert final["client_accuracy_std"] == pytest.approx(np.std(accuracies))
    assert final["client_accuracy_worst10"] == pytest.approx(min(accuracies))
    data = exp.program.dataset.test
    out = logits(exp, params, data.x)
    assert final["test_loss"] == pytest.approx(float(F.cross_entropy(out, data.y)), rel=1e-5)
    assert final["test_accuracy"] == pytest.approx(float((out.argmax(1) == data.y).double().mean()))


def test_every_gradient_of_a_step_is_counted(go: Callable[..., Result], drawn: list[Path]) -> None:
    for batching in ("off", "2"):
        totals = go("strategy=fedsam", f"client.batching={batching}").summary["totals"]
        assert totals["gradients"] == 2 * totals["steps"] > 0


def test_the_summary_says_what_happened(go: Callable[..., Result], drawn: list[Path]) -> None:
    result = go("seed=3")
    s, records = result.summary, result.metrics
    assert s == read_summary(result.run_dir)
    assert s["status"] == "finished" and s["rounds"] == 6 and s["seed"] == 3 and s["stopped"] is None
    totals = s["totals"]
    assert totals["clients"] == 6 * 3 == sum(r["clients"] for r in records)
    assert totals["steps"] == totals["gradients"] == 6 * 3 * 2 and totals["failures"] == 0
    assert totals["bytes_down"] == totals["bytes_up"] == 4 * s["num_parameters"] * 18
    assert totals["bytes_down"] == sum(r["bytes_down"] for r in records)
    assert totals["virtual_seconds"] == records[-1]["virtual_seconds"]
    assert totals["wall_seconds"] >= records[-1]["wall_seconds"] > 0
    assert s["num_parameters"] == result.layout.d == len(result.params) == 650
    for key in ("params_sha256", "state_sha256", "partition_sha256", "config_sha256"):
        assert len(s[key]) == 64
    assert {"python", "torch", "numpy", "fedsim"} <= s["versions"].keys()
    with np.load(result.run_dir / "partition.npz") as saved:
        assert str(saved["sha256"]) == s["partition_sha256"]
        assert len(saved["offsets"]) == 9
    files = {"config.yaml", "metrics.jsonl", "clients.csv", "classes.csv", "visits.csv", "summary.json"}
    files |= {"partition.npz", "model.safetensors", "log.txt", ".lock", "checkpoints"}
    assert {p.name for p in result.run_dir.iterdir()} == files
    assert drawn == [result.run_dir / name for name in ("figures/curves.png", "figures/partition.png", "report.html")]


def test_equal_runs_have_equal_hashes_and_other_runs_others(go: Callable[..., Result]) -> None:
    first, second, other = go(), go("checkpoint.memory=disk", "checkpoint.every=0", "eval.every=5"), go("seed=1")
    for key in ("params_sha256", "state_sha256", "partition_sha256"):
        assert first.summary[key] == second.summary[key] != other.summary[key]
    assert first.run_dir != second.run_dir


@pytest.mark.parametrize("model", ["logreg", "norm"])
def test_a_model_file_is_a_warm_start(go: Callable[..., Result], model: str) -> None:
    choice = ["model._target_=tests.helpers.Normed"] if model == "norm" else []
    result = go("rounds=2", *choice)
    path = result.run_dir / "model.safetensors"
    cold, warm = (build(compose([*SMALL, *choice, *more])).program.network for more in ([], [f"model.weights={path}"]))
    assert torch.equal(warm.initial, result.params) and not torch.equal(cold.initial, result.params)
    assert warm.buffer_layout.d == (128 if model == "norm" else 0)
    if model == "norm":
        saved = load_file(path)
        trained = torch.cat([saved[name].flatten() for name in warm.buffer_layout.names])
        assert torch.equal(warm.initial_buffers, trained) and not torch.equal(cold.initial_buffers, trained)


def test_time_goes_on_after_a_resume(go: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    first = go()
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + 1000)  # another process has another clock
    second = simulate([f"resume={first.run_dir}", "rounds=9"])
    times = [r["wall_seconds"] for r in second.metrics]
    assert len(times) == 9 and times == sorted(times) and times[-1] < 100
    assert times[6] >= times[5]
    assert second.summary["totals"]["wall_seconds"] >= times[-1]
    assert second.summary["totals"]["steps"] == 9 * 3 * 2


def test_the_log_says_when_a_run_began_and_ended(go: Callable[..., Result]) -> None:
    result = go("rounds=2")
    simulate([f"resume={result.run_dir}", "rounds=3"])
    lines = (result.run_dir / "log.txt").read_text().splitlines()
    assert [line.split(" INFO ")[1] for line in lines] == [
        "started",
        "finished after round 2",
        "resumed after round 2",
        "finished after round 3",
    ]


def test_a_failure_is_logged_with_its_traceback_and_leaves_its_rounds(
    go: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train = Federation.train

    def failing(self: Federation, *args: Any, **options: Any) -> Any:
        if self.round_num == 4:
            raise ClientError("round 4, client 1: no luck")
        return train(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Federation, "train", failing)
        with pytest.raises(ClientError, match="no luck"):
            go()
    (run,) = (tmp_path / "fedavg-digits").iterdir()
    text = (run / "log.txt").read_text()
    assert "ERROR stopped: round 4, client 1: no luck" in text and "Traceback" in text
    assert len(read_metrics(run)) == 3 and not (run / "summary.json").exists()
    assert simulate([f"resume={run}"]).summary["state_sha256"] == go().summary["state_sha256"]


def test_a_picture_that_fails_costs_no_results(go: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(curves, "plot_curves", broken)
    result = go("rounds=2")
    assert read_summary(result.run_dir)["rounds"] == 2
    assert "no fonts" in (result.run_dir / "log.txt").read_text()


def test_metrics_of_the_method_are_recorded(go: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Federation.sample

    def noting(self: Federation) -> list[int]:
        self.log["cohort_sum"] = sum(sample(self))
        self._calls.clear()
        return sample(self)

    monkeypatch.setattr(Federation, "sample", noting)
    result = go("rounds=2")
    lines = (result.run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["cohort_sum"] for line in lines] == [r["cohort_sum"] for r in result.metrics]
    assert all(r["cohort_sum"] > 0 for r in result.metrics)


def test_checkpoints_are_written_when_asked_for(go: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save = Checkpoints.save

    def noting(self: Checkpoints, round_num: int, content: Any) -> Path:
        saved.append(round_num)
        return save(self, round_num, content)

    monkeypatch.setattr(Checkpoints, "save", noting)
    for every, rounds in {0: [0, 6], 4: [0, 4, 6], 1: [0, 1, 2, 3, 4, 5, 6]}.items():
        go(f"checkpoint.every={every}", "checkpoint.seconds=0")
        assert saved == rounds
        saved.clear()
    go("checkpoint.seconds=100")
    assert saved == [0, 6]
