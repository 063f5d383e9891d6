"""Decoded data sets on disk, so that images are decoded once per machine and not once per run.

One safetensors file per set, in ``$FEDSIM_CACHE`` or ``~/.cache/fedsim``; anything in there may be deleted at any
time. The cache never makes a run fail: what cannot be read is decoded again, what cannot be written is not kept.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from pathlib import Path

from torch import Tensor

from fedsim.rundir import replacing

log = logging.getLogger(__name__)


def folder() -> Path:
    """Where decoded data sets are kept."""
    return Path(os.environ.get("FEDSIM_CACHE") or "~/.cache/fedsim").expanduser()


def read(name: str, key: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """What `write` stored under ``name`` and ``key``, if it is there and undamaged.

    Args:
        name: Readable part of the file name.
        key: Hash of all that the content depends on.

    Returns:
        The tensors, mapped from the file (their pages are shared between processes), and the notes; or None.
    """
    from safetensors import safe_open

    path: Path | None = None
    try:
        path = _path(name, key)
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            about: dict[str, str] = file.metadata()
            tensors: dict[str, Tensor] = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (no mapping)
        if json.loads(about.pop("crc32")) != _checksums(tensors):
            raise ValueError("its checksum is wrong")
    except Exception as exc:  # whatever is wrong with it, the remedy is to build it again
        log.warning("the cached data set %s cannot be used (%s); decoding it again", path or name, exc)
        return None
    return tensors, about


def write(name: str, key: str, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Stores tensors and notes for `read`, atomically: another process sees all of the file or none.

    Args:
        name: Readable part of the file name.
        key: Hash of all that the content depends on.
        tensors: What to store; contiguous.
        about: Notes to store with them.
    """
    from safetensors.torch import save_file

    try:
        path = _path(name, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file(tensors, temporary, {**about, "crc32": json.dumps(_checksums(tensors))})
    except Exception as exc:  # a full disk, a read-only home, no home at all: slower next time, nothing worse
        log.warning("the decoded data set %s could not be kept in %s (%s); set FEDSIM_CACHE", name, folder(), exc)


def _path(name: str, key: str) -> Path:
    return folder() / f"{name}-{key[:24]}.safetensors"


def _checksums(tensors: dict[str, Tensor]) -> dict[str, int]:
    return {k: zlib.crc32(t.numpy().data) for k, t in sorted(tensors.items())}
