"""Memory of tensors, counted as they are created and freed."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sagl.models.adm import UNet
from sagl.models.cpu_kernels import optimize_for_cpu
from sagl.settings.network import UNetSettings


class MemoryTracker(TorchDispatchMode):
    """Context in which the bytes of new tensors are counted: `current` and `peak`.

    Counts sizes at allocation, independent of the allocator; buffers inside of an operation are not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self._storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        inputs = [x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), inputs)
        return out

    def _count(self, storage: torch.UntypedStorage, inputs: Sequence[torch.UntypedStorage]) -> None:
        if storage in self._storages or any(storage is other for other in inputs):
            return
        self._storages.add(storage)
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, num_bytes: int) -> None:
        self.current -= num_bytes


def estimate_memory(s: UNetSettings, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of the weights, and the additional peak of one image's forward pass.

    Counted on the meta device, without computing. The weights include the transformed copies that CPU kernels cache.
    """
    with torch.device("meta"):
        network = optimize_for_cpu(UNet(s)).to(dtype).eval().requires_grad_(False)
        weights = sum(p.numel() * p.element_size() for p in network.parameters())
        x = torch.empty(1, s.in_channels, s.image_size, s.image_size)
        labels = None if s.num_classes is None else torch.zeros(1, dtype=torch.long)
        with torch.inference_mode():
            with MemoryTracker() as first_pass:
                network(x, torch.zeros(1), labels)
            with MemoryTracker() as second_pass:
                network(x, torch.zeros(1), labels)
    return weights + first_pass.current, second_pass.peak
