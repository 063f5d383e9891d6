"""Worker processes of Ray, before they are told what to run. Does not need torch.

That is what this file is for: workers import torch, the longest part of their start, while the driver does.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fedsim.engine import session as sessions
from fedsim.errors import ConfigError, require

GRAIN = 0.0001  # of a CPU or GPU: the smallest share that Ray knows
TARGET = "fedsim.engine.ray.RayEngine"


@dataclass(frozen=True)
class Crew:
    """How many workers a run asks for, and what each takes.

    Args:
        workers: Worker processes; None: as many as there are CPUs (or GPUs, with ``gpus_per_worker``) for.
        cpus_per_worker: CPUs that each takes of what Ray counts, > 0.
        gpus_per_worker: GPUs likewise, may be a fraction, >= 0.
        address: ``local``, ``auto`` or ``host:port``.
        dashboard: Whether a private cluster has Ray's dashboard.
        timeout_s: A worker that is silent for so long on one task is taken for lost; None: never.

    Raises:
        ConfigError: An impossible number.
    """

    workers: int | None = None
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    address: str = "local"
    dashboard: bool = False
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        w, cpus, gpus = self.workers, self.cpus_per_worker, self.gpus_per_worker
        require(w is None or (type(w) is int and w > 0), "engine.workers", "a whole number > 0, or null", w)
        require(type(cpus) in (int, float) and cpus >= GRAIN, "engine.cpus_per_worker", f"> 0, at least {GRAIN}", cpus)
        require(type(gpus) in (int, float) and gpus >= 0, "engine.gpus_per_worker", ">= 0", gpus)
        timeout = self.timeout_s
        require(
            timeout is None or (type(timeout) in (int, float) and timeout > 0),
            "engine.timeout_s",
            "> 0, or null",
            timeout,
        )
        require(type(self.address) is str, "engine.address", "local, auto or host:port", self.address)
        require(type(self.dashboard) is bool, "engine.dashboard", "true or false", self.dashboard)
        require(
            not self.dashboard or self.address == "local", "engine.dashboard", "false when a cluster is joined", True
        )

    @property
    def options(self) -> dict[str, float]:
        """What Ray reserves for each worker."""
        return {"num_cpus": _grains(self.cpus_per_worker), "num_gpus": _grains(self.gpus_per_worker)}

    def lease(self, gpus: int) -> sessions.Session:
        """A connection to the cluster.

        Args:
            gpus: GPUs of this machine.

        Raises:
            ConfigError: There is no such cluster, or it has too little.
        """
        need = (self._here(gpus) if self.address == "local" else 1) * self.cpus_per_worker
        return sessions.lease(self.address, math.ceil(need - 1e-9), gpus if self.gpus_per_worker else 0, self.dashboard)

    def _here(self, gpus: int) -> int:
        """Workers of a private cluster."""
        wanted = (self.workers or 1) * self.gpus_per_worker
        if wanted > gpus:
            raise too_few("GPU", wanted, gpus)
        here = cores()
        if self.cpus_per_worker > here:
            raise too_few("CPU", self.cpus_per_worker, here)
        by_gpu = int(gpus / self.gpus_per_worker) if self.gpus_per_worker else here
        return self.workers or max(1, min(by_gpu, int(here / self.cpus_per_worker)))

    def size(self, session: sessions.Session) -> int:
        """Workers, given what the cluster has.

        Raises:
            ConfigError: It has too little.
        """
        there, fits = session.resources(), []
        for kind, each in (("CPU", self.cpus_per_worker), ("GPU", self.gpus_per_worker)):
            have = there.get(kind, 0.0)
            if each * (self.workers or 1) > have + 1e-9:
                raise too_few(kind, each * (self.workers or 1), have)
            if each:
                fits.append(int(have / each + 1e-9))
        return self.workers or min(fits)


def cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _grains(share: float) -> float:
    """Ray counts in ten-thousandths, and rounds: up, and the last of three thirds would find no place."""
    return math.floor(share / GRAIN + 1e-6) * GRAIN if share % 1 else share


def crew_of(options: Mapping[str, Any]) -> Crew | None:
    """What the ``engine`` group of a checked config asks for; None for another engine.

    Raises:
        ConfigError: An impossible value.
    """
    if options["_target_"] != TARGET:
        return None
    return Crew(**{f.name: options[f.name] for f in fields(Crew) if f.name in options})


def begin(options: Mapping[str, Any]) -> None:
    """Starts the cluster and the workers of a run; the engine finds them there.

    Nothing happens for another engine, or if workers take GPUs: how many there are, torch has to say.

    Args:
        options: The ``engine`` group of a checked config.

    Raises:
        ConfigError: As the engine would.
    """
    crew = crew_of(options)
    if crew is None or crew.gpus_per_worker or options["device"] not in ("cpu", "auto"):
        return
    session = crew.lease(gpus=0)
    ready = sum(kind == crew.options for kind, _ in session.idle)
    for _ in range(crew.size(session) - ready):
        session.idle.append((crew.options, start(crew.options)))


def start(options: Mapping[str, float]) -> Any:
    """A new worker process, which imports what it will need."""
    import ray

    path, folder = [p or os.getcwd() for p in sys.path], os.getcwd()
    actor = ray.remote(host_class()).options(max_restarts=0, max_task_retries=0, **options).remote()
    actor.prepare.remote(path, folder)
    return actor


def host_class() -> Any:
    """The class of a worker process, by value: it is there before fedsim can be imported, and makes it importable."""

    class Host:
        """One worker process."""

        def prepare(self, path: list[str], folder: str) -> None:
            """Imports what `setup` needs; what fails here fails there again, where somebody listens."""
            import contextlib
            import os
            import sys

            sys.path[:] = [*path, *(p for p in sys.path if p not in path)]
            with contextlib.suppress(OSError):  # another node may not have it
                os.chdir(folder)
            with contextlib.suppress(Exception):
                import fedsim.engine.ray
                import fedsim.experiment  # noqa: F401

        def setup(self, message: Any, shared: Any) -> str:
            """Builds the program anew; returns the hash of a probe."""
            from fedsim.engine.ray import Process

            self.process = Process(message, shared)
            return self.process.probe

        def run(self, message: Any, sent: Any) -> tuple[Any, Any]:
            """Runs a task; returns its outcome, and rows apart, which may stay in shared memory."""
            return self.process.run(message, sent)

        def pid(self) -> int:
            """Its process id."""
            import os

            return os.getpid()

    return Host


def too_few(kind: str, needed: float, there: float) -> ConfigError:
    """The error of a request for more than there is."""
    return ConfigError(
        f"engine.workers and engine.{kind.lower()}s_per_worker need {needed:g} {kind}s, but there are {there:g}; lower "
        "one of them, or join a larger cluster with engine.address"
    )
