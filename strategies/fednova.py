"""FedNova: an update is divided by the work behind it before it is averaged, so that clients who make more steps do
not pull the global model towards their own optimum.

Source: Wang et al., 2020, sections 4.1 (the vectors a_i) and 5 (the method), https://arxiv.org/abs/2007.07481.

A visit whose steps are linear in the gradients ``g_k`` ends at ``w - sum_k c_k g_k``, with coefficients ``c = eta a_i``
that do not depend on the data. Their sum, ``eta ||a_i||_1``, is how far the client would go if every gradient were -1:
`unit_step` runs the step rule on exactly that, beside the training. With a constant learning rate this gives the
paper's ``||a_i||_1``: ``tau`` for SGD, ``[tau - rho (1 - rho^tau) / (1 - rho)] / (1 - rho)`` with momentum rho, and
``[1 - (1 - eta mu)^tau] / (eta mu)`` with a proximal term.

Departures:
    1. The same rule covers what the paper has no formula for: Nesterov's momentum, momentum together with a proximal
       term (where the authors' code adds up both vectors), and any learning rates within a visit. Weight decay is a
       part of the gradient: the objective is then ``F_i + weight_decay / 2 |w|^2``.
    2. ``tau_eff`` is ``server_lr sum_i p_i ||a_i||_1``. The paper leaves it open; with a proximal term the authors'
       code takes ``sum_i p_i tau_i``.
    3. The weights ``p_i`` of a cohort are its members' shares of examples (``examples``) or equal (``uniform``).
    4. With momentum rho and ``eta mu > (1 - sqrt(rho))^2`` some coefficients are negative: the pull back overshoots.
       What is divided by is still their sum, the response to a constant gradient, not ``||a_i||_1``.
    5. The authors' code also has momentum on the server; here there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fedsim.clients.local import Local
from fedsim.clients.optimizers import SGD
from fedsim.clients.visit import ClientOptions
from fedsim.errors import ConfigError
from fedsim.reduce import Entry, Reduced, mean
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import Grad, State, require

N = TypeVar("N", float, Tensor)


@dataclass(frozen=True)
class FedNova(FedAvg):
    """FedNova.

    Attributes:
        server_lr: Factor on ``tau_eff``, > 0.
        mu: Weight of the local ``mu / 2 * |w - start|^2``, >= 0 and at most ``(1 - client.momentum) / client.lr``:
            above, the sum of the coefficients could fall below that of one step, and to 0.
        normalise: False averages updates as they are, which is FedAvg, or FedProx if ``mu > 0``. (With equal work on
            all clients FedNova is FedAvg too, up to rounding: ``delta / work * work`` is not ``delta`` in floats.)
    """

    batched: ClassVar = True
    parent: ClassVar = "fedavg"
    neutral: ClassVar = {"normalise": False}

    server_lr: float = 1.0
    mu: float = 0.0
    normalise: bool = True

    def check(self) -> None:
        super().check()
        require(self.server_lr > 0, "strategy.server_lr", "> 0", self.server_lr)
        require(self.mu >= 0, "strategy.mu", ">= 0", self.mu)

    def check_client(self, options: ClientOptions) -> None:
        if self.normalise:
            linear_rule(options, self.mu)

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        return grad(w) + self.mu * (w - local.start) if self.mu else grad(w)

    def update(self, w: Tensor, d: Tensor, local: Local) -> Tensor:
        if self.normalise:
            nothing = torch.zeros_like(w[:, :1], dtype=torch.float64)
            rule, x, b = local.scratch.get("work") or (linear_rule(local.options, self.mu), nothing, nothing)
            further = unit_step(x, b, local.lr, rule, self.mu)
            x, b = (torch.where(local.active, new, old) for new, old in zip(further, (x, b), strict=True))
            local.scratch["work"] = rule, x, b
        return local.optimizer(w, d)

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        if not self.normalise:
            return super().finish(w, local)
        delta = local.delta(w)
        _, work, _ = local.scratch.get("work", (None, torch.zeros_like(delta[:, :1]), None))
        delta = torch.where(work == 0, delta, delta / work)  # no step: no update either
        return {
            "delta": mean(delta, self.weight(w)),  # -d_i in the paper
            "work": mean(work, self.weight(w)),  # eta ||a_i||_1
        }

    def step(self, state: State, reduced: Reduced) -> State:
        scale = self.server_lr * (reduced["work"] if self.normalise else 1.0)  # eta tau_eff
        return State((state.w + scale * reduced["delta"]).to(state.w))


def unit_step(x: N, b: N, lr: Any, rule: SGD, mu: float) -> tuple[N, N]:
    """One local step on a gradient of -1, from 0: the sum of the coefficients of all gradients so far grows likewise.

    Args:
        x: Where the steps before have led: a number, or ``[C, 1]``.
        b: Momentum buffer likewise.
        lr: Learning rate of the step.
        rule: Gives momentum and Nesterov's variant.
        mu: Weight of the proximal term.

    Returns:
        New ``x`` and ``b``.
    """
    g = 1 - mu * x
    b = rule.momentum * b + g
    return x + lr * (g + rule.momentum * b if rule.nesterov else b), b


def linear_rule(options: ClientOptions, mu: float) -> SGD:
    """The local optimizer, if its steps are linear in the gradients of the visit with known coefficients.

    Args:
        options: The ``client`` group.
        mu: Weight of the proximal term.

    Raises:
        ConfigError: They are not; says what to change.
    """
    rule = options.optimizer
    if isinstance(rule, SGD) and rule.dampening:
        raise ConfigError(f"strategy=fednova needs momentum without dampening, got {rule.dampening:g}")
    if not isinstance(rule, SGD):
        kind = getattr(rule, "name", type(rule).__name__.lower())
        raise ConfigError(
            f"strategy=fednova needs client.optimizer=sgd, got {kind}, whose steps are not linear in the gradients: "
            "there is no a_i to normalise by"
        )
    if rule.momentum and options.keep_optimizer:
        raise ConfigError(
            f"strategy=fednova needs client.keep_optimizer=false with client.momentum={rule.momentum:g}: momentum of "
            "earlier visits would move the client by work that was normalised already"
        )
    if mu and options.clip_norm is not None:
        raise ConfigError(
            f"strategy=fednova needs client.clip_norm=null with strategy.mu={mu:g}, got {options.clip_norm:g}: a "
            "clipped proximal term is not linear in the gradients"
        )
    bound = (1 - rule.momentum) / options.lr
    if mu > bound * (1 + 1e-9):  # 0.1 and 1 - 0.9 are equal to whoever wrote them
        raise ConfigError(
            f"strategy.mu must be at most (1 - client.momentum) / client.lr = {bound:g}, got {mu:g}: the pull back "
            "would overshoot so far that coefficients of both signs cancel; lower strategy.mu, client.lr or "
            "client.momentum"
        )
    return rule
