"""``fedsim cluster up|down|status``: a Ray cluster of one or several nodes on this machine, for trying things.

A supervisor process holds the nodes: Ray's own utility for several nodes on one machine, because the command
``ray start`` listens on every network interface. All of it listens on 127.0.0.1 and asks for a token. There is one
such cluster per user; everything about it is in one private folder, from which `fedsim.engine.session.Session` knows
the address and the token.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedsim.engine import leftovers
from fedsim.engine import session as sessions
from fedsim.errors import ConfigError, RunError

HOST = "127.0.0.1"
START_S = 120.0  # for all nodes to be up
RUNS_S = 5.0  # for runs to write a checkpoint when their cluster goes down
STOP_S = 15.0  # for the supervisor to end them
STORE = 100 << 20  # bytes, the least that Ray works with


@dataclass(frozen=True)
class State:
    """What ``state.json`` in the cluster's folder says.

    Attributes:
        pid: Id of the supervisor.
        started: When it started: with the id, a name that no other process has.
        address: ``host:port``.
    """

    pid: int
    started: str
    address: str

    @property
    def alive(self) -> bool:
        """Whether the supervisor runs."""
        return bool(self.started) and leftovers.start_time(self.pid) == self.started


def up(nodes: int = 1, cpus: int | None = None, port: int = 6379) -> dict[str, Any]:
    """Starts the cluster; returns when all its nodes are there. An interrupted start leaves nothing.

    Args:
        nodes: Nodes, each with processes and an object store of its own, > 0.
        cpus: CPUs that each offers, > 0, as a number that Ray counts with; default: the cores, divided among them.
        port: Where it shall listen, 1 to 65535.

    Returns:
        As `status`.

    Raises:
        ConfigError: A value is impossible, the port is taken, or a cluster is up already.
        RunError: A node did not start.
    """
    for name, value in (("nodes", nodes), ("cpus", cpus)):
        if value is not None and value < 1:
            raise ConfigError(f"fedsim cluster up: {name} must be a whole number > 0, got {value}")
    if not 1 <= port <= 65535:
        raise ConfigError(f"fedsim cluster up: port must be from 1 to 65535, got {port}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with _locked() as folder:
        if (state := _state(folder)) is not None and state.alive:
            raise ConfigError(
                f"a cluster is up already at {state.address}; run on it with engine.address={state.address}, or end "
                "it with `fedsim cluster down` first"
            )
        leftovers.remove(folder)  # what one left whose supervisor was killed
        _check_free(port)
        folder.mkdir(mode=0o700)
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        try:
            _launch(folder, f"{HOST}:{port}", nodes, cpus or max(1, cores // nodes))
            return status()
        except BaseException:
            _end(folder)
            raise


def down() -> str | None:
    """Ends the cluster: every process and every file of it.

    Returns:
        Its address; None: there was none.
    """
    with _locked() as folder:
        there, state = folder.exists(), _state(folder)
        _end(folder)
    return (state.address if state else HOST) if there else None


def status() -> dict[str, Any]:
    """What is up.

    Returns:
        ``address``, ``nodes``, ``CPU``, ``GPU`` (numbers).

    Raises:
        RunError: Nothing is up, or it does not answer.
    """
    folder = leftovers.user_root() / "cluster"
    state = _state(folder)
    if state is None:
        raise RunError("no cluster is up here; start one with `fedsim cluster up`")
    if not state.alive:
        raise RunError(
            f"the cluster at {state.address} has lost its supervisor (process {state.pid}), and is not up; "
            "`fedsim cluster down` clears what it left"
        )
    import ray

    try:
        session = sessions.Session(state.address, 0, 0)
    except ConfigError as exc:
        raise RunError(f"the cluster at {state.address} is starting or ending: {exc}") from exc
    try:
        resources = session.resources()
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]
    finally:
        session.close()
    return {"address": state.address, "nodes": nodes, **{k: resources.get(k, 0.0) for k in ("CPU", "GPU")}}


# --- the folder -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked() -> Iterator[Path]:
    """The cluster's folder, which may not exist, for this command alone."""
    root = leftovers.private_root()
    lock = os.open(root, os.O_RDONLY)  # no file for it: one that is removed may be locked twice
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError("another `fedsim cluster` command is at work; try again when it has ended") from None
        yield root / "cluster"
    finally:
        os.close(lock)


