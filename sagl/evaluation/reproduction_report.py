"""The report of all tables and figures that were reproduced into a folder: its pages as Markdown and HTML."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sagl.errors import UserError
from sagl.evaluation.analysis_labels import label
from sagl.evaluation.comparison import difference_cell
from sagl.evaluation.metric_display import metric_name
from sagl.evaluation.paper import PaperItem, paper_items
from sagl.evaluation.report import Cell, Figure, Report, Row, Section, Table, render_html, render_markdown
from sagl.evaluation.reproduction import ReproductionRow
from sagl.evaluation.results import EvaluationResult, read_results
from sagl.metrics.bootstrap import Interval
from sagl.sampling.run_folder import RUN_JSON
from sagl.utils.files import write_text
from sagl.utils.json_values import from_json

T = TypeVar("T")
RUNS, ANALYSES = "runs", "analyses"
"""Folders of the sampled runs and of the figures."""
SHOWN_METRICS = ("fid", "fd", "sfid", "is", "precision", "recall")
DISTANCES = ("fid", "fd")
"""Names of the Fréchet distance."""
FIGURE_SCALE = 96 / 150
"""Displayed size of a pixel of an analysis, whose figures have 150 per inch."""


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
    is_unguided: bool
    """True for a row without guidance, with which the others are compared."""
    translation: tuple[str, ...]
    obstacle: str

    def __post_init__(self) -> None:
        """Refuse a folder outside of that of the report."""
        if ".." in Path(self.folder).parts or Path(self.folder).is_absolute():
            raise ValueError(f"{self.folder} is outside of the folder of the report")


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
            is_unguided=row.row.is_unguided,
            translation=tuple(row.translation),
            obstacle=row.obstacle,
        )
        for row, command in zip(rows, commands, strict=True)
    ]
    write_text(folder / f"{item.name}.json", json.dumps([asdict(row) for row in stored], indent=1))


def read_weights_sha256(analysis: Path) -> str | None:
    """Return the sha256 of the weights of an analysis from its JSON file; None if it is of a version without it.

    Raises:
        UserError: the file is damaged.
    """
    return _read(analysis, lambda content: content["settings"].get("weights_sha256"))


def write_report(folder: Path) -> list[Path]:
    """Write README.md and index.html of everything that was stored in the folder; return their paths.

    Raises:
        UserError: nothing is stored, or a file is damaged or cannot be written.
    """
    items = {name: item for name, item in paper_items().items() if (folder / f"{name}.json").is_file()}
    if not items:
        raise UserError(f"`output` must hold reproduced tables or figures, and {folder} holds none.")
    stored = {name: _read(folder / f"{name}.json", _parse_rows) for name in items}
    rows = [row for item_rows in stored.values() for row in item_rows]
    network = _shared_change(rows, r"network (.+) \(paper: \w+\)")
    sampler = _shared_change(rows, r"(\S+ with respacing \S+) \(paper: .+\)")
    title = " ".join(
        ["Tables and figures of the paper, reproduced", *([f"with the network {network}"] if network else [])]
    )
    tables = [
        (_analysis_table if item.analysis else _table)(folder, item, stored[name]) for name, item in items.items()
    ]
    report = Report(
        title=f"{title} ({sampler})" if sampler else title,
        notes=(
            *(
                [f"All rows here are of the network {network}; rows keep the names of the paper's rows."]
                if network
                else []
            ),
            "The paper's numbers are for its own networks and 50,000 or 10,000 images. Where another network is named, "
            "only the direction of a difference can be compared, not its size.",
            "Below a value is its 95 % interval. Intervals of differences resample the images of both rows in pairs; "
            "one that contains 0 shows no difference.",
        ),
        tables=tuple(tables),
        command="reproduce",
    )
    pages = {folder / "index.html": render_html(report), folder / "README.md": render_markdown(report)}
    for path, text in pages.items():
        write_text(path, text)
    return list(pages)


def _shared_change(rows: Sequence[StoredRow], pattern: str) -> str:
    """Return what replaces a setting of the paper in all rows, the pattern's group; empty if they differ."""
    changes = {
        next((match[1] for change in row.translation if (match := re.fullmatch(pattern, change))), "")
        for row in rows
        if row.command
    }
    return changes.pop() if len(changes) == 1 else ""


def _parse_rows(content: Any) -> list[StoredRow]:  # noqa: ANN401 (JSON values)
    if not isinstance(content, list):
        raise TypeError("the file must hold a list of rows")
    return [from_json(StoredRow, row) for row in content]


def _read(path: Path, parse: Callable[[Any], T]) -> T:
    """Read a JSON file of the folder.

    Raises:
        UserError: it is damaged.
    """
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"`output` has a damaged file {path}. Delete it, and reproduce it again.") from error


