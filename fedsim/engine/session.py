"""A Ray cluster for the time of a run: started here, privately, or joined; and nothing of it left behind.

What was measured for these choices: see docs/decisions/007-ray.md.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import secrets
import select
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from fedsim.engine.address import forget_token, knock, own_cluster, reachable
from fedsim.engine.leftovers import end_guard, let_go, private_folder, remove, start_guard, user_root
from fedsim.errors import ConfigError, one_line

log = logging.getLogger("fedsim")

#: A lost node is noticed after about a second, a silent one within four: three times 1 s without an answer, and 0.2 s
#: before each. One that only stalls may do so for 3.4 s.
HEALTH = {"health_check_period_ms": 200, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}
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
        ConfigError: There is no such cluster, it does not let us in, or it is of another version; or Ray is missing, or
            in use.
    """

    def __init__(self, address: str, num_cpus: float, num_gpus: float, dashboard: bool = False) -> None:
        self.local, self._folder, self._guard, self._watch = address == "local", Path(), (0, -1), -1
        self._owner = os.getpid()
        self._ours = False  # the connection to Ray; it may be the user's
        self.spec = (address, num_cpus, num_gpus, dashboard)
        self.idle: list[tuple[Any, Any]] = []  # options and handle of workers that the next run may have
        self._changed: dict[str, str | None] = {}  # what was in the environment
        try:
            self._set(RAY_USAGE_STATS_ENABLED="0", RAY_DEDUP_LOGS_SKIP_REGEX=".")  # before Ray is imported
            _check_ray(dashboard)
            self._ours = True
            self._silence(True)
            self._set(RAY_IGNORE_UNHANDLED_ERRORS="1")  # of clients after the first: it would print their tracebacks
            options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
            if self.local:
                self._folder = private_folder()
                self._guard = start_guard(self._folder)
                token = self._folder / "token"
                token.touch(mode=0o600)
                token.write_text(secrets.token_hex(32))
                self._use_token(token)
                self._set(**{f"RAY_{key}": None for key in HEALTH})  # there is no node but this, and it may stall
                options |= {
                    "address": "local",
                    "num_cpus": num_cpus,
                    "num_gpus": num_gpus,
                    "include_dashboard": dashboard,
                    "dashboard_host": "127.0.0.1",
                    "_temp_dir": str(self._folder),
                    "_node_ip_address": "127.0.0.1",
                }
            else:
                options["address"] = reachable(address)
                own = own_cluster()
                if own is not None and own[0] == options["address"]:
                    self._use_token(own[1])
                elif "RAY_AUTH_MODE" not in os.environ and not (Path.home() / ".ray" / "auth_token").exists():
                    self._set(RAY_AUTH_MODE="disabled")  # Ray would make a token of its own, which the cluster lacks
                knock(options["address"])
            self._start(options)
            self._watch = _watch_node(self.local)
        except BaseException:
            self.close()
            raise

    def _set(self, **values: str | None) -> None:
        """Changes the environment until this session is closed."""
        for key, value in values.items():
            self._changed.setdefault(key, os.environ.get(key))
            _put(key, value)

    def _silence(self, on: bool) -> None:
        """Whether what Ray prints about lost workers and nodes is left out; we say it ourselves."""
        from ray._private import ray_logging

        printer: Any = getattr(ray_logging, "stdout_deduplicator", None)
        if printer is not None:
            printer.skip_re = re.compile(".") if on else None

    def _use_token(self, file: Path) -> None:
        self._set(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(file), RAY_AUTH_TOKEN=None, **LOOPBACK)

    def _start(self, options: dict[str, Any]) -> None:
        import ray

        forget_token()
        _follow_loopback()
        # Ray's state in this process must not be left halfway; but while its processes start, which takes nearly all of
        # the time, there is none of it yet.
        with _deferred(signal.SIGINT, signal.SIGTERM, but_in="ray/_private/node.py"):
            try:
                with _plain_start(self.local, options.get("include_dashboard", False)):
                    ray.init(**options)
            except (ConnectionError, RuntimeError, ValueError) as exc:
                if self.local:
                    raise ConfigError(f"cannot start Ray here: {one_line(exc)}") from exc
                raise ConfigError(
                    f"cannot join the Ray cluster at {options['address']}: {one_line(exc)}; versions of Ray and Python "
                    "must be equal on all nodes, and the token too (RAY_AUTH_TOKEN_PATH)"
                ) from exc

    def resources(self) -> dict[str, float]:
        """What the cluster has in all, such as ``{"CPU": 4.0}``."""
        import ray

        found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        return found

    def free(self) -> dict[str, float]:
        """What of it nobody has taken."""
        import ray

        found: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        return found

    def close(self) -> None:
        """Leaves the cluster; ends a private one with all its processes and files. A second call does nothing."""
        if os.getpid() != self._owner:  # a fork of it
            return
        with _deferred(signal.SIGINT, signal.SIGTERM):
            if self._watch >= 0:
                os.close(self._watch)
                self._watch = -1
            if self._ours:
                _shut_down(self.local)
                let_go(user_root())
            if self.local and self._folder != Path():
                remove(self._folder, grace_s=0)
                end_guard(*self._guard)
                self._folder = Path()
            for key, value in self._changed.items():
                _put(key, value)
            self._changed = {}
            if self._ours:  # for whoever uses Ray after us
                self._silence(False)
                forget_token()
                _follow_loopback()
                self._ours = False