def _state(folder: Path) -> State | None:
    try:
        return State(**json.loads((folder / "state.json").read_text()))
    except FileNotFoundError:
        return None


def _check_free(port: int) -> None:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just given up is free
        try:
            trial.bind((HOST, port))
        except OSError as exc:
            raise ConfigError(
                f"fedsim cluster up: port={port} cannot be used ({exc.strerror}); choose another, as in port={port + 1}"
            ) from exc


# --- the supervisor, from outside -------------------------------------------------------------------------


def _launch(folder: Path, address: str, nodes: int, cpus: int) -> None:
    """Starts the supervisor and waits until it is ready."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder),
        **sessions.LOOPBACK,
    }
    code = "import sys; sys.path.insert(0, sys.argv[1]); from fedsim.cluster import supervise; supervise(*sys.argv[2:])"
    arguments = [str(Path(__file__).resolve().parents[1]), str(folder), address, str(nodes), str(cpus)]
    log = folder / "log"
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", code, *arguments],
        environment,
        setsid=True,  # Ctrl-C is for the command, not for the cluster
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
    )
    state = State(pid, leftovers.start_time(pid), address)
    (folder / "state.new").write_text(json.dumps(asdict(state)))
    (folder / "state.new").rename(folder / "state.json")
    deadline = time.monotonic() + START_S
    while not (folder / "ready").exists():
        if not state.alive or time.monotonic() > deadline:
            said = log.read_text().split("\n") if log.exists() else []
            last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
            raise RunError(f"the cluster did not start: {last}")
        time.sleep(0.05)


def _end(folder: Path) -> None:
    """Ends the supervisor, by its id, and whatever else has a file of the cluster open; removes the folder."""
    state = _state(folder)
    if state is not None and state.alive:
        _interrupt_runs(folder, state)
        os.kill(state.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        while state.alive and time.monotonic() < deadline:
            time.sleep(0.05)
    if state is not None:
        with contextlib.suppress(ChildProcessError):  # it is a child of the process that called `up`
            os.waitpid(state.pid, os.WNOHANG)
    leftovers.remove(folder)


def _interrupt_runs(folder: Path, state: State) -> None:
    """Lets runs end as after Ctrl-C: without their node they would be gone at once."""
    deadline = time.monotonic() + RUNS_S
    asked = set[int]()
    while time.monotonic() < deadline:
        runs = {pid for pid in leftovers.users_of(folder) if _session_of(pid) not in (None, state.pid)}
        for pid in runs - asked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        asked |= runs
        if not runs:
            return
        time.sleep(0.05)


def _session_of(pid: int) -> int | None:
    """All processes of the nodes are in the supervisor's session; others have another, and the dead have none."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


# --- the supervisor ---------------------------------------------------------------------------------------


def supervise(folder: str, address: str, nodes: str, cpus: str) -> None:
    """Holds the nodes until SIGTERM, or until the first of them is broken: the process behind a cluster.

    Args:
        folder: The cluster's, with the token; Ray's files go there too.
        address: Where the first node listens.
        nodes: Number of nodes.
        cpus: CPUs that each offers.
    """
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    import torch
    from ray.cluster_utils import Cluster

    place, count = Path(folder), int(nodes)
    (place / "ray").mkdir()
    shared = os.statvfs("/dev/shm")
    node: dict[str, Any] = {
        "node_ip_address": HOST,
        "num_cpus": int(cpus),
        "object_store_memory": max(STORE, shared.f_bavail * shared.f_frsize // 2 // count),
        "include_log_monitor": False,  # output of workers stays in their files
    }
    head: dict[str, Any] = {
        **node,
        "gcs_server_port": int(address.rpartition(":")[2]),
        "num_gpus": torch.cuda.device_count(),  # of the first node alone: they must not be counted twice
        "include_dashboard": False,
        "no_monitor": True,  # nothing scales this cluster
        "_system_config": dict(sessions.HEALTH),
    }
    cluster = Cluster()
    try:
        first = cluster.add_node(**head)
        for _ in range(count - 1):
            cluster.add_node(**node)
        (place / "ready").touch()
        while not ended.wait(1.0) and first.remaining_processes_alive():
            pass
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]
        if not ended.is_set():  # nobody asked for it, so nobody else removes it
            leftovers.remove(place)
