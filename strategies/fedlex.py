"""FedLEx: clients first explore on their own; parameters that no loss wants to move are then held back.

Source: Interno et al., 2024, "Federated Loss Exploration for Improved Convergence on Non-IID Data",
https://arxiv.org/abs/2506.18640; the official code for everything that the abstract leaves open. Its releases differ
from each other and from the idea, so that none is followed to the letter.
Departures:
    1. Explorers are independent; in the official code they train one model after one another (``sequential=true``), and
       every one of them is then the last.
    2. They start from the initial model; the official code has the model of one epoch on some client's data
       (``base_epochs=1``), and goes on from the explored model in round 1 (``warm_start=true``).
    3. The guidance is built once, before round 1, from all explorers; the official code builds it anew after every
       round from those that took part, if every client explores (``guidance_scope=participants``).
    4. An epoch's loss is its mean; the official code looks at the last minibatch.
    5. The local rate follows ``client.lr`` and ``client.lr_decay``; the official code uses the server's schedule.
    6. Statistics of batch norms are averaged as in FedAvg; the official code does not aggregate them.
    7. Spreads are scaled by their minimum and maximum; the official code can also take median and quartiles, which
       gives factors below 0, and ascent there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.clients.local import Local
from fedsim.clients.optimizers import TorchOptimizer
from fedsim.clients.visit import ClientOptions
from fedsim.errors import ConfigError
from fedsim.federation import Federation
from fedsim.reduce import Entry, Reduced, mean, once, uniform
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import ClientHalf, Grad, Info, require
from fedsim.vector import Layout


@dataclass(frozen=True)
class Explorer(ClientHalf):
    """Long training from a given model; sends how far every parameter went.

    Attributes:
        epochs: At most so many.
        patience: Ends after so many epochs without a lower loss.
        keep: Whether the client remembers its spread.
    """

    batched: ClassVar = True

    epochs: int = 150
    patience: int = 40
    keep: bool = False

    def work(self, local: Local) -> Tensor:
        w, lanes = local.start, len(local.clients)
        best = torch.full((lanes, 1), math.inf, dtype=torch.float64, device=w.device)
        bad = torch.zeros_like(best)
        for _ in range(self.epochs):
            active = bad < self.patience
            if not active.any():
                break
            w = local.train(w, epochs=1, active=active)
            loss = local.mean_loss.to(best)[:, None]
            better = active & (loss < best)
            best = torch.where(better, loss, best)
            bad = torch.where(better, 0.0, bad + active)
        return w

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        delta = local.delta(w)
        if self.keep:
            local.memory.spread = delta.square().to(w)
        # One vector goes up; the displacement itself is for those who ask for what the sum of squares leaves out.
        return {"spread": mean(delta.square(), uniform(w)), "delta": replace(mean(delta, uniform(w)), nbytes=0)}


def guidance(spread: Tensor, layout: Layout) -> Tensor:
    """Spreads scaled to [0, 1] within every tensor, ``[d]``; 1 where all of a tensor's are equal."""
    out = torch.ones_like(spread)
    for _, s in layout.blocks():
        low, high = spread[s].min(), spread[s].max()
        if high > low:
            out[s] = (spread[s] - low) / (high - low)
    return out


def choose_explorers(fed: Federation, share: float) -> list[int]:
    """A share of all clients, at least one, chosen uniformly; in id order."""
    count = max(1, round(share * fed.num_clients))
    return sorted(torch.randperm(fed.num_clients, generator=fed.generator("explorers"))[:count].tolist())


