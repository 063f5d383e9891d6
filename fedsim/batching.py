"""Which clients are trained together, and how many: ``client.batching``.

Nothing here looks at a clock: bits depend on who is trained together, so that follows from the config alone.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.clients.optimizers import TorchOptimizer
from fedsim.config import Config, num_bytes
from fedsim.data import IntArray
from fedsim.errors import ConfigError, one_line
from fedsim.network import Network
from fedsim.program import Hooks, Program, overrides
from fedsim.reduce import tensors_in
from fedsim.report.text import human_bytes
from fedsim.strategy import SERVER, ClientHalf, Strategy

log = logging.getLogger("fedsim")

# What `auto` puts together, at most. On a CPU more gains little, and leaves other workers without work.
DENSE, NARROW, CUDA = 8, 5, 64
CLIENT_HOOKS = (
    *("memory", "batch", "schedule", "loss", "direction", "update", "work", "finish", "personal", "predict"),
)


def lanes(program: Program, hooks: Hooks) -> int:
    """How many clients are trained together under these hooks, at most; 1: each alone."""
    most = program.options.batching
    if most > 1 and (why := reason(program, hooks)):
        if why not in program.told:
            log.warning("clients are trained one by one: %s", why)
            program.told.add(why)
        return 1
    return most


def reason(program: Program, hooks: Hooks) -> str:
    """Why clients cannot be trained together; empty if they can."""
    if isinstance(program.options.optimizer, TorchOptimizer):
        return "client.optimizer is a class of torch.optim, which knows one client at a time"
    for _, half in hooks.owners():
        if overrides(half, "order"):
            return f"{type(half).__name__} has an `order` of its own, which may differ in length between clients"
        if not half.batched:
            return f"{type(half).__name__} says batched = False"
    if program.network_alone is None:
        program.network_alone = _trial(program)
    return program.network_alone


def alike(program: Program, n: int, epochs: bool) -> int | None:
    """What clients must have in common to be trained together; None: this one is trained alone.

    Batch norms take in what a batch is padded with, so in every step their clients must have batches of one size.

    Args:
        program: The network and the options.
        n: The client's examples.
        epochs: Whether visits are whole epochs, so that clients stand at equal places of their data orders.
    """
    options = program.options
    if not program.network.mixes or options.buffers == "frozen":
        return 0
    size = options.batch_size or n
    return n if epochs or options.drop_last or n <= size or n % size == 0 else None


def together(
    program: Program, hooks: Hooks, planned: Mapping[int, int], sizes: IntArray, epochs: bool
) -> list[tuple[int, ...]]:
    """A cohort as leaves of the reduction tree: who is trained together.

    Groups follow from config and cohort alone, as bits follow from them: as few as possible, of about one size, of
    clients with about equally much to do.

    Args:
        program: The network and the options.
        hooks: Of the strategy or a phase.
        planned: Each client's steps, in id order.
        sizes: Examples of every client of the population.
        epochs: Whether visits are whole epochs.
    """
    most = lanes(program, hooks)
    if most == 1:
        return [(client,) for client in planned]
    n = {c: 0 if c == SERVER else int(sizes[c]) for c in planned}
    common = {c: alike(program, k, epochs) if k else None for c, k in n.items()}
    order = sorted((c for c in planned if common[c] is not None), key=lambda c: (-planned[c], -n[c], c))
    bounds = [i for i in range(1, len(order)) if common[order[i - 1]] != common[order[i]]]
    groups: list[tuple[int, ...]] = []
    for first, end in pairwise([0, *bounds, len(order)]):
        count = -(-(end - first) // most)
        edges = [first + (end - first) * i // count for i in range(count + 1)] if count else []
        groups += [tuple(order[a:b]) for a, b in pairwise(edges)]
    return groups + [(c,) for c in planned if common[c] is None]


def _trial(program: Program) -> str:
    """Tries the network with two clients; why it cannot be used so, or the empty string.

    A layer may be wrong for several clients without an error, so numbers are compared: outputs, gradients and buffers,
    in training and in evaluation, with those of one client at a time.
    """
    modules = list(program.network.module.modules())
    names = [name for name, _ in program.network.module.named_modules(remove_duplicate=False)]
    if len(names) > len(modules):
        return "the model has one module under two names"
    for m in modules:
        if isinstance(m, nn.Embedding) and (
            m.padding_idx is not None or m.scale_grad_by_freq or m.max_norm is not None
        ):
            return "an embedding with padding_idx, scale_grad_by_freq or max_norm, which torch does not batch as it is"
    why = ""
    for stacked in (True, False):
        if stacked and program.network.stack is None:
            continue
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                why = _compare(program, stacked)
        except Exception as exc:
            why = f"the model cannot be evaluated for several clients at once ({one_line(exc)[:200]})"
            if "randomness" in str(exc):
                why = "the model draws random numbers (dropout), which would be others than those of a client alone"
        if not why:
            return ""
        program.network.stack = None
    return why


def _compare(program: Program, stacked: bool) -> str:
    """What is wrong with two clients' networks as one, tried on a copy in float64; empty: nothing.

    Args:
        program: The network and the data; learns whether the network's examples see each other.
        stacked: Whether `fedsim.stacked` is tried, or vmap.
    """
    from fedsim.clients.lanes import forward

    network = Network(program.fresh_module().double())
    if not stacked:
        network.stack = None
    raw = program.inputs(program.dataset.test.x[torch.arange(6) % len(program.dataset.test)])
    x = (raw.double() if raw.is_floating_point() else raw).view(2, 3, *raw.shape[1:])
    noise = torch.randn(2, network.layout.d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = network.initial + 0.05 * noise.to(network.device)

    def buffers() -> dict[str, Tensor]:
        first = network.buffer_layout.views(network.initial_buffers.expand(2, -1))
        return {name: b.clone(memory_format=torch.contiguous_format) for name, b in first.items()}

    for training in (True, False):
        network.train(training)
        leaves = {name: view.detach().requires_grad_() for name, view in network.layout.views(w).items()}
        after, wider = buffers(), buffers()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            out = list(tensors_in(forward(network, leaves, after, x[:, :2], 2)))
            grads = torch.autograd.grad(_sum(out), list(leaves.values()), allow_unused=True)
        if slow := next((str(m.message) for m in said if "batching rule" in str(m.message)), ""):
            return f"the model has a layer that torch cannot batch ({slow.split(';')[0][:200]})"
        with torch.no_grad():
            padded = list(tensors_in(forward(network, leaves, wider, x, 2)))
        for i in (0, 1):
            own = network.initial_buffers.clone()
            network.bind_buffers(own)
            network.bind(w[i : i + 1].contiguous())
            alone = list(tensors_in(network(x[i : i + 1, :2])))
            grad = network.gradient(_sum(alone), torch.empty_like(w[:1]))[0]
            flat = [torch.zeros_like(v) if g is None else g for v, g in zip(leaves.values(), grads, strict=True)]
            pairs = [(a[0], b[i]) for a, b in zip(alone, out, strict=True)]
            pairs += [(grad, torch.cat([g[i].flatten() for g in flat]))]
            pairs += [(v, after[name][i]) for name, v in network.buffer_layout.views(own).items()]
            if not all(_close(a, b) for a, b in pairs):
                return "the model computes other numbers for several clients at once than for each alone"
        same = all(_close(a, b[:, :2] if a.shape != b.shape else b) for a, b in zip(out, padded, strict=True))
        if not same or not all(_close(after[name], wider[name]) for name in after):
            if not training:
                return "the examples of a batch see each other in evaluation"
            program.network.found_mixing = True
    return ""


def _sum(out: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.square().sum() for t in out if t.is_floating_point()]).sum()


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-7, atol=1e-9, equal_nan=True)


# --- when the experiment is built ---------------------------------------------------------------------------


def resolve(config: Config, program: Program) -> int:
    """How many clients to train together, from ``client.batching`` and ``client.memory_budget``.

    Raises:
        ConfigError: So many do not fit into the budget, or the run may leave clients out.
    """
    asked, skips = config["client"]["batching"], config["engine"]["on_failure"] == "skip"
    if asked in ("off", 1) or asked is False:
        return 1
    if asked == "auto" and (skips or (best := _best(program)) == 1):
        return 1
    each, budget = lane_bytes(program), num_bytes(config["client"]["memory_budget"])
    fit = CUDA if budget is None else budget // each
    if asked == "auto":
        return max(1, min(best, fit))
    if skips:
        raise ConfigError(
            f"client.batching={asked} cannot leave single clients out; set client.batching=off with "
            "engine.on_failure=skip"
        )
    if budget is not None and asked > fit:
        raise ConfigError(
            f"client.batching={asked} needs about {human_bytes(asked * each)}, client.memory_budget is "
            f"{config['client']['memory_budget']}: {fit} would fit ({human_bytes(each)} each); set client.batching="
            f"{'off' if fit < 2 else fit}, or raise client.memory_budget"
        )
    return 1 if _said(program, reason(program, program.hooks)) else int(asked)


def _said(program: Program, why: str) -> bool:
    if why:
        log.warning("clients are trained one by one: %s", why)
        program.told.add(why)
    return bool(why)


def _best(program: Program) -> int:
    """The rule behind ``auto``; the measurements are in docs/performance.md.

    On a CPU clients gain from company where they cannot fill the processor alone: a single linear layer on small
    batches (where the time goes to calls), and narrow convolutions (which leave its vectors half empty). Larger layers
    lose: the parameters of one client stay in the cache from step to step, those of many do not.
    """
    modules = list(program.network.module.modules())
    layers = [m for m in modules if next(m.parameters(recurse=False), None) is not None]
    convolutions = [m for m in layers if isinstance(m, nn.Conv2d)]
    dense = not convolutions and all(isinstance(m, nn.Linear) for m in layers)
    batch = program.options.batch_size or math.inf
    inputs = batch * program.dataset.test.x[0].numel()
    if dense and program.device.type == "cuda":
        best = CUDA
    elif dense and len(layers) == 1 and batch <= 64 and program.layout.d <= 100_000:
        best = DENSE
    elif (
        program.device.type == "cpu"
        and inputs <= 100_000
        and convolutions
        and program.network.stack is not None
        and max(m.out_channels for m in convolutions) <= 16
        and program.layout.d <= 200_000
    ):
        best = NARROW
    else:
        return 1
    said = all(declared(half) for _, half in program.hooks.owners())
    return best if said and not reason(program, program.hooks) else 1


def declared(half: ClientHalf) -> bool:
    """Whether every class that defines hooks of a half says that they are written for several clients."""
    kinds = [k for k in type(half).__mro__ if k not in (ClientHalf, Strategy, object)]
    return all(k.__dict__.get("batched", False) for k in kinds if any(hook in k.__dict__ for hook in CLIENT_HOOKS))


def lane_bytes(program: Program) -> int:
    """Main memory, or the device's, that one client more in a batch takes: an estimate from shapes.

    Parameters, gradients, optimizer state, differences in float64, what the client remembers of that size, and three
    times the layers' outputs for a batch (kept for the backward pass, their gradients, and working space).
    """
    network, options = program.network, program.options
    d, size = network.layout.d, program.dtype.itemsize
    probe = torch.empty(1, 1, dtype=program.dtype)
    vectors = 6 + len(options.optimizer.init(probe)) if not isinstance(options.optimizer, TorchOptimizer) else 8
    batch = options.batch_size or int(program.clients.sizes().max())
    return d * (vectors * size + 3 * 8) + 3 * batch * _outputs(program) * size


def _outputs(program: Program) -> int:
    """Numbers that all layers put out for one example, inputs included."""
    x = program.inputs(program.dataset.test.x[torch.arange(2) % len(program.dataset.test)])
    counted = [x.numel()]

    def count(module: nn.Module, args: Any, output: Any) -> None:
        counted[0] += sum(t.numel() for t in tensors_in(output))

    module = program.fresh_module().eval()
    for m in module.modules():
        if not list(m.children()):
            m.register_forward_hook(count)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        module(x)
    return -(-counted[0] // len(x))


def remedy(program: Program, clients: int) -> str:
    """What to do when there was not enough memory for so many clients."""
    if clients == 1:
        return "lower client.batch_size, or use a smaller model"
    if program.device.type == "cuda":
        free = torch.cuda.mem_get_info(program.device)[0]
    elif (meminfo := Path("/proc/meminfo")).exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    else:
        free = clients // 2 * lane_bytes(program)
    fit = min(clients // 2, free // lane_bytes(program))
    return f"about {fit} would fit: set client.batching={fit}" if fit > 1 else "set client.batching=off"


def chosen(config: Config, program: Program) -> Config:
    """The config with the number of clients that are trained together, which the program now uses."""
    n = resolve(config, program)
    program.options = replace(program.options, batching=n)
    return {**config, "client": {**config["client"], "batching": n if n > 1 else "off"}}
