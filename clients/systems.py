"""System models: how long a client's visit takes in virtual time.

Nothing here sleeps or reads a clock. A duration is computed when the task is handed out, from what is planned, so
the order of events is known before any training is done and does not depend on the real speed of the machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from fedsim.clock import ns
from fedsim.errors import ConfigError


class System(Protocol):
    """What virtual time asks of a system model. Models with speeds per client or jitter implement the same call."""

    def duration_ns(self, client: int, visit: int, steps: int, bytes_down: int, bytes_up: int, seed: int) -> int:
        """How long one visit takes, from hand-out to arrival: download, local steps, upload.

        A pure function of its arguments and the model's hyper-parameters, in O(1) of the population: no state, and
        random numbers only from ``fedsim.random.numpy_generator(seed, purpose, ...)``. What belongs to a client for
        good (its speed) is keyed by ``client`` alone, what changes from visit to visit (jitter) by ``client`` and
        ``visit``. The same task therefore takes as long after a resume as before.

        Args:
            client: Client id.
            visit: Number of the task: the round, or in event-driven methods the client's task number.
            steps: Local steps planned (or, for a barrier, done), >= 0.
            bytes_down: Bytes sent to the client, >= 0.
            bytes_up: Bytes that come back, >= 0.
            seed: The run's seed.

        Returns:
            Integer nanoseconds, >= 0.
        """


def _check_rate(name: str, mbps: float | None) -> None:
    if mbps is None:
        return
    if isinstance(mbps, bool) or not isinstance(mbps, (int, float)) or not math.isfinite(mbps) or mbps <= 0:
        raise ConfigError(
            f"system.{name} must be a positive number of megabits per second, or null for no limit, got {mbps!r}"
        )


def _transfer_ns(num_bytes: int, mbps: float | None) -> int:
    return 0 if mbps is None else ns(8 * num_bytes / (mbps * 1e6))


@dataclass(frozen=True)
class Homogeneous:
    """Every client is equally fast, always available, and never jitters.

    Attributes:
        seconds_per_step: Virtual seconds per local step, >= 0, rounded to nanoseconds.
        download_mbps: Megabits (1e6 bits) per second to the client; None: transfers take no time.
        upload_mbps: The same, from the client.

    Raises:
        ConfigError: A value out of range.
    """

    seconds_per_step: float = 0.0
    download_mbps: float | None = None
    upload_mbps: float | None = None

    def __post_init__(self) -> None:
        value = self.seconds_per_step
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise ConfigError(f"system.seconds_per_step must be a number of seconds >= 0, got {value!r}")
        _check_rate("download_mbps", self.download_mbps)
        _check_rate("upload_mbps", self.upload_mbps)

    def duration_ns(self, client: int, visit: int, steps: int, bytes_down: int, bytes_up: int, seed: int) -> int:
        """See `System.duration_ns`; only steps and bytes matter."""
        down = _transfer_ns(bytes_down, self.download_mbps)
        return down + steps * ns(self.seconds_per_step) + _transfer_ns(bytes_up, self.upload_mbps)
