"""Evaluation after fine-tuning, against plain PyTorch; it changes nothing else."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedsim.errors import ClientError, ConfigError
from fedsim.experiment import Experiment, build
from fedsim.run import Driver
from tests.helpers import SEEN, Run, batches, configure, drive, examples_of, module_of

EPOCHS = 3


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Driver, "_draw", lambda *_: None)


def values(**more: Any) -> dict[str, Any]:
    return {"rounds": 2, "eval.finetune_epochs": EPOCHS, "client.momentum": 0.0, "partition.num_clients": 5, **more}


def rows(run: Run) -> list[dict[str, str]]:
    with (run.result.run_dir / "clients.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def descend(exp: Experiment, module: nn.Module, client: int, lr: float) -> nn.Module:
    """Plain gradient descent on a client's own data, in the order of the stream of fine-tuning."""
    x, y = examples_of(exp, client)
    order = batches(0, client, len(y), 64, stream="finetune")
    optimizer = torch.optim.SGD(module.train().parameters(), lr=lr)
    for _ in range(EPOCHS * -(-len(y) // 64)):
        index = next(order)
        optimizer.zero_grad()
        F.cross_entropy(module(x[index]), y[index]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return module.eval()


def held_out(exp: Experiment, client: int) -> tuple[torch.Tensor, torch.Tensor]:
    shard, data = exp.program.shard(client, "heldout"), exp.program.dataset
    x = shard.x[shard.rows].float() * (1 / (255 * data.std[0])) + (-data.mean[0] / data.std[0])
    return x, shard.y[shard.rows]


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "scaffold"])
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_fine_tuning_is_plain_training_from_the_global_model(tmp_path: Path, strategy: str, decay: float) -> None:
    # FedProx's pull and SCAFFOLD's control variates stay out of it, and the learning rate is that of the round.
    more = {"strategy.mu": 10.0} if strategy == "fedprox" else {}
    config = configure([f"strategy={strategy}"], values(**{"client.lr_decay": decay, **more}))
    run, exp = drive(config, tmp_path), build(config)
    accuracies = []
    for row in rows(run):
        client = int(row["client"])
        x, y = held_out(exp, client)
        out = descend(exp, module_of(exp, run.w), client, 0.05 * decay)(x).detach()
        assert float(row["finetuned_loss"]) == pytest.approx(float(F.cross_entropy(out, y)), rel=1e-4)
        accuracies.append(float((out.argmax(1) == y).double().mean()))
        assert float(row["finetuned_accuracy"]) == pytest.approx(accuracies[-1])
        assert float(row["finetuned_loss"]) != pytest.approx(float(row["loss"]), rel=1e-2)
    final = run.result.summary["final"]
    assert final["finetuned_accuracy_mean"] == pytest.approx(np.mean(accuracies))
    assert final["finetuned_accuracy_std"] == pytest.approx(np.std(accuracies))
    assert final["finetuned_accuracy_worst10"] == pytest.approx(min(accuracies))
    assert run.records[-1]["finetuned_accuracy_mean"] == final["finetuned_accuracy_mean"]


NORMED = {"model": {"_target_": "tests.helpers.Normed", "weights": None}}
KINDS: list[dict[str, Any]] = [
    {"strategy": {"_target_": "fedsim.strategies.scaffold.Scaffold"}},
    {"client.keep_optimizer": True, "client.momentum": 0.9},
    {**NORMED, "client.buffers": "mean"},
    {**NORMED, "client.buffers": "local"},
    {**NORMED, "client.buffers": "frozen"},
    {"strategy": {"_target_": "tests.helpers.FedRep"}},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nothing_of_fine_tuning_is_kept(tmp_path: Path, kind: dict[str, Any]) -> None:
    runs = [
        drive(configure(values=values(**kind, **{"eval.finetune_epochs": n})), tmp_path / str(n)) for n in (0, EPOCHS)
    ]
    assert runs[0].state_sha256 == runs[1].state_sha256
    assert runs[0].params_sha256 == runs[1].params_sha256
    added = runs[1].result.summary["final"].keys() - runs[0].result.summary["final"].keys()
    assert added == {f"finetuned_accuracy_{k}" for k in ("mean", "weighted", "std", "worst10")}
    for plain, tuned in zip(rows(runs[0]), rows(runs[1]), strict=True):
        assert plain == {k: v for k, v in tuned.items() if not k.startswith("finetuned_")}


def test_batch_norm_is_fine_tuned_with_its_statistics(tmp_path: Path) -> None:
    config = configure(values=values(**NORMED, **{"client.buffers": "mean"}))
    run, exp = drive(config, tmp_path), build(config)
    assert run.driver.fed.buffers is not None
    buffers = exp.program.network.buffer_layout.views(run.driver.fed.buffers)
    for row in rows(run)[:2]:
        client = int(row["client"])
        x, y = held_out(exp, client)
        module = module_of(exp, run.w).train()
        with torch.no_grad():
            for name, b in module.named_buffers():
                if name in buffers:
                    b.copy_(buffers[name])
        expected = float(F.cross_entropy(descend(exp, module, client, 0.05)(x).detach(), y))
        assert float(row["finetuned_loss"]) == pytest.approx(expected, rel=1e-4)


def test_fine_tuning_starts_where_a_visit_would_start(tmp_path: Path) -> None:
    # FedRep: from the client's own head; plain training then moves all of the network.
    kind = {"strategy": {"_target_": "tests.helpers.FedRep"}}
    config = configure(values=values(**kind, participation={"_target_": "fedsim.clients.participation.All"}))
    run, exp = drive(config, tmp_path), build(config)
    head = exp.program.layout.mask("head.")
    for row in rows(run)[:2]:
        client = int(row["client"])
        (memory,) = run.memory.get((client,))
        w = run.w.clone()
        w[head] = memory["strategy.private"].to(w)
        x, y = held_out(exp, client)
        expected = F.cross_entropy(descend(exp, module_of(exp, w), client, 0.05)(x).detach(), y)
        assert float(row["finetuned_loss"]) == pytest.approx(float(expected), rel=1e-4)


def test_fine_tuning_has_the_clients_own_statistics(tmp_path: Path) -> None:
    everybody = {"participation": {"_target_": "fedsim.clients.participation.All"}}
    config = configure(values=values(**NORMED, **everybody, **{"client.buffers": "local"}))
    run, exp = drive(config, tmp_path), build(config)
    for row in rows(run)[:2]:
        client = int(row["client"])
        (memory,) = run.memory.get((client,))
        own = exp.program.network.buffer_layout.views(memory["buffers.local"])
        module = module_of(exp, run.w)
        with torch.no_grad():
            for name, b in module.named_buffers():
                if name in own:
                    b.copy_(own[name])
        x, y = held_out(exp, client)
        expected = F.cross_entropy(descend(exp, module, client, 0.05)(x).detach(), y)
        assert float(row["finetuned_loss"]) == pytest.approx(float(expected), rel=1e-4)


def test_a_network_that_only_its_method_can_train_is_fine_tuned_on_the_methods_loss(tmp_path: Path) -> None:
    SEEN.clear()
    run = drive(configure(values=values(strategy={"_target_": "tests.helpers.Heads"})), tmp_path)
    assert {mode for mode, _ in SEEN} == {"global", "personal", "finetuned"}
    assert all(float(r["finetuned_loss"]) < float(r["personal_loss"]) for r in rows(run))


def test_a_failure_says_that_it_was_fine_tuning(tmp_path: Path) -> None:
    # The loss of a visit's only step is that of the first model; fine-tuning takes more steps.
    config = configure(values=values(**{"client.lr": 1e30, "eval.finetune_epochs": 5, "rounds": 1}))
    config["client"]["epochs"], config["client"]["steps"] = None, 1
    with pytest.raises(ClientError, match=r"round 1, client \d+: fine-tuning failed: the training loss became"):
        drive(config, tmp_path)


@pytest.mark.parametrize("given", [-1, 1.5, "all", None])
def test_epochs_are_a_whole_number(given: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval.finetune_epochs must be a whole number, at least 0"):
        build(configure(values=values(**{"eval.finetune_epochs": given})))


# --- per class --------------------------------------------------------------------------------------------


def table(path: Path) -> dict[str, Sequence[str]]:
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    return {key: [r[key] for r in found] for key in found[0]}


def test_classes_csv_can_be_computed_by_hand(tmp_path: Path) -> None:
    config = configure(values={"rounds": 1, "partition.num_clients": 5})
    run, exp = drive(config, tmp_path), build(config)
    found, test = table(run.result.run_dir / "classes.csv"), exp.program.dataset.test
    x = test.x.float() * (1 / (255 * exp.program.dataset.std[0]))
    x += -exp.program.dataset.mean[0] / exp.program.dataset.std[0]
    predicted, labels = module_of(exp, run.w).eval()(x).argmax(1), test.y
    train = torch.cat([examples_of(exp, c)[1] for c in range(5)])
    assert found["class"] == [str(k) for k in range(10)] and list(found["name"]) == list(
        exp.program.dataset.class_names
    )
    for k in range(10):
        of, as_k = labels == k, predicted == k
        hits = int((of & as_k).sum())
        assert int(found["num_test"][k]) == int(of.sum()) and int(found["num_train"][k]) == int((train == k).sum())
        assert float(found["accuracy"][k]) == pytest.approx(hits / int(of.sum()))
        expected = {"precision": (hits, int(as_k.sum())), "f1": (2 * hits, int(of.sum()) + int(as_k.sum()))}
        for key, (up, down) in expected.items():
            assert float(found[key][k]) == pytest.approx(up / down if down else float("nan"), nan_ok=True)
    assert run.result.summary["final"]["class_accuracy"] == pytest.approx([float(v) for v in found["accuracy"]])
    assert not {"class_f1", "class_count", "class_precision"} & run.result.summary["final"].keys()
