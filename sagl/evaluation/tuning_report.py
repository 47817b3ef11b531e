"""Results of a search for guidance settings: the recommended configuration, a table, a plot, CSV and JSON."""

import csv
import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from sagl.evaluation.plot import Line, Plot
from sagl.evaluation.report import Cell, Report, Row, Section, Table, render_html
from sagl.evaluation.study import Measurement, Setting
from sagl.evaluation.tuning import Round, Space, Tuning, TuningResult, searched_values
from sagl.guidance.registry import GUIDANCES
from sagl.models.zoo import BUNDLED
from sagl.sampling.guidance_files import AUTO
from sagl.settings.sampling import SamplerSettings
from sagl.utils.config_files import to_text
from sagl.utils.files import write_text
from sagl.utils.json_values import finite_or_none

CONFIG_FILE, PAGE_FILE, CSV_FILE, JSON_FILE = "recommended.yaml", "tuning.html", "candidates.csv", "tuning.json"
COLUMNS = ("network evaluations", "Fréchet distance ↓", "from unguided", "95 % interval", "precision ↑", "recall ↑")


def write_results(tuning: Tuning, result: TuningResult, folder: Path) -> None:
    """Write the recommended configuration, the page, the candidates as CSV and everything as JSON.

    Raises:
        UserError: a file cannot be written.
    """
    contents = {
        CONFIG_FILE: format_config(tuning, result),
        CSV_FILE: format_csv(tuning, result),
        JSON_FILE: json.dumps(as_json(tuning, result), indent=2, ensure_ascii=False) + "\n",
        PAGE_FILE: render_html(build_report(tuning, result)),
    }
    for name, text in contents.items():
        write_text(folder / name, text)


def describe_result(tuning: Tuning, result: TuningResult) -> list[str]:
    """Return sentences on what the report shows about the best candidate."""
    ids, best = tuning.report_ids, result.best
    sentences = [
        f"{len(ids)} images, ids {ids[0]} … {ids[-1]}, {tuning.extractor}, reference {tuning.reference}.",
        _describe(best, result.unguided, f"unguided sampling of {result.unguided.nfe:g} network evaluations per image"),
        _describe(best, result.plain, f"plain sampling of {result.plain.nfe:g} network evaluations per image"),
    ]
    if result.configured is None:
        return sentences
    if result.configured.setting.values == best.setting.values:
        return [*sentences, "The recommended setting is the configured one."]
    return [*sentences, _describe(best, result.configured, "the configured guidance")]


def _describe(best: Measurement, other: Measurement, name: str) -> str:
    distances = f"{format_distance(best.values['fd'])}, that of {name} {format_distance(other.values['fd'])}"
    sentence, difference = f"The recommended setting's Fréchet distance is {distances}.", best.difference(other)
    if difference is None:
        return sentence
    verdict = (
        "lower" if difference.high < 0 else "higher" if difference.low > 0 else "neither lower nor higher for certain"
    )
    return sentence + " It is {}: {:+,.2f} (95 % interval {:+,.2f} … {:+,.2f}).".format(verdict, *difference)


def format_config(tuning: Tuning, result: TuningResult) -> str:
    """Return the best candidate as a config for `sagl sample`, with the report as a comment."""
    config, source = tuning.run.config, tuning.run.config.source
    model: dict[str, Any] = {"network": source.model or (source.network and asdict(source.network))}
    model["diffusion"] = source.diffusion and asdict(source.diffusion)
    model = {key: value for key, value in model.items() if value is not None}
    network: dict[str, Any] = {"model": json.loads(json.dumps(model))} if model else {}  # YAML has no tuples
    if source.checkpoint is not None and source.model not in BUNDLED:
        network |= {"checkpoint": str(source.checkpoint.resolve()), "weights": source.weights}
    off = {name: {"scale": 0.0} for name in GUIDANCES}  # the weight file may recommend one that is not used here
    settings = network | {"labels": config.samples.labels} | off | result.best.setting.values
    for guidance in result.best.setting.guidances.values():
        for name in guidance.file_settings if guidance.scale else ():
            if (value := getattr(guidance, name)) != AUTO and Path(value).is_file():  # not the name of a network
                settings[guidance.group][name] = str(Path(value).resolve())
    comment = "".join(f"# {line}\n" for line in describe_result(tuning, result))
    return comment + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def last_rounds(result: TuningResult) -> dict[int, Round]:
    """Return the last round of each candidate, the best candidate first."""
    order: dict[int, Round] = {}
    for round_ in reversed(result.rounds):
        order |= {number: round_ for number in round_.ranking if number not in order}
    return order


