"""`sagl shard`: pictures of any kind as WebDataset shards."""

from pathlib import Path
from typing import Literal

from sagl.commands.parser import Parser
from sagl.errors import require
from sagl.utils.files import require_writable
from sagl.utils.progress import show_progress


def shard_parser() -> Parser:
    """The flags."""
    p = Parser("shard", "Write pictures as WebDataset shards, to train on with sagl.data.webdataset.ShardData.")
    p.add_argument("source", type=str, help="LSUN's LMDB, a folder, an npz, shards, or fashion_mnist.")
    p.add_argument("--output", type=str, required=True, help="Folder for NAME-000000.tar … and shards.json.")
    p.add_argument("--name", type=str, default=None, help="First part of the files' names; default: the source's.")
    p.add_argument("--shard_size", type=int, default=10000, help="Pictures a shard.")
    p.add_argument("--labels", type=str, default=None, help="Of a folder: folders, none or a .csv; default: none.")
    progress = Literal["auto", "bar", "lines", "off"]
    p.add_argument("--progress", type=progress, default="auto", help="auto: a bar on a terminal, else lines.")
    return p


def main(arguments: list[str]) -> None:
    """Write: `sagl shard SOURCE --output DIR`; given again, it goes on where it was stopped.

    Raises:
        UserError: no such pictures, or a folder that holds others; each file is written whole or not at all.
    """
    given = shard_parser().parse(arguments)
    output, name = Path(given.output), given.name or _name(given.source)
    require(given.shard_size >= 1, f"`shard_size` must be at least 1, got {given.shard_size}.")
    require("/" not in name, f"`name` must be the first part of a file's name, got {name!r}.")
    require_writable(output)
    from sagl.data.registry import open_image_source
    from sagl.data.webdataset_writer import planned, write_shards

    source = open_image_source(given.source, given.labels)
    shards = planned(output, name, len(source), given.shard_size)
    with show_progress(given.progress, name, len(source)) as watch:
        kept = write_shards(source, shards, watch.images)
    print(f"{output}: {len(source)} pictures in {len(shards)} shards{f', {kept} of them kept' if kept else ''}.")
    print(f"Train on them: --data sagl.data.webdataset.ShardData --data.shards {output}")


def _name(source: str) -> str:
    """What a source is called: cat for lsun/cat, pictures for a range of files or an address."""
    path = Path(source).absolute()
    return (path.name if path.is_dir() else path.stem) if path.exists() or path.stem == source else "pictures"
