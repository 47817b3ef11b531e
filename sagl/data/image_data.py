"""Pictures of any size made into the squares that a network is trained on, as ADM cuts them."""

import io
import math
import warnings
from abc import abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor
from torchvision import io as io_of_torchvision

from sagl.data.dataloader import (
    CorruptImageLog,
    Drawn,
    Images,
    Loader,
    LoaderSettings,
    ResumableDataLoader,
    StartMethod,
    eval_loader,
    training_loader,
)
from sagl.errors import UserError, require
from sagl.settings.network import UNetSettings
from sagl.utils.environment import available_cpus

Indices = np.ndarray[tuple[int], np.dtype[np.int64]]
"""Of pictures in their source."""
Pixels = Tensor
"""(H, W, C) uint8."""
RGB = getattr(getattr(io_of_torchvision, "ImageReadMode", None), "RGB", None)
"""torchvision's name for it; None where it has no decoder any more, which it says it will not have for ever."""
JPEG_BEGINS, JPEG_ENDS = b"\xff\xd8", b"\xff\xd9"
NO_LABEL = -1
"""Label of a picture whose set has no classes."""
LARGEST_CROP = 0.8
"""A random crop shows at least this share of the shorter side."""


class Source(Protocol):
    """Encoded pictures by index, wherever they are kept; can be sent to another process."""

    num_classes: int | None
    """None where the pictures carry no labels."""

    def __len__(self) -> int:
        """How many there are."""

    def encoded(self, index: int) -> bytes:
        """The file's bytes: JPEG, PNG, WebP or another kind that Pillow reads."""

    def label(self, index: int) -> int:
        """Class of a picture, or `NO_LABEL`."""

    def name(self, index: int) -> str:
        """What to call a picture in a message."""

    def pixels(self, index: int, channels: int) -> Pixels:
        """The picture itself, (H, W, channels); sources that subclass this one have it from `encoded`."""
        return decoded(self.encoded(index), channels)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a picture becomes a square."""

    side: int
    """Pixels."""
    channels: int
    """3 for RGB, 1 for grey."""
    random_crop: bool = False
    """Cut anywhere, at 80 to 100 % of the shorter side; otherwise from the centre, as large as can be."""
    random_flip: bool = False
    """Mirror every second picture, left to right."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of all that it cuts."""
        return self.side, self.side, self.channels

    def square(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """A picture of any size -> (side, side, C), drawn from `rng` where something is random."""
        shorter = self.side
        if self.random_crop:
            shorter = int(rng.integers(self.side, int(self.side / LARGEST_CROP) + 1))
        pixels = shrunk(pixels, shorter)
        spare = (pixels.shape[1] - self.side, pixels.shape[0] - self.side)
        left, top = (int(rng.integers(s + 1)) if self.random_crop else s // 2 for s in spare)
        square = pixels[top : top + self.side, left : left + self.side]
        return square.flip(1) if self.random_flip and rng.random() < 0.5 else square


def shrunk(pixels: Pixels, shorter: int) -> Pixels:
    """A picture whose shorter side is `shorter` pixels: halved by means of 2x2 while it is twice that, then bicubic."""
    if min(pixels.shape[:2]) == shorter:
        return pixels
    picture = Image.fromarray(pixels.numpy() if pixels.shape[2] == 3 else pixels[:, :, 0].numpy())
    while min(picture.size) >= 2 * shorter:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = shorter / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    return _pixels(picture.resize(size, Image.Resampling.BICUBIC))


def decoded(data: bytes, channels: int) -> Pixels:
    """An encoded picture -> (H, W, channels) uint8: JPEGs by torchvision, which is quicker; others by Pillow.

    Raises:
        Exception: it is damaged; Pillow says so in many ways.
    """
    if (
        RGB and channels == 3 and data[:2] == JPEG_BEGINS and data[-2:] == JPEG_ENDS
    ):  # cut off, it would be filled with grey
        with suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return io_of_torchvision.decode_jpeg(encoded, RGB).permute(1, 2, 0)
    return _pixels(Image.open(io.BytesIO(data)).convert("RGB" if channels == 3 else "L"))


def _pixels(picture: Image.Image) -> Pixels:
    pixels = torch.from_numpy(np.array(picture))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


class Pictures(Images):
    """Part of a source, cut: item -> ((C, side, side) uint8, () int64)."""

    def __init__(self, source: Source, indices: Indices, cut: Cut, seed: int = 0) -> None:
        """The pictures `indices` of `source`; what is random is drawn from (seed, item)."""
        self.source, self.indices, self.cut, self.seed = source, indices, cut, seed

    def __len__(self) -> int:
        """Of `indices`."""
        return len(self.indices)

    def __getitem__(self, item: int) -> Drawn:
        """Picture item mod len, augmented as in epoch item // len; in a damaged one's stead the next that is whole.

        Raises:
            UserError: none is.
        """
        asked = item % len(self)
        for step in range(len(self)):
            place = int(self.indices[(asked + step) % len(self)])
            if (pixels := self._decoded(place)) is not None:
                break
        else:
            raise UserError(f"`data` must be pictures that can be read, and not one of {len(self)} is.")
        square = self.cut.square(pixels, np.random.default_rng([self.seed, item]))
        damaged = int(self.indices[asked]) if step else -1
        return square.permute(2, 0, 1), self.source.label(place), damaged

    def _decoded(self, place: int) -> Pixels | None:
        """The picture, whole; None where it cannot be read, which the file system and decoders say in many ways."""
        try:
            return self.source.pixels(place, self.cut.channels)
        except Exception:
            return None


@dataclass(kw_only=True, eq=False)
class ImageDataModule(LightningDataModule):
    """A source's pictures, some of them kept for validation; batches of ((B, C, H, W) uint8, (B,) int64)."""

    batch_size: int = 8
    """Images a batch and process."""
    num_workers: int | None = None
    """Processes that read and cut, for each device; left out, as many as there are cores for it, and at most 8."""
    start_method: StartMethod | None = None
    """How these processes begin: fork, spawn or forkserver; left out, as the platform has it."""
    num_validation: int = 1000
    """Pictures, the same ones for every seed, that validation looks at and training does not."""
    num_test: int = 0
    """As many more that only `sagl test` looks at."""
    max_corrupt_fraction: float = 0.01
    """Share of the pictures, rounded up, that may be damaged: the next whole one stands in for each."""
    image_size: int | None = None
    """Side in pixels; the network's where it is left out."""
    random_crop: bool = False
    """Cut anywhere, at 80 to 100 % of the shorter side; otherwise from the centre."""
    random_flip: bool = True
    """Mirror every second training picture."""
    seed: int = 0
    """Of the order of the training pictures and of their augmentations."""

    def __post_init__(self) -> None:
        """Nothing is opened yet."""
        super().__init__()

    @abstractmethod
    def source(self) -> Source:
        """The pictures, found and listed."""

    def setup(self, stage: str) -> None:
        """Find the pictures, and see that they suit the network.

        Raises:
            UserError: there are none, or the network wants labels that they do not have.
        """
        self.pictures = self.source()
        for name in ("num_validation", "num_test"):
            require(getattr(self, name) >= 0, f"`data.{name}` must be at least 0, got {getattr(self, name)}.")
        require(
            self.num_validation + self.num_test < len(self.pictures),
            f"`data.num_validation` must leave pictures to train on: there are {len(self.pictures)}, "
            f"got {self.num_validation}, and {self.num_test} as `data.num_test`.",
        )
        require(
            0 <= self.max_corrupt_fraction <= 1,
            f"`data.max_corrupt_fraction` must be in [0, 1], got {self.max_corrupt_fraction}.",
        )
        if network := self._network():
            _require_suitable(self.pictures, network)

    def train_dataloader(self) -> ResumableDataLoader:
        """All but the validation and test pictures, augmented, in a new order each epoch."""
        cut = self._cut(random_crop=self.random_crop, random_flip=self.random_flip)
        images = Pictures(self.pictures, self._drawn()[self.num_validation + self.num_test :], cut, self.seed)
        return training_loader(images, self._reading(), self.seed, self.trainer)

    def val_dataloader(self) -> Loader:
        """The validation pictures, cut from the centre."""
        return self._in_order(self._drawn()[: self.num_validation])

    def test_dataloader(self) -> Loader:
        """The test pictures, cut from the centre.

        Raises:
            UserError: there are none.
        """
        require(self.num_test > 0, "`data.num_test` must be at least 1 for sagl test, got 0. Give the run's own.")
        return self._in_order(self._drawn()[self.num_validation : self.num_validation + self.num_test])

    def _in_order(self, indices: Indices) -> Loader:
        return eval_loader(Pictures(self.pictures, indices, self._cut()), self._reading(), self.trainer)

    def _reading(self) -> LoaderSettings:
        devices = self.trainer.num_devices if self.trainer else 1
        workers = min(8, max(1, available_cpus() // devices)) if self.num_workers is None else self.num_workers
        return LoaderSettings(
            batch_size=self.batch_size,
            num_workers=workers,
            start_method=self.start_method,
            shape=self._cut().shape,
            damaged=self._damaged,
            name=self.pictures.name,
        )

    @cached_property
    def _damaged(self) -> CorruptImageLog:
        """Of all loaders together: damaged.txt in the run's folder, one more for each further process."""
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        fitting = trainer is not None and trainer.state.fn == "fit"
        name = f"damaged_{rank}.txt" if rank else "damaged.txt"
        report = Path(trainer.default_root_dir) / name if trainer is not None and fitting else None
        return CorruptImageLog(report, math.ceil(self.max_corrupt_fraction * len(self.pictures) / world_size))

    def _drawn(self) -> Indices:
        return np.random.default_rng(0).permutation(len(self.pictures))

    def _cut(self, *, random_crop: bool = False, random_flip: bool = False) -> Cut:
        network = self._network()
        side = self.image_size or (network.image_size if network else None)
        require(side is not None, "`data.image_size` must be given where no network says it.")
        assert side is not None
        channels = network.in_channels if network else 3
        return Cut(side=side, channels=channels, random_crop=random_crop, random_flip=random_flip)

    def _network(self) -> UNetSettings | None:
        """Of the module in training."""
        return getattr(self.trainer and self.trainer.lightning_module, "network_settings", None)


def _require_suitable(source: Source, network: UNetSettings) -> None:
    classes = network.num_classes
    if classes is None:
        return
    require(
        source.num_classes is not None or network.null_label,
        f"`data` must have labels for a network of {classes} classes, and these pictures have none.",
    )
    require(
        (source.num_classes or 0) <= classes,
        f"`data` must have at most {classes} classes, those of the network, got {source.num_classes}.",
    )
