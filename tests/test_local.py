"""A client's visit: the very numbers of plain PyTorch, streams that do not know rounds, and the loop's hooks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim import random
from fedsim.clients.batch import Batch
from fedsim.clients.local import Local
from fedsim.clients.ops import clip
from fedsim.errors import ClientError
from fedsim.experiment import Experiment, build
from fedsim.strategy import ClientHalf, Grad, Model
from tests import helpers
from tests.helpers import Plan, batches, configure, drive, examples_of, flat, local_of, module_of, quadratics

CENTRAL = ("experiment=centralized",)
CENTRAL_VALUES: dict[str, Any] = {
    "partition.num_clients": 1,
    "participation": {"_target_": "fedsim.clients.participation.All"},
    "client.keep_optimizer": True,
    "client.batch_size": 200,  # 1442 examples: seven full batches and one of 42
}


@pytest.fixture(autouse=True)
def seen() -> Iterator[list[Any]]:
    """What the test-only halves noted."""
    helpers.SEEN.clear()
    yield helpers.SEEN
    helpers.SEEN.clear()


def experiment(values: dict[str, Any] | None = None, recipes: dict[str, dict[str, Any]] | None = None) -> Experiment:
    """An experiment on digits with one client, and recipes of `tests.helpers` by class name."""
    nodes = {name: {"_target_": f"tests.helpers.{name}", **options} for name, options in (recipes or {}).items()}
    base = {"partition.num_clients": 1, "partition.holdout": 0.0, "client.batch_size": 200, "recipe": nodes}
    return build(configure((), {**base, **(values or {})}))


# --- one client is ordinary training ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"client.momentum": 0.9, "client.nesterov": True, "client.weight_decay": 0.01},
        {"client.optimizer": "adam", "client.momentum": 0.0, "client.lr": 0.01},
        {"client.drop_last": True},
        {"client.batch_size": None},
        {"client.clip_norm": 0.1},
        {"recipe": {"noise": {"_target_": "tests.helpers.Noisy"}}},
        {"model": {"_target_": "tests.helpers.Dropped", "weights": None}},
        {"model": {"_target_": "tests.helpers.Normed", "weights": None}},
        {"model": {"_target_": "fedsim.models.standard.CNN", "weights": None}, "client.drop_last": True},
    ],
    ids=lambda v: "-".join(k.split(".")[-1] for k in v) or "sgd",
)
def test_four_rounds_of_one_epoch_are_one_round_of_four(values: dict[str, Any], tmp_path: Path) -> None:
    if str(values.get("model")).count("CNN"):
        values = {**values, "client.batch_size": 721, "rounds": 2}
    rounds = values.pop("rounds", 4)
    many = drive(configure(CENTRAL, {**CENTRAL_VALUES, **values, "rounds": rounds, "client.epochs": 1}), tmp_path)
    once = drive(configure(CENTRAL, {**CENTRAL_VALUES, **values, "rounds": 1, "client.epochs": rounds}), tmp_path)
    assert many.params_sha256 == once.params_sha256
    assert not torch.equal(many.w, many.driver.exp.program.network.initial)


@pytest.mark.parametrize("splits", [[(1, 24)], [(3, 8), (1, 24)], [(24, 1)], [(8, 3)]])
@pytest.mark.parametrize("drop_last", [False, True])
def test_steps_may_be_cut_into_rounds_anywhere(splits: list[tuple[int, int]], drop_last: bool, tmp_path: Path) -> None:
    # 24 steps are three epochs of eight (with drop_last: of seven, so the third ends in mid-epoch).
    values = {**CENTRAL_VALUES, "client.epochs": None, "client.drop_last": drop_last}
    hashes = {
        drive(configure(CENTRAL, {**values, "rounds": rounds, "client.steps": steps}), tmp_path).params_sha256
        for rounds, steps in [*splits, (2, 12)]
    }
    assert len(hashes) == 1


def test_steps_and_epochs_meet(tmp_path: Path) -> None:
    values = {**CENTRAL_VALUES, "rounds": 1}
    by_steps = drive(configure(CENTRAL, {**values, "client.epochs": None, "client.steps": 24}), tmp_path)
    by_epochs = drive(configure(CENTRAL, {**values, "client.epochs": 3}), tmp_path)
    assert by_steps.params_sha256 == by_epochs.params_sha256


@pytest.mark.parametrize(
    ("values", "make"),
    [
        ({}, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
        (
            {"client.optimizer": "adam", "client.momentum": 0.0, "client.lr": 0.01},
            lambda p: torch.optim.Adam(p, lr=0.01),
        ),
        (
            {"client.optimizer": "adamw", "client.momentum": 0.0, "client.lr": 0.01, "client.weight_decay": 0.1},
            lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        ),
        (
            {
                "client.optimizer": {"_target_": "torch.optim.RMSprop", "_partial_": True, "alpha": 0.9},
                "client.momentum": 0.0,
                "client.lr": 0.001,
            },
            lambda p: torch.optim.RMSprop(p, lr=0.001, alpha=0.9),
        ),
    ],
    ids=["sgd", "adam", "adamw", "rmsprop"],
)
@pytest.mark.parametrize("model", ["MLP", "LogReg"])
def test_a_centralised_run_is_a_plain_pytorch_loop_bit_for_bit(
    values: dict[str, Any], make: Any, model: str, tmp_path: Path
) -> None:
    node = {"_target_": f"fedsim.models.standard.{model}", "weights": None}
    config = configure(CENTRAL, {**CENTRAL_VALUES, "model": node, "rounds": 3, "client.epochs": 1, **values})
    exp = build(config)
    module, (x, y) = module_of(exp), examples_of(exp, 0)
    optimizer, stream = make(module.parameters()), batches(0, 0, len(x), 200)
    losses = []
    torch.set_num_threads(1)
    for _ in range(3 * 8):
        rows = next(stream)
        optimizer.zero_grad()
        loss = F.cross_entropy(module(x[rows]), y[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item() * len(rows) / len(x))
    run = drive(config, tmp_path)
    assert torch.equal(run.w, flat(module))
    for i, record in enumerate(run.records):
        assert record["train_loss"] == pytest.approx(sum(losses[8 * i : 8 * i + 8]), rel=1e-5)


def test_an_epoch_sees_every_example_once(seen: list[Any]) -> None:
    local = local_of(experiment(recipes={"Watch": {}}))
    local.train(local.start, epochs=2)
    sizes = [len(index) for _, _, _, index in seen]
    assert sizes == 2 * [*[200] * 7, 42]
    first = [i for _, _, _, index in seen[:8] for i in index]
    second = [i for _, _, _, index in seen[8:] for i in index]
    assert sorted(first) == sorted(second) == [*range(1442)]
    assert first != second
    assert [step for _, step, _, _ in seen] == [*range(16)]


def test_drop_last_leaves_out_what_is_left_but_never_everything(seen: list[Any]) -> None:
    local = local_of(experiment({"client.drop_last": True}, {"Watch": {}}))
    local.train(local.start, epochs=1)
    assert [len(index) for _, _, _, index in seen] == [200] * 7
    seen.clear()
    local = local_of(experiment({"client.drop_last": True, "client.batch_size": 5000}, {"Watch": {}}))
    local.train(local.start, epochs=2)
    assert [len(index) for _, _, _, index in seen] == [1442] * 2


def test_the_learning_rate_decays_by_round(tmp_path: Path, seen: list[Any]) -> None:
    values = {"client.lr_decay": 0.5, "client.lr": 0.08, "rounds": 3, "partition.num_clients": 1}
    drive(configure((), {**values, "recipe": {"watch": {"_target_": "tests.helpers.Watch"}}}), tmp_path)
    assert sorted({lr for _, _, lr, _ in seen}) == [0.02, 0.04, 0.08]


# --- hooks of the loop ------------------------------------------------------------------------------------


def test_a_schedule_sets_rate_and_batch_size_of_each_step(seen: list[Any]) -> None:
    # One parameter, one example per client: w_{t+1} = c + prod (1 - lr f_t a) (w_0 - c).
    a, c, w, lr, factors = 2.0, -1.5, 1.0, 0.1, (1.0, 0.5, 0.25, 2.0)
    plan = {"plan": {"_target_": "tests.helpers.Plan", "lr": list(factors)}}
    values = quadratics([[a]], [[c]], [w], client__lr=lr, client__steps=4, recipe=plan)
    local = local_of(build(configure((), values)))
    found = local.train(local.start)
    expected = c + (w - c) * (1 - lr * a) * (1 - lr * a / 2) * (1 - lr * a / 4) * (1 - lr * a * 2)
    assert float(found) == pytest.approx(expected, rel=1e-14)
    assert float(local.lr_sum) == pytest.approx(lr * sum(factors), rel=1e-14)

    local = local_of(experiment(recipes={"Plan": {"size": [10, 700, 31]}, "Watch": {}}))
    local.train(local.start, steps=6)
    # The epoch ends after 1442 = 10 + 700 + 31 + 10 + 691 examples; the sixth batch opens the next one.
    assert [len(index) for _, _, _, index in seen] == [10, 700, 31, 10, 691, 31]


def test_an_order_may_weigh_examples(seen: list[Any]) -> None:
    # The objective of a batch is the mean of weight times loss; the gradient of client examples (a, c_i) at w.
    weights, c = [0.0, 1.0, 2.0, 0.5], [[1.0], [-2.0], [3.0], [5.0]]
    data = {**quadratics([[1.0]] * 4, c, [0.25])["data"], "_target_": "tests.helpers.Pooled"}
    recipe = {"order": {"_target_": "tests.helpers.Weighted", "weights": weights}}
    values = {**quadratics([[1.0]], [[0.0]], [0.25], client__lr=0.1), "data": data, "recipe": recipe}
    local = local_of(build(configure((), {**values, "client.batch_size": 2, "client.steps": 2})))
    found = local.train(local.start)
    w = 0.25
    for pair in ((3, 2), (1, 0)):  # backwards, two by two
        w -= 0.1 * sum(weights[i] * (w - c[i][0]) for i in pair) / 2
    assert float(found) == pytest.approx(w, rel=1e-14)


def test_an_order_may_ask_for_more_examples_than_there_are(seen: list[Any]) -> None:
    # Number i >= n is example i mod n over again; the batch hook can tell them apart, to make synthetic ones of them.
    n = 1442

    class Extended(ClientHalf):
        def order(self, local: Local, epoch: int) -> Tensor:
            return torch.arange(n - 3, n + 5)[None]

        def batch(self, batch: Batch, local: Local) -> Batch:
            helpers.SEEN.append((batch.index[0].tolist(), batch.x[0].clone(), batch.y[0].tolist()))
            return batch

    exp = experiment()
    local, (x, y) = local_of(exp), examples_of(exp, 0)
    local.train(local.start, half=Extended(), epochs=1)
    ((index, inputs, labels),) = seen
    rows = [n - 3, n - 2, n - 1, 0, 1, 2, 3, 4]
    assert index == [*range(n - 3, n + 5)]
    assert labels == y[rows].tolist()
    torch.testing.assert_close(inputs, x[rows], rtol=1e-6, atol=1e-6)


def test_an_order_may_become_shorter_in_mid_epoch(seen: list[Any]) -> None:
    class Shrinking(ClientHalf):
        def order(self, local: Local, epoch: int) -> Tensor:
            return torch.arange(600 if local.round < 2 else 300)[None]

        def batch(self, batch: Batch, local: Local) -> Batch:
            helpers.SEEN.append(batch.index[0].tolist())
            return batch

    exp = experiment()
    first = local_of(exp)
    first.train(first.start, half=Shrinking(), steps=2)  # 400 of 600
    second = local_of(exp, memory=first.rows(first.start))
    second.round = 2
    second.train(second.start, half=Shrinking(), steps=2)
    assert seen == [[*range(200)], [*range(200, 400)], [*range(200)], [*range(200, 300)]]


def test_a_batch_hook_may_leave_examples_out(seen: list[Any]) -> None:
    exp = experiment(recipes={"Keep": {"below": 300}})
    local, (x, y) = local_of(exp), examples_of(exp, 0)
    found = local.train(local.start, steps=1)
    module, rows = module_of(exp), next(batches(0, 0, len(x), 200))
    kept = rows[rows < 300]
    assert 10 < len(kept) < 100
    F.cross_entropy(module(x[kept]), y[kept]).backward()  # type: ignore[no-untyped-call]
    torch.optim.SGD(module.parameters(), lr=0.05).step()
    torch.testing.assert_close(found[0], flat(module), rtol=1e-5, atol=1e-7)


def test_clip_norm_bounds_the_direction(tmp_path: Path) -> None:
    exp = experiment({"client.clip_norm": 0.01, "client.momentum": 0.0})
    local = local_of(exp)
    moved = (local.train(local.start, steps=1) - local.start)[0]
    assert float(moved.norm()) == pytest.approx(0.05 * 0.01, rel=1e-4)
    free = local_of(experiment({"client.momentum": 0.0}))
    d = (free.train(free.start, steps=1) - free.start)[0] / -0.05
    assert float(d.norm()) > 0.1
    torch.testing.assert_close(moved, -0.05 * clip(d, 0.01), rtol=0, atol=2**-24)  # weights below 1 have such an ulp
    # What a strategy's direction adds is clipped with the rest.
    values = {"strategy.mu": 100.0, "client.clip_norm": 0.01, "client.momentum": 0.0, "partition.num_clients": 1}
    local = local_of(build(configure(("strategy=fedprox",), values)))
    before = local.train(local.start, steps=3)
    after = local.train(before, steps=1)
    assert float((after - before).norm()) == pytest.approx(0.05 * 0.01, rel=1e-4)


class TwoPoints(ClientHalf):
    """A direction that takes gradients at two points and needs both."""

    rho, alpha = 0.5, 0.5

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        first = grad(w)
        return torch.lerp(first, grad(w + self.rho * first), self.alpha)


def test_a_direction_may_ask_for_the_gradient_twice() -> None:
    # f = x^2 / 2 at x = 1: g1 = 1, g2 = 1 + rho = 1.5, mixed 1.25; w = 1 - 0.2 * 1.25. Were the first overwritten by
    # the second, the mix would be 1.5.
    exp = build(configure((), quadratics([[1.0]], [[0.0]], [1.0], client__lr=0.2)))
    local = local_of(exp)
    assert float(local.train(local.start, half=TwoPoints())) == pytest.approx(0.75, rel=1e-15)
    # With the numbers that showed it once: rho 0.1, alpha 0.5 gives 1.05 and not 1.10.
    half = TwoPoints()
    object.__setattr__(half, "rho", 0.1)
    assert float(local.start - local.train(local.start, half=half)) / 0.2 == pytest.approx(1.05, rel=1e-13)


class SameMask(ClientHalf):
    """Notes the gradient at the same point several times in a step."""

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        every = local.examples()
        points = (local.start, None), (w, None), (local.start, None), (local.start, every), (local.start, every)
        helpers.SEEN.append([grad(at, batch).clone() for at, batch in points])
        return grad(w)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_dropout_is_the_same_within_a_step_and_differs_between_steps(momentum: float, seen: list[Any]) -> None:
    values = {"model": {"_target_": "tests.helpers.Dropped", "weights": None}, "client.batch_size": None}
    exp = experiment({**values, "client.momentum": momentum})
    local = local_of(exp)
    local.train(local.start, half=SameMask(), steps=3)
    for first, _, again, every, every_again in seen:
        assert torch.equal(first, again)
        assert torch.equal(every, every_again)
        assert not torch.equal(first, every)
    assert torch.equal(seen[0][0], seen[0][1])  # the first step is at the start
    assert not torch.equal(seen[0][3], seen[1][3])  # same point, same examples, another step: another mask
    assert torch.equal(local_of(exp).train(local.start, steps=2), local_of(exp).train(local.start, steps=2))


class Constant(ClientHalf):
    """A loss with a teacher: the network at another point, which must not disturb the gradient."""

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        teacher = local.at(local.start + 0.1)(batch.x)
        student = model(batch.x)
        again = local.at(local.start + 0.1)(batch.x[:, :1])
        assert not again.requires_grad
        assert not teacher.requires_grad
        distance: Tensor = (student.softmax(-1) - teacher.softmax(-1)).square().sum(-1)
        return local.task_loss(student, batch.y) + distance


@pytest.mark.parametrize("model", ["fedsim.models.standard.MLP", "tests.helpers.Normed"])
@pytest.mark.parametrize("step", [False, True], ids=["outside", "step"])
def test_the_network_at_another_point_is_a_constant_in_evaluation_mode(model: str, step: bool) -> None:
    exp = experiment({"model": {"_target_": model, "weights": None}, "client.batch_size": None, "client.momentum": 0.0})
    local, (x, y) = local_of(exp), examples_of(exp, 0)
    if step:
        found = (local.start - local.train(local.start, half=Constant(), steps=1)) / 0.05
    else:
        found = local.grad(local.start, local.examples(), Constant())
    module, teacher = module_of(exp).train(step), module_of(exp, exp.program.network.initial + 0.1).eval()
    p = teacher(x).softmax(-1).detach()
    z = module(x)
    (F.cross_entropy(z, y) + (z.softmax(-1) - p).square().sum(-1).mean()).backward()
    expected = torch.cat([t.grad.reshape(-1) for t in module.parameters() if t.grad is not None])
    torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-5)
    plain = local.grad(local.start, local.examples())
    assert float((plain - found).abs().max()) > 1e-3


def test_views_of_the_model_are_differentiable() -> None:
    class Ridge(ClientHalf):
        def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
            penalty = torch.stack([v.flatten(1).square().sum(1) for v in model.views.values()]).sum(0)
            return local.task_loss(model(batch.x), batch.y) + 0.5 * 0.1 * penalty[:, None]

    local = local_of(experiment())
    ridge, plain = (local.grad(local.start, local.examples(), half) for half in (Ridge(), None))
    torch.testing.assert_close(ridge, plain + 0.1 * local.start, rtol=1e-4, atol=1e-6)


# --- outside of a step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["Dropped", "Normed"])
def test_gradients_outside_of_a_step_are_taken_in_evaluation_mode(model: str) -> None:
    # So they do not depend on whether something was trained or evaluated before, here or in another process.
    exp = experiment({"model": {"_target_": f"tests.helpers.{model}", "weights": None}})
    local = local_of(exp)
    exp.program.network.train(True)
    fresh = local.grad(local.start, local.examples())
    buffers = [b.clone() for b in exp.program.network.module.buffers()]
    local.train(local.start, steps=2)
    exp.program.network.bind_buffers(exp.program.network.initial_buffers.clone())
    assert torch.equal(local.grad(local.start, local.examples()), fresh)
    assert all(torch.equal(a, b) for a, b in zip(exp.program.network.module.buffers(), buffers, strict=True))
    module, (x, y) = module_of(exp).eval(), examples_of(exp, 0)
    F.cross_entropy(module(x), y).backward()  # type: ignore[no-untyped-call]
    expected = torch.cat([p.grad.reshape(-1) for p in module.parameters() if p.grad is not None])
    torch.testing.assert_close(fresh[0], expected, rtol=1e-4, atol=1e-6)


class Asking(ClientHalf):
    """A schedule that looks at the gradient of all examples before each step."""

    def schedule(self, local: Local) -> dict[str, Any]:
        helpers.SEEN.append(local.grad(local.start, local.examples()).clone())
        return {}


def test_a_gradient_between_steps_leaves_training_mode_alone(seen: list[Any]) -> None:
    exp = experiment({"model": {"_target_": "tests.helpers.Dropped", "weights": None}})
    asked = local_of(exp).train(local_of(exp).start, half=Asking(), steps=3)
    assert torch.equal(asked, local_of(exp).train(local_of(exp).start, steps=3))
    assert torch.equal(seen[0], seen[2])


def test_a_gradient_outside_of_a_step_needs_examples() -> None:
    local = local_of(experiment())
    with pytest.raises(ClientError, match=r"local\.grad needs a batch"):
        local.grad(local.start)


def test_training_does_not_change_where_it_started() -> None:
    local = local_of(experiment())
    before = local.start.clone()
    out = local.train(local.start)
    assert torch.equal(local.start, before)
    assert not torch.equal(out, before)


def test_lanes_that_are_not_active_stay() -> None:
    local = local_of(experiment())
    assert local.train(local.start, active=torch.tensor([[False]])) is local.start
    assert not torch.equal(local.train(local.start, active=torch.tensor([[True]])), local.start)


def test_only_trains_the_parameters_that_fit() -> None:
    local = local_of(experiment({"client.weight_decay": 0.1}))
    head = local.layout.mask("head.")
    moved = (local.train(local.start, only="head.", steps=3) - local.start)[0] != 0
    assert bool(moved[head].any())
    assert not bool(moved[~head].any())
    moved = (local.train(local.start, only="features.", steps=3) - local.start)[0] != 0
    assert not bool(moved[head].any())
    assert bool(moved[~head].any())
    assert bool(((local.train(local.start, steps=3) - local.start)[0] != 0)[head].any())


def test_only_computes_the_gradient_of_the_whole() -> None:
    # Training the head alone is the step of the whole model, restricted to the head (plain SGD, one step).
    local = local_of(experiment({"client.momentum": 0.0}))
    head = local.layout.mask("head.")
    part = local_of(experiment({"client.momentum": 0.0})).train(local.start, only="head.", steps=1)
    whole = local.train(local.start, steps=1)
    assert torch.equal(part[:, head], whole[:, head])


class Nested(ClientHalf):
    """Trains something else between asking for the gradient and using it."""

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        first = grad(w)
        inner = local.train(w + 1.0, half=Plan(lr=(0.5,)), only="head.", steps=2, stream="inner")
        helpers.SEEN.append(inner)
        return torch.lerp(first, grad(w), 0.5)  # twice the same gradient


def test_a_visit_may_train_inside_of_a_step(seen: list[Any]) -> None:
    exp = experiment()
    plain, nested = local_of(exp), local_of(exp)
    assert torch.equal(nested.train(nested.start, half=Nested(), steps=3), plain.train(plain.start, steps=3))
    assert len(seen) == 3
    assert nested.stats.steps == 3 + 3 * 2
    assert nested.stats.examples == nested.stats.scored == 9 * 200
    assert float(nested.lr_sum) == pytest.approx(3 * 0.05 + 6 * 0.025)
    assert float(nested.mean_loss) == float(plain.mean_loss)


def test_streams_keep_their_own_order_and_optimizer(seen: list[Any]) -> None:
    exp = experiment({"client.keep_optimizer": True}, {"Watch": {}})
    one = local_of(exp)
    expected = one.train(one.start, epochs=2)
    orders = [index for _, _, _, index in seen]
    seen.clear()
    two = local_of(exp)
    w = two.train(two.start, epochs=1)
    two.train(two.start, epochs=1, stream="other")
    w = two.train(w, epochs=1)
    assert torch.equal(w, expected)
    assert [index for _, _, _, index in seen[:8] + seen[16:]] == orders
    assert [index for _, _, _, index in seen[8:16]] != orders[:8]
    assert {"stream.train", "stream.other", "stream.train.opt.momentum"} <= two.rows(w).keys()
    # What was kept goes on in the next visit, in another process too.
    three = local_of(exp, memory=two.rows(w))
    four = local_of(exp)
    assert torch.equal(three.train(w, epochs=1), four.train(four.start, epochs=3))


def test_stream_generators_know_the_step_and_not_the_visit() -> None:
    exp = experiment()
    draws = []

    class Draw(ClientHalf):
        def batch(self, batch: Batch, local: Local) -> Batch:
            draws.append(torch.rand(2, generator=local.stream_generator("x", 3)[0]).tolist())
            return batch

    local = local_of(exp)
    local.train(local.start, half=Draw(), steps=3)
    again = local_of(exp, memory=local.rows(local.start))
    again._visit.visit = 7
    again.train(again.start, half=Draw(), steps=2)
    expected = [
        torch.rand(2, generator=random.generator(0, "x", "stream", "train", 0, step, 3)).tolist() for step in range(5)
    ]
    assert draws == expected
    other = local.generator("x")[0], again.generator("x")[0]
    assert torch.rand(1, generator=other[0]) != torch.rand(1, generator=other[1])


# --- what a visit books and refuses -----------------------------------------------------------------------


def test_steps_without_a_loss_are_counted_too() -> None:
    class Sometimes(ClientHalf):
        """Asks for a gradient in every other step only."""

        def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
            return grad(w) if local.step % 2 else torch.ones_like(w)

    local = local_of(experiment())
    local.train(local.start, half=Sometimes(), steps=8)
    assert (local.stats.steps, local.stats.examples, local.stats.scored) == (8, 1442, 3 * 200 + 42)
    assert local.stats.loss / local.stats.scored == pytest.approx(float(local.mean_loss))


@pytest.mark.parametrize("where", ["start", "sent", "memory"])
def test_hooks_that_write_in_place_are_refused(where: str, tmp_path: Path) -> None:
    strategy = {"_target_": "tests.helpers.InPlace", "where": where}
    with pytest.raises(ClientError, match=r"round [12], client \d .*in place; assign a new tensor"):
        drive(configure((), {"strategy": strategy, "partition.num_clients": 2, "rounds": 2}), tmp_path)


def test_a_loss_that_is_not_finite_names_round_client_and_step(tmp_path: Path) -> None:
    data = quadratics([[1.0], [1.0]], [[2.0], [-3.0]], [1.0], client__steps=6, rounds=3)
    recipe = {"nan": {"_target_": "tests.helpers.Diverging", "client": 1, "round_num": 2, "step": 9}}
    with pytest.raises(
        ClientError,
        match=r"round 2, client 1 \(seed 0\): .*training loss became nan at local step 4 of 6 \(lr 0.05\).*client\.lr",
    ):
        drive(configure((), {**data, "recipe": recipe}), tmp_path)


def test_an_order_without_examples_is_refused() -> None:
    class Nothing(ClientHalf):
        def order(self, local: Local, epoch: int) -> Tensor:
            return torch.empty(1, 0, dtype=torch.int64)

    local = local_of(experiment())
    with pytest.raises(ClientError, match=r"`order` selected none of the client's 1442 examples"):
        local.train(local.start, half=Nothing())


def test_memory_and_payload_say_what_they_hold() -> None:
    local = local_of(experiment(), extra=torch.zeros(3))
    with pytest.raises(AttributeError, match="memory has no 'h'; it holds: nothing"):
        _ = local.memory.h
    with pytest.raises(AttributeError, match="nothing called 'c' was sent; broadcast and unicast sent: w, extra"):
        _ = local.sent.c


def test_class_counts_and_labels_are_the_clients() -> None:
    exp = build(configure((), {"partition.num_clients": 5}))
    for client in range(5):
        local, (_, y) = local_of(exp, client), examples_of(exp, client)
        assert torch.equal(local.y[0], y)
        assert local.class_counts.tolist() == [torch.bincount(y, minlength=10).tolist()]
        assert local.num_examples.tolist() == [[len(y)]]


def test_the_network_is_an_ordinary_module_again_when_it_is_copied() -> None:
    exp = experiment()
    local = local_of(exp)
    local.train(local.start, steps=2)
    module = exp.program.fresh_module()
    assert torch.equal(flat(module), exp.program.network.initial)
    with torch.no_grad():
        next(module.parameters()).zero_()
    assert not torch.equal(flat(exp.program.fresh_module()), flat(module))
