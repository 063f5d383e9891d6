"""A minibatch of C clients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Batch(SimpleNamespace):
    """A minibatch: ``x`` and ``y`` are ``[C, B, ...]``; recipes may add fields.

    Attributes:
        x: Inputs, normalised and augmented.
        y: Labels.
        index: Number of each example within its client's data, int64 ``[C, B]``.
        weight: Weight of each example in the objective, ``[C, B]``; None: all 1.
    """

    x: Any
    y: Tensor
    index: Tensor
    weight: Tensor | None

    @property
    def keep(self) -> Tensor:
        """Which entries are real examples and not padding, bool ``[C, B]``."""
        kept: Tensor | None = self.__dict__.get("_keep")
        return torch.ones_like(self.index, dtype=torch.bool) if kept is None else kept

    @keep.setter
    def keep(self, value: Tensor) -> None:
        self.__dict__["_keep"] = value

    @property
    def plain_keep(self) -> bool:
        """Whether nobody said which entries are real: all are."""
        return "_keep" not in self.__dict__

    @property
    def plain(self) -> bool:
        """Whether it is one client's, and its objective the plain mean over all entries."""
        return self.weight is None and "_keep" not in self.__dict__ and self.index.shape[0] == 1

    def sum(self, v: Tensor) -> Tensor:
        """Sum over the real examples: ``[C, B]`` to ``[C]``."""
        return v.sum(1) if "_keep" not in self.__dict__ else torch.where(self.keep, v, 0.0).sum(1)

    def mean(self, v: Tensor) -> Tensor:
        """Mean over the real examples: ``[C, B]`` to ``[C]``."""
        return v.mean(1) if "_keep" not in self.__dict__ else self.sum(v) / self.keep.sum(1).clamp(min=1)

    def objective(self, losses: Tensor) -> Tensor:
        """The objective of each client, ``[C]``: the weighted mean of ``[C, B]``; ``[C]`` is returned as it is."""
        if losses.dim() == 1:
            return losses
        return self.mean(losses if self.weight is None else losses * self.weight)
