"""The methods' mathematics: closed forms on quadratics, degenerate cases, recursions by hand."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from fedsim import random
from fedsim.errors import ConfigError
from fedsim.experiment import build
from fedsim.reduce import Reduced
from fedsim.strategies.fedadagrad import FedAdagrad
from fedsim.strategies.fedadam import AdamState, FedAdam
from fedsim.strategies.fedavgm import FedAvgM, MomentumState
from fedsim.strategies.fedyogi import FedYogi
from fedsim.strategy import Info
from fedsim.vector import Layout
from tests.helpers import Run, batches, configure, drive, examples_of, flat, module_of, quadratics

FEDAVG_UNIFORM = {"strategy.weights": "uniform"}
NO_CLIENTS_LEFT_OUT = {"_target_": "fedsim.clients.participation.All"}

# Eight clients that disagree: in each of three coordinates curvatures span [0.5, 3], and minimisers both signs.
A = torch.stack([torch.linspace(0.5, 3.0, 8, dtype=torch.float64).roll(k) for k in (0, 3, 6)], 1)
C = torch.stack([torch.linspace(-3, 4, 8), torch.linspace(5, -2, 8), torch.linspace(-1, 2, 8).roll(2)], 1).double()
START = [4.0, -3.0, 0.5]
OPTIMUM = (A * C).sum(0) / A.sum(0)
STEPS, LR = 10, 0.05
Q = (1 - LR * A) ** STEPS  # K steps take client i from x to c_i + q_i (x - c_i)


def run(strategy: str, tmp_path: Path, **values: Any) -> Run:
    """A run on the eight quadratic clients; dots in keys are written as double underscores."""
    options = {"client__steps": STEPS, "client__lr": LR, **values}
    return drive(configure((f"strategy={strategy}",), quadratics(A.tolist(), C.tolist(), START, **options)), tmp_path)


def fixed_point(weights: Tensor) -> Tensor:
    """Where FedAvg with these weights stands still: sum p_i (1 - q_i) c_i / sum p_i (1 - q_i)."""
    return (weights * (1 - Q) * C).sum(0) / (weights * (1 - Q)).sum(0)


# --- heterogeneous quadratics -----------------------------------------------------------------------------


def test_fedavg_goes_to_its_biased_fixed_point(tmp_path: Path) -> None:
    found = run("fedavg", tmp_path, rounds=60).w
    torch.testing.assert_close(found, fixed_point(torch.ones(8, 1)), rtol=0, atol=1e-12)
    assert float((found - OPTIMUM).abs().max()) > 0.15


@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_fedavg_weighs_clients_by_their_examples(weights: str, tmp_path: Path) -> None:
    sizes = [1, 5, 2, 7, 1, 3, 4, 2]
    p = torch.tensor([[float(n) if weights == "examples" else 1.0] for n in sizes])
    x = torch.tensor(START, dtype=torch.float64)
    for _ in range(3):
        x = (p * (C + Q * (x - C))).sum(0) / p.sum()
    found = run("fedavg", tmp_path, rounds=3, sizes=sizes, strategy__weights=weights).w
    torch.testing.assert_close(found, x, rtol=1e-13, atol=1e-13)


def test_scaffold_reaches_the_minimiser(tmp_path: Path) -> None:
    torch.testing.assert_close(run("scaffold", tmp_path, rounds=40).w, OPTIMUM, rtol=0, atol=1e-12)


def test_feddyn_reaches_the_minimiser(tmp_path: Path) -> None:
    # The numbers of FedSpeed's paper check without its perturbation: 200 rounds of 10 steps, lr 0.05, mu 0.5.
    found = run("feddyn", tmp_path, rounds=200, strategy__alpha=0.5).w
    torch.testing.assert_close(found, OPTIMUM, rtol=0, atol=1e-12)


def test_feddyn_duals_go_to_the_clients_gradients_at_the_minimiser(tmp_path: Path) -> None:
    # h_i = -g_i / mu, and g_i goes to grad F_i(x*) = a_i (x* - c_i); these add up to 0.
    done = run("feddyn", tmp_path, rounds=120, strategy__alpha=1.0)
    torch.testing.assert_close(-done.rows("strategy.h"), A * (OPTIMUM - C), rtol=0, atol=1e-12)
    torch.testing.assert_close(done.state.H, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("strategy", "options", "tolerance"),
    [("scaffold", {"rounds": 100}, 1e-12), ("feddyn", {"rounds": 120, "strategy__alpha": 1.0}, 1e-4)],
)
def test_corrected_methods_reach_the_minimiser_with_half_of_the_clients(
    strategy: str, options: dict[str, Any], tolerance: float, tmp_path: Path
) -> None:
    half = {"_target_": "fedsim.clients.participation.Fixed", "clients_per_round": 4}
    found = run(strategy, tmp_path, participation=half, **options).w
    torch.testing.assert_close(found, OPTIMUM, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_feddyn_reaches_the_minimiser_with_half_of_the_clients_exactly(tmp_path: Path) -> None:
    half = {"_target_": "fedsim.clients.participation.Fixed", "clients_per_round": 4}
    found = run("feddyn", tmp_path, participation=half, rounds=500, strategy__alpha=1.0).w
    torch.testing.assert_close(found, OPTIMUM, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dual", ["all", "active"])
def test_feddyn_server_keeps_the_sum_of_all_duals(dual: str, tmp_path: Path) -> None:
    half = {"_target_": "fedsim.clients.participation.Fixed", "clients_per_round": 3}
    for rounds in (1, 4, 9):
        done = run("feddyn", tmp_path, participation=half, rounds=rounds, strategy__dual=dual)
        touched = done.rows("strategy.h")
        torch.testing.assert_close(done.state.H, touched.sum(0), rtol=1e-12, atol=1e-12)
        assert float(done.state.H.abs().max()) > 0.1


@pytest.mark.parametrize("dual", ["all", "active"])
def test_feddyn_with_partial_participation_by_hand(dual: str, tmp_path: Path) -> None:
    x, H, h = torch.tensor(START, dtype=torch.float64), torch.zeros(3), torch.zeros(8, 3, dtype=torch.float64)
    some = {"_target_": "fedsim.clients.participation.Fixed", "clients_per_round": 3}
    done = run("feddyn", tmp_path, participation=some, rounds=3, strategy__alpha=0.4, strategy__dual=dual)
    for r in range(1, 4):
        who = done.driver.exp.participation.sample(8, random.numpy_generator(0, "participation", r, 0))
        y = x.expand(3, 3).clone()
        for _ in range(STEPS):
            y = y - LR * (A[who] * (y - C[who]) + 0.4 * (h[who] + y - x))
        h[who] += y - x
        H = H + (y - x).sum(0)
        x = y.mean(0) + (H / 8 if dual == "all" else h[who].mean(0))
    torch.testing.assert_close(done.w, x, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(done.state.H, H, rtol=1e-13, atol=1e-13)


def test_scaffold_server_control_is_the_mean_of_all_controls(tmp_path: Path) -> None:
    half = {"_target_": "fedsim.clients.participation.Fixed", "clients_per_round": 3}
    for rounds in (1, 4, 9):
        done = run("scaffold", tmp_path, participation=half, rounds=rounds)
        torch.testing.assert_close(done.state.c, done.rows("strategy.c").sum(0) / 8, rtol=1e-12, atol=1e-12)


def test_scaffold_controls_are_the_clients_mean_gradients(tmp_path: Path) -> None:
    # Option II in the first round: c_i = (x - y_i) / (K lr), the mean of the gradients along the path.
    x = torch.tensor(START, dtype=torch.float64)
    y = C + Q * (x - C)
    done = run("scaffold", tmp_path, rounds=1)
    torch.testing.assert_close(done.rows("strategy.c"), (x - y) / (STEPS * LR), rtol=1e-12, atol=1e-12)


def test_scaffold_with_partial_participation_by_hand(tmp_path: Path) -> None:
    x, c, ci = torch.tensor(START, dtype=torch.float64), torch.zeros(3), torch.zeros(8, 3, dtype=torch.float64)
    half = {"_target_": "fedsim.clients.participation.Fixed", "clients_per_round": 3}
    done = run("scaffold", tmp_path, participation=half, rounds=3, strategy__server_lr=0.5)
    for r in range(1, 4):
        who = done.driver.exp.participation.sample(8, random.numpy_generator(0, "participation", r, 0))
        y = x.expand(3, 3).clone()
        for _ in range(STEPS):
            y = y - LR * (A[who] * (y - C[who]) - ci[who] + c)
        new = ci[who] - c + (x - y) / (STEPS * LR)
        x, c = x + 0.5 * (y - x).mean(0), c + (new - ci[who]).sum(0) / 8
        ci[who] = new
    torch.testing.assert_close(done.w, x, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(done.state.c, c, rtol=1e-13, atol=1e-13)


# --- single clients by hand -------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.0, 0.5, 2.0])
def test_fedprox_steps_match_their_closed_form(mu: float, tmp_path: Path) -> None:
    # x_K = s + (1 - lr (a + mu))^K (x_0 - s), s = (a c + mu x_0) / (a + mu); the mean over clients in round 1.
    x = torch.tensor(START, dtype=torch.float64)
    s = (A * C + mu * x) / (A + mu)
    expected = (s + (1 - LR * (A + mu)) ** STEPS * (x - s)).mean(0)
    found = run("fedprox", tmp_path, rounds=1, strategy__mu=mu).w
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("steps", "w", "moved_on"), [(1, 0.9, 0.8), (2, 0.811, 0.622)])
def test_feddyn_hand_case(steps: int, w: float, moved_on: float, tmp_path: Path) -> None:
    # a = 1, c = 0, x = 1, h = 0, mu = eta = 0.1: the local model w, and the amended model w + h that the server takes.
    values = quadratics([[1.0]], [[0.0]], [1.0], rounds=1, client__lr=0.1, client__steps=steps, strategy__alpha=0.1)
    done = drive(configure(("strategy=feddyn",), values), tmp_path)
    assert 1 + float(done.rows("strategy.h")) == pytest.approx(w, abs=1e-14)
    assert float(done.w) == pytest.approx(moved_on, abs=1e-14)


@pytest.mark.parametrize("dual", ["all", "active"])
def test_feddyn_dual_identity(dual: str, tmp_path: Path) -> None:
    # One client over three rounds against the recursion of the dual average (FedSpeed's check 1 at rho = 0):
    # with gamma_k = lr mu (1 - lr mu)^(K-1-k), Gamma = sum gamma_k and g = -mu h,
    # g' = (1 - Gamma) g + sum gamma_k grad_k and x' = x - 2 / mu sum gamma_k grad_k + (2 Gamma - 1) / mu g.
    a, c, mu, lr, steps = 0.8, 2.0, 0.4, 0.1, 7
    x, g = 1.0, 0.0
    for _ in range(3):
        w, weighted, total = x, 0.0, 0.0
        for k in range(steps):
            gradient, gamma = a * (w - c), lr * mu * (1 - lr * mu) ** (steps - 1 - k)
            weighted, total = weighted + gamma * gradient, total + gamma
            w -= lr * (gradient - g + mu * (w - x))
        x, g = x - 2 / mu * weighted + (2 * total - 1) / mu * g, (1 - total) * g + weighted
    options = {"rounds": 3, "client__lr": lr, "client__steps": steps}
    values = quadratics([[a]], [[c]], [1.0], **options, strategy__alpha=mu, strategy__dual=dual)
    done = drive(configure(("strategy=feddyn",), values), tmp_path)
    assert float(done.w) == pytest.approx(x, abs=1e-12)
    assert -mu * float(done.rows("strategy.h")) == pytest.approx(g, abs=1e-12)


def test_feddyn_means_over_all_and_over_the_active_agree_when_all_are_active(tmp_path: Path) -> None:
    one = run("feddyn", tmp_path, rounds=5, strategy__dual="all").w
    other = run("feddyn", tmp_path, rounds=5, strategy__dual="active").w
    torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


# --- server rules -----------------------------------------------------------------------------------------

INFO = Info(3, 0, Layout({"w": torch.Size([2])}), 0, 5, 0.1)


def reduced(delta: Tensor) -> Reduced:
    return Reduced({"delta": delta}, INFO.layout, (0,), 3, torch.ones(1, dtype=torch.float64))


DELTAS = [torch.tensor(d, dtype=torch.float64) for d in ([0.5, -2.0], [-1.0, 0.25], [3.0, 0.0])]


def test_fedavgm_server_by_hand() -> None:
    # v_t = beta v_{t-1} + delta_t, w_t = w_{t-1} + eta v_t
    rule = FedAvgM(server_lr=0.5, beta=0.8)
    state: Any = rule.init(INFO, torch.tensor([1.0, -1.0]))
    assert isinstance(state, MomentumState)
    v, w = [0.0, 0.0], [1.0, -1.0]
    for delta in DELTAS:
        state = rule.step(state, reduced(delta))
        v = [0.8 * b + d for b, d in zip(v, delta.tolist(), strict=True)]
        w = [x + 0.5 * b for x, b in zip(w, v, strict=True)]
        torch.testing.assert_close(state.v, torch.tensor(v, dtype=torch.float64), rtol=1e-15, atol=1e-15)
        torch.testing.assert_close(state.w, torch.tensor(w), rtol=1e-6, atol=1e-6)
    assert state.w.dtype == torch.float32


def test_fedadam_server_by_hand() -> None:
    # m = beta1 m + (1 - beta1) delta, v = beta2 v + (1 - beta2) delta^2, w = w + eta m / (sqrt(v) + tau), v_0 = tau^2
    rule = FedAdam(server_lr=0.3, beta1=0.7, beta2=0.9, tau=0.05)
    state: Any = rule.init(INFO, torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert isinstance(state, AdamState)
    m, v, w = [0.0, 0.0], [0.0025, 0.0025], [1.0, -1.0]
    for delta in DELTAS:
        state = rule.step(state, reduced(delta))
        for i, d in enumerate(delta.tolist()):
            m[i] = 0.7 * m[i] + 0.3 * d
            v[i] = 0.9 * v[i] + 0.1 * d * d
            w[i] = w[i] + 0.3 * m[i] / (v[i] ** 0.5 + 0.05)
        torch.testing.assert_close(state.w, torch.tensor(w, dtype=torch.float64), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("beta1", [0.0, 0.7])
def test_fedyogi_server_by_hand(beta1: float) -> None:
    # v moves by (1 - beta2) delta^2: up where v < delta^2, down where v > delta^2, not at all where both are equal.
    rule = FedYogi(server_lr=0.3, beta1=beta1, beta2=0.75, tau=0.5)
    state: Any = rule.init(INFO, torch.tensor([1.0, -1.0], dtype=torch.float64))
    m, v, w, moves = [0.0, 0.0], [0.25, 0.25], [1.0, -1.0], set()
    for deltas in ([0.5, -2.0], [-0.25, 0.5], [0.125, -0.0625], [-1.0, 0.75]):
        state = rule.step(state, reduced(torch.tensor(deltas, dtype=torch.float64)))
        for i, d in enumerate(deltas):
            sign = (v[i] > d * d) - (v[i] < d * d)
            moves.add(sign)
            m[i] = beta1 * m[i] + (1 - beta1) * d
            v[i] = v[i] - 0.25 * d * d * sign
            w[i] = w[i] + 0.3 * m[i] / (v[i] ** 0.5 + 0.5)
        torch.testing.assert_close(state.v, torch.tensor(v, dtype=torch.float64), rtol=1e-15, atol=0)
        torch.testing.assert_close(state.w, torch.tensor(w, dtype=torch.float64), rtol=1e-14, atol=1e-14)
    assert moves == {-1, 0, 1}


@pytest.mark.parametrize("beta1", [0.0, 0.7])
def test_fedadagrad_server_by_hand(beta1: float) -> None:
    # v only grows: v_t = tau^2 + sum of squares.
    rule = FedAdagrad(server_lr=0.3, beta1=beta1, tau=0.05)
    state: Any = rule.init(INFO, torch.tensor([1.0, -1.0], dtype=torch.float64))
    m, w = [0.0, 0.0], [1.0, -1.0]
    for t, delta in enumerate(DELTAS):
        state = rule.step(state, reduced(delta))
        for i, d in enumerate(delta.tolist()):
            m[i] = beta1 * m[i] + (1 - beta1) * d
            root = (0.0025 + sum(float(past[i]) ** 2 for past in DELTAS[: t + 1])) ** 0.5
            w[i] = w[i] + 0.3 * m[i] / (root + 0.05)
        torch.testing.assert_close(state.w, torch.tensor(w, dtype=torch.float64), rtol=1e-14, atol=1e-14)


def test_second_moments_under_a_constant_small_update_have_their_closed_forms() -> None:
    # From v_0 = tau^2 > d^2, T rounds: Adam forgets geometrically, Yogi steadily, Adagrad not at all.
    d, tau, rounds = 0.01, 0.5, 40
    expected = {
        FedAdam(beta2=0.9, tau=tau): d**2 + 0.9**rounds * (tau**2 - d**2),
        FedYogi(beta2=0.9, tau=tau): tau**2 - rounds * 0.1 * d**2,
        FedAdagrad(tau=tau): tau**2 + rounds * d**2,
    }
    for rule, v in expected.items():
        state: Any = rule.init(INFO, torch.zeros(2))
        for _ in range(rounds):
            state = rule.step(state, reduced(torch.tensor([d, -d], dtype=torch.float64)))
        torch.testing.assert_close(state.v, torch.full((2,), v, dtype=torch.float64), rtol=1e-12, atol=0)


def test_fedyogi_is_fedadam_where_v_is_twice_the_squared_update() -> None:
    # v - (1 - beta2) (v - delta^2) = v - (1 - beta2) delta^2 there.
    w, delta = torch.tensor([1.0, -1.0]).double(), torch.tensor([0.5, -2.0]).double()
    state = AdamState(w, torch.tensor([0.25, 1.0]).double(), 2 * delta.square())
    adam, yogi = (rule.step(state, reduced(delta)) for rule in (FedAdam(beta2=0.75), FedYogi(beta2=0.75)))
    assert torch.equal(adam.v, yogi.v)
    assert torch.equal(adam.w, yogi.w)


def test_fedyogi_keeps_its_second_moment_positive() -> None:
    g = torch.Generator().manual_seed(0)
    state: Any = FedYogi(beta2=0.0, tau=0.1).init(INFO, torch.zeros(2))
    for scale in (1.0, 1e-3, 0.3, 30.0, 0.1) * 40:
        state = FedYogi(beta2=0.0, tau=0.1).step(state, reduced(scale * torch.randn(2, generator=g).double()))
        assert bool((state.v > 0).all())


@pytest.mark.parametrize(
    ("strategy", "root", "own"),
    [("fedadam", 0.0, {"strategy__beta2": 0.0}), ("fedyogi", 1.0, {}), ("fedadagrad", 1.0, {})],
)
def test_adaptive_methods_with_a_large_tau_are_fedavg(
    strategy: str, root: float, own: dict[str, Any], tmp_path: Path
) -> None:
    # Squared updates vanish beside tau^2. FedYogi and FedAdagrad keep sqrt(v) = tau, FedAdam forgets it at once with
    # beta2 = 0: every coordinate's rate is server_lr / (root tau + tau) = 1.
    options = {
        "strategy__tau": 1e9,
        "strategy__server_lr": (root + 1) * 1e9,
        "strategy__beta1": 0.0,
        "rounds": 10,
        **own,
    }
    found = run(strategy, tmp_path, **options).w
    expected = run("fedavg", tmp_path, rounds=10).w
    assert float((expected - torch.tensor(START)).abs().max()) > 1
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_server_rules_reach_the_run(tmp_path: Path) -> None:
    # Two rounds of one full-batch step: the deltas are -lr a (w - c), averaged; then the rules above.
    x = torch.tensor(START, dtype=torch.float64)
    values: dict[str, Any] = {"rounds": 2, "client__steps": 1}
    v, w = torch.zeros(3, dtype=torch.float64), x
    for _ in range(2):
        v = 0.9 * v - LR * (A * (w - C)).mean(0)
        w = w + v
    torch.testing.assert_close(run("fedavgm", tmp_path, **values).w, w, rtol=1e-13, atol=1e-13)
    m, v, w = torch.zeros(3), torch.full((3,), 1e-6, dtype=torch.float64), x
    for _ in range(2):
        delta = -LR * (A * (w - C)).mean(0)
        m, v = 0.9 * m + 0.1 * delta, 0.99 * v + 0.01 * delta.square()
        w = w + 0.01 * m / (v.sqrt() + 1e-3)
    torch.testing.assert_close(run("fedadam", tmp_path, **values).w, w, rtol=1e-13, atol=1e-13)
    m, v, w = torch.zeros(3), torch.full((3,), 1e-6, dtype=torch.float64), x
    for _ in range(2):
        delta = -LR * (A * (w - C)).mean(0)
        m, v = 0.9 * m + 0.1 * delta, v - 0.01 * delta.square() * (v - delta.square()).sign()
        w = w + 0.01 * m / (v.sqrt() + 1e-3)
    torch.testing.assert_close(run("fedyogi", tmp_path, **values).w, w, rtol=1e-13, atol=1e-13)
    v, w = torch.full((3,), 1e-6, dtype=torch.float64), x
    for _ in range(2):
        delta = -LR * (A * (w - C)).mean(0)
        v = v + delta.square()
        w = w + 0.03 * delta / (v.sqrt() + 1e-3)
    torch.testing.assert_close(run("fedadagrad", tmp_path, **values).w, w, rtol=1e-13, atol=1e-13)


# --- FedSGD -----------------------------------------------------------------------------------------------

BY_EPOCHS: dict[str, Any] = {"client.epochs": 3, "client.batch_size": 16}
BY_STEPS: dict[str, Any] = {"client.epochs": None, "client.steps": 5}
BY_WHOLE_BATCHES: dict[str, Any] = {"client.epochs": 2, "client.batch_size": 100, "client.drop_last": True}


@pytest.mark.parametrize(
    ("options", "unused"),
    [
        ({}, BY_EPOCHS),
        ({"strategy.weights": "uniform"}, BY_STEPS),
        ({"client.keep_optimizer": True, "client.lr_decay": 0.9}, BY_WHOLE_BATCHES),
        ({"client.optimizer": "adam", "client.momentum": 0.0, "client.keep_optimizer": True}, BY_EPOCHS),
        ({"client.weight_decay": 0.1, "client.clip_norm": 0.5}, BY_STEPS),
    ],
    ids=["plain", "uniform", "kept momentum", "adam", "decay and clipping"],
)
def test_fedsgd_is_fedavg_with_one_epoch_of_one_batch_bit_for_bit(
    options: dict[str, Any], unused: dict[str, Any], tmp_path: Path
) -> None:
    one = {"client.epochs": 1, "client.steps": None, "client.batch_size": None}
    fedsgd = drive(configure(("strategy=fedsgd",), {**options, **unused}), tmp_path)
    fedavg = drive(configure(("strategy=fedavg",), {**options, **one}), tmp_path)
    assert fedsgd.params_sha256 == fedavg.params_sha256
    assert fedsgd.driver.progress.totals["steps"] == 3 * 3  # rounds, clients


@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_fedsgd_is_gradient_descent_on_the_weighted_objective(weights: str, tmp_path: Path) -> None:
    # However many steps are configured, x' = x - lr sum p_i a_i (x - c_i), which stands still at the minimiser only.
    sizes = [1, 5, 2, 7, 1, 3, 4, 2]
    p = torch.tensor([[float(n) if weights == "examples" else 1.0] for n in sizes], dtype=torch.float64)
    p, x = p / p.sum(), torch.tensor(START, dtype=torch.float64)
    for _ in range(3):
        x = x - 0.2 * (p * A * (x - C)).sum(0)
    options = {"sizes": sizes, "client__lr": 0.2, "client__steps": 4, "strategy__weights": weights}
    torch.testing.assert_close(run("fedsgd", tmp_path, rounds=3, **options).w, x, rtol=1e-13, atol=1e-13)
    found = run("fedsgd", tmp_path, rounds=120, **options).w
    torch.testing.assert_close(found, (p * A * C).sum(0) / (p * A).sum(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("given", ["client.epochs=5", "+client.steps=2", "client.batch_size=null"])
def test_fedsgd_refuses_settings_without_effect(given: str) -> None:
    config = configure(("strategy=fedsgd",))
    build(config)  # defaults are nobody's wish
    with pytest.raises(ConfigError, match=re.escape(f"{given} has no effect with strategy=FedSGD")):
        build(config, [given])
    build(configure(("strategy=fedavg",)), [given])


# --- degenerate cases on digits ---------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_degenerate_cases_are_fedavg_bit_for_bit(weights: str, tmp_path: Path) -> None:
    # Six rounds, three of seven clients in each, momentum that survives between visits, partial last batches.
    values = {"rounds": 6, "client.epochs": 2, "client.keep_optimizer": True}
    own: dict[str, dict[str, Any]] = {
        "fedprox": {"strategy.mu": 0.0, "strategy.weights": weights},
        "fedavgm": {"strategy.beta": 0.0, "strategy.weights": weights},
        "scaffold": {"strategy.control": 0.0, "strategy.weights": weights},
    }
    if weights == "uniform":
        own["feddyn"] = {"strategy.alpha": 0.0, "strategy.dual": "off"}
    fedavg = drive(configure(("strategy=fedavg",), {**values, "strategy.weights": weights}), tmp_path)
    for strategy, options in own.items():
        found = drive(configure((f"strategy={strategy}",), {**values, **options}), tmp_path)
        assert found.params_sha256 == fedavg.params_sha256, strategy


def test_feddyn_without_duals_is_fedprox_bit_for_bit(tmp_path: Path) -> None:
    values = {"rounds": 3}
    dyn = drive(configure(("strategy=feddyn",), {**values, "strategy.alpha": 0.3, "strategy.dual": "off"}), tmp_path)
    prox_values = {**values, "strategy.mu": 0.3, "strategy.weights": "uniform"}
    prox = drive(configure(("strategy=fedprox",), prox_values), tmp_path)
    assert dyn.params_sha256 == prox.params_sha256


def test_feddyn_with_duals_moves_twice_as_far_as_fedavg_in_round_one(tmp_path: Path) -> None:
    # h does not depend on alpha: at alpha = 0 the mean dual is the mean update, and the server adds both.
    values = {"rounds": 1, "participation": NO_CLIENTS_LEFT_OUT, "precision": "float64"}
    dyn = drive(configure(("strategy=feddyn",), {**values, "strategy.alpha": 0.0}), tmp_path)
    avg = drive(configure(("strategy=fedavg",), {**values, **FEDAVG_UNIFORM}), tmp_path)
    start = build(configure(("strategy=fedavg",), values)).program.network.initial
    assert float((avg.w - start).abs().max()) > 1e-2
    torch.testing.assert_close(dyn.w - start, 2 * (avg.w - start), rtol=1e-12, atol=1e-14)


def test_fedavg_equals_a_plain_pytorch_federation(tmp_path: Path) -> None:
    # Three clients, two rounds, torch.optim.SGD on ordinary modules; the server's mean in float64.
    values = {"partition.num_clients": 3, "participation": NO_CLIENTS_LEFT_OUT, "rounds": 2, "client.momentum": 0.5}
    config = configure((), values)
    exp = build(config)
    w, n = exp.program.network.initial, exp.program.clients.sizes()
    streams = [batches(0, c, int(n[c]), 64) for c in range(3)]
    for _ in range(2):
        total = torch.zeros(len(w), dtype=torch.float64)
        for c in range(3):
            module, (x, y) = module_of(exp, w), examples_of(exp, c)
            optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.5)
            for _ in range(-(-int(n[c]) // 64)):
                rows = next(streams[c])
                optimizer.zero_grad()
                F.cross_entropy(module(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            total += int(n[c]) * (flat(module).double() - w.double())
        w = (w.double() + total / int(n.sum())).float()
    torch.testing.assert_close(drive(config, tmp_path).w, w, rtol=0, atol=1e-7)


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "key", "value", "needed"),
    [
        ("fedavg", "weights", "median", "examples or uniform"),
        ("fedprox", "mu", -0.1, ">= 0"),
        ("fedprox", "mu", float("nan"), "finite"),
        ("fedprox", "mu", "a", "a number"),
        ("fedavgm", "beta", 1.0, r"in \[0, 1\)"),
        ("fedavgm", "server_lr", 0.0, "> 0"),
        ("fedadam", "tau", 0.0, "> 0"),
        ("fedadam", "beta2", 1.5, r"in \[0, 1\)"),
        ("fedadam", "beta1", -0.1, r"in \[0, 1\)"),
        ("fedyogi", "tau", 0.0, "> 0"),
        ("fedyogi", "beta2", 1.0, r"in \[0, 1\)"),
        ("fedyogi", "beta1", 1.0, r"in \[0, 1\)"),
        ("fedyogi", "server_lr", -1.0, "> 0"),
        ("fedadagrad", "tau", -1e-3, "> 0"),
        ("fedadagrad", "beta1", 1.0, r"in \[0, 1\)"),
        ("fedadagrad", "server_lr", 0.0, "> 0"),
        ("fedadagrad", "weights", "equal", "examples or uniform"),
        ("fedsgd", "weights", 1, "text"),
        ("scaffold", "control", -1.0, ">= 0"),
        ("feddyn", "alpha", -1.0, ">= 0"),
        ("feddyn", "dual", "some", "all, active or off"),
    ],
)
def test_impossible_options_are_refused(strategy: str, key: str, value: Any, needed: str) -> None:
    with pytest.raises(ConfigError, match=rf"strategy\.{key} must be {needed}"):
        build(configure((f"strategy={strategy}",), {f"strategy.{key}": value}))


# --- the pages --------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("strategy", sorted(p.stem for p in (ROOT / "conf" / "strategy").glob("*.yaml")))
def test_a_method_s_page_agrees_with_its_module_and_config(strategy: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{strategy}.md").read_text(encoding="utf-8")
    config = configure((f"strategy={strategy}",))["strategy"]
    module = importlib.import_module(config["_target_"].rpartition(".")[0]).__doc__ or ""
    table = re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", page, re.MULTILINE)
    assert {k: yaml.safe_load(v) for k, v in table} == {k: v for k, v in config.items() if k != "_target_"}
    assert re.findall(r"arxiv\.org/abs/[\d.]+\d|doi\.org/[\w./-]+\w", module)[0] in page
    section = page.split("## Departures")[1].split("## ")[0]
    assert len(re.findall(r"^\d\. ", section, re.MULTILINE)) == len(re.findall(r"^ {4}\d\. ", module, re.MULTILINE))
    assert ("None known" in section) == ("Departures: none known" in module)
