"""FedSpeed's mathematics: the dual identity on a network, closed forms, the released code, what every option does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim import random
from fedsim.clients.batch import Batch
from fedsim.clients.local import Local
from fedsim.clients.visit import Memory
from fedsim.data import Dataset, Shard, Split
from fedsim.errors import ConfigError
from fedsim.experiment import Experiment, build
from fedsim.run import Driver
from fedsim.strategies.fedspeed import FedSpeed
from fedsim.strategy import ClientHalf, Grad
from fedsim.vector import Layout
from tests.cli import Fedsim
from tests.helpers import (
    FixedClients,
    Run,
    batches,
    configure,
    drive,
    examples_of,
    flat,
    local_of,
    module_of,
    quadratics,
)

ALL = {"_target_": "fedsim.clients.participation.All"}
PURE = {"strategy.rho": 0.0, "strategy.clip": "none"}  # FedDyn

# Eight clients that disagree: in each of three coordinates curvatures span [0.5, 3], and minimisers both signs.
A = torch.stack([torch.linspace(0.5, 3.0, 8, dtype=torch.float64).roll(k) for k in (0, 3, 6)], 1)
C = torch.stack([torch.linspace(-3, 4, 8), torch.linspace(5, -2, 8), torch.linspace(-1, 2, 8).roll(2)], 1).double()
START = [4.0, -3.0, 0.5]
OPTIMUM = (A * C).sum(0) / A.sum(0)
STEPS, LR = 10, 0.05
# Steps that get to rest in few rounds; all clients together, for time.
QUICK = {"client__steps": 3, "client__lr": 0.2, "strategy__mu": 2.0, "client__batching": 8}


@pytest.fixture(autouse=True)
def little_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Driver, "_draw", lambda *_: None)  # most of the time of a small run
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for what is done here with plain PyTorch; a run sets its own
    yield
    torch.set_num_threads(threads)


def some(count: int) -> dict[str, Any]:
    return {"_target_": "fedsim.clients.participation.Fixed", "clients_per_round": count}


def run(tmp_path: Path, **values: Any) -> Run:
    """A run on the eight quadratic clients; dots in keys are written as double underscores."""
    options = {"client__steps": STEPS, "client__lr": LR, **values}
    return drive(configure(("strategy=fedspeed",), quadratics(A.tolist(), C.tolist(), START, **options)), tmp_path)


def digits(tmp_path: Path, strategy: str = "fedspeed", **values: Any) -> Run:
    """A run on seven unequal clients, three of them per round; dots in keys are written as double underscores."""
    options = {k.replace("__", "."): v for k, v in values.items()}
    return drive(configure((f"strategy={strategy}",), options), tmp_path)


def cohort(exp: Experiment, round_num: int) -> list[int]:
    rng = random.numpy_generator(exp.program.seed, "participation", round_num, 0)
    return exp.participation.sample(len(exp.program.clients), rng)


# --- what is asked of the gradient ------------------------------------------------------------------------

NOTES: list[tuple[int, int, Tensor, list[Tensor]]] = []


@pytest.fixture
def notes() -> list[tuple[int, int, Tensor, list[Tensor]]]:
    """Every step's client, round, examples, and the points at which the gradient was asked for."""
    NOTES.clear()
    return NOTES


@dataclass(frozen=True)
class Points(ClientHalf):
    """A recipe that notes where gradients are taken."""

    def batch(self, batch: Batch, local: Local) -> Batch:
        NOTES.append((local.clients[0], local.round, batch.index[0], []))
        return batch

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        NOTES[-1][-1].append(w[0].clone())
        return grad(w)


POINTS = {"points": {"_target_": "tests.test_fedspeed.Points"}}


def doubles(exp: Experiment, client: int) -> tuple[Tensor, Tensor]:
    """A client's inputs, normalised in float64, and labels."""
    shard, data = exp.program.shard(client), exp.program.dataset
    return (shard.x[shard.rows].double() / 255 - data.mean[0]) / data.std[0], shard.y[shard.rows]


def gradient(module: nn.Module, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The mean loss's gradient at ``w``, ``[d]``, with plain PyTorch."""
    torch.nn.utils.vector_to_parameters(w, module.parameters())
    loss = F.cross_entropy(module(x), y)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(module.parameters()))])


