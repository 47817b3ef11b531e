"""Sources of labelled images, and the dataset and data module that train on them."""

import hashlib
import io
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule, Trainer

from sagl.data.dataloader import (
    CorruptImageLog,
    EpochDataset,
    ImageLoader,
    Item,
    LoaderSettings,
    ResumableDataLoader,
    StartMethod,
    eval_loader,
    rank_and_world_size,
    training_loader,
)
from sagl.data.transforms import CropResize, Pixels, decode_image
from sagl.errors import UserError, require, require_range, require_seed
from sagl.settings.network import LARGEST, ClassifierSettings, UNetSettings
from sagl.settings.sampling import MAX_BATCH_SIZE
from sagl.utils.environment import cores_per_process
from sagl.utils.files import cache_file, cache_folder, file_version

Array = np.ndarray[Any, np.dtype[Any]]
Indices = np.ndarray[tuple[int], np.dtype[np.int64]]
"""Indices of images in their source."""
NO_LABEL = -1
"""Label of an image without a class."""
RANGES = {"batch_size": (1, MAX_BATCH_SIZE), "num_workers": (0, 4096), "image_size": (1, LARGEST["image_size"])}
"""Smallest and largest values of settings of a data module."""
MAX_UNREADABLE = 100
"""Unreadable images in a row at which reading ends, as when a network folder has disappeared."""


class ImageSource(ABC):
    """Source of encoded images, read by index. It can be pickled, so that worker processes can read it."""

    num_classes: int | None = None
    """Number of classes; None if the images have no labels."""
    notes: tuple[str, ...] = ()
    """Lines for the user on what the source leaves out, and on how it numbers the classes."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read_bytes(self, index: int) -> bytes:
        """Return an image file: JPEG, PNG, WebP or another format that Pillow reads."""

    def label(self, index: int) -> int:
        """Return the class of an image, or `NO_LABEL`."""
        return NO_LABEL

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name of an image for messages."""

    def pixels(self, index: int, channels: int) -> Pixels:
        """Return an image as (H, W, channels) uint8."""
        return decode_image(self.read_bytes(index), channels)


def cached_index(file: Path, folder: str, build: Callable[[], Array]) -> Array:
    """Return `build()`, stored in a folder of the cache under the `file_version` of `file`.

    The stored file ends with its sha256, so that a damaged one is built again.
    """
    key = hashlib.sha256(file_version(file)).hexdigest()[:16]
    path = cache_folder() / folder / f"{key}.npy"
    if not _is_whole(path):
        stream = io.BytesIO()
        np.save(stream, build())
        content = stream.getvalue()
        with cache_file(path) as partial:
            partial.write_bytes(content + hashlib.sha256(content).digest())
    cached: Array = np.load(path, mmap_mode="r")
    return cached


