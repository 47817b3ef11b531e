"""`sagl compare`: runs side by side, on the terminal or as an HTML page with their images."""

from pathlib import Path

from sagl.configuration.parser import Parser, positionals_first
from sagl.errors import require, require_range
from sagl.evaluation.comparison import build_report
from sagl.evaluation.report import has_generator_tag, print_report, render_html
from sagl.evaluation.runs import NUM_SAMPLES, have_shared_ids, read_images, read_runs
from sagl.settings.sampling import MAX_SAMPLES
from sagl.utils.files import write_text
from sagl.utils.run_lock import lock_file

FLAGS_WITHOUT_VALUE = ("--overwrite", "--help")


def compare_parser() -> Parser:
    """Build the parser of `sagl compare`."""
    p = Parser("compare", "Runs side by side: settings that differ, cost, metrics, images at equal ids.")
    p.add_argument("run", type=str, nargs="+", help="Folders written by sagl sample.")
    p.add_argument("--output", type=str, default=None, help="A .html file to write, with images.")
    num_samples = f"Images of each run on the page, 0 for none; default: {NUM_SAMPLES}."
    p.add_argument("--num_samples", type=int, default=None, help=num_samples)
    p.add_argument("--overwrite", action="store_true", help="Replace --output even if sagl compare did not write it.")
    return p


def main(arguments: list[str]) -> None:
    """Run `sagl compare RUN RUN … [--output FILE.html] [--num_samples N]`.

    Raises:
        UserError: a folder is no run or is named twice, a file is damaged, the output would replace another file, or
            the runs do not share the requested images.
    """
    args = compare_parser().parse(positionals_first(arguments, FLAGS_WITHOUT_VALUE))
    output, num_samples = None if args.output is None else Path(args.output), args.num_samples
    if output is not None:
        _require_replaceable(output, args.overwrite)
    if num_samples is not None:
        require_range("num_samples", num_samples, 0, MAX_SAMPLES)
    require(num_samples is None or output is not None, "`num_samples` is the number of images on a page: add `output`.")
    runs = read_runs(args.run)
    if output is None:
        print_report(build_report(runs))
        print("\nWith their images, at equal ids: --output FILE.html.")
        return
    images = read_images(runs, num_samples)
    report = build_report(runs, images, has_shared_ids=num_samples == 0 or have_shared_ids(runs))
    with lock_file(output):
        write_text(output, render_html(report))
    counts = f"{len(images.ids)} images of each run" if images else "no images"
    print(f"{output}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}, {counts}.")


def _require_replaceable(output: Path, overwrite: bool) -> None:
    require(output.suffix.lower() in (".html", ".htm"), f"`output` must end in .html, got {output}.")
    require(
        overwrite or not output.is_file() or has_generator_tag(output),
        f"`output` must be new or a page of sagl compare, and {output} is another file. Choose another name, or set "
        "`overwrite`.",
    )
