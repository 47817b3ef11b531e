"""Display of metrics and of the results of evaluations."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sagl.evaluation.results import EvaluationResult


@dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """Display name and format of a metric."""

    name: str
    higher_is_better: bool
    digits: int
    """Decimal places; values that are displayed alike count as equal."""
    settings: tuple[str, ...] = ()
    """Names of the settings that the metric depends on."""


_KID = ("kid_subsets", "kid_subset_size", "max_features", "seed")
_NEIGHBORS = ("num_neighbors", "max_features")
METRICS = {
    "fid": MetricInfo(name="FID", higher_is_better=False, digits=2),
    "sfid": MetricInfo(name="sFID", higher_is_better=False, digits=2),
    "fd": MetricInfo(name="Fréchet distance", higher_is_better=False, digits=2),
    "sfd": MetricInfo(name="Fréchet distance, spatial", higher_is_better=False, digits=2),
    "is": MetricInfo(name="IS, chunks of 5,000", higher_is_better=True, digits=2),
    "is_all": MetricInfo(name="IS, all at once", higher_is_better=True, digits=2),
    "precision": MetricInfo(name="precision", higher_is_better=True, digits=3, settings=_NEIGHBORS),
    "recall": MetricInfo(name="recall", higher_is_better=True, digits=3, settings=_NEIGHBORS),
    "kid": MetricInfo(name="KID", higher_is_better=False, digits=5, settings=_KID),
    "kd": MetricInfo(name="kernel distance", higher_is_better=False, digits=5, settings=_KID),
}
"""Known metrics by their names in evaluation.json."""


def metric_name(name: str) -> str:
    """Return the displayed name of a metric."""
    return METRICS[name].name if name in METRICS else name


def format_value(name: str, value: float) -> str:
    """Format a value with the decimal places of its metric."""
    if name not in METRICS:
        return f"{value:.5g}"
    digits = METRICS[name].digits
    return f"{round(value, digits) + 0.0:,.{digits}f}"  # + 0.0 turns -0.0 into 0.0


def format_interval(name: str, bounds: Sequence[float]) -> str:
    """Format the bounds of an interval; empty without bounds."""
    return " … ".join(format_value(name, bound) for bound in bounds)


def best_values(name: str, values: dict[int, float]) -> set[int]:
    """Return the keys of the best displayed values; empty for an unknown metric, or if all are equal."""
    if name not in METRICS:
        return set()
    info = METRICS[name]
    rounded = {key: round(value, info.digits) for key, value in values.items()}
    best = (max if info.higher_is_better else min)(rounded.values())
    winners = {key for key, value in rounded.items() if value == best}
    return winners if len(winners) < len(values) else set()


def format_result(result: EvaluationResult, format: str) -> str:
    """Return a result as json, or as csv with a line per metric."""
    fields = asdict(result)
    if format == "json":
        return json.dumps(fields, ensure_ascii=False) + "\n"
    reference = ("reference", "reference_digest", "reference_crop_size", "num_reference")
    names = ("images", "num_samples", "ids", *reference, "extractor", "extractor_version", "resize")
    common = [*(fields[name] for name in names), _format_settings(result, "; "), " ".join(result.notes)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("metric", "value", "low", "high", "std", *names, "settings", "notes"))
    for name, value in result.values.items():
        low, high = result.intervals.get(name, ("", ""))
        writer.writerow((name, value, low, high, result.stds.get(name, ""), *common))
    return file.getvalue()


def print_result(result: EvaluationResult) -> None:
    """Print the values as a table, with their inputs above and settings and notes below."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, table = Console(highlight=False), Table()
    count = f"{result.num_reference} images" if result.num_reference else "a statistics file"
    inputs = f"{result.images}: {result.num_samples} images, reference {result.reference}: {count}"
    for line in (inputs, f"{result.extractor} ({result.resize}), {result.seconds} s"):
        console.print(Text(line), soft_wrap=True)
    table.add_column("")
    for title, used in (("value", True), ("95 % interval", result.intervals), ("over subsets", result.stds)):
        if used:
            table.add_column(title, justify="right")
    for name, value in result.values.items():
        cells = [metric_name(name), format_value(name, value)]
        if result.intervals:
            cells.append(format_interval(name, result.intervals.get(name, ())))
        if result.stds:
            cells.append(f"± {format_value(name, result.stds[name])}" if name in result.stds else "")
        table.add_row(*cells)
    console.print(table)
    for note in (_format_settings(result, " · "), *result.notes):
        console.print(Text(note))


def _format_settings(result: EvaluationResult, separator: str) -> str:
    return separator.join(f"{name} {value}" for name, value in result.settings.items())
