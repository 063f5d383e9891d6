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
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from fedsim.errors import ConfigError, one_line

log = logging.getLogger("fedsim")

#: How HTTP/2 begins, and with it gRPC: a fixed text and settings, here none. Both sides send settings first.
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
LONGEST = 40  # characters of the folder: paths of sockets end at 107 bytes
CONNECT_S = 2.0  # a cluster that does not answer for so long is not there; Ray itself would try for minutes
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
        self.local, self._folder, self._guard = address == "local", Path(), (0, -1)
        self.spec = (address, num_cpus, num_gpus, dashboard)
        self.idle: list[tuple[Any, Any]] = []  # options and handle of workers that the next run may have
        _check_ray()
        before = dict(os.environ)
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}
        os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"  # of clients after the first: it would print their tracebacks
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        if self.local:
            self._folder = _private_folder()
            self._guard = _start_guard(self._folder)
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
                "_system_config": {},  # Ray adds to it; no `HEALTH`: there is no node but this, and it may stall
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
        self._watch = -1
        try:
            if not self.local:
                _knock(options["address"])
            self._start(options)
            self._watch = _watch_node(self.local)
        except BaseException:
            self.close()
            raise

    def _start(self, options: dict[str, Any]) -> None:
        import ray

        _forget_token()
        _follow_loopback()
        # Ray's state in this process must not be left halfway; but while its processes start, which takes nearly all of
        # the time, there is none of it yet.
        with _deferred(signal.SIGINT, signal.SIGTERM, but_in="ray/_private/node.py"), _own_handlers():
            try:
                with _without_helpers() if self.local else contextlib.nullcontext():
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

    def free(self) -> dict[str, float]:
        """What of it nobody has taken."""
        import ray

        found: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        return found

    def close(self) -> None:
        """Leaves the cluster; ends a private one with all its processes and files. A second call does nothing."""
        with _deferred(signal.SIGINT, signal.SIGTERM):
            if self._watch >= 0:
                os.close(self._watch)
                self._watch = -1
            _shut_down(self.local)
            _let_go(_root())
            if self.local and self._folder != Path():
                remove(self._folder, grace_s=0)
                _end_guard(*self._guard)
                self._folder = Path()
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
    try:
        root = _root()
        root.mkdir(mode=0o700, exist_ok=True)
    except OSError as exc:
        raise ConfigError(
            f"a cluster needs a folder for its sockets: {one_line(exc)}; set TMPDIR to a folder of your own with a "
            "short path"
        ) from exc
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
            remove(folder, grace_s=0)


def remove(folder: Path, grace_s: float = 2.0) -> None:
    """Ends every process that has a file open in a cluster's folder, and removes it.

    Args:
        folder: The folder; it need not exist.
        grace_s: For so long they are only asked to end.
    """
    if not folder.exists():
        return
    begin = time.monotonic()
    while (users := _users(folder)) and time.monotonic() < begin + grace_s + 2:
        for pid in users:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if time.monotonic() < begin + grace_s else signal.SIGKILL)
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)


def _start_guard(folder: Path) -> tuple[int, int]:
    """Starts a process that clears the folder when this one has died, however it died.

    Returns:
        Its id, and what holds it back: the end of a pipe, which the kernel closes with this process.
    """
    code = "import sys; sys.path.insert(0, sys.argv[1]); from fedsim.engine.session import guard; guard(sys.argv[2])"
    end, held = os.pipe()
    try:
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-c", code, str(Path(__file__).resolve().parents[2]), str(folder)],
            os.environ,
            setsid=True,  # what ends this process may be meant for its whole group
            file_actions=[
                (os.POSIX_SPAWN_DUP2, end, 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
        )
    finally:
        os.close(end)
    return pid, held


def guard(folder: str) -> None:
    """What that process does: waits until the other has died, then removes the folder."""
    os.read(0, 1)
    remove(Path(folder), grace_s=0)


def _end_guard(pid: int, held: int) -> None:
    """Lets the guard go, which has nothing to do any more."""
    os.close(held)
    with contextlib.suppress(ChildProcessError):  # whoever ignores SIGCHLD has no dead children
        os.waitpid(pid, 0)


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


def _let_go(folder: Path) -> None:
    """Gives up files of clusters that Ray left open here (its logs): by them `remove` knows whom to end."""
    null = os.open(os.devnull, os.O_RDWR)
    for link in Path("/proc/self/fd").iterdir():
        if _target(link).startswith(f"{folder}/"):
            os.dup2(null, int(link.name), inheritable=False)  # not closed: Ray may still write
    os.close(null)


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


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """Keeps Ray from handling SIGTERM while it starts: it would exit at once, wherever it is."""
    from ray._private import utils

    before = getattr(utils, "set_sigterm_handler", None)
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        if before is not None:
            utils.set_sigterm_handler = before


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
        ready, _, _ = select.select(watched, [], [])
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


@contextlib.contextmanager
def _without_helpers() -> Iterator[None]:
    """Leaves out Ray's autoscaler and log forwarder, two Python processes for which a private cluster has no use.

    They take half of the processor time of its start, and most of the time of its end.
    """
    from ray._private.parameter import RayParams

    plain = RayParams.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.no_monitor, self.include_log_monitor = True, False

    setattr(RayParams, "__init__", init)  # noqa: B010, a method that mypy would not let us assign
    try:
        yield
    finally:
        setattr(RayParams, "__init__", plain)  # noqa: B010


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
    if not host or "/" in host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"engine.address must be local, auto or host:port, got {found!r}")
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_S) as line:
            line.sendall(HELLO)
            answer = line.recv(9) if "RAY_USE_TLS" not in os.environ else HELLO[-9:]
    except OSError as exc:
        raise ConfigError(
            f"engine.address={address}: no Ray cluster answers at {found} ({exc.strerror or exc}); is it up, and can "
            "this machine reach it?"
        ) from exc
    if answer[3:4] != HELLO[-6:-5]:
        raise ConfigError(_not_ray(found))
    return found


def _check_ray() -> None:
    """Refuses to go on without Ray, or with one that is in use.

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


def _knock(address: str) -> None:
    """Asks a cluster for its id: what Ray itself would try to get for 20 seconds and more.

    Raises:
        ConfigError: It is no cluster of Ray, or does not let us in.
    """
    mode, file = os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    remedy = "set RAY_AUTH_MODE=token here, and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN as on its nodes"
    if mode == "token" and not os.environ.get("RAY_AUTH_TOKEN"):  # without one Ray would abort
        try:
            there = bool(Path(file).expanduser().read_text().strip())
        except OSError as exc:
            raise ConfigError(f"RAY_AUTH_MODE=token, but there is no token: {one_line(exc)}; {remedy}") from exc
        if not there:
            raise ConfigError(f"RAY_AUTH_MODE=token, but {file} is empty; {remedy}")
    try:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]
        from ray.exceptions import AuthenticationError, RpcError
    except ImportError:  # versions without tokens
        return
    _forget_token()
    try:
        with _without_stderr():
            GcsClient(address=address)
    except AuthenticationError as exc:
        given = "another token than ours" if mode == "token" else "a token"
        raise ConfigError(f"the Ray cluster at {address} asks for {given}; {remedy}") from exc
    except RpcError as exc:
        raise ConfigError(f"{_not_ray(address)} ({one_line(exc)})") from exc


def _not_ray(address: str) -> str:
    return (
        f"something answers at {address}, but it is not Ray's head; engine.address is the address that "
        "`ray start --head` printed, whose port is 6379 unless it was told another"
    )


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """What libraries write there by themselves is lost; what matters comes as an exception."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
