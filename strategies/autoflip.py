"""AutoFLIP: parameters that a loss exploration barely moved are pruned, and units of which nothing is left are removed.

Source: Internò et al., 2024, "Automated Federated Learning via Informed Pruning", https://arxiv.org/abs/2405.10271; the
equations are those of the official code, which agree with what is said of the paper. A later version adds a refinement
by the agreement of clients, whose formula is not known here.
Departures:
    1. Explorers are independent; in the official code they train one model after one another (``sequential=true``).
    2. Round 1 starts from the initial model under its mask; in the official code from the explored one, after two more
       epochs per client (``warm_start=true``, without these).
    3. The first mask is made from all explorers (``mask_scope=all``), or from those among the round's participants; in
       the official code from one random cohort.
    4. Clients mask their model after every step; in the official code they train densely if every client explores.
    5. With ``mask_scope=participants`` every round has the binary mask of its participants; the official code makes it
       anew without a threshold, and does not use it.
    6. Units are removed (``structured``); the rule is a reconstruction, and the official code has none
       (``structured=off``).
    7. A tensor of which the exploration moved all entries alike, or none, is not pruned; the official code divides by
       zero there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.clients.local import Local
from fedsim.errors import ConfigError
from fedsim.federation import Federation
from fedsim.pruning import Chain
from fedsim.reduce import Entry, mean, sized, uniform
from fedsim.strategies.fedlex import Explorer, choose_explorers, explore, guidance
from fedsim.strategies.fedprune import Masked, MaskedState
from fedsim.strategy import ClientHalf, Info, require
from fedsim.vector import Layout


@dataclass(frozen=True)
class FlipState(MaskedState):
    """All that the server carries from one round to the next.

    Attributes:
        D: Mean spread of all explorers, ``[d]``; empty where one mask serves the whole run.
        explorers: Who explored.
    """

    D: Tensor
    explorers: tuple[int, ...]


@dataclass(frozen=True)
class Recall(ClientHalf):
    """Gives the spread of a client's own exploration, which the server has had since then: nothing is charged."""

    batched: ClassVar = True

    def work(self, local: Local) -> Tensor:
        return local.start

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        return {"spread": sized(mean(local.memory.spread, uniform(w)), 0)}


@dataclass(frozen=True)
class AutoFLIP(Masked):
    """AutoFLIP.

    Attributes:
        explorers: Share of the clients that explore, in (0, 1]; at least one does.
        explore_epochs: Most epochs of an explorer, >= 1.
        patience: Epochs without a lower loss after which an explorer stops, >= 1.
        mask_scope: ``participants``: every round's mask is made from those of its clients that explored (from all that
            did, if none of them is among the round's); ``all``: one mask for the whole run.
        rule: ``quantile``: a share ``threshold`` is pruned; ``absolute``: what has a guidance below ``threshold``.
        sequential: Explorers train one model one after another, as in the official code.
        warm_start: Whether round 1 starts from the mean of the explored models.
    """

    batched: ClassVar = True
    parent: ClassVar = "fedavg"
    parent_options: ClassVar = {}
    neutral: ClassVar = {"threshold": 0.0, "beta": 0.0}
    exempt: ClassVar = {
        "one_full_batch_step_is_gradient_descent": "the least moved parameter is pruned; the server takes a tenth",
        "loss_falls_on_two_quadratic_clients": "the least moved parameter is pruned",
    }
    quick: ClassVar = {"explore_epochs": 2, "patience": 1, "explorers": 0.5}

    structured: str = "dead"
    beta: float = 0.9
    explorers: float = 1.0
    explore_epochs: int = 150
    patience: int = 40
    mask_scope: str = "participants"
    rule: str = "quantile"
    sequential: bool = False
    warm_start: bool = False

    def check(self) -> None:
        super().check()
        require(0 < self.explorers <= 1, "strategy.explorers", "a share of the clients in (0, 1]", self.explorers)
        require(self.explore_epochs >= 1, "strategy.explore_epochs", ">= 1", self.explore_epochs)
        require(self.patience >= 1, "strategy.patience", ">= 1", self.patience)
        scopes = ("participants", "all")
        require(self.mask_scope in scopes, "strategy.mask_scope", "participants or all", self.mask_scope)
        require(self.rule in ("quantile", "absolute"), "strategy.rule", "quantile or absolute", self.rule)
        if self.sequential and self.mask_scope == "participants" and self.threshold:
            raise ConfigError(
                "strategy.mask_scope=participants needs each client's own exploration, and strategy.sequential=true is "
                "one walk through all of them: set strategy.mask_scope=all"
            )

    def init(self, info: Info, w: Tensor) -> FlipState:
        state = super().init(info, w)
        return FlipState(state.w, state.v, state.M, w.new_zeros(0), ())

    def memory(self, local: Local) -> dict[str, Tensor]:
        # An explorer's own: where all explore, what every client keeps.
        keeps = self.threshold > 0 and self.mask_scope == "participants" and self.explorers == 1
        return {"spread": torch.zeros_like(local.start)} if keeps else {}

    def prepare(self, fed: Federation, state: FlipState) -> FlipState:
        super().prepare(fed, state)
        if not self.threshold and not self.warm_start:
            return state
        who = choose_explorers(fed, self.explorers)
        own = self.threshold > 0 and self.mask_scope == "participants"
        half = Explorer(self.explore_epochs, self.patience, keep=own)
        spread, explored, answered = explore(fed, state.w, who, half, self.sequential)
        state = replace(state, w=explored if self.warm_start else state.w, explorers=answered)
        if own:
            return replace(state, D=spread.to(state.w))
        return self.pruned(fed, state, guidance(spread, fed.layout)) if self.threshold else state

    def scores(self, fed: Federation, state: FlipState, who: list[int]) -> Tensor | None:
        if self.mask_scope == "all":
            return None
        own = sorted({*who} & {*state.explorers})
        spread = fed.train(own, None, half=Recall(), send={}, phase="recall")["spread"] if own else state.D.double()
        return guidance(spread, fed.layout)

    def mask(self, scores: Tensor, layout: Layout, chain: Chain | None, rule: str = "quantile") -> Tensor:
        M = super().mask(scores, layout, chain, self.rule)
        for _, s in layout.blocks():
            if bool((scores[s] == 1).all()):  # nothing in it moved, or all of it alike
                M[s] = True
        return M
