"""Masks over a parameter vector, and networks from which whole units are taken out.

Masks are bool ``[d]``, True where a parameter survives. Units (neurons, filters) can be removed from a `Chain`: a
network whose layers follow one another, so that what leaves a layer is known to leave the next one's inputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx, nn

from fedsim.errors import ConfigError
from fedsim.vector import Layout

Kept = tuple[tuple[int, ...], ...]
"""Units that stay, of every layer of a chain but the last."""


# --- masks ------------------------------------------------------------------------------------------------


def quantile(scores: Tensor, share: float) -> Tensor:
    """The value below which a share of all scores lies, linearly interpolated between ranks; a float64 scalar.

    `torch.quantile` takes 16 million scores at most; this takes any number.

    Args:
        scores: ``[d]``.
        share: In [0, 1].
    """
    rank = share * (len(scores) - 1)
    low = _ranked(scores, math.floor(rank)).double()
    return low + (rank - math.floor(rank)) * (_ranked(scores, math.ceil(rank)).double() - low)


def _ranked(scores: Tensor, rank: int) -> Tensor:
    return scores.kthvalue(rank + 1).values


def mask_of(scores: Tensor, share: float, rule: str = "quantile") -> Tensor:
    """Which parameters survive, bool ``[d]``.

    Args:
        scores: By which they are ranked, ``[d]``; equal ones survive or fall together.
        share: In [0, 1); 0: all survive.
        rule: ``quantile``: those above the quantile ``share`` of all scores; without ties
            ``floor(share (d - 1)) + 1`` fall. ``absolute``: those whose score is at least ``share``.
    """
    if share == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if rule == "absolute":
        return scores >= share
    # No score lies between the two ranks that a quantile interpolates, so the lower one says the same, to the bit.
    return scores > _ranked(scores, math.floor(share * (len(scores) - 1) + 1e-9))  # 0.7 * 90 is 62.99...


def empty_tensors(mask: Tensor, layout: Layout) -> tuple[str, ...]:
    """Names of the tensors of which nothing survives."""
    return tuple(name for name, s in layout.blocks() if not bool(mask[s].any()))


# --- units ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """A layer with weights, and what stands between it and the next one.

    Attributes:
        name: Of the layer; its parameters are ``name.weight`` and, with ``bias``, ``name.bias``.
        units: Outputs of a linear layer, filters of a convolution.
        bias: Whether it has one.
        padded: Whether its inputs are padded with zeros, so that at a border it sees other than its input.
        rectified: Whether a ReLU follows before the next layer.
        even: Whether what follows takes maps of one value to maps of that value.
    """

    name: str
    units: int
    bias: bool
    padded: bool
    rectified: bool
    even: bool


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return getattr(m, "per_channel", False) or super().is_leaf_module(m, module_qualified_name)


class Chain:
    """Linear and convolutional layers that follow one another, with nothing between them that mixes units.

    Attributes:
        links: The layers, in order; the last gives the outputs, and keeps all of its units.
        layout: Of the network's parameters.
    """

    def __init__(self, links: Sequence[Link], layout: Layout) -> None:
        self.links, self.layout = tuple(links), layout

    @classmethod
    def of(cls, module: nn.Module) -> Chain:
        """The chain that a network is, as its own forward pass shows.

        Between layers there may be ReLU, pooling, `nn.Flatten`, and layers that say ``per_channel = True`` and average.

        Raises:
            ConfigError: It is none.
        """
        try:
            graph = _Tracer().trace(module)
        except Exception as exc:  # whatever a forward does that symbols cannot
            raise _refused(module, "its forward pass cannot be traced") from exc
        nodes, named = list(graph.nodes), dict(module.named_modules())
        steps: list[tuple[str, nn.Module]] = []
        for before, node in pairwise(nodes):
            if node.op == "output" and node.args == (before,):
                continue
            if node.op != "call_module" or node.args != (before,) or node.kwargs:
                what = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.op)
                raise _refused(module, f"`{what}` is no layer that takes the output of the one before")
            steps.append((str(node.target), named[str(node.target)]))
        if len({name for name, _ in steps}) < len(steps) or any(not p.requires_grad for p in module.parameters()):
            raise _refused(module, "a layer is used twice, or has weights that are not trained")
        return cls(_links(module, steps), Layout.of(module))

    # Units of a link, and the columns of the next layer's weights that belong to each.

    def _views(self, vector: Tensor, link: Link) -> tuple[Tensor, Tensor]:
        """Weights ``[units, inputs]`` and biases ``[units]`` of a layer, as views; no biases are zeros."""
        views = self.layout.views(vector)
        weight = views[f"{link.name}.weight"].flatten(1)
        return weight, views[f"{link.name}.bias"] if link.bias else vector.new_zeros(link.units)

    def without_weak(self, mask: Tensor, scores: Tensor, at: float, rule: str = "quantile") -> Tensor:
        """The mask without the units whose weights score too low on average.

        Args:
            mask: Bool ``[d]``.
            scores: ``[d]``.
            at: The threshold: ``quantile`` takes units whose mean is at most that, ``absolute`` those below it.
            rule: See `mask_of`.
        """
        mask = mask.clone()
        for link in self.links[:-1]:
            mean = self._views(scores, link)[0].double().mean(1)
            weak = mean < at if rule == "absolute" else mean <= at
            for part in self._views(mask, link):
                part[weak] = False
        return mask

    def closed(self, mask: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Takes out units without inputs, layer by layer, so that the network computes what it computed.

        A unit whose weights and bias are all masked gives 0. One that keeps its bias b gives the constant phi(b), which
        goes into the next layer's biases, ``b_next += W_next phi(b)``, where that is exact: they all survive, and no
        zeros are padded between; else the unit stays. The outgoing weights of a unit that is taken out leave the mask.

        Args:
            mask: Bool ``[d]``.
            w: Parameters, ``[d]``.

        Returns:
            The mask, and the parameters, 0 where it is False.
        """
        mask, w = mask.clone(), w * mask
        for link, after in pairwise(self.links):
            weight, bias = self._views(mask, link)
            out, out_bias = (part.view(after.units, -1) for part in self._views(mask, after))
            out = out.view(after.units, link.units, -1)
            silent = ~weight.any(1)
            foldable = ~(out.any(2) & ~out_bias).any(0) if link.even and not after.padded else ~out.any(2).any(0)
            gone = silent & (~bias.bool() | foldable)
            constant = self._views(w, link)[1].double() * gone
            if link.rectified:
                constant = constant.relu()
            if after.bias:
                weights, biases = self._views(w, after)
                moved = weights.view(after.units, link.units, -1).double().sum(2) * constant
                biases += moved.sum(1).to(w)
            out[:, gone] = False
            if link.bias:
                bias[gone] = False
            w *= mask
        return mask, w

    def kept(self, mask: Tensor, share: float) -> Kept:
        """The units that a mask leaves: all but those whose weights and bias are masked.

        Args:
            mask: Bool ``[d]``, from `closed`.
            share: Share of the parameters that was to be pruned, for the message.

        Raises:
            ConfigError: A layer would have none.
        """
        kept = []
        for link in self.links[:-1]:
            weight, bias = self._views(mask, link)
            units = (weight.any(1) | bias.bool()).nonzero()[:, 0].tolist()
            if not units:
                raise ConfigError(
                    f"pruning with strategy.threshold={share:g} leaves none of the {link.units} units of layer "
                    f"{link.name}; lower strategy.threshold, or set strategy.structured=off"
                )
            kept.append(tuple(units))
        return tuple(kept)

    def index(self, kept: Kept) -> Tensor:
        """Places of the smaller network's parameters in the vector of the whole one, int64 ``[d_small]``."""
        places, parts = self.layout.views(torch.arange(self.layout.d)), []
        for name in self.layout.names:
            number = next(i for i, link in enumerate(self.links) if name.startswith(f"{link.name}."))
            part = places[name]
            if number < len(kept):
                part = part[list(kept[number])]
            if number and name.endswith(".weight"):
                part = _columns(part, self.links[number - 1].units, kept[number - 1])
            parts.append(part.flatten())
        return torch.cat(parts)


