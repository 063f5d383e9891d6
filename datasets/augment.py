"""Augmentations of image batches, on the batch and on its device; by name in ``data.augment``.

What is drawn is apart from what it does: clients that are trained together draw one by one, each from a generator of
its own, and are then augmented as one batch.

Source of the pair as used for CIFAR: He et al., 2016, section 4.2, https://arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad as pad_images


@dataclass(frozen=True)
class Augmentation:
    """A random change of images.

    Attributes:
        draw: From a number of images B and a generator the choices for each, ``[B, ...]``.
        apply: From images ``[B, C, H, W]`` of any dtype and their choices, on any device, new images like them.
    """

    draw: Callable[[int, Generator], Tensor]
    apply: Callable[[Tensor, Tensor], Tensor]


def flip(x: Tensor, chosen: Tensor) -> Tensor:
    """Mirrors images left to right.

    Args:
        x: Images, ``[B, C, H, W]``.
        chosen: Which of them, bool ``[B]``.
    """
    return torch.where(chosen.to(x.device)[:, None, None, None], x.flip(-1), x)


def pad_and_crop(x: Tensor, shift: Tensor, pad: int = 4) -> Tensor:
    """Pads each image with zeros and cuts out a window of its old size.

    Zeros are black in raw images, and the mean colour in normalised ones.

    Args:
        x: Images, ``[B, C, H, W]``.
        shift: Row and column where each window begins, int64 ``[B, 2]``, from 0 to ``2 pad``.
        pad: Pixels added on every side.
    """
    _, channels, height, width = x.shape
    shift = shift.to(x.device)
    rows = shift[:, :1] + torch.arange(height, device=x.device)
    columns = shift[:, 1:] + torch.arange(width, device=x.device)
    index = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).flatten(1)  # into a flattened padded image
    padded = pad_images(x, (pad, pad, pad, pad)).flatten(2)
    return padded.gather(2, index[:, None, :].expand(-1, channels, -1)).view_as(x)


def _halves(size: int, generator: Generator) -> Tensor:
    """One in two, bool ``[B]``."""
    return torch.rand(size, generator=generator, device=generator.device) < 0.5


def _shifts(size: int, generator: Generator) -> Tensor:
    """Places of windows in images with 4 pixels added on every side, int64 ``[B, 2]``."""
    return torch.randint(9, (2, size), generator=generator, device=generator.device).T


AUGMENTATIONS = {"flip": Augmentation(_halves, flip), "crop": Augmentation(_shifts, pad_and_crop)}
"""By the names that ``data.augment`` knows; applied in the order in which they are listed there."""
