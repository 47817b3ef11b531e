"""The order in which training sees images, and a loader that goes on in the middle of it after a restart."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from sagl.settings.errors import require

Pair = tuple[Tensor, Tensor]
"""An image (C, H, W) uint8 and its label () int64, or a batch of both."""


class Images(Dataset[Pair]):
    """Labelled images. Item epoch * len + index is image `index`, augmented as in that epoch."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    def __iter__(self) -> Iterator[Pair]:
        """All of them, as in epoch 0; without it a `for` loop would go on through all epochs."""
        return (self[index] for index in range(len(self)))


class TrainingOrder(Sampler[int]):
    """Every image once an epoch, in an order drawn from (seed, epoch), every rank its share.

    Yields epoch * count + index, so that one number says both which image, and which of its augmentations. The
    images of a global batch are the same for any number of ranks.
    """

    def __init__(self, count: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """Over `count` images, of which `rank` sees every `world_size`-th."""
        self.count, self.seed, self.rank, self.world_size = count, seed, rank, world_size
        self.done = 0

    def __len__(self) -> int:
        """Images a rank sees in one epoch: the same for all ranks, so up to world_size - 1 are left out."""
        return self.count // self.world_size

    def __iter__(self) -> Iterator[int]:
        """The rest of the epoch in which image `done` of this rank lies."""
        epoch, first = divmod(self.done, max(1, len(self)))
        order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        shown = order[: len(self) * self.world_size][self.rank :: self.world_size]
        yield from (epoch * self.count + shown[first:]).tolist()


class TrainingLoader(DataLoader[Pair]):
    """Whole batches in `TrainingOrder`; Lightning saves how far it has come, and gives it back on a resume."""

    def __init__(self, images: Images, order: TrainingOrder, batch_size: int, num_workers: int) -> None:
        """Batches of `batch_size` images of this rank."""
        self.order = order
        super().__init__(
            images,
            batch_size,
            sampler=order,
            drop_last=True,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        )

    def __iter__(self) -> Any:  # noqa: ANN401 (DataLoader's own iterator type is private)
        """Batches from where the order stands to the end of the epoch."""
        for batch in super().__iter__():
            self._count(len(batch[0]))
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Images that all ranks together have seen; what epochs left out at their ends counts as seen."""
        epoch, seen = divmod(self.order.done, len(self.order))
        return {"images": epoch * self.order.count + seen * self.order.world_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the images of `state_dict`, with another number of ranks if need be."""
        epoch, seen = divmod(state["images"], self.order.count)
        self.order.done = epoch * len(self.order) + min(seen // self.order.world_size, len(self.order))
        self._count(0)

    def _count(self, images: int) -> None:
        self.order.done += images
        rest = -self.order.done % len(self.order)
        if rest < (self.batch_size or 1):
            self.order.done += rest  # too few for a batch: the next epoch begins


def training_loader(
    images: Images, batch_size: int, num_workers: int, seed: int, trainer: Trainer | None
) -> TrainingLoader:
    """The loader of this rank.

    Raises:
        UserError: there are too few images for one batch.
    """
    rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
    share = len(images) // world_size
    require(
        share >= batch_size,
        f"`data.batch_size` must be at most {share}, the training images of a process, got {batch_size}.",
    )
    return TrainingLoader(images, TrainingOrder(len(images), seed, rank, world_size), batch_size, num_workers)


def validation_loader(images: Images, batch_size: int, num_workers: int, trainer: Trainer | None) -> DataLoader[Pair]:
    """This rank's share, every `world_size`-th image, in their own order."""
    rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
    return DataLoader(Subset(images, range(rank, len(images), world_size)), batch_size, num_workers=num_workers)
