"""A Ray cluster for the time of a run: started here, privately, or joined; and nothing of it left behind.

What was measured for these choices: see docs/decisions/007-ray.md.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedsim.errors import ConfigError, one_line

log = logging.getLogger("fedsim")

LONGEST = 40  # characters of the folder: paths of sockets end at 107 bytes
CONNECT_S = 2.0  # a cluster that does not answer for so long is not there; Ray itself would try for minutes
#: A lost node is noticed after about a second, a silent one after three.
HEALTH = {"health_check_period_ms": 1000, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}
#: Ray would put the machine's own address in place of 127.0.0.1, and listen on every interface. This setting, which it
#: has for systems without clusters, keeps it from that; a driver needs it too.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


class Session:
    """A connection to Ray.

    Args:
        address: ``local`` starts a private cluster on this machine; ``auto`` or ``host:port`` joins one.
        num_cpus: CPUs that a private cluster offers.
        num_gpus: GPUs that it offers.
        dashboard: Whether a private cluster has Ray's dashboard, on the loopback interface.

    Raises:
        ConfigError: There is no such cluster, or it is of another version.
    """

    def __init__(self, address: str, num_cpus: float, num_gpus: float, dashboard: bool = False) -> None:
        self.local, self._folder = address == "local", Path()
        self.spec = (address, num_cpus, num_gpus, dashboard)
        self.idle: list[tuple[Any, Any]] = []  # options and handle of workers that the next run may have
        before = dict(os.environ)
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        if self.local:
            self._folder = _private_folder()
            token = self._folder / "token"
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)} | LOOPBACK
            os.environ.pop("RAY_AUTH_TOKEN", None)
            options |= {
                "address": "local",
                "num_cpus": num_cpus,
                "num_gpus": num_gpus,
                "include_dashboard": dashboard,
                "dashboard_host": "127.0.0.1",
                "_temp_dir": str(self._folder),
                "_node_ip_address": "127.0.0.1",
                "_system_config": dict(HEALTH),  # Ray adds to it
            }
        else:
            options["address"] = _reachable(address)
            own = own_cluster()
            if own is not None and own[0] == options["address"]:
                os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(own[1])} | LOOPBACK
                os.environ.pop("RAY_AUTH_TOKEN", None)
            elif "RAY_AUTH_MODE" not in os.environ and not (Path.home() / ".ray" / "auth_token").exists():
                os.environ["RAY_AUTH_MODE"] = "disabled"  # Ray would make a token of its own, which the cluster lacks
        self._changed = {k: before.get(k) for k in {*before, *os.environ} if before.get(k) != os.environ.get(k)}
        try:
            self._start(options)
        except BaseException:
            self.close()
            raise

    def _start(self, options: dict[str, Any]) -> None:
        import ray

        _forget_token()
        _follow_loopback()
        if ray.is_initialized():
            raise ConfigError("Ray is in use in this process already; call ray.shutdown() first, or set engine=inline")
        with _deferred(signal.SIGINT, signal.SIGTERM):  # in the middle of a start Ray would leave processes behind
            try:
                ray.init(**options)
            except (ConnectionError, RuntimeError, ValueError) as exc:
                where = "start Ray here" if self.local else f"join the Ray cluster at {options['address']}"
                raise ConfigError(
                    f"cannot {where}: {one_line(exc)}; versions of Ray and Python must be equal on all nodes, and the "
                    "token too (RAY_AUTH_TOKEN_PATH)"
                ) from exc

    def resources(self) -> dict[str, float]:
        """What the cluster has in all, such as ``{"CPU": 4.0}``."""
        import ray

        found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        return found

    def close(self) -> None:
        """Leaves the cluster; ends a private one with all its processes and files. A second call does nothing."""
        with _deferred(signal.SIGINT, signal.SIGTERM):
            if "ray" in sys.modules:
                import ray

                ray.shutdown()
            if self.local and self._folder != Path():
                remove(self._folder)
            for key, value in self._changed.items() if hasattr(self, "_changed") else ():
                os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)
            self._changed = {}


# --- kept between runs ------------------------------------------------------------------------------------

_kept: list[Session] = []
_keep = False


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """One cluster for all runs of the block (a sweep)."""
    global _keep
    before, _keep = _keep, True
    try:
        yield
    finally:
        _keep = before
        if not _keep:
            _close_kept()


def lease(address: str, num_cpus: float, num_gpus: float, dashboard: bool) -> Session:
    """A session: the one that is kept, if it is of this kind, or a new one."""
    for session in _kept:
        if session.spec == (address, num_cpus, num_gpus, dashboard):
            return session
    _close_kept()
    session = Session(address, num_cpus, num_gpus, dashboard)
    _kept.append(session)
    return session


def keeps() -> bool:
    """Whether sessions are kept for further runs."""
    return _keep


def release(session: Session) -> None:
    """Closes a session, unless it is to be kept."""
    if not _keep:
        _kept[:] = [s for s in _kept if s is not session]
        session.close()


@atexit.register
def _close_kept() -> None:
    while _kept:
        _kept.pop().close()


# --- clean-up ---------------------------------------------------------------------------------------------


def _root() -> Path:
    """Where the folders of this user's clusters are; perhaps not there yet."""
    root = Path(tempfile.gettempdir())
    return (root if len(str(root)) + 24 <= LONGEST else Path("/tmp")) / f"fedsim-{os.getuid()}"