def _table(folder: Path, item: PaperItem, rows: Sequence[StoredRow]) -> Table:
    results = {row.name: result for row in rows if row.folder and (result := _last_result(folder / row.folder))}
    paper_metrics = [name for name in SHOWN_METRICS if any(name in row.paper_values for row in rows)]
    own_metrics = [name for name in SHOWN_METRICS if any(name in result.values for result in results.values())]
    differences = _differences_from_unguided(rows, results)
    table_rows = []
    for row in rows:
        paper = tuple(Cell(text=_number(row.paper_values.get(name))) for name in paper_metrics)
        own = [_own_cell(results.get(row.name), name) for name in own_metrics]
        own[1:1] = [differences.get(row.name, Cell(text=""))] if differences else []
        link = f"{row.folder}/{RUN_JSON}" if row.folder and (folder / row.folder / RUN_JSON).is_file() else ""
        name = Cell(text=row.name, note=row.obstacle, link=link)
        table_rows.append(Row(name=name, cells=(*paper, *own)))
    own_columns = [_short_name(name) for name in own_metrics]
    own_columns[1:1] = ["minus unguided"] if differences else []  # beside the distance, the first metric
    columns = _headings(map(_short_name, paper_metrics), own_columns)
    facts = _verdict(rows, results) or [[] if columns else _obstacles(rows)]
    return _assemble(folder, item, rows, columns, table_rows, [*facts, [*_translation(rows), *_evaluated(results)]])


def _headings(paper: Iterable[str], own: Iterable[str]) -> list[str]:
    """Return the headings of the paper's columns and of ours."""
    headings = [f"paper: {name}" for name in paper]
    return headings + [f"here: {name}" if headings else name for name in own]


def _differences_from_unguided(rows: Sequence[StoredRow], results: Mapping[str, EvaluationResult]) -> dict[str, Cell]:
    """Return the difference of the Fréchet distance from the row without guidance of the same network of the paper."""
    cells = {}
    for network in _networks(rows, results):
        base = next((results[row.name] for row in network if row.is_unguided), None)
        for row in network:
            if base and not row.is_unguided and (difference := _difference(results[row.name], base)):
                cells[row.name] = difference_cell("fd", difference)
    return cells


def _networks(rows: Sequence[StoredRow], results: Mapping[str, EvaluationResult]) -> list[list[StoredRow]]:
    """Return the rows of each network of the paper that have a Fréchet distance."""
    networks = defaultdict[str, list[StoredRow]](list)
    for row in rows:
        if row.name in results and results[row.name].values.keys() & set(DISTANCES):
            networks[row.paper_model].append(row)
    return list(networks.values())


def _difference(result: EvaluationResult, base: EvaluationResult) -> Interval | None:
    return result.difference(base, _distance_name(result))


def _distance_name(result: EvaluationResult) -> str:
    return next(name for name in DISTANCES if name in result.values)


def _assemble(
    folder: Path,
    item: PaperItem,
    rows: Sequence[StoredRow],
    columns: Sequence[str],
    table_rows: Sequence[Row],
    paragraphs: Sequence[Sequence[str]],
) -> Table:
    """Return the table with the paper's claim, further paragraphs of sentences, figures and commands."""
    made = [row for row in rows if row.command]
    return Table(
        title=f"{item.heading}: {item.title}",
        columns=tuple(columns),
        sections=(Section(rows=tuple(table_rows)),),
        note="\n\n".join([f"The paper: {item.claim}", *(" ".join(sentences) for sentences in paragraphs if sentences)]),
        right_aligned=True,
        figures=tuple(_figures(folder, item, made)),
        commands="\n".join(f"# {row.name}\n{row.command}" for row in made),
    )


def _last_result(folder: Path) -> EvaluationResult | None:
    results = read_results(folder)
    return results[-1] if results else None


def _own_cell(result: EvaluationResult | None, name: str) -> Cell:
    if result is None or name not in result.values:
        return Cell(text="")
    interval = result.intervals.get(name)
    note = f"{_number(interval[0])} … {_number(interval[1])}" if interval else ""
    return Cell(text=_number(result.values[name]), note=note)


def _short_name(metric: str) -> str:
    return metric_name(metric).partition(",")[0]


def _number(value: float | None) -> str:
    if value is None or isinstance(value, int):
        return "" if value is None else str(value)
    return f"{value:.4g}" if abs(value) < 1 else f"{value:.2f}"


