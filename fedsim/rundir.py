"""The run directory: ``runs/<name>/<timestamp>-<hash>/``, and files that are whole or absent.

A reader never sees half of a file: a writer fills a temporary file in the same folder, forces it
to the disk, and renames it. The one file that grows, ``metrics.jsonl``, may lose its last line
when a driver is killed; `read_metrics` knows that.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

from fedsim.errors import ConfigError, FedsimError, RunError

log = logging.getLogger(__name__)

#: What to do about an error of the operating system, by its number.
REMEDIES = {
    errno.ENOSPC: "free some space, or put the run elsewhere",
    errno.EDQUOT: "your disk quota is used up: free some space, or put the run elsewhere",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or put the run elsewhere",
    errno.EACCES: "check who owns the folder, or put the run elsewhere",
    errno.EPERM: "check who owns the folder, or put the run elsewhere",
    errno.EROFS: "the file system is read-only: put the run elsewhere",
    errno.ENOTDIR: "a part of the path is a file: move it away, or put the run elsewhere",
    errno.ENOENT: "the folder is gone: was the run directory moved or deleted while it was in use?",
    errno.ENAMETOOLONG: "choose a shorter `name`",
}


def _explain(error: OSError, doing: str, path: Path) -> str:
    remedy = REMEDIES.get(error.errno or 0, "check the disk")
    return f"cannot {doing} {path}: {error.strerror or error}; {remedy}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to fill; it becomes ``path`` when the block ends well, and vanishes when it does not.

    Args:
        path: The file to write or replace; its folder must exist.

    Yields:
        A path in the same folder, for writers that want a file name.

    Raises:
        RunError: The disk is full, or the folder may not be written to; names the path and the remedy.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as exc:
        raise RunError(_explain(exc, "write", path)) from exc
    finally:
        # After a success the name is gone already. A leftover is no reason to hide the first error.
        try:
            temporary.unlink(missing_ok=True)
        except OSError as exc:
            log.warning("%s", _explain(exc, "remove", temporary))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as exc:  # some network file systems cannot sync a folder
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes a file that is either whole or absent, whenever the process or the machine stops.

    Args:
        path: The file; its folder must exist.
        data: The content; text is stored as UTF-8.

    Raises:
        RunError: The disk is full, or the folder may not be written to; names the path and the remedy.
    """
    with replacing(path) as temporary, temporary.open("xb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


class GrowingFile:
    """A file that grows by whole lines, and has lost nothing of them when the process is killed.

    Args:
        path: The file; its folder must exist.
        content: What it shall hold at first; it is rewritten where it holds something else.

    Raises:
        RunError: It cannot be written.
    """

    def __init__(self, path: Path, content: str) -> None:
        if not path.exists() or path.read_bytes() != content.encode():
            write_atomic(path, content)
        self._path = path
        try:
            # Unbuffered: one write() for all that is appended, and nothing to lose when the process is killed.
            self._file = path.open("ab", buffering=0)
        except OSError as exc:
            raise RunError(_explain(exc, "open", path)) from exc

    def append(self, lines: str) -> None:
        """Appends lines, in one write.

        Raises:
            RunError: The disk is full; says how to go on.
        """
        data = lines.encode()
        try:
            written = self._file.write(data)
            if written != len(data):  # a nearly full disk takes a part
                raise OSError(0, f"only {written} of {len(data)} bytes were written; is the disk full?")
        except OSError as exc:
            raise RunError(
                f"cannot write to {self._path}: {exc.strerror or exc}; free some space, then go on with "
                f"fedsim resume={self._path.parent}"
            ) from exc

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._file.close()


def dumps(value: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON in the given order of keys; NaN and infinities become null, as JSON has no word for them.

    Args:
        value: Numbers, strings, booleans, None, paths, one-element arrays; dicts and sequences of them.
        indent: As in `json.dumps`.

    Raises:
        TypeError: Something else; names its key.
    """
    return json.dumps(_plain(value, ""), indent=indent, allow_nan=False, ensure_ascii=False)


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}" if where else str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1:  # a NumPy or torch number
        return _plain(value.item(), where)
    raise TypeError(f"`{where}` must be a number, a string, or a list or dict of them, got {type(value).__name__}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads ``metrics.jsonl``: one record per round.

    A damaged last line is what a killed driver leaves, and is left out.

    Args:
        path: The file, or the run directory that holds it.

    Raises:
        ConfigError: There is no such file, or a line before the last is damaged; names file and line.
    """
    path = path / "metrics.jsonl" if path.is_dir() else path
    lines = _read(path).split(b"\n")
    lines = lines[:-1] if lines[-1] == b"" else lines
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("round"), int):
                raise ValueError("no record of a round")
        except ValueError as exc:
            if number == len(lines):
                break
            raise ConfigError(
                f"{path}:{number}: damaged line ({exc}); restore the file from a copy, or delete the line"
            ) from exc
        records.append(record)
    return records


def read_summary(path: Path) -> dict[str, Any]:
    """Reads ``summary.json``.

    Args:
        path: The file, or the run directory that holds it.

    Raises:
        ConfigError: There is no such file, or it is damaged.
    """
    path = path / "summary.json" if path.is_dir() else path
    try:
        summary = json.loads(_read(path))
        if not isinstance(summary, dict):
            raise ValueError(f"needed an object, got {type(summary).__name__}")
    except ValueError as exc:
        if isinstance(exc, FedsimError):
            raise
        raise ConfigError(f"{path} is damaged ({exc}); restore it from a copy, or run again") from exc
    return summary


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as exc:
        raise ConfigError(f"{path} does not exist; is {path.parent} a run directory?") from exc
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror or exc}") from exc


