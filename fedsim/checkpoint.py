"""Atomic checkpoints and exact resume.

A checkpoint is one ``.safetensors`` file: the driver's state, the server's, the federation's, and the names of the
segments of client memory. Its name carries the first 16 digits of its SHA-256, so that a damaged one is known; it is
written beside its name and renamed, so that a half-written one is never seen. The last few are kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from fedsim import tree
from fedsim.errors import FedsimError, RunError
from fedsim.memory import Memory
from fedsim.rundir import write_atomic

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: ``checkpoints/`` of the run.
        memory: Client memory, saved and restored with the rest.
        keep: How many are kept, at least 2, so that the newest may be damaged; None: all.
    """

    def __init__(self, folder: Path, memory: Memory, keep: int | None = 2) -> None:
        self._folder, self._memory, self._keep = folder, memory, keep
        self._kept: dict[Path, list[str]] = {}  # oldest first, with the segments that each needs

    def save(self, round_num: int, content: Any) -> Path:
        """Saves a checkpoint and removes old ones.

        Args:
            round_num: Rounds done.
            content: A tree (`fedsim.tree`).

        Raises:
            RunError: The disk is full or not writable, or ``content`` holds what cannot be saved; the checkpoint before
                stays valid.
        """
        segments = self._memory.flush()
        try:
            text, tensors = tree.flatten({"content": content, "memory": segments})
        except TypeError as exc:
            raise RunError(f"no checkpoint can be written after round {round_num}: {exc}") from exc
        data = save({k: t.to("cpu", copy=True).contiguous() for k, t in tensors.items()}, {"tree": text})
        path = self._folder / f"{round_num:08d}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
        self._folder.mkdir(parents=True, exist_ok=True)  # perhaps deleted to save space
        write_atomic(path, data)
        self._kept.pop(path, None)
        self._kept[path] = segments
        for old in list(self._kept)[: -self._keep] if self._keep else ():
            old.unlink(missing_ok=True)
            del self._kept[old]
        self._memory.collect(self._kept.values())
        return path

    def load(self) -> Any:
        """Content of the newest checkpoint, with client memory as it was then; None if there is none yet.

        Raises:
            RunError: It is damaged; says what to do.
        """
        self._kept = {}
        found = files(self._folder)
        if not found:
            self._memory.restore([])
            return None
        *older, newest = found
        saved = tree_of(newest)
        extra = max(0, len(found) - self._keep) if self._keep else 0
        for path in older[:extra]:  # a process was killed before it removed them, or fewer are wanted now
            path.unlink()
        for path in older[extra:]:
            try:
                self._kept[path] = segments_of(path)
            except FedsimError as exc:  # it is not needed
                log.warning("%s", exc)
                self._kept[path] = []
        self._memory.restore(saved["memory"], self._kept.values())
        self._kept[newest] = saved["memory"]
        return saved["content"]


def files(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(folder.glob("[0-9]*-*.safetensors"), key=lambda p: (int(p.name.split("-")[0]), p.stat().st_mtime_ns))


def segments_of(path: Path) -> list[str]:
    """The segments of client memory that a checkpoint names; the rest of it is not read.

    Raises:
        RunError: It is damaged.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            node = json.loads(json.loads(file.read(size))["__metadata__"]["tree"])
        names: list[str] = dict(node["dict"])["memory"]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as exc:
        raise RunError(f"checkpoint {path} is damaged ({exc})") from exc
    return names


def tree_of(path: Path) -> dict[str, Any]:
    """What a checkpoint holds: ``content``, and ``memory``, the names of its segments.

    Raises:
        RunError: It is damaged; says what to do.
    """
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest()[:16] != path.stem.split("-")[1]:
            raise ValueError("its content does not have the hash in its name")
        size = int.from_bytes(data[:8], "little")
        text = json.loads(data[8 : 8 + size])["__metadata__"]["tree"]
        # Cloned: torch's own memory is aligned, and bits follow alignment.
        saved: dict[str, Any] = tree.unflatten(text, {k: t.clone() for k, t in load(data).items()})
    except (OSError, ValueError, KeyError, SafetensorError) as exc:
        if isinstance(exc, FedsimError):
            raise
        raise RunError(
            f"checkpoint {path} is damaged ({exc}); delete it to resume from the one before, or from the start"
        ) from exc
    return saved
