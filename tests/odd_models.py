"""Networks for 8x8 digits that are easily computed wrongly for several clients at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _Two(nn.Module):
    """Two linear layers.

    Args:
        input_shape: Shape of one input.
        num_classes: Number of classes.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(64, 12)
        self.second = nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.hidden(self.first(x.flatten(1))))

    def hidden(self, h: Tensor) -> Tensor:
        return h.tanh()


class Hooked(_Two):
    """Has a forward hook that changes an output."""

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        super().__init__(input_shape, num_classes)
        self.first.register_forward_hook(lambda module, given, output: 2 * output)


class Optional(_Two):
    """Takes a further input, which nobody gives."""

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Any:
        h = x.flatten(1) if noise is None else x.flatten(1) + noise.flatten(1)
        return self.second(self.first(h).tanh())


class Alias(_Two):
    """Has a module under two names."""

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        super().__init__(input_shape, num_classes)
        self.again = self.second


class Adds(_Two):
    """Adds in place to what is used again."""

    def hidden(self, h: Tensor) -> Tensor:
        g = h + 1
        k = g
        k += h.sigmoid()
        return (g + k).tanh()


class Modes(_Two):
    """Is another network in evaluation."""

    def hidden(self, h: Tensor) -> Tensor:
        return h.tanh() if self.training else h.relu()


class Centred(_Two):
    """Its examples see each other in training."""

    def hidden(self, h: Tensor) -> Tensor:
        return h - h.mean(0) if self.training else h


class Width(_Two):
    """Depends on the size of the batch."""

    def hidden(self, h: Tensor) -> Tensor:
        return h * h.shape[0]


class Padded(nn.Module):
    """Embeds pixels; that of black ones is not trained.

    Args:
        input_shape: Shape of one input.
        num_classes: Number of classes.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 4, padding_idx=0)
        self.head = nn.Linear(4 * 64, num_classes)

    def forward(self, x: Tensor) -> Any:
        numbers = (x.flatten(1).sigmoid() * 40 - 12).clamp(0, 16).long()
        return self.head(self.embedding(numbers).flatten(1))


class Averaging(_Two):
    """Has a buffer that follows the batches."""

    centre: Tensor

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        super().__init__(input_shape, num_classes)
        self.register_buffer("centre", torch.zeros(12))

    def hidden(self, h: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.centre.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return (h - self.centre).tanh()
