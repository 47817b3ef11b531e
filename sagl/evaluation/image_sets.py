"""Images to be measured, by their place, wherever they are: a run, an npz, a data set or any source of pictures."""

import hashlib
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from sagl.data.fashion_mnist import PaddedFashionMNIST, prepare_fashion_mnist
from sagl.data.image_data import ImageSource
from sagl.data.registry import open_image_source
from sagl.data.transforms import CropResize
from sagl.errors import UserError, require
from sagl.sampling.run_folder import SAMPLES, SHARDS, Pixels, Sample, pixels, read_shard, shards_of
from sagl.shapes import ImageUint8
from sagl.utils.files import cache_folder, sha256

SPLITS = ("fashion_mnist_train", "fashion_mnist_test")
"""Of Fashion-MNIST, padded to 32×32 as the embedded network saw it."""
RUN = ", a run of sagl sample, an npz, a folder of pictures, LSUN's LMDB or shards"


class ImageSet(Protocol):
    """Images of one size."""

    note: str = ""
    """What was done to them, where that is not nothing."""

    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def images(self, start: int, stop: int) -> ImageUint8:
        """Those from `start` to before `stop`: (n, 1 or 3, H, W) uint8.

        Raises:
            UserError: one is damaged, or of another size.
        """

    @property
    def side(self) -> tuple[int, int]:
        """(H, W) of the first."""
        height, width = self.images(0, 1).shape[-2:]
        return height, width


class RunImages(ImageSet):
    """The images of a run of `sagl sample`, in order of their ids."""

    def __init__(self, folder: Path) -> None:
        """List its shards; each is read, and checked, when it is needed."""
        shards = shards_of(folder)
        self._paths, spans = list(shards.values()), list(shards)
        self._ends = list(accumulate(last - first + 1 for first, last in spans))

    def __len__(self) -> int:
        """Images in its shards."""
        return self._ends[-1] if self._ends else 0

    def images(self, start: int, stop: int) -> ImageUint8:
        """From as many shards as it takes."""
        found: list[Pixels] = []
        place = bisect_right(self._ends, start)
        while len(found) < stop - start:
            samples = _shard(self._paths[place])
            first = start + len(found) - (self._ends[place] - len(samples))
            found += [pixels(sample.pictures[SAMPLES]) for sample in samples[first : first + stop - start - len(found)]]
            place += 1
        return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


class TensorImages(ImageSet):
    """Images in memory."""

    def __init__(self, images_uint8: ImageUint8) -> None:
        """(N, 1 or 3, H, W) uint8."""
        self._images = images_uint8

    def __len__(self) -> int:
        """N."""
        return len(self._images)

    def images(self, start: int, stop: int) -> ImageUint8:
        """A part of them."""
        return self._images[start:stop]


class SourceImages(ImageSet):
    """Pictures of a source in colour: as they are, or the square that training cuts from the centre of each."""

    def __init__(self, source: ImageSource, image_size: int | None) -> None:
        """Cut to `image_size` pixels, or None: they are all of one size."""
        self.source, self.cut = source, None if image_size is None else CropResize(image_size=image_size, channels=3)

    def __len__(self) -> int:
        """Pictures of the source."""
        return len(self.source)

    @property
    def note(self) -> str:  # type: ignore[override]
        """Whether pictures are cut, by the size of the first."""
        whole = self._whole(0)
        if self.cut is None or whole.shape[:2] == (self.cut.image_size, self.cut.image_size):
            return ""
        size = self.cut.image_size
        return f"Pictures, the first of them {_size(whole)}, are cut and resized to {size}×{size}."

    def images(self, start: int, stop: int) -> ImageUint8:
        """Decoded and cut."""
        found = [self._image(index) for index in range(start, stop)]
        for index, image in enumerate(found):
            require(
                image.shape == found[0].shape,
                f"`image_size` must be given where pictures are of several sizes: {self.source.name(start + index)} "
                f"is {_size(image)}, the one before {_size(found[0])}. With it each is cut to a square.",
            )
        return torch.stack(found).permute(0, 3, 1, 2)

    def _whole(self, index: int) -> torch.Tensor:
        try:
            return self.source.pixels(index, 3)
        except Exception as error:  # decoders and file systems say it in many ways
            raise UserError(
                f"{self.source.name(index)} cannot be read as a picture, got {type(error).__name__}. Mend it, or "
                "take it away."
            ) from error

    def _image(self, index: int) -> torch.Tensor:
        whole = self._whole(index)
        return whole if self.cut is None else self.cut(whole, np.random.default_rng(0))


def image_set(name: str, image_size: int | None = None, argument: str = "run") -> ImageSet:
    """The images that a name on the command line means.

    Args:
        name: fashion_mnist_train, fashion_mnist_test, or a path that `sources.open_image_source` knows, or a run's folder.
        image_size: pixels to which pictures are cut; a run's and an npz file's images stay as they are.
        argument: what the name was given for.

    Raises:
        UserError: there are none there.
    """
    if name in SPLITS:
        prepare_fashion_mnist(cache_folder())
        return TensorImages(PaddedFashionMNIST(cache_folder(), train=name.endswith("train")).images)
    path = _npz_of(Path(name))
    if path.is_dir() and shards_of(path):
        return RunImages(path)
    require(
        path.exists() or any(sign in name for sign in "*{:"),
        f"`{argument}` must be one of {', '.join(SPLITS)}{RUN}, and there is nothing at {name}.",
    )
    source = open_image_source(str(path), argument=argument)
    return SourceImages(source, None if path.suffix == ".npz" else image_size)


def _npz_of(path: Path) -> Path:
    """A run's npz where its shards were left behind, else the path itself."""
    left = sorted(path.glob("samples_*.npz")) if path.is_dir() and not shards_of(path) else []
    return left[0] if left else path


def fingerprint(name: str) -> str | None:
    """What tells whether images are the ones of another day: of files' names, sizes and times; None where unknown.

    Args:
        name: a split of Fashion-MNIST, whose images never change, or a path.
    """
    path = Path(name)
    if name in SPLITS:
        return name
    if not path.exists():
        return None
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256(str(path.absolute()).encode())
    for file in files:
        stat = file.stat()
        digest.update(f"{file}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    return f"{path.stem}-{digest.hexdigest()[:16]}"


def identity(name: str) -> str:
    """What tells two sets of one name apart, on any machine: sha256 of a file, of a folder's file names and sizes."""
    path = _npz_of(Path(name))
    if name in SPLITS or not path.exists():
        return ""
    if path.is_file():
        return sha256(path)[:16]
    folder = path / SHARDS if shards_of(path) else path
    files = sorted((str(file.relative_to(folder)), file.stat().st_size) for file in folder.rglob("*") if file.is_file())
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


@lru_cache(maxsize=2)
def _shard(path: Path) -> Sequence[Sample]:
    return read_shard(path)


def _size(image: torch.Tensor) -> str:
    return f"{image.shape[1]}×{image.shape[0]}"
