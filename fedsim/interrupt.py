"""Requests to stop (SIGINT, SIGTERM), which are not lost.

They are raised as `KeyboardInterrupt` wherever the process is, and where nothing may be raised (the import of a module
in C, a callback, a finaliser) Python drops it. So what takes long asks again.
"""

from __future__ import annotations

import signal
from typing import Any, NoReturn

_asked = False


def catch() -> None:
    """From now on requests are noted; one that is ignored (of a job in the background) stays so."""
    global _asked
    _asked = False
    signal.signal(signal.SIGTERM, _raise)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _raise)


def check() -> None:
    """Raises what came and was lost.

    Raises:
        KeyboardInterrupt: Somebody asked this process to stop.
    """
    if _asked:
        raise KeyboardInterrupt


def _raise(number: int, frame: Any) -> NoReturn:
    global _asked
    _asked = True
    raise KeyboardInterrupt
