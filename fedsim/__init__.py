"""fedsim: simulated federated learning, faithful to the papers and reproducible to the bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.experiment import simulate as simulate
    from fedsim.run import Result as Result

_WHERE = {"simulate": "fedsim.experiment", "Result": "fedsim.run"}

__all__ = ["Result", "simulate"]


def __getattr__(name: str) -> Any:
    # Imported on first use: torch takes a second, and `fedsim --help` needs none of it.
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
