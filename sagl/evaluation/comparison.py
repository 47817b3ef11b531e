"""What a comparison of runs says: the settings that differ, what each run cost, the numbers and the paper's."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sagl.evaluation.metric_info import METRICS, shown
from sagl.evaluation.paper import PaperRow, rows_like
from sagl.evaluation.report import Cell, Row, Section, Table, clean, enumerated
from sagl.evaluation.results import Evaluation
from sagl.settings.evaluation import INCEPTION

ABSENT = "–"
SHORT_SHA = 12
"""Digits shown of a sha256."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, as far as it can be compared."""

    name: str
    """The shortest that no other of the runs has."""
    folder: str
    """As it was given."""
    model: str | None
    """Name of its network; None for one of the user's own."""
    settings: Mapping[str, Any]
    """All that decides an image, by full names."""
    num_images: int
    """On the disk."""
    num_asked: int
    size: tuple[int, int] | None
    """Width and height in pixels; None where there is no image."""
    nfe: float | None
    seconds: float | None
    evaluations: tuple[Evaluation, ...]

    @property
    def guidance(self) -> str:
        """Its guidance in a few words."""
        names = ("sag.scale", "cfg.scale", "classifier.scale")
        scales = [f"{name} {said(self.settings[name])}" for name in names if self.settings.get(name)]
        return ", ".join(scales) or "no guidance"


# ----------------------------------------------------------------------------------------------------- settings


