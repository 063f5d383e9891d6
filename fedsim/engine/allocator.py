"""Main memory that was freed stays with the process.

The C library gives large blocks back to the system as soon as they are freed, and every page of the next one is then
mapped and cleared anew: a third to a half of the time of a step over several clients, whose activations are a few MB.
"""

from __future__ import annotations

import ctypes
import sys

# Of mallopt(3), https://man7.org/linux/man-pages/man3/mallopt.3.html; larger thresholds than 32 MiB are refused.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
MIB = 2**20


def keep_freed_memory() -> None:
    """Blocks of up to 32 MiB come from the heap, which gives back what is beyond 512 MiB; nothing where there is no
    glibc. Bits do not depend on it."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 * MIB)
        mallopt(_TRIM_THRESHOLD, 512 * MIB)