@pytest.mark.parametrize(
    ("dual", "perturbation", "alpha", "rho"),
    [("all", "normalised", 1.0, 0.3), ("active", "normalised", 1.0, 0.3), ("all", "raw", 0.6, 0.4)],
)
def test_dual_identity_on_a_network(
    dual: str,
    perturbation: str,
    alpha: float,
    rho: float,
    tmp_path: Path,
    notes: list[tuple[int, int, Tensor, list[Tensor]]],
) -> None:
    # Check 1, with minibatches, unequal clients, three of seven per round. The paper's dual ghat and the amended model
    # follow from the gradients g_k = (1 - alpha) grad(w_k) + alpha grad(w_k + e) + kappa w_k along the path; these are
    # taken with plain PyTorch at the iterates that the run visited. With lam = 1 / mu,
    # gamma_k = eta / lam (1 - eta / lam)^(K-1-k) and Gamma their sum:
    #   ghat' = (1 - Gamma) ghat + sum gamma_k g_k,   xhat = x - 2 lam sum gamma_k g_k + lam (2 Gamma - 1) ghat.
    mu, lr, kappa = 0.4, 0.1, 0.01
    done = digits(
        tmp_path,
        precision="float64",
        recipe=POINTS,
        rounds=4,
        client__momentum=0.0,
        client__lr=lr,
        client__weight_decay=kappa,
        strategy__mu=mu,
        strategy__rho=rho,
        strategy__alpha=alpha,
        strategy__perturbation=perturbation,
        strategy__clip="none",
        strategy__dual=dual,
    )
    exp, lam = done.driver.exp, 1 / mu
    module, x = module_of(exp), exp.program.network.initial
    ghat, again = torch.zeros(7, len(x), dtype=torch.float64), 0
    for r in range(1, 5):
        who = cohort(exp, r)
        again += r > 1 and bool((ghat[who] != 0).any())
        moved, amended = [], []
        for i in who:
            data, labels = doubles(exp, i)
            steps = [(rows, points) for client, number, rows, points in notes if (client, number) == (i, r)]
            torch.testing.assert_close(steps[0][1][0], x, rtol=0, atol=1e-10)
            weighted, total = torch.zeros_like(x), 0.0
            for k, (rows, points) in enumerate(steps):
                w = points[0]
                g1 = gradient(module, w, data[rows], labels[rows])
                e = rho * (g1 if perturbation == "raw" else g1 / (g1.norm() + 1e-7))
                g2 = gradient(module, w + e, data[rows], labels[rows])
                gamma = lr / lam * (1 - lr / lam) ** (len(steps) - 1 - k)
                weighted, total = weighted + gamma * ((1 - alpha) * g1 + alpha * g2 + kappa * w), total + gamma
            assert total == pytest.approx(1 - (1 - lr / lam) ** len(steps), abs=1e-14)
            new = (1 - total) * ghat[i] + weighted
            amended.append(x - 2 * lam * weighted + lam * (2 * total - 1) * ghat[i])
            moved.append(-lam * (new - ghat[i]))
            ghat[i] = new
        mean_moved = torch.stack(moved).mean(0)
        x = torch.stack(amended).mean(0) if dual == "active" else x + mean_moved - lam * ghat.mean(0)
    assert again > 0, "nobody came twice"
    torch.testing.assert_close(done.w, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(-mu * done.rows("strategy.h"), ghat[done.memory.clients()], rtol=0, atol=1e-10)
    assert float((done.w - exp.program.network.initial).norm()) > 0.5


def test_the_perturbation_has_the_length_rho_over_all_tensors_together(
    tmp_path: Path, notes: list[tuple[int, int, Tensor, list[Tensor]]]
) -> None:
    # Check 7, first half. Were it taken tensor by tensor, it would be rho times the root of their number.
    digits(tmp_path, recipe=POINTS, precision="float64", strategy__rho=0.25)
    assert len(notes) > 20
    for _, _, _, points in notes:
        assert len(points) == 2
        assert float((points[1] - points[0]).norm()) == pytest.approx(0.25, rel=1e-6)


def test_the_iterate_is_the_same_bits_after_the_second_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Check 7, second half: adding e and taking it away again would not do this in float32.
    original, compared = FedSpeed.direction, list[bool]()

    def direction(self: FedSpeed, w: Tensor, grad: Grad, local: Local) -> Tensor:
        before = w.clone()
        out = original(self, w, grad, local)
        compared.append(torch.equal(w, before))
        return out

    monkeypatch.setattr(FedSpeed, "direction", direction)
    digits(tmp_path, strategy__rho=0.3)
    assert len(compared) > 20
    assert all(compared)


@dataclass(frozen=True)
class Noise(ClientHalf):
    """A recipe that adds noise to the inputs, another in every call."""

    def batch(self, batch: Batch, local: Local) -> Batch:
        batch.x = batch.x + torch.randn(batch.x.shape, dtype=torch.float64).to(batch.x)
        return batch


@pytest.mark.parametrize("model", [{}, {"model": {"_target_": "tests.helpers.Dropped", "weights": None}}])
def test_both_gradients_see_the_same_examples_noise_and_dropout(model: dict[str, Any], tmp_path: Path) -> None:
    # At a perturbation of nothing both gradients are one, however they are mixed: FedDyn's.
    values: dict[str, Any] = {
        **model,
        "precision": "float64",
        "data.augment": ["flip"] if not model else [],
        "recipe": {"noise": {"_target_": "tests.test_fedspeed.Noise"}},
    }
    almost = digits(tmp_path, **values, strategy__rho=1e-13, strategy__alpha=0.5, strategy__clip="none")
    feddyn = digits(tmp_path, "feddyn", **values)
    torch.testing.assert_close(almost.w, feddyn.w, rtol=0, atol=1e-9)


# --- one client by hand -----------------------------------------------------------------------------------


def visit(
    a: float, c: float, x: float, h: float, tmp_path: Path, *, lr: float, steps: int, **options: Any
) -> tuple[float, float]:
    """The local model and the new dual of one visit that starts at x with the dual h, one-dimensional."""
    own = {f"strategy__{k}": v for k, v in options.items()}
    values = quadratics([[a]], [[c]], [x], client__lr=lr, client__steps=steps, **own)
    exp = build(configure(("strategy=fedspeed",), values))
    local = local_of(exp, memory={"strategy.h": torch.tensor([h], dtype=torch.float64)})
    w = local.train(local.start)
    exp.program.strategy.finish(w, local)
    return float(w), float(local.memory.h)


@pytest.mark.parametrize(
    ("a", "c", "mu", "lr", "steps", "rho", "alpha", "x", "h", "published"),
    [
        (0.8, 2.0, 0.1, 0.1, 7, 0.3, 0.6, 1.0, -0.4, (1.49616304, 1.59232609)),
        (1.0, 0.0, 0.1, 0.1, 1, 0.0, 1.0, 1.0, 0.0, (0.9, 0.8)),
        (1.0, 0.0, 0.1, 0.1, 2, 0.0, 1.0, 1.0, 0.0, (0.811, 0.622)),
        (2.0, -1.5, 0.7, 0.15, 5, 0.4, 1.0, 0.5, 1.2, None),
        (2.0, -1.5, 0.0, 0.15, 5, 0.4, 0.25, 0.5, 1.2, None),
    ],
)
def test_raw_perturbation_on_a_parabola_has_its_closed_form(
    a: float,
    c: float,
    mu: float,
    lr: float,
    steps: int,
    rho: float,
    alpha: float,
    x: float,
    h: float,
    published: tuple[float, float] | None,
    tmp_path: Path,
) -> None:
    # Check 2: the curvature becomes a' = a (1 + alpha rho a); w_K = s + (1 - eta (a' + mu))^K (x - s) with
    # s = (a' c - mu h + mu x) / (a' + mu); the amended model is w_K + h'.
    options = {"mu": mu, "rho": rho, "alpha": alpha, "perturbation": "raw", "clip": "none"}
    w, new = visit(a, c, x, h, tmp_path, lr=lr, steps=steps, **options)
    curved = a * (1 + alpha * rho * a)
    s = (curved * c - mu * h + mu * x) / (curved + mu)
    expected = s + (1 - lr * (curved + mu)) ** steps * (x - s)
    assert w == pytest.approx(expected, abs=1e-13)
    assert new == pytest.approx(h + expected - x, abs=1e-13)
    if published:
        assert (w, w + new) == pytest.approx(published, abs=1e-8)


# Five clients side by side in three dimensions: short and long gradients, one of length 0, duals of both signs.
SIDE = {
    "a": [[1.0, 2.0, 0.5], [0.1, 0.2, 0.3], [3.0, 1.0, 4.0], [1.0, 1.0, 1.0], [0.5, 0.25, 2.0]],
    "c": [[1.0, -2.0, 3.0], [0.5, 0.25, -1.0], [-5.0, 4.0, 2.0], [0.7, -0.3, 0.2], [0.0, 9.0, -1.0]],
    "w": [[0.5, 1.0, -1.0], [0.4, 0.5, -0.8], [1.0, -1.0, 0.5], [0.7, -0.3, 0.2], [0.3, 8.0, 1.0]],
    "x": [[0.3, 0.8, -2.0], [0.1, 0.2, -0.5], [2.0, -3.0, 1.0], [0.2, 0.1, 0.9], [-1.0, 6.0, 2.0]],
    "h": [[0.2, -0.4, 1.0], [0.0, 0.0, 0.0], [-1.0, 2.0, 0.5], [0.3, 0.6, -0.9], [1.5, -0.5, 0.25]],
}


def by_hand(client: int, o: FedSpeed) -> list[float]:
    """The direction of one client of `SIDE`, number by number."""
    a, c, w, x, h = (SIDE[k][client] for k in ("a", "c", "w", "x", "h"))

    def length(v: Sequence[float]) -> float:
        return math.sqrt(sum(s * s for s in v))

    def shorter(v: list[float]) -> list[float]:
        factor = min(1.0, o.clip_norm / (length(v) + 1e-6))
        return [factor * s for s in v]

    g1 = [p * (q - r) for p, q, r in zip(a, w, c, strict=True)]
    scale = o.rho / (length(g1) + 1e-7) if o.perturbation == "normalised" else o.rho
    g2 = [p * (q + scale * s - r) for p, q, r, s in zip(a, w, c, g1, strict=True)]
    g = [(1 - o.alpha) * p + o.alpha * q for p, q in zip(g1, g2, strict=True)]
    if o.clip == "official":
        u = [p + o.mu * (q - r) for p, q, r in zip(g, h, x, strict=True)]
        return [p + o.mu * q for p, q in zip(shorter(u), w, strict=True)]
    g = shorter(g) if o.clip == "grad" else g
    return [p + o.mu * (q + r - s) for p, q, r, s in zip(g, h, w, x, strict=True)]


def side_by_side(o: FedSpeed) -> Tensor:
    """The directions of the clients of `SIDE`, computed together."""
    a, c, w, x, h = (torch.tensor(SIDE[k], dtype=torch.float64) for k in ("a", "c", "w", "x", "h"))
    local: Any = SimpleNamespace(start=x, memory=Memory({"h": h}))
    return o.direction(w, lambda at, batch=None, half=None: a * (at - c), local)


@pytest.mark.parametrize("perturbation", ["normalised", "raw"])
@pytest.mark.parametrize("clip", ["grad", "official", "none"])
@pytest.mark.parametrize(("alpha", "rho"), [(1.0, 0.1), (0.3, 0.7), (0.0, 0.7), (1.0, 0.0)])
@pytest.mark.parametrize(("mu", "clip_norm"), [(0.1, 2.0), (0.8, 2.0), (0.8, 4.0), (0.0, 2.0)])
def test_every_option_of_the_direction_is_its_formula_client_by_client(
    perturbation: str, clip: str, alpha: float, rho: float, mu: float, clip_norm: float
) -> None:
    # Norms and factors are each client's own, though all are computed together (a pitfall under vmap).
    o = FedSpeed(mu=mu, rho=rho, alpha=alpha, perturbation=perturbation, clip=clip, clip_norm=clip_norm)
    expected = torch.tensor([by_hand(i, o) for i in range(5)], dtype=torch.float64)
    torch.testing.assert_close(side_by_side(o), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "option",
    [
        {"mu": 0.3},
        {"rho": 0.2},
        {"alpha": 0.5},
        {"perturbation": "raw"},
        {"clip": "official"},
        {"clip": "none"},
        {"clip_norm": 3.0},
    ],
)
def test_every_option_of_the_direction_changes_it(option: dict[str, Any]) -> None:
    base: dict[str, Any] = {"clip_norm": 2.0}
    assert not torch.equal(side_by_side(FedSpeed(**{**base, **option})), side_by_side(FedSpeed(**base)))


def test_the_norm_of_a_gradient_is_that_of_the_data_loss_before_the_dual() -> None:
    # Clip modes differ in what they bound: with a dual of length 10 a gradient of length 1 is left alone by `grad`, and
    # the sum that `official` bounds is not.
    w = torch.zeros(1, 2, dtype=torch.float64)
    local: Any = SimpleNamespace(start=w, memory=Memory({"h": torch.tensor([[0.0, 10.0]], dtype=torch.float64)}))

    def grad(at: Tensor, batch: Any = None, half: Any = None) -> Tensor:
        return torch.tensor([[1.0, 0.0]], dtype=torch.float64)

    own = FedSpeed(mu=1.0, rho=0.0, clip="grad", clip_norm=2.0).direction(w, grad, local)
    assert own.tolist() == [[1.0, 10.0]]
    released = FedSpeed(mu=1.0, rho=0.0, clip="official", clip_norm=2.0).direction(w, grad, local)
    assert float(released.norm()) == pytest.approx(2.0, rel=1e-6)


# --- where it goes ----------------------------------------------------------------------------------------


def test_without_perturbation_it_reaches_the_minimiser_and_duals_the_gradients_there(tmp_path: Path) -> None:
    # Check 3. FedAvg stays 0.15 away from the minimiser of these clients (test_strategies.py).
    done = run(tmp_path, rounds=65, strategy__rho=0.0, strategy__clip="none", **QUICK)
    torch.testing.assert_close(done.w, OPTIMUM, rtol=0, atol=1e-12)
    torch.testing.assert_close(-2 * done.rows("strategy.h"), A * (OPTIMUM - C), rtol=0, atol=1e-12)
    torch.testing.assert_close(done.rows("strategy.h").sum(0), torch.zeros(3).double(), rtol=0, atol=1e-12)


def test_rest_under_clipping_is_where_the_clipped_gradients_add_up_to_nothing(tmp_path: Path) -> None:
    # One client's gradient at the minimiser is longer than 10: then the bound that is on by default moves the fixed
    # point. -mu h_i is the clipped gradient.
    done = run(tmp_path, rounds=65, strategy__rho=0.0, **QUICK)
    g = A * (done.w - C)
    norms = g.norm(dim=1, keepdim=True)
    clipped = g * (10 / (norms + 1e-6)).clamp(max=1)
    assert int((norms > 10).sum()) == 1
    torch.testing.assert_close(-2 * done.rows("strategy.h"), clipped, rtol=0, atol=1e-11)
    torch.testing.assert_close(clipped.sum(0), torch.zeros(3).double(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("rho", [0.01, 0.1])
def test_what_a_perturbation_leaves_is_proportional_to_its_length(rho: float, tmp_path: Path) -> None:
    # Check 3. At rest every client stands still at x, so that a_i (x + rho s_i - c_i) + mu h_i = 0 with s_i the sign of
    # x - c_i, and the h_i add up to 0: x = x* - rho sum a_i s_i / sum a_i.
    a, c = [0.5, 3.0, 1.0, 2.0, 1.5], [-3.0, 4.0, 6.0, -2.0, 3.0]
    best = sum(p * q for p, q in zip(a, c, strict=True)) / sum(a)
    signs = [1.0 if best > q else -1.0 for q in c]
    error = rho * sum(p * s for p, s in zip(a, signs, strict=True)) / sum(a)
    options = {"strategy__rho": rho, "strategy__clip": "none", **QUICK}
    values = quadratics([[p] for p in a], [[q] for q in c], [5.0], rounds=65, **options)
    found = float(drive(configure(("strategy=fedspeed",), values), tmp_path).w)
    assert found - best == pytest.approx(-error, abs=1e-6 * rho)  # the 1e-7 beside the norm
    assert abs(error) > 0.3 * rho


def test_rest_is_where_the_perturbed_gradients_add_up_to_nothing(tmp_path: Path) -> None:
    # Check 3, in three dimensions: sum a_i (x + rho u_i - c_i) = 0 with u_i the direction of client i's gradient at x.
    rho = 0.1
    x = run(tmp_path, rounds=65, strategy__rho=rho, strategy__clip="none", **QUICK).w
    g = A * (x - C)
    u = g / (g.norm(dim=1, keepdim=True) + 1e-7)
    torch.testing.assert_close((A * (x + rho * u - C)).sum(0), torch.zeros(3).double(), rtol=0, atol=1e-11)
    assert 1e-3 < float((x - OPTIMUM).abs().max()) < 0.1


def test_means_over_all_and_over_the_active_agree_when_all_are_active(tmp_path: Path) -> None:
    # Check 5, on unequal clients and minibatches.
    options: dict[str, Any] = {"participation": ALL, "precision": "float64", "rounds": 4}
    one = digits(tmp_path, **options)
    other = digits(tmp_path, **options, strategy__dual="active")
    torch.testing.assert_close(one.w, other.w, rtol=1e-12, atol=1e-12)
    assert float((one.w - one.driver.exp.program.network.initial).abs().max()) > 0.1


def test_with_half_of_the_clients_only_the_mean_over_all_converges(tmp_path: Path) -> None:
    # Check 5. Neither a smaller step nor more rounds would help the other: its fixed point differs in every round.
    options = {"participation": some(4), "rounds": 140, "strategy__rho": 0.0, "strategy__clip": "none", **QUICK}
    torch.testing.assert_close(run(tmp_path, **options).w, OPTIMUM, rtol=0, atol=1e-12)
    stalled = run(tmp_path, **{**options, "rounds": 40}, strategy__dual="active")
    assert float((stalled.w - OPTIMUM).abs().max()) > 0.1


def test_with_a_quarter_of_the_clients_the_mean_over_the_active_ends_far_away(tmp_path: Path) -> None:
    # Check 5, at mu = 0.1: errors of 4 and more, beside an optimum of all clients at most 1.7 from 0.
    own = {"strategy__mu": 0.1, "strategy__rho": 0.0, "strategy__clip": "none"}
    options = {"participation": some(2), "rounds": 60, "client__batching": 8, **own}
    stalled = run(tmp_path, **options, strategy__dual="active")
    assert float((stalled.w - OPTIMUM).abs().max()) > 4.0
    assert float((run(tmp_path, **options).w - OPTIMUM).abs().max()) < 2.0


# --- degenerate cases -------------------------------------------------------------------------------------

TRAINED: dict[str, dict[str, Any]] = {
    "momentum": {"client__momentum": 0.9, "client__keep_optimizer": True},
    "adam": {"client__optimizer": "adam", "client__lr": 0.01, "client__momentum": 0.0},
    "bounded": {"client__clip_norm": 0.3, "client__weight_decay": 0.01, "client__lr_decay": 0.9},
    "three_together": {"client__batching": 3, "precision": "float64"},
}


@pytest.mark.parametrize(
    ("trained", "dual"), [("momentum", "all"), ("adam", "active"), ("bounded", "off"), ("three_together", "all")]
)
def test_without_perturbation_it_is_feddyn_bit_for_bit(trained: str, dual: str, tmp_path: Path) -> None:
    # Check 4: one function. Parameters, server state and every client's dual.
    shared = {**TRAINED[trained], "rounds": 4, "strategy__dual": dual}
    speed = digits(tmp_path, **shared, strategy__mu=0.3, strategy__rho=0.0, strategy__clip="none")
    feddyn = digits(tmp_path, "feddyn", **shared, strategy__alpha=0.3)
    assert speed.state_sha256 == feddyn.state_sha256
    rows = [done.memory.get(done.memory.clients()) for done in (speed, feddyn)]
    assert all(("strategy.h" in row) == (dual != "off") for row in rows[0] + rows[1])
    if dual != "off":
        assert torch.equal(speed.rows("strategy.h"), feddyn.rows("strategy.h"))
    other = digits(tmp_path, **shared, strategy__mu=0.3, strategy__clip="none")
    assert other.params_sha256 != feddyn.params_sha256


@pytest.mark.parametrize("own", [{"rho": 0.0}, {"alpha": 0.0}, {"rho": 0.0, "perturbation": "raw"}])
def test_a_clip_that_never_binds_leaves_feddyn_s_bits(own: dict[str, Any], tmp_path: Path) -> None:
    # Check 4, with the clipping that is on by default: these gradients are shorter than 10.
    options = {f"strategy__{k}": v for k, v in own.items()}
    assert digits(tmp_path, **options).params_sha256 == digits(tmp_path, "feddyn").params_sha256


def test_with_duals_frozen_it_is_fedavg_fedsam_or_fedprox_bit_for_bit(tmp_path: Path) -> None:
    # Check 4.
    frozen: dict[str, Any] = {"rounds": 4, "strategy__dual": "off", "strategy__clip": "none"}
    uniform: dict[str, Any] = {"rounds": 4, "strategy__weights": "uniform"}
    pairs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "fedavg": ({"strategy__mu": 0.0, "strategy__rho": 0.0}, {}),
        "fedsam": ({"strategy__mu": 0.0, "strategy__rho": 0.2}, {"strategy__rho": 0.2}),
        "fedprox": ({"strategy__mu": 0.4, "strategy__rho": 0.0}, {"strategy__mu": 0.4}),
    }
    for parent, (own, theirs) in pairs.items():
        found, wanted = digits(tmp_path, **frozen, **own), digits(tmp_path, parent, **uniform, **theirs)
        assert found.params_sha256 == wanted.params_sha256, parent
        assert not any("strategy.h" in row for row in found.memory.get(found.memory.clients()))


@pytest.mark.parametrize(("rho", "parent"), [(0.0, "fedavg"), (0.2, "fedsam")])
def test_with_duals_and_no_mu_round_one_moves_exactly_twice_as_far(rho: float, parent: str, tmp_path: Path) -> None:
    # Check 4: mu = 0 is not FedAvg, for the duals do not depend on mu.
    values: dict[str, Any] = {"rounds": 1, "participation": ALL, "precision": "float64"}
    speed = digits(tmp_path, **values, strategy__mu=0.0, strategy__rho=rho, strategy__clip="none")
    own: dict[str, Any] = {"strategy__rho": rho} if rho else {}
    single = digits(tmp_path, parent, **values, strategy__weights="uniform", **own)
    start = single.driver.exp.program.network.initial
    assert float((single.w - start).abs().max()) > 1e-2
    torch.testing.assert_close(speed.w - start, 2 * (single.w - start), rtol=1e-12, atol=1e-14)


# --- bookkeeping ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dual", ["all", "active"])
def test_the_server_keeps_the_sum_of_all_duals(dual: str, tmp_path: Path) -> None:
    # Check 6.
    for rounds in (1, 6):
        done = run(tmp_path, participation=some(3), rounds=rounds, strategy__dual=dual, strategy__mu=0.5)
        torch.testing.assert_close(done.state.H, done.rows("strategy.h").sum(0), rtol=1e-12, atol=1e-12)
        assert float(done.state.H.abs().max()) > 0.1


def test_duals_of_clients_that_take_no_part_keep_their_bits(tmp_path: Path) -> None:
    # Check 6. Both runs are the same up to round 3.
    three, four = digits(tmp_path, rounds=3), digits(tmp_path, rounds=4)
    active = cohort(four.driver.exp, 4)
    resting = sorted({*three.memory.clients()} - {*active})
    assert len(resting) >= 2
    assert torch.equal(three.rows("strategy.h", resting), four.rows("strategy.h", resting))
    for i in {*three.memory.clients()} & {*active}:
        assert not torch.equal(three.rows("strategy.h", [i]), four.rows("strategy.h", [i]))


@pytest.mark.parametrize("dual", ["all", "active"])
@pytest.mark.parametrize("perturbation", ["normalised", "raw"])
def test_rounds_of_unequal_clients_with_momentum_by_hand(dual: str, perturbation: str, tmp_path: Path) -> None:
    # Sizes 0 to 7: every client of a cohort counts alike, one without examples stays where it is. The learning rate
    # falls per round, not per step; momentum survives between visits; gradients are clipped, duals are not.
    sizes, mu, rho, alpha, bound, decay = [1, 5, 0, 2, 1, 7, 4, 3], 0.4, 0.3, 0.6, 4.0, 0.8
    done = run(
        tmp_path,
        sizes=sizes,
        participation=some(3),
        rounds=5,
        client__momentum=0.5,
        client__keep_optimizer=True,
        client__lr_decay=decay,
        strategy__mu=mu,
        strategy__rho=rho,
        strategy__alpha=alpha,
        strategy__perturbation=perturbation,
        strategy__clip_norm=bound,
        strategy__dual=dual,
    )
    x, h, m = torch.tensor(START, dtype=torch.float64), torch.zeros_like(A), torch.zeros_like(A)
    seen: set[int] = set()
    clipped = 0
    for r in range(1, 6):
        who = cohort(done.driver.exp, r)
        seen |= {*who}
        deltas = []
        for i in who:
            y = x.clone()
            for _ in range(STEPS if sizes[i] else 0):
                g1 = A[i] * (y - C[i])
                e = rho * (g1 / (g1.norm() + 1e-7) if perturbation == "normalised" else g1)
                g = (1 - alpha) * g1 + alpha * A[i] * (y + e - C[i])
                clipped += float(g.norm()) > bound
                g = g * min(1.0, bound / (float(g.norm()) + 1e-6))
                m[i] = 0.5 * m[i] + g + mu * (h[i] + y - x)
                y = y - LR * decay ** (r - 1) * m[i]
            deltas.append(y - x)
            h[i] += y - x
        x = x + torch.stack(deltas).mean(0) + (h.mean(0) if dual == "all" else h[who].mean(0))
    assert 2 in seen, "the client without examples never came"
    assert clipped > 5
    torch.testing.assert_close(done.w, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(done.rows("strategy.h"), h[done.memory.clients()], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "vectors"),
    [
        ({}, 1),
        ({"dual": "active"}, 1),
        ({"dual": "off"}, 1),
        ({"dual_kept": "server"}, 2),
        ({"dual_kept": "server", "dual": "active"}, 2),
        ({"dual_kept": "server", "dual": "off"}, 1),
    ],
)
def test_bytes_of_every_option(options: dict[str, Any], vectors: int, tmp_path: Path) -> None:
    # Down the model, and a dual that the server keeps and that is not 0 for ever; up one vector, whatever the server
    # makes of it. 4 bytes per number, three clients per round.
    done = digits(tmp_path, rounds=2, **{f"strategy__{k}": v for k, v in options.items()})
    d = done.driver.exp.program.layout.d
    for record in done.records:
        assert record["clients"] == 3
        assert record["bytes_down"] == 3 * vectors * 4 * d
        assert record["bytes_up"] == 3 * 4 * d


@dataclass(frozen=True)
class FrozenWeights(ClientHalf):
    """Trains the biases alone."""

    def parts(self, layout: Layout) -> dict[str, str]:
        return {"*weight": "frozen"}


def test_a_dual_that_the_server_keeps_covers_the_trained_parameters_alone(tmp_path: Path) -> None:
    frozen: dict[str, Any] = {"recipe": {"frozen": {"_target_": "tests.test_fedspeed.FrozenWeights"}}}
    done = digits(tmp_path, rounds=2, strategy__dual_kept="server", **frozen)
    shared = sum(s.numel() for n, s in done.driver.exp.program.layout.shapes.items() if not n.endswith("weight"))
    assert [r["bytes_down"] for r in done.records] == [3 * 2 * 4 * shared] * 2


@pytest.mark.parametrize(
    ("options", "gradients"), [({}, 2), ({"alpha": 0.5}, 2), ({"alpha": 0.0}, 1), ({"rho": 0.0}, 1)]
)
def test_a_step_takes_as_many_gradients_as_it_needs(options: dict[str, Any], gradients: int, tmp_path: Path) -> None:
    totals = digits(tmp_path, rounds=1, **{f"strategy__{k}": v for k, v in options.items()}).driver.progress.totals
    assert totals["gradients"] == gradients * totals["steps"] > 0


def test_who_keeps_the_duals_changes_bytes_and_nothing_else(tmp_path: Path) -> None:
    one, other = digits(tmp_path), digits(tmp_path, strategy__dual_kept="server")
    assert one.state_sha256 == other.state_sha256
    assert one.driver.progress.totals["bytes_down"] < other.driver.progress.totals["bytes_down"]


# --- the released code ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blobs:
    """Clients with as many examples each, of three classes around three centres; labels are skewed between them.

    Attributes:
        num_clients: Size of the population.
        size: Examples of each.
    """

    num_clients: int = 6
    size: int = 20

    def load(self, seed: int) -> Dataset:
        g = torch.Generator().manual_seed(5)
        y = torch.stack([(torch.rand(self.size, generator=g) * (1 + i % 3)).long() for i in range(self.num_clients)])
        x = 1.5 * F.one_hot(y, 3) + torch.randn(*y.shape, 3, generator=g)
        split = Split(x.reshape(-1, 3), y.reshape(-1))
        rows = torch.arange(y.numel()).view_as(y)
        shards = tuple(Shard(split.x, split.y, r) for r in rows)
        return Dataset("blobs", split, split, clients=FixedClients(shards), class_names=("a", "b", "c"))


def released(exp: Experiment, rounds: int, **o: float) -> tuple[Tensor, Tensor, list[float]]:
    """The released client and server in plain PyTorch, float32: duals in a table at the server.

    A client descends ``loss(w + e) + <w, mu (h_i - x)>`` with torch's own clipping and SGD, whose weight decay is
    ``mu + kappa``; the server takes the mean local model and the mean of its whole table.

    Returns:
        The global model, the table of duals, and the norms that were bounded.
    """
    clients = range(len(exp.program.clients))
    x = exp.program.network.initial.clone()
    table, norms = torch.zeros(len(clients), len(x)), list[float]()
    streams = [batches(exp.program.seed, i, 20, 8) for i in clients]
    for r in range(1, rounds + 1):
        who, arrived = cohort(exp, r), []
        for i in who:
            module, (data, labels) = module_of(exp, x), examples_of(exp, i)
            params = list(module.parameters())
            rate = o["lr"] * o["decay"] ** (r - 1)
            optimizer = torch.optim.SGD(params, lr=rate, weight_decay=o["mu"] + o["kappa"])
            pull = o["mu"] * (table[i] - x)
            for _ in range(6):  # two epochs of three minibatches
                rows = next(streams[i])
                first = torch.autograd.grad(F.cross_entropy(module(data[rows]), labels[rows]), params)
                norm = torch.stack([g.norm() for g in first]).norm()
                before = [p.detach().clone() for p in params]
                with torch.no_grad():
                    for p, g in zip(params, first, strict=True):
                        p.add_(o["rho"] * g / (norm + 1e-7))
                second = torch.autograd.grad(F.cross_entropy(module(data[rows]), labels[rows]), params)
                with torch.no_grad():
                    for p, old in zip(params, before, strict=True):
                        p.copy_(old)
                optimizer.zero_grad()
                (torch.cat([p.reshape(-1) for p in params]) * pull).sum().backward()  # type: ignore[no-untyped-call]
                for p, g in zip(params, second, strict=True):
                    assert p.grad is not None
                    p.grad += g
                norms.append(float(torch.nn.utils.clip_grad_norm_(params, o["bound"])))
                optimizer.step()
            local = flat(module)
            table[i] += local - x
            arrived.append(local)
        x = torch.stack(arrived).mean(0) + table.mean(0)
    return x, table, norms


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize(("bound", "active"), [(10.0, False), (0.3, True)])
def test_clip_official_reproduces_the_released_client_and_server(
    share: float, bound: float, active: bool, tmp_path: Path
) -> None:
    # Check 8: 66 parameters, six rounds, every client by chance or all of them, 2e-5 in float32.
    o = {"lr": 0.1, "decay": 0.95, "mu": 0.1, "kappa": 1e-3, "rho": 0.1, "bound": bound}
    values = {
        "data": {"_target_": "tests.test_fedspeed.Blobs", "augment": [], "validation": 0.0},
        "model.hidden": [9],
        "participation": {"_target_": "fedsim.clients.participation.Bernoulli", "probability": share},
        "rounds": 6,
        "client.epochs": 2,
        "client.batch_size": 8,
        "client.momentum": 0.0,
        "client.lr": o["lr"],
        "client.lr_decay": o["decay"],
        "client.weight_decay": o["kappa"],
        "strategy.mu": o["mu"],
        "strategy.rho": o["rho"],
        "strategy.clip": "official",
        "strategy.clip_norm": bound,
    }
    done = drive(configure(("strategy=fedspeed",), values), tmp_path)
    exp = done.driver.exp
    x, table, norms = released(exp, 6, **o)
    assert len(x) == 66
    assert (sum(n > bound for n in norms) > len(norms) / 2) if active else (max(norms) < bound)
    assert share == 1.0 or len({len(cohort(exp, r)) for r in range(1, 7)}) > 1
    torch.testing.assert_close(done.w, x, rtol=0, atol=2e-5)
    torch.testing.assert_close(done.rows("strategy.h"), table[done.memory.clients()], rtol=0, atol=2e-5)
    assert float((x - exp.program.network.initial).abs().max()) > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"clip": "official", "clip_norm": 0.5},
        {"clip": "grad", "clip_norm": 0.5, "dual": "active"},
        {"clip": "none", "perturbation": "raw", "alpha": 0.6},
    ],
)
def test_clients_trained_together_have_the_numbers_of_each_alone(options: dict[str, Any], tmp_path: Path) -> None:
    # Check 8: unequal clients, so that lanes are at different places; both rounds, memory included.
    values = {
        "precision": "float64",
        "participation": ALL,
        "rounds": 2,
        **{f"strategy__{k}": v for k, v in options.items()},
    }
    alone = digits(tmp_path, **values, client__batching="off")
    together = digits(tmp_path, **values, client__batching=3)
    torch.testing.assert_close(together.w, alone.w, rtol=0, atol=1e-10)
    torch.testing.assert_close(together.rows("strategy.h"), alone.rows("strategy.h"), rtol=0, atol=1e-10)
    assert together.state_sha256 != alone.state_sha256, "nobody was trained together"


