"""FedNova: its fixed points beside FedAvg's, and the work that it divides by against three derivations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.clients.optimizers import SGD
from fedsim.errors import ConfigError
from fedsim.experiment import build
from fedsim.strategies.fednova import FedNova, unit_step
from tests.cli import Fedsim
from tests.helpers import configure, drive, local_of, quadratics

# Eight clients that disagree in three coordinates, and make 1 to 7 steps: an epoch over batches of one.
A = torch.stack([torch.linspace(0.5, 3.0, 8, dtype=torch.float64).roll(k) for k in (0, 3, 6)], 1)
C = torch.stack([torch.linspace(-3, 4, 8), torch.linspace(5, -2, 8), torch.linspace(-1, 2, 8).roll(2)], 1).double()
START = torch.tensor([4.0, -3.0, 0.5], dtype=torch.float64)
SIZES = [1, 1, 2, 2, 3, 4, 5, 7]
TAU = torch.tensor(SIZES, dtype=torch.float64)[:, None]
LR = 0.1


def run(strategy: str, tmp_path: Path, a: Tensor = A, c: Tensor = C, **values: Any) -> Tensor:
    """The global model after a run on the quadratic clients; dots in keys are written as double underscores."""
    options = {"client__steps": None, "client__epochs": 1, "client__batch_size": 1, "client__lr": LR, "sizes": SIZES}
    values = quadratics(a.tolist(), c.tolist(), START.tolist(), **{**options, **values})
    return drive(configure((f"strategy={strategy}",), values), tmp_path).w


def shares(weights: str) -> Tensor:
    """p_i, ``[8, 1]``."""
    p = TAU if weights == "examples" else torch.ones(8, 1, dtype=torch.float64)
    return p / p.sum()


def minimiser(p: Tensor, decay: float = 0.0) -> Tensor:
    """Of ``sum p_i a_i / 2 (x - c_i)^2 + decay / 2 x^2``."""
    return (p * A * C).sum(0) / ((p * A).sum(0) + decay)


# --- where it ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_fixed_points_of_fedavg_and_fednova_match_their_closed_forms(weights: str, tmp_path: Path) -> None:
    # tau_i steps take client i from x to c_i + q_i (x - c_i), q_i = (1 - lr a_i)^tau_i: by (1 - q_i)(c_i - x).
    # FedAvg stands still where sum p_i (1 - q_i)(c_i - x) = 0, FedNova where sum p_i (1 - q_i) / tau_i (c_i - x) = 0.
    pulls = 1 - (1 - LR * A) ** TAU
    for strategy, pull in (("fedavg", pulls), ("fednova", pulls / TAU)):
        force = shares(weights) * pull
        expected = (force * C).sum(0) / force.sum(0)
        found = run(strategy, tmp_path, rounds=60, strategy__weights=weights)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weights", ["examples", "uniform"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_with_small_steps_fednova_minimises_the_objective_and_fedavg_another_one(
    decay: float, weights: str, tmp_path: Path
) -> None:
    # (1 - q_i) / (lr tau_i) goes to a_i with lr: drift vanishes, and what is left of the bias is that of unequal steps.
    # FedAvg counts client i by p_i tau_i. A large server step makes up for the small local ones.
    p = shares(weights)
    small: dict[str, Any] = {"client__lr": 1e-6, "client__weight_decay": decay, "rounds": 30}
    nova = run("fednova", tmp_path, strategy__weights=weights, strategy__server_lr=8e4, **small)
    avg = run("fedavgm", tmp_path, strategy__weights=weights, strategy__server_lr=8e4, strategy__beta=0.0, **small)
    torch.testing.assert_close(nova, minimiser(p, decay), rtol=0, atol=1e-4)
    torch.testing.assert_close(avg, minimiser(p * TAU / (p * TAU).sum(), decay), rtol=0, atol=1e-4)
    bias = avg - minimiser(p, decay)
    assert float(bias.abs().max()) > 0.25
    assert len(set(bias.sign().tolist())) == 2, "FedAvg errs in both directions"


def test_momentum_of_unequal_lengths_leaves_no_bias_either(tmp_path: Path) -> None:
    options: dict[str, Any] = {"client__momentum": 0.9, "client__lr": 1e-6, "strategy__server_lr": 2e4, "rounds": 30}
    torch.testing.assert_close(run("fednova", tmp_path, **options), minimiser(shares("examples")), rtol=0, atol=1e-4)


# --- one round --------------------------------------------------------------------------------------------

RHO, MU, GAMMA = 0.9, 1.5, 0.8


def vector(solver: str, tau: int) -> Tensor:
    """a_i as in the paper, ``[tau]``: how much each gradient counts in the displacement after tau steps."""
    k = torch.arange(tau, dtype=torch.float64)
    return {
        "sgd": torch.ones_like(k),
        "momentum": (1 - RHO ** (tau - k)) / (1 - RHO),
        "proximal": (1 - LR * MU) ** (tau - 1 - k),
        "decayed": GAMMA**k,
    }[solver]


def norm(solver: str, tau: int) -> float:
    """The paper's closed forms of ``||a_i||_1``."""
    return {
        "sgd": tau,
        "momentum": (tau - RHO * (1 - RHO**tau) / (1 - RHO)) / (1 - RHO),
        "proximal": (1 - (1 - LR * MU) ** tau) / (LR * MU),
        "decayed": (1 - GAMMA**tau) / (1 - GAMMA),
    }[solver]


SOLVERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"client__momentum": RHO},
    "proximal": {"strategy__mu": MU},
    "decayed": {"recipe": {"plan": {"_target_": "tests.helpers.Plan", "lr": [GAMMA**k for k in range(7)]}}},
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_a_round_is_the_paper_s_update(solver: str, weights: str, tmp_path: Path) -> None:
    # x' = x - tau_eff sum p_i lr d_i, d_i = G_i a_i / ||a_i||_1, with the path itself written through the vectors:
    # after k steps a client stands at x - lr sum_j a^(k)_j g_j.
    p, x = shares(weights), START
    d, norms = torch.zeros(8, 3, dtype=torch.float64), torch.zeros(8, 1, dtype=torch.float64)
    for i, tau in enumerate(TAU[:, 0].int().tolist()):
        gradients = torch.zeros(0, 3, dtype=torch.float64)
        for k in range(tau):
            y = x - LR * (vector(solver, k)[:, None] * gradients).sum(0)
            gradients = torch.cat([gradients, (A[i] * (y - C[i]))[None]])
        norms[i] = norm(solver, tau)
        assert float(vector(solver, tau).sum()) == pytest.approx(float(norms[i]), rel=1e-12)
        d[i] = (vector(solver, tau)[:, None] * gradients).sum(0) / norms[i]
    expected = x - (p * norms).sum() * LR * (p * d).sum(0)
    found = run("fednova", tmp_path, rounds=1, strategy__weights=weights, **SOLVERS[solver])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mu", [0.0, 0.8])
