"""Local optimizers equal torch.optim in bits, lane by lane, and their state survives a save and load."""

import functools
import io
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor

from fedsim.clients.ops import clip, unit
from fedsim.clients.optimizers import SGD, Adagrad, Adam, AdamW, Optimizer, TorchOptimizer
from fedsim.errors import ConfigError

SHAPES = [torch.Size(s) for s in [(7, 3), (5,), (), (2, 3, 5), (129,), (1, 17), (0, 4), (31, 11)]]
SIZE = sum(shape.numel() for shape in SHAPES)
STEPS = 25

CASES: list[tuple[Optimizer, Callable[..., torch.optim.Optimizer]]] = [
    (SGD(), functools.partial(torch.optim.SGD)),
    (SGD(weight_decay=0.01), functools.partial(torch.optim.SGD, weight_decay=0.01)),
    (SGD(momentum=0.9), functools.partial(torch.optim.SGD, momentum=0.9)),
    (SGD(momentum=0.9, nesterov=True), functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)),
    (SGD(momentum=0.7, dampening=0.3), functools.partial(torch.optim.SGD, momentum=0.7, dampening=0.3)),
    (SGD(momentum=0.9, weight_decay=0.1), functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1)),
    (
        SGD(momentum=0.9, nesterov=True, weight_decay=0.1),
        functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    (
        SGD(momentum=0.9, dampening=1.0, weight_decay=0.1),
        functools.partial(torch.optim.SGD, momentum=0.9, dampening=1.0, weight_decay=0.1),
    ),
    (Adam(), functools.partial(torch.optim.Adam)),
    (Adam((0.8, 0.95), 1e-3, 0.1), functools.partial(torch.optim.Adam, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)),
    (Adam(amsgrad=True), functools.partial(torch.optim.Adam, amsgrad=True)),
    (
        Adam(betas=(0.0, 0.5), weight_decay=0.1, amsgrad=True),
        functools.partial(torch.optim.Adam, betas=(0.0, 0.5), weight_decay=0.1, amsgrad=True),
    ),
    (AdamW(), functools.partial(torch.optim.AdamW)),
    (AdamW(weight_decay=0.0), functools.partial(torch.optim.AdamW, weight_decay=0.0)),
    (AdamW(weight_decay=0.3, amsgrad=True), functools.partial(torch.optim.AdamW, weight_decay=0.3, amsgrad=True)),
    (Adagrad(), functools.partial(torch.optim.Adagrad)),
    (Adagrad(lr_decay=0.3), functools.partial(torch.optim.Adagrad, lr_decay=0.3)),
    (Adagrad(initial_accumulator_value=0.1), functools.partial(torch.optim.Adagrad, initial_accumulator_value=0.1)),
    (
        Adagrad(lr_decay=0.01, weight_decay=0.1, initial_accumulator_value=1e-3, eps=1e-4),
        functools.partial(
            torch.optim.Adagrad, lr_decay=0.01, weight_decay=0.1, initial_accumulator_value=1e-3, eps=1e-4
        ),
    ),
]
IDS = [repr(ours) for ours, _ in CASES]
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
every_case = pytest.mark.parametrize(("ours", "theirs"), CASES, ids=IDS)


