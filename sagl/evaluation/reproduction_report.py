"""The report of all tables and figures that were reproduced into a folder: its pages as Markdown and HTML."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sagl.errors import UserError
from sagl.evaluation.paper import PaperItem, paper_items
from sagl.evaluation.report import Cell, Figure, Report, Row, Section, Table, render_html, render_markdown
from sagl.evaluation.reproduction import ReproductionRow
from sagl.evaluation.results import EvaluationResult, read_results
from sagl.utils.files import atomic_file

RUNS, ANALYSES = "runs", "analyses"
"""Folders of the sampled runs and of the figures."""
METRICS = {
    "fid": "FID",
    "fd": "Fréchet distance",
    "sfid": "sFID",
    "is": "IS",
    "precision": "precision",
    "recall": "recall",
}
LOWER_IS_BETTER = ("fid", "fd", "sfid")


@dataclass(frozen=True, kw_only=True)
class StoredRow:
    """A row as it is stored in ITEM.json."""

    name: str
    paper_model: str
    paper_values: Mapping[str, float]
    command: str
    """Command that makes the row; empty if it cannot be made."""
    folder: str
    """Folder of its images or of its figure, relative to that of the report."""
    translation: Sequence[str]
    obstacle: str


def store_item(folder: Path, item: PaperItem, rows: Sequence[ReproductionRow], commands: Sequence[str]) -> None:
    """Store what was made of a table or figure, from which the report is written.

    Raises:
        UserError: the file cannot be written.
    """
    parts = ANALYSES if item.analysis else RUNS
    stored = [
        StoredRow(
            name=row.row.name,
            paper_model=row.row.model,
            paper_values=row.row.values,
            command=command,
            folder="" if row.obstacle else f"{parts}/{row.run_name}",
            translation=row.translation,
            obstacle=row.obstacle,
        )
        for row, command in zip(rows, commands, strict=True)
    ]
    with atomic_file(folder / f"{item.name}.json") as partial:
        partial.write_text(json.dumps([asdict(row) for row in stored], indent=1))


def write_report(folder: Path) -> list[Path]:
    """Write README.md and index.html of everything that was stored in the folder; return their paths.

    Raises:
        UserError: nothing is stored, or a file is damaged or cannot be written.
    """
    items = {name: item for name, item in paper_items().items() if (folder / f"{name}.json").is_file()}
    if not items:
        raise UserError(f"`output` must hold reproduced tables or figures, and {folder} holds none.")
    tables, figures = [], []
    for name, item in items.items():
        try:
            stored = [StoredRow(**row) for row in json.loads((folder / f"{name}.json").read_text())]
        except (ValueError, TypeError) as error:
            raise UserError(
                f"`output` has a damaged file {folder / name}.json. Delete it, and reproduce it again."
            ) from error
        tables.append(_analysis_table(folder, item, stored) if item.analysis else _table(folder, item, stored))
        figures += _figures(folder, item, stored)
    report = Report(
        title="Tables and figures of the paper, reproduced",
        warnings=(
            "The paper's numbers are for its own networks and 50,000 or 10,000 images. Where another network is named, "
            "only the direction of a difference can be compared, not its size.",
        ),
        tables=tuple(tables),
        figures=tuple(figures),
        command="reproduce",
    )
    pages = {folder / "index.html": render_html(report), folder / "README.md": render_markdown(report)}
    for path, text in pages.items():
        with atomic_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    return list(pages)


def _table(folder: Path, item: PaperItem, rows: Sequence[StoredRow]) -> Table:
    results = [_last_result(folder / row.folder) if row.folder else None for row in rows]
    paper_metrics = [name for name in METRICS if any(name in row.paper_values for row in rows)]
    own_metrics = [name for name in METRICS if any(result and name in result.values for result in results)]
    table_rows = []
    for row, result in zip(rows, results, strict=True):
        paper = tuple(Cell(text=_number(row.paper_values.get(name))) for name in paper_metrics)
        own = tuple(_own_cell(result, name) for name in own_metrics)
        table_rows.append(Row(name=Cell(text=row.name, note=row.obstacle or row.command), cells=(*paper, *own)))
    columns = tuple(f"paper: {METRICS[name]}" for name in paper_metrics) + tuple(METRICS[name] for name in own_metrics)
    note = " ".join([f"The paper: {item.claim}", *_verdict(rows, results), *_translation(rows), *_evaluated(results)])
    section = Section(title=item.heading, rows=tuple(table_rows))
    return Table(title=f"{item.heading}: {item.title}", columns=columns, sections=(section,), note=note)


def _last_result(folder: Path) -> EvaluationResult | None:
    results = read_results(folder)
    return results[-1] if results else None


def _own_cell(result: EvaluationResult | None, name: str) -> Cell:
    if result is None or name not in result.values:
        return Cell(text="")
    interval = result.intervals.get(name)
    note = f"{_number(interval[0])} … {_number(interval[1])}" if interval else ""
    return Cell(text=_number(result.values[name]), note=note)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1 else f"{value:.2f}"


def _verdict(rows: Sequence[StoredRow], results: Sequence[EvaluationResult | None]) -> list[str]:
    """Return a sentence on the rows with the lowest Fréchet distance, here and in the paper."""
    own = {row.name: _distance(result.values) for row, result in zip(rows, results, strict=True) if result}
    paper = {row.name: row.paper_values["fid"] for row in rows if "fid" in row.paper_values and row.name in own}
    if len(paper) < 2:
        return []
    best, best_in_paper = min(own, key=own.__getitem__), min(paper, key=paper.__getitem__)
    return [f"Lowest distance here: {best} ({own[best]:.2f}); in the paper, of these rows: {best_in_paper}."]


def _distance(values: Mapping[str, float]) -> float:
    return next(values[name] for name in LOWER_IS_BETTER if name in values)


def _translation(rows: Sequence[StoredRow]) -> list[str]:
    """Return a sentence on the settings that differ from the paper's, each once."""
    changes = dict.fromkeys(change for row in rows for change in row.translation)
    return [f"Translated: {'; '.join(changes)}."] if changes else []