def format_csv(tuning: Tuning, result: TuningResult) -> str:
    """Return a line per candidate, the best first, with the distances of its last round."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("rank", *tuning.space, "num_samples", "distance", "unguided"))
    for rank, (number, round_) in enumerate(last_rounds(result).items(), start=1):
        values = searched_values(tuning.candidates[number], tuning.space).values()
        distance = finite_or_none(round_.distances[number])
        writer.writerow((rank, *values, len(round_.ids), distance, round_.unguided))
    return file.getvalue()


def as_json(tuning: Tuning, result: TuningResult) -> dict[str, Any]:
    """Return everything that was measured as JSON values."""
    rounds = [
        {
            "ids": [r.ids.start, r.ids.stop],
            "unguided": r.unguided,
            "distances": {number: finite_or_none(distance) for number, distance in r.distances.items()},
        }
        for r in result.rounds
    ]
    configured = result.configured
    rows = {"unguided": result.unguided, "recommended": result.best, "plain": result.plain}
    rows |= {"configured": configured} if configured else {}
    report = {name: {"setting": row.setting.values, "nfe": row.nfe, **row.json_values} for name, row in rows.items()}
    return {
        "reference": tuning.reference,
        "extractor": tuning.extractor,
        "space": {name: list(values) for name, values in tuning.space.items()},
        "candidates": [candidate.values for candidate in tuning.candidates],
        "rounds": rounds,
        "report_ids": [tuning.report_ids.start, tuning.report_ids.stop],
        "report": report,
        "difference_from_unguided": result.best.difference(result.unguided),
        "difference_from_plain": result.best.difference(result.plain),
        "difference_from_configured": result.best.difference(configured) if configured else None,
    }


# ----------------------------------------------------------------------------------------------- page


def build_report(tuning: Tuning, result: TuningResult) -> Report:
    """Return the page of a search: the report on fresh ids, the candidates, and a plot of the rounds."""
    return Report(
        title=f"Guidance settings for {tuning.run.config.source.model or tuning.run.checkpoint.name}",
        notes=(
            *describe_result(tuning, result),
            f"Settings of {CONFIG_FILE} that differ from the defaults: {describe_changes(result.best.setting)}.",
        ),
        tables=(report_table(tuning, result), candidates_table(tuning, result)),
        plot=plot_rounds(tuning, result),
        command="tune",
    )


def measurement_row(name: str, row: Measurement, baseline: Measurement) -> Row:
    """Return the row of a measurement in a table with `COLUMNS`; `baseline` is unguided sampling over the same ids."""
    difference = row.difference(baseline) if row is not baseline else None
    fractions = (f"{row.values[key]:.3f}" if key in row.values else "" for key in ("precision", "recall"))
    texts = [f"{row.nfe:g}", format_distance(row.values["fd"])]
    texts += (
        [f"{difference.estimate:+,.2f}", f"{difference.low:+,.2f} … {difference.high:+,.2f}"]
        if difference
        else ["", ""]
    )
    return Row(name=Cell(text=name), cells=tuple(Cell(text=text) for text in (*texts, *fractions)))


def report_table(tuning: Tuning, result: TuningResult) -> Table:
    """Return the table of the best candidate on fresh ids."""
    named = {"unguided": result.unguided, "recommended": result.best, "unguided at equal cost": result.plain}
    if result.configured is not None:
        named["as configured"] = result.configured
    rows = tuple(measurement_row(name, row, result.unguided) for name, row in named.items())
    ids = tuning.report_ids
    section = Section(title=f"{len(ids)} images", note=f"ids {ids[0]} … {ids[-1]}, not used in the search", rows=rows)
    return Table(title="Report", columns=COLUMNS, sections=(section,), right_aligned=True)


def candidates_table(tuning: Tuning, result: TuningResult) -> Table:
    """Return the table of all candidates, by the last round that each took part in."""
    sections = []
    order = last_rounds(result)
    for round_ in reversed(result.rounds):
        numbers = [number for number, last in order.items() if last is round_]
        rows = [Row(name=Cell(text="unguided"), cells=_distance_cells(round_.unguided, None))]
        for number in numbers:
            name = describe_setting(tuning.candidates[number], tuning.space)
            cells = _distance_cells(round_.distances[number], round_.unguided)
            rows.append(Row(name=Cell(text=name), cells=cells))
        title = f"last compared over {len(round_.ids)} images"
        sections.append(Section(title=title, note=f"ids {round_.ids[0]} … {round_.ids[-1]}", rows=tuple(rows)))
    columns = ("Fréchet distance ↓", "from unguided")
    note = "Distances over different numbers of images cannot be compared."
    return Table(title="Candidates", columns=columns, sections=tuple(sections), note=note, right_aligned=True)


def _distance_cells(distance: float, unguided: float | None) -> tuple[Cell, ...]:
    difference = "" if unguided is None or math.isinf(distance) else f"{distance - unguided:+,.2f}"
    return Cell(text=format_distance(distance)), Cell(text=difference)


def format_distance(distance: float) -> str:
    """Format a Fréchet distance; an infinite one stands for images that are not finite."""
    return "not finite" if math.isinf(distance) else f"{distance:,.2f}"


def describe_setting(setting: Setting, space: Space) -> str:
    """Return the searched settings of a candidate as text."""
    values = searched_values(setting, space)
    return " · ".join(f"{name} {to_text(value)}" for name, value in values.items()) or "as configured"


def describe_changes(setting: Setting) -> str:
    """Return the settings of a sampler and its guidance that differ from the defaults of their classes, as text."""
    groups = {"": (asdict(setting.sampler), asdict(SamplerSettings()))}
    for name, guidance in setting.guidances.items():
        if guidance.scale:
            groups[f"{name}."] = asdict(guidance), asdict(GUIDANCES[name].settings_class())
    return " · ".join(
        f"{group}{key} {to_text(value)}"
        for group, (values, defaults) in groups.items()
        for key, value in values.items()
        if value != defaults[key]
    )


def plot_rounds(tuning: Tuning, result: TuningResult) -> Plot:
    """Return the differences from unguided sampling of all candidates with finite images, round by round.

    The vertical range holds the candidates of the second round in all rounds; others are drawn at its upper end if they
    are worse.
    """
    lines = []
    for number in last_rounds(result):
        rounds = [r for r in result.rounds if math.isfinite(r.distances.get(number, math.inf))]
        points = [(float(len(r.ids)), r.distances[number] - r.unguided) for r in rounds]
        name = describe_setting(tuning.candidates[number], tuning.space)
        if points:
            lines.append(Line(name=name, points=points, best=number == result.rounds[-1].ranking[0]))
    second_round = [y for line in lines if len(line.points) > 1 for _, y in line.points]
    values = [0.0, *(second_round or [y for line in lines for _, y in line.points])]
    margin = 0.08 * (max(values) - min(values)) or 1.0
    return Plot(
        title="Rounds of the search",
        x_label="images per candidate",
        y_label="Fréchet distance minus that of unguided sampling",
        lines=lines[::-1],
        x_ticks=[len(round_.ids) for round_ in result.rounds],
        y_range=(min(values) - margin, max(values) + margin),
        logarithmic=True,
    )
