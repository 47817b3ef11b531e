"""Pictures of any size made into the squares that a network is trained on, as ADM cuts them."""

import io
from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader

from sagl.data.loading import Images, Pair, TrainingLoader, training_loader, validation_loader
from sagl.settings.errors import UserError, require
from sagl.settings.network import UNetSettings

Indices = np.ndarray[tuple[int], np.dtype[np.int64]]
"""Of pictures in their source."""
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

    def picture(self, index: int) -> Image.Image:
        """The picture itself; sources that subclass this one have it from `encoded`."""
        return decoded(self.encoded(index))


def decoded(encoded: bytes) -> Image.Image:
    """A picture of a file's bytes; Pillow reads its pixels when they are asked for."""
    return Image.open(io.BytesIO(encoded))


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

    def square(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        """A picture of any size -> side x side, drawn from `rng` where something is random."""
        shorter = self.side
        if self.random_crop:
            shorter = int(rng.integers(self.side, int(self.side / LARGEST_CROP) + 1))
        scaled = shrunk(picture, shorter)
        spare = (scaled.width - self.side, scaled.height - self.side)
        left, top = (int(rng.integers(s + 1)) if self.random_crop else s // 2 for s in spare)
        square = scaled.crop((left, top, left + self.side, top + self.side))
        mirrored = self.random_flip and rng.random() < 0.5
        return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else square


def shrunk(picture: Image.Image, shorter: int) -> Image.Image:
    """A picture whose shorter side is `shorter` pixels: halved by means of 2x2 while it is twice that, then bicubic."""
    while min(picture.size) >= 2 * shorter:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = shorter / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.resize(size, Image.Resampling.BICUBIC)


class Pictures(Images):
    """Part of a source, cut: item -> ((C, side, side) uint8, () int64)."""

    def __init__(self, source: Source, indices: Indices, cut: Cut, seed: int = 0) -> None:
        """The pictures `indices` of `source`; what is random is drawn from (seed, item)."""
        self.source, self.indices, self.cut, self.seed = source, indices, cut, seed

    def __len__(self) -> int:
        """Of `indices`."""
        return len(self.indices)

    def __getitem__(self, item: int) -> Pair:
        """Picture item mod len, augmented as in epoch item // len.

        Raises:
            UserError: it cannot be decoded.
        """
        index = int(self.indices[item % len(self)])
        picture = self._decoded(index)
        square = self.cut.square(picture, np.random.default_rng([self.seed, item]))
        pixels = np.array(square).reshape(self.cut.side, self.cut.side, self.cut.channels)
        return torch.from_numpy(pixels).permute(2, 0, 1), torch.tensor(self.source.label(index))

    def _decoded(self, index: int) -> Image.Image:
        try:
            return self.source.picture(index).convert("RGB" if self.cut.channels == 3 else "L")
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(
                f"`data` must be pictures that can be read, and {self.source.name(index)} is damaged."
            ) from error


@dataclass(kw_only=True, eq=False)
class PictureData(LightningDataModule):
    """A source's pictures, some of them kept for validation; batches of ((B, C, H, W) uint8, (B,) int64)."""

    batch_size: int = 8
    """Images a batch and process."""
    num_workers: int = 4
    """Processes that read and cut."""
    num_validation: int = 1000
    """Pictures, the same ones for every seed, that validation looks at and training does not."""
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
        require(
            0 <= self.num_validation < len(self.pictures),
            f"`data.num_validation` must leave pictures to train on: there are {len(self.pictures)}, "
            f"got {self.num_validation}.",
        )
        if network := self._network():
            _require_suitable(self.pictures, network)

    def train_dataloader(self) -> TrainingLoader:
        """All but the validation pictures, augmented, in a new order each epoch."""
        cut = self._cut(random_crop=self.random_crop, random_flip=self.random_flip)
        images = Pictures(self.pictures, self._drawn()[self.num_validation :], cut, self.seed)
        return training_loader(images, self.batch_size, self.num_workers, self.seed, self.trainer)

    def val_dataloader(self) -> DataLoader[Pair]:
        """The validation pictures, cut from the centre."""
        images = Pictures(self.pictures, self._drawn()[: self.num_validation], self._cut())
        return validation_loader(images, self.batch_size, self.num_workers, self.trainer)

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
