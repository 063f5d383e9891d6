"""Numbers and tables as text."""

from __future__ import annotations

import math
from collections.abc import Sequence


def percent(fraction: float | None) -> str:
    """``0.7831`` as ``78.31 %``; None and NaN as ``nan``."""
    return "nan" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.2f} %"


def number(value: float | None) -> str:
    """``0.17056`` as ``0.1706``, ``12345`` as ``1.234e+04``; None and NaN as ``nan``."""
    if value is None or math.isnan(value):
        return "nan"
    return f"{value:.4f}" if 0.001 <= abs(value) < 1000 or not value else f"{value:.3e}"


def human_bytes(count: float) -> str:
    """``1536`` as ``1.5 KiB``; units of 1024."""
    size, unit = float(count), "B"
    if math.isnan(size):
        return "nan"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        # 1023.95 KiB would be printed as 1024.0 KiB.
        if size < 1023.95 or unit == "PiB":
            break
        size /= 1024
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def human_seconds(seconds: float) -> str:
    """``3725`` as ``1:02:05``, ``75`` as ``1:15``; below a minute ``12.3 s``, below a second ``0.045 s``."""
    if math.isnan(seconds):
        return "nan"
    if seconds < 59.95:
        return f"{seconds:.2g} s" if seconds < 0.95 else f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def align(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows in columns two spaces apart.

    Args:
        rows: Cells; every row has as many.
        left: The first so many columns stand left, the others right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