def _put(key: str, value: str | None) -> None:
    """Sets a variable of the environment, or takes it away."""
    if value is None:
        os.environ.pop(key, None)
    else:
        os.environ[key] = value


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
            close_kept()


def lease(address: str, num_cpus: float, num_gpus: float, dashboard: bool) -> Session:
    """A session: the one that is kept, if it is of this kind, or a new one."""
    for session in _kept:
        if session.spec == (address, num_cpus, num_gpus, dashboard):
            return session
    close_kept()
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
def close_kept() -> None:
    """Closes what is kept for further runs."""
    while _kept:
        _kept.pop().close()


# --- what Ray does by itself -------------------------------------------------------------------------------


def _check_ray(dashboard: bool) -> None:
    """Refuses to go on without Ray, or with one that is in use, or cannot have the dashboard that is asked for.

    Raises:
        ConfigError: It is.
    """
    try:
        import ray
    except ImportError as exc:
        raise ConfigError(
            f"engine=ray needs Ray, which cannot be imported ({one_line(exc)}); pip install ray, or set engine=inline"
        ) from exc
    if ray.is_initialized():
        raise ConfigError("Ray is in use in this process already; call ray.shutdown() first, or set engine=inline")
    installed = getattr(ray._private.utils, "check_dashboard_dependencies_installed", lambda: True)
    if dashboard and not installed():
        raise ConfigError("engine.dashboard=true needs packages that are not there: pip install 'ray[default]'")


