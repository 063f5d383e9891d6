"""FedPrune: FedAvg on a part of the weights, chosen by size or by chance.

Source: Internò et al., 2024, https://arxiv.org/abs/2405.10271, and its official code: baselines of AutoFLIP.
`Masked`, the training that both share, is what AutoFLIP does in its rounds.
Departures:
    1. A random mask is drawn once; the official code draws another one again and again (``redraw=true``: every round).
    2. The mask by magnitude is ours: one threshold on ``|w|`` over all weights and biases, as AutoFLIP has one on its
       scores.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedsim.clients.local import Local
from fedsim.clients.optimizers import TorchOptimizer
from fedsim.clients.visit import ClientOptions
from fedsim.errors import ConfigError
from fedsim.federation import Federation
from fedsim.pruning import Chain, Shrunk, empty_tensors, flops, mask_of, quantile
from fedsim.reduce import Entry, Reduced, once, sized
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import Info, require
from fedsim.vector import Layout

log = logging.getLogger("fedsim")


@dataclass(frozen=True)
class MaskedState:
    """All that the server carries from one round to the next.

    Attributes:
        w: Global parameters, 0 where M is False, ``[d]``.
        v: Damped momentum, float64 ``[d]``.
        M: Mask, bool ``[d]``: which parameters survive.
    """

    w: Tensor
    v: Tensor
    M: Tensor


@dataclass(frozen=True)
class Masked(FedAvg):
    """FedAvg under a mask, for methods that say which parameters survive: override `scores`.

    Attributes:
        threshold: T_p, share of the parameters that is pruned, in [0, 1); 0 prunes nothing.
        structured: ``dead``: units whose weights and bias are all masked are removed from the network that is trained;
            ``mean``: units whose weights score below the threshold on average are masked, too; ``off``.
        beta: Damping of the server's momentum, in [0, 1); 0 takes FedAvg's step.
    """

    batched: ClassVar = True

    threshold: float = 0.3
    structured: str = "off"
    beta: float = 0.0

    def check(self) -> None:
        super().check()
        require(0 <= self.threshold < 1, "strategy.threshold", "a share of the parameters in [0, 1)", self.threshold)
        require(self.structured in ("dead", "mean", "off"), "strategy.structured", "dead, mean or off", self.structured)
        require(0 <= self.beta < 1, "strategy.beta", "in [0, 1)", self.beta)

    @property
    def removes(self) -> bool:
        """Whether units may be removed."""
        return self.threshold > 0 and self.structured != "off"

    def check_client(self, options: ClientOptions) -> None:
        if self.removes and options.keep_optimizer:
            raise ConfigError(
                "client.keep_optimizer=true keeps numbers of a network that changes its size when units are removed: "
                "set it to false, or strategy.structured=off"
            )
        if self.removes and isinstance(options.optimizer, TorchOptimizer):
            raise ConfigError(
                "client.optimizer by _target_ is made for one size of the network, which changes when units are "
                "removed: choose sgd, adam, adamw or adagrad, or set strategy.structured=off"
            )

    def init(self, info: Info, w: Tensor) -> MaskedState:
        return MaskedState(w, torch.zeros_like(w, dtype=torch.float64), torch.ones_like(w, dtype=torch.bool))

    def prepare(self, fed: Federation, state: Any) -> Any:
        if self.threshold and fed.program.kept_out is not None:
            raise ConfigError(
                f"{type(self).__name__} masks all parameters, and a recipe keeps some of them private or frozen: set "
                "strategy.threshold=0, or leave the recipe out"
            )
        if self.removes:
            Chain.of(fed.module)  # refused before any work is done
        return state

    # --- the mask -----------------------------------------------------------------------------------------

    def scores(self, fed: Federation, state: Any, who: list[int]) -> Tensor | None:
        """By what the parameters are ranked for this round, ``[d]``; None: the mask stays as it is."""
        return None

    def mask(self, scores: Tensor, layout: Layout, chain: Chain | None, rule: str = "quantile") -> Tensor:
        """The mask of these scores, bool ``[d]``.

        Args:
            scores: ``[d]``.
            layout: Of the parameters.
            chain: Where whole units are masked that score too low on average, or None.
            rule: See `fedsim.pruning.mask_of`.
        """
        M = mask_of(scores, self.threshold, rule)
        if chain is None:
            return M
        at = self.threshold if rule == "absolute" else float(quantile(scores, self.threshold))
        return chain.without_weak(M, scores, at, rule)

    def pruned(self, fed: Federation, state: Any, scores: Tensor) -> Any:
        """The state under the mask of these scores; what was masked before and is not now starts again from 0."""
        chain, w = Chain.of(fed.module) if self.removes else None, state.w
        M = self.mask(scores.to(w.device), fed.layout, chain if self.structured == "mean" else None)
        if chain is not None:
            M, w = chain.closed(M, w)
            chain.kept(M, self.threshold)  # refuses a layer without units
        lost = empty_tensors(M, fed.layout)
        if lost and lost != empty_tensors(state.M, fed.layout):
            log.warning("the mask leaves nothing of %d tensors: %s", len(lost), ", ".join(lost))
        return replace(state, w=w * M, v=state.v * M, M=M)

    # --- the round ----------------------------------------------------------------------------------------

    def broadcast(self, state: Any) -> dict[str, Any]:
        if bool(state.M.all()):
            return {"w": state.w}
        return {"w": sized(state.w, 4 * int(state.M.sum())), "M": once(state.M)}

    def update(self, w: Tensor, d: Tensor, local: Local) -> Tensor:
        new, M = local.optimizer(w, d), getattr(local.sent, "M", None)
        return new if M is None else new.mul_(M)

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        entries, M = super().finish(w, local), getattr(local.sent, "M", None)
        return entries if M is None else {**entries, "delta": sized(entries["delta"], 4 * int(M.sum()))}

    def step(self, state: Any, reduced: Reduced) -> Any:
        v = (self.beta * state.v + (1 - self.beta) * reduced["delta"]) * state.M
        return replace(state, w=(state.w + v).to(state.w) * state.M, v=v)

    def round(self, fed: Federation, state: Any) -> Any:
        who = fed.sample()
        scores = self.scores(fed, state, who) if self.threshold else None
        if scores is not None:
            state = self.pruned(fed, state, scores)
        whole, model, units = fed.module, None, 0
        if self.removes:
            chain = Chain.of(whole)
            kept = chain.kept(state.M, self.threshold)
            units = sum(link.units for link in chain.links[:-1]) - sum(map(len, kept))
            model = Shrunk(kept) if units else None
        self.report(fed, state, whole, model, units)
        if model is None:
            return self.step(state, fed.train(who, state))
        index = chain.index(kept).to(state.w.device)
        reduced = fed.train(who, state, send=self.part(state, index), model=model)
        delta = torch.zeros_like(state.v)
        delta[index] = reduced["delta"]
        whole_sized = {**reduced, "delta": delta}
        return self.step(
            state, Reduced(whole_sized, fed.layout, reduced.clients, reduced.num_clients, reduced.num_examples)
        )

    def part(self, state: Any, index: Tensor) -> dict[str, Any]:
        """What goes down to a smaller network with the parameters ``index``, ``[d_small]``.

        The mask of the whole network, charged once, tells which units are gone, too; a client makes its own from it.
        """
        w, M = state.w[index], state.M[index]
        return {"w": sized(w, 4 * int(M.sum())), "M": sized(M, 0), "bitmap": once(state.M)}

    def report(self, fed: Federation, state: Any, whole: nn.Module, model: Shrunk | None, units: int) -> None:
        """Sparsity, and the work of one example's forward pass: in theory, and of the network that is run."""
        program, test = fed.program, fed.program.dataset.test.x
        x = program.inputs(test[:1] if len(test) else test.new_zeros(1, *test.shape[1:]))
        fed.log |= {
            "density": int(state.M.sum()) / fed.layout.d,
            "flops_theoretical": flops(whole, x, state.M),
            "flops_measured": flops(whole if model is None else model(whole), x),
            "units_removed": units,
            "tensors_empty": len(empty_tensors(state.M, fed.layout)),
        }