def _columns(weight: Tensor, units: int, kept: Sequence[int]) -> Tensor:
    """The inputs of a layer's ``weight`` that come from some of the units before; each has as many neighbours."""
    split = weight.view(len(weight), units, -1, *weight.shape[2:])
    return split[:, list(kept)].flatten(1, 2)


def _links(module: nn.Module, steps: Sequence[tuple[str, nn.Module]]) -> list[Link]:
    places = [i for i, (_, layer) in enumerate(steps) if isinstance(layer, nn.Linear | nn.Conv2d)]
    if not places:
        raise _refused(module, "it has no linear or convolutional layer")
    for name, layer in (step for i, step in enumerate(steps) if i not in places):
        if not _passes(layer):
            raise _refused(module, f"layer {name} is a {type(layer).__name__}")
    links: list[Link] = []
    for i, end in pairwise([*places, len(steps)]):
        name, layer = steps[i]
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        between = [other for _, other in steps[i + 1 : end]]
        if isinstance(layer, nn.Conv2d):
            if layer.groups > 1 or layer.padding_mode != "zeros":
                raise _refused(module, f"layer {name} has groups, or pads with other than zeros")
            padded = layer.padding == "same" or (layer.padding != "valid" and any(layer.padding))
            flat = any(isinstance(other, nn.Flatten) for other in between)
            units, own = layer.out_channels, nn.Linear if flat else nn.Conv2d
        else:
            padded, units, own = False, layer.out_features, nn.Linear
        if end < len(steps):
            following = steps[end][1]
            fits = isinstance(following, own)
            if isinstance(layer, nn.Linear) and isinstance(following, nn.Linear):
                fits = following.in_features == units
            if not fits:
                raise _refused(module, f"layers {name} and {steps[end][0]} do not follow one another unit by unit")
        rectified = any(isinstance(other, nn.ReLU) for other in between)
        links.append(Link(name, units, layer.bias is not None, padded, rectified, all(map(_is_even, between))))
    return links