@dataclass(frozen=True)
class RunDir:
    """One run's directory.

    Attributes:
        path: The directory; it exists.
    """

    path: Path

    @classmethod
    def create(
        cls, root: Path, name: str, config_hash: str, now: datetime | None = None, config: str | None = None
    ) -> RunDir:
        """Makes ``<root>/<name>/<timestamp>-<hash>/``, never one that exists.

        Args:
            root: The folder of all runs.
            name: The experiment's name; ``/`` makes folders.
            config_hash: Hash of the resolved config; its first 8 characters are used.
            now: The time in the directory's name; default: now, local time.
            config: Content of ``config.yaml``. It is there as soon as the directory is, so that a run that is killed
                at any moment can be resumed.

        Raises:
            ConfigError: ``name`` would leave ``root``, or the directory cannot be made.
        """
        parts = PurePath(name).parts
        if not parts or PurePath(name).is_absolute() or ".." in parts or "\0" in name:
            raise ConfigError(f"`name` must be a relative path without '..', like 'fedavg' or 'sweep/a', got {name!r}")
        stem = f"{now or datetime.now():%Y%m%d-%H%M%S}-{config_hash[:8]}"
        folder, number = Path(root) / name, 1
        filled = folder / f".{stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            (filled / "checkpoints").mkdir(parents=True)
            if config is not None:
                write_atomic(filled / "config.yaml", config)
            while True:
                path = folder / (stem if number == 1 else f"{stem}-{number}")
                try:
                    if not path.exists():
                        filled.rename(path)
                        break
                except OSError as exc:  # a sweep starts several runs within a second
                    if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                number += 1
            _sync_folder(folder)
        except OSError as exc:
            raise ConfigError(_explain(exc, "make a run directory in", folder)) from exc
        finally:
            shutil.rmtree(filled, ignore_errors=True)
        return cls(path)

    @classmethod
    def open(cls, path: Path | str) -> RunDir:
        """An existing run directory.

        Raises:
            ConfigError: ``path`` is not one.
        """
        path = Path(path)
        if not path.is_dir():
            raise ConfigError(f"{path} is not a directory; a run directory looks like runs/<name>/<timestamp>-<hash>")
        if not (path / "config.yaml").is_file():
            inside = sorted(p.parent for p in path.glob("*/config.yaml")) or sorted(
                p.parent for p in path.glob("*/*/config.yaml")
            )
            hint = f"; it holds {len(inside)}, the newest is {inside[-1]}" if inside else ""
            raise ConfigError(f"{path} is not a run directory: it has no config.yaml{hint}")
        return cls(path)

    @property
    def config(self) -> Path:
        """``config.yaml``: the resolved config."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """``metrics.jsonl``: a line per round."""
        return self.path / "metrics.jsonl"

    @property
    def clients(self) -> Path:
        """``clients.csv``: evaluation of every client."""
        return self.path / "clients.csv"

    @property
    def classes(self) -> Path:
        """``classes.csv``: evaluation of every class."""
        return self.path / "classes.csv"

    @property
    def visits(self) -> Path:
        """``visits.csv``: every client visit."""
        return self.path / "visits.csv"

    @property
    def report(self) -> Path:
        """``report.html``: all of it on one page."""
        return self.path / "report.html"

    @property
    def failure(self) -> Path:
        """``failure.json``: the visit that ended the run."""
        return self.path / "failure.json"

    @property
    def summary(self) -> Path:
        """``summary.json``: written when the run ends."""
        return self.path / "summary.json"

    @property
    def partition(self) -> Path:
        """``partition.npz``: which examples belong to which client."""
        return self.path / "partition.npz"

    @property
    def model(self) -> Path:
        """``model.safetensors``: the final global model."""
        return self.path / "model.safetensors"

    @property
    def checkpoints(self) -> Path:
        """``checkpoints/``: what a resume starts from."""
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        """``log.txt``: what was logged."""
        return self.path / "log.txt"

    @property
    def figures(self) -> Path:
        """``figures/``: pictures; made by whoever draws the first one."""
        return self.path / "figures"

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes ``summary.json``, whole or not at all; NaN and infinities become null."""
        write_atomic(self.summary, dumps(summary, indent=2) + "\n")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the directory for this process; the kernel lets go when the process ends, however it ends.

        Temporary files that a killed process left behind are removed.

        Raises:
            ConfigError: Another process holds it; names that process.
        """
        import fcntl

        path = self.path / ".lock"
        try:
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closed below; closing lets go of the lock
        except OSError as exc:
            raise ConfigError(_explain(exc, "lock", path)) from exc
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise ConfigError(
                    f"{self.path} is in use by {holder}; wait until it ends, or stop it, and try again"
                ) from exc
            except OSError as exc:
                if exc.errno not in (errno.ENOLCK, errno.ENOTSUP):
                    raise ConfigError(_explain(exc, "lock", path)) from exc
                log.warning("%s: this file system has no locks; make sure that no other process uses it", self.path)
            # Never deleted: a process that had opened the old file would lock another one than the next process.
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            for folder in (self.path, self.checkpoints, self.figures):
                for leftover in folder.glob(".*.tmp"):
                    leftover.unlink(missing_ok=True)
            yield