def start(dtype: torch.dtype, clients: int = 1, seed: int = 0) -> tuple[Tensor, list[Tensor], list[float]]:
    """Parameters, a direction per step that does not shrink (and holds zeros of both signs), and a learning rate."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(clients, SIZE, generator=rng, dtype=dtype)
    directions = [torch.randn(clients, SIZE, generator=rng, dtype=dtype) for _ in range(STEPS)]
    for direction in directions:
        direction[:, ::7] = 0.0
        direction[:, 1::7] = -0.0
    return w, directions, [0.1 / (1 + i) for i in range(STEPS)]


def pieces(flat: Tensor) -> list[Tensor]:
    sizes = [shape.numel() for shape in SHAPES]
    return [x.reshape(s).clone() for x, s in zip(flat[0].split(sizes), SHAPES, strict=True)]  # type: ignore[no-untyped-call]


def run_torch(
    factory: Callable[..., torch.optim.Optimizer], w: Tensor, directions: list[Tensor], rates: list[float]
) -> Tensor:
    params = [torch.nn.Parameter(piece) for piece in pieces(w)]
    optimizer = factory(params, lr=rates[0])
    for direction, rate in zip(directions, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        for param, piece in zip(params, pieces(direction), strict=True):
            param.grad = piece
        optimizer.step()
    return torch.cat([param.detach().reshape(-1) for param in params])[None]


def bits(x: Tensor) -> Tensor:
    """For comparisons that tell 0.0 from -0.0."""
    return x.contiguous().view(torch.uint8)


def saved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Through a file and back."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Tensor] = torch.load(buffer, weights_only=True)
    return loaded


@both_dtypes
@every_case
def test_one_client_equals_torch_optim_bit_for_bit(ours: Optimizer, theirs: Any, dtype: torch.dtype) -> None:
    w, directions, rates = start(dtype)
    expected = run_torch(theirs, w, directions, rates)
    state = ours.init(w)
    stepped = w
    for direction, rate in zip(directions, rates, strict=True):
        before = direction.clone()
        stepped = ours.step(stepped, direction, state, rate)
        assert torch.equal(bits(direction), bits(before))
    assert torch.equal(bits(stepped), bits(expected))


@given(step=st.integers(1, STEPS - 1), case=st.integers(0, len(CASES) - 1))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_saved_state_continues_the_stream_exactly(step: int, case: int) -> None:
    ours, theirs = CASES[case]
    w, directions, rates = start(torch.float32)
    expected = run_torch(theirs, w, directions, rates)
    state = ours.init(w)
    for i, (direction, rate) in enumerate(zip(directions, rates, strict=True)):
        if i == step:
            state = saved(state)
        w = ours.step(w, direction, state, rate)
    assert torch.equal(bits(w), bits(expected))


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float lr", "lr per client"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
@every_case
def test_each_lane_equals_its_own_run(
    ours: Optimizer, theirs: Any, dtype: torch.dtype, tolerance: float, as_tensor: bool
) -> None:
    # Lane 2 joins with a fresh state when the others have made 5 steps: a stream position per lane.
    w, directions, _ = start(dtype, clients=3)
    factors = torch.tensor([[1.0], [0.3], [2.0]], dtype=torch.float64) if as_tensor else torch.ones(3, 1)
    expected = []
    for k in range(3):
        first = 5 if k == 2 else 0
        rates = [0.05 * factors[k].item()] * (STEPS - first)
        expected.append(run_torch(theirs, w[k : k + 1], [d[k : k + 1] for d in directions[first:]], rates))
    lr: Any = 0.05 * factors if as_tensor else 0.05
    early, late = w[:2].clone(), w[2:].clone()
    state = ours.init(early)
    for d in directions[:5]:
        early = ours.step(early, d[:2], state, lr[:2] if as_tensor else lr)
    fresh = ours.init(late)
    state = {name: torch.cat([rows, fresh[name]]) for name, rows in state.items()}
    together = torch.cat([early, late])
    for d in directions[5:]:
        together = ours.step(together, d, state, lr)
    torch.testing.assert_close(together, torch.cat(expected), rtol=tolerance, atol=tolerance)


@every_case
def test_a_lane_does_not_see_its_neighbours(ours: Optimizer, theirs: Any) -> None:
    w, directions, _ = start(torch.float32, clients=3)
    lr = torch.tensor([[0.1], [0.2], [0.3]])
    results = []
    for poison in (0.0, math.nan):
        lanes = w.clone()
        lanes[1] += poison
        state = ours.init(lanes)
        for d in directions[:5]:
            noisy = d.clone()
            noisy[1] += poison
            lanes = ours.step(lanes, noisy, state, lr)
        results.append(lanes)
    assert torch.equal(results[0][[0, 2]], results[1][[0, 2]])
    assert results[1][1].isnan().all()


@every_case
def test_finished_lanes_are_left_alone_by_stepping_a_prefix(ours: Optimizer, theirs: Any) -> None:
    w, directions, _ = start(torch.float64, clients=3)
    state = ours.init(w)
    for d in directions[:3]:
        ours.step(w, d, state, 0.1)
    frozen, frozen_state = w[2].clone(), {name: rows[2].clone() for name, rows in state.items()}
    moving = w[:2].clone()
    for d in directions[3:6]:
        ours.step(w[:2], d[:2], {name: rows[:2] for name, rows in state.items()}, 0.1)
    assert torch.equal(w[2], frozen)
    assert all(torch.equal(state[name][2], rows) for name, rows in frozen_state.items())
    assert not torch.equal(w[:2], moving)
    assert all(int(count) == 6 for name, rows in state.items() if name == "step" for count in rows[:2])


@every_case
def test_state_has_the_client_axis_first(ours: Optimizer, theirs: Any) -> None:
    state = ours.init(torch.zeros(4, 9))
    assert all(rows.shape in {(4, 9), (4, 1)} for rows in state.values())


def test_sgd_with_momentum_matches_the_closed_form_of_a_constant_direction() -> None:
    # b_k = (1 - m^k) / (1 - m), hence w_n = w_0 - lr sum_k b_k.
    m, lr, n = 0.5, 0.1, 8
    w, d = torch.tensor([[1.0, -2.0]], dtype=torch.float64), torch.tensor([[3.0, -1.0]], dtype=torch.float64)
    expected = w - lr * d * sum((1 - m**k) / (1 - m) for k in range(1, n + 1))
    optimizer = SGD(momentum=m)
    state = optimizer.init(w)
    for _ in range(n):
        optimizer.step(w, d, state, lr)
    torch.testing.assert_close(w, expected)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_adagrad_matches_the_closed_form_of_a_constant_direction(decay: float) -> None:
    # The sum is a + (t + 1) d^2 at step t, hence w_n = w_0 - lr sum_t d / ((1 + t decay) sqrt(a + (t + 1) d^2)).
    a, lr, n = 0.25, 0.1, 8
    w, d = torch.tensor([[1.0, -2.0]], dtype=torch.float64), torch.tensor([[3.0, -1.0]], dtype=torch.float64)
    expected = w - lr * sum(d / ((1 + t * decay) * (a + (t + 1) * d**2) ** 0.5) for t in range(n))
    optimizer = Adagrad(lr_decay=decay, initial_accumulator_value=a, eps=0.0)
    state = optimizer.init(w)
    for _ in range(n):
        optimizer.step(w, d, state, lr)
    torch.testing.assert_close(w, expected)


def test_learning_rate_must_have_one_row_per_client() -> None:
    w = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"shape \[3, 1\], got \[3\]"):
        SGD().step(w, w, {}, torch.ones(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(momentum=1.0), r"client\.momentum must be a number in \[0, 1\), got 1\.0"),
        (lambda: SGD(momentum=math.nan), r"client\.momentum"),
        (lambda: SGD(momentum="0.9"), r"client\.momentum .* got '0\.9'"),  # type: ignore[arg-type]
        (lambda: SGD(dampening=-0.1), r"client\.dampening"),
        (lambda: SGD(weight_decay=math.inf), r"client\.weight_decay must be a number in \[0, inf\), got inf"),
        (lambda: SGD(nesterov=True), r"client\.nesterov=true needs client\.momentum > 0"),
        (lambda: SGD(momentum=0.9, dampening=0.1, nesterov=True), r"dampening=0\.1"),
        (lambda: SGD(nesterov=1), r"client\.nesterov must be true or false"),  # type: ignore[arg-type]
        (lambda: Adam(betas=(0.9, 1.0)), r"client\.betas\[1\]"),
        (lambda: Adam(betas=(0.9,)), r"client\.betas must be two numbers"),  # type: ignore[arg-type]
        (lambda: Adam(betas=0.9), r"client\.betas must be two numbers"),  # type: ignore[arg-type]
        (lambda: Adam(eps=-1e-8), r"client\.eps"),
        (lambda: AdamW(weight_decay=-1), r"client\.weight_decay"),
        (lambda: AdamW(amsgrad=None), r"client\.amsgrad"),  # type: ignore[arg-type]
        (lambda: Adagrad(lr_decay=-0.1), r"client\.lr_decay must be a number in \[0, inf\), got -0\.1"),
        (lambda: Adagrad(initial_accumulator_value=-1), r"client\.initial_accumulator_value"),
        (lambda: Adagrad(eps=math.nan), r"client\.eps"),
        (lambda: Adagrad(weight_decay=-1), r"client\.weight_decay"),
    ],
)
def test_impossible_settings_are_refused_by_config_key(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_optimizers_are_built_from_configs() -> None:
    ours = {"_target_": "fedsim.clients.optimizers.Adam", "betas": [0.9, 0.99]}
    assert instantiate(OmegaConf.create(ours)) == Adam(betas=(0.9, 0.99))
    theirs = {"_target_": "torch.optim.RMSprop", "_partial_": True, "alpha": 0.9}
    assert TorchOptimizer(instantiate(OmegaConf.create(theirs)), SHAPES).name == "torch.optim.rmsprop.RMSprop"


def test_our_optimizers_do_not_build_a_torch_optimizer() -> None:
    # torch.optim's first use imports torch._dynamo, which takes a second.
    code = """
