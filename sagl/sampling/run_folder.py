"""Run folder on disk: run.json describes the run, and shards/ contains its images, one batch per file.

A shard is a tar file of a PNG and a JSON file per sample; its last member, index.json, contains length and sha256 of
the others. WebDataset can read it (`select` the samples that have a "png"). Shards are written whole or not at all, and
nothing in them depends on when, by which process or in how many attempts the run was made. All other files in the
folder are exports, made from the shards by `sagl.sampling.exports`.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage

from sagl.errors import UserError, require
from sagl.utils.config_files import flatten
from sagl.utils.files import atomic_file, is_partial, json_sha256
from sagl.utils.run_lock import LOCK_NAME

RUN_JSON, INDEX, SHARDS = "run.json", "index.json", "shards"
NUMBERS = {
    **dict.fromkeys(("num_samples", "batch_size", "num_timed_batches"), (int,)),
    **dict.fromkeys(("nfe", "flops", "seconds"), (int, float)),
    "mask_share": (int, float, type(None)),
}
"""Numbers in run.json and their types."""
MAX_NUMBER = 1e21
Pixels = npt.NDArray[np.uint8]
"""An image, (H, W, 3)."""
SAMPLES = "samples"
"""Row of the run's images; other rows hold images to compare them with."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image of a run with its label, and the images to compare it with."""

    id: int
    label: int
    """Class; -1 for none."""
    seed: int
    """Seed of the run."""
    pngs: Mapping[str, bytes]
    """PNG files by row: "samples", and in a run with `compare` also "unguided" and "masks"."""


# ------------------------------------------------------------------------------------------------------- shards


def encode_png(image: Pixels) -> bytes:
    """Encode an image, (H, W, 3) uint8."""
    file = io.BytesIO()
    PILImage.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def decode_png(png: bytes) -> Pixels:
    """Decode a PNG file to (H, W, 3) uint8.

    Raises:
        UserError: it is damaged.
    """
    try:
        with PILImage.open(io.BytesIO(png)) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises many types
        raise UserError(f"`run` must hold PNG images, and one is damaged: {type(error).__name__}.") from error


def write_shard(folder: Path, samples: Sequence[Sample]) -> Path:
    """Write samples of consecutive ids as shards/FIRST-LAST.tar; equal samples give equal bytes.

    Raises:
        UserError: the file cannot be written; no part of it remains.
    """
    path = folder / SHARDS / f"{samples[0].id:06d}-{samples[-1].id:06d}.tar"
    with atomic_file(path) as partial:
        partial.write_bytes(_encode_shard(samples))
    return path


def read_shard(path: Path) -> list[Sample]:
    """Read the samples of a shard in order of their ids, and check that writing them gives the bytes of the file.

    Raises:
        UserError: the file is damaged.
    """
    message = f"{path} is damaged. The command of its run makes it again."
    try:
        data = path.read_bytes()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        headers = [json.loads(content) for name, content in members.items() if name.endswith(".json") and name != INDEX]
        samples = [Sample(**header, pngs=_rows(f"{header['id']:06d}", members)) for header in headers]
        is_intact = bool(samples) and _encode_shard(samples) == data
    except (tarfile.TarError, OSError, LookupError, ValueError, TypeError, AttributeError, EOFError) as error:
        raise UserError(message) from error
    require(is_intact, message)
    return samples


def list_shards(folder: Path) -> dict[tuple[int, int], Path]:
    """Return the run's shards by first and last id, in order, without those whose ids another shard contains too.

    A shorter shard remains if a run is stopped between writing a longer one and deleting the shorter one.
    """
    paths = {}
    for path in (folder / SHARDS).glob("*-*.tar"):
        first, _, last = path.stem.partition("-")
        if first.isdecimal() and last.isdecimal():
            paths[int(first), int(last)] = path
    shards, end = {}, -1
    for span in sorted(paths, key=lambda span: (span[0], -span[1])):
        if span[1] > end:
            shards[span], end = paths[span], span[1]
    return shards


def count_images(folder: Path) -> int:
    """Return the number of images in the run's shards."""
    return sum(last - first + 1 for first, last in list_shards(folder))


def iter_samples(folder: Path, num_samples: int | None = None) -> Iterator[Sample]:
    """Yield the first `num_samples` samples of a run, or all, in order of ids; one shard at a time is in memory.

    Raises:
        UserError: a shard is damaged.
    """
    return islice(chain.from_iterable(map(read_shard, list_shards(folder).values())), num_samples)


def shared_ids(folders: Sequence[Path], count: int) -> list[int]:
    """Return the first `count` ids that all of these runs contain; fewer if they share fewer."""
    spans = list(list_shards(folders[0]))
    for folder in folders[1:]:
        others = list(list_shards(folder))
        overlaps = [(max(a, c), min(b, d)) for a, b in spans for c, d in others]
        spans = [(first, last) for first, last in overlaps if first <= last]
    return list(islice(chain.from_iterable(range(first, last + 1) for first, last in sorted(spans)), count))


def get_samples(folder: Path, ids: Sequence[int]) -> list[Sample]:
    """Return a run's samples of these ids, in this order; reads only the shards that contain them.

    Raises:
        UserError: a shard is damaged, or the run does not contain an id.
    """
    samples: dict[int, Sample] = {}
    for (first, last), path in list_shards(folder).items():
        if any(first <= i <= last for i in ids):
            samples |= {sample.id: sample for sample in read_shard(path)}
    missing = [i for i in ids if i not in samples]
    require(not missing, f"`run` must contain image {missing and missing[0]}, and {folder} does not.")
    return [samples[i] for i in ids]


