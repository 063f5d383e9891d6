"""What a method may do: phases, private parts, per-client payloads, events, recipes inside strategies.

Each contract is shown by a small test-only strategy or recipe of `tests.helpers`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim import random, tree
from fedsim.config import Config
from fedsim.engine.inline import InlineEngine
from fedsim.errors import ClientError, ConfigError, RunError
from fedsim.evaluation import metrics
from fedsim.experiment import Experiment, build
from fedsim.federation import Federation
from fedsim.memory import Memory
from fedsim.program import Bound
from fedsim.strategy import SERVER, State
from tests import helpers
from tests.helpers import Interrupted, Run, batches, configure, drive, examples_of, flat, module_of, quadratics

ALL = {"_target_": "fedsim.clients.participation.All"}


@pytest.fixture(autouse=True)
def seen() -> Iterator[list[Any]]:
    """What the test-only halves noted."""
    helpers.SEEN.clear()
    yield helpers.SEEN
    helpers.SEEN.clear()


def configured(strategy: str, values: dict[str, Any] | None = None, **options: Any) -> Config:
    """A config with a strategy of `tests.helpers`, or with a real one in lower case."""
    if strategy.islower():
        own = {f"strategy.{k}": v for k, v in options.items()}
        return configure((f"strategy={strategy}",), {**own, **(values or {})})
    return configure((), {"strategy": {"_target_": f"tests.helpers.{strategy}", **options}, **(values or {})})


def recipe(**nodes: dict[str, Any]) -> dict[str, Any]:
    """Recipes of `tests.helpers`, ``name={"_": class, option: value}``."""
    found = {}
    for name, node in nodes.items():
        options = {k: v for k, v in node.items() if k != "_"}
        found[name] = {"_target_": f"tests.helpers.{node['_']}", **options}
    return {"recipe": found}


def federation(exp: Experiment, folder: Path) -> Federation:
    """A federation in round 1, driven by the test itself."""
    fed = Federation(exp.program, InlineEngine(exp.program), exp.participation, exp.system, Memory(folder))
    fed.begin_round(1)
    return fed


def sgd(exp: Experiment, client: int, w: Tensor, steps: int, stream: str = "train") -> Tensor:
    """Plain PyTorch's parameters after some steps of a client's stream."""
    module, (x, y) = module_of(exp, w), examples_of(exp, client)
    optimizer, rows_of = (
        torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9),
        batches(0, client, len(x), 64, stream),
    )
    for _ in range(steps):
        step(module, optimizer, x, y, next(rows_of))
    return flat(module)


def step(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, rows: Tensor) -> None:
    """One step of plain PyTorch."""
    optimizer.zero_grad()
    F.cross_entropy(module(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def heldout(exp: Experiment, client: int) -> tuple[Tensor, Tensor]:
    """A client's held-out inputs, normalised, and labels."""
    shard = exp.program.shard(client, "heldout")
    return normalised(shard.x[shard.rows]), shard.y[shard.rows]


def normalised(x: Tensor) -> Tensor:
    return x.float() * (1 / (255 * 0.3760)) - 0.3052 / 0.3760


# --- phases -----------------------------------------------------------------------------------------------


def test_a_phase_before_the_first_round_leaves_the_training_order_alone(tmp_path: Path) -> None:
    fedavg = drive(configured("fedavg"), tmp_path)
    explored = drive(configured("Exploring", explorers=3), tmp_path)
    assert torch.equal(explored.w, fedavg.w)
    assert drive(configured("Exploring", explorers=0), tmp_path).params_sha256 == fedavg.params_sha256


