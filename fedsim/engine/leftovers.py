"""Processes and files of private clusters: whose they are, and how they are ended and removed.

A cluster's folder is named after its owner, who holds a lock on it, and every process of the cluster has a file of it
open.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from fedsim.errors import ConfigError, one_line

LONGEST = 40  # characters of the folder: paths of sockets end at 107 bytes
_locks: dict[Path, int] = {}  # of this process's folders


def user_root() -> Path:
    """Where the folders of this user's clusters are; perhaps not there yet."""
    root = Path(tempfile.gettempdir())
    return (root if len(str(root)) + 24 <= LONGEST else Path("/tmp")) / f"fedsim-{os.getuid()}"


def private_root() -> Path:
    """The same, made if it is not there.

    Raises:
        ConfigError: It is somebody else's.
    """
    try:
        root = user_root()
        root.mkdir(mode=0o700, exist_ok=True)
    except OSError as exc:
        raise ConfigError(
            f"a cluster needs a folder for its sockets: {one_line(exc)}; set TMPDIR to a folder of your own with a "
            "short path"
        ) from exc
    if root.stat().st_uid != os.getuid():
        raise ConfigError(f"{root} belongs to somebody else; set TMPDIR to a folder of your own with a short path")
    return root


def private_folder() -> Path:
    """A folder for a cluster of this process; those of processes that died are removed."""
    root = private_root()
    sweep(root)
    folder = root / f"{os.getpid()}-{start_time(os.getpid())}"
    if folder not in _locks:
        new = root / f"new{folder.name.replace('-', '_')}"  # `sweep` sees it when it is locked
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        _locks[folder] = os.open(new, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks: then nobody sweeps it either
            fcntl.flock(_locks[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(folder)
    return folder


def sweep(root: Path) -> None:
    """Ends and removes what clusters of dead processes left below ``root``.

    The owner holds a lock on its folder as long as it lives: other than its process id, containers and machines that
    share the temporary folder see that, too.
    """
    for folder in root.glob("*-*"):
        try:
            lock = os.open(folder, os.O_RDONLY)
        except OSError:  # removed meanwhile
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            remove(folder, grace_s=0)
        finally:
            os.close(lock)


def remove(folder: Path, grace_s: float = 2.0) -> None:
    """Ends every process of a cluster, and removes its folder.

    Args:
        folder: The cluster's folder; it need not exist.
        grace_s: For so long they are only asked to end.
    """
    if not folder.exists():
        return
    begin = time.monotonic()
    while (users := [p for p in users_of(folder) if _is_ray(p, folder)]) and time.monotonic() < begin + grace_s + 2:
        for pid in users:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if time.monotonic() < begin + grace_s else signal.SIGKILL)
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)
    if (lock := _locks.pop(folder, None)) is not None:
        os.close(lock)


def _is_ray(pid: int, folder: Path) -> bool:
    """Whether a process is one of Ray's, for this folder, and not a child or a log viewer of the user's."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return False
    own = any("/ray/" in word for word in words[:4]) and any(str(folder) in word for word in words)
    return own or words[0].startswith("ray::")


def start_guard(folder: Path) -> tuple[int, int]:
    """Starts a process that clears the folder when this one has died, however it died.

    Returns:
        Its id, and what holds it back: the end of a pipe, which the kernel closes with this process.
    """
    code = "import sys; sys.path.insert(0, sys.argv[1]); from fedsim.engine.leftovers import guard; guard(sys.argv[2])"
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


def end_guard(pid: int, held: int) -> None:
    """Lets the guard go, which has nothing to do any more."""
    os.close(held)
    with contextlib.suppress(ChildProcessError):  # whoever ignores SIGCHLD has no dead children
        os.waitpid(pid, 0)


def users_of(folder: Path) -> list[int]:
    """Processes of ours, but this one, with an open file in a folder."""
    prefix, found = f"{folder}/", []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if any(_target(link).startswith(prefix) for link in (process / "fd").iterdir()):
                found.append(int(process.name))
    return found


def let_go(folder: Path) -> None:
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


def start_time(pid: int) -> str:
    """When a process started, in the kernel's ticks: with its id, a name that no other process ever has.

    Empty for one that is dead, be it that nobody has waited for it yet.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
