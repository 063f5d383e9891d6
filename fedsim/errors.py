"""Errors that a user can cause: one clear line, and an exit status."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self


class FedsimError(Exception):
    """An error with a message meant for the user; ``fedsim`` prints it without a traceback.

    Attributes:
        status: Exit status of the command: 2 for what the user asked, 1 for what happened later.
    """

    status = 2


class ConfigError(FedsimError, ValueError):
    """The configuration asks for something impossible; raised before any work is done."""


class DataError(FedsimError, ValueError):
    """Data are missing, damaged, or do not fit the model or the partition."""


class RunError(FedsimError, RuntimeError):
    """The run failed after it had started."""

    status = 1


class ClientError(RunError):
    """Local training failed; names the client, the round and the seed.

    Attributes:
        visit: Which visit it was: ``round``, ``client``, ``phase``, and ``visit``, which tells the client's visits
            apart; None if it belongs to no single one.
        lane: Which of several clients that are trained together it was, if that is known.
    """

    visit: dict[str, Any] | None = None
    lane: int | None = None

    def in_lane(self, lane: int) -> Self:
        """This error, as that of one of several clients that are trained together."""
        self.lane = lane
        return self

    def of(self, round_num: int, client: int, phase: str, visit: int | str) -> Self:
        """This error, as that of one visit."""
        self.visit = {"round": round_num, "client": client, "phase": phase, "visit": str(visit)}
        return self


def require(condition: bool, key: str, needed: str, got: object) -> None:
    """Raises a `ConfigError` that names the key, what was needed and what came."""
    if not condition:
        raise ConfigError(f"{key} must be {needed}, got {got!r}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest known name, or the empty string.

    Args:
        name: What the user wrote.
        known: The names that would have been right.
    """
    from difflib import get_close_matches

    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def one_line(error: BaseException) -> str:
    """``Kind: message`` of an error that is not ours, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
