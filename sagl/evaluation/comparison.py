"""Comparison of sampling runs: settings that differ, cost, metrics, and the paper's numbers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sagl.evaluation.metric_display import METRICS, best_values, format_interval, format_value, metric_name
from sagl.evaluation.paper import PaperRow, matching_rows
from sagl.evaluation.report import Cell, ImageGrid, Report, Row, Section, Table, join_with_and, printable
from sagl.evaluation.results import Conditions, EvaluationResult
from sagl.evaluation.runs import RunSummary, image_sizes
from sagl.settings.evaluation import INCEPTION

if TYPE_CHECKING:
    from sagl.metrics.bootstrap import Interval

ABSENT = "–"
SHA_DIGITS = 12
"""Displayed digits of a sha256."""
PAPER_METRICS = ("fid", "sfid", "is", "precision", "recall")
MetricKey = tuple[str, tuple[tuple[str, str], ...]]
"""A metric and the settings that it depends on."""


def build_report(runs: Sequence[RunSummary], images: ImageGrid | None = None, *, has_shared_ids: bool = True) -> Report:
    """Build the report of at least one run.

    Args:
        runs: the runs.
        images: images of all runs, if they are to be shown.
        has_shared_ids: whether there is an id that all runs hold.
    """
    different, shared = split_settings(runs)
    if len(runs) == 1:
        different, shared = shared, []
    settings = [settings_section(runs, different)] if different else []
    results = [*metric_sections(runs), cost_section(runs)]
    names = tuple(run.name for run in runs)
    is_single = len(runs) == 1
    table = Table(
        title="The run" if is_single else "Side by side",
        columns=names,
        sections=tuple(results + settings if is_single else settings + results),
    )
    paper = paper_table(runs)
    missing = [] if has_shared_ids else ["There is no id that all runs hold: no images are shown."]
    return Report(
        title=join_with_and(names) + ("" if is_single else ", side by side"),
        notes=(*_warnings(runs), *missing),
        tables=(table, paper) if paper else (table,),
        shared_settings=shared_settings_line(runs, shared),
        images=images,
    )


def _warnings(runs: Sequence[RunSummary]) -> list[str]:
    warnings = [
        f"{run.name} holds {run.num_images:,} of {run.num_requested:,} images so far."
        for run in runs
        if run.num_images < run.num_requested
    ]
    for name, effect in (("seed", "start from different noise"), ("labels", "may be of different classes")):
        if len({str(run.settings.get(name)) for run in runs}) > 1:
            warnings.append(f"The runs differ in {name}: images of one id {effect}.")
    if len(image_sizes(runs)) > 1:
        warnings.append(f"The images have {join_with_and(image_sizes(runs))} pixels: no images are shown.")
    return warnings


# ------------------------------------------------------------------------------------------------ settings


def split_settings(runs: Sequence[RunSummary]) -> tuple[list[str], list[str]]:
    """Return the names of the settings that differ and of those that are equal among the runs where they are active.

    The scale of a method that no run uses is in neither list.
    """
    names = dict.fromkeys(name for run in runs for name in run.settings)
    active = {name: [run.settings.get(name) for run in runs if run.is_active(name)] for name in names}
    different = [name for name, values in active.items() if any(value != values[0] for value in values)]
    is_off = {name: name.endswith(".scale") and values[:1] == [0] for name, values in active.items()}
    return different, [name for name in names if active[name] and name not in different and not is_off[name]]


def settings_section(runs: Sequence[RunSummary], names: Iterable[str]) -> Section:
    """Return a row for each of these settings."""

    def cell(run: RunSummary, name: str) -> Cell:
        if not run.is_active(name):
            return Cell(text="off")
        return Cell(text=format_setting(run.settings[name], name) if name in run.settings else ABSENT)

    rows = (Row(name=Cell(text=printable(name)), cells=tuple(cell(run, name) for run in runs)) for name in names)
    return Section(title="Settings" if len(runs) == 1 else "Settings that differ", rows=tuple(rows))


def shared_settings_line(runs: Sequence[RunSummary], names: Iterable[str]) -> str:
    """Return the settings that all runs share in one line: "seed 0 · sampler ddim"."""
    values = {name: next(run.settings.get(name) for run in runs if run.is_active(name)) for name in names}
    return " · ".join(f"{printable(name)} {format_setting(value, name)}" for name, value in values.items())


def format_setting(value: Any, name: str = "") -> str:  # noqa: ANN401 (any JSON value)
    """Format a setting's value in one line."""
    if value is None:
        return "default"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(format_setting(part) for part in value) or "none"
    return printable(value)[: SHA_DIGITS if name.endswith("sha256") else None]


