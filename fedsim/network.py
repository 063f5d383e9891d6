"""A module whose parameters are views of one flat vector.

Binding a vector costs microseconds per tensor and copies nothing, so the network can be evaluated at
any point (the iterate, a perturbed point, a teacher) without a copy of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.errors import ConfigError
from fedsim.parts import Block, Blocks, blocks_of
from fedsim.stacked import Stack
from fedsim.vector import Layout, float_buffers, trainable

BatchNorm = nn.modules.batchnorm._BatchNorm


def map_tensors(f: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Applies ``f`` to every tensor of a tree of tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        return f(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(f, v) for v in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(map_tensors(f, v) for v in tree)
    if isinstance(tree, dict):
        return {k: map_tensors(f, v) for k, v in tree.items()}
    return tree


class Network:
    """The network skeleton of a worker.

    Args:
        module: The model; its parameters and floating-point buffers will point into bound vectors.

    Attributes:
        layout: Of the trainable parameters, d numbers.
        buffer_layout: Of the floating-point buffers.
        initial: The parameters that the module came with, ``[d]``.
        initial_buffers: The floating-point buffers that it came with.
        device: Where it lives.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layout = Layout.of(module)
        self.buffer_layout = Layout.of_buffers(module)
        self._params = list(trainable(module).values())
        self._buffers = list(float_buffers(module).values())
        self._counters = [(b, b.clone()) for b in module.buffers() if not b.is_floating_point()]
        self.device = self._params[0].device
        self.initial = self.layout.flatten(trainable(module)).to(self.device)
        self.initial_buffers = self.buffer_layout.flatten(float_buffers(module)).to(self.device)
        self._bound = self._bound_buffers = 0
        if any(m.momentum is None and m.track_running_stats for m in module.modules() if isinstance(m, BatchNorm)):
            raise ConfigError(
                "batch norm with momentum=None counts its batches, which no visit remembers; give it one, such as 0.1"
            )
        self._mode: tuple[bool, bool] | None = None
        self.cast: torch.dtype | None = None  # what matrices are multiplied in; None: as they are
        self.found_mixing = False  # by trying; batch norms are known
        self._norms = [m for m in module.modules() if isinstance(m, BatchNorm)]

    @cached_property
    def stack(self) -> Stack | None:
        """The network of several clients as one, if its layers allow it."""
        return Stack.of(self.module)

    @cached_property
    def block_names(self) -> tuple[Block, ...]:
        """Names of the modules of each of its blocks."""
        return blocks_of(self.module, "a method that looks between blocks")

    @cached_property
    def blocks(self) -> Blocks:
        """The network as one that gives the output of each of its blocks."""
        return Blocks(self.module, self.block_names)

    @property
    def mixes(self) -> bool:
        """Whether the examples of a batch see each other in training."""
        return bool(self._norms) or self.found_mixing

    def __getstate__(self) -> dict[str, Any]:
        kept = {k: v for k, v in self.__dict__.items() if k not in ("stack", "blocks")}
        return kept | {"_bound": 0, "_bound_buffers": 0}  # addresses mean nothing elsewhere

    @torch.no_grad()
    def reset(self, tensors: Mapping[str, Tensor]) -> None:
        """Makes these the tensors that the module came with.

        Args:
            tensors: Every parameter and buffer, by name.
        """
        self.bind(self.initial)
        self.bind_buffers(self.initial_buffers)
        for name, t in (*self.module.named_parameters(), *self.module.named_buffers()):
            t.copy_(tensors[name])
        self._counters = [(b, b.clone()) for b, _ in self._counters]

    def pristine(self) -> nn.Module:
        """A copy of the module as it came; what this one is bound to stays as it is."""
        bound, places = (self._bound, self._bound_buffers), [*self._params, *self._buffers]
        data, counts = [t.data for t in places], [counter.clone() for counter, _ in self._counters]
        self.bind(self.initial)
        self.bind_buffers(self.initial_buffers)
        try:
            return copy.deepcopy(self.module)
        finally:
            for t, before in zip(places, data, strict=True):
                t.data = before
            for (counter, _), count in zip(self._counters, counts, strict=True):
                counter.copy_(count)
            self._bound, self._bound_buffers = bound

    def bind(self, w: Tensor) -> None:
        """Points the parameters at ``w``, ``[d]`` or ``[1, d]``, contiguous memory of torch's own."""
        if w.data_ptr() != self._bound:
            w = w.view(-1)
            for p, s in zip(self._params, self.layout.slices.values(), strict=True):
                p.data = w[s].view(p.shape)
            self._bound = w.data_ptr()

    def bind_buffers(self, b: Tensor) -> None:
        """Points the floating-point buffers at ``b``, ``[nb]``; integer counters start anew."""
        if b.data_ptr() != self._bound_buffers:
            for t, s in zip(self._buffers, self.buffer_layout.slices.values(), strict=True):
                t.data = b[s].view(t.shape)
            self._bound_buffers = b.data_ptr()
        for counter, first in self._counters:
            counter.copy_(first)

    @property
    def mode(self) -> tuple[bool, bool]:
        """The arguments of the last `train`."""
        return self._mode or (True, False)

    def train(self, on: bool, frozen_norms: bool = False) -> None:
        """Training or evaluation mode; with ``frozen_norms`` batch norms stay in evaluation mode."""
        mode = (on, frozen_norms)
        if mode != self._mode:
            self.module.train(on)
            for m in self._norms if on and frozen_norms else ():
                m.eval()
            self._mode = mode

    def __call__(self, x: Any) -> Any:
        """Outputs ``[1, B, ...]`` for inputs ``[1, B, ...]`` at the bound point."""
        return self.run(self.module, x)

    def run(self, forward: Callable[..., Any], x: Any) -> Any:
        """As calling the network, but for ``forward``: its module, or `blocks`."""
        return map_tensors(lambda t: t.unsqueeze(0), self.evaluate(forward, map_tensors(lambda t: t.squeeze(0), x)))

    def evaluate(self, forward: Callable[..., Any], *inputs: Any) -> Any:
        """Calls the network, ``forward``, in its precision; the outputs have that of the parameters."""
        if self.cast is None:
            return forward(*inputs)
        with torch.autocast(self.device.type, dtype=self.cast):
            outputs = forward(*inputs)
        dtype = self.layout.dtype
        return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, outputs)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The live parameters by name, ``[1, *shape]``; differentiable."""
        return {n: p.unsqueeze(0) for n, p in zip(self.layout.names, self._params, strict=True)}

    def descend(self, loss: Tensor, lr: float) -> None:
        """Moves the bound parameters by ``-lr`` times the gradient of a scalar ``loss``, in place."""
        grads = torch.autograd.grad(loss, self._params, allow_unused=True)
        pairs = [(p.data, g) for p, g in zip(self._params, grads, strict=True) if g is not None]
        torch._foreach_add_([p for p, _ in pairs], [g for _, g in pairs], alpha=-lr)

    def gradient(self, loss: Tensor, out: Tensor, only: Sequence[int] | None = None) -> Tensor:
        """The gradient of a scalar ``loss`` with respect to the bound parameters.

        Args:
            loss: A scalar with a graph.
            out: Where to put it, ``[1, d]``.
            only: Numbers of the tensors to differentiate; the rest is 0.
        """
        params = self._params if only is None else [self._params[i] for i in only]
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        if only is None and all(g is not None for g in grads):
            torch.cat([g.reshape(-1) for g in grads], out=out[0])
            return out
        out.zero_()
        places = list(self.layout.slices.values())
        for i, g in zip(range(len(params)) if only is None else only, grads, strict=True):
            if g is not None:
                out[0, places[i]] = g.reshape(-1)
        return out


class Point:
    """The network at ``w``, for `ClientHalf.loss` and `ClientHalf.predict`.

    Args:
        network: The skeleton.
        w: ``[1, d]``.
        detached: Evaluation mode and no gradient: a constant of the local objective.
    """

    def __init__(self, network: Network, w: Tensor, detached: bool = False) -> None:
        self._network, self._detached = network, detached
        self._w = w if w.is_contiguous() else w.contiguous()

    def __call__(self, x: Any) -> Any:
        return self._run(self._network.module, x)

    def blocks(self, x: Any) -> Any:
        return self._run(self._network.blocks, x)

    def _run(self, forward: Callable[..., Any], x: Any) -> Any:
        if not self._detached:
            self._network.bind(self._w)
            return self._network.run(forward, x)
        # The point of an enclosing gradient is restored: its graph reads the live parameters.
        net, before, mode = self._network, [p.data for p in self._network._params], self._network.mode
        net.train(False)
        net.bind(self._w)
        try:
            with torch.no_grad():
                return net.run(forward, x)
        finally:
            for p, data in zip(net._params, before, strict=True):
                p.data = data
            net._bound = before[0].data_ptr()
            net.train(*mode)

    @property
    def views(self) -> dict[str, Tensor]:
        """The parameters by name, ``[1, *shape]``; differentiable unless detached."""
        if self._detached:
            return self._network.layout.views(self._w)
        self._network.bind(self._w)
        return self._network.parameters


class Remembering:
    """A network that remembers what it gave for one input first: it then runs once for a loss and what is added to it.

    Args:
        model: The network at some point.
        x: That input.
        by_block: Remember the outputs of all blocks, of which the last are the network's.
    """

    def __init__(self, model: Any, x: Any, by_block: bool = False) -> None:
        self._model, self._x, self._by_block = model, x, by_block
        self.outputs: Any = None

    def __call__(self, x: Any) -> Any:
        out = self._model.blocks(x) if self._by_block else self._model(x)
        if self.outputs is None and x is self._x:
            self.outputs = out
        return out[-1] if self._by_block else out

    def blocks(self, x: Any) -> Any:
        return self._model.blocks(x)

    @property
    def views(self) -> dict[str, Tensor]:
        views: dict[str, Tensor] = self._model.views
        return views
