"""What a report is made of: a page of sections, a section of blocks; ``report.html.j2`` says how they look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsim.report.compare import Cell


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a label, and the line that it stands for."""

    label: str
    colour: str
    dash: tuple[float, ...] = ()

    @property
    def dashes(self) -> str:
        """As ``stroke-dasharray`` of a line 3 wide."""
        return " ".join(f"{3 * length:g}" for length in self.dash)


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
