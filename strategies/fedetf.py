"""FedETF: a fixed simplex as the classifier, so that classifiers of different clients cannot disagree.

Source: Li et al., 2023, https://arxiv.org/abs/2303.10058; stated from memory.
Departures:
    1. The last stage of the paper, where every client fine-tunes a model of its own, is left out: all are scored with
       the global one (``eval.finetune_epochs`` tunes on the local objective).
    2. The learned factor on the logits may become 0 or less; nothing holds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.clients.batch import Batch
from fedsim.clients.local import Local
from fedsim.errors import ConfigError
from fedsim.network import map_tensors
from fedsim.parts import head_of
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import Info, Model, State, require


def etf(num_classes: int, dim: int, generator: torch.Generator) -> Tensor:
    """A simplex equiangular tight frame: unit vectors, one per class, all at the same and widest angle.

    ``M = sqrt(C / (C - 1)) U (I - 11^T / C)`` with the orthonormal columns U of a uniform(0, 1) matrix; with C - 1
    dimensions, where U has no room for C columns, its C - 1 span the complement of 1 instead.

    Args:
        num_classes: C, at least 2.
        dim: Length of the vectors, at least C - 1.
        generator: What the matrix is drawn from.

    Returns:
        The vectors as columns, float64 ``[dim, C]``: norm 1, pairwise cosine ``-1 / (C - 1)``, sum 0.

    Raises:
        ConfigError: So many classes do not fit into ``dim`` dimensions.
    """
    C = num_classes
    if C < 2:
        raise ConfigError(f"a simplex of classes needs at least 2 of them, got {C}")
    if dim < C - 1:
        raise ConfigError(f"a simplex of {C} classes needs at least {C - 1} dimensions (features), got {dim}")
    centre = torch.eye(C, dtype=torch.float64) - 1 / C
    if dim < C:
        centre = torch.linalg.qr(centre[:, : C - 1])[0].T
    uniform = torch.rand(dim, len(centre), generator=generator, dtype=torch.float64)
    frame: Tensor = math.sqrt(C / (C - 1)) * torch.linalg.qr(uniform)[0] @ centre
    return frame


class Simplex(nn.Module):
    """``beta * normalised(projection(features(x))) @ frame``.

    Args:
        features: All layers of a model but its head.
        num_features: Numbers that they give per example.
        frame: The classifier, ``[dim, classes]``.
        temperature: First value of ``beta``.

    Attributes:
        frame: A parameter that is not trained: it moves with the module and is no part of the parameter vector.
        beta: Factor on the cosines, ``[1]``.
    """

    def __init__(self, features: nn.Module, num_features: int, frame: Tensor, temperature: float) -> None:
        super().__init__()
        self.features = features
        self.projection = nn.Linear(num_features, len(frame), bias=False)
        self.beta = nn.Parameter(torch.tensor([temperature]))
        self.frame = nn.Parameter(frame, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``[B, classes]``."""
        mu = F.normalize(self.projection(self.features(x)), dim=-1)
        return self.beta * (mu @ self.frame)


class _Shifted:
    """A model whose logits are shifted, for the loss alone."""

    def __init__(self, model: Model, shift: Tensor) -> None:
        self._model, self._shift = model, shift

    def __call__(self, x: Any) -> Any:
        return map_tensors(lambda z: z + self._shift.to(z), self._model(x))

    def blocks(self, x: Any) -> tuple[Any, ...]:
        return self._model.blocks(x)

    @property
    def views(self) -> dict[str, Tensor]:
        return self._model.views


@dataclass(frozen=True)
class FedETF(FedAvg):
    """FedETF: FedAvg of features, projection and temperature under a classifier that is the same for all.

    Attributes:
        dim: Numbers that features are projected to, at least C - 1; None: C, as many as classes.
        temperature: First value of beta, > 0.
        gamma: Exponent of the class counts in the balanced loss, >= 0; 0: plain cross-entropy.
    """

    batched: ClassVar = True
    parent: ClassVar = None
    exempt: ClassVar = {
        "one_full_batch_step_is_gradient_descent": "the law's model has no head to replace",
        "loss_falls_on_two_quadratic_clients": "the law's model has no head to replace",
    }

    dim: int | None = None
    temperature: float = 1.0
    gamma: float = 1.0

    def check(self) -> None:
        super().check()
        require(self.dim is None or self.dim >= 1, "strategy.dim", ">= 1, or null for the number of classes", self.dim)
        require(self.temperature > 0, "strategy.temperature", "> 0", self.temperature)
        require(self.gamma >= 0, "strategy.gamma", ">= 0", self.gamma)

    def init(self, info: Info, w: Tensor) -> State:
        if info.num_classes < 2:
            raise ConfigError("fedetf needs data with classes; these have numbers as targets")
        return State(w)

    def model(self, module: nn.Module) -> nn.Module:
        head = head_of(module, "fedetf")
        C = head.out_features
        dim = C if self.dim is None else self.dim
        require(dim >= C - 1, "strategy.dim", f"at least {C - 1}, for a simplex of {C} classes", dim)
        frame = etf(C, dim, torch.default_generator).to(head.weight)
        features: nn.Module = module.get_submodule("features")
        return Simplex(features, head.in_features, frame, self.temperature)

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        if "shift" not in local.scratch:
            counts = local.class_counts.to(local.start)
            # log of n^gamma: minus infinity for a class that the client does not have, unless gamma is 0.
            absent = counts.new_full((), -math.inf if self.gamma else 0.0)
            shift = torch.where(counts > 0, self.gamma * counts.clamp(min=1).log(), absent)
            local.scratch["shift"] = shift[:, None]
        return local.loss(_Shifted(model, local.scratch["shift"]), batch)