def _encode_shard(samples: Sequence[Sample]) -> bytes:
    """Encode samples and their index. Owner, mode and time are tarfile's defaults: root, 0644, 1970."""
    members = [member for sample in samples for member in _members(sample)]
    index = {name: {"length": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in members}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in (*members, (INDEX, _to_json(index))):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return file.getvalue()


def _members(sample: Sample) -> Iterator[tuple[str, bytes]]:
    key = f"{sample.id:06d}"
    for row, png in sample.pngs.items():
        yield (f"{key}.png" if row == SAMPLES else f"{key}.{row}.png"), png
    yield f"{key}.json", _to_json({"id": sample.id, "label": sample.label, "seed": sample.seed})


def _rows(key: str, members: Mapping[str, bytes]) -> dict[str, bytes]:
    rows = {
        name.removeprefix(f"{key}.").removesuffix("png").rstrip("."): data
        for name, data in members.items()
        if name.startswith(f"{key}.") and name.endswith(".png")
    }
    return {row or SAMPLES: data for row, data in rows.items()}


def _to_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


# ----------------------------------------------------------------------------------------------------- metadata


def is_run(folder: Path) -> bool:
    """Return whether the folder has a run.json that this process may see."""
    try:
        return (folder / RUN_JSON).is_file()
    except OSError:
        return False


def read_run_json(folder: Path, argument: str = "output") -> dict[str, Any]:
    """Return the content of run.json; empty if there is none.

    Raises:
        UserError: the file is damaged; names `argument`.
    """
    path = folder / RUN_JSON
    if not path.is_file():
        return {}
    try:
        metadata = dict(json.loads(path.read_text(encoding="utf-8")))
        digest = metadata.pop("sha256", None)
        require(digest is None or digest == _digest(metadata), "other values than those written")
        for name, types in NUMBERS.items():
            value = metadata.get(name, 0)
            require(type(value) in types and 0 <= (value or 0) < MAX_NUMBER, f"{name} {value!r:.60}")
        for name in ("model", "checkpoint"):
            require(isinstance(metadata.get(name), str | None), f"{name} {metadata.get(name)!r:.60}")
        for name in ("settings", *({"exports", "versions"} & metadata.keys())):
            require(isinstance(metadata.get(name), dict), f"{name} {metadata.get(name)!r:.60}")
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"`{argument}` must have an intact {RUN_JSON}, and {path} is damaged: {error}. Delete it to start again."
        ) from error
    return metadata


def write_run_json(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write run.json, completely or not at all.

    Raises:
        UserError: it cannot be written.
    """
    with atomic_file(folder / RUN_JSON) as partial:
        partial.write_text(json.dumps({**metadata, "sha256": _digest(metadata)}, indent=2) + "\n", encoding="utf-8")


def _digest(metadata: Mapping[str, Any]) -> str:
    """Return the digest of what describes the images; the record of exports can be deleted to write them again."""
    return json_sha256({name: value for name, value in metadata.items() if name != "exports"})


def check_same_run(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check that the folder is new or empty, or contains a run of these settings.

    Settings of a guidance method whose scale is 0 or missing in both may differ.

    Args:
        folder: may be missing.
        settings: nested settings that decide an image; the number of images is not among them.

    Raises:
        UserError: it contains a run of other settings (names the first difference), or other files.
    """
    metadata = read_run_json(folder)
    if not metadata:
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        others = [path.name for path in files if path.name != LOCK_NAME and not is_partial(path)]
        require(
            not others,
            f"`output` must be a new folder or a run of sagl sample, and {folder} contains {others and others[0]}. "
            "Choose another folder.",
        )
        return
    old, new = flatten(metadata["settings"]), flatten(json.loads(json.dumps(settings)))
    scales = [name for name in (*old, *new) if name.endswith(".scale")]
    off = tuple(name.removesuffix("scale") for name in scales if not old.get(name) and not new.get(name))
    for name in dict.fromkeys((*new, *old)):
        require(
            old.get(name) == new.get(name) or name.startswith(off),
            f"`output` {folder} contains a run with {name} {old.get(name)!r}, got {new.get(name)!r}. "
            "Choose another folder, or delete this one.",
        )


# --------------------------------------------------------------------------------------- missing and broken files


def missing_batches(folder: Path, batches: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Return the batches, as consecutive ids, that no intact shard of the folder contains."""
    shards = list_shards(folder)
    return [ids for ids in batches if not any(_contains(span, path, ids) for span, path in shards.items())]


def remove_superseded(folder: Path) -> None:
    """Delete shards whose ids a longer shard contains too."""
    shards = set(list_shards(folder).values())
    for path in (folder / SHARDS).glob("*-*.tar"):
        if path not in shards:
            path.unlink()


def remove_damaged(folder: Path, batches: Sequence[Sequence[int]]) -> None:
    """Delete damaged shards that contain ids of these batches, before the batches are made again."""
    for (first, last), path in list_shards(folder).items():
        overlaps = any(ids[0] <= last and first <= ids[-1] for ids in batches)
        if overlaps and not _contains((first, last), path, (first, last)):
            path.unlink()


def _contains(span: tuple[int, int], path: Path, ids: Sequence[int]) -> bool:
    if not (span[0] <= ids[0] and ids[-1] <= span[1]):
        return False
    try:
        return [sample.id for sample in read_shard(path)] == list(range(span[0], span[1] + 1))
    except UserError:
        return False
