"""Augmentations of image batches, on the batch and on its device; by name in ``data.augment``.

Source of the pair as used for CIFAR: He et al., 2016, section 4.2, https://arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad as pad_images


def flip(x: Tensor, generator: Generator) -> Tensor:
    """Mirrors each image left to right with probability 1/2.

    Args:
        x: Images, ``[B, C, H, W]``, of any dtype.
        generator: Where the B choices come from; it may live on another device than ``x``.

    Returns:
        New images, like ``x``.
    """
    chosen = torch.rand(len(x), generator=generator, device=generator.device) < 0.5
    return torch.where(chosen.to(x.device)[:, None, None, None], x.flip(-1), x)


def pad_and_crop(x: Tensor, generator: Generator, pad: int = 4) -> Tensor:
    """Pads each image with zeros and cuts out a window of its old size at a random place.

    Zeros are black in raw images, and the mean colour in normalised ones.

    Args:
        x: Images, ``[B, C, H, W]``, of any dtype.
        generator: Where the 2 B offsets come from; it may live on another device than ``x``.
        pad: Pixels added on every side; a window is shifted by at most so many, each way.

    Returns:
        New images, like ``x``.
    """
    _, channels, height, width = x.shape
    shift = torch.randint(2 * pad + 1, (2, len(x), 1), generator=generator, device=generator.device).to(x.device)
    rows = shift[0] + torch.arange(height, device=x.device)
    columns = shift[1] + torch.arange(width, device=x.device)
    index = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).flatten(1)  # into a flattened padded image
    padded = pad_images(x, (pad, pad, pad, pad)).flatten(2)
    return padded.gather(2, index[:, None, :].expand(-1, channels, -1)).view_as(x)


AUGMENTATIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {"flip": flip, "crop": pad_and_crop}
"""By the names that ``data.augment`` knows; applied in the order in which they are listed there."""
