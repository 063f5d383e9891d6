"""What a report is made of: a page of sections, a section of blocks; ``report.html.j2`` says how they look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsim.report.compare import Cell

#: Marks of curves by their names in Matplotlib, as SVG paths around the origin.
_OUTLINES = {
    "o": "M-3.5 0A3.5 3.5 0 1 0 3.5 0A3.5 3.5 0 1 0 -3.5 0Z",
    "s": "M-3-3H3V3H-3Z",
    "^": "M0-4L4 3H-4Z",
    "D": "M0-4.2L4.2 0L0 4.2L-4.2 0Z",
    "v": "M0 4L4-3H-4Z",
}


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a label, and the line that it stands for, as in `fedsim.report.curves.Line`."""

    label: str
    colour: str
    dash: tuple[float, ...] = ()
    mark: str = "o"
    width: float = 1.8

    @property
    def stroke(self) -> float:
        """Width of the line in pixels, wider than in a picture: it is short."""
        return 1.25 * self.width

    @property
    def dashes(self) -> str:
        """As ``stroke-dasharray``."""
        return " ".join(f"{self.stroke * length:g}" for length in self.dash)

    @property
    def outline(self) -> str:
        """The mark as an SVG path around the origin."""
        return _OUTLINES[self.mark]


@dataclass(frozen=True)
class Legend:
    """Which line is whose."""

    entries: Sequence[Key]
    kind = "legend"


@dataclass(frozen=True)
class Note:
    """A paragraph; ``warn`` makes it stand out."""

    text: str
    warn: bool = False
    kind = "note"


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    text: str
    kind = "heading"


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: What it holds.
        header: Names of the columns; empty: a list of facts, named by the first column.
        rows: As long as the header; a `Cell` may be the best of its column.
        left: The first so many columns stand left, the others right; 0: the first column names no rows.
        bar: A column of percentages, to be shown as lengths too; None: none.
        tall: Whether it scrolls inside its box.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    left: int = 1
    bar: int | None = None
    tall: bool = False
    kind = "table"

    @property
    def wordy(self) -> bool:
        """Whether the first column needs room for words."""
        return any(len(cell if isinstance(cell, str) else cell.text) > 20 for cell, *_ in self.rows)


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        title: Above it.
        alt: What it shows, in words.
        source: A ``data:`` URL.
        legend: Its own; empty: that of the section.
        wide: Whether it takes the whole width.
    """

    title: str
    alt: str
    source: str
    legend: Sequence[Key] = ()
    wide: bool = False


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side where there is room."""

    pictures: Sequence[Picture]
    kind = "pictures"


@dataclass(frozen=True)
class Details:
    """Long text, folded away."""

    title: str
    text: str
    kind = "details"


Block = Legend | Note | Heading | Table | Pictures | Details


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it; left out if nothing does."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: Heading.
        status: ``finished``, or how far it came.
        good: Whether all runs are finished.
        lead: A line below the heading.
        notes: What a reader must know first.
        cards: The figures that count: name, value, remark.
        sections: The rest.
    """

    title: str
    status: str
    good: bool
    lead: str
    notes: Sequence[Note]
    cards: Sequence[tuple[str, str, str]]
    sections: Sequence[Section]