def explore(
    fed: Federation, base: Tensor, who: list[int], half: Explorer, sequential: bool
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Lets clients explore from ``base``.

    Args:
        fed: The federation.
        base: Where every explorer starts, ``[d]``; if ``sequential`` the first, and every other where the last ended.
        who: The explorers.
        half: What they do.
        sequential: Whether one comes after the other.

    Returns:
        The squared displacement of every parameter, averaged over explorers (if ``sequential`` that of the whole walk),
        float64 ``[d]``, the mean of the explored models (the last one), ``[d]``, and who explored: a run may leave out
        clients that fail.
    """
    if not sequential:
        answer = fed.train(who, None, half=half, send={"w": base}, phase="explore")
        return answer["spread"], (base + answer["delta"]).to(base), answer.clients
    w = base
    for client in who:
        w = (w + fed.train([client], None, half=half, send={"w": w}, phase="explore")["delta"]).to(base)
    return (w.double() - base).square(), w, tuple(who)


@dataclass(frozen=True)
class GuidedState:
    """All that the server carries from one round to the next.

    Attributes:
        w: Global parameters, ``[d]``.
        v: Damped momentum, float64 ``[d]``: rounding it would make ``beta=0`` another method than FedAvg.
        G: Guidance, in [0, 1], ``[d]``.
    """

    w: Tensor
    v: Tensor
    G: Tensor


@dataclass(frozen=True)
class FedLEx(FedAvg):
    """FedLEx.

    Attributes:
        explorers: Share of the clients that explore, in (0, 1]; at least one does.
        explore_epochs: Most epochs of an explorer; 0: no exploration, and a guidance of 1 everywhere.
        patience: Epochs without a lower loss after which an explorer stops.
        beta: Damping of the server's momentum, in [0, 1); 0 takes FedAvg's step.
        apply: What the guidance multiplies: the gradient (``grad``), or the optimizer's step (``update``), which is
            another thing under Adam, clipping and weight decay, and under momentum where the guidance changes.
        guidance_scope: ``all``: one guidance, from all explorers; ``participants``: after each round, from its clients.
        sequential: Explorers train one model one after another, as in the official code.
        base_epochs: Epochs on the first explorer's data that come before, in the model that explorers start from.
        warm_start: Whether round 1 starts from the mean of the explored models.
    """

    batched: ClassVar = True
    parent: ClassVar = "fedavg"
    parent_options: ClassVar = {}
    neutral: ClassVar = {"explore_epochs": 0, "beta": 0.0}
    exempt: ClassVar = {
        "one_full_batch_step_is_gradient_descent": "the guidance scales the gradient; the server takes a tenth",
        "loss_falls_on_two_quadratic_clients": "the guidance holds the parameter that the exploration moved least",
    }
    quick: ClassVar = {"explore_epochs": 2, "patience": 1, "explorers": 0.5}

    explorers: float = 1.0
    explore_epochs: int = 150
    patience: int = 40
    beta: float = 0.9
    apply: str = "grad"
    guidance_scope: str = "all"
    sequential: bool = False
    base_epochs: int = 0
    warm_start: bool = False

    def check(self) -> None:
        super().check()
        require(0 < self.explorers <= 1, "strategy.explorers", "a share of the clients in (0, 1]", self.explorers)
        require(self.explore_epochs >= 0, "strategy.explore_epochs", ">= 0", self.explore_epochs)
        require(self.patience >= 1, "strategy.patience", ">= 1", self.patience)
        require(0 <= self.beta < 1, "strategy.beta", "in [0, 1)", self.beta)
        require(self.apply in ("grad", "update"), "strategy.apply", "grad or update", self.apply)
        scopes = ("all", "participants")
        require(self.guidance_scope in scopes, "strategy.guidance_scope", "all or participants", self.guidance_scope)
        require(self.base_epochs >= 0, "strategy.base_epochs", ">= 0", self.base_epochs)
        if self.guidance_scope == "participants" and (self.explorers < 1 or self.sequential):
            raise ConfigError(
                "strategy.guidance_scope=participants needs every client's own exploration: set strategy.explorers=1.0 "
                "and strategy.sequential=false"
            )

    def check_client(self, options: ClientOptions) -> None:
        decay = getattr(options.optimizer, "weight_decay", 0.0)
        key = "client.weight_decay"
        if isinstance(options.optimizer, TorchOptimizer):
            key = "client.optimizer.weight_decay"
        if self.apply == "grad" and self.explore_epochs and decay:
            raise ConfigError(
                f"{key}={decay:g} would move parameters that the guidance holds: set "
                f"strategy.apply=update, which holds them against the whole step, or {key}=0"
            )

    def init(self, info: Info, w: Tensor) -> GuidedState:
        return GuidedState(w, torch.zeros_like(w, dtype=torch.float64), torch.ones_like(w))

    def prepare(self, fed: Federation, state: GuidedState) -> GuidedState:
        if not self.explore_epochs:
            return state
        who = choose_explorers(fed, self.explorers)
        base = state.w
        if self.base_epochs:
            half = FedAvg(weights="uniform")  # a client without examples weighs nothing else
            sent = {"w": base}
            answer = fed.train(who[:1], None, half=half, send=sent, epochs=self.base_epochs, phase="base")
            base = (base + answer["delta"]).to(base)
        own = self.guidance_scope == "participants"
        spread, explored, _ = explore(
            fed, base, who, Explorer(self.explore_epochs, self.patience, keep=own), self.sequential
        )
        G = state.G if own else guidance(spread, fed.layout).to(state.G)
        return replace(state, w=explored if self.warm_start else state.w, G=G)

    def memory(self, local: Local) -> dict[str, Tensor]:
        return {"spread": torch.zeros_like(local.start)} if self.guidance_scope == "participants" else {}

    def broadcast(self, state: GuidedState) -> dict[str, Any]:
        return {"w": state.w, "G": once(state.G)} if self.explore_epochs else {"w": state.w}

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        g = grad(w)
        return g * local.sent.G if self.explore_epochs and self.apply == "grad" else g

    def update(self, w: Tensor, d: Tensor, local: Local) -> Tensor:
        if not self.explore_epochs or self.apply == "grad":
            return local.optimizer(w, d)
        before = w.clone()  # the optimizer may write into w
        return torch.lerp(before, local.optimizer(w, d), local.sent.G)

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        entries = super().finish(w, local)
        if self.guidance_scope == "participants":  # the server has had it since the exploration
            entries["spread"] = replace(mean(local.memory.spread, uniform(w)), nbytes=0)
        return entries

    def step(self, state: GuidedState, reduced: Reduced) -> GuidedState:  # type: ignore[override]
        v = self.beta * state.v + (1 - self.beta) * reduced["delta"]
        own = self.guidance_scope == "participants"
        G = guidance(reduced["spread"], reduced.layout).to(state.G) if own else state.G
        return GuidedState((state.w + v).to(state.w), v, G)
