"""`sagl statistics`: a statistics file of reference images."""

import sys
from pathlib import Path

from sagl.configuration.extraction import add_extraction_settings, extraction_settings
from sagl.configuration.parser import Parser
from sagl.errors import require
from sagl.settings.evaluation import MetricSettings
from sagl.utils.run_lock import lock_new_file


def statistics_parser() -> Parser:
    """Build the parser of `sagl statistics`."""
    p = Parser("statistics", "Write a statistics file of images, for sagl evaluate IMAGES --reference FILE.")
    sources = "folder of images, LSUN's LMDB, shards, npz file, run, or (fashion_mnist|emoji)_(train|test)"
    p.add_argument("source", type=str, help=f"Images: {sources}.")
    p.add_argument("--output", type=str, required=True, help="The .npz file to write.")
    p.add_argument("--num_samples", type=int, default=None, help="Number of images to use; default: all.")
    max_features = MetricSettings.max_features
    p.add_argument("--max_features", type=int, default=max_features, help="Features for precision, recall and KID.")
    p.add_argument("--overwrite", action="store_true", help="Replace an existing file.")
    add_extraction_settings(p)
    return p


def main(arguments: list[str]) -> None:
    """Run `sagl statistics SOURCE --output FILE.npz [--extractor E] [--image_size N] [--trainer.devices N]`.

    Raises:
        UserError: the images or the extractor do not exist, or the file does.
    """
    args = statistics_parser().parse(arguments)
    (extraction, devices), output = extraction_settings(args), Path(args.output)
    require(output.suffix == ".npz", f"`output` must end in .npz, got {output}.")
    with lock_new_file(output, devices, overwrite=args.overwrite):
        from sagl.evaluation.evaluate import write_statistics

        reference = write_statistics(
            args.source,
            output,
            num_samples=args.num_samples,
            max_features=args.max_features,
            extraction=extraction,
            devices=devices,
        )
    for note in reference.notes:
        print(note, file=sys.stderr)
    count = reference.statistics.num_samples
    print(
        f"{output}: {reference.extractor} features of {count} images. Use it: sagl evaluate IMAGES --reference {output}"
    )
