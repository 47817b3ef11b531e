"""Batches through memory that the main process and its readers share.

Sent the usual way, every batch takes new shared memory from the system, whose fresh pages cost more than half as much
time as decoding a JPEG (benchmarks/loading.py). Here it is taken once.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

Sent = tuple[int, list[int], list[int]]
"""The slot that a batch lies in, its labels, and the places of the damaged pictures in it."""
NUM_PREFETCHED = 4
"""Batches that each reader has under way: with torch's 2 it waits at times for the main process."""


class SharedMemoryBatches(Dataset[Any]):
    """Images as readers see them: they write a batch into its slot and send the slot's number."""

    def __init__(self, images: Dataset[Any], shape: tuple[int, int, int], batch_size: int, readers: int) -> None:
        """Slots for `images` of (H, W, C): enough that one is free again before it is written anew."""
        self.images = images
        self.slots = torch.empty((readers * NUM_PREFETCHED + 2, batch_size, *shape), dtype=torch.uint8).share_memory_()

    def __getitems__(self, numbered: Sequence[int]) -> Sent:
        """Read the items behind a slot's number into the slot."""
        slot, *items = numbered
        labels, damaged = [], []
        for row, item in enumerate(items):
            image, label, *places = self.images[item]
            self.slots[slot, row] = image.permute(1, 2, 0)
            labels.append(int(label))
            damaged += [int(place) for place in places]
        return slot, labels, damaged

    def taken(self, sent: Sent) -> tuple[Tensor, list[int], list[int]]:
        """A batch out of its slot: (B, C, H, W) uint8, ready for a GPU where there is one."""
        slot, labels, damaged = sent
        images = self.slots[slot, : len(labels)].numpy()  # whose copy wakes no threads, which the readers need
        own = torch.empty(images.shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        np.copyto(own.numpy(), images)
        return own.permute(0, 3, 1, 2), labels, damaged


class SlotBatchSampler(Sampler[list[int]]):
    """Batches of items, each behind the number of its slot."""

    def __init__(self, batches: Iterable[list[int]], slots: int) -> None:
        """Slots in turn."""
        self.batches, self.slots = batches, slots

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.batches)  # type: ignore[arg-type] # torch's BatchSampler has a length

    def __iter__(self) -> Iterator[list[int]]:
        """[slot, item, item, …]."""
        for slot, items in zip(cycle(range(self.slots)), self.batches, strict=False):
            yield [slot, *items]
