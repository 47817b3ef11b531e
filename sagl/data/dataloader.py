"""Resumable and distributed loading of images: datasets, the sampler and the data loaders."""

import shutil
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from sagl.errors import UserError, require
from sagl.shapes import ImageUint8, Labels
from sagl.utils.signals import block_stop_signals, obey_stop_signals_of_parent

Batch = tuple[ImageUint8, Labels]
StartMethod = Literal["fork", "spawn", "forkserver"]
"""Start method of worker processes."""
SHARED_MEMORY = Path("/dev/shm")
QUEUE_BYTES = 16 * 4096
"""Shared memory of the locks of a worker's queues, a page each; an upper bound."""
NUM_PREFETCHED = 4
"""Batches that each worker prepares in advance; with the default of 2, workers at times wait for the main process."""


class Item(NamedTuple):
    """One labelled image of a dataset."""

    image: Tensor
    """(C, H, W) uint8."""
    label: int
    corrupt: str = ""
    """Name of the corrupt image that this one replaces; empty if it replaces none."""


class EpochDataset(Dataset[Item]):
    """Labelled images of one shape. Item epoch * len + index is image `index`, augmented as in that epoch."""

    image_shape: tuple[int, int, int]
    """(H, W, C)."""

    @abstractmethod
    def __len__(self) -> int: ...

    def read_batch(self, items: Sequence[int], images: Tensor) -> tuple[list[int], list[str]]:
        """Write items into `images`, (B, H, W, C) uint8; return their labels and the names of corrupt images."""
        batch = [self[item] for item in items]
        for image, item in zip(images, batch, strict=True):
            image.copy_(item.image.permute(1, 2, 0))
        return [int(item.label) for item in batch], [item.corrupt for item in batch if item.corrupt]

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        """Iterate over epoch 0. Python's default iteration would go on through all epochs."""
        return ((item.image, item.label) for item in map(self.__getitem__, range(len(self))))


class ResumableDistributedSampler(Sampler[int]):
    """Sampler that shuffles by (seed, epoch), splits each epoch between the ranks, and can start anywhere.

    It yields epoch * num_images + index, so that an item determines both the image and its augmentation. The images of
    a global batch do not depend on the number of ranks.
    """

    def __init__(self, num_images: int, seed: int, rank: int = 0, world_size: int = 1, *, step_size: int = 1) -> None:
        """Start with the first epoch; `step_size` is the number of images of an optimiser step on each rank."""
        self.num_images, self.seed, self.rank, self.world_size = num_images, seed, rank, world_size
        self.step_size = step_size
        self.num_consumed = 0  # by this rank, over all epochs

    def __len__(self) -> int:
        """Return the images per rank and epoch: as many whole steps as all ranks have. The others are left out."""
        return self.num_images // (self.world_size * self.step_size) * self.step_size

    def continue_after(self, num_images: int, *, in_whole_steps: bool) -> None:
        """Continue after so many images of all ranks, if requested with whole steps up to the end of the epoch."""
        epoch, consumed = divmod(num_images, self.num_images)
        size = self.step_size if in_whole_steps else 1
        remaining = max(0, len(self) - consumed // self.world_size) // size * size
        self.num_consumed = (epoch + 1) * len(self) - remaining

    def __iter__(self) -> Iterator[int]:
        epoch, start = divmod(self.num_consumed, max(1, len(self)))
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_images)
        indices = order[: len(self) * self.world_size][self.rank :: self.world_size]
        yield from (epoch * self.num_images + indices[start:]).tolist()


class CorruptImageLog:
    """Log of the images that cannot be decoded, each counted once, with a limit on their number.

    The names are appended to `path`, if there is one. A resumed run reads them back.
    """

    def __init__(self, path: Path | None, max_images: int) -> None:
        self.path, self.max_images = path, max_images
        self.names = set(path.read_text("utf-8", "surrogateescape").splitlines()) if path and path.exists() else set()

    def update(self, names: Iterable[str]) -> None:
        """Record images.

        Raises:
            UserError: there are more than `max_images`.
        """
        for name in names:
            if name in self.names:
                continue
            self.names.add(name)
            if self.path:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8", errors="surrogateescape") as file:
                    file.write(f"{name}\n")
            require(
                len(self.names) <= self.max_images,
                f"`data.max_corrupt_fraction` allows {self.max_images} corrupt images, and there are more, "
                f"the last of them {name}{f' (all: {self.path})' if self.path else ''}. Repair or remove them, or "
                "raise the limit.",
            )


