"""Memory that tensors take, counted as they come and go."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sagl.models.adm import UNet
from sagl.settings.network import UNetSettings


class MemoryTracker(TorchDispatchMode):
    """Bytes of the tensors made inside the block: those that live now, and the most at one time.

    Counted at allocation, whatever the allocator does with it; what an operation holds inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run the operation; count what it made that was not there before."""
        there = [x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), there)
        return out

    def _count(self, storage: torch.UntypedStorage, there: Sequence[torch.UntypedStorage]) -> None:
        if storage in self._known or any(storage is one for one in there):
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, count: int) -> None:
        self.now -= count


def estimate_memory(s: UNetSettings, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the weights, and the most that one image's forward needs beside them; counted without computing.

    To the weights belongs what a first forward leaves behind: on a CPU, those that are kept transformed.
    """
    with torch.device("meta"):
        network = UNet(s).to(dtype).eval().requires_grad_(False)
        weights = sum(p.numel() * p.element_size() for p in network.parameters())
        x = torch.empty(1, s.in_channels, s.image_size, s.image_size)
        labels = None if s.num_classes is None else torch.zeros(1, dtype=torch.long)
        with torch.inference_mode():
            with MemoryTracker() as first:
                network(x, torch.zeros(1), labels)
            with MemoryTracker() as live:
                network(x, torch.zeros(1), labels)
    return weights + first.now, live.peak
