"""Writing of WebDataset shards. The same images always give the same bytes."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from webdataset import TarWriter

from sagl.data.image_data import NO_LABEL, ImageSource
from sagl.data.webdataset import ShardImageSource
from sagl.data.webdataset_files import MANIFEST
from sagl.errors import UserError, require
from sagl.utils.files import atomic_file, remove_partial, sha256

MAGIC_BYTES = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"BM": "bmp"}
"""First bytes of image files, with the suffix of their format."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A tar file and the images that it holds."""

    path: Path
    indices: range
    """Indices of the images in the source."""


def plan_shards(folder: Path, name: str, num_images: int, shard_size: int) -> list[Shard]:
    """Split images between the shards NAME-000000.tar, NAME-000001.tar, … with `shard_size` images each."""
    return [
        Shard(path=folder / f"{name}-{number:06d}.tar", indices=range(first, min(num_images, first + shard_size)))
        for number, first in enumerate(range(0, num_images, shard_size))
    ]


def write_shards(source: ImageSource, shards: list[Shard], on_images: Callable[[int], None]) -> int:
    """Write the shards that do not exist, then the manifest.

    Args:
        source: source of the images.
        shards: shards from `plan_shards`.
        on_images: progress callback; receives the number of images completed since its last call.

    Returns:
        The number of shards that existed.

    Raises:
        UserError: the folder holds shards of other images, an image cannot be read, or a file cannot be written.
    """
    _check_folder(shards)
    remove_partial(shards[0].path.parent, "*.tar.*", f"{MANIFEST}.*")
    existing = [shard for shard in shards if shard.path.is_file()]
    for shard in existing:
        _check_images(source, shard)
    manifest: dict[str, dict[str, int | str]] = {}
    for shard in shards:
        if shard in existing:
            on_images(len(shard.indices))
        else:
            _write(source, shard, on_images)
        manifest[shard.path.name] = {"images": len(shard.indices), "sha256": sha256(shard.path)}
    with atomic_file(shards[0].path.with_name(MANIFEST)) as partial:
        partial.write_text(json.dumps(manifest, indent=2) + "\n")
    return len(existing)


def _write(source: ImageSource, shard: Shard, on_images: Callable[[int], None]) -> None:
    """Write a shard with constant owner, mode and time; the file appears when it is complete."""
    with (
        atomic_file(shard.path) as partial,
        partial.open("wb") as file,
        TarWriter(file, user="root", group="root", mode=0o644, mtime=0, encoder=False) as tar,
    ):
        for index in shard.indices:
            tar.write(_sample(source, index))
            on_images(1)


def _sample(source: ImageSource, index: int) -> dict[str, str | bytes]:
    """Return an image and its label under a key of nine digits, the index of the image."""
    try:
        image, label = source.read_bytes(index), source.label(index)
    except OSError as error:
        raise UserError(
            f"`source` must contain readable images, and {source.name(index)} is not readable: {error.strerror}."
        ) from error
    # A corrupt image without a known format is written as jpg, so that the other images keep their indices.
    suffix = next((suffix for magic, suffix in MAGIC_BYTES.items() if image.startswith(magic)), "jpg")
    label_member = {} if label == NO_LABEL else {"cls": str(label).encode()}
    return {"__key__": f"{index:09d}", suffix: image, **label_member}


def _check_folder(shards: list[Shard]) -> None:
    """Refuse a folder that holds other tar files."""
    folder, paths = shards[0].path.parent, {shard.path for shard in shards}
    others = [path.name for path in sorted(folder.glob("*.tar")) if path not in paths]
    require(
        not others,
        f"`output` must be a new folder or hold shards of the same images, and {folder} also holds "
        f"{others and others[0]}. Choose another folder.",
    )


def _check_images(source: ImageSource, shard: Shard) -> None:
    """Refuse an existing shard of other images, by the number of images, the first and the last."""
    existing, indices = ShardImageSource([shard.path]), shard.indices
    same = len(existing) == len(indices) and all(
        existing.read_bytes(k) == source.read_bytes(indices[k]) and existing.label(k) == source.label(indices[k])
        for k in {0, len(indices) - 1}
    )
    require(
        same,
        f"`output` must be a new folder or hold shards of the same images, and {shard.path} holds other images or is "
        "corrupt. Choose another folder, or delete it.",
    )
