"""`sagl shard`: write the images of any source as WebDataset shards."""

import sys
from pathlib import Path

from sagl.configuration.parser import Parser
from sagl.errors import require
from sagl.settings.sampling import ProgressKind
from sagl.utils.files import require_writable
from sagl.utils.listing import is_hidden
from sagl.utils.progress import ProgressReporter
from sagl.utils.run_lock import lock_folder


def shard_parser() -> Parser:
    """Build the parser of `sagl shard`."""
    p = Parser("shard", "Write images as WebDataset shards, to train on with sagl.data.webdataset.ShardData.")
    p.add_argument("source", type=str, help="LSUN's LMDB, a folder of images, an npz file, shards, or fashion_mnist.")
    p.add_argument("--output", type=str, required=True, help="Folder for NAME-000000.tar … and shards.json.")
    p.add_argument("--name", type=str, default=None, help="Prefix of the file names; default: name of the source.")
    p.add_argument("--shard_size", type=int, default=10000, help="Images per shard.")
    p.add_argument("--labels", type=str, default=None, help="Labels of a folder: folders, none (default) or a .csv.")
    p.add_argument(
        "--progress", type=ProgressKind, default="auto", help="Progress; auto: a bar on a terminal, else lines."
    )
    return p


def main(arguments: list[str]) -> None:
    """Write the shards; the same command continues an interrupted run.

    Raises:
        UserError: the source cannot be read, or the folder holds other shards.
    """
    args = shard_parser().parse(arguments)
    output, name = Path(args.output), args.name or _source_name(args.source)
    require(args.shard_size >= 1, f"`shard_size` must be at least 1, got {args.shard_size}.")
    require(
        "/" not in name and not is_hidden(name),
        f"`name` must be a prefix of file names without / and not hidden, got {name!r}. Set `name`.",
    )
    require_writable(output)
    from sagl.data.registry import open_image_source
    from sagl.data.webdataset_writer import plan_shards, write_shards

    source = open_image_source(args.source, args.labels)
    for note in source.notes:
        print(note, file=sys.stderr)
    shards = plan_shards(output, name, len(source), args.shard_size)
    with lock_folder(output), ProgressReporter(name, len(source), args.progress) as progress:
        num_existing = write_shards(source, shards, progress.advance)
    print(f"{output}: {len(source)} images in {len(shards)} shards, {num_existing} of which existed.")
    print(f"Train on them: --data sagl.data.webdataset.ShardData --data.shards {output}")


def _source_name(source: str) -> str:
    """Return a name for the shards: cat for lsun/cat, images for a glob, a brace range or a URL."""
    path = Path(source).absolute()
    return (path.name if path.is_dir() else path.stem) if path.exists() or path.stem == source else "images"
