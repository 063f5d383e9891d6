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
        RunError: The state has no `w`, or one that is no model.
    """
    strategy = fed.program.strategy
    fed.begin_round(0)
    with random.torch_seeded(fed.seed, "server hooks", 0):
        state = _checked(strategy.init(info, fed.program.network.initial.clone()), fed, "init")
    with random.torch_seeded(fed.seed, "server hooks", 0):
        return _checked(strategy.prepare(fed, state), fed, "prepare")


def following(fed: Federation, state: Any, number: int) -> Any:
    """The state after round ``number``."""
    fed.begin_round(number)
    with random.torch_seeded(fed.seed, "server hooks", number):
        return _checked(fed.program.strategy.round(fed, state), fed, "step")


def final(fed: Federation, state: Any, number: int) -> Any:
    """The state after `Strategy.finalize`, which follows round ``number`` and has random streams of its own."""
    fed.begin_round(number + 1)
    with random.torch_seeded(fed.seed, "server hooks", number + 1):
        return _checked(fed.program.strategy.finalize(fed, state), fed, "finalize")


def _checked(state: Any, fed: Federation, hook: str) -> Any:
    """The state, if its ``w`` is a model."""
    name, w, like = type(fed.program.strategy).__name__, getattr(state, "w", None), fed.program.network.initial
    if not isinstance(w, Tensor):
        raise RunError(f"{name}.{hook} must return a state whose `w` is the global model, got {type(state).__name__}")
    if w.dtype != like.dtype or w.shape != like.shape:
        raise RunError(
            f"{name}.{hook} returned w of {tuple(w.shape)} and {w.dtype}, but the model is {tuple(like.shape)} and "
            f"{like.dtype}; sums are float64, and the server rounds once: (state.w + delta).to(state.w)"
        )
    return state


def finalizes(strategy: Strategy) -> bool:
    """Whether the strategy has its own `Strategy.finalize`."""
    return type(strategy).finalize is not Strategy.finalize
