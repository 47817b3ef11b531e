"""A report of tables and images, shown on a terminal or written as an HTML page."""

import base64
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sagl.evaluation.plot import Plot

if TYPE_CHECKING:
    from rich.table import Table as RichTable

GENERATOR_TAG = "made by sagl compare"
"""Text near the beginning of every page, by which an older page is recognised."""
TAG_BYTES = 200
"""Number of bytes at the beginning of a page that contain the tag."""
SMALL = 64
"""Images up to this size are shown enlarged and 16 per row, larger ones 8 per row."""
WIDTH = 160
"""Width in characters if the output is not a terminal."""
NAME_WIDTH = 44
"""Maximum width in characters of the column of row names."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of a table."""

    text: str
    note: str = ""
    """Secondary text."""
    best: bool = False
    """True for the best value of the row, which is marked."""
    link: str = ""
    """Address that the text links to on a page, relative to the report."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table."""

    name: Cell
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """Rows under a heading."""

    title: str = ""
    note: str = ""
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """An image that belongs to a table."""

    caption: str = ""
    path: Path
    """The file, relative to the folder of the report."""
    png: bytes
    scale: float = 1.0
    """Displayed size of its pixels on a wide page."""

    @property
    def width(self) -> int:
        """Displayed width in pixels on a wide page."""
        return round(self.scale * int.from_bytes(self.png[16:20], "big"))


@dataclass(frozen=True, kw_only=True)
class Table:
    """Sections with common columns; without columns they are not shown."""

    title: str
    columns: tuple[str, ...]
    """Headings of all columns but that of the row names."""
    sections: tuple[Section, ...]
    note: str = ""
    """Text above the rows; its paragraphs are separated by empty lines."""
    right_aligned: bool = False
    figures: tuple[Figure, ...] = ()
    commands: str = ""
    """Lines of a shell that make the rows."""


@dataclass(frozen=True, kw_only=True)
class ImageGrid:
    """Images of the same ids of several runs."""

    ids: tuple[int, ...]
    rows: Mapping[str, Sequence[bytes]]
    """PNG files by the name of the run, one per id."""
    image_size: int
    """Width of an image in pixels."""

    @property
    def is_small(self) -> bool:
        """Return whether the images are displayed at twice their size."""
        return self.image_size <= SMALL

    @property
    def image_width(self) -> int:
        """Displayed width in pixels."""
        return self.image_size * (2 if self.is_small else 1)

    @property
    def label_width(self) -> int:
        """Displayed width of the runs' names in rem, for about two characters each."""
        return min(11, 2 + max(map(len, self.rows)) // 2)

    @property
    def blocks(self) -> list[range]:
        """Indices of the ids that are shown side by side."""
        width, count = 16 if self.is_small else 8, len(self.ids)
        return [range(start, min(start + width, count)) for start in range(0, count, width)]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Tables and images of some runs."""

    title: str
    notes: tuple[str, ...]
    """Sentences above the tables."""
    tables: tuple[Table, ...]
    shared_settings: str = ""
    """Settings that all runs share, in one line."""
    images: ImageGrid | None = None
    plot: Plot | None = None
    command: str = "compare"
    """Subcommand that made the report."""


def printable(value: object) -> str:
    """Return a value as one printable line; control characters and surrogates are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def join_with_and(names: Sequence[str]) -> str:
    """Join names as in "a, b and c"."""
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])


# ---------------------------------------------------------------------------------------------------- HTML


def render_html(report: Report) -> str:
    """Return a self-contained HTML page; equal reports give equal bytes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template("report.html.jinja").render(
        report=report, generator=f"made by sagl {report.command}"
    )


def has_generator_tag(path: Path) -> bool:
    """Return whether a file is a page made by `render_html`."""
    try:
        with path.open("rb") as file:
            return GENERATOR_TAG.encode() in file.read(TAG_BYTES)
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------ Markdown


def render_markdown(report: Report) -> str:
    """Return the report as Markdown, with links to its figures."""
    parts = [f"# {report.title}", *report.notes]
    for table in report.tables:
        parts += [f"## {table.title}", *([table.note] if table.note else [])]
        parts += [f"![{figure.caption or table.title}]({figure.path.as_posix()})" for figure in table.figures]
        if table.columns:
            rows = [["", *table.columns], ["---"] * (1 + len(table.columns))]
            for section in table.sections:
                rows += [[_markdown_cell(cell) for cell in (row.name, *row.cells)] for row in section.rows]
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
        parts += [f"```bash\n{table.commands}\n```"] if table.commands else []
    return "\n\n".join(parts) + "\n"


def _markdown_cell(cell: Cell) -> str:
    text = f"[{cell.text}]({cell.link})" if cell.link else f"**{cell.text}**" if cell.best else cell.text
    return (f"{text}<br>{cell.note}" if cell.note else text).replace("|", "\\|")


# ------------------------------------------------------------------------------------------------ terminal


def print_report(report: Report) -> None:
    """Print the tables; the best value of a row is bold and has a star."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    for note in report.notes:
        console.print(Text(note))
    for table in report.tables:
        console.print()
        console.print(Text(table.title, style="bold"))
        if table.note:
            console.print(Text(table.note, style="dim"))
        console.print(_rich_table(table))
    if report.shared_settings:
        console.print(Text(f"\nThe same in all runs: {report.shared_settings}", style="dim"))
    rows = [row for table in report.tables for section in table.sections for row in section.rows]
    if any(cell.best for row in rows for cell in row.cells):
        console.print(Text("* best of its row; arrows point to the better direction", style="dim"))


def _rich_table(table: Table) -> "RichTable":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    def value(cell: Cell) -> Text:
        text = Text(cell.text + (" *" if cell.best else ""), style="bold green" if cell.best else "")
        return text.append(f"\n{cell.note}" if cell.note else "", style="dim not bold")

    result = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    result.add_column("", overflow="fold", max_width=NAME_WIDTH)
    for column in table.columns:
        result.add_column(Text(column), overflow="fold", justify="right" if table.right_aligned else "left")
    for section in table.sections:
        title = Text(section.title, style="bold")
        result.add_row(title.append(f"\n{section.note}" if section.note else "", style="dim"))
        for row in section.rows:
            name = Text(f"  {row.name.text}").append(f" ({row.name.note})" if row.name.note else "", style="dim")
            result.add_row(name, *map(value, row.cells))
        result.add_section()
    return result
