"""`sagl evaluate`: the numbers of a set of images, measured from a reference, on as many processes as there are."""

import csv
import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sagl.commands.parser import Parser, from_namespace
from sagl.commands.work import add_work_flags, work_of
from sagl.errors import require
from sagl.evaluation.metric_info import METRICS, shown
from sagl.settings.evaluation import DEFAULT_EXTRACTOR, MetricSettings
from sagl.utils.distributed import exit_when_parent_dies, global_rank
from sagl.utils.environment import disable_malloc_trim
from sagl.utils.files import atomic_file, require_new

if TYPE_CHECKING:
    from sagl.evaluation.results import Evaluation


def evaluate_parser() -> Parser:
    """The flags."""
    p = Parser("evaluate", "Numbers of images, measured from a reference: FID, sFID, IS, precision, recall, KID.")
    p.add_argument(
        "run",
        type=str,
        help="A run's folder, an npz, a folder of pictures, LSUN's LMDB, shards, fashion_mnist_train or _test.",
    )
    p.add_argument(
        "--reference",
        type=str,
        default="fashion_mnist_test",
        help="As for the run, or a file of statistics: OpenAI's, EDM's, or of sagl statistics.",
    )
    p.add_argument("--num_samples", type=int, default=None, help="Only so many of the run's images, the first.")
    add_work_flags(p, of_reference=True)
    p.add_settings(MetricSettings)
    forms = Literal["table", "json", "csv"]
    p.add_argument("--format", type=forms, default="table", help="What is printed.")
    p.add_argument("--output", type=str, default=None, help="A .json or .csv file to write as well.")
    p.add_argument("--overwrite", action="store_true", help="Write over a file that is there.")
    return p


def main(arguments: list[str]) -> None:
    """Measure: `sagl evaluate RUN [--reference R] [--extractor E] [--num_samples N] [--trainer.devices N]`.

    A run's folder keeps the numbers in evaluation.json, where `sagl compare` finds them.

    Raises:
        UserError: the images, the reference or the extractor are not there, do not go together, or are too few.
    """
    given = evaluate_parser().parse(arguments)
    disable_malloc_trim()
    if given.extractor is None:
        given.extractor = _extractor_of(Path(given.reference))
    work, settings = work_of(given), from_namespace(MetricSettings, given)
    if global_rank() > 0:
        from sagl.commands.measuring import follow

        exit_when_parent_dies()
        follow(work)
        return
    output, run = None if given.output is None else Path(given.output), Path(given.run)
    if output is not None:
        require(output.suffix in (".json", ".csv"), f"`output` must end in .json or .csv, got {output}.")
        require_new(output, overwrite=given.overwrite)
    from sagl.commands.evaluation import evaluation_of
    from sagl.evaluation.results import read_evaluations, save_result

    kept = _is_kept_in(run)
    if kept:
        read_evaluations(run)  # a damaged file is refused before the work
    made = evaluation_of(given.run, given.reference, given.num_samples, work, settings)
    if given.format == "table":
        show(made)
    else:
        print(rendered(made, given.format), end="", flush=True)
    if kept:
        save_result(run, made)
    if output is not None:
        with atomic_file(output) as partial:
            partial.write_text(rendered(made, output.suffix[1:]))


def rendered(made: "Evaluation", form: str) -> str:
    """The evaluation as text: json, or csv with a line a number."""
    if form == "json":
        return json.dumps(made.written, ensure_ascii=False) + "\n"
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    about = ("images", "num_samples", "reference", "num_reference", "extractor", "resize")
    lines.writerow(("metric", "value", "low", "high", "deviation", *about, "settings", "notes"))
    same = (*(getattr(made, key) for key in about), _said(made, "; "), " ".join(made.notes))
    for name, value in made.numbers.items():
        lines.writerow((name, value, *made.intervals.get(name, ("", "")), made.deviations.get(name, ""), *same))
    return file.getvalue()


def show(made: "Evaluation") -> None:
    """The numbers as a table, with what they belong to above and what one must know below."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    count = f"{made.num_reference} images" if made.num_reference else "of a file of statistics"
    for line in (
        f"{made.images}: {made.num_samples} images, from {made.reference}: {count}",
        f"{made.extractor} ({made.resize}), {made.seconds} s",
    ):
        console.print(Text(line), soft_wrap=True)
    table = Table()
    for name in ("", "value", "95 % interval" if made.intervals else "", "over subsets" if made.deviations else ""):
        if name or not table.columns:
            table.add_column(name, justify="right" if name else "left")
    for name, value in made.numbers.items():
        table.add_row(METRICS[name].name, *_cells(made, name, value))
    console.print(table)
    for note in (_said(made, " · "), *made.notes):
        console.print(Text(note))


def _said(made: "Evaluation", between: str) -> str:
    """The settings behind the numbers, in a line."""
    return between.join(f"{name} {value}" for name, value in made.settings.items())


def _cells(made: "Evaluation", name: str, value: float) -> list[str]:
    """A row but for its name: the value, and where any number has them its interval and its deviation."""
    cells = [shown(name, value)]
    if made.intervals:
        low_high = made.intervals.get(name)
        cells.append(" … ".join(shown(name, end) for end in low_high) if low_high else "")
    if made.deviations:
        cells.append(f"± {shown(name, made.deviations[name])}" if name in made.deviations else "")
    return cells


def _is_kept_in(run: Path) -> bool:
    """Whether the numbers are kept beside the images: in a run whose folder can be written."""
    from sagl.sampling.run_folder import is_run

    if is_run(run) and not os.access(run, os.W_OK):
        print(f"{run} cannot be written: its numbers are not kept there.", file=sys.stderr)
        return False
    return is_run(run)


def _extractor_of(reference: Path) -> str:
    """The extractor of a file of statistics, else the one that needs no download."""
    from sagl.metrics.reference import has_statistics, read_extractor

    return read_extractor(reference) if has_statistics(reference) else DEFAULT_EXTRACTOR