import sys, torch
from fedsim.clients.optimizers import SGD, Adagrad, Adam
before = set(sys.modules)
w = torch.ones(1, 3)
for optimizer in (SGD(momentum=0.9), Adam(), Adagrad(lr_decay=0.1)):
    optimizer.step(w, w.clone(), optimizer.init(w), 0.1)
assert not {m for m in set(sys.modules) - before if m.startswith("torch")}, set(sys.modules) - before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class Counting(torch.optim.Optimizer):
    """Keeps Python numbers per parameter and in its group, new tensors each step, and spoils its gradients."""

    def __init__(self, params: Any, lr: float, bonus: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "bonus": bonus, "warm": False})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    state["count"] = state.get("count", 0) + 1
                    state["total"] = state.get("total", torch.zeros(())) + p.grad.abs().sum()
                    p.grad.mul_(1 + state["count"] + group["bonus"])
                    p.sub_(p.grad / (1 + state["total"]), alpha=group["lr"])
                group["bonus"] += 0.1
                group["warm"] = True


ADAPTED: list[Callable[..., torch.optim.Optimizer]] = [
    functools.partial(torch.optim.RMSprop, alpha=0.9, momentum=0.5, centered=True),
    functools.partial(torch.optim.Adagrad, lr_decay=0.1, initial_accumulator_value=0.1),
    functools.partial(torch.optim.Adam, amsgrad=True),
    functools.partial(torch.optim.SGD),
    functools.partial(torch.optim.SGD, momentum=0.9, dampening=0.1),
    functools.partial(torch.optim.NAdam),
    functools.partial(torch.optim.ASGD),
    functools.partial(torch.optim.Rprop),
    torch.optim.Adadelta,
    Counting,
]
every_adapted = pytest.mark.parametrize("factory", ADAPTED, ids=lambda f: getattr(f, "func", f).__name__)