@dataclass(frozen=True)
class FedPrune(Masked):
    """Pruning by size or by chance.

    Attributes:
        by: ``magnitude``: the smallest ``|w|`` of the global model fall; ``random``: any.
        start: Round at whose beginning the mask is made, >= 1; all rounds before are dense.
        redraw: Whether a random mask is drawn anew in every round from ``start`` on.
    """

    batched: ClassVar = True
    parent: ClassVar = "fedavg"
    parent_options: ClassVar = {}
    neutral: ClassVar = {"threshold": 0.0}
    exempt: ClassVar = {
        "one_full_batch_step_is_gradient_descent": "one of the three parameters is pruned",
        "loss_falls_on_two_quadratic_clients": "one of the four parameters is pruned",
    }

    by: str = "magnitude"
    start: int = 1
    redraw: bool = False

    def check(self) -> None:
        super().check()
        require(self.by in ("magnitude", "random"), "strategy.by", "magnitude or random", self.by)
        require(self.start >= 1, "strategy.start", "a round, >= 1", self.start)
        if self.redraw and self.by != "random":
            raise ConfigError("strategy.redraw=true is for strategy.by=random; a mask by magnitude is made once")

    def init(self, info: Info, w: Tensor) -> MaskedState:
        if self.threshold and self.start > info.rounds:
            log.warning("strategy.start=%d is after the last of %d rounds: nothing is pruned", self.start, info.rounds)
        return super().init(info, w)

    def scores(self, fed: Federation, state: MaskedState, who: list[int]) -> Tensor | None:
        if fed.round_num < self.start or (fed.round_num > self.start and not self.redraw):
            return None
        if self.by == "magnitude":
            return state.w.abs()
        return torch.rand(fed.layout.d, generator=fed.generator("mask"), dtype=torch.float64)
