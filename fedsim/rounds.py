"""From one server state to the next, as a run and a replay of it both do it.

Hooks of the server that draw from torch's own generator are seeded by the round.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fedsim import random
from fedsim.errors import RunError
from fedsim.federation import Federation
from fedsim.strategy import Info, Strategy


def first(fed: Federation, info: Info) -> Any:
    """The state before round 1: `Strategy.init`, then `Strategy.prepare`.

    Raises:
        RunError: The state has no `w`.
    """
    strategy = fed.program.strategy
    fed.begin_round(0)
    with random.torch_seeded(fed.seed, "server hooks", 0):
        state = strategy.init(info, fed.program.network.initial.clone())
    if not isinstance(getattr(state, "w", None), Tensor):
        raise RunError(f"{type(strategy).__name__}.init must return a state whose `w` is the global model")
    with random.torch_seeded(fed.seed, "server hooks", 0):
        return strategy.prepare(fed, state)


def following(fed: Federation, state: Any, number: int) -> Any:
    """The state after round ``number``."""
    fed.begin_round(number)
    with random.torch_seeded(fed.seed, "server hooks", number):
        return fed.program.strategy.round(fed, state)


def final(fed: Federation, state: Any, number: int) -> Any:
    """The state after `Strategy.finalize`, which follows round ``number`` and has random streams of its own."""
    fed.begin_round(number + 1)
    with random.torch_seeded(fed.seed, "server hooks", number + 1):
        return fed.program.strategy.finalize(fed, state)


def finalizes(strategy: Strategy) -> bool:
    """Whether the strategy has its own `Strategy.finalize`."""
    return type(strategy).finalize is not Strategy.finalize
