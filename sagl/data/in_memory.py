"""Data sets that fit into memory: the dataset of their images, and the data module of their two splits."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from sagl.data.dataloader import (
    EpochDataset,
    ImageLoader,
    Item,
    LoaderSettings,
    ResumableDataLoader,
    eval_loader,
    training_loader,
)
from sagl.data.image_data import RANGES, check_classes, network_in_training
from sagl.errors import require, require_range, require_seed
from sagl.shapes import ImageUint8, Labels


class InMemoryImages(EpochDataset):
    """Dataset of labelled images, (N, C, H, W) uint8, without augmentation."""

    def __init__(self, images: ImageUint8, labels: Labels) -> None:
        self.images, self.labels = images, labels
        channels, height, width = images.shape[1:]
        self.image_shape = (height, width, channels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int) -> Item:
        return Item(self.images[item % len(self)], int(self.labels[item % len(self)]))

    def read_batch(self, items: Sequence[int], images: Tensor) -> tuple[list[int], list[str]]:
        """Read the items at once: one by one, they take longer than a training step of a small network on a GPU."""
        indices = torch.tensor(items) % len(self)
        images.copy_(self.images[indices].permute(0, 2, 3, 1))
        return self.labels[indices].tolist(), []


@dataclass(kw_only=True, eq=False)
class InMemoryData(LightningDataModule):
    """Data module of a training split and a test split. Batches are ((B, C, H, W) uint8, (B,) int64)."""

    root: str | None = None
    """Folder of the data set; by default in the cache folder."""
    batch_size: int = 64
    """Images per batch and process."""
    num_workers: int = 0
    """Worker processes; the images are in memory, so 0 is fast."""
    num_validation: int = 0
    """Validation images: the first of the test split. The others are the test images."""
    seed: int = 0
    """Random seed of the order of the training images."""

    def __post_init__(self) -> None:
        super().__init__()
        require(self.num_validation >= 0, f"`data.num_validation` must be at least 0, got {self.num_validation}.")

    def setup(self, stage: str) -> None:
        """Check the settings.

        Raises:
            UserError: one of them is out of range.
        """
        for name in ("batch_size", "num_workers"):
            require_range(f"data.{name}", getattr(self, name), *RANGES[name])
        require_seed("data.seed", self.seed)

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Folder of the data set."""

    @abstractmethod
    def split(self, *, test: bool) -> InMemoryImages:
        """Load the test split or the training split."""

    def train_dataloader(self) -> ResumableDataLoader:
        return training_loader(self._fitting_split(test=False), self._loader_settings, self.seed, self.trainer)

    def val_dataloader(self) -> ImageLoader:
        return self._eval_loader(slice(self.num_validation))

    def test_dataloader(self) -> ImageLoader:
        loader = self._eval_loader(slice(self.num_validation, None))
        require(len(loader) > 0, f"`data.num_validation` must leave images to test on, got {self.num_validation}.")
        return loader

    def _eval_loader(self, part: slice) -> ImageLoader:
        split = self._fitting_split(test=True)
        require(
            self.num_validation <= len(split),
            f"`data.num_validation` must be at most {len(split)}, the test split, got {self.num_validation}.",
        )
        dataset = InMemoryImages(split.images[part], split.labels[part])
        return eval_loader(dataset, self._loader_settings, self.trainer, "data.num_validation")

    def _fitting_split(self, *, test: bool) -> InMemoryImages:
        """Load a split, and compare its images and labels with the network in training, if there is one.

        Raises:
            UserError: the network has another image size, other channels or too few classes.
        """
        split = self.split(test=test)
        if network := network_in_training(self.trainer):
            _, channels, size, _ = split.images.shape
            require(
                (size, channels) == (network.image_size, network.in_channels),
                f"`data` has images of {size}x{size} pixels with {channels} channels, and the network is for "
                f"image_size {network.image_size} and in_channels {network.in_channels}. Choose other data, or another "
                "`model.network`.",
            )
            check_classes(int(split.labels.max()) + 1, network)
        return split

    @property
    def _loader_settings(self) -> LoaderSettings:
        return LoaderSettings(batch_size=self.batch_size, num_workers=self.num_workers)
