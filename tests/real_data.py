"""Where tests find real data sets, if this machine has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def real_data(path: str) -> Path:
    """The folder of real data sets, in the hub's layout; skips the test if the set ``path`` is not there.

    It is ``$FEDSIM_TEST_DATA``, or else the folder ``shared/data`` beside the repository.
    """
    root = Path(os.environ.get("FEDSIM_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not (root / path).is_dir():
        pytest.skip(f"needs the real data set {path}: set FEDSIM_TEST_DATA to a folder that has it")
    return root
