"""Sets of images to evaluate, read by index: a sampling run, an npz file, a named split or any image source."""

import hashlib
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from sagl.data.emoji import read_split
from sagl.data.fashion_mnist import PaddedFashionMNIST, prepare_fashion_mnist
from sagl.data.image_data import ImageSource
from sagl.data.registry import open_image_source
from sagl.data.transforms import CropResize
from sagl.errors import UserError, require
from sagl.sampling.run_folder import SAMPLES, Pixels, Sample, decode_png, list_shards, read_shard
from sagl.settings.evaluation import NAMED_SETS, require_image_set
from sagl.shapes import ImageUint8
from sagl.utils.files import cache_folder, file_version, sha256
from sagl.utils.listing import list_folder

DIGEST_DIGITS = 16
"""Hex digits of a digest that are stored with a result."""
MAX_UNREADABLE_FRACTION = 0.01
"""Largest fraction of the images of a source that may be left out because they cannot be decoded."""
Size = tuple[int, int]
"""(H, W) in pixels."""


class ImageSet(ABC):
    """Images of one size."""

    crop_size: int | None = None
    """Size that images are cropped and resized to; None if they are not."""
    preprocessing_note: str = ""
    """Description of the preprocessing, empty if there is none."""
    source_notes: tuple[str, ...] = ()
    """Lines for the user on what the source leaves out."""
    unreadable: Sequence[str] = ()
    """Names of the images that `read` could not decode so far, with the reasons."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, start: int, stop: int) -> ImageUint8:
        """Return images `start` to `stop` - 1: (n, 1 or 3, H, W) uint8; those that cannot be decoded are left out.

        Raises:
            UserError: a run or an npz file is damaged, or an image has another size.
        """

    def digest(self) -> str:
        """Return the sha256 of all images as they are stored; empty for images that never change."""
        return ""

    @property
    def image_size(self) -> Size:
        """Size of the first image."""
        height, width = self.read(0, 1).shape[-2:]
        return height, width


class TensorImages(ImageSet):
    """Images in memory: (N, 1 or 3, H, W) uint8."""

    def __init__(self, images_uint8: ImageUint8, version: str = "") -> None:
        """Hold images; `version` identifies those of a named set that can change."""
        self._images, self.version = images_uint8, version

    def __len__(self) -> int:
        return len(self._images)

    def read(self, start: int, stop: int) -> ImageUint8:
        return self._images[start:stop]

    def digest(self) -> str:
        return self.version


class RunImages(ImageSet):
    """The images of a run of `sagl sample`, in order of their ids; shards are read and checked when needed."""

    def __init__(self, folder: Path) -> None:
        shards = list_shards(folder)
        self._paths = list(shards.values())
        self._ends = list(accumulate(last - first + 1 for first, last in shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> ImageUint8:
        """Return images start … stop - 1, from one shard or several."""
        images: list[Pixels] = []
        shard = bisect_right(self._ends, start)
        while len(images) < stop - start:
            samples = _read_shard(self._paths[shard])
            first = start + len(images) - (self._ends[shard] - len(samples))
            images += [
                decode_png(sample.pngs[SAMPLES]) for sample in samples[first : first + stop - start - len(images)]
            ]
            shard += 1
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def digest(self) -> str:
        return _sha256(sample.pngs[SAMPLES] for path in self._paths for sample in read_shard(path))


class SourceImages(ImageSet):
    """The images of a source in colour, at their original size or cropped and resized as for training."""

    def __init__(self, source: ImageSource, crop_size: int | None) -> None:
        self.source, self.crop_size = source, crop_size
        self.source_notes = source.notes
        self.unreadable: list[str] = []
        self._crop = None if crop_size is None else CropResize(image_size=crop_size, channels=3)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def preprocessing_note(self) -> str:  # type: ignore[override]
        size = self.crop_size
        if size is None or self._first.shape[:2] == (size, size):
            return ""
        return f"Images, the first of {_size(self._first)} pixels, are cropped and resized to {size}×{size}."

    @property
    def image_size(self) -> Size:
        height, width = (self.crop_size,) * 2 if self.crop_size else self._first.shape[:2]
        return height, width

    def read(self, start: int, stop: int) -> ImageUint8:
        """Return those of images start … stop - 1 that can be decoded.

        Raises:
            UserError: the images have several sizes, and there is no `crop_size`.
        """
        images: list[torch.Tensor] = []
        for index in range(start, stop):
            if (image := self._decode(index, self.unreadable)) is None:
                continue
            if self._crop is not None:
                images.append(self._crop(image, np.random.default_rng(0)))
                continue
            require(
                image.shape == self._first.shape,
                f"`image_size` must be given for images of several sizes: {self.source.name(index)} has "
                f"{_size(image)} pixels, the first image {_size(self._first)}. All are then cropped and resized.",
            )
            images.append(image)
        return torch.stack(images).permute(0, 3, 1, 2) if images else torch.empty((0, 3, 1, 1), dtype=torch.uint8)

    def digest(self) -> str:
        return _sha256(self._read_bytes(index) for index in range(len(self)))

    def _read_bytes(self, index: int) -> bytes:
        try:
            return self.source.read_bytes(index)
        except OSError as error:
            raise UserError(f"{self.source.name(index)} cannot be read: {error.strerror}.") from error

    @cached_property
    def _first(self) -> torch.Tensor:
        """The first image that can be decoded, (H, W, 3)."""
        unreadable: list[str] = []
        for index in range(len(self)):
            if (image := self._decode(index, unreadable)) is not None:
                return image
            require_few_unreadable(unreadable, len(self))
        raise AssertionError("an image set is not empty")

    def _decode(self, index: int, unreadable: list[str]) -> torch.Tensor | None:
        """Return an image; if it cannot be decoded, add its name to `unreadable` and return None."""
        try:
            return self.source.pixels(index, 3)
        except Exception as error:  # decoders and file systems raise many types
            unreadable.append(f"{self.source.name(index)} ({type(error).__name__}: {error})")
            return None


def require_few_unreadable(names: Sequence[str], num_images: int) -> None:
    """Refuse a set of which more than `MAX_UNREADABLE_FRACTION` cannot be decoded.

    Raises:
        UserError: names the last of the images.
    """
    require(
        len(names) <= MAX_UNREADABLE_FRACTION * num_images,
        f"{len(names)} of {num_images} images cannot be decoded, and {MAX_UNREADABLE_FRACTION:.0%} are allowed. The "
        f"last of them is {names and names[-1]}. Repair or remove it.",
    )


def describe_unreadable(num_images: int, num_read: int) -> str:
    """Return how many images were left out because they cannot be decoded, empty if none was."""
    num_unreadable = num_images - num_read
    return f"{num_unreadable} of {num_images} images cannot be decoded and are left out." if num_unreadable else ""


def open_image_set(name: str, image_size: int | None = None, argument: str = "images") -> ImageSet:
    """Open a set of at least two images.

    Args:
        name: one of `NAMED_SETS`, the folder of a run, or a path for `open_image_source`.
        image_size: size to crop and resize images of a source to; those of a run or an npz file stay as they are.
        argument: name of the argument in messages.

    Raises:
        UserError: there are no or too few images.
    """
    images = _open(name, image_size, argument)
    require(len(images) >= 2, f"`{argument}` must hold at least 2 images, and {name} holds {len(images)}.")
    return images


def _open(name: str, image_size: int | None, argument: str) -> ImageSet:
    if name in NAMED_SETS:
        return _open_named(name, argument)
    path = Path(name)
    if os.path.isdir(path) and list_shards(path):
        return RunImages(path)
    require_image_set(name, argument)
    source = open_image_source(name, argument=argument)
    return SourceImages(source, None if path.suffix.lower() == ".npz" else image_size)


def _open_named(name: str, argument: str) -> TensorImages:
    train = name.endswith("_train")
    if name.startswith("emoji"):
        return TensorImages(*read_split(train=train, argument=argument))
    prepare_fashion_mnist(cache_folder())
    return TensorImages(PaddedFashionMNIST(cache_folder(), train=train).images)


def cache_key(name: str, images: ImageSet) -> str | None:
    """Return a key that changes with the names, sizes and times of the files at a path.

    Args:
        name: the name of the set, or a path. None is returned for a pattern.
        images: the opened set.
    """
    path = Path(name)
    if isinstance(images, TensorImages):
        return "-".join(filter(None, [name, images.version]))
    if not path.exists():
        return None
    digest = hashlib.sha256(os.fsencode(path.resolve()))
    for file in _files(path):
        digest.update(file_version(file))
    return f"{path.stem}-{digest.hexdigest()[:16]}"


def content_digest(name: str, images: ImageSet) -> str:
    """Return a digest of the content of an image set, the same on any machine; empty for images that never change.

    It is the sha256 of a file, otherwise of the images.
    """
    path = Path(name)
    return (sha256(path) if path.is_file() else images.digest())[:DIGEST_DIGITS]


def _files(path: Path) -> list[Path]:
    return [path / name for name in list_folder(path, "path").files] if path.is_dir() else [path]


@lru_cache(maxsize=2)
def _read_shard(path: Path) -> Sequence[Sample]:
    return read_shard(path)


def _sha256(contents: Iterable[bytes]) -> str:
    """Return the digest of several byte strings in order, each with its length."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _size(image: torch.Tensor) -> str:
    return f"{image.shape[1]}×{image.shape[0]}"