@every_adapted
def test_adapter_equals_torch_optim_bit_for_bit(factory: Any) -> None:
    w, directions, rates = start(torch.float32)
    expected = run_torch(factory, w, directions, rates)
    adapter = TorchOptimizer(factory, SHAPES)
    state = adapter.init(w)
    for direction, rate in zip(directions, rates, strict=True):
        before = direction.clone()
        w = adapter.step(w, direction, state, rate)
        assert torch.equal(direction, before)
    assert torch.equal(bits(w), bits(expected))


@pytest.mark.parametrize("stop", [1, 5])
@every_adapted
def test_adapter_state_continues_in_a_fresh_adapter(factory: Any, stop: int) -> None:
    w, directions, rates = start(torch.float32)
    expected = run_torch(factory, w, directions, rates)
    adapter = TorchOptimizer(factory, SHAPES)
    state = adapter.init(w)
    for direction, rate in zip(directions[:stop], rates[:stop], strict=True):
        w = adapter.step(w, direction, state, rate)
    assert all(rows.shape[0] == 1 for rows in state.values())
    adapter, state, w = TorchOptimizer(factory, SHAPES), saved(state), w.clone()
    for direction, rate in zip(directions[stop:], rates[stop:], strict=True):
        w = adapter.step(w, direction, state, rate)
    assert torch.equal(bits(w), bits(expected))


