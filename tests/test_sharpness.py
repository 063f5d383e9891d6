"""FedSAM, FedCM, MoFedSAM, FedGAMMA and FedSMOO: closed forms, second derivations in plain torch, degenerate cases."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from fedsim import random
from fedsim.clients.batch import Batch
from fedsim.clients.local import Local
from fedsim.errors import ConfigError
from fedsim.experiment import Experiment, build
from fedsim.run import Driver
from fedsim.strategy import ClientHalf, Model
from tests.helpers import Run, batches, configure, drive, examples_of, quadratics

METHODS = ["fedsam", "fedcm", "mofedsam", "fedgamma", "fedsmoo"]
SHARP = ["fedsam", "mofedsam", "fedgamma", "fedsmoo"]

# Eight clients in three coordinates that disagree in both directions. With batches of one example, client i makes
# SIZES[i] steps an epoch; client 2 has no examples.
A = torch.stack([torch.linspace(0.5, 3.0, 8, dtype=torch.float64).roll(k) for k in (0, 3, 6)], 1)
C = torch.stack([torch.linspace(-3, 4, 8), torch.linspace(5, -2, 8), torch.linspace(-1, 2, 8).roll(2)], 1).double()
START = [4.0, -3.0, 0.5]
SIZES = [3, 1, 0, 2, 4, 1, 2, 6]
LR, DECAY, RHO = 0.05, 0.8, 0.3
UNEQUAL = {"sizes": SIZES, "client__batch_size": 1, "client__epochs": 2, "client__steps": None}
FOUR = {"_target_": "fedsim.clients.participation.Fixed", "clients_per_round": 4}
TOGETHER = pytest.mark.parametrize("batching", ["off", 3])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No pictures, which take most of the time of a small run, and one thread, as in the runs."""
    monkeypatch.setattr(Driver, "_draw", lambda *_: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(strategy: str, tmp_path: Path, **values: Any) -> Run:
    """A run on the eight quadratic clients; dots in keys are written as double underscores."""
    options = {"client__steps": 10, "client__lr": LR, **values}
    return drive(configure((f"strategy={strategy}",), quadratics(A.tolist(), C.tolist(), START, **options)), tmp_path)


def digits(strategy: str, tmp_path: Path, values: dict[str, Any], **options: Any) -> Run:
    """A run on images, with options of the strategy."""
    own = {f"strategy.{k}": v for k, v in options.items()}
    return drive(configure((f"strategy={strategy}",), {**values, **own}), tmp_path)


def one(strategy: str, tmp_path: Path, a: float, c: float, x: float, **values: Any) -> Run:
    """A run of one client in one dimension."""
    return drive(configure((f"strategy={strategy}",), quadratics([[a]], [[c]], [x], **values)), tmp_path)


def cohort(done: Run, r: int) -> list[int]:
    """Who took part in round ``r``."""
    return [*map(int, done.driver.exp.participation.sample(8, random.numpy_generator(0, "participation", r, 0)))]


def start() -> Tensor:
    return torch.tensor(START, dtype=torch.float64)


def slope(i: int, w: Tensor) -> Tensor:
    """Client i's gradient."""
    return A[i] * (w - C[i])


def along(v: Tensor, rho: float = RHO) -> Tensor:
    """The perturbation along ``v``: of length rho, but for 1e-7 in the divisor."""
    return rho * v / (math.sqrt(sum(x * x for x in v.tolist())) + 1e-7)


def sharp(i: int, w: Tensor, rho: float = RHO) -> Tensor:
    """Client i's gradient at the perturbed point."""
    return slope(i, w + along(slope(i, w), rho))


def share(weights: str, who: list[int]) -> Tensor:
    """How the clients count, ``[m, 1]``."""
    p = torch.tensor([[float(SIZES[i]) if weights == "examples" else 1.0] for i in who], dtype=torch.float64)
    return p / p.sum()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# --- FedSAM -----------------------------------------------------------------------------------------------


@TOGETHER
@pytest.mark.parametrize(("weights", "server_lr"), [("uniform", 0.5), ("examples", 1.0)])
def test_fedsam_is_a_plain_loop(weights: str, server_lr: float, batching: Any, tmp_path: Path) -> None:
    options = {"strategy__weights": weights, "strategy__server_lr": server_lr, "strategy__rho": RHO}
    values = {**UNEQUAL, "client__lr_decay": DECAY, "client__batching": batching, "participation": FOUR}
    done = run("fedsam", tmp_path, rounds=3, **values, **options)
    x = start()
    for r in range(1, 4):
        who, moved = cohort(done, r), []
        for i in who:
            w = x
            for _ in range(2 * SIZES[i]):
                w = w - LR * DECAY ** (r - 1) * sharp(i, w)
            moved.append(w - x)
        x = x + server_lr * (share(weights, who) * torch.stack(moved)).sum(0)
    close(done.w, x)
    assert 2 in [i for r in range(1, 4) for i in cohort(done, r)], "nobody without examples took part"


def test_fedsam_on_a_round_bowl_has_its_closed_form(tmp_path: Path) -> None:
    # Equal curvatures: the way points to c all the time, and r = |w - c| falls as if c were rho further away:
    # r' = r - lr a (r + rho), so r_K = (1 - lr a)^K (r_0 + rho) - rho. A norm per coordinate would bend the way.
    a, c, x, rho, steps = 1.5, torch.tensor([1.0, -2.0, 0.5]).double(), start(), 0.4, 9
    distance = (x - c).norm()
    expected = c + (x - c) / distance * ((1 - LR * a) ** steps * (distance + rho) - rho)
    values = quadratics([[a] * 3], [c.tolist()], START, rounds=1, client__lr=LR, client__steps=steps)
    done = drive(configure(("strategy=fedsam",), {**values, "strategy.rho": rho}), tmp_path)
    torch.testing.assert_close(done.w, expected, rtol=1e-6, atol=1e-6)  # the 1e-7 in the divisor


@pytest.mark.parametrize(
    ("optimizer", "values"),
    [
        ("sgd", {"client.momentum": 0.5}),
        ("adam", {"client.momentum": 0.0, "client.optimizer": "adam", "client.lr": 0.01}),
        ("clipped", {"client.momentum": 0.0, "client.clip_norm": 0.2}),
    ],
)
def test_fedsam_equals_a_plain_pytorch_federation(optimizer: str, values: dict[str, Any], tmp_path: Path) -> None:
    # Both gradients of a step see the same minibatch; the norm is that of all tensors together; the optimizer, whose
    # state survives between visits, sees the second gradient only, and client.clip_norm bounds that one.
    common = {"partition.num_clients": 3, "participation.fraction": 1.0, "rounds": 2, "precision": "float64"}
    config = configure(("strategy=fedsam",), {**common, **values, "client.keep_optimizer": True, "strategy.rho": 0.5})
    exp = build(config)
    w, n = exp.program.network.initial, exp.program.clients.sizes()
    streams = [batches(0, c, int(n[c]), 64) for c in range(3)]
    state = [(torch.zeros_like(w), torch.zeros_like(w), 0)] * 3
    for _ in range(2):
        moved = torch.zeros_like(w)
        for c in range(3):
            (x, y), at, (m, v, t) = examples_of(exp, c), w, state[c]
            for _ in range(-(-int(n[c]) // 64)):
                rows = next(streams[c])
                g = network_slope(exp, at, x[rows].double(), y[rows])
                g = network_slope(exp, at + along(g, 0.5), x[rows].double(), y[rows])
                t += 1
                if optimizer == "sgd":
                    m = 0.5 * m + g
                    at = at - 0.05 * m
                elif optimizer == "adam":
                    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                    at = at - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
                else:
                    at = at - 0.05 * g * min(1.0, 0.2 / (float(g.norm()) + 1e-6))
            state[c], moved = (m, v, t), moved + at - w
        w = w + moved / 3
    torch.testing.assert_close(drive(config, tmp_path).w, w, rtol=0, atol=1e-6 if optimizer == "adam" else 1e-9)


def network_slope(exp: Experiment, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of the mean cross-entropy at ``w``, ``[d]``."""
    at = w.clone().requires_grad_()
    outputs = functional_call(exp.program.network.module, exp.program.layout.views(at), (x,))
    return torch.autograd.grad(F.cross_entropy(outputs, y), at)[0]


# --- the perturbation -------------------------------------------------------------------------------------

POINTS: list[tuple[tuple[int, ...], Tensor, Tensor]] = []
"""Clients, lanes that move, and where the network was evaluated, in order; of runs in this process."""


@dataclass(frozen=True)
class Trace(ClientHalf):
    """A recipe that notes the points at which gradients are taken."""

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        at = torch.cat([v.detach().flatten(1) for v in model.views.values()], 1)
        POINTS.append((local.clients, local.active[:, 0].clone(), at.clone()))
        return local.loss(model, batch)


TRACE = {"recipe": {"trace": {"_target_": "tests.test_sharpness.Trace"}}}


@TOGETHER
@pytest.mark.parametrize("strategy", SHARP)
def test_a_client_s_perturbation_has_the_length_rho(strategy: str, batching: Any, tmp_path: Path) -> None:
    POINTS.clear()
    done = run(strategy, tmp_path, rounds=2, strategy__rho=RHO, client__batching=batching, **UNEQUAL, **TRACE)
    lengths = []
    for (_, moves, w), (_, _, other) in zip(POINTS[::2], POINTS[1::2], strict=True):
        lengths += (other - w).norm(dim=1)[moves].tolist()
    assert len(lengths) == done.driver.progress.totals["steps"] == 2 * 2 * sum(SIZES)
    assert any(len(clients) > 1 for clients, _, _ in POINTS) == (batching != "off")
    # 1e-7 in the divisor: the vectors that are normalised here are longer than 0.02.
    torch.testing.assert_close(torch.tensor(lengths), torch.full((len(lengths),), RHO), rtol=5e-6, atol=0)


@pytest.mark.parametrize("strategy", METHODS)
@pytest.mark.parametrize("rho", [0.0, RHO])
def test_a_step_takes_two_gradients_and_without_perturbation_one(strategy: str, rho: float, tmp_path: Path) -> None:
    POINTS.clear()
    own = {} if strategy == "fedcm" else {"strategy__rho": rho}
    run(strategy, tmp_path, rounds=1, client__steps=5, **own, **TRACE)
    assert len(POINTS) == 8 * 5 * (2 if rho and strategy != "fedcm" else 1)


@pytest.mark.parametrize("strategy", SHARP)
def test_the_iterate_survives_the_perturbation_to_the_bit(strategy: str, tmp_path: Path) -> None:
    # Steps too short to move a float32: adding and then taking off a perturbation would leave its rounding behind.
    values = {"client.lr": 1e-30, "client.momentum": 0.0, "rounds": 1}
    done = digits(strategy, tmp_path, values, rho=0.5)
    assert torch.equal(done.w, done.driver.exp.program.network.initial)
    assert done.driver.progress.totals["steps"] > 5


def test_dropout_is_the_same_for_both_gradients(tmp_path: Path) -> None:
    # The objective at a point is a number of the step: with rho so small that the point is the same to rounding, the
    # second gradient is the first, and FedSAM is FedAvg. Another mask would move it by the gradient itself.
    model = {"_target_": "tests.helpers.Dropped", "p": 0.5, "weights": None}
    values = {"model": model, "precision": "float64", "rounds": 1}
    sam = digits("fedsam", tmp_path, values, rho=1e-12)
    torch.testing.assert_close(sam.w, digits("fedavg", tmp_path, values, weights="uniform").w, rtol=0, atol=1e-11)
    assert sam.params_sha256 != digits("fedsam", tmp_path, values, rho=0.5).params_sha256


def test_batch_norms_take_their_statistics_from_both_passes(tmp_path: Path) -> None:
    # Statistics of the inputs, of which a step sees one batch twice: m_0 = 0, m = 0.9 m + 0.1 mean, twice.
    model = {"_target_": "tests.helpers.Normed", "weights": None}
    values = {"model": model, "partition.num_clients": 1, "participation.fraction": 1.0, "client.batch_size": None}
    done = digits("fedsam", tmp_path, {**values, "rounds": 1, "precision": "float64"})
    x = examples_of(done.driver.exp, 0)[0].double().flatten(1)
    assert done.driver.fed.buffers is not None
    found = done.driver.exp.program.network.buffer_layout.views(done.driver.fed.buffers)["norm.running_mean"]
    torch.testing.assert_close(found, (1 - 0.9**2) * x.mean(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strategy", SHARP)
def test_a_recipe_that_scales_the_gradient_leaves_the_perturbation_alone(strategy: str, tmp_path: Path) -> None:
    # In round 1 duals, controls and momentum are 0: k times the gradient, with the same perturbed point.
    recipe = {"scaled": {"_target_": "tests.helpers.Scaled", "factor": 3.0}}
    values = {"rounds": 1, "client__steps": 1, "strategy__rho": RHO}
    x, scaled = start(), run(strategy, tmp_path, recipe=recipe, **values).w
    torch.testing.assert_close(scaled - x, 3 * (run(strategy, tmp_path, **values).w - x), rtol=1e-6, atol=1e-9)


# --- FedCM and MoFedSAM -----------------------------------------------------------------------------------


@TOGETHER
@pytest.mark.parametrize("strategy", ["fedcm", "mofedsam"])
@pytest.mark.parametrize(("weights", "server_lr", "alpha"), [("uniform", 0.5, 0.3), ("examples", 1.0, 0.1)])
def test_momentum_methods_are_a_plain_loop(
    strategy: str, weights: str, server_lr: float, alpha: float, batching: Any, tmp_path: Path
) -> None:
    # Direction alpha g + (1 - alpha) m; the next m is the mean of (x - w_i) / (K_i lr), with each client's own number
    # of steps and that round's rate; who made no step has moved by nothing.
    options = {"strategy__weights": weights, "strategy__server_lr": server_lr, "strategy__alpha": alpha}
    values = {**UNEQUAL, "client__lr_decay": DECAY, "client__batching": batching, "participation": FOUR}
    if strategy == "mofedsam":
        options["strategy__rho"] = RHO
    done = run(strategy, tmp_path, rounds=3, **values, **options)
    x, m = start(), torch.zeros(3, dtype=torch.float64)
    for r in range(1, 4):
        who, lr, moved, steep = cohort(done, r), LR * DECAY ** (r - 1), [], []
        for i in who:
            w = x
            for _ in range(2 * SIZES[i]):
                g = sharp(i, w) if strategy == "mofedsam" else slope(i, w)
                w = w - lr * (alpha * g + (1 - alpha) * m)
            moved.append(w - x)
            steep.append((x - w) / (2 * SIZES[i] * lr) if SIZES[i] else torch.zeros_like(x))
        p = share(weights, who)
        x, m = x + server_lr * (p * torch.stack(moved)).sum(0), (p * torch.stack(steep)).sum(0)
    close(done.w, x)
    close(done.state.momentum, m)


def test_fedcm_over_three_rounds_has_its_closed_form(tmp_path: Path) -> None:
    # The constant (1 - alpha) m moves the minimiser: w_K = s + (1 - lr alpha a)^K (x - s), with
    # s = c - (1 - alpha) m / (alpha a).
    a, c, x, m, lr, alpha, steps = 0.8, 2.0, -1.0, 0.0, 0.1, 0.25, 6
    done = one("fedcm", tmp_path, a, c, x, rounds=3, client__lr=lr, client__steps=steps, strategy__alpha=alpha)
    for _ in range(3):
        s = c - (1 - alpha) * m / (alpha * a)
        w = s + (1 - lr * alpha * a) ** steps * (x - s)
        x, m = w, (x - w) / (steps * lr)
    assert float(done.w) == pytest.approx(x, abs=1e-12)
    assert float(done.state.momentum) == pytest.approx(m, abs=1e-12)


def test_fedcm_with_one_step_averages_gradients_over_rounds(tmp_path: Path) -> None:
    # m_t = alpha sum_s (1 - alpha)^(t - s) g_s over the mean gradients g_s, and x moves by -lr m_t.
    alpha, x, seen = 0.3, start(), list[Tensor]()
    for t in range(6):
        seen.append((A * (x - C)).mean(0))
        x = x - 0.1 * sum((alpha * (1 - alpha) ** (t - s) * g for s, g in enumerate(seen)), torch.zeros(3))
    close(run("fedcm", tmp_path, rounds=6, client__steps=1, client__lr=0.1, strategy__alpha=alpha).w, x)


def test_momentum_is_divided_by_the_rates_that_were_used(tmp_path: Path) -> None:
    # A schedule of 1 and 0.25 times the rate: the momentum is the rate-weighted mean of the directions.
    plan = {"plan": {"_target_": "tests.helpers.Plan", "lr": [1.0, 0.25]}}
    done = one("fedcm", tmp_path, 2.0, 1.0, 3.0, rounds=1, client__lr=0.1, client__steps=2, recipe=plan)
    w = 3.0 - 0.1 * 0.1 * 2 * 2.0  # alpha = 0.1, gradient 2 (3 - 1)
    first, second = 0.1 * 4.0, 0.1 * 2 * (w - 1)
    assert float(done.state.momentum) == pytest.approx((first + 0.25 * second) / 1.25, abs=1e-12)


# --- FedGAMMA ---------------------------------------------------------------------------------------------


@TOGETHER
@pytest.mark.parametrize(
    ("weights", "server_lr", "control"), [("uniform", 0.5, 1.0), ("examples", 1.0, 1.0), ("uniform", 1.0, 0.5)]
)
def test_fedgamma_is_a_plain_loop(
    weights: str, server_lr: float, control: float, batching: Any, tmp_path: Path
) -> None:
    options = {"strategy__weights": weights, "strategy__server_lr": server_lr, "strategy__control": control}
    values = {**UNEQUAL, "client__lr_decay": DECAY, "client__batching": batching, "participation": FOUR}
    done = run("fedgamma", tmp_path, rounds=3, strategy__rho=RHO, **values, **options)
    x, c, kept = start(), torch.zeros(3, dtype=torch.float64), torch.zeros(8, 3, dtype=torch.float64)
    for r in range(1, 4):
        who, lr, moved, changed = cohort(done, r), LR * DECAY ** (r - 1), [], torch.zeros(3, dtype=torch.float64)
        for i in who:
            w = x
            for _ in range(2 * SIZES[i]):
                w = w - lr * (sharp(i, w) + control * (c - kept[i]))
            moved.append(w - x)
            if SIZES[i]:
                new = kept[i] - c + (x - w) / (2 * SIZES[i] * lr)
                changed, kept[i] = changed + new - kept[i], new
        x, c = x + server_lr * (share(weights, who) * torch.stack(moved)).sum(0), c + changed / 8
    close(done.w, x)
    close(done.state.c, c)
    touched = done.memory.clients()
    close(done.rows("strategy.c"), kept[touched])


def test_fedgamma_stands_still_where_the_perturbed_gradients_cancel(tmp_path: Path) -> None:
    # Nobody moves when grad F_i(x + e_i) = c_i - c for all; then c_i' = c_i - c, so c = 0 and the c_i add up to 0.
    done = run("fedgamma", tmp_path, rounds=50, strategy__rho=RHO, client__batching=8)
    expected = torch.stack([sharp(i, done.w) for i in range(8)])
    torch.testing.assert_close(expected.sum(0), torch.zeros(3).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(done.rows("strategy.c"), expected, rtol=0, atol=1e-9)
    optimum = (A * C).sum(0) / A.sum(0)
    assert float((done.w - optimum).abs().max()) > 1e-2, "the perturbation changes nothing"


# --- FedSMOO ----------------------------------------------------------------------------------------------


@TOGETHER
@pytest.mark.parametrize(
    ("dual", "alpha", "precision"), [("all", 0.4, "float64"), ("active", 0.4, "float32"), ("off", 0.1, "float64")]
)
def test_fedsmoo_is_a_plain_loop(dual: str, alpha: float, precision: str, batching: Any, tmp_path: Path) -> None:
    values = {**UNEQUAL, "client__lr_decay": DECAY, "client__batching": batching, "participation": FOUR}
    options = {"strategy__rho": RHO, "strategy__alpha": alpha, "strategy__dual": dual}
    done = run("fedsmoo", tmp_path, rounds=4, precision=precision, **values, **options)
    x, s = start(), torch.zeros(3, dtype=torch.float64)
    h, mu = torch.zeros(8, 3, dtype=torch.float64), torch.zeros(8, 3, dtype=torch.float64)
    for r in range(1, 5):
        who, ends = cohort(done, r), []
        for i in who:
            w = x
            for _ in range(2 * SIZES[i]):
                e = along(slope(i, w) - mu[i] - s)
                mu[i] = mu[i] + e - s
                w = w - LR * DECAY ** (r - 1) * (slope(i, w + e) + alpha * (h[i] + w - x))
            ends.append(w)
            if dual != "off":
                h[i] = h[i] + w - x
        x = torch.stack(ends).mean(0)
        if dual != "off":
            x = x + (h.mean(0) if dual == "all" else h[who].mean(0))
        s = along(mu[who].mean(0))
    tolerance = 1e-12 if precision == "float64" else 2e-5
    touched = done.memory.clients()
    for found, expected in (
        (done.w, x),
        (done.state.s, s),
        (done.state.H, h.sum(0)),
        (done.rows("strategy.mu"), mu[touched]),
        *([] if dual == "off" else [(done.rows("strategy.h"), h[touched])]),  # frozen duals are not kept
    ):
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert float(done.state.s.norm()) == pytest.approx(RHO, rel=1e-6)
    assert done.state.s.dtype == done.w.dtype == getattr(torch, precision)


def test_fedsmoo_in_one_dimension_has_its_closed_form(tmp_path: Path) -> None:
    # Left of c the gradient outweighs mu and s: e = -rho in every step, so mu' = mu - K (rho + s), the next s = -rho,
    # and w_K = t + (1 - lr (a + alpha))^K (x - t) with t = (a (c + rho) + alpha (x - h)) / (a + alpha). The server
    # adds the displacement to h, and h to the local model.
    a, c, x, lr, alpha, rho, steps = 0.8, 9.0, 0.0, 0.05, 0.4, 0.1, 5
    options = {"strategy__alpha": alpha, "strategy__rho": rho, "client__lr": lr, "client__steps": steps}
    done = one("fedsmoo", tmp_path, a, c, x, rounds=2, **options)
    h = mu = s = 0.0
    for _ in range(2):
        t = (a * (c + rho) + alpha * (x - h)) / (a + alpha)
        w = t + (1 - lr * (a + alpha)) ** steps * (x - t)
        h, mu, s = h + w - x, mu - steps * (rho + s), -rho
        x = w + h
    assert x < c - rho
    for found, expected in ((done.w, x), (done.rows("strategy.mu"), mu), (done.state.s, s), (done.state.H, h)):
        assert float(found) == pytest.approx(expected, abs=1e-6)  # the 1e-7 in the divisors


def test_fedsmoo_without_a_common_direction_has_no_common_perturbation(tmp_path: Path) -> None:
    # Two mirrored clients: their mu cancel, and 0 / (0 + 1e-7) is 0, not NaN.
    values = quadratics([[1.0], [1.0]], [[2.0], [-2.0]], [0.0], rounds=3, client__lr=0.1, client__steps=4)
    done = drive(configure(("strategy=fedsmoo",), values), tmp_path)
    assert float(done.w) == float(done.state.s) == 0.0
    mu = done.rows("strategy.mu")[:, 0]
    assert float(mu[0]) == -float(mu[1]) != 0.0


def test_fedsmoo_s_first_step_is_fedsam_s_and_fedspeed_s(tmp_path: Path) -> None:
    # mu, s, h and w - x are still 0; FedSpeed's server adds the mean dual as well.
    values: dict[str, Any] = {"client.epochs": None, "client.steps": 1, "rounds": 1}
    smoo = digits("fedsmoo", tmp_path, values, rho=0.5)
    assert smoo.params_sha256 == digits("fedspeed", tmp_path, values, rho=0.5, clip="none").params_sha256
    alone = digits("fedsmoo", tmp_path, values, rho=0.5, dual="off")
    assert alone.params_sha256 == digits("fedsam", tmp_path, values, rho=0.5).params_sha256
    more = {**values, "client.steps": 2}
    pair = [digits(name, tmp_path, more, rho=0.5) for name in ("fedsmoo", "fedsam")]
    assert pair[0].params_sha256 != pair[1].params_sha256


# --- degenerate cases -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["uniform", "examples"])
@pytest.mark.parametrize(
    ("strategy", "options", "other", "others"),
    [
        ("fedcm", {"alpha": 1.0, "server_lr": 0.7}, "fedsam", {"rho": 0.0, "server_lr": 0.7}),
        ("mofedsam", {"alpha": 1.0}, "fedsam", {}),
        ("mofedsam", {"rho": 0.0, "alpha": 0.3}, "fedcm", {"alpha": 0.3}),
        ("fedgamma", {"control": 0.0, "server_lr": 0.7}, "fedsam", {"server_lr": 0.7}),
        ("fedgamma", {"rho": 0.0, "server_lr": 0.7}, "scaffold", {"server_lr": 0.7}),
    ],
)
def test_degenerate_cases_are_other_methods_bit_for_bit(
    strategy: str, options: dict[str, Any], other: str, others: dict[str, Any], weights: str, tmp_path: Path
) -> None:
    values = {"rounds": 4, "client.keep_optimizer": True}
    found = digits(strategy, tmp_path, values, weights=weights, **options)
    assert found.params_sha256 == digits(other, tmp_path, values, weights=weights, **others).params_sha256


@pytest.mark.parametrize("dual", ["all", "active", "off"])
def test_fedsmoo_without_perturbation_is_feddyn_bit_for_bit(dual: str, tmp_path: Path) -> None:
    values = {"rounds": 4, "client.keep_optimizer": True}
    found = digits("fedsmoo", tmp_path, values, rho=0.0, alpha=0.3, dual=dual)
    assert found.params_sha256 == digits("feddyn", tmp_path, values, alpha=0.3, dual=dual).params_sha256
    assert not found.state.s.any()


@pytest.mark.parametrize("strategy", ["fedcm", "fedgamma", "fedsmoo"])
def test_clients_of_unequal_length_agree_with_each_alone(strategy: str, tmp_path: Path) -> None:
    # Clients that have made all of their steps rest while others go on; what they remember must rest as well.
    values = {"participation.fraction": 1.0, "precision": "float64", "client.batch_size": 40}
    runs = [digits(strategy, tmp_path, {**values, "rounds": 2, "client.batching": n}) for n in ("off", 3)]
    assert len({int(n) for n in runs[0].driver.exp.program.clients.sizes()}) > 3
    torch.testing.assert_close(runs[0].w, runs[1].w, rtol=0, atol=1e-10)
    for name in runs[0].memory.get([0])[0]:
        pair = [r.rows(name).double() for r in runs]
        torch.testing.assert_close(*pair, rtol=0, atol=1e-10)
    assert runs[0].state_sha256 != runs[1].state_sha256, "nobody was trained together"


# --- bytes and refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "options", "down", "up"),
    [
        ("fedsam", {}, 1, 1),
        ("fedsam", {"rho": 0.0, "weights": "examples"}, 1, 1),
        ("fedcm", {}, 2, 1),
        ("fedcm", {"alpha": 1.0, "weights": "examples"}, 2, 1),
        ("mofedsam", {}, 2, 1),
        ("fedgamma", {}, 2, 2),
        ("fedgamma", {"control": 0.0}, 2, 2),
        ("fedsmoo", {}, 2, 2),
        ("fedsmoo", {"dual": "active"}, 2, 2),
        ("fedsmoo", {"dual": "off"}, 2, 2),
    ],
)
def test_vectors_sent_per_client_and_round(
    strategy: str, options: dict[str, Any], down: int, up: int, tmp_path: Path
) -> None:
    own = {f"strategy__{k}": v for k, v in options.items()}
    done = run(strategy, tmp_path, rounds=2, client__steps=1, participation=FOUR, **own)
    totals = done.driver.progress.totals
    vector = 4 * 3  # bytes: three parameters, charged as float32
    assert (totals["bytes_down"], totals["bytes_up"]) == (2 * 4 * down * vector, 2 * 4 * up * vector)


@pytest.mark.parametrize(
    ("strategy", "key", "value", "needed"),
    [
        *[(name, "rho", -0.1, ">= 0, got -0.1") for name in SHARP],
        *[(name, "rho", float("nan"), "finite, got nan") for name in SHARP],
        ("fedsam", "rho", "big", "a number, got 'big'"),
        ("fedsam", "server_lr", 0.0, "> 0, got 0.0"),
        ("fedsam", "weights", "median", "examples or uniform, got 'median'"),
        *[(name, "alpha", 0.0, r"in \(0, 1\], got 0.0") for name in ("fedcm", "mofedsam")],
        *[(name, "alpha", 1.1, r"in \(0, 1\], got 1.1") for name in ("fedcm", "mofedsam")],
        *[(name, "server_lr", -1.0, "> 0, got -1.0") for name in ("fedcm", "mofedsam", "fedgamma")],
        *[(name, "weights", "equal", "examples or uniform, got 'equal'") for name in ("fedcm", "mofedsam", "fedgamma")],
        ("fedgamma", "control", -1.0, ">= 0, got -1.0"),
        ("fedsmoo", "alpha", -0.1, ">= 0, got -0.1"),
        ("fedsmoo", "dual", "some", "all, active or off, got 'some'"),
    ],
)
def test_impossible_options_are_refused_in_one_line(strategy: str, key: str, value: Any, needed: str) -> None:
    with pytest.raises(ConfigError, match=rf"^strategy\.{key} must be {needed}$"):
        build(configure((f"strategy={strategy}",), {f"strategy.{key}": value}))
