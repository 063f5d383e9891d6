"""Baselines of personalised runs: local training, fine-tuning, private parts, personal models, a fixed classifier."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim import random
from fedsim.clients.participation import Fixed
from fedsim.errors import ClientError, ConfigError
from fedsim.evaluation import metrics
from fedsim.experiment import Experiment, Shared, build, rebuild
from fedsim.program import Bound
from fedsim.reduce import tensors_in
from fedsim.strategies.fedetf import etf
from tests.helpers import Run, batches, configure, drive, quadratics

ALL = {"_target_": "fedsim.clients.participation.All"}
SOME = {"_target_": "fedsim.clients.participation.Fixed", "clients_per_round": 3}
GROUP_NORM = {"_target_": "fedsim.models.resnet.ResNet", "width": 2, "groups": 1, "weights": None}
BATCH_NORM = {"_target_": "tests.helpers.Normed", "weights": None}

# Six clients that disagree, in two coordinates.
A = torch.stack([torch.linspace(0.5, 3.0, 6), torch.linspace(2.0, 0.25, 6)], 1).double()
C = torch.stack([torch.linspace(-3, 4, 6), torch.linspace(5, -2, 6).roll(2)], 1).double()
START = torch.tensor([4.0, -3.0]).double()
STEPS, LR = 3, 0.05
Q = (1 - LR * A) ** STEPS  # K steps take client i from x to c_i + q_i (x - c_i)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parabolas(strategy: str, tmp_path: Path, **values: Any) -> Run:
    """A run on the six parabolas, three of them per round; dots in keys are written as double underscores."""
    options = {"participation": SOME, "rounds": 3, "client__steps": STEPS, "client__lr": LR, **values}
    config = configure((f"strategy={strategy}",), quadratics(A.tolist(), C.tolist(), START.tolist(), **options))
    return drive(config, tmp_path)


def cohorts(rounds: int) -> list[list[int]]:
    """Who takes part in the rounds of `parabolas`."""
    return [Fixed(3).sample(6, random.numpy_generator(0, "participation", r, 0)) for r in range(1, rounds + 1)]


def digits(strategy: str, tmp_path: Path, values: dict[str, Any] | None = None) -> Run:
    return drive(configure((f"strategy={strategy}",), {"eval.clients": "all", **(values or {})}), tmp_path)


def half_squares(v: Tensor) -> Tensor:
    """The loss of each client's own v, ``[6, 2]``: a / 2 (v - c)^2, summed over coordinates."""
    return (A / 2 * (v - C).square()).sum(1)


# --- local ------------------------------------------------------------------------------------------------


def test_local_training_goes_on_from_visit_to_visit_and_moves_nothing_else(tmp_path: Path) -> None:
    done = parabolas("local", tmp_path, eval__clients="all")
    visits = torch.zeros(6, 1)
    for cohort in cohorts(3):
        visits[cohort] += 1
    assert 0.0 in visits and 2.0 in visits  # who never took part, and who did so again
    v = C + Q**visits * (START - C)
    touched = visits[:, 0] > 0
    torch.testing.assert_close(done.rows("strategy.w"), v[touched], rtol=1e-13, atol=1e-13)
    assert done.records[-1]["personal_loss_mean"] == pytest.approx(float(half_squares(v).mean()), rel=1e-12)
    assert torch.equal(done.w, START)


def test_local_training_sends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[Any] = []
    original = Bound.finish

    def finish(self: Bound, w: Tensor) -> Any:
        uploads.append(original(self, w))
        return uploads[-1]

    monkeypatch.setattr(Bound, "finish", finish)
    totals = digits("local", tmp_path).driver.progress.totals
    assert uploads == [{}] * 9
    assert (totals["bytes_up"], totals["bytes_down"]) == (0, 0)


