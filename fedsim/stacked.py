"""Networks of several clients as one network, layer by layer.

C convolutions of c channels are one convolution of C c channels in C groups, C linear layers one batched product.
`torch.func.vmap` does the same, but moves the clients' axis to and fro between layers, and keeps images channel by
channel. Here they stay ``[B, C c, H, W]`` in the order ``channels_last``, where all clients' channels lie side by side:
pooling, activations and narrow convolutions then fill the processor's vectors.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

ELEMENTWISE = (
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus),
    *(nn.Identity, nn.Hardtanh),
)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
METHODS = ("relu", "relu_", "tanh", "sigmoid")
FUNCTIONS: tuple[Any, ...] = (F.relu, torch.relu, torch.tanh, torch.sigmoid, F.gelu, F.silu)
SUMS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _per_channel(m) or super().is_leaf_module(m, module_qualified_name)


def _per_channel(layer: nn.Module) -> bool:
    """Whether it treats every channel of ``[B, C, H, W]`` alike and alone; a layer of one's own says so itself."""
    return type(layer) in POOLS or getattr(layer, "per_channel", False)


@dataclass(frozen=True)
class Value:
    """An activation of all clients.

    Attributes:
        tensor: ``[C, B, ...]``, or as an image ``[B, C c, H, W]``.
        image: Which of the two.
    """

    tensor: Tensor
    image: bool = False


class Stack:
    """A network of C clients.

    Args:
        graph: Of one client's network; every node is known.
        module: That network.
    """

    def __init__(self, graph: fx.Graph, module: nn.Module) -> None:
        self._nodes, self._modules = list(graph.nodes), dict(module.named_modules())

    @classmethod
    def of(cls, module: nn.Module) -> Stack | None:
        """The stack of a network, or None if it has a layer that is not known here, or is another one with other inputs
        or in evaluation. What a trace cannot see (whether the numbers are right) `fedsim.batching` tries."""
        modules = list(module.modules())
        names = [n for n, _ in module.named_parameters(remove_duplicate=False)]
        frozen = any(not p.requires_grad for p in module.parameters())
        if frozen or len(names) > len(list(module.parameters())) or list(module.buffers()):
            return None
        if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules):
            return None
        graphs, was = [], {m: m.training for m in modules}
        try:
            for training in (False, True):
                module.train(training)
                graphs.append(_Tracer().trace(module))
        except Exception:  # whatever a forward does that symbols cannot
            return None
        finally:
            for m, training in was.items():
                m.training = training
        evaluated, trained = ([(n.op, str(n.target), str(n.args), str(n.kwargs)) for n in g.nodes] for g in graphs)
        inputs = sum(op == "placeholder" for op, *_ in trained)
        stack = cls(graphs[1], module)
        return stack if evaluated == trained and inputs == 1 and all(map(stack._known, stack._nodes)) else None

    def _known(self, node: fx.Node) -> bool:
        if node.op in ("placeholder", "output"):
            return True
        if node.op == "call_module":
            layer = self._modules[str(node.target)]
            if isinstance(layer, nn.Conv2d):
                return layer.padding_mode == "zeros"
            if isinstance(layer, nn.Flatten):
                return layer.start_dim == 1 and layer.end_dim == -1
            if isinstance(layer, nn.MaxPool2d):
                return not layer.return_indices
            return isinstance(layer, nn.Linear | nn.GroupNorm) or type(layer) in ELEMENTWISE or _per_channel(layer)
        if node.op == "call_function":
            if node.target is torch.flatten:
                return list(node.args[1:]) == [1] and not node.kwargs
            if node.target in SUMS:
                return not node.kwargs and all(isinstance(a, fx.Node) for a in node.args)
            return node.target in FUNCTIONS
        if node.op != "call_method" or node.kwargs:
            return False
        return node.target in METHODS or (node.target == "flatten" and list(node.args[1:]) == [1])

    def __call__(self, params: Mapping[str, Tensor], x: Tensor) -> Any:
        """Outputs ``[C, B, ...]`` for parameters ``[C, *shape]`` by name and inputs ``[C, B, ...]``."""
        lanes = len(x)
        env: dict[fx.Node, Value] = {}
        for node in self._nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], lambda n: _rows(env[n], lanes))
            if node.op == "placeholder":
                env[node] = Value(x)
                continue
            given = [env[a] for a in node.args if isinstance(a, fx.Node)]
            if node.op == "call_module":
                name = str(node.target)
                env[node] = _layer(self._modules[name], name, given[0], params, lanes)
            elif node.target in SUMS:
                image = given[0].image
                second = _image(given[1], lanes) if image else _rows(given[1], lanes)
                env[node] = Value(given[0].tensor + second, image)
            elif node.target in METHODS:
                env[node] = Value(getattr(given[0].tensor, str(node.target))(), given[0].image)
            elif node.target is torch.flatten or node.target == "flatten":
                env[node] = Value(_rows(given[0], lanes).flatten(2))
            else:
                call: Any = node.target
                env[node] = Value(call(given[0].tensor, *node.args[1:], **node.kwargs), given[0].image)
        raise AssertionError("a graph has an output")


class _Linear(torch.autograd.Function):
    """``h @ weight^T`` for ``h`` ``[C, B, inputs]`` and ``weight`` ``[C, outputs, inputs]``.

    Autograd's own backward makes the gradient of ``weight^T`` and turns it: two to eight times the time.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(h, weight)
        return h.bmm(weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        h, weight = ctx.saved_tensors
        (out,) = grads
        needs_h, needs_weight = ctx.needs_input_grad
        return out.bmm(weight) if needs_h else None, out.transpose(1, 2).bmm(h) if needs_weight else None


def _layer(layer: nn.Module, name: str, given: Value, params: Mapping[str, Tensor], lanes: int) -> Value:
    if isinstance(layer, nn.Linear):
        h = _rows(given, lanes)
        flat, weight = h.flatten(1, -2), params[f"{name}.weight"]  # a linear layer goes over the last axis
        mixed = torch.is_autocast_enabled(h.device.type)  # only autograd's own functions know what was cast
        out: Tensor = flat.bmm(weight.transpose(1, 2)) if mixed else _Linear.apply(flat, weight)  # type: ignore[no-untyped-call]
        if layer.bias is not None:
            out = out + params[f"{name}.bias"].unsqueeze(1)
        return Value(out.view(*h.shape[:-1], -1))
    if isinstance(layer, nn.Conv2d):
        weight = params[f"{name}.weight"].flatten(0, 1)
        bias = None if layer.bias is None else params[f"{name}.bias"].flatten()
        h = _image(given, lanes)
        return Value(F.conv2d(h, weight, bias, layer.stride, layer.padding, layer.dilation, lanes * layer.groups), True)
    if isinstance(layer, nn.GroupNorm):
        scale, shift = (params[f"{name}.{k}"].flatten() if layer.affine else None for k in ("weight", "bias"))
        return Value(F.group_norm(_image(given, lanes), lanes * layer.num_groups, scale, shift, layer.eps), True)
    if isinstance(layer, nn.Flatten):
        return Value(_rows(given, lanes).flatten(2))
    if _per_channel(layer):
        return Value(layer(_image(given, lanes)), True)
    return Value(layer(given.tensor), given.image)


def _image(value: Value, lanes: int) -> Tensor:
    if value.image:
        return value.tensor
    return value.tensor.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)


def _rows(value: Value, lanes: int) -> Tensor:
    if not value.image:
        return value.tensor
    t = value.tensor
    return t.view(len(t), lanes, -1, *t.shape[2:]).transpose(0, 1)
