"""`sagl statistics`: what evaluations need of a reference, in one file."""

from pathlib import Path

from sagl.commands.parser import Parser
from sagl.commands.work import add_work_flags, work_of
from sagl.errors import require
from sagl.settings.evaluation import MetricSettings
from sagl.utils.distributed import exit_when_parent_dies, global_rank
from sagl.utils.environment import disable_malloc_trim
from sagl.utils.files import require_new


def statistics_parser() -> Parser:
    """The flags."""
    p = Parser(
        "statistics", "Write what evaluations need of a reference to a file: sagl evaluate RUN --reference FILE."
    )
    p.add_argument("source", type=str, help="Folder of pictures, LSUN's LMDB, shards, npz, run, fashion_mnist_train.")
    p.add_argument("--output", type=str, required=True, help="The .npz file to write.")
    p.add_argument("--num_samples", type=int, default=None, help="Only so many images, the first.")
    p.add_argument(
        "--max_features",
        type=int,
        default=MetricSettings.max_features,
        help="Features kept for precision, recall, KID.",
    )
    p.add_argument("--overwrite", action="store_true", help="Write over a file that is there.")
    add_work_flags(p)
    return p


def main(arguments: list[str]) -> None:
    """Look: `sagl statistics SOURCE --output FILE.npz [--extractor E] [--image_size N] [--trainer.devices N]`.

    Raises:
        UserError: the images or the extractor are not there, or the file is.
    """
    given = statistics_parser().parse(arguments)
    disable_malloc_trim()
    work, output = work_of(given), Path(given.output)
    if global_rank() > 0:
        from sagl.commands.measuring import follow

        exit_when_parent_dies()
        follow(work)
        return
    require(output.suffix == ".npz", f"`output` must end in .npz, got {given.output}.")
    require_new(output, overwrite=given.overwrite)
    require(given.max_features >= 2, f"`max_features` must be at least 2, got {given.max_features}.")
    from sagl.commands.measuring import Look, Looking, counted, extractor_of
    from sagl.metrics.checks import require_finite_features
    from sagl.metrics.reference import Reference, write_reference

    images = counted(given.source, work.image_size, "source")
    wanted = len(images) if given.num_samples is None else given.num_samples
    require(2 <= wanted <= len(images), f"`num_samples` must be 2 … {len(images)} for {given.source}, got {wanted}.")
    looking = Looking(work, extractor_of(work))
    place = looking.ask(
        Look(
            source=given.source, image_size=work.image_size, wanted=wanted, max_features=min(wanted, given.max_features)
        )
    )
    looking.look()
    require_finite_features("source", looking[place].pooled)
    seen = Reference(statistics=looking[place], extractor=work.extractor, source=given.source, image_size=images.side)
    write_reference(seen, output)
    print(f"{output}: {work.extractor} of {wanted} images. Measure from it: sagl evaluate RUN --reference {output}")