def test_a_phase_has_its_own_half_payload_and_stream(tmp_path: Path) -> None:
    config = configured("Exploring", {"rounds": 1}, explorers=7)
    exp, run = build(config), drive(config, tmp_path)
    w, n = exp.program.network.initial, exp.program.clients.sizes()
    squares = [
        (sgd(exp, c, w, 2 * -(-int(n[c]) // 64), stream="explore").double() - w.double()).square() for c in range(7)
    ]
    torch.testing.assert_close(run.state.G, torch.stack(squares).mean(0).float(), rtol=1e-3, atol=1e-7)
    assert float(run.state.G.max()) > 1e-3
    d, cohort = exp.program.layout.d, 3
    assert run.driver.progress.totals["bytes_down"] == 4 * d * (7 + cohort)
    assert run.driver.progress.totals["bytes_up"] == 4 * d * (7 + cohort)
    assert run.records[0]["bytes_up"] == 4 * d * cohort  # a phase before round 1 is in the totals only
    assert run.driver.progress.totals["bytes_before"] == 2 * 4 * d * 7


def test_a_phase_may_remember_without_training(tmp_path: Path) -> None:
    # Quadratics: v_i = a_i (w - c_i) in the anchor phase, and the server has their mean.
    a, c, w = [[1.0], [2.0], [0.5]], [[1.0], [-2.0], [3.0]], [0.5]
    values = quadratics(a, c, w, rounds=1, client__steps=2, client__lr=0.1)
    run = drive(configured("Anchored", values), tmp_path)
    gradients = [k[0] * (w[0] - m[0]) for k, m in zip(a, c, strict=True)]
    v = sum(gradients) / 3
    # Round 1: clients 0 and 2 are miners, 1 refreshes at the same w (no change). Steps: y, g from v, as in the paper.
    new = 0.0
    for i in (0, 2):
        x, y, g = w[0], w[0], v
        for _ in range(2):
            g = g - a[i][0] * (y - c[i][0]) + a[i][0] * (x - c[i][0])
            y, x = x, x - 0.1 * g
        new += x / 2
    assert float(run.w) == pytest.approx(new, rel=1e-13)
    assert float(run.state.v) == pytest.approx(v, rel=1e-13)
    assert run.rows("strategy.v")[:, 0].tolist() == pytest.approx(gradients, rel=1e-13)


def test_the_half_of_a_phase_may_have_memory_of_its_own(tmp_path: Path) -> None:
    exp = build(configured("fedavg"))
    fed, state = federation(exp, tmp_path), State(exp.program.network.initial.clone())
    fed.train([1, 2], state, half=helpers.Tally(), phase="tally")
    assert float(fed.train([2, 3], state, half=helpers.Tally(), phase="tally")["tally"]) == 3.0
    assert [float(row["strategy.tally"]) for row in fed.memory.get([1, 2, 3])] == [1.0, 2.0, 1.0]


# --- personal models --------------------------------------------------------------------------------------


def test_a_personal_model_beside_it_leaves_fedavg_alone(tmp_path: Path) -> None:
    fedavg, ditto = (
        drive(configured("fedavg", {"rounds": 4}), tmp_path),
        drive(configured("Ditto", {"rounds": 4}), tmp_path),
    )
    assert torch.equal(ditto.w, fedavg.w)
    assert ditto.params_sha256 != fedavg.params_sha256  # the personal models are evaluated, so they count
    assert ditto.driver.progress.totals["bytes_up"] == fedavg.driver.progress.totals["bytes_up"]


def test_personal_models_are_pulled_towards_the_global_one(tmp_path: Path) -> None:
    # v_K = s + (1 - lr (a + lam))^K (v_0 - s), s = (a c + lam w) / (a + lam); v goes on from where it was.
    a, c, lam, lr, steps = torch.tensor([[1.0], [3.0]]).double(), torch.tensor([[2.0], [-1.0]]).double(), 0.7, 0.1, 3
    values = quadratics(a.tolist(), c.tolist(), [0.25], rounds=2, client__lr=lr, client__steps=steps)
    run = drive(configured("Ditto", {**values, "eval.clients": "all"}, lam=lam), tmp_path)
    w, v = torch.full((1,), 0.25).double(), torch.full((2, 1), 0.25).double()
    for _ in range(2):
        s = (a * c + lam * w) / (a + lam)
        v = s + (1 - lr * (a + lam)) ** steps * (v - s)
        w = (c + (1 - lr * a) ** steps * (w - c)).mean(0)
    torch.testing.assert_close(run.rows("strategy.v"), v, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(run.w, w, rtol=1e-13, atol=1e-13)
    # Personalised evaluation scores v: a / 2 (v - c)^2.
    losses = (a / 2 * (v - c).square())[:, 0]
    assert run.records[-1]["personal_loss_mean"] == pytest.approx(float(losses.mean()), rel=1e-12)
    assert run.records[-1]["personal_loss_worst10"] == pytest.approx(float(losses.max()), rel=1e-12)
    assert run.records[-1]["client_loss_mean"] == pytest.approx(float((a / 2 * (w - c).square()).mean()), rel=1e-12)


def test_a_personal_model_may_be_trained_for_evaluation(tmp_path: Path) -> None:
    config = configured("FineTuned", {"rounds": 2, "eval.clients": "all"})
    run, fedavg = drive(config, tmp_path), drive(configured("fedavg", {"rounds": 2}), tmp_path)
    assert torch.equal(run.w, fedavg.w)
    assert run.state_sha256 == fedavg.state_sha256 or tree.sha256(run.state) == tree.sha256(fedavg.state)
    record = run.records[-1]
    assert record["personal_accuracy_mean"] > record["client_accuracy_mean"]
    exp, client = run.driver.exp, 2
    steps = 3 * -(-len(exp.program.shard(client)) // 64)
    tuned = module_of(exp, sgd(exp, client, run.w, steps, stream="evaluate")).eval()
    x, y = heldout(exp, client)
    assert personal_loss(run, client) == pytest.approx(F.cross_entropy(tuned(x), y).item(), rel=1e-4)


def personal_loss(run: Run, client: int) -> float:
    """What personalised evaluation finds for a client of a run that has ended."""
    (score,) = run.driver.fed.evaluate_clients(run.state, [client], "personal")
    found: float = metrics(score)["loss"]
    return found


# --- private and frozen parts -----------------------------------------------------------------------------


def test_private_parts_are_kept_and_never_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[Tensor] = []
    original = Bound.finish

    def finish(self: Bound, w: Tensor) -> Any:
        entries = original(self, w)
        uploads.append(entries["delta"].value[0])
        return entries

    monkeypatch.setattr(Bound, "finish", finish)
    run = drive(configured("FedRep"), tmp_path)
    program, layout = run.driver.exp.program, run.driver.exp.program.layout
    head = layout.mask("head.")
    assert len(uploads) == 9
    assert all(int(u[head].count_nonzero()) == 0 and int(u[~head].count_nonzero()) > 100 for u in uploads)
    shared = 4 * int((~head).sum())
    assert run.driver.progress.totals["bytes_up"] == run.driver.progress.totals["bytes_down"] == 9 * shared
    assert torch.equal(run.w[head], program.network.initial[head])  # nobody told the server anything
    rows = run.rows("strategy.private")
    assert rows.shape == (len(run.memory), int(head.sum()))
    assert all(not torch.equal(r, run.w[head]) for r in rows)
    assert not torch.equal(rows[0], rows[1])


def test_personal_models_have_the_private_parts(tmp_path: Path) -> None:
    run = drive(configured("FedRep"), tmp_path)
    layout, personal = run.driver.exp.program.layout, dict(run.driver._personal_models())
    head = layout.mask("head.")
    assert [*personal] == run.memory.clients()
    for client, row in zip(personal, run.rows("strategy.private"), strict=True):
        assert torch.equal(personal[client][head], row)
        assert torch.equal(personal[client][~head], run.w[~head])
    # Evaluation uses them: the score is that of the personal model on the client's held-out examples.
    client = run.memory.clients()[0]
    x, y = heldout(run.driver.exp, client)
    z = module_of(run.driver.exp, personal[client]).eval()(x)
    assert personal_loss(run, client) == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-5)
    # And their hash is in the hash of what is evaluated.
    before = run.driver.params_sha256()
    (row,) = run.memory.get([client])
    run.memory.put([client], [{**row, "strategy.private": row["strategy.private"] + 1}])
    assert run.driver.params_sha256() != before


def test_private_parts_go_on_from_where_they_were(tmp_path: Path) -> None:
    # One client, FedRep: the head is trained for an epoch, then the features; across two visits, in plain PyTorch.
    values = {"partition.num_clients": 1, "participation": ALL, "rounds": 2, "client.momentum": 0.0}
    config = configured("FedRep", values)
    exp = build(config)
    module, (x, y) = module_of(exp), examples_of(exp, 0)
    streams = {name: batches(0, 0, len(x), 64, name) for name in ("head", "train")}
    for _ in range(2):
        for name, part in (("head", "head"), ("train", "features")):
            for _ in range(-(-len(x) // 64)):
                module.zero_grad()
                step(module, torch.optim.SGD(getattr(module, part).parameters(), lr=0.05), x, y, next(streams[name]))
    run = drive(config, tmp_path)
    (w,) = (w for _, w in run.driver._personal_models())
    torch.testing.assert_close(w, flat(module), rtol=1e-4, atol=1e-6)


def test_private_parts_may_start_from_a_draw_of_the_clients_own(tmp_path: Path) -> None:
    config = configured("OwnDraw", {"client.lr": 1e-9, "rounds": 1, "participation": ALL})
    rows = drive(config, tmp_path).rows("strategy.private")
    assert bool(((rows >= 0) & (rows <= 1)).all())
    assert len({tuple(r.tolist()) for r in rows}) == 7


def test_frozen_parts_stay_and_are_not_sent(tmp_path: Path) -> None:
    run = drive(configured("Frozen", {"client.weight_decay": 0.1}), tmp_path)
    layout, initial = run.driver.exp.program.layout, run.driver.exp.program.network.initial
    still = layout.mask("features.")
    assert torch.equal(run.w[still], initial[still])
    assert not bool((run.w[~still] == initial[~still]).any())
    assert run.driver.progress.totals["bytes_down"] == 9 * 4 * layout.size("head.")


# --- model hooks ------------------------------------------------------------------------------------------


def test_a_model_hook_may_return_several_outputs(tmp_path: Path, seen: list[Any]) -> None:
    config = configured("Heads", {"eval.clients": "all"})
    run = drive(config, tmp_path)
    program = run.driver.exp.program
    assert {"second.weight", "head.weight"} <= {*program.layout.names}
    assert {mode for mode, _ in seen} == {"global", "personal"}
    assert run.driver.progress.totals["bytes_up"] == 9 * 4 * (program.layout.d - program.layout.size("second."))
    # The second head learns from its own loss and leaves the rest alone: FedAvg's bits in what is shared.
    fedavg = drive(configured("fedavg"), tmp_path)
    shared = ~program.layout.mask("second.")
    assert torch.equal(run.w[shared], fedavg.w)
    start = program.network.initial[program.layout.mask("second.")]
    assert all(float((r - start).abs().max()) > 0.01 for r in run.rows("strategy.private"))


def test_new_layers_are_drawn_under_a_key(tmp_path: Path) -> None:
    # Not from whatever torch's global generator happens to hold: another process would build another network.
    config = configured("Heads")
    first = build(config).program
    torch.manual_seed(123)
    before = torch.get_rng_state()
    second = build(config).program
    assert torch.equal(first.network.initial, second.network.initial)
    assert torch.equal(torch.get_rng_state(), before)
    other = build(configured("Heads", {"seed": 1})).program
    head = first.layout.mask("second.")
    assert not torch.equal(first.network.initial[head], other.network.initial[head])


def test_several_outputs_need_a_loss_and_a_rule_for_prediction(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Heads needs a `predict` that picks the outputs to score"):
        drive(configured("Heads", predicts=False), tmp_path)
    with pytest.raises(ClientError, match=r"returns a tuple, not a tensor; the strategy or a recipe needs a `loss`"):
        drive(configured("Lossless"), tmp_path)
    node = {"model": {"_target_": "tests.helpers.Tupled", "weights": None}}
    with pytest.raises(ConfigError, match="model Tupled returns a tuple, not a tensor"):
        build(configured("fedavg", node))


# --- rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 2, 32])
def test_stacked_rows_have_the_mean_of_the_tree(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.federation.PIECE", piece)
    values = {"participation": ALL}
    stacked, fedavg = drive(configured("Stacked", values), tmp_path), drive(configured("fedavg", values), tmp_path)
    assert stacked.params_sha256 == fedavg.params_sha256
    combined = drive(configured("Stacked", values, rule="combine"), tmp_path)
    torch.testing.assert_close(combined.w, fedavg.w, rtol=1e-4, atol=1e-6)


def test_rows_come_in_the_order_of_the_clients(tmp_path: Path, seen: list[Any]) -> None:
    run = drive(configured("Stacked", rule="median"), tmp_path)
    for clients, rows, same, labels, n in seen:
        assert clients == tuple(sorted(clients))
        assert len(rows) == len(labels) == len(n) == len(clients) == 3
        assert torch.equal(rows.mean(), same)
        for client, label, count in zip(clients, labels, n.tolist(), strict=True):
            x, y = examples_of(run.driver.exp, client)
            assert torch.equal(label, y)  # ragged: each client's own length
            assert count == len(x)
        torch.testing.assert_close(rows.tensor().double(), rows[...].double())
    assert len({len(label) for _, _, _, labels, _ in seen for label in labels}) > 1


def test_a_median_over_blocks_is_the_median_over_rows(tmp_path: Path, seen: list[Any]) -> None:
    run = drive(configured("Stacked", {"rounds": 1, "participation": ALL}, rule="median"), tmp_path)
    ((_, rows, *_),) = seen
    start = run.driver.exp.program.network.initial
    assert torch.equal(run.w, (start + rows.tensor().median(0).values).to(start))


# --- what is charged --------------------------------------------------------------------------------------


def test_once_and_sized_payloads_are_charged_as_they_say(tmp_path: Path) -> None:
    # G changes after rounds 2 and 4: every client pays for it in rounds 1, 3 and 5, and for what it has missed.
    config = configured("Sends", {"rounds": 6, "participation": ALL})
    run = drive(config, tmp_path)
    d = run.driver.exp.program.layout.d
    each = [100 + -(-d // 8) + (4 * d if r in (1, 3, 5) else 0) for r in range(1, 7)]
    assert [r["bytes_down"] for r in run.records] == [7 * b for b in each]
    assert [r["bytes_up"] for r in run.records] == [7 * (7 + 2)] * 6  # nine bools are two bytes


def test_what_a_client_has_survives_a_resume_and_absence(tmp_path: Path) -> None:
    values: dict[str, Any] = {"rounds": 6, "checkpoint.every": 1}
    whole = drive(configured("Sends", values, every=3), tmp_path / "whole")
    with pytest.raises(Interrupted):
        drive(configured("Sends", {**values, "tracker.recorder.kill_at": 4}, every=3), tmp_path / "cut")
    (cut,) = (p.parent for p in (tmp_path / "cut").rglob("config.yaml"))
    resumed = drive(configured("Sends", values, every=3), tmp_path, resume=cut)
    assert resumed.state_sha256 == whole.state_sha256
    assert [r["bytes_down"] for r in resumed.records] == [r["bytes_down"] for r in whole.records[3:]]
    # By hand: a client pays for G when it has not got the present content; cohorts are those of the run.
    d, held = whole.driver.exp.program.layout.d, dict[int, int]()
    for r, record in enumerate(whole.records, start=1):
        content = (r - 1) // 3
        cohort = whole.driver.exp.participation.sample(7, random.numpy_generator(0, "participation", r, 0))
        new = [c for c in cohort if held.get(c) != content]
        held.update(dict.fromkeys(new, content))
        assert record["bytes_down"] == 3 * (100 + -(-d // 8)) + len(new) * 4 * d


def test_private_coordinates_of_any_payload_are_free(tmp_path: Path) -> None:
    program = build(configured("FedRep")).program
    d, shared = program.layout.d, program.shared_size
    assert program.nbytes(torch.zeros(d)) == 4 * shared
    assert program.nbytes(torch.zeros(3, d)) == 12 * shared
    assert program.nbytes({"a": (torch.zeros(d), [torch.zeros(2, d)]), "b": torch.zeros(7)}) == 12 * shared + 28
    assert program.nbytes(torch.zeros(d, dtype=torch.bool)) == -(-shared // 8)
    assert program.nbytes(torch.zeros(d + 1)) == 4 * (d + 1)
    assert build(configured("fedavg")).program.nbytes(torch.zeros(d, dtype=torch.bool)) == -(-d // 8)


# --- each client its own payload --------------------------------------------------------------------------


def test_each_client_may_have_a_model_of_its_own(tmp_path: Path) -> None:
    a, c, lr = (
        torch.tensor([[1.0], [2.0], [0.5], [3.0]]).double(),
        torch.tensor([[1.0], [-3.0], [2.0], [4.0]]).double(),
        0.1,
    )
    values = quadratics(a.tolist(), c.tolist(), [0.5], rounds=2, client__lr=lr, client__steps=2)
    run = drive(configured("OwnModels", {**values, "eval.clients": "all"}), tmp_path)
    thetas = 0.5 + torch.arange(4.0).double()[:, None]
    for _ in range(2):
        thetas = c + (1 - lr * a) ** 2 * (thetas - c)
        near = (thetas - thetas.T).abs().argsort(stable=True)[:, :2]
        thetas = thetas[near].mean(1)
    torch.testing.assert_close(run.state.thetas, thetas, rtol=1e-13, atol=1e-13)
    # What a client gets of its own replaces the broadcast of the same name: it is not charged twice.
    assert [r["bytes_down"] for r in run.records] == [4 * 4, 4 * 4]
    losses = (a / 2 * (thetas - c).square())[:, 0]
    assert run.records[-1]["personal_loss_mean"] == pytest.approx(float(losses.mean()), rel=1e-12)
    # The hash of what is evaluated covers each of the four.
    before = run.driver.params_sha256()
    run.driver.progress.state.thetas[2] += 1e-9
    assert run.driver.params_sha256() != before


def test_payloads_of_clients_may_be_ragged_sized_and_sent_once(tmp_path: Path, seen: list[Any]) -> None:
    # Client i gets i + 1 rows of its own (a list, one tensor each), a vector that says its size, and one sent once.
    run = drive(configured("Letters", {"rounds": 3, "participation": ALL}), tmp_path)
    d = run.driver.exp.program.layout.d
    for client, rows, note, kept in seen:
        assert rows.shape == (1, client + 1, 2)
        assert float(rows.unique()) == float(note) == client
        assert kept.shape == (1, 4)
    assert len(seen) == 21
    always = 7 * (4 * d + 5) + sum(4 * 2 * (i + 1) for i in range(7))
    assert [r["bytes_down"] for r in run.records] == [always + 7 * 16, always, always]


def test_a_strategy_may_send_nothing_to_everybody(tmp_path: Path) -> None:
    values = {"rounds": 2, "participation": ALL, "eval.every": 1}
    lean, usual = drive(configured("Lean", values), tmp_path), drive(configured("OwnModels", values), tmp_path)
    assert lean.records == usual.records  # the global model is evaluated all the same
    assert lean.params_sha256 == usual.params_sha256


def test_every_visit_has_random_numbers_of_its_own(tmp_path: Path) -> None:
    exp = build(configured("Drawing"))
    state = State(exp.program.network.initial.clone())

    def draws() -> list[list[float]]:
        fed, found = federation(exp, tmp_path), []
        for number in (1, 2):
            fed.begin_round(number)
            for phase in ("train", "train", "other"):  # twice in a round, and in a phase
                found += [*fed.train([1, 4], state, phase=phase)["draw"].tensor()]
        for _ in range(2):
            fed.dispatch(4, state)
            update = fed.next_event().update
            assert update is not None
            found += [update["draw"][0]]
        return [row.tolist() for row in found]

    first = draws()
    assert len(first) == 14
    assert len({tuple(row) for row in first}) == 14
    assert draws() == first
    key = random.generator(0, "draw", "train", 1, 4, 1)
    assert first[1] == torch.rand(3, generator=key).tolist()  # a server that knows the key can draw them too


# --- the server's own data --------------------------------------------------------------------------------


def test_the_server_may_train_on_its_own_data_for_free(tmp_path: Path) -> None:
    values = {"data.validation": 0.1, "rounds": 1, "client.momentum": 0.0}
    config = configured("ServerToo", values)
    run, fedavg = drive(config, tmp_path), drive(configured("fedavg", values), tmp_path)
    for key in ("bytes_up", "bytes_down", "clients"):
        assert run.records[0][key] == fedavg.records[0][key]
    exp = build(config)
    server = exp.program.server
    assert server is not None
    assert len(server) == 144
    x = normalised(server.x)
    module, stream = module_of(exp, fedavg.w), batches(0, SERVER, 144, 64, "server")
    for _ in range(3):
        step(module, torch.optim.SGD(module.parameters(), lr=0.05), x, server.y, next(stream))
    torch.testing.assert_close(run.w, flat(module), rtol=1e-4, atol=1e-6)
    assert SERVER in run.memory.clients()  # its stream goes on in the next round


def test_a_server_without_data_says_which_key_to_set(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"the server's visit .*the server has no data: set data\.validation"):
        drive(configured("ServerToo"), tmp_path)


# --- events -----------------------------------------------------------------------------------------------

EVENTS = {"rounds": 12, "client.epochs": None, "client.steps": 1}


def test_events_come_in_the_order_of_virtual_time(tmp_path: Path, seen: list[Any]) -> None:
    run = drive(configured("Async", EVENTS), tmp_path)
    # By hand: client i works for (1 + i mod 3) steps of 10 ms; 3 ms after it came back a timer sends it out again.
    heap = [((1 + i % 3) * 10_000_000, 0, i) for i in range(5)] + [(1_000_000, 1, 5), (1_000_000, 1, 6)]
    heapq.heapify(heap)
    expected, arrivals = [], 0
    while arrivals < 12:
        time, is_timer, i = heapq.heappop(heap)
        expected.append((arrivals + 1, "timer" if is_timer else "arrival", time, i))
        if is_timer:
            heapq.heappush(heap, (time + (1 + i % 3) * 10_000_000, 0, i))
        else:
            heapq.heappush(heap, (time + 3_000_000, 1, i))
            arrivals += 1
            assert run.records[arrivals - 1]["virtual_seconds"] == time / 1e9
    assert seen == expected
    assert run.records[-1]["clients"] == 1


def test_an_arrival_is_the_work_from_where_it_started(tmp_path: Path, seen: list[Any]) -> None:
    a, c, lr, alpha = [1.0, 2.0, 3.0], [1.0, -2.0, 4.0], 0.1, 0.6
    values = quadratics([[k] for k in a], [[m] for m in c], [0.5], rounds=9, client__lr=lr)
    run = drive(configured("Async", values), tmp_path)
    w, version, started = 0.5, 0, dict.fromkeys(range(3), (0.5, 0))
    for _, kind, _, i in seen:
        if kind == "timer":
            started[i] = (w, version)
            continue
        begin, then = started[i]
        delta = c[i] + (1 - lr * a[i]) ** (1 + i % 3) * (begin - c[i]) - begin
        w, version = w + alpha / (1 + version - then) * delta, version + 1
    assert float(run.w) == pytest.approx(w, rel=1e-12)
    assert max(r["staleness"] for r in run.records) >= 2


# With two rounds, tasks from before and after the first checkpoint are under way at the end; they start from one model.
@pytest.mark.parametrize(("rounds", "kill_at"), [(2, 1), (12, 3), (12, 6), (12, 11)])
@pytest.mark.parametrize("memory", ["ram", "disk"])
def test_tasks_under_way_are_made_again_after_a_resume(rounds: int, kill_at: int, memory: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {**EVENTS, "checkpoint.every": 1, "checkpoint.memory": memory}
    values |= {"client.keep_optimizer": True, "rounds": rounds}
    whole = drive(configured("Async", values), tmp_path / "whole")
    with pytest.raises(Interrupted):
        drive(configured("Async", {**values, "tracker.recorder.kill_at": kill_at}), tmp_path / "cut")
    (cut,) = (p.parent for p in (tmp_path / "cut").rglob("config.yaml"))
    resumed = drive(configured("Async", values), tmp_path, resume=cut)
    assert resumed.state_sha256 == whole.state_sha256
    assert resumed.records == whole.records[kill_at - 1 :]
    assert resumed.driver.progress.totals == whole.driver.progress.totals
    assert len(whole.driver.fed.state()["flights"]) > 0


def test_payloads_under_way_are_saved_once_each(tmp_path: Path) -> None:
    run = drive(configured("Async", {**EVENTS, "rounds": 1}), tmp_path)
    saved = run.driver.fed.state()
    assert len(saved["flights"]) == 6
    assert len(saved["payloads"]) == 1


def test_a_client_has_one_task_at_a_time(tmp_path: Path) -> None:
    exp = build(configured("fedavg"))
    fed, state = federation(exp, tmp_path), State(exp.program.network.initial.clone())
    fed.dispatch(3, state)
    with pytest.raises(RunError, match="client 3 is still at work on its task 1; wait for its arrival"):
        fed.dispatch(3, state)
    with pytest.raises(RunError, match="client 3 is still at work"):
        fed.train([1, 3], state)
    event = fed.next_event()
    assert (event.kind, event.client) == ("arrival", 3)
    fed.train([1, 3], state)
    with pytest.raises(RunError, match="no client is at work and no timer is set"):
        fed.next_event()


# --- recipes inside strategies ----------------------------------------------------------------------------

CURVATURE, CENTRE, BEGIN = 1.5, -2.0, 0.75


def visit(strategy: str, nodes: dict[str, Any], tmp_path: Path, **options: Any) -> float:
    """Where three steps of one client on one parabola lead."""
    values = quadratics([[CURVATURE]], [[CENTRE]], [BEGIN], rounds=1, client__lr=0.1, client__steps=3)
    return float(drive(configured(strategy, {**values, **nodes}, **options), tmp_path).w)


def parabola(a: float, c: float, lr: float = 0.1) -> float:
    """The same in closed form, for plain gradient descent."""
    return c + (1 - lr * a) ** 3 * (BEGIN - c)


def test_a_recipes_loss_is_inside_the_strategys_direction(tmp_path: Path) -> None:
    a = 3 * CURVATURE
    s = (a * CENTRE + 0.5 * BEGIN) / (a + 0.5)
    found = visit("fedprox", recipe(steep={"_": "Steeper", "factor": 3.0}), tmp_path, mu=0.5)
    assert found == pytest.approx(s + (1 - 0.1 * (a + 0.5)) ** 3 * (BEGIN - s), rel=1e-13)


def test_a_recipes_direction_is_the_strategys_gradient(tmp_path: Path) -> None:
    # Only the gradient is doubled, not the proximal term around it.
    a = 2 * CURVATURE
    s = (a * CENTRE + 0.5 * BEGIN) / (a + 0.5)
    found = visit("fedprox", recipe(double={"_": "Scaled", "factor": 2.0}), tmp_path, mu=0.5)
    assert found == pytest.approx(s + (1 - 0.1 * (a + 0.5)) ** 3 * (BEGIN - s), rel=1e-13)
    both = visit("fedavg", recipe(one={"_": "Scaled", "factor": 2.0}, two={"_": "Scaled", "factor": 0.25}), tmp_path)
    assert both == pytest.approx(parabola(CURVATURE / 2, CENTRE), rel=1e-13)


def test_a_strategys_loss_is_outside_the_recipes(tmp_path: Path) -> None:
    # Ridge: (f a / 2) (w - c')^2 + lam / 2 w^2; its batch hook runs last (c' = c + 1 / sqrt a), its rate is halved.
    a, lam = 2 * CURVATURE, 0.25
    c = CENTRE + 1 / CURVATURE**0.5
    s = a * c / (a + lam)
    found = visit("Ridge", recipe(steep={"_": "Steeper", "factor": 2.0}), tmp_path)
    assert found == pytest.approx(s + (1 - 0.05 * (a + lam)) ** 3 * (BEGIN - s), rel=1e-13)


def test_batches_and_schedules_chain_from_the_inside_out(tmp_path: Path) -> None:
    # y -> 2 y -> 2 y + 3 -> + 1 (Ridge, with lam = 0); lr -> times 0.5 (plan) times 0.5 (Ridge).
    nodes = recipe(
        first={"_": "Shifted", "scale": 2.0},
        second={"_": "Shifted", "shift": 3.0},
        plan={"_": "Plan", "lr": [0.5]},
    )
    c = (2 * CENTRE * CURVATURE**0.5 + 4) / CURVATURE**0.5
    assert visit("Ridge", nodes, tmp_path, lam=0.0) == pytest.approx(parabola(CURVATURE, c, lr=0.025), rel=1e-13)


def test_memory_of_recipes_and_strategies_is_kept_apart(tmp_path: Path) -> None:
    # FedDyn's dual and the recipe's number per example are both called h.
    nodes = recipe(aldr={"_": "Remembering"})
    values = {"participation": ALL, "rounds": 2}
    plain = drive(configured("feddyn", values), tmp_path)
    both = drive(configured("feddyn", {**values, **nodes}), tmp_path)
    assert torch.equal(both.w, plain.w)
    assert torch.equal(both.rows("strategy.h"), plain.rows("strategy.h"))
    for client in range(7):
        (row,) = both.memory.get([client])
        n = len(both.driver.exp.program.shard(client))
        assert row["aldr.h"].tolist() == [2.0] * n  # each example once per epoch, two epochs


def test_recipes_run_in_phases_too(tmp_path: Path) -> None:
    nodes = recipe(aldr={"_": "Remembering"})
    run = drive(configured("Exploring", {"participation": ALL, "rounds": 1, **nodes}, explorers=7), tmp_path)
    (row,) = run.memory.get([0])
    assert set(row["aldr.h"].tolist()) == {3.0}  # two epochs of exploration, one of training


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (recipe(a={"_": "Masked"}), "Masked and Halving both define `update`; choose one of them"),
        (recipe(a={"_": "Steeper"}, b={"_": "Remembering"}), "Steeper and Remembering both define `loss`"),
        (recipe(strategy={"_": "Scaled"}), "a recipe cannot be called 'strategy'"),
        (recipe(stream={"_": "Scaled"}), "a recipe cannot be called 'stream'"),
    ],
)
def test_two_owners_are_refused_when_the_experiment_is_built(nodes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(configured("Halving", nodes))


def test_updates_have_one_owner(tmp_path: Path) -> None:
    run = drive(configured("Halving"), tmp_path)
    assert float(run.w[-1]) == 0.0
    masked, plain = (
        drive(configured("fedavg", recipe(a={"_": "Masked"})), tmp_path),
        drive(configured("fedavg"), tmp_path),
    )
    assert torch.equal(masked.w, plain.w)


def test_one_entry_has_one_sender(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="two halves send an entry called 'delta'; rename one"):
        drive(configured("fedavg", recipe(a={"_": "Sending"})), tmp_path)
    with pytest.raises(ClientError, match=r"Bare\.finish: entry 'delta' is a Tensor; say how it is reduced"):
        drive(configured("Bare"), tmp_path)


def test_clients_that_send_different_entries_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for piece in (32, 1):
        monkeypatch.setattr("fedsim.federation.PIECE", piece)
        with pytest.raises(ClientError, match=r"names and reductions|same names"):
            drive(configured("Moody", {"participation": ALL}), tmp_path)
        with pytest.raises(ClientError, match=r"shapes \[\(1,\), \(1,\)\] and \[\(2,\), \(1,\)\]"):
            drive(configured("Moody", {"participation": ALL}, shapes=True), tmp_path)


# --- other builds of the network --------------------------------------------------------------------------


def test_clients_may_train_a_narrower_network(tmp_path: Path) -> None:
    values = {"model.hidden": [12], "rounds": 1, "participation": ALL, "partition.num_clients": 2}
    config = configured("Pruned", values)
    run, exp = drive(config, tmp_path), build(config)
    keep = helpers.Pruned(width=5).places(run.driver.fed)
    assert len(keep) == 5 * 64 + 5 + 10 * 5 + 10
    assert run.records[0]["bytes_down"] == run.records[0]["bytes_up"] == 2 * 4 * len(keep)
    start = exp.program.network.initial
    untouched = torch.ones(len(start), dtype=torch.bool)
    untouched[keep] = False
    assert torch.equal(run.w[untouched], start[untouched])

    moved, n = torch.zeros(len(keep), dtype=torch.float64), exp.program.clients.sizes()
    for client in range(2):
        small = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 10))
        nn.utils.vector_to_parameters(start[keep], small.parameters())
        x, y = examples_of(exp, client)
        optimizer, stream = torch.optim.SGD(small.parameters(), lr=0.05, momentum=0.9), batches(0, client, len(x), 64)
        for _ in range(-(-len(x) // 64)):
            step(small, optimizer, x, y, next(stream))
        moved += int(n[client]) * (flat(small).double() - start[keep].double())
    expected = (start[keep] + moved / int(n.sum())).float()
    torch.testing.assert_close(run.w[keep], expected, rtol=1e-4, atol=1e-6)


def test_a_strategy_may_read_the_clients_options(tmp_path: Path) -> None:
    exp = build(configured("fedavg", {"client.lr": 0.03, "client.batch_size": 9}))
    options = federation(exp, tmp_path).options
    assert (options.lr, options.epochs, options.batch_size) == (0.03, 1, 9)


# --- the end of a run -------------------------------------------------------------------------------------


def test_finalising_may_change_how_predictions_are_made(tmp_path: Path) -> None:
    run, fedavg = drive(configured("Flipping"), tmp_path), drive(configured("fedavg"), tmp_path)
    assert torch.equal(run.w, fedavg.w)
    exp = run.driver.exp
    test = exp.program.dataset.test
    z = module_of(exp, run.w).eval()(normalised(test.x))
    before = float((z.argmax(-1) == test.y).double().mean())
    after = float((z.argmin(-1) == test.y).double().mean())
    assert run.records[-1]["test_accuracy"] == pytest.approx(before)
    assert run.result.summary["final"]["test_accuracy"] == pytest.approx(after)
    assert before != after


# --- batch-norm statistics --------------------------------------------------------------------------------


def statistics(exp: Experiment, client: int, start: Tensor, steps: int, first: int = 0) -> Tensor:
    """Running mean and variance after some steps: (1 - m) old + m new, m = 0.1, of the batches' inputs."""
    x, _ = examples_of(exp, client)
    running, stream = start.double().clone(), batches(0, client, len(x), 64, drop_last=True)
    for i in range(first + steps):
        batch = x[next(stream)].flatten(1).double()
        if i >= first:
            new = torch.cat([batch.mean(0), batch.var(0, unbiased=True)])
            running = 0.9 * running + 0.1 * new
    return running


def test_batch_norm_statistics_follow_their_policy(tmp_path: Path) -> None:
    # One layer, on the inputs: its statistics do not depend on the weights. Two clients of unequal size.
    model = {"_target_": "tests.helpers.Normed", "weights": None}
    values = {"model": model, "partition.num_clients": 2, "participation": ALL, "rounds": 2, "client.drop_last": True}
    runs = {
        p: drive(configured("fedavg", {**values, "client.buffers": p}), tmp_path) for p in ("mean", "local", "frozen")
    }
    exp = runs["mean"].driver.exp
    n = torch.tensor(exp.program.clients.sizes()).double()[:, None]
    steps = [int(k) // 64 for k in n[:, 0]]
    assert steps[0] != steps[1]
    start = exp.program.network.initial_buffers
    assert start.tolist() == [0.0] * 64 + [1.0] * 64

    shared, own = start.double(), [start.double()] * 2
    for r in range(2):
        after = [statistics(exp, c, shared, steps[c], r * steps[c]) for c in (0, 1)]
        shared = (n * torch.stack(after)).sum(0) / n.sum()
        own = [statistics(exp, c, own[c], steps[c], r * steps[c]) for c in (0, 1)]
    torch.testing.assert_close(runs["mean"].driver.fed.buffers, shared.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(runs["local"].rows("buffers.local"), torch.stack(own).float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(runs["frozen"].driver.fed.buffers, start)  # type: ignore[arg-type]
    assert torch.equal(runs["local"].driver.fed.buffers, start)  # type: ignore[arg-type]

    d = 4 * exp.program.layout.d
    assert runs["mean"].records[0]["bytes_up"] == runs["mean"].records[0]["bytes_down"] == 2 * (d + 4 * 128)
    for policy in ("local", "frozen"):
        assert runs[policy].records[0]["bytes_up"] == runs[policy].records[0]["bytes_down"] == 2 * d

    # The global model is scored with the averaged statistics.
    module, test = module_of(exp, runs["mean"].w).eval(), exp.program.dataset.test
    for name, view in exp.program.network.buffer_layout.views(shared.float()).items():
        module.get_buffer(name).copy_(view)
    loss = F.cross_entropy(module(normalised(test.x)), test.y)
    assert runs["mean"].records[-1]["test_loss"] == pytest.approx(loss.item(), rel=1e-4)

    # Frozen norms normalise with what they came with, in training too: plain SGD on an affine of the inputs.
    frozen = module_of(exp).eval()
    (x, y), stream = examples_of(exp, 0), batches(0, 0, int(n[0]), 64, drop_last=True)
    optimizer = torch.optim.SGD(frozen.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps[0]):
        step(frozen, optimizer, x, y, next(stream))
    local = helpers.local_of(runs["frozen"].driver.exp, 0)
    torch.testing.assert_close(local.train(local.start)[0], flat(frozen), rtol=1e-4, atol=1e-6)


def test_local_statistics_count_as_what_is_evaluated(tmp_path: Path) -> None:
    model = {"_target_": "tests.helpers.Normed", "weights": None}
    values = {"model": model, "partition.num_clients": 2, "participation": ALL, "rounds": 1, "client.buffers": "local"}
    run = drive(configured("fedavg", {**values, "eval.clients": "all", "client.drop_last": True}), tmp_path)
    client, before = 1, run.driver.params_sha256()
    module = module_of(run.driver.exp, run.w)
    (row,) = run.memory.get([client])
    with torch.no_grad():
        for name, view in run.driver.exp.program.network.buffer_layout.views(row["buffers.local"]).items():
            module.get_buffer(name).copy_(view)
    x, y = heldout(run.driver.exp, client)
    assert personal_loss(run, client) == pytest.approx(F.cross_entropy(module.eval()(x), y).item(), rel=1e-4)
    run.memory.put([client], [{**row, "buffers.local": row["buffers.local"] + 1}])
    assert run.driver.params_sha256() != before


def test_the_hash_of_the_state_covers_all_that_a_resume_restores(tmp_path: Path) -> None:
    run = drive(configured("feddyn", {"client.keep_optimizer": True}), tmp_path)
    driver, client = run.driver, run.memory.clients()[0]
    (row,) = run.memory.get([client])
    assert {"strategy.h", "stream.train", "stream.train.opt.momentum"} <= row.keys()
    hashes = {driver.state_sha256()}
    for name in row:  # the dual, the position in the stream, the momentum
        run.memory.put([client], [{**row, name: row[name] + 1}])
        hashes.add(driver.state_sha256())
    run.memory.put([client], [row])
    assert driver.state_sha256() == run.state_sha256
    driver.progress.state = replace(run.state, H=run.state.H + 1)
    hashes.add(driver.state_sha256())
    driver.progress.state = run.state
    driver.fed.timer(driver.fed.now + 1, "tag")
    hashes.add(driver.state_sha256())
    driver.fed.next_event()
    hashes.add(driver.state_sha256())
    assert len(hashes) == 1 + len(row) + 3


# --- the federation's own refusals ------------------------------------------------------------------------


def test_cohorts_are_checked(tmp_path: Path) -> None:
    exp = build(configured("fedavg"))
    fed, state = federation(exp, tmp_path), State(exp.program.network.initial.clone())
    with pytest.raises(RunError, match="round 1: no clients to train"):
        fed.train([], state)
    with pytest.raises(RunError, match="client 7 does not exist; there are 7"):
        fed.train([2, 7], state)
    with pytest.raises(RunError, match="client 2 is in the cohort twice"):
        fed.train([2, 3, 2], state)
    with pytest.raises(RunError, match="'buffers' names the network's own statistics"):
        fed.train([2], state, send={"w": state.w, "buffers": state.w})


def test_client_ids_may_be_tensors_or_numpy_numbers(tmp_path: Path) -> None:
    exp = build(configured("fedavg"))
    state = State(exp.program.network.initial.clone())
    found = [
        federation(exp, tmp_path).train(ids, state)["delta"]
        for ids in ([1, 4], torch.tensor([4, 1]), np.array([1, 4]), iter((4, 1)))
    ]
    assert all(torch.equal(found[0], f) for f in found)


def test_a_second_call_in_a_round_draws_another_cohort_and_other_numbers(tmp_path: Path) -> None:
    exp = build(configured("fedavg", {"partition.num_clients": 40}))
    fed = federation(exp, tmp_path)
    first, second = fed.sample(), fed.sample()
    assert first != second
    assert first == sorted(first)
    fed.begin_round(1)
    assert fed.sample() == first
    g = torch.rand(3, generator=fed.generator("x"))
    assert torch.equal(g, torch.rand(3, generator=fed.generator("x")))
    assert not torch.equal(g, torch.rand(3, generator=fed.generator("x", 1)))
    fed.begin_round(2)
    assert not torch.equal(g, torch.rand(3, generator=fed.generator("x")))
    assert not torch.equal(
        torch.rand(3, generator=exp.info.generator("x", 2)), torch.rand(3, generator=fed.generator("x"))
    )


def test_the_module_a_strategy_gets_is_a_copy_at_its_initial_weights(tmp_path: Path) -> None:
    exp = build(configured("fedavg"))
    fed, state = federation(exp, tmp_path), State(exp.program.network.initial.clone())
    fed.train([0], state)
    module = fed.module
    assert torch.equal(flat(module), exp.program.network.initial)
    with torch.no_grad():
        next(module.parameters()).fill_(9.0)
    assert torch.equal(flat(fed.module), exp.program.network.initial)
