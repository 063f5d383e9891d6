"""A method with phases: two before round 1, one after the last, and a counter that every client keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsim.clients.local import Local
from fedsim.federation import Federation
from fedsim.reduce import Entry, Reduced, mean, total
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import ClientHalf, Info


@dataclass(frozen=True)
class PhaseState:
    """All that the server carries from one round to the next.

    Attributes:
        w: Global parameters, ``[d]``.
        seen: What `prepare` learnt: a mean of updates, float64 ``[d]``.
        visits: Visits of all clients, float64 ``[1]``.
    """

    w: Tensor
    seen: Tensor
    visits: Tensor


@dataclass(frozen=True)
class Explorer(ClientHalf):
    """The client half of a phase."""

    def memory(self, local: Local) -> dict[str, Tensor]:
        return {"explored": torch.zeros(1, 1, dtype=torch.int64)}

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        local.memory.explored = local.memory.explored + 1
        noise = torch.randn(local.start.shape, generator=local.generator("noise")[0])
        return {"delta": mean(local.delta(w) + 0.01 * noise)}


@dataclass(frozen=True)
class Phases(FedAvg):
    """FedAvg between two phases."""

    def init(self, info: Info, w: Tensor) -> PhaseState:
        return PhaseState(w, torch.zeros_like(w, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))

    def prepare(self, fed: Federation, state: PhaseState) -> PhaseState:
        for _ in range(2):
            reduced = fed.train(fed.sample(), state, half=Explorer(), phase="explore", steps=2)
            state = replace(state, w=(state.w + reduced["delta"]).to(state.w), seen=state.seen + reduced["delta"])
        return state

    def memory(self, local: Local) -> dict[str, Tensor]:
        return {"visits": torch.zeros(1, 1, dtype=torch.float64)}

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        local.memory.visits = local.memory.visits + 1
        return {"delta": mean(local.delta(w)), "visits": total(local.memory.visits)}

    def step(self, state: PhaseState, reduced: Reduced) -> PhaseState:  # type: ignore[override]
        w = (state.w + reduced["delta"] + 0.001 * state.seen).to(state.w)
        return replace(state, w=w, visits=reduced["visits"].flatten()[:1])

    def finalize(self, fed: Federation, state: PhaseState) -> PhaseState:
        reduced = fed.train(fed.sample(), state, half=Explorer(), phase="polish", steps=1)
        return replace(state, w=(state.w + reduced["delta"]).to(state.w))