# ---------------------------------------------------------------------------------------------------- cost


def cost_section(runs: Sequence[RunSummary]) -> Section:
    """Return the folders of the runs, their numbers of images and their cost."""
    rows: dict[str, Callable[[RunSummary], str]] = {
        "folder": lambda run: printable(run.folder),
        "images": _format_images,
        "image size": lambda run: f"{run.size[0]}×{run.size[1]}" if run.size else ABSENT,
        "network evaluations per image": lambda run: ABSENT if run.nfe is None else f"{run.nfe:g}",
        "GFLOPs per image": lambda run: f"{run.flops / 1e9:,.4g}" if run.flops else ABSENT,
        "seconds of all processes": lambda run: f"{run.seconds:,.1f}" if run.seconds else ABSENT,
        "seconds per image and process": _format_seconds,
    }
    return Section(
        title="Images and their cost",
        rows=tuple(
            Row(name=Cell(text=name), cells=tuple(Cell(text=formatted(run)) for run in runs))
            for name, formatted in rows.items()
        ),
    )


def _format_images(run: RunSummary) -> str:
    return f"{run.num_images:,}" + (f" of {run.num_requested:,}" if run.num_requested > run.num_images else "")


def _format_seconds(run: RunSummary) -> str:
    return f"{run.seconds / run.num_images:.3g}" if run.seconds and run.num_images else ABSENT


# ------------------------------------------------------------------------------------------------- metrics


def metric_sections(runs: Sequence[RunSummary]) -> list[Section]:
    """Return a section for each set of conditions, with a row for each metric and its settings.

    A metric with bootstrap resamples has a second row: its difference from the first run that has them.
    """
    sections: dict[Conditions, dict[MetricKey, dict[int, EvaluationResult]]] = {}
    notes: dict[Conditions, dict[str, None]] = {}
    for index, run in enumerate(runs):
        for result in run.results:
            conditions = result.conditions
            metrics = sections.setdefault(conditions, {})
            notes.setdefault(conditions, {}).update(dict.fromkeys(result.notes))
            for name in result.values:
                metrics.setdefault(_metric_key(result, name), {})[index] = result
    return [
        _metric_section(
            conditions,
            [row for key in sorted(metrics, key=_order) for row in _metric_rows(key, metrics[key], runs)],
            notes[conditions],
        )
        for conditions, metrics in sections.items()
    ]


def _metric_key(result: EvaluationResult, name: str) -> MetricKey:
    names = METRICS[name].settings if name in METRICS else tuple(result.settings)
    return name, tuple(
        (setting, format_setting(result.settings[setting])) for setting in names if setting in result.settings
    )


def _order(key: MetricKey) -> tuple[int, MetricKey]:
    return (list(METRICS).index(key[0]) if key[0] in METRICS else len(METRICS)), key


def _format_error(result: EvaluationResult, name: str) -> str:
    if name in result.stds:
        return f"± {format_value(name, result.stds[name])}"
    return format_interval(name, result.intervals.get(name, ()))


def _metric_section(conditions: Conditions, rows: Iterable[Row], notes: Iterable[str]) -> Section:
    c = conditions
    count = f" ({c.num_reference:,} images)" if c.num_reference else ""
    crop = f"images cropped to {c.crop_size}×{c.crop_size}" if c.crop_size else ""
    digest = c.reference_digest and f"reference {c.reference_digest[:8]}"
    size = c.reference_crop_size
    reference_crop = f"its images cropped to {size}×{size}" if size not in (None, c.crop_size) else ""
    version = f"version {printable(c.extractor_version)}" if c.extractor_version else ""
    parts = (f"features of {c.extractor}", version, c.resize, crop, digest, reference_crop)
    return Section(
        title=f"{c.num_samples:,} images against {printable(c.reference)}{count}",
        note=". ".join(filter(None, (", ".join(filter(None, parts)), " ".join(notes)))),
        rows=tuple(rows),
    )


