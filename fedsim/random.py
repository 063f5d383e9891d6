"""Every random number of a run, derived from what it is for.

There is no global seed and no shared stream: a generator is built from
``(seed, purpose, *index)``, so any one stream can be recomputed alone, in any process and
in any order. The key is hashed (BLAKE2b), and the hash seeds the generator.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

Key = int | str
_PLAIN = frozenset((int, str))


def _digest(seed: int, purpose: str, index: tuple[Key, ...], size: int) -> bytes:
    # repr keeps 1 and "1" apart, and the tuple's brackets keep ("a", "b") and ("ab",) apart. A NumPy integer is an int.
    key = (seed, *index)
    if not _PLAIN.issuperset(map(type, key)):
        key = tuple(k if type(k) is str else operator.index(k) for k in key)  # type: ignore[arg-type]
    return hashlib.blake2b(repr((key[0], purpose, *key[1:])).encode(), digest_size=size).digest()


def derive(seed: int, purpose: str, *index: Key) -> int:
    """A 63-bit seed for ``(seed, purpose, *index)``."""
    return int.from_bytes(_digest(seed, purpose, index, 8), "little") >> 1


def generator(seed: int, purpose: str, *index: Key) -> torch.Generator:
    """A torch generator on the CPU for one stream.

    Args:
        seed: The run's seed.
        purpose: What the numbers are for (``"order"``, ``"augment"``, ...).
        *index: What tells the streams of one purpose apart: phase, visit, client, epoch, ...

    Note:
        torch's CPU generator uses 32 bits of its seed, which is plenty for the streams of one
        visit; populations (partitions, participation, generated data) are drawn from
        `numpy_generator`, whose key has 128 bits.
    """
    return torch.Generator().manual_seed(derive(seed, purpose, *index))


@contextmanager
def torch_seeded(seed: int, purpose: str, *index: Key) -> Iterator[None]:
    """Seeds torch's own generator of the CPU for a block, and leaves it as it was.

    Methods should draw from generators of their own; what draws from torch's nevertheless (``torch.randn_like``,
    dropout) then still follows from what it is for. NumPy's and Python's global generators are not seeded.
    """
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(derive(seed, purpose, *index))
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def numpy_generator(seed: int, purpose: str, *index: Key) -> np.random.Generator:
    """A counter-based (Philox) NumPy generator with a 128-bit key, for one stream."""
    key = np.frombuffer(_digest(seed, purpose, index, 16), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))