def _evaluated(results: Sequence[EvaluationResult | None]) -> list[str]:
    described = {f"{r.num_samples} images against {r.reference}, features of {r.extractor}" for r in results if r}
    return [f"Evaluated: {'; '.join(sorted(described))}."] if described else []


def _analysis_table(folder: Path, item: PaperItem, rows: Sequence[StoredRow]) -> Table:
    lines: list[tuple[str, str]] = []
    for row in rows:
        path = folder / row.folder / f"{item.analysis}.json"
        numbers = json.loads(path.read_text())["numbers"] if row.folder and path.is_file() else {}
        lines += _flatten(numbers)
        lines += [(f"paper: {name}", _number(value)) for name, value in row.paper_values.items()]
    table_rows = [Row(name=Cell(text=name), cells=(Cell(text=value),)) for name, value in lines]
    note = " ".join([f"The paper: {item.claim}", *(row.obstacle or row.command for row in rows), *_translation(rows)])
    section = Section(title=item.heading, rows=tuple(table_rows))
    return Table(title=f"{item.heading}: {item.title}", columns=("value",), sections=(section,), note=note)


def _flatten(numbers: Any, prefix: str = "") -> list[tuple[str, str]]:  # noqa: ANN401 (any JSON value)
    """Return the leaves of nested mappings with their full names; lists of numbers are one leaf."""
    if isinstance(numbers, dict):
        return [leaf for key, value in numbers.items() for leaf in _flatten(value, f"{prefix}{key} ")]
    values = numbers if isinstance(numbers, list) else [numbers]
    return [(prefix.strip(), ", ".join(_number(v) if isinstance(v, float) else str(v) for v in values))]


def _figures(folder: Path, item: PaperItem, rows: Sequence[StoredRow]) -> list[Figure]:
    name = f"{item.analysis}.png" if item.analysis else "grid.png" if item.shows_samples else None
    paths = [folder / row.folder / name for row in rows if name and row.folder]
    return (
        [
            Figure(
                title=f"{item.heading}: {item.title}, {row.name}", path=path.relative_to(folder), png=path.read_bytes()
            )
            for row, path in zip([row for row in rows if row.folder], paths, strict=True)
            if path.is_file()
        ]
        if name
        else []
    )
