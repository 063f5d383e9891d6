"""Local training: no federation. Every client trains a model of its own, and nothing travels.

Source: no paper of its own. What personalised methods are measured against, such as lambda = 0 in Li et al., 2021,
https://arxiv.org/abs/2012.04221.
Departures: none known. All clients start from the common initial model; the global model is that model for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fedsim.clients.local import Local
from fedsim.clients.visit import ClientOptions
from fedsim.errors import ConfigError
from fedsim.federation import Federation
from fedsim.network import Network
from fedsim.reduce import Entry, sized
from fedsim.strategy import State, Strategy


@dataclass(frozen=True)
class LocalTraining(Strategy):
    """Every client alone. Its model is in its memory as ``w``; of a client that was never visited it is the initial
    one."""

    batched: ClassVar = True
    exempt: ClassVar = {
        "one_full_batch_step_is_gradient_descent": "the global model is never trained",
        "loss_falls_on_two_quadratic_clients": "the global model is never trained",
        "reported_bytes_are_those_of_entries_and_payloads": "no bytes travel, and the law wants some",
    }

    def check_network(self, network: Network, options: ClientOptions) -> None:
        if network.buffer_layout.d and options.buffers == "mean":
            raise ConfigError(
                "strategy=local shares nothing, and client.buffers=mean would average the statistics of batch norms: "
                "set client.buffers=local"
            )

    def broadcast(self, state: State) -> dict[str, Any]:
        return {"w": sized(state.w, 0)}  # everybody can draw it from the seed

    def memory(self, local: Local) -> dict[str, Tensor]:
        return {"w": local.start}

    def work(self, local: Local) -> Tensor:
        return local.train(local.memory.w)

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        local.memory.w = w
        return {}

    def personal(self, local: Local) -> Tensor:
        return local.memory.w

    def round(self, fed: Federation, state: State) -> State:
        fed.train(fed.sample(), state)
        return state