@contextlib.contextmanager
def _deferred(*signals: signal.Signals, but_in: str = "") -> Iterator[None]:
    """Signals wait until the block has ended; handlers are then again as they were.

    Args:
        signals: Which.
        but_in: End of the path of a file: while a function of it runs they do not wait.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        handler = before[signal.Signals(number)]
        came.append(number)  # also of those below: what is raised in the middle of a fork gets lost
        if number == signal.SIGTERM:
            signal.alarm(0)  # Ray's own handler has just set it, to abort in three seconds
        if but_in and callable(handler) and _runs(but_in, frame):
            handler(number, frame)

    before = {s: signal.getsignal(s) for s in signals}
    for s in signals:
        signal.signal(s, note)
    try:
        yield
    except KeyboardInterrupt:
        came.clear()
        raise
    finally:
        for s, handler in before.items():
            signal.signal(s, handler if handler is not None else signal.SIG_DFL)
        for number in came[:1]:
            signal.raise_signal(number)


def _runs(file: str, frame: FrameType | None) -> bool:
    """Whether a function of a file is being executed."""
    while frame is not None and not frame.f_code.co_filename.endswith(file):
        frame = frame.f_back
    return frame is not None


def _watch_node(private: bool) -> int:
    """Says so when the node of this process dies.

    Ray then ends the process by itself, without a word; and if it is the head that has died, after a minute.

    Returns:
        A file to close before the node is ended on purpose.
    """
    import ray

    node: Any = ray._private.worker._global_node
    wanted = [f"--raylet_socket_name={node.raylet_socket_name}"]
    wanted += [f"--log_dir={node.get_logs_dir_path()}"] if private else []  # of the head; others may come back
    held, end = os.pipe()
    watched = [held]
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, AttributeError):  # dead, or a system that cannot tell
            words = (process / "cmdline").read_text(errors="replace").split("\0")
            if words[0].endswith(("/raylet", "/gcs_server")) and not set(wanted).isdisjoint(words):
                watched.append(os.pidfd_open(int(process.name)))

    def wait() -> None:
        poll = select.poll()  # select() knows the first 1,024 files only
        for number in watched:
            poll.register(number, select.POLLIN | select.POLLHUP)
        ready = [number for number, _ in poll.poll()]
        for number in watched:
            os.close(number)
        if held in ready or not ray.is_initialized():  # somebody else has called ray.shutdown
            return
        files = [h.baseFilename for h in log.handlers if isinstance(h, logging.FileHandler)]
        run = Path(files[0]).parent if files else "<run>"
        text = f"the Ray node of this process died (killed, or out of memory); go on with: fedsim resume={run}"
        log.error("stopped: %s", text)
        os.write(2, f"fedsim: {text}\n".encode())
        os._exit(1)  # as Ray does

    threading.Thread(target=wait, name="fedsim-node", daemon=True).start()
    return end


def _shut_down(at_once: bool) -> None:
    """Disconnects from Ray, and ends the processes that it started.

    Args:
        at_once: Without the second of grace that Ray gives each of them.
    """
    if "ray" not in sys.modules:
        return
    import ray

    node = getattr(ray._private.worker, "_global_node", None)
    if at_once and node is not None and hasattr(node, "kill_all_processes"):
        kill = node.kill_all_processes
        node.kill_all_processes = lambda **_: kill(check_alive=False, allow_graceful=False)
    ray.shutdown()


def _follow_loopback() -> None:
    """Makes Ray follow `LOOPBACK`, which it read when it was first imported in this process."""
    from ray._private import ray_constants

    if hasattr(ray_constants, "ENABLE_RAY_CLUSTER"):
        ray_constants.ENABLE_RAY_CLUSTER = not LOOPBACK.items() <= os.environ.items()


@contextlib.contextmanager
def _plain_start(private: bool, dashboard: bool) -> Iterator[None]:
    """Keeps Ray from what it should not do while it starts, where this version does it.

    It would handle SIGTERM by exiting at once, wherever it is. And a private cluster has no use for its autoscaler, its
    log forwarder and (without a dashboard) its web server, three Python processes that take most of the time of its
    start and of its end.
    """
    from unittest.mock import patch

    from ray._private import parameter, services, utils

    params: Any = getattr(parameter, "RayParams", None)
    plain: Any = getattr(params, "__init__", None)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.no_monitor, self.include_log_monitor = True, False

    with contextlib.ExitStack() as changes:
        if hasattr(utils, "set_sigterm_handler"):
            changes.enter_context(patch.object(utils, "set_sigterm_handler", lambda handler: None))
        if private and params is not None:
            changes.enter_context(patch.object(params, "__init__", init))
        if private and not dashboard and hasattr(services, "start_api_server"):  # as if it had failed to start
            changes.enter_context(patch.object(services, "start_api_server", lambda *_, **__: (None, None)))
        yield
