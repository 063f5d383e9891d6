"""Parts of a network by name: its head, its blocks, its norms.

Methods that keep, freeze or cut parts of a model ask here, so that any model that names its parts serves all of them.
A model says where they are by two attributes: ``head``, its last linear layer, and ``blocks``, its layers in order.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedsim.errors import ConfigError, did_you_mean

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
"""Layers that normalise."""

Block = tuple[str, ...]
"""Names of the modules that a block runs, in order."""


def head_of(module: nn.Module, who: str) -> nn.Linear:
    """The last layer of a model, ``module.head``.

    Args:
        module: ``head(features(x))``, such as `fedsim.models.standard.Classifier`.
        who: The method that asks, for the message.

    Raises:
        ConfigError: The model has no linear layer of that name, or nothing called ``features`` before it.
    """
    head, features = getattr(module, "head", None), getattr(module, "features", None)
    if not isinstance(head, nn.Linear) or not isinstance(features, nn.Module):
        raise ConfigError(
            f"{who} needs a model that computes head(features(x)) with a linear head; {type(module).__name__} "
            "does not name these two: choose one of `fedsim list model`, or name them"
        )
    return head


def blocks_of(module: nn.Module, who: str) -> tuple[Block, ...]:
    """The blocks of a model in order: each takes the output of the one before, the last gives the logits.

    Args:
        module: A model with ``blocks``: a name of a submodule for each block, or several that run one after the other.
        who: The method that asks, for the message.

    Raises:
        ConfigError: The model does not name its blocks.
    """
    named: Sequence[str | Sequence[str]] | None = getattr(module, "blocks", None)
    if not isinstance(named, tuple | list) or not named:
        raise ConfigError(
            f"{who} needs a model that names its blocks (an attribute `blocks`, such as blocks5 has); "
            f"{type(module).__name__} does not: choose one of `fedsim list model`, or name them"
        )
    blocks = tuple((b,) if isinstance(b, str) else tuple(b) for b in named)
    known = dict(module.named_modules())
    if wrong := [name for block in blocks for name in block if name not in known]:
        raise ConfigError(
            f"{who}: {type(module).__name__}.blocks names '{wrong[0]}', which the model does not have"
            f"{did_you_mean(wrong[0], known)}"
        )
    return blocks


def sequential_blocks(features: nn.Sequential) -> tuple[Block, ...]:
    """Blocks of a chain of layers: a new one begins with every layer that has weights and is no norm."""
    blocks: list[list[str]] = []
    for name, layer in features.named_children():
        weighs = next(layer.parameters(), None) is not None and not isinstance(layer, NORMS)
        begins = not blocks or (weighs and any(_weighs(features, other) for other in blocks[-1]))
        blocks += [[]] if begins else []
        blocks[-1].append(name)
    return tuple(tuple(f"features.{name}" for name in block) for block in blocks)


def _weighs(features: nn.Sequential, name: str) -> bool:
    return next(features.get_submodule(name).parameters(), None) is not None


def norms_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the trainable parameters that belong to norms."""
    return tuple(
        f"{name}.{key}" if name else key
        for name, layer in module.named_modules()
        if isinstance(layer, NORMS)
        for key, p in layer.named_parameters(recurse=False)
        if p.requires_grad
    )


class Blocks(nn.Module):
    """The blocks of a module from one on, as a network that gives the output of each of them.

    Args:
        module: Whose blocks; shared, not copied.
        blocks: All of its blocks (`blocks_of`).
        first: Number of the first one to run, from 0.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[Block], first: int = 0) -> None:
        super().__init__()
        self.module = module
        self._names = tuple(blocks[first:])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the blocks, ``[B, ...]`` each; the last are the logits.

        Args:
            x: Output of the block before the first one, or the model's inputs.
        """
        outputs = []
        for names in self._names:
            for name in names:
                x = self.module.get_submodule(name)(x)
            outputs.append(x)
        return tuple(outputs)


def tail_of(module: nn.Module, blocks: Sequence[Block], first: int) -> Blocks:
    """The blocks from number ``first`` on, drawn anew; only their parameters are trainable.

    Args:
        module: Its weights are replaced or frozen: give a copy.
        blocks: All of its blocks.
        first: From 0.
    """
    module.requires_grad_(False)
    for names in blocks[first:]:
        for name in names:
            redraw(module.get_submodule(name).requires_grad_(True))
    return Blocks(module, blocks, first)


def redraw(module: nn.Module) -> None:
    """Draws all weights anew, as every layer does by itself, from torch's own generator.

    Raises:
        ConfigError: A layer with weights has no ``reset_parameters``.
    """
    for layer in module.modules():
        if next(layer.parameters(recurse=False), None) is not None:
            reset = getattr(layer, "reset_parameters", None)
            if reset is None:
                raise ConfigError(f"{type(layer).__name__} cannot draw its weights anew: it needs `reset_parameters`")
            reset()