def _verdict(rows: Sequence[StoredRow], results: Mapping[str, EvaluationResult]) -> list[list[str]]:
    """Return a paragraph of sentences on the rows of each network of the paper.

    They name the row with the lowest Fréchet distance here and in the paper, and say how far the paper's is from the
    others here.
    """
    paragraphs = []
    for network in _networks(rows, results):
        fids = {row.name: row.paper_values["fid"] for row in network if "fid" in row.paper_values}
        if len(fids) < 2:
            continue
        own = {name: results[name].values[_distance_name(results[name])] for name in fids}
        best, paper_best = min(own, key=own.__getitem__), min(fids, key=fids.__getitem__)
        sentences = [f"Lowest distance here: {best} ({own[best]:.2f}); in the paper, of these rows: {paper_best}."]
        differences = {name: _difference(results[paper_best], results[name]) for name in fids if name != paper_best}
        cells = {name: difference_cell("fd", difference) for name, difference in differences.items() if difference}
        listed = ", ".join(f"{name} {cell.text} ({cell.note})" for name, cell in cells.items())
        sentences += [f"Distance of {paper_best} here minus that of the others: {listed}."] if cells else []
        paragraphs.append(sentences)
    return paragraphs


def _translation(rows: Sequence[StoredRow]) -> list[str]:
    """Return a sentence on the settings that differ from the paper's, each once."""
    changes = dict.fromkeys(change for row in rows for change in row.translation)
    return [f"Translated: {'; '.join(changes)}."] if changes else []


def _evaluated(results: Mapping[str, EvaluationResult]) -> list[str]:
    described = {f"{r.num_samples} images against {r.reference}, features of {r.extractor}" for r in results.values()}
    notes = sorted({note for result in results.values() for note in result.notes})
    return [f"Evaluated: {'; '.join(sorted(described))}.", *notes] if described else []


def _obstacles(rows: Sequence[StoredRow]) -> list[str]:
    """Return a sentence on every row that could not be made."""
    return [f"{row.name}: {row.obstacle}" for row in rows if row.obstacle]


def _analysis_table(folder: Path, item: PaperItem, rows: Sequence[StoredRow]) -> Table:
    own, paper = dict[str, dict[str, Any]](), dict[str, dict[str, float]]()
    links = dict[str, str]()
    for row in rows:
        path = folder / row.folder / f"{item.analysis}.json"
        if row.folder and path.is_file():
            groups = _read(path, lambda content: _leaves(content["numbers"]))
            own |= groups
            links |= dict.fromkeys(groups, f"{row.folder}/{path.name}")
        for name, value in row.paper_values.items():
            group, _, column = name.rpartition(" ")
            paper.setdefault(group, {})[column] = value
    describe = partial(label, item.analysis)
    facts = [f"{describe(name)}: {_leaf_cell(value).text}" for name, value in own.pop("", {}).items()]
    columns, paper_columns = (list(dict.fromkeys(c for g in groups.values() for c in g)) for groups in (own, paper))
    table_rows = [
        Row(
            name=Cell(text=describe(name), link=links.get(name, "")),
            cells=(
                *(Cell(text=_number(paper.get(name, {}).get(column))) for column in paper_columns),
                *(_leaf_cell(own.get(name, {}).get(column)) for column in columns),
            ),
        )
        for name in dict.fromkeys((*own, *paper))
    ]
    here = [f"Here: {'; '.join(facts)}."] if facts else []
    headings = _headings(map(describe, paper_columns), map(describe, columns))
    return _assemble(folder, item, rows, headings, table_rows, ([*here, *_obstacles(rows)], _translation(rows)))


def _leaves(numbers: Mapping[str, Any], name: str = "") -> dict[str, dict[str, Any]]:
    """Return the numbers of nested mappings by the full name of their mapping; lists are left to the figure."""
    nested = {key: value for key, value in numbers.items() if isinstance(value, dict) and not _is_interval(value)}
    leaves = {key: value for key, value in numbers.items() if key not in nested and not isinstance(value, list)}
    for leaf in leaves.values():
        _leaf_cell(leaf)  # raises for a damaged number
    groups = {name: leaves} if leaves else {}
    for key, value in nested.items():
        groups |= _leaves(value, f"{name} {key}".strip())
    return groups


def _is_interval(value: Any) -> bool:  # noqa: ANN401 (any JSON value)
    return isinstance(value, dict) and tuple(value) == Interval._fields


def _leaf_cell(value: Any) -> Cell:  # noqa: ANN401 (any JSON value)
    if _is_interval(value):
        return Cell(text=_number(value["estimate"]), note=f"{_number(value['low'])} … {_number(value['high'])}")
    return Cell(text=value if isinstance(value, str) else _number(value))


def _figures(folder: Path, item: PaperItem, rows: Sequence[StoredRow]) -> Iterator[Figure]:
    name = f"{item.analysis}.png" if item.analysis else "grid.png" if item.shows_samples else None
    for row in rows:
        if name and (path := folder / row.folder / name).is_file():
            caption = row.name if item.shows_samples else ""
            scale = 1.0 if item.shows_samples else FIGURE_SCALE
            yield Figure(caption=caption, path=path.relative_to(folder), png=path.read_bytes(), scale=scale)
