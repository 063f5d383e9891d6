"""The floor: what the matrix products and convolutions of a local step take by themselves, and a step's share of them.

    python -m benchmarks.floor [--cases logreg mlp lenet5 cnn] [--device cuda]

For every linear and convolutional layer, at the shapes of a step, times the forward product and the two of the backward
pass (one for the first layer, whose inputs need no gradient), each in a loop by itself. Their sum is the floor: no loop
over these steps is faster on this machine with these kernels, unless it computes clients together, for which kernels of
other shapes may be faster. Beside it a step of fedsim's whole round, one by one and batched, and the floor's share of
it. Activations, pooling, the loss and its softmax are no part of the floor.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common import CASES, Row, ratio, rows_of
from benchmarks.sides import NO_BATCHING, ONE_BY_ONE, inline

SQUARE = 1024  # rows of the matrices of the machine's own rate
PRODUCTS = "products of a step"
LOOP_S = 0.02  # seconds of one measurement, at least


@dataclass(frozen=True)
class Product:
    """A matrix product or convolution.

    Attributes:
        name: Of the layer, and the direction.
        flops: Floating-point operations, two for a multiplication with its addition.
        run: Does it.
    """

    name: str
    flops: int
    run: Callable[[], object]


def products(module: nn.Module, x: Tensor) -> list[Product]:
    """All of a training step on the inputs ``x``, ``[B, ...]``, in the order of the forward pass."""
    seen: list[tuple[str, nn.Module, Tensor]] = []
    layers = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    hooks = [
        m.register_forward_pre_hook(lambda _, given, n=n, m=m: seen.append((n, m, given[0].detach())))
        for n, m in layers.items()
    ]
    with torch.no_grad():
        module(x)
    for hook in hooks:
        hook.remove()
    return [p for i, (name, layer, given) in enumerate(seen) for p in _of(name, layer, given, first=i == 0)]


def _of(name: str, layer: nn.Module, x: Tensor, first: bool) -> list[Product]:
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    w = layer.weight.detach()
    g = torch.randn_like(layer(x).detach())
    flops = 2 * g.numel() * w[0].numel()
    if isinstance(layer, nn.Linear):
        x, g = x.flatten(0, -2), g.flatten(0, -2)
        backward = [Product(f"{name} weight", flops, lambda: g.t() @ x)]
        backward += [] if first else [Product(f"{name} input", flops, lambda: g @ w)]
        return [Product(f"{name} forward", flops, lambda: x @ w.t()), *backward]
    own = (layer.stride, layer.padding, layer.dilation)
    forward = Product(f"{name} forward", flops, lambda: torch.conv2d(x, w, None, *own, layer.groups))  # type: ignore[arg-type]
    mask = (not first, True, False)
    backwards = torch.ops.aten.convolution_backward
    run = lambda: backwards(g, x, w, None, *own, False, (0, 0), layer.groups, mask)  # noqa: E731
    return [forward, Product(f"{name} backward", flops * sum(mask), run)]


def seconds_of(run: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of a call, in a loop of them."""

    def loop(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    loop(2)
    calls = max(1, int(LOOP_S / max(loop(3) / 3, 1e-7)))
    return loop(calls) / calls


def measure(name: str, repeats: int = 5, device: str = "cpu") -> list[Row]:
    """The floor of a case's step, and what a step takes."""
    case = CASES[name]
    common = [*case.overrides(), f"engine.device={device}"]
    sides = {"one by one": [*common, *ONE_BY_ONE]}
    if not NO_BATCHING:
        sides["batched"] = [*common, f"client.batching={case.clients}"]
    with tempfile.TemporaryDirectory() as folder:
        made = {side: inline(given, Path(folder, side)) for side, given in sides.items()}
        program = made["one by one"].exp.program
        x = program.inputs(program.dataset.train.x[: case.batch].to(program.device))
        parts = products(program.fresh_module(), x)
        flops, steps = sum(p.flops for p in parts), case.clients * case.steps
        seconds: dict[str, list[float]] = {side: [] for side in (PRODUCTS, *made)}
        for turn in range(repeats + 1):
            took = {PRODUCTS: sum(seconds_of(p.run, device) for p in parts)}
            took |= {side: federation.round()[0] / steps for side, federation in made.items()}
            for side in took if turn else ():
                seconds[side].append(took[side])
    notes = {side: _rate(flops, statistics.median(values)) for side, values in seconds.items()}
    for side in made:
        notes[side] = f"{1 / ratio(seconds, side, PRODUCTS):.0%} of it products, {notes[side]}"
    return rows_of("f", name, seconds, PRODUCTS, notes=notes, unit="step")


def _rate(flops: int, seconds: float) -> str:
    return f"{flops / 1e6:.2f} MFLOP, {flops / seconds / 1e9:.1f} GFLOP/s"


def machine_rate(repeats: int = 5, device: str = "cpu") -> list[Row]:
    """The machine's rate for a large square product."""
    a = torch.randn(SQUARE, SQUARE, device=device)
    took = [seconds_of(lambda: a @ a, device) for _ in range(repeats)]
    found = {"machine": took}
    rate = {"machine": _rate(2 * SQUARE**3, statistics.median(took))}
    return rows_of("f", f"{SQUARE} x {SQUARE} product", found, "machine", notes=rate, unit="product")


def main(arguments: Sequence[str] | None = None) -> None:
    from benchmarks.table import show

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["logreg", "mlp", "lenet5", "cnn"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    o = parser.parse_args(arguments)
    if o.device == "cpu":
        torch.set_num_threads(1)
    show(machine_rate(o.repeats, o.device))
    for name in o.cases:
        show(measure(name, o.repeats, o.device))


if __name__ == "__main__":
    main()
