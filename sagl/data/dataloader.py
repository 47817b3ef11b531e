"""The order in which training sees images, and a loader that goes on in the middle of it after a restart."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler, Subset, default_collate

from sagl.data.shared_memory import NUM_PREFETCHED, SharedMemoryBatches, SlotBatchSampler
from sagl.errors import require

Pair = tuple[Tensor, Tensor]
"""An image (C, H, W) uint8 and its label () int64, or a batch of both."""
Drawn = tuple[Tensor, int, int]
"""An image, its label, and the place of the picture in whose stead it stands because that is damaged; -1: itself."""
StartMethod = Literal["fork", "spawn", "forkserver"]
"""How worker processes begin."""


class Images(Dataset[Pair | Drawn]):
    """Labelled images. Item epoch * len + index is image `index`, augmented as in that epoch."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | int]]:
        """All of them, as in epoch 0; without it a `for` loop would go on through all epochs."""
        return ((image, label) for image, label, *_ in (self[index] for index in range(len(self))))


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


class CorruptImageLog:
    """Pictures that could not be decoded: each counted once and named in a file; too many end the run.

    The file is also the memory: a run that goes on knows those of before.
    """

    def __init__(self, report: Path | None, allowed: int) -> None:
        """Named in `report`, if anywhere, and `allowed` at most."""
        self.report, self.allowed = report, allowed
        self.names = set(report.read_text().splitlines()) if report and report.exists() else set()

    def note(self, name: str) -> None:
        """Count one more, unless it is known.

        Raises:
            UserError: they are too many.
        """
        if name in self.names:
            return
        self.names.add(name)
        if self.report:
            self.report.parent.mkdir(parents=True, exist_ok=True)
            with self.report.open("a") as file:
                file.write(f"{name}\n")
        where = f": see {self.report}" if self.report else f", the last of them {name}"
        require(
            len(self.names) <= self.allowed,
            f"`data.max_corrupt_fraction` allows {self.allowed} pictures of this process that cannot be decoded, and there are "
            f"more{where}. Mend or remove them, or raise it.",
        )


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """How images are read."""

    batch_size: int
    """A process."""
    num_workers: int = 0
    """Processes that read."""
    start_method: StartMethod | None = None
    """How they begin; None: as the platform has it."""
    shape: tuple[int, int, int] | None = None
    """(H, W, C) of every image where that is known: then a batch needs no new memory on its way."""
    damaged: CorruptImageLog | None = None
    """Where damaged pictures are counted."""
    name: Callable[[int], str] = str
    """What to call a picture by its place."""


class Loader(DataLoader[Pair]):
    """Batches of pairs; damaged pictures are counted here, in the main process."""

    def __init__(
        self, images: Dataset[Any], order: Sampler[int], reading: LoaderSettings, *, whole: bool = False
    ) -> None:
        """Batches of `images` in an order; `whole`: without a last one that is smaller."""
        self.reading = reading
        batches: Any = BatchSampler(order, reading.batch_size, drop_last=whole)
        self._shared = None
        if reading.num_workers and reading.shape:
            self._shared = SharedMemoryBatches(images, reading.shape, reading.batch_size, reading.num_workers)
            batches = SlotBatchSampler(batches, len(self._shared.slots))
        super().__init__(
            self._shared or images,
            batch_sampler=batches,
            num_workers=reading.num_workers,
            persistent_workers=reading.num_workers > 0,
            prefetch_factor=NUM_PREFETCHED if reading.num_workers else None,
            multiprocessing_context=reading.start_method if reading.num_workers else None,
            collate_fn=_as_it_is if self._shared else _together,
        )

    def __iter__(self) -> Any:  # noqa: ANN401 (DataLoader's own iterator type is private)
        """Pairs; what stands for a damaged picture is one of them."""
        for batch in super().__iter__():
            images, labels, places = self._shared.taken(batch) if self._shared else batch
            if self.reading.damaged:
                for place in (place for place in places if place >= 0):
                    self.reading.damaged.note(self.reading.name(place))
            yield images, torch.tensor(labels)


def _as_it_is(sent: Any) -> Any:  # noqa: ANN401 (DataLoader takes it for a list)
    return sent


def _together(items: list[Any]) -> tuple[Tensor, list[int], list[int]]:
    """Images as one (B, C, H, W) in the network's memory format, which is how they lie; numbers travel as they are."""
    images = default_collate([image.permute(1, 2, 0) for image, *_ in items]).permute(0, 3, 1, 2)
    return images, [int(item[1]) for item in items], [int(place) for _, _, *rest in items for place in rest]


class ResumableDataLoader(Loader):
    """Whole batches in `TrainingOrder`; Lightning saves how far it has come, and gives it back on a resume."""

    def __init__(self, images: Images, order: TrainingOrder, reading: LoaderSettings) -> None:
        """Batches of this rank."""
        self.order = order
        super().__init__(images, order, reading, whole=True)

    def __iter__(self) -> Any:  # noqa: ANN401
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
        if rest < self.reading.batch_size:
            self.order.done += rest  # too few for a batch: the next epoch begins


def training_loader(images: Images, reading: LoaderSettings, seed: int, trainer: Trainer | None) -> ResumableDataLoader:
    """The loader of this rank.

    Raises:
        UserError: there are too few images for one batch.
    """
    rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
    share = len(images) // world_size
    require(
        share >= reading.batch_size,
        f"`data.batch_size` must be at most {share}, the training images of a process, got {reading.batch_size}.",
    )
    return ResumableDataLoader(images, TrainingOrder(len(images), seed, rank, world_size), reading)


def eval_loader(images: Images, reading: LoaderSettings, trainer: Trainer | None) -> Loader:
    """This rank's share, every `world_size`-th image, in their own order: of validation and tests."""
    rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
    mine = Subset(images, range(rank, len(images), world_size))
    return Loader(mine, SequentialSampler(mine), reading)