def split_settings(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """Names of the settings that differ, and of those that do not, both in the order of the runs.

    Of a guidance with scale 0 nothing but the scale counts; what counts in no run has neither place.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    counting = {name: [run.settings.get(name) for run in runs if counts(run, name)] for name in names}
    differ = [name for name, values in counting.items() if any(value != values[0] for value in values)]
    return differ, [name for name, values in counting.items() if values and name not in differ]


def counts(run: Run, name: str) -> bool:
    """Whether a setting decides anything in a run: not where it belongs to a guidance that is off."""
    group, _, field = name.rpartition(".")
    return field == "scale" or run.settings.get(f"{group}.scale") != 0


def settings_section(runs: Sequence[Run], names: Iterable[str]) -> Section:
    """Rows of settings, a column a run."""

    def cell(run: Run, name: str) -> Cell:
        off = "off" if not counts(run, name) else ABSENT
        return Cell(text=said(run.settings[name], name) if counts(run, name) and name in run.settings else off)

    rows = (Row(name=Cell(text=clean(name)), cells=tuple(cell(run, name) for run in runs)) for name in names)
    return Section(title="Settings" if len(runs) == 1 else "Settings that differ", rows=tuple(rows))


def alike_line(runs: Sequence[Run], names: Iterable[str]) -> str:
    """Settings that all runs share, in one line: "seed 0 · sampler ddim"."""
    values = {name: next(run.settings.get(name) for run in runs if counts(run, name)) for name in names}
    return " · ".join(f"{clean(name)} {said(value, name)}" for name, value in values.items())


def said(value: Any, name: str = "") -> str:  # noqa: ANN401 (what run.json holds)
    """A setting's value in a few characters."""
    if value is None:
        return "default"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(said(part) for part in value) or "none"
    return clean(value)[: SHORT_SHA if name.endswith("sha256") else None]


# --------------------------------------------------------------------------------------------------------- cost


def cost_section(runs: Sequence[Run]) -> Section:
    """Where the runs are, how many images they hold, and what these cost."""
    kinds: dict[str, Callable[[Run], str]] = {
        "folder": lambda run: clean(run.folder),
        "images": _images,
        "pixels of an image": lambda run: ABSENT if run.size is None else f"{run.size[0]}×{run.size[1]}",
        "network evaluations an image": lambda run: ABSENT if run.nfe is None else f"{run.nfe:g}",
        "seconds of all processes": lambda run: ABSENT if not run.seconds else f"{run.seconds:,.1f}",
        "images a second a process": _rate,
    }
    rows = (
        Row(name=Cell(text=what), cells=tuple(Cell(text=show(run)) for run in runs)) for what, show in kinds.items()
    )
    return Section(title="Images and their cost", rows=tuple(rows))


def _images(run: Run) -> str:
    return f"{run.num_images:,}" + (f" of {run.num_asked:,}" if run.num_asked > run.num_images else "")


def _rate(run: Run) -> str:
    return f"{run.num_images / run.seconds:.3g}" if run.seconds and run.num_images else ABSENT


# ------------------------------------------------------------------------------------------------------ numbers


Conditions = tuple[str, str, int | None, str, str, str, int]
"""Reference, its digest, images in it, extractor, resize, cut, images measured: numbers of others never stand in one
row."""
Measure = tuple[str, tuple[tuple[str, str], ...]]
"""A metric, and the settings that it depends on."""


def number_sections(runs: Sequence[Run]) -> list[Section]:
    """One section for all numbers of the same reference, extractor and number of images, a column a run."""
    table: dict[Conditions, dict[Measure, dict[int, tuple[float, str]]]] = {}
    notes: dict[Conditions, dict[str, None]] = {}
    for place, run in enumerate(runs):
        for e in run.evaluations:
            conditions = _conditions(e)
            section = table.setdefault(conditions, {})
            notes.setdefault(conditions, {}).update(dict.fromkeys(e.notes))
            for name in e.numbers:
                section.setdefault(_measure(e, name), {})[place] = (e.numbers[name], _error(e, name))
    return [_numbers(conditions, rows, len(runs), notes[conditions]) for conditions, rows in table.items()]


def _conditions(e: Evaluation) -> Conditions:
    size = e.settings.get("image_size")
    cut = f"pictures cut to {size}×{size}" if size else ""
    return e.reference, e.reference_digest, e.num_reference, e.extractor, e.resize, cut, e.num_samples


def _measure(e: Evaluation, name: str) -> Measure:
    depends = METRICS[name].settings if name in METRICS else tuple(e.settings)
    return name, tuple((setting, said(e.settings[setting])) for setting in depends if setting in e.settings)


def _error(e: Evaluation, name: str) -> str:
    """The interval, or the deviation over subsets."""
    if name in e.deviations:
        return f"± {shown(name, e.deviations[name])}"
    if name not in e.intervals:
        return ""
    low, high = e.intervals[name]
    return f"{shown(name, low)} … {shown(name, high)}"


def _numbers(
    conditions: Conditions,
    rows: Mapping[Measure, Mapping[int, tuple[float, str]]],
    count: int,
    notes: Iterable[str],
) -> Section:
    reference, digest, num_reference, extractor, resize, cut, num_samples = conditions
    against = clean(reference) + (f" ({num_reference:,} images)" if num_reference else "")
    made = [_number_row(measure, rows[measure], count) for measure in sorted(rows, key=_order)]
    title = f"{num_samples:,} images against {against}"
    parts = (f"features of {extractor}", resize, cut, digest and f"reference {digest[:8]}")
    note = ". ".join((", ".join(filter(None, parts)), " ".join(notes))) if notes else ", ".join(filter(None, parts))
    return Section(title=title, note=note, rows=tuple(made))


def _order(measure: Measure) -> tuple[int, Measure]:
    known = list(METRICS)
    return (known.index(measure[0]) if measure[0] in METRICS else len(known)), measure


def _number_row(measure: Measure, found: Mapping[int, tuple[float, str]], count: int) -> Row:
    name, depends = measure
    best = best_of(name, {place: number for place, (number, _) in found.items()})
    cells = [
        Cell(text=shown(name, found[k][0]), note=found[k][1], best=k in best) if k in found else Cell(text=ABSENT)
        for k in range(count)
    ]
    arrow = {-1: " ↓", 1: " ↑"}[METRICS[name].better] if name in METRICS else ""
    title = (METRICS[name].name if name in METRICS else clean(name)) + arrow
    note = ", ".join(f"{clean(setting)} {value}" for setting, value in depends)
    return Row(name=Cell(text=title, note=note), cells=tuple(cells))


def best_of(name: str, numbers: Mapping[int, float]) -> set[int]:
    """Places of the best numbers, as they are shown; none where all are alike, or nobody knows which is better."""
    if name not in METRICS:
        return set()
    rounded = {place: round(number, METRICS[name].digits) for place, number in numbers.items()}
    best = max(rounded.values(), key=lambda number: number * METRICS[name].better, default=None)
    winners = {place for place, number in rounded.items() if number == best}
    return winners if len(winners) < len(numbers) else set()


# -------------------------------------------------------------------------------------------------------- paper

COLUMNS = ("fid", "sfid", "is", "precision", "recall")


def paper_table(runs: Sequence[Run]) -> Table | None:
    """The paper's rows of the same network and guidance, above what was measured of each run; None for others."""
    like = [(run, rows_like(run.model, run.settings)) for run in runs]
    sections = [_beside_paper(run, rows) for run, rows in like if rows]
    if not sections:
        return None
    images = sorted({row.images for _, rows in like for row in rows}, reverse=True)
    steps = sorted({row.steps for _, rows in like for row in rows})
    note = (
        f"Not like for like: the paper measured {enumerated([f'{n:,}' for n in images])} images of "
        f"{enumerated([str(n) for n in steps])} steps each, with Inception, from references of its own."
    )
    heads = ("images", "steps", *(METRICS[name].name for name in COLUMNS))
    return Table(title="The paper's numbers", heads=heads, sections=tuple(sections), note=note, aligned=True)


def _beside_paper(run: Run, rows: Sequence[PaperRow]) -> Section:
    papers = [_line(f"paper, {row.table}", "", row.images, str(row.steps), row.numbers) for row in rows]
    respacing, sampler = said(run.settings.get("respacing")), said(run.settings.get("sampler"))
    steps = respacing if respacing.startswith(sampler) else f"{respacing} ({sampler})"
    own = [
        _line(run.name, f"against {clean(e.reference)}", e.num_samples, steps, e.numbers)
        for e in run.evaluations
        if e.extractor == INCEPTION
    ]
    none = _line(run.name, f"no numbers of {INCEPTION} yet", run.num_images, steps, {})
    return Section(title=f"{run.name}: {run.model}, {run.guidance}", rows=tuple(papers + (own or [none])))


def _line(name: str, note: str, images: int, steps: str, numbers: Mapping[str, float]) -> Row:
    """A line of the paper's table; numbers have two digits behind the point, as it prints them."""
    texts = [f"{numbers[metric]:.2f}" if metric in numbers else ABSENT for metric in COLUMNS]
    return Row(name=Cell(text=name, note=note), cells=tuple(Cell(text=text) for text in (f"{images:,}", steps, *texts)))