@pytest.mark.parametrize("nesterov", [False, True])
def test_on_linear_clients_any_solver_gives_gradient_descent(nesterov: bool, mu: float, tmp_path: Path) -> None:
    # Gradients are constant but for 1e-9 w: every d_i is client i's gradient, and a round is one step along their mean
    # of length lr tau_eff. The work of tau steps comes from the powers of the step's matrix on (x, b, 1).
    gradients = torch.stack([torch.linspace(-1, 2, 8), torch.linspace(1.5, -0.5, 8), torch.linspace(-2, 1, 8)], 1)
    flat = torch.full_like(A, 1e-9)
    rho, one = 0.9, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    b = torch.tensor([-mu, rho, 1.0], dtype=torch.float64)  # b' = rho b + 1 - mu x
    g = torch.tensor([-mu, 0.0, 1.0], dtype=torch.float64)  # 1 - mu x
    x = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64) + LR * (g + rho * b if nesterov else b)
    step = torch.stack([x, b, one])
    work = torch.stack([(torch.linalg.matrix_power(step, int(t)) @ one)[:1] for t in TAU])
    p = shares("examples")
    expected = START - (p * work).sum() * (p * gradients.double()).sum(0)
    options = {"client__momentum": rho, "client__nesterov": nesterov, "strategy__mu": mu}
    found = run("fednova", tmp_path, flat, -gradients.double() / flat, rounds=1, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


# --- the work ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.0, 0.4])
@pytest.mark.parametrize("rule", [SGD(), SGD(momentum=0.8), SGD(momentum=0.8, nesterov=True)], ids=str)
def test_the_work_is_the_sum_of_the_answers_to_single_gradients(rule: SGD, mu: float) -> None:
    # The coefficient of gradient k is how far the optimizer itself goes when all other gradients are 0.
    rates, coefficients = [0.1, 0.3, 0.05, 0.2, 0.2], []
    for k in range(len(rates)):
        w = torch.zeros(1, 1, dtype=torch.float64)
        state = rule.init(w)
        for t, lr in enumerate(rates):
            w = rule.step(w, -float(t == k) + mu * w, state, lr)
        coefficients.append(float(w))
    x, b = 0.0, 0.0
    for lr in rates:
        x, b = unit_step(x, b, lr, rule, mu)
    assert len(set(coefficients)) == len(rates) or (rule.momentum, mu) == (0, 0)
    assert x == pytest.approx(sum(coefficients), rel=1e-13)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("rho", [0.1, 0.5, 0.9, 0.99, 0.999])
def test_with_the_largest_mu_the_work_stays_above_that_of_one_step(rho: float, nesterov: bool) -> None:
    rule, x, b, seen = SGD(momentum=rho, nesterov=nesterov), 0.0, 0.0, []
    for _ in range(3000):
        x, b = unit_step(x, b, 1.0, rule, 1 - rho)
        seen.append(x)
    assert min(seen) >= 1 - 1e-12


def test_a_client_without_a_step_sends_no_update_and_no_work() -> None:
    local = local_of(build(configure(("strategy=fednova",))))
    entries = FedNova().finish(local.start, local)
    assert not entries["delta"].value.any()
    assert float(entries["work"].value) == 0


# --- reductions -------------------------------------------------------------------------------------------


def test_with_equal_steps_fednova_is_fedavg_up_to_rounding(tmp_path: Path) -> None:
    values = {"client.epochs": None, "client.steps": 7, "precision": "float64"}
    nova, avg = (drive(configure((f"strategy={s}",), values), tmp_path).w for s in ("fednova", "fedavg"))
    torch.testing.assert_close(nova, avg, rtol=1e-11, atol=1e-13)


def test_with_equal_work_of_a_power_of_two_fednova_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    values = {"client.epochs": None, "client.steps": 8, "client.lr": 0.0625, "client.momentum": 0.0}  # work: 1/2
    nova, avg = (drive(configure((f"strategy={s}",), values), tmp_path) for s in ("fednova", "fedavg"))
    assert nova.params_sha256 == avg.params_sha256


def test_without_normalising_a_proximal_term_gives_fedprox_bit_for_bit(tmp_path: Path) -> None:
    # Also with what FedNova itself refuses: nothing is divided, so nothing has to be linear.
    values = {"client.keep_optimizer": True, "client.clip_norm": 1.0, "strategy.mu": 0.3}
    nova = drive(configure(("strategy=fednova",), {**values, "strategy.normalise": False}), tmp_path)
    prox = drive(configure(("strategy=fedprox",), values), tmp_path)
    assert nova.params_sha256 == prox.params_sha256


# --- refusals ---------------------------------------------------------------------------------------------

RMSPROP = {"_target_": "torch.optim.RMSprop", "_partial_": True}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"client.optimizer": "adam", "client.momentum": 0.0}, "needs client.optimizer=sgd, got adam,"),
        ({"client.optimizer": RMSPROP, "client.momentum": 0.0}, "needs client.optimizer=sgd, got torch.optim"),
        ({"client.keep_optimizer": True}, "client.keep_optimizer=false with client.momentum=0.9"),
        ({"client.clip_norm": 2.0, "strategy.mu": 0.1}, r"client.clip_norm=null with strategy.mu=0.1, got 2:"),
        ({"strategy.mu": 2.01}, r"strategy.mu must be at most \(1 - client.momentum\) / client.lr = 2, got 2.01"),
        ({"strategy.mu": -1.0}, "strategy.mu must be >= 0, got -1.0"),
        ({"strategy.server_lr": 0.0}, "strategy.server_lr must be > 0"),
        ({"strategy.normalise": "no"}, "strategy.normalise must be true or false"),
        ({"recipe": {"masked": {"_target_": "tests.helpers.Masked"}}}, "Masked and FedNova both define `update`"),
    ],
)
def test_what_has_no_known_coefficients_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        drive(configure(("strategy=fednova",), values), tmp_path)


@pytest.mark.parametrize("values", [{"strategy.mu": 2.0}, {"client.momentum": 0.0, "client.keep_optimizer": True}])
def test_the_limits_of_what_is_refused_are_accepted(values: dict[str, Any], tmp_path: Path) -> None:
    # lr 0.05, momentum 0.9: mu = 2 is (1 - momentum) / lr, but for the last bit of 1 - 0.9. SGD alone keeps no buffer.
    assert drive(configure(("strategy=fednova",), {"rounds": 1, **values}), tmp_path).w.isfinite().all()


def test_a_refusal_is_one_line_and_status_2(fedsim: Fedsim) -> None:
    done = fedsim("strategy=fednova", "client.optimizer=adam", "rounds=1")
    assert done.status == 2
    assert done.err.splitlines()[-1].startswith("fedsim: strategy=fednova needs client.optimizer=sgd, got adam")


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_coefficients_are_negative_only_beyond_the_stated_bound(rho: float) -> None:
    # c_j is how far the visit goes when gradient j alone is -1: the recursion of the step, by hand.
    def coefficients(lr: float, mu: float, tau: int) -> list[float]:
        found = []
        for j in range(tau):
            x = b = 0.0
            for k in range(tau):
                b = rho * b + (1.0 if k == j else 0.0) - mu * x
                x += lr * b
            found.append(x)
        return found

    lr, tau = 0.05, 200
    bound = (1 - rho**0.5) ** 2 / lr
    assert min(coefficients(lr, 0.999 * bound, tau)) >= -1e-15
    assert min(coefficients(lr, 1.2 * bound, tau)) < 0
    for mu in (0.5 * bound, 1.2 * bound):
        x = b = 0.0
        for _ in range(tau):
            x, b = unit_step(x, b, lr, SGD(momentum=rho), mu)
        assert x == pytest.approx(sum(coefficients(lr, mu, tau)), rel=1e-9)
