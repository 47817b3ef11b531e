"""A sheet as one HTML file: images inside, no script, no address of elsewhere, for light, dark and paper."""

import base64
from html import escape

from sagl.evaluation.report import MARK, SMALL, Cell, Gallery, Row, Section, Sheet, Table

STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5c6670; --line: #d9dee3; --paper: #fff; --band: #f4f6f8;
  --best: #0a6b45; --best-band: #e2f3eb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #9aa4ae; --line: #343b42; --paper: #15181b;
  --band: #1d2125; --best: #6fd6a6; --best-band: #16342a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "Liberation Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; font-weight: 650; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; font-weight: 650; margin: 2.5rem 0 .5rem; }
p { max-width: 60rem; margin: .35rem 0; overflow-wrap: anywhere; }
p.alike { max-width: none; color: var(--soft); font-size: .87rem; line-height: 1.6; }
.note, figcaption { color: var(--soft); font-size: .82rem; font-weight: 400; }
.scroll { overflow-x: auto; margin-top: .75rem; }
table { border-collapse: collapse; table-layout: fixed; width: 100%; font-variant-numeric: tabular-nums; }
col:first-child { width: 18rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .75rem; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
th:first-child { padding-left: .5rem; }
thead th:first-child, th[scope=row] { position: sticky; left: 0; background: var(--paper); }
th[scope=row] { font-weight: 400; color: var(--soft); }
thead th { border-bottom: 2px solid var(--ink); font-weight: 650; vertical-align: bottom; }
th[scope=rowgroup] { background: var(--band); font-weight: 600; padding-top: .55rem; }
th[scope=rowgroup] .note::before { content: " · "; }
td .note, th[scope=row] .note { display: block; line-height: 1.35; }
table.aligned td, table.aligned thead th + th { text-align: right; }
.best { font-weight: 650; color: var(--best); }
.best .tag { font-size: .7rem; font-weight: 600; letter-spacing: .02em; background: var(--best-band);
  border-radius: .6rem; padding: .08rem .42rem; margin-left: .35rem; white-space: nowrap; vertical-align: .06em; }
figure { margin: 1.25rem 0 0; }
.grid { display: grid; gap: 3px; align-items: center;
  grid-template-columns: var(--label) repeat(var(--columns), minmax(2.5rem, var(--width))); }
.grid .name { padding-right: .75rem; font-size: .87rem; line-height: 1.3; overflow-wrap: anywhere; overflow: hidden;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4; }
.grid .id { color: var(--soft); font-size: .75rem; text-align: center; font-variant-numeric: tabular-nums; }
.grid img { display: block; width: 100%; height: auto; }
.grid.small img { image-rendering: pixelated; }
footer { margin-top: 3rem; color: var(--soft); font-size: .82rem; }
@media (max-width: 40rem) { main { padding: 1.5rem 1rem 3rem; } col:first-child { width: 9.5rem; } }
@media print { :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --band: #f1f1f1; --best: #000;
  --best-band: #e6e6e6; } body { font-size: 10pt; } main { max-width: none; padding: 0; } .scroll { overflow: visible; }
  table { min-width: 0 !important; } col:first-child { width: 26%; } th[scope=row] { position: static; }
  .grid { grid-template-columns: var(--label) repeat(var(--columns), minmax(0, var(--width))); }
  tr, .grid { break-inside: avoid; }
  h2 { break-after: avoid; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def html_page(sheet: Sheet) -> str:
    """The whole file: the same sheet gives the same bytes."""
    parts = [
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta name="generator" content="{MARK}">\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(sheet.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
        f"<h1>{escape(sheet.title)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in sheet.lines),
        *([_gallery(sheet.gallery)] if sheet.gallery else []),
        *(_table(table) for table in sheet.tables),
        *([f'<h2>The same in all runs</h2>\n<p class="alike">{escape(sheet.alike)}</p>'] if sheet.alike else []),
        "<footer>Made by sagl compare. Arrows point to the better side.</footer>\n</main>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _table(table: Table) -> str:
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in table.heads)
    note = f'<p class="note">{escape(table.note)}</p>\n' if table.note else ""
    kind = ' class="aligned"' if table.aligned else ""
    width = f"{18 + (6 if table.aligned else 9) * len(table.heads)}rem"  # wider tables than the page scroll
    bodies = "\n".join(_section(section, len(table.heads) + 1) for section in table.sections)
    return (
        f'<h2>{escape(table.title)}</h2>\n{note}<div class="scroll"><table{kind} style="min-width: {width}">\n'
        f'<colgroup><col><col span="{len(table.heads)}"></colgroup>\n'
        f'<thead><tr><th scope="col"></th>{heads}</tr></thead>\n{bodies}\n</table></div>'
    )


def _section(section: Section, width: int) -> str:
    note = f'<span class="note">{escape(section.note)}</span>' if section.note else ""
    head = f'<tr><th scope="rowgroup" colspan="{width}">{escape(section.title)}{note}</th></tr>'
    return "\n".join(["<tbody>", head, *map(_row, section.rows), "</tbody>"])


def _row(row: Row) -> str:
    cells = "".join(f"<td>{_cell(cell)}</td>" for cell in row.cells)
    return f'<tr><th scope="row">{_cell(row.name)}</th>{cells}</tr>'


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    marked = f'<span class="best">{text}<span class="tag">best</span></span>' if cell.best else text
    return marked + (f'<span class="note">{escape(cell.note)}</span>' if cell.note else "")


def _gallery(gallery: Gallery) -> str:
    """Images in blocks, a row a run, small ones twice as large."""
    caption = "A row is a run, a column a sample id: with equal seeds and labels, its images begin from the same noise."
    blocks = "\n".join(_block(gallery, places) for places in gallery.blocks)
    return f"<h2>Images at equal ids</h2>\n<figure><figcaption>{caption}</figcaption>\n{blocks}\n</figure>"


def _block(gallery: Gallery, places: range) -> str:
    small = gallery.side <= SMALL
    width = gallery.side * (2 if small else 1)
    label = min(11, 2 + max(map(len, gallery.names)) // 2)  # two letters a rem, and the gap
    lines = [
        f'<div class="scroll"><div class="grid{" small" if small else ""}" '
        f'style="--label: {label}rem; --columns: {len(places)}; --width: {width}px">',
        '<span class="name"></span>' + "".join(f'<span class="id">{gallery.ids[k]}</span>' for k in places),
    ]
    for name, pictures in zip(gallery.names, gallery.rows, strict=True):
        images = "".join(_image(pictures[k], f"{name}, image {gallery.ids[k]}") for k in places)
        lines.append(f'<span class="name" title="{escape(name)}">{escape(name)}</span>{images}')
    return "\n".join([*lines, "</div></div>"])


def _image(picture: bytes, said: str) -> str:
    return f'<img alt="{escape(said)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