@every_adapted
def test_one_adapter_serves_interleaved_clients_without_mixing_them(factory: Any) -> None:
    adapter = TorchOptimizer(factory, SHAPES)
    runs = [start(torch.float32, seed=seed) for seed in range(3)]
    expected = [run_torch(factory, *run) for run in runs]
    states = [adapter.init(w) for w, _, _ in runs]
    for i in range(STEPS):
        for (w, directions, rates), state in zip(runs, states, strict=True):
            adapter.step(w, directions[i], state, rates[i])
    for (w, _, _), want in zip(runs, expected, strict=True):
        assert torch.equal(bits(w), bits(want))


def test_adapter_starts_a_stream_anew_from_an_empty_state() -> None:
    adapter = TorchOptimizer(functools.partial(torch.optim.SGD, momentum=0.9), SHAPES)
    w, directions, _ = start(torch.float32)
    first = w.clone()
    adapter.step(w, directions[0], adapter.init(w), 0.1)
    once = w.clone()
    w.copy_(first)  # the same memory, another visit
    adapter.step(w, directions[0], adapter.init(w), 0.1)
    assert torch.equal(w, once)


def test_adapter_travels_without_its_cache() -> None:
    adapter = TorchOptimizer(functools.partial(torch.optim.RMSprop, alpha=0.9), SHAPES)
    w, directions, _ = start(torch.float32)
    state = adapter.init(w)
    adapter.step(w, directions[0], state, 0.1)
    other, w2, state2 = pickle.loads(pickle.dumps(adapter)), w.clone(), saved(state)
    adapter.step(w, directions[1], state, 0.1)
    other.step(w2, directions[1], state2, torch.tensor([[0.1]], dtype=torch.float64))
    assert torch.equal(w, w2)


class Hoarder(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state[self.param_groups[0]["params"][0]]["history"] = [1, 2]


class Global(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["k"] = 1  # type: ignore[index]


def test_adapter_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match=r"torch\.optim\.rmsprop\.RMSprop trains clients one by one, but 2 came"):
        TorchOptimizer(torch.optim.RMSprop, SHAPES).init(torch.zeros(2, SIZE))
    with pytest.raises(ConfigError, match=r"sets lr itself; set client\.lr"):
        TorchOptimizer(functools.partial(torch.optim.RMSprop, lr=0.1), SHAPES)
    with pytest.raises(ConfigError, match="needs no closure"):
        TorchOptimizer(torch.optim.LBFGS, SHAPES)
    with pytest.raises(ValueError, match=rf"built for {SIZE} parameters, got a vector of 3"):
        TorchOptimizer(torch.optim.RMSprop, SHAPES).init(torch.zeros(1, 3))
    w = torch.zeros(1, SIZE)
    with pytest.raises(ConfigError, match="keeps 'history' as list"):
        TorchOptimizer(Hoarder, SHAPES).step(w, w.clone(), {}, 0.1)
    with pytest.raises(ConfigError, match="belongs to no parameter"):
        TorchOptimizer(Global, SHAPES).step(w, w.clone(), {}, 0.1)


@pytest.mark.parametrize("max_norm", [0.5, 1.0, 100.0])
def test_clip_equals_torch_per_client(max_norm: float) -> None:
    d = torch.randn(4, 57, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    d[3] *= 1e-3
    before = d.clone()
    clipped = clip(d, max_norm)
    assert torch.equal(d, before)
    for row, got in zip(d, clipped, strict=True):
        p = torch.nn.Parameter(torch.zeros_like(row))
        p.grad = row.clone()
        torch.nn.utils.clip_grad_norm_([p], max_norm)
        torch.testing.assert_close(got, p.grad, rtol=1e-14, atol=0)
    assert torch.equal(clipped[3], d[3])  # short enough: the same bits


def test_clip_shows_what_is_not_finite_and_refuses_a_bound_of_zero() -> None:
    assert clip(torch.tensor([[math.nan, 1.0]]), 1.0).isnan().all()
    assert clip(torch.tensor([[math.inf, 1.0]]), 1.0)[0, 0].isnan()
    with pytest.raises(ValueError, match="max_norm > 0, got 0"):
        clip(torch.ones(1, 2), 0)


def test_unit_divides_each_row_by_its_norm() -> None:
    v = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]], dtype=torch.float64)
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(unit(v, eps=0.0)[[0, 2]], expected[[0, 2]])
    torch.testing.assert_close(unit(v), expected, rtol=1e-6, atol=0)