def test_local_training_is_plain_pytorch_on_the_stream_of_the_rounds(tmp_path: Path) -> None:
    values = {"precision": "float64", "participation": ALL, "rounds": 2, "client.lr": 0.02, "client.momentum": 0.0}
    config = configure(("strategy=local",), values)
    exp, rows = build(config), drive(config, tmp_path).rows("strategy.w")
    for client in (0, 5):
        module, (x, y) = network(exp), examples(exp, client)
        stream = batches(0, client, len(x), 64)
        for _ in range(2 * -(-len(x) // 64)):
            descend(module, F.cross_entropy, x, y, next(stream), 0.02)
        torch.testing.assert_close(rows[client], vector(exp, module), rtol=0, atol=1e-12)


# --- plain PyTorch ----------------------------------------------------------------------------------------


def network(exp: Experiment) -> nn.Module:
    """The initial network as an ordinary module with parameters of its own."""
    return copy.deepcopy(exp.program.fresh_module()).train()


def vector(exp: Experiment, module: nn.Module) -> Tensor:
    named = dict(module.named_parameters())
    return torch.cat([named[n].detach().reshape(-1) for n in exp.program.layout.names])


def examples(exp: Experiment, client: int, part: str = "train") -> tuple[Tensor, Tensor]:
    """A client's inputs, float64, and labels."""
    shard, data = exp.program.shard(client, part), exp.program.dataset
    return (shard.x[shard.rows].double() / 255 - data.mean[0]) / data.std[0], shard.y[shard.rows]


def descend(
    module: nn.Module, loss: Any, x: Tensor, y: Tensor, rows: Tensor, lr: float, only: tuple[str, ...] = ("",)
) -> None:
    """A step of gradient descent on the parameters whose names begin so."""
    module.zero_grad()
    loss(module(x[rows]), y[rows]).backward()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.grad is not None and name.startswith(only):
                p.sub_(lr * p.grad)


# --- fedavg_ft --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [0, 1, 4])
def test_fine_tuned_models_are_scored_and_forgotten(epochs: int, tmp_path: Path) -> None:
    # An epoch is one step: t = c + (1 - lr a)^E (w - c).
    fedavg = parabolas("fedavg", tmp_path)
    done = parabolas("fedavg_ft", tmp_path, eval__clients="all", strategy__finetune_epochs=epochs)
    tuned = C + (1 - LR * A) ** epochs * (fedavg.w - C)
    assert done.records[-1]["personal_loss_mean"] == pytest.approx(float(half_squares(tuned).mean()), rel=1e-12)
    assert done.state_sha256 == fedavg.state_sha256  # server, memory, streams
    assert (done.params_sha256 == fedavg.params_sha256) == (epochs == 0)


def test_fine_tuning_is_that_of_the_evaluation(tmp_path: Path) -> None:
    record = digits("fedavg_ft", tmp_path, {"strategy.finetune_epochs": 2, "eval.finetune_epochs": 2}).records[-1]
    tuned = {key.removeprefix("finetuned_"): v for key, v in record.items() if key.startswith("finetuned_")}
    assert {key: record[f"personal_{key}"] for key in tuned} == tuned
    assert record["personal_accuracy_mean"] > record["client_accuracy_mean"]


def test_hashing_fine_tuned_models_leaves_batch_norm_statistics_alone(tmp_path: Path) -> None:
    done = digits("fedavg_ft", tmp_path, {"model": BATCH_NORM, "client.buffers": "local", "client.drop_last": True})
    program = done.driver.exp.program
    program.fresh_module()  # as a Ray driver does: its network is now bound to the initial statistics
    before = program.network.initial_buffers.clone()
    assert done.driver.params_sha256() == done.params_sha256
    assert torch.equal(program.network.initial_buffers, before)
    assert done.driver.state_sha256() == done.state_sha256


# --- private parts ----------------------------------------------------------------------------------------

PRIVATE: dict[str, dict[str, Any]] = {
    "fedper": {},
    "fedrep": {"strategy.head_epochs": 2},
    "fedbn": {"model": GROUP_NORM, "client.batching": "off"},
}


def is_private(method: str, module: nn.Module) -> set[str]:
    """Names of a client's own parameters: the head, or everything in a norm."""
    if method != "fedbn":
        return {n for n, _ in module.named_parameters() if n.startswith("head.")}
    return {
        f"{name}.{key}"
        for name, layer in module.named_modules()
        if isinstance(layer, nn.GroupNorm)
        for key in ("weight", "bias")
    }


@pytest.mark.parametrize("method", PRIVATE)
def test_private_parts_are_those_of_a_plain_pytorch_federation(method: str, tmp_path: Path) -> None:
    # Three clients, two rounds; every client overwrites what is shared, and goes on with what is its own.
    values = {"partition.num_clients": 3, "participation": ALL, "rounds": 2, "precision": "float64"}
    steps = {"client.epochs": None, "client.steps": 3, "client.momentum": 0.0, "client.batch_size": 128}
    config = configure((f"strategy={method}",), {**PRIVATE[method], **values, **steps})
    exp = build(config)
    server, clients = network(exp), [network(exp) for _ in range(3)]
    own, n = is_private(method, server), [len(exp.program.shard(c)) for c in range(3)]
    streams = {(c, s): batches(0, c, n[c], 128, s) for c in range(3) for s in ("head", "train")}
    for _ in range(2):
        total = {name: torch.zeros_like(p) for name, p in server.named_parameters()}
        for c, module in enumerate(clients):
            x, y = examples(exp, c)
            with torch.no_grad():
                for name, p in module.named_parameters():
                    if name not in own:
                        p.copy_(dict(server.named_parameters())[name])
            work = [("train", ("",), 3)]
            if method == "fedrep":
                work = [("head", ("head.",), 2 * -(-n[c] // 128)), ("train", ("features.",), 3)]
            for stream, only, count in work:
                for _ in range(count):
                    descend(module, F.cross_entropy, x, y, next(streams[c, stream]), 0.05, only)
            for name, p in module.named_parameters():
                total[name] += n[c] / sum(n) * p.detach()
        with torch.no_grad():
            for name, p in server.named_parameters():
                if name not in own:
                    p.copy_(total[name])
    done = drive(config, tmp_path)
    torch.testing.assert_close(done.w, vector(exp, server), rtol=0, atol=1e-10)
    rows = done.rows("strategy.private")
    for row, module in zip(rows, clients, strict=True):
        expected = torch.cat([p.detach().reshape(-1) for name, p in module.named_parameters() if name in own])
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-10)
    assert not torch.allclose(rows[0], rows[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", PRIVATE)
def test_private_parts_are_never_sent(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[Tensor] = []
    original = Bound.finish

    def finish(self: Bound, w: Tensor) -> Any:
        entries = original(self, w)
        uploads.extend(t for entry in entries.values() for t in tensors_in(entry.value))
        return entries

    monkeypatch.setattr(Bound, "finish", finish)
    done = digits(method, tmp_path, {**PRIVATE[method], "client.epochs": None, "client.steps": 2})
    program = done.driver.exp.program
    own = is_private(method, program.fresh_module())
    mask = torch.cat([torch.full((p.numel(),), n in own) for n, p in program.fresh_module().named_parameters()])
    assert [u.shape for u in uploads] == [(1, len(mask))] * 9  # nothing but a vector of each visit
    assert all(not bool(u[0, mask].any()) and bool(u[0, ~mask].any()) for u in uploads)
    assert torch.equal(done.w[mask], program.network.initial[mask])  # and the server knows no other
    totals, shared = done.driver.progress.totals, 4 * int((~mask).sum())
    assert totals["bytes_up"] == totals["bytes_down"] == 9 * shared


def test_fedbn_is_fedper_with_private_norms(tmp_path: Path) -> None:
    values = {"model": BATCH_NORM, "client.buffers": "local", "client.drop_last": True}
    fedbn = digits("fedbn", tmp_path, values)
    fedper = digits("fedper", tmp_path, {**values, "strategy.private": "norm."})
    assert fedbn.state_sha256 == fedper.state_sha256
    assert fedbn.rows("strategy.private").shape[1] == 2 * 64


def test_fedbn_keeps_each_client_s_statistics(tmp_path: Path) -> None:
    # The norm sees the inputs, full batches: after K steps the running mean is (1 - 0.9^K) of the client's own mean.
    values: dict[str, Any] = {"model": BATCH_NORM, "client.buffers": "local", "client.batch_size": None}
    values |= {"client.epochs": 2, "client.lr": 0.01, "participation": ALL, "rounds": 3, "precision": "float64"}
    done = digits("fedbn", tmp_path, values)
    rows, exp = done.rows("buffers.local"), done.driver.exp
    for client, row in enumerate(rows):
        x, _ = examples(exp, client)
        found = exp.program.network.buffer_layout.views(row)["norm.running_mean"]
        torch.testing.assert_close(found, (1 - 0.9**6) * x.flatten(1).mean(0), rtol=0, atol=1e-12)
    shared = done.driver.fed.buffers
    assert shared is not None and torch.equal(shared, exp.program.network.initial_buffers)


@pytest.mark.parametrize("method", ["local", "fedper", "fedrep", "fedbn", "ditto"])
def test_clients_that_never_took_part_are_scored_with_what_they_would_start_from(method: str, tmp_path: Path) -> None:
    values = {"rounds": 1, "participation": SOME, **PRIVATE.get(method, {})}
    done = digits(method, tmp_path, values)
    fed, touched = done.driver.fed, done.memory.clients()
    scores = {mode: fed.evaluate_clients(done.state, range(7), mode) for mode in ("global", "personal")}
    losses = {mode: [metrics(score)["loss"] for score in found] for mode, found in scores.items()}
    # Their own model is the global one: of `local` the initial model, of private parts those of the initial model.
    assert len(touched) == 3
    assert [c for c in range(7) if losses["global"][c] != losses["personal"][c]] == touched
    mean = sum(metrics(score)["accuracy"] for score in scores["personal"]) / 7
    assert done.records[-1]["personal_accuracy_mean"] == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize(
    ("method", "options", "epochs", "steps"),
    [
        ("fedrep", {"strategy.head_epochs": 3}, 4, 0),
        ("fedrep", {"client.epochs": None, "client.steps": 5}, 1, 5),
        ("ditto", {"strategy.personal_epochs": 3}, 4, 0),
        ("ditto", {"client.epochs": None, "client.steps": 5}, 0, 10),
    ],
)
def test_all_steps_of_a_visit_are_planned(
    method: str, options: dict[str, Any], epochs: int, steps: int, tmp_path: Path
) -> None:
    done = digits(method, tmp_path, {**options, "participation": ALL, "rounds": 1})
    program, made = done.driver.exp.program, {v.client: v.steps for v in done.driver.fed.done.visits}
    for client in range(7):
        n = len(program.shard(client))
        expected = epochs * -(-n // 64) + steps
        assert program.strategy.planned_steps(program.options, n) == made[client] == expected


# --- ditto ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"lam": 0.0}, {"lam": 0.1}, {"lam": 3.0, "personal_epochs": 3}])
def test_ditto_leaves_the_bits_of_fedavg_alone(options: dict[str, Any], tmp_path: Path) -> None:
    values = {"client.keep_optimizer": True, "rounds": 4}
    fedavg = digits("fedavg", tmp_path, values)
    ditto = digits("ditto", tmp_path, {**values, **{f"strategy.{k}": v for k, v in options.items()}})
    assert torch.equal(ditto.w, fedavg.w)
    for name in ("stream.train", "stream.train.opt.momentum"):
        assert torch.equal(ditto.rows(name), fedavg.rows(name))
    assert ditto.driver.progress.totals["bytes_up"] == fedavg.driver.progress.totals["bytes_up"]


@pytest.mark.parametrize(("lam", "epochs"), [(0.0, 2), (0.7, None), (4.0, 5)])
def test_ditto_s_personal_models_match_their_closed_form(lam: float, epochs: int | None, tmp_path: Path) -> None:
    # v_K = s + (1 - lr (a + lam))^K (v_0 - s), s = (a c + lam w_t) / (a + lam), with w_t the received model; v_0 is
    # what the client first received, then its last v.
    done = parabolas(
        "ditto", tmp_path, strategy__lam=lam, strategy__personal_epochs=epochs, rounds=4, eval__clients="all"
    )
    w, v = START, dict[int, Tensor]()
    for cohort in cohorts(4):
        for i in cohort:
            s = (A[i] * C[i] + lam * w) / (A[i] + lam)
            v[i] = s + (1 - LR * (A[i] + lam)) ** (epochs or STEPS) * (v.get(i, w) - s)
        w = (C[cohort] + Q[cohort] * (w - C[cohort])).mean(0)
    torch.testing.assert_close(done.rows("strategy.v"), torch.stack([v[i] for i in sorted(v)]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(done.w, w, rtol=1e-13, atol=1e-13)
    losses = half_squares(torch.stack([v.get(i, w) for i in range(6)]))
    assert done.records[-1]["personal_loss_mean"] == pytest.approx(float(losses.mean()), rel=1e-12)


# --- fedetf -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "dim"), [(2, 1), (3, 2), (10, 9), (10, 10), (10, 64), (100, 512)])
def test_an_etf_has_its_geometry(classes: int, dim: int) -> None:
    M = etf(classes, dim, torch.Generator().manual_seed(3))
    assert M.shape == (dim, classes)
    scale, one = classes / (classes - 1), torch.ones(classes, 1, dtype=torch.float64)
    gram = scale * (torch.eye(classes, dtype=torch.float64) - one @ one.T / classes)
    torch.testing.assert_close(M.T @ M, gram, rtol=0, atol=1e-12)
    torch.testing.assert_close(M.sum(1), torch.zeros(dim, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(M @ (M.T @ M), scale * M, rtol=0, atol=1e-12)
    if dim > 1:  # there are only two on a line
        assert not torch.allclose(M, etf(classes, dim, torch.Generator().manual_seed(4)), atol=1e-3)


@pytest.mark.parametrize(("gamma", "dim"), [(0.0, 9), (0.01, None), (1.0, 24)])
def test_fedetf_is_a_plain_pytorch_federation(gamma: float, dim: int | None, tmp_path: Path) -> None:
    # The balanced loss as a quotient, -log(n_y^gamma e^z_y / sum_c n_c^gamma e^z_c), of clients that lack classes.
    values = {"partition.num_clients": 3, "partition.alpha": 0.1, "participation": ALL, "rounds": 2}
    values |= {"precision": "float64", "client.epochs": None, "client.steps": 6, "client.momentum": 0.0}
    own = {"strategy.gamma": gamma, "strategy.dim": dim, "strategy.temperature": 2.5, "client.lr": 0.2}
    config = configure(("strategy=fedetf",), {**values, **own})
    exp = build(config)
    V = exp.program.fresh_module().get_parameter("frame").detach()
    torch.testing.assert_close(V.T @ V, (10 * torch.eye(10) - 1).double() / 9, rtol=0, atol=1e-12)
    assert len(V) == (dim or 10)
    names = exp.program.layout.names
    assert [n for n in names if not n.startswith("features.")] == ["beta", "projection.weight"]
    w, lacking = exp.program.network.initial.clone(), 0
    data = [examples(exp, c) for c in range(3)]
    streams = [batches(0, c, len(data[c][1]), 64) for c in range(3)]

    def logits(at: dict[str, Tensor], x: Tensor) -> Tensor:
        h = x.flatten(1)
        for i in (1, 3):
            h = (h @ at[f"features.{i}.weight"].T + at[f"features.{i}.bias"]).relu()
        p = h @ at["projection.weight"].T
        return at["beta"] * (p / p.square().sum(1, keepdim=True).sqrt()) @ V

    for _ in range(2):
        locals_ = []
        for (x, y), stream in zip(data, streams, strict=True):
            counts, v = torch.bincount(y, minlength=10).double(), w.clone()
            lacking += int((counts == 0).sum())
            for _ in range(6):
                rows = next(stream)
                v.requires_grad_()
                weighed = counts**gamma * logits(exp.program.layout.views(v), x[rows]).exp()
                chosen = weighed[torch.arange(len(rows)), y[rows]] / weighed.sum(1)
                (g,) = torch.autograd.grad(-chosen.log().mean(), v)
                v = (v - 0.2 * g).detach()
            locals_.append(len(y) * v)
        w = torch.stack(locals_).sum(0) / sum(len(y) for _, y in data)
    assert lacking > 0
    done = drive(config, tmp_path)
    torch.testing.assert_close(done.w, w, rtol=0, atol=1e-11)
    # Predictions know nothing of anybody's class counts.
    test = exp.program.dataset.test
    x = (test.x.double() / 255 - exp.program.dataset.mean[0]) / exp.program.dataset.std[0]
    expected = F.cross_entropy(logits(exp.program.layout.views(w), x), test.y)
    assert done.records[-1]["test_loss"] == pytest.approx(float(expected), rel=1e-10)


def test_fedetf_s_classifier_is_no_parameter_and_the_same_everywhere(tmp_path: Path) -> None:
    done = digits("fedetf", tmp_path)
    exp = done.driver.exp
    frame = exp.program.fresh_module().get_parameter("frame")
    assert not frame.requires_grad and frame.dtype == torch.float32
    remote = rebuild(exp.config, Shared.of(exp.program))
    again, other = (build(configure(("strategy=fedetf",), {"seed": seed})).program for seed in (0, 1))
    for program, same in ((exp.program, True), (remote, True), (again, True), (other, False)):
        assert torch.equal(program.network.module.get_parameter("frame"), frame) == same
    size = exp.program.layout.d
    assert size == 64 * 12 + 12 + 12 * 8 + 8 + 8 * 10 + 1  # no head, no bias, no frame
    assert done.driver.progress.totals["bytes_up"] == 9 * 4 * size


# --- refusals ---------------------------------------------------------------------------------------------

HEADLESS = {"_target_": "tests.helpers.Dropped", "weights": None}


@pytest.mark.parametrize(
    ("strategy", "values", "message"),
    [
        ("fedper", {"model": HEADLESS}, r"fedper needs a model that computes head\(features\(x\)\)"),
        ("fedrep", {"model": HEADLESS}, r"fedrep needs a model that computes head\(features\(x\)\)"),
        ("fedetf", {"model": HEADLESS}, r"fedetf needs a model that computes head\(features\(x\)\)"),
        ("fedper", {"strategy.private": "tail."}, "no parameter fits 'tail.'"),
        ("fedrep", {"model": {"_target_": "fedsim.models.standard.LogReg"}}, "fedrep needs features with weights"),
        ("fedrep", {"strategy.head_epochs": 0}, "strategy.head_epochs must be >= 1, got 0"),
        ("fedavg_ft", {"strategy.finetune_epochs": -1}, "strategy.finetune_epochs must be >= 0, got -1"),
        ("ditto", {"strategy.lam": -0.1}, "strategy.lam must be >= 0, got -0.1"),
        ("ditto", {"strategy.personal_epochs": 0}, "strategy.personal_epochs must be >= 1"),
        ("ditto", {"model": BATCH_NORM}, "ditto trains two models in a visit, and client.buffers=mean keeps"),
        ("local", {"model": BATCH_NORM}, "strategy=local shares nothing, and client.buffers=mean"),
        ("fedbn", {}, "MLP has none: choose a model with norms"),
        ("fedbn", {"model": BATCH_NORM}, "got client.buffers=mean: set client.buffers=local"),
        ("fedetf", {"strategy.dim": 8}, "strategy.dim must be at least 9, for a simplex of 10 classes, got 8"),
        ("fedetf", {"strategy.temperature": 0.0}, "strategy.temperature must be > 0"),
        ("fedetf", {"strategy.gamma": -1.0}, "strategy.gamma must be >= 0"),
    ],
)
def test_what_cannot_work_is_refused(strategy: str, values: dict[str, Any], message: str) -> None:
    if "model" in values:
        values = {**values, "model": {"weights": None, **values["model"]}}
    with pytest.raises(ConfigError, match=message) as raised:
        build(configure((f"strategy={strategy}",), values))
    assert "\n" not in str(raised.value)


def test_an_etf_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="a simplex of 10 classes needs at least 9 dimensions"):
        etf(10, 8, torch.Generator())
    with pytest.raises(ConfigError, match="at least 2 of them, got 1"):
        etf(1, 8, torch.Generator())


# --- what must not pass in silence ------------------------------------------------------------------------


def test_a_model_that_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    # The only step overflows: no loss and no upload would show it.
    values = {"client.epochs": None, "client.steps": 1, "client.lr": 3e38, "client.weight_decay": 10.0}
    with pytest.raises(ClientError, match=r"memory\.w is not finite; lower client\.lr"):
        digits("local", tmp_path, values)
    with pytest.raises(ClientError, match=r"memory\.private is not finite"):
        digits("fedper", tmp_path, {**values, "strategy.private": "features."})


def test_fedper_shares_something() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.private=\* leaves nothing of the model to be shared"):
        build(configure(("strategy=fedper",), {"strategy.private": "*"}))
    with pytest.raises(ConfigError, match="leaves nothing of the model to be shared"):
        build(configure(("strategy=fedper", "model=logreg")))


def test_a_copy_of_the_network_leaves_a_visit_as_it_is() -> None:
    exp = build(configure(values={"model": BATCH_NORM}))
    program, network = exp.program, exp.program.network
    w, statistics = network.initial + 1, network.initial_buffers + 2
    network.bind_buffers(statistics)
    network.bind(w)
    first = network.initial_buffers.clone()
    copied = program.fresh_module()
    program.drawn("own", 3)
    examples = program.inputs(program.dataset.test.x[:4])
    network.train(True)
    network.module(examples)  # writes into the statistics that it is bound to
    assert torch.equal(network.initial_buffers, first)
    assert not torch.equal(statistics, first + 2)
    held = torch.cat([p.detach().flatten() for p in network.module.parameters()])
    assert torch.equal(held, w)
    assert torch.equal(torch.cat([p.detach().flatten() for p in copied.parameters()]), network.initial)