def _is_whole(path: Path) -> bool:
    """Return whether a file exists and ends with the sha256 of what comes before."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


class ImageDataset(EpochDataset):
    """Dataset of the images `indices` of a source, cropped and resized to squares."""

    def __init__(self, source: ImageSource, indices: Indices, crop: CropResize, seed: int = 0) -> None:
        self.source, self.indices, self.crop, self.seed = source, indices, crop, seed
        self.image_shape = (crop.image_size, crop.image_size, crop.channels)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> Item:
        """Return image item mod len, augmented with the generator of (seed, item).

        The next readable image replaces a corrupt one.

        Raises:
            UserError: `MAX_UNREADABLE` images in a row, or all, are unreadable.
        """
        max_images = min(MAX_UNREADABLE, len(self))
        first_error: Exception | None = None
        for offset in range(max_images):
            index = int(self.indices[(item + offset) % len(self)])
            try:
                pixels = self.source.pixels(index, self.crop.channels)
                break
            except Exception as error:  # decoders and file systems raise many types
                first_error = first_error or error
        else:
            raise UserError(
                f"`data` must contain readable images, and none of {max_images} images in a row is readable. The first "
                f"error: {type(first_error).__name__}: {first_error}."
            ) from first_error
        square = self.crop(pixels, np.random.default_rng([self.seed, item]))
        corrupt = self.source.name(int(self.indices[item % len(self)])) if offset else ""
        return Item(square.permute(2, 0, 1), self.source.label(index), corrupt)


@dataclass(kw_only=True, eq=False)
class ImageDataModule(LightningDataModule):
    """Data module of an image source. Batches are ((B, C, H, W) uint8, (B,) int64)."""

    batch_size: int = 8
    """Images per batch and process."""
    num_workers: int | None = None
    """Worker processes per device; by default the number of cores per device, at most 8."""
    start_method: StartMethod | None = None
    """Start method of the worker processes: fork, spawn or forkserver; by default the platform's."""
    num_validation: int = 1000
    """Validation images, excluded from training; the same images for every seed."""
    num_test: int = 0
    """Test images for `sagl test`, excluded from training and validation."""
    max_corrupt_fraction: float = 0.01
    """Largest fraction of all images that may be corrupt before training ends; the next image replaces each."""
    image_size: int | None = None
    """Side of the images in pixels; by default the network's, which it must equal."""
    random_crop: bool = False
    """Crop training images at random, at 80 to 100 % of the shorter side, rather than at the centre."""
    random_flip: bool = True
    """Flip training images horizontally with probability 0.5."""
    seed: int = 0
    """Random seed of the order and the augmentation of the training images."""

    def __post_init__(self) -> None:
        super().__init__()

    @abstractmethod
    def source(self) -> ImageSource:
        """Open the image source."""

    def setup(self, stage: str) -> None:
        """Open the source, and check the settings and the labels.

        Raises:
            UserError: the source cannot be opened, a setting is out of range, or the labels do not fit the network.
        """
        self.images = self.source()
        if rank_and_world_size(self.trainer)[0] == 0:
            for note in self.images.notes:
                print(note, file=sys.stderr)
        for name, (low, high) in RANGES.items():
            if (value := getattr(self, name)) is not None:
                require_range(f"data.{name}", value, low, high)
        for name in ("num_validation", "num_test"):
            require(getattr(self, name) >= 0, f"`data.{name}` must be at least 0, got {getattr(self, name)}.")
        require_seed("data.seed", self.seed)
        require(
            self.num_validation + self.num_test < len(self.images),
            f"`data.num_validation` + `data.num_test` must be less than {len(self.images)}, the number of images, "
            f"got {self.num_validation} + {self.num_test}.",
        )
        require_range("data.max_corrupt_fraction", self.max_corrupt_fraction, 0, 1)
        if network := network_in_training(self.trainer):
            check_classes(self.images.num_classes, network)

    def train_dataloader(self) -> ResumableDataLoader:
        crop = self._crop(random_crop=self.random_crop, random_flip=self.random_flip)
        indices = self._shuffled_indices[self.num_validation + self.num_test :]
        dataset = ImageDataset(self.images, indices, crop, self.seed)
        return training_loader(dataset, self._loader_settings, self.seed, self.trainer, self.corrupt_log)

    def val_dataloader(self) -> ImageLoader:
        return self._eval_loader(slice(self.num_validation), "data.num_validation")

    def test_dataloader(self) -> ImageLoader:
        require(self.num_test > 0, "`data.num_test` must be at least 1 to test, got 0. Give the value of the training.")
        return self._eval_loader(slice(self.num_validation, self.num_validation + self.num_test), "data.num_test")

    def _eval_loader(self, part: slice, argument: str) -> ImageLoader:
        dataset = ImageDataset(self.images, self._shuffled_indices[part], self._crop())
        return eval_loader(dataset, self._loader_settings, self.trainer, argument, self.corrupt_log)

    @property
    def _loader_settings(self) -> LoaderSettings:
        num_devices = self.trainer.num_devices if self.trainer else 1
        num_workers = self.num_workers
        if num_workers is None:
            num_workers = min(8, cores_per_process(num_devices))
        return LoaderSettings(batch_size=self.batch_size, num_workers=num_workers, start_method=self.start_method)

    @cached_property
    def corrupt_log(self) -> CorruptImageLog:
        """Log of corrupt images: corrupt_images.txt in the run folder, corrupt_images_RANK.txt for ranks above 0.

        The limit is the same on each rank: every epoch distributes the images anew, so each rank meets all of them.
        """
        rank, _ = rank_and_world_size(self.trainer)
        path = None
        if self.trainer and self.trainer.state.fn == "fit" and not getattr(self.trainer, "fast_dev_run", False):
            path = Path(self.trainer.default_root_dir) / f"corrupt_images{f'_{rank}' if rank else ''}.txt"
        return CorruptImageLog(path, math.ceil(self.max_corrupt_fraction * len(self.images)))

    @property
    def has_labels(self) -> bool:
        """True if the images have classes."""
        return self.images.num_classes is not None

    @property
    def _shuffled_indices(self) -> Indices:
        """Order that splits the images into validation, test and training; independent of the seed."""
        return np.random.default_rng(0).permutation(len(self.images))

    def _crop(self, *, random_crop: bool = False, random_flip: bool = False) -> CropResize:
        size, channels = self.image_size, 3
        if network := network_in_training(self.trainer):
            require(
                size in (None, network.image_size),
                f"`data.image_size` must be the network's {network.image_size}, or left out, got {size}. Another size "
                "needs a network with this image_size.",
            )
            size, channels = network.image_size, network.in_channels
            require(
                channels in (1, 3),
                f"`data` are read as greyscale or RGB images, and the network has in_channels {channels}. Set "
                "in_channels to 1 or 3.",
            )
        if not size:
            raise UserError("`data.image_size` must be given without a network.")
        return CropResize(image_size=size, channels=channels, random_crop=random_crop, random_flip=random_flip)


def network_in_training(trainer: Trainer | None) -> UNetSettings | ClassifierSettings | None:
    """Return the settings of the network in training, if there is one."""
    return getattr(trainer and trainer.lightning_module, "network_settings", None)


def check_classes(num_classes: int | None, network: UNetSettings | ClassifierSettings) -> None:
    """Compare the number of classes of images with that of a network.

    Raises:
        UserError: the network needs labels, and there are none; or it has fewer classes.
    """
    if network.num_classes is None:
        return
    has_null_label = isinstance(network, UNetSettings) and network.null_label
    require(
        num_classes is not None or has_null_label,
        f"`data` must have labels for a network of {network.num_classes} classes, and these images have none.",
    )
    require(
        (num_classes or 0) <= network.num_classes,
        f"`data` must have at most {network.num_classes} classes, the network's number, got {num_classes}.",
    )
