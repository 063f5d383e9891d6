"""FedSpeed: a proximal term whose bias a dual per client removes, on gradients taken at a perturbed point.

Source: Sun et al., 2023, Algorithm 1, https://arxiv.org/abs/2302.10429; the official code where it differs.
Departures:
    1. The dual is kept as ``h_i``, the sum of client i's local displacements (the paper's ``-lambda ghat_i``), so
       nothing is divided by ``mu = 1 / lambda``; with ``rho=0 clip=none`` this is `FedDyn`, to the bit.
    2. ``dual=all`` averages the duals of the whole population, as the official code does; ``active`` those of the
       cohort, as the paper does: with partial participation that stalls or diverges.
    3. The perturbation has the length ``rho`` (``normalised``, the official code), or is ``rho g`` (``raw``,
       Algorithm 1).
    4. Clipping is not in Algorithm 1. ``clip=grad`` bounds the gradient alone; ``official`` bounds what the official
       code does, ``g + mu (h - start)``, and adds ``mu w`` (and ``client.weight_decay``) afterwards; ``none``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedsim.clients.local import Local
from fedsim.clients.ops import clip, unit
from fedsim.clients.visit import ClientOptions
from fedsim.errors import ConfigError
from fedsim.reduce import Entry, Reduced
from fedsim.strategies.feddyn import DualState, dual_direction, dual_finish, dual_memory, dual_step
from fedsim.strategy import Grad, Info, Strategy, require


@dataclass(frozen=True)
class FedSpeed(Strategy):
    """FedSpeed. Two gradients per step.

    Attributes:
        mu: Weight of the proximal term and the dual, 1 / lambda in the paper, >= 0.
        rho: Radius of the perturbation (its factor, if ``raw``), >= 0; 0 gives FedDyn.
        alpha: Weight of the gradient at the perturbed point, in [0, 1]; the plain gradient has the rest.
        perturbation: ``normalised`` or ``raw``.
        clip: ``grad``, ``official`` or ``none``.
        clip_norm: Bound of the clipping, > 0.
        dual: ``all``, ``active`` or ``off``.
        dual_kept: ``client`` or ``server``: who keeps a client's dual; the server's is sent down in every round, which
            costs bytes and changes nothing else.
    """

    batched: ClassVar = True
    parent: ClassVar = "feddyn"
    neutral: ClassVar = {"rho": 0.0, "clip": "none"}
    exempt: ClassVar = {
        "one_full_batch_step_is_gradient_descent": "the mean dual doubles the first step: the server adds both"
    }

    mu: float = 0.1
    rho: float = 0.1
    alpha: float = 1.0
    perturbation: str = "normalised"
    clip: str = "grad"
    clip_norm: float = 10.0
    dual: str = "all"
    dual_kept: str = "client"

    def check(self) -> None:
        require(self.mu >= 0, "strategy.mu", ">= 0", self.mu)
        require(self.rho >= 0, "strategy.rho", ">= 0", self.rho)
        require(0 <= self.alpha <= 1, "strategy.alpha", "in [0, 1]", self.alpha)
        kinds = ("normalised", "raw")
        require(self.perturbation in kinds, "strategy.perturbation", "normalised or raw", self.perturbation)
        require(self.clip in ("grad", "official", "none"), "strategy.clip", "grad, official or none", self.clip)
        require(self.clip_norm > 0, "strategy.clip_norm", "> 0", self.clip_norm)
        require(self.dual in ("all", "active", "off"), "strategy.dual", "all, active or off", self.dual)
        require(self.dual_kept in ("client", "server"), "strategy.dual_kept", "client or server", self.dual_kept)

    def check_client(self, options: ClientOptions) -> None:
        if self.clip != "none" and options.clip_norm is not None:
            raise ConfigError(
                f"strategy.clip={self.clip} and client.clip_norm={options.clip_norm:g} would clip twice: set "
                "client.clip_norm=null, or strategy.clip=none to bound the whole direction"
            )

    def model(self, module: nn.Module) -> nn.Module:
        kind = nn.modules.batchnorm._BatchNorm
        norms = [name for name, m in module.named_modules() if isinstance(m, kind) and m.track_running_stats]
        if norms:
            raise ConfigError(
                f"fedspeed has no rule for the statistics of batch norms (the dual does not cover them), and the model "
                f"has {len(norms)} ({norms[0]}, ...): choose one with group norm, such as model=resnet18_gn"
            )
        return module

    def init(self, info: Info, w: Tensor) -> DualState:
        return DualState(w, torch.zeros_like(w, dtype=torch.float64), info.num_clients)

    def memory(self, local: Local) -> dict[str, Tensor]:
        return dual_memory(local, self.dual)

    def broadcast(self, state: DualState) -> dict[str, Any]:
        if self.dual_kept == "client" or self.dual == "off":
            return {"w": state.w}
        return {"w": state.w, "h": state.w}  # a stand-in of the size of the client's own dual, which it has

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        g = grad(w)
        if self.rho and self.alpha:
            e = self.rho * (unit(g) if self.perturbation == "normalised" else g)
            g = torch.lerp(g, grad(w + e), self.alpha)
        if self.clip == "official":
            drawn = local.memory.h - local.start if "h" in local.memory else -local.start
            return clip(g + self.mu * drawn, self.clip_norm) + self.mu * w
        return dual_direction(clip(g, self.clip_norm) if self.clip == "grad" else g, w, self.mu, local)

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        return dual_finish(w, local, self.dual)

    def step(self, state: DualState, reduced: Reduced) -> DualState:
        return dual_step(state, reduced, self.dual)
