"""Memory of tensors, counted as they are created and freed."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sagl.models.adm import Classifier, UNet
from sagl.models.cpu_kernels import optimize_for_cpu
from sagl.settings.network import ClassifierSettings, UNetSettings


class MemoryTracker(TorchDispatchMode):
    """Context in which the bytes of new tensors are counted: `current`, `peak`, and `largest` of a single one.

    Counts sizes at allocation, independent of the allocator; buffers inside of an operation are not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self.largest = 0
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
        self.largest = max(self.largest, storage.nbytes())
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, num_bytes: int) -> None:
        self.current -= num_bytes


MAX_ELEMENTS = 2**31 - 1
"""Elements of a tensor that 32-bit indices, which some kernels of GPUs use, can count."""


@lru_cache(maxsize=8)
def estimate_memory(s: UNetSettings, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of the weights, and the additional peak of one image's forward pass.

    Counted on the meta device, without computing. The weights include the transformed copies that CPU kernels cache.
    """
    with torch.device("meta"), torch.inference_mode():
        network, x, timesteps = _meta_inputs(s, dtype)
        labels = None if s.num_classes is None else torch.zeros(1, dtype=torch.long)
        with MemoryTracker() as first_pass:
            network(x, timesteps, labels)
        with MemoryTracker() as second_pass:
            network(x, timesteps, labels)
    return _weight_bytes(network) + first_pass.current, second_pass.peak


@lru_cache(maxsize=8)
def estimate_gradient_memory(s: ClassifierSettings, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of a classifier's weights, and the peak of the gradient of one image, as guidance takes it."""
    with torch.device("meta"):
        network, x, timesteps = _meta_inputs(s, dtype)
        with MemoryTracker() as tracker:
            torch.autograd.grad(network(x.requires_grad_(), timesteps).sum(), x)
    return _weight_bytes(network), tracker.peak


@lru_cache(maxsize=8)
def max_batch_size(s: UNetSettings | ClassifierSettings) -> int:
    """Return the largest batch none of whose tensors has more than `MAX_ELEMENTS` elements."""
    with torch.device("meta"), torch.inference_mode():
        network, x, timesteps = _meta_inputs(s, torch.float32)
        with MemoryTracker() as tracker:
            network(x, timesteps, *([torch.zeros(1, dtype=torch.long)] if isinstance(s, UNetSettings) else []))
    return MAX_ELEMENTS // (tracker.largest // 4)


def _meta_inputs(s: UNetSettings | ClassifierSettings, dtype: torch.dtype) -> tuple[UNet | Classifier, Tensor, Tensor]:
    """Return a network on the meta device, with one image and its timestep."""
    network = optimize_for_cpu(UNet(s) if isinstance(s, UNetSettings) else Classifier(s)).to(dtype)
    return (
        network.eval().requires_grad_(False),
        torch.empty(1, s.in_channels, s.image_size, s.image_size),
        torch.zeros(1),
    )


def _weight_bytes(network: UNet | Classifier) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())