# --- recipes ----------------------------------------------------------------------------------------------


def test_a_recipe_s_gradient_is_the_one_that_is_perturbed(tmp_path: Path) -> None:
    # A loss that is twice as steep is that of curvatures twice as large, in both gradients.
    options = {"rounds": 3, "client__steps": 4, "client__lr": LR, "strategy__perturbation": "raw", "strategy__mu": 0.3}
    steep = {**options, "recipe": {"steeper": {"_target_": "tests.helpers.Steeper", "factor": 2.0}}}
    runs = [
        drive(configure(("strategy=fedspeed",), quadratics(a.tolist(), C.tolist(), START, **values)), tmp_path).w
        for a, values in ((A, steep), (2 * A, options))
    ]
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-12, atol=1e-12)


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rho", -0.1, "strategy.rho must be >= 0, got -0.1"),
        ("rho", float("inf"), "strategy.rho must be finite, got inf"),
        ("rho", None, "strategy.rho must be a number, got None"),
        ("mu", -1.0, "strategy.mu must be >= 0, got -1.0"),
        ("mu", float("nan"), "strategy.mu must be finite, got nan"),
        ("mu", "a", "strategy.mu must be a number, got 'a'"),
        ("alpha", 1.5, "strategy.alpha must be in [0, 1], got 1.5"),
        ("alpha", -0.5, "strategy.alpha must be in [0, 1], got -0.5"),
        ("perturbation", "normal", "strategy.perturbation must be normalised or raw, got 'normal'"),
        ("clip", "yes", "strategy.clip must be grad, official or none, got 'yes'"),
        ("clip_norm", 0.0, "strategy.clip_norm must be > 0, got 0.0"),
        ("clip_norm", None, "strategy.clip_norm must be a number, got None"),
        ("dual", "some", "strategy.dual must be all, active or off, got 'some'"),
        ("dual_kept", "nobody", "strategy.dual_kept must be client or server, got 'nobody'"),
    ],
)
def test_impossible_options_are_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(configure(("strategy=fedspeed",), {f"strategy.{key}": value}))
    assert str(caught.value) == message


def test_a_bad_option_ends_in_one_line(fedsim: Fedsim) -> None:
    outcome = fedsim("strategy=fedspeed", "strategy.rho=-1")
    assert outcome.status == 2
    assert outcome.err.splitlines() == ["fedsim: strategy.rho must be >= 0, got -1.0"]


@pytest.mark.parametrize("buffers", ["mean", "local", "frozen"])
def test_a_model_with_batch_norm_is_refused(buffers: str) -> None:
    model = {"_target_": "tests.helpers.Normed", "weights": None}
    with pytest.raises(ConfigError, match=r"batch norms .* the model has 1 \(norm.*model=resnet18_gn"):
        build(configure(("strategy=fedspeed",), {"model": model, "client.buffers": buffers}))


def test_clipping_twice_is_refused() -> None:
    both = {"client.clip_norm": 1.0}
    for clip in ("grad", "official"):
        with pytest.raises(ConfigError, match=rf"strategy.clip={clip} and client.clip_norm=1 would clip twice: set"):
            build(configure(("strategy=fedspeed",), {**both, "strategy.clip": clip}))
    build(configure(("strategy=fedspeed",), {**both, "strategy.clip": "none"}))
