"""Checks of options that the plug-ins of this folder share: type and range, named by config key."""

from __future__ import annotations

import math
from numbers import Integral, Real

from fedsim.errors import ConfigError


def check_int(key: str, value: object, low: int, what: str) -> None:
    """Refuses anything but a whole number of at least ``low``.

    Args:
        key: Config key, such as ``partition.num_clients``.
        value: What the user wrote.
        low: Smallest value allowed.
        what: What the number is, for the message.

    Raises:
        ConfigError: The value has another type, or is too small.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < low:
        raise ConfigError(f"{key} must be a whole number of at least {low} ({what}), got {value!r}")


def check_float(key: str, value: object, low: float, high: float, what: str, *, strict: bool = True) -> None:
    """Refuses anything but a number in ``(low, high)``, or in ``[low, high)`` if not ``strict``.

    An upper end of ``math.inf`` is itself allowed; NaN never is.

    Args:
        key: Config key, such as ``partition.alpha``.
        value: What the user wrote.
        low: Lower end.
        high: Upper end.
        what: What the number is, for the message.
        strict: Whether ``low`` itself is refused.

    Raises:
        ConfigError: The value is no number, NaN, or out of range.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        above = number > low or (not strict and number == low)
        if above and (number < high or (math.isinf(high) and number == high)):
            return
    end = "inf]" if math.isinf(high) else f"{high:g})"
    raise ConfigError(f"{key} must be a number in {'(' if strict else '['}{low:g}, {end} ({what}), got {value!r}")
