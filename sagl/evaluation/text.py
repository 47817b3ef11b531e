"""A sheet as Markdown, and on a terminal."""

import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import quote

from sagl.evaluation.report import MARK, Cell, Gallery, Section, Sheet, Table, enumerated

if TYPE_CHECKING:
    from rich.table import Table as RichTable
    from rich.text import Text

WIDTH = 160
"""Columns where the output is no terminal."""
NAME_WIDTH = 44
"""Of the column that names the rows, at most."""

# ----------------------------------------------------------------------------------------------------- Markdown


def markdown(sheet: Sheet, picture: str) -> str:
    """The whole file: the same sheet gives the same bytes.

    Args:
        sheet: what to show.
        picture: name of the PNG file beside it that holds the images, where there are some.
    """
    parts = [f"<!-- {MARK} -->\n# {escaped(sheet.title)}", *map(escaped, sheet.lines)]
    if sheet.gallery:
        parts.append(f"## Images at equal ids\n![{legend(sheet.gallery)}]({quote(picture)})\n\n{legend(sheet.gallery)}")
    parts += [_markdown_table(table) for table in sheet.tables]
    if sheet.alike:
        parts.append(f"## The same in all runs\n{escaped(sheet.alike)}")
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown leaves as it is, within a table too; numbers, dots and dashes need no help."""
    marked = re.sub(r"([\\`*_{}\[\]<>#|~!$])", r"\\\1", text.replace("&", "&amp;"))
    marked = re.sub(r"^(\d*)([-+.)])(?=\s|-|$)", r"\1\\\2", marked)  # no list
    return re.sub(r"(https?|ftp|www)([:.])", r"\1<!-- -->\2", marked)  # GitHub makes links of bare addresses


def legend(gallery: Gallery) -> str:
    """Which row and which column of the picture is what."""
    blocks = " of each block" if len(gallery.blocks) > 1 else ""
    rows = f"Rows{blocks} from above: {enumerated(gallery.names)}" if gallery.names[1:] else gallery.names[0]
    return escaped(f"{rows}. Columns: images {', '.join(map(str, gallery.ids))}.")


def _markdown_table(table: Table) -> str:
    parts = [f"## {escaped(table.title)}", *([escaped(table.note)] if table.note else [])]
    for section in table.sections:
        note = f"\n\n{escaped(section.note)}" if section.note else ""
        parts.append(f"### {escaped(section.title)}{note}\n\n" + "\n".join(_markdown_rows(table, section)))
    return "\n\n".join(parts)


def _markdown_rows(table: Table, section: Section) -> Iterator[str]:
    yield _markdown_row(["", *map(escaped, table.heads)])
    yield _markdown_row(["---", *(["--:" if table.aligned else "---"] * len(table.heads))])
    for row in section.rows:
        yield _markdown_row([_markdown_cell(row.name), *map(_markdown_cell, row.cells)])


def _markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_cell(cell: Cell) -> str:
    text = f"**{escaped(cell.text)}**" if cell.best else escaped(cell.text)
    return text + (f" ({escaped(cell.note)})" if cell.note else "")


# ----------------------------------------------------------------------------------------------------- terminal


def show(sheet: Sheet) -> None:
    """Print the tables; the best number of a row is bold, with a star."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    for line in sheet.lines:
        console.print(Text(line))
    for table in sheet.tables:
        console.print()
        console.print(Text(table.title, style="bold"))
        if table.note:
            console.print(Text(table.note, style="dim"))
        console.print(_rich_table(table))
    if sheet.alike:
        console.print(Text(f"\nThe same in all runs: {sheet.alike}", style="dim"))
    if any(cell.best for table in sheet.tables for s in table.sections for row in s.rows for cell in row.cells):
        console.print(Text("* the best of its row; arrows point to the better side", style="dim"))


def _rich_table(table: Table) -> "RichTable":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    made.add_column("", overflow="fold", max_width=NAME_WIDTH)
    for head in table.heads:
        made.add_column(Text(head), overflow="fold", justify="right" if table.aligned else "left")
    for section in table.sections:
        made.add_row(Text(section.title, style="bold").append(f"\n{section.note}" if section.note else "", style="dim"))
        for row in section.rows:
            made.add_row(_rich_name(row.name), *map(_rich_cell, row.cells))
        made.add_section()
    return made


def _rich_name(cell: Cell) -> "Text":
    from rich.text import Text

    return Text(f"  {cell.text}").append(f" ({cell.note})" if cell.note else "", style="dim")


def _rich_cell(cell: Cell) -> "Text":
    from rich.text import Text

    text = Text(cell.text + (" *" if cell.best else ""), style="bold green" if cell.best else "")
    return text.append(f"\n{cell.note}" if cell.note else "", style="dim not bold")