def _metric_rows(key: MetricKey, results: Mapping[int, EvaluationResult], runs: Sequence[RunSummary]) -> list[Row]:
    """Return the row of a metric and, if it was resampled, that of its differences."""
    name, settings = key
    best = best_values(name, {index: result.values[name] for index, result in results.items()})
    arrow = (" ↑" if METRICS[name].higher_is_better else " ↓") if name in METRICS else ""
    note = ", ".join(f"{printable(setting)} {value}" for setting, value in settings)
    cells = {
        k: Cell(text=format_value(name, result.values[name]), note=_format_error(result, name), best=k in best)
        for k, result in results.items()
    }
    rows = [_row(Cell(text=printable(metric_name(name)) + arrow, note=note), cells, len(runs))]
    base = next((k for k in sorted(results) if name in results[k].resamples), None)
    if base is not None and len(results) > 1:
        others = {k: result for k, result in results.items() if k != base}
        cells = {k: _paired_cell(name, result, results[base]) for k, result in others.items()}
        title = Cell(text=f"  minus that of {runs[base].name}", note="paired 95 % interval")
        rows.append(_row(title, cells, len(runs)))
    return rows


def _paired_cell(name: str, result: EvaluationResult, base: EvaluationResult) -> Cell:
    difference = result.difference(base, name)
    if difference is None:
        return Cell(text=ABSENT, note=result.unpaired_reason(base, name))
    return difference_cell(name, difference)


def difference_cell(name: str, difference: "Interval") -> Cell:
    """Return the cell of a difference of a metric, with its interval as the note."""
    text, low, high = (f"{'+' if value > 0 else ''}{format_value(name, value)}" for value in difference)
    return Cell(text=text, note=f"{low} … {high}")


def _row(name: Cell, cells: Mapping[int, Cell], num_runs: int) -> Row:
    return Row(name=name, cells=tuple(cells.get(k, Cell(text=ABSENT)) for k in range(num_runs)))


# --------------------------------------------------------------------------------------------------- paper


def paper_table(runs: Sequence[RunSummary]) -> Table | None:
    """Return the paper's rows of the runs' networks and guidance above the runs' own values; None if there are none."""
    matches = [(run, matching_rows(run.model, run.settings)) for run in runs]
    sections = tuple(_paper_section(run, rows) for run, rows in matches if rows)
    if not sections:
        return None
    images = sorted({row.images for _, rows in matches for row in rows}, reverse=True)
    steps = sorted({row.steps for _, rows in matches for row in rows})
    return Table(
        title="The paper's numbers",
        columns=("images", "steps", *map(metric_name, PAPER_METRICS)),
        sections=sections,
        note=f"Not like for like: the paper evaluated {join_with_and([f'{n:,}' for n in images])} images of "
        f"{join_with_and([str(n) for n in steps])} steps each, with Inception, against references of its own.",
        right_aligned=True,
    )


def _paper_section(run: RunSummary, rows: Sequence[PaperRow]) -> Section:
    paper = [_paper_row(f"paper, {row.table}", "", row.images, str(row.steps), row.values) for row in rows]
    respacing, sampler = format_setting(run.settings.get("respacing")), format_setting(run.settings.get("sampler"))
    steps = respacing if respacing.startswith(sampler) else f"{respacing} ({sampler})"
    own = [
        _paper_row(run.name, f"against {printable(result.reference)}", result.num_samples, steps, result.values)
        for result in run.results
        if result.extractor == INCEPTION
    ]
    own = own or [_paper_row(run.name, f"not evaluated with {INCEPTION} yet", run.num_images, steps, {})]
    return Section(title=f"{run.name}: {run.model}, {run.guidance}", rows=tuple(paper + own))


def _paper_row(name: str, note: str, images: int, steps: str, values: Mapping[str, float]) -> Row:
    texts = [f"{values[metric]:.2f}" if metric in values else ABSENT for metric in PAPER_METRICS]  # digits as printed
    return Row(name=Cell(text=name, note=note), cells=tuple(Cell(text=text) for text in (f"{images:,}", steps, *texts)))