# ---------------------------------------------------------------------------------------- batches in shared memory

SlotMessage = tuple[int, list[int], list[str]]
"""Slot of a batch, its labels, and the names of the corrupt images that were replaced in it."""


class SharedMemoryBatches(Dataset[SlotMessage]):
    """Dataset of batches that workers write into preallocated slots of shared memory; only a message is sent.

    By default every batch takes new shared memory, whose fresh pages cost more than half as much time as decoding a
    JPEG (benchmarks/loading.py).
    """

    def __init__(self, dataset: EpochDataset, batch_size: int, num_workers: int) -> None:
        self.dataset = dataset
        # Enough slots that the main process has copied a batch before its slot is reused.
        num_slots = num_workers * NUM_PREFETCHED + 2
        self.slots = torch.empty((num_slots, batch_size, *dataset.image_shape), dtype=torch.uint8)
        if num_workers:
            require_shared_memory(self.slots.nbytes + (num_workers + 1) * QUEUE_BYTES)
            self.slots.share_memory_()

    def __getitems__(self, slot_and_items: Sequence[int]) -> SlotMessage:
        """Read the items into the slot."""
        slot, *items = slot_and_items
        return slot, *self.dataset.read_batch(items, self.slots[slot, : len(items)])

    def copy_out(self, slot: int, count: int) -> ImageUint8:
        """Copy a batch out of its slot, (B, C, H, W) uint8 in channels_last order; pinned if there is a GPU."""
        images = self.slots[slot, :count].numpy()  # numpy's copy wakes no threads, which would slow the workers
        batch = torch.empty(images.shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        np.copyto(batch.numpy(), images)
        return batch.permute(0, 3, 1, 2)


def require_shared_memory(num_bytes: int) -> None:
    """Refuse worker processes whose shared memory does not fit; without this, they are killed when they write to it.

    Raises:
        UserError: /dev/shm has less space.
    """
    if not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    require(
        free >= num_bytes,
        f"`data.num_workers` needs {num_bytes / 1e6:.1f} MB of shared memory for each data loader, and {SHARED_MEMORY} "
        f"has {free / 1e6:.1f} MB. Set it to 0, lower `data.batch_size`, or enlarge {SHARED_MEMORY} (docker run "
        "--shm-size 1g).",
    )


class SlotBatchSampler(Sampler[list[int]]):
    """Batches of items, each preceded by the number of its slot: [slot, item, item, …]."""

    def __init__(self, batches: BatchSampler | list[list[int]], num_slots: int) -> None:
        self.batches, self.num_slots = batches, num_slots

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for slot, items in zip(cycle(range(self.num_slots)), self.batches, strict=False):
            yield [slot, *items]


# ---------------------------------------------------------------------------------------------------- data loaders


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """Batch size and worker processes of a data loader."""

    batch_size: int
    """Images per batch and process."""
    num_workers: int = 0
    """Worker processes."""
    start_method: StartMethod | None = None
    """Start method of worker processes; None for the platform's default."""


class ImageLoader(DataLoader[Any]):
    """Data loader of batches ((B, C, H, W) uint8, (B,) int64); corrupt images are logged in the main process."""

    def __init__(
        self,
        dataset: EpochDataset,
        sampler: Sampler[int] | range,
        settings: LoaderSettings,
        corrupt_log: CorruptImageLog | None = None,
        *,
        drop_last: bool = False,
    ) -> None:
        self.settings, self.corrupt_log = settings, corrupt_log
        self.batches = SharedMemoryBatches(dataset, settings.batch_size, settings.num_workers)
        batches = BatchSampler(sampler, settings.batch_size, drop_last)
        super().__init__(
            self.batches,
            batch_sampler=SlotBatchSampler(batches, len(self.batches.slots)),
            num_workers=settings.num_workers,
            persistent_workers=settings.num_workers > 0,
            prefetch_factor=NUM_PREFETCHED if settings.num_workers else None,
            multiprocessing_context=settings.start_method if settings.num_workers else None,
            collate_fn=_identity,
            worker_init_fn=obey_stop_signals_of_parent if settings.num_workers else None,
        )

    def __iter__(self) -> Any:  # noqa: ANN401 (the type of DataLoader's iterator is private)
        with block_stop_signals() if self.settings.num_workers else nullcontext():  # the workers start here
            messages = super().__iter__()
        for slot, labels, corrupt in _without_traceback(messages):
            if self.corrupt_log:
                self.corrupt_log.update(corrupt)
            yield self.batches.copy_out(slot, len(labels)), torch.tensor(labels)


def _without_traceback(messages: Iterator[Any]) -> Iterator[Any]:
    """Yield the messages of workers; remove from the text of a `UserError` the traceback that PyTorch has added."""
    try:
        yield from messages
    except UserError as error:
        name = f"{UserError.__module__}.{UserError.__name__}: "
        raise UserError(str(error).rpartition(name)[2].strip()) from error


def _identity(message: Any) -> Any:  # noqa: ANN401 (DataLoader declares a list)
    return message


class ResumableDataLoader(ImageLoader):
    """Data loader of full batches for training. Lightning saves its position in checkpoints and restores it."""

    def __init__(
        self,
        dataset: EpochDataset,
        sampler: ResumableDistributedSampler,
        settings: LoaderSettings,
        corrupt_log: CorruptImageLog | None = None,
    ) -> None:
        self.position = sampler
        super().__init__(dataset, sampler, settings, corrupt_log, drop_last=True)

    def __iter__(self) -> Any:  # noqa: ANN401
        """Iterate over the rest of the current epoch."""
        for images, labels in super().__iter__():
            self.position.num_consumed += len(images)
            yield images, labels

    @property
    def num_batches_of_epoch(self) -> int:
        """Number of batches of the current epoch before the position."""
        return self.position.num_consumed % len(self.position) // self.settings.batch_size

    def state_dict(self) -> dict[str, int]:
        """Return what a step consists of, and the number of images consumed by all ranks.

        Images that are left out at the end of an epoch count too.
        """
        epoch, consumed = divmod(self.position.num_consumed, len(self.position))
        return {"images": epoch * self.position.num_images + consumed * self.position.world_size, **self._sizes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the images of `state`; the number of ranks and the batch size may have changed.

        If none has, the place is kept even within a step, where an epoch that Lightning limits may have ended.
        """
        same_sizes = self._sizes.items() <= state.items()  # older checkpoints have none
        self.position.continue_after(state["images"], in_whole_steps=not same_sizes)

    @property
    def _sizes(self) -> dict[str, int]:
        position = self.position
        sizes = {"step_size": position.step_size, "world_size": position.world_size}
        return {"batch_size": self.settings.batch_size, **sizes}


def training_loader(
    dataset: EpochDataset,
    settings: LoaderSettings,
    seed: int,
    trainer: Trainer | None,
    corrupt_log: CorruptImageLog | None = None,
) -> ResumableDataLoader:
    """Return the training loader of this rank; an epoch ends with a whole optimiser step.

    Raises:
        UserError: there are too few images for one step.
    """
    rank, world_size = rank_and_world_size(trainer)
    num_accumulated = trainer.accumulate_grad_batches if trainer else 1
    largest = len(dataset) // world_size
    require(
        settings.batch_size <= largest,
        f"`data.batch_size` must be at most {largest}, the number of training images per process, "
        f"got {settings.batch_size}.",
    )
    step_size = settings.batch_size * num_accumulated
    require(
        step_size <= largest,
        f"An optimiser step must have at most {len(dataset)} images, the number of training images, got "
        f"{step_size * world_size}: {num_accumulated} batches of {settings.batch_size} on each of {world_size} "
        "processes. Lower `global_batch_size` or `trainer.accumulate_grad_batches`.",
    )
    sampler = ResumableDistributedSampler(len(dataset), seed, rank, world_size, step_size=step_size)
    return ResumableDataLoader(dataset, sampler, settings, corrupt_log)


def eval_loader(
    dataset: EpochDataset,
    settings: LoaderSettings,
    trainer: Trainer | None,
    argument: str,
    corrupt_log: CorruptImageLog | None = None,
) -> ImageLoader:
    """Return the validation or test loader of this rank: every `world_size`-th image, unshuffled.

    Raises:
        UserError: there are images, but fewer than processes; `argument` determines their number.
    """
    rank, world_size = rank_and_world_size(trainer)
    require(
        len(dataset) == 0 or len(dataset) >= world_size,
        f"`{argument}` must give no image or at least {world_size}, one per process, got {len(dataset)}. Change it, or "
        "use fewer processes.",
    )
    return ImageLoader(dataset, range(rank, len(dataset), world_size), settings, corrupt_log)


def rank_and_world_size(trainer: Trainer | None) -> tuple[int, int]:
    """Return (rank, world size); (0, 1) without a trainer."""
    return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