def _passes(layer: nn.Module) -> bool:
    """Whether a layer without weights takes unit by unit, and 0 to 0."""
    if isinstance(layer, nn.Flatten):
        return layer.start_dim == 1 and layer.end_dim == -1
    if isinstance(layer, nn.MaxPool2d):
        return not layer.return_indices
    plain = nn.ReLU | nn.Identity | nn.AvgPool2d | nn.AdaptiveAvgPool2d
    return isinstance(layer, plain) or (getattr(layer, "per_channel", False) and next(layer.parameters(), None) is None)


def _is_even(layer: nn.Module) -> bool:
    """Whether it takes maps of one value to maps of that value (or of what ReLU makes of it)."""
    if isinstance(layer, nn.AvgPool2d):
        padding = layer.padding if isinstance(layer.padding, tuple) else (layer.padding,)
        return layer.divisor_override is None and not (layer.count_include_pad and any(padding))
    return True


def _refused(module: nn.Module, why: str) -> ConfigError:
    return ConfigError(
        f"units can be removed where linear and convolutional layers follow one another, with ReLU, pooling and "
        f"Flatten between them; {type(module).__name__} is another network: {why}; set strategy.structured=off"
    )


@dataclass(frozen=True)
class Shrunk:
    """The smaller network of a chain: for ``fed.train(model=)``, equal and hashable by value.

    Attributes:
        kept: Units that stay, by layer.
    """

    kept: Kept

    def __call__(self, module: nn.Module) -> nn.Module:
        """Makes ``module`` smaller, in place; what stays keeps its weights.

        Raises:
            ConfigError: It is no chain.
        """
        chain = Chain.of(module)
        for i, link in enumerate(chain.links):
            layer = module.get_submodule(link.name)
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
            if i < len(self.kept):
                rows = list(self.kept[i])
                weight, bias = weight[rows], None if bias is None else bias[rows]
            if i:
                weight = _columns(weight, chain.links[i - 1].units, self.kept[i - 1])
            layer.weight = nn.Parameter(weight.clone())
            if bias is not None:
                layer.bias = nn.Parameter(bias.clone())
            if isinstance(layer, nn.Conv2d):
                layer.out_channels, layer.in_channels = weight.shape[:2]
            else:
                layer.out_features, layer.in_features = weight.shape
        return module


# --- work -------------------------------------------------------------------------------------------------


def flops(module: nn.Module, x: Tensor, mask: Tensor | None = None) -> int:
    """Floating-point operations of a forward pass, two for each multiply-add.

    A step of training takes about three times as many for each example.

    Args:
        module: The network that is run; it is left as it is.
        x: One example, ``[1, ...]``.
        mask: None: what the network's matrix products and convolutions really compute, zeros included. Bool ``[d]``:
            what would be left if those of masked weights cost nothing, in linear and convolutional layers: the sum of
            surviving weights times the positions where each is used.
    """
    module = copy.deepcopy(module).eval()
    if mask is None:
        from torch.utils.flop_counter import FlopCounterMode

        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(x)
        return int(counter.get_total_flops())
    alive, total = Layout.of(module).views(mask), 0

    def count(name: str, layer: nn.Module, out: Tensor) -> None:
        nonlocal total
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        key, units = f"{name}.weight" if name else "weight", layer.weight.shape[0]
        survivors = int(alive[key].sum()) if key in alive else layer.weight.numel()  # what is not trained is not masked
        total += 2 * survivors * (out.numel() // units)

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(lambda layer, _, out, name=name: count(name, layer, out))
    with torch.no_grad():
        module(x)
    return total
