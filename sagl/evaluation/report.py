"""A page of tables and images, before it is HTML, Markdown or lines on a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass

MARK = "made by sagl compare"
"""Near the beginning of every file that is written: such a one may be replaced."""
SMALL = 64
"""Images up to this side stand sixteen to a row, larger ones eight, as in the grids of a run."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What stands in one place of a table."""

    text: str
    note: str = ""
    """In smaller type beneath."""
    best: bool = False
    """Of its row."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table."""

    name: Cell
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """Rows under a heading."""

    title: str
    note: str = ""
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Sections that share their columns."""

    title: str
    heads: tuple[str, ...]
    """Of all columns but the first, which holds the rows' names."""
    sections: tuple[Section, ...]
    note: str = ""
    aligned: bool = False
    """Whether its numbers are read from above to below."""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The same samples of several runs."""

    names: tuple[str, ...]
    """Of the runs."""
    ids: tuple[int, ...]
    rows: tuple[tuple[bytes, ...], ...]
    """PNG files: of each run, one an id."""
    side: int
    """Width of an image in pixels."""

    @property
    def blocks(self) -> list[range]:
        """Places of the ids that stand beside each other."""
        width = 16 if self.side <= SMALL else 8
        return [range(start, min(start + width, len(self.ids))) for start in range(0, len(self.ids), width)]


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """All that is to be shown of some runs."""

    title: str
    lines: tuple[str, ...]
    """What a reader must know before the tables."""
    tables: tuple[Table, ...]
    alike: str
    """The settings that all runs share, in one line; empty where they are in the table."""
    gallery: Gallery | None = None


def clean(value: object) -> str:
    """A value as one printable line: line breaks, escape sequences and broken characters are spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def enumerated(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])
