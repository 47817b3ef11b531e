"""`sagl evaluate`: metrics of a set of images against a reference."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from sagl.configuration.extraction import add_extraction_settings, extraction_settings
from sagl.configuration.parser import Parser, from_namespace
from sagl.errors import require
from sagl.evaluation.metric_display import format_result, print_result
from sagl.evaluation.results import EvaluationResult, read_results, save_result
from sagl.sampling.run_folder import is_run
from sagl.settings.evaluation import MetricSettings
from sagl.utils.files import atomic_file
from sagl.utils.run_lock import lock_new_file


def evaluate_parser() -> Parser:
    """Build the parser of `sagl evaluate`."""
    p = Parser("evaluate", "Metrics of images against a reference: FID, sFID, IS, precision, recall, KID.")
    image_sets = "run, npz file, folder of images, LSUN's LMDB, shards, or (fashion_mnist|emoji)_(train|test)"
    p.add_argument("images", type=str, help=f"Images to evaluate: {image_sets}.")
    reference = (
        "Reference: as for `images`, or a statistics file of OpenAI, EDM or sagl statistics; by default the test "
        "images of a bundled network's data."
    )
    p.add_argument("--reference", type=str, default=None, help=reference)
    p.add_argument("--num_samples", type=int, default=None, help="Number of images to use; default: all.")
    add_extraction_settings(p)
    p.add_settings(MetricSettings)
    p.add_argument("--format", type=Literal["table", "json", "csv"], default="table", help="Format of the output.")
    p.add_argument("--output", type=str, default=None, help="A .json or .csv file to write in addition.")
    p.add_argument("--overwrite", action="store_true", help="Replace an existing file.")
    return p


def main(arguments: list[str]) -> None:
    """Run `sagl evaluate IMAGES [--reference R] [--extractor E] [--num_samples N] [--trainer.devices N]`.

    Results of a run are saved as evaluation.json in its folder, where `sagl compare` reads them.

    Raises:
        UserError: an input does not exist, is damaged or too small, or the inputs do not match.
    """
    args = evaluate_parser().parse(arguments)
    (extraction, devices), metrics = extraction_settings(args), from_namespace(MetricSettings, args)
    output, run = None if args.output is None else Path(args.output), Path(args.images)
    require(
        output is None or output.suffix in (".json", ".csv"), f"`output` must end in .json or .csv, got {args.output}."
    )
    saves_result = is_run(run) and os.access(run, os.W_OK)
    if saves_result:
        read_results(run)  # a damaged file is refused before the work
    elif is_run(run):
        print(f"{run} is not writable: the result is not saved there.", file=sys.stderr)
    from sagl.evaluation.evaluate import evaluate

    with nullcontext() if output is None else lock_new_file(output, devices, overwrite=args.overwrite):
        result = evaluate(
            args.images,
            args.reference,
            num_samples=args.num_samples,
            extraction=extraction,
            metrics=metrics,
            devices=devices,
        )
        try:
            save(result, run if saves_result else None, output)
        finally:  # numbers that cannot be saved are printed
            if args.format == "table":
                print_result(result)
            else:
                print(format_result(result, args.format), end="", flush=True)


def save(result: EvaluationResult, run: Path | None, output: Path | None) -> None:
    """Save a result in the folder of its run and in a file.

    Raises:
        UserError: one of them cannot be written.
    """
    if run is not None:
        save_result(run, result)
    if output is not None:
        with atomic_file(output) as partial:
            text = format_result(result, output.suffix[1:])
            partial.write_text(text, encoding="utf-8", errors="surrogateescape")