def private_root() -> Path:
    """The same, made if it is not there.

    Raises:
        ConfigError: It is somebody else's.
    """
    root = _root()
    root.mkdir(mode=0o700, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise ConfigError(f"{root} belongs to somebody else; set TMPDIR to a folder of your own with a short path")
    return root


def own_cluster() -> tuple[str, Path] | None:
    """Address and file with the token of the cluster that `fedsim cluster up` started, if there is one."""
    folder = _root() / "cluster"
    try:
        if folder.stat().st_uid != os.getuid():
            return None
        return str(json.loads((folder / "state.json").read_text())["address"]), folder / "token"
    except FileNotFoundError:
        return None


def _private_folder() -> Path:
    """A folder for a cluster of this process; those of processes that died are removed."""
    root = private_root()
    sweep(root)
    folder = root / f"{os.getpid()}-{_start_time(os.getpid())}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def sweep(root: Path) -> None:
    """Ends and removes what clusters of dead processes left below ``root``."""
    for folder in root.glob("*-*"):
        pid, _, started = folder.name.partition("-")
        if pid.isdecimal() and _start_time(int(pid)) != started:
            remove(folder)


def remove(folder: Path) -> None:
    """Ends every process that has a file open in a cluster's folder, and removes it."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 2
        while (users := _users(folder)) and time.monotonic() < deadline:
            for pid in users:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sign)
            time.sleep(0.05)
        if not users:
            break
    shutil.rmtree(folder, ignore_errors=True)


def _users(folder: Path) -> list[int]:
    """Processes of ours, but this one, with an open file, or the working directory, in a folder."""
    prefix, found = f"{folder}/", []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if any(_target(link).startswith(prefix) for link in (process / "fd").iterdir()):
                found.append(int(process.name))
    return found


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """When a process started, in the kernel's ticks: with its id, a name that no other process ever has.

    Empty for one that is dead, be it that nobody has waited for it yet.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


@contextlib.contextmanager
def _deferred(*signals: signal.Signals) -> Iterator[None]:
    """Signals wait until the block has ended; handlers are then again as they were."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {s: signal.signal(s, lambda number, frame: came.append(number)) for s in signals}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler if handler is not None else signal.SIG_DFL)
        for number in came[:1]:
            signal.raise_signal(number)


def _forget_token() -> None:
    """Makes Ray read its settings and its token again: it did so once, perhaps before this session."""
    with contextlib.suppress(ImportError, AttributeError):  # versions without tokens
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def _follow_loopback() -> None:
    """Makes Ray follow `LOOPBACK`, which it read when it was first imported in this process."""
    from ray._private import ray_constants

    if hasattr(ray_constants, "ENABLE_RAY_CLUSTER"):
        ray_constants.ENABLE_RAY_CLUSTER = not LOOPBACK.items() <= os.environ.items()


def _reachable(address: str) -> str:
    """The address of a cluster that answers.

    Raises:
        ConfigError: It does not.
    """
    found = address
    if address == "auto":
        found = os.environ.get("RAY_ADDRESS", "")
        if not found and (own := own_cluster()) is not None:
            found = own[0]
        if not found:
            file = Path(tempfile.gettempdir()) / "ray" / "ray_current_cluster"
            found = file.read_text().strip() if file.exists() else ""
        if not found:
            raise ConfigError(
                "engine.address=auto: no Ray cluster runs on this machine, and RAY_ADDRESS is not set; start one with "
                "`fedsim cluster up` or `ray start --head`, or set engine.address=local"
            )
    host, _, port = found.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"engine.address must be local, auto or host:port, got {found!r}")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as exc:
        raise ConfigError(
            f"engine.address={address}: no Ray cluster answers at {found} ({exc.strerror or exc}); is it up, and can "
            "this machine reach it?"
        ) from exc
    return found
