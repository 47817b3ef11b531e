"""Work of the CPU that is done while a device computes: values computed ahead, and copies that nobody waits for."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from itertools import islice
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")


def prefetch(values: Iterable[T]) -> Iterator[T]:
    """Yield the values of an iterable; the next one is computed in a background thread, the first one from now on.

    At most one value is ahead. An exception of the iterable is raised where its value would be yielded.
    """
    iterator = iter(values)
    return _consume(iterator, _start(iterator))


def _consume(iterator: Iterator[T], pending: "Future[list[T]]") -> Iterator[T]:
    while value := pending.result():
        pending = _start(iterator)
        yield from value


def _start(iterator: Iterator[T]) -> "Future[list[T]]":
    """Compute the next value in a thread: a list of one, or an empty list at the end."""
    future: Future[list[T]] = Future()

    def work() -> None:
        try:
            future.set_result(list(islice(iterator, 1)))
        except BaseException as error:  # whatever it is, it belongs to the thread that waits for the value
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future


def pin(tensor: "Tensor", device: "torch.device") -> "Tensor":
    """Return a tensor of the CPU in pinned memory if `device` is a GPU, so that `to_device` need not wait."""
    import torch

    is_pinnable = device.type == "cuda" and torch.cuda.is_available() and not tensor.is_pinned()
    return tensor.pin_memory() if is_pinnable else tensor


def to_device(tensor: "Tensor", device: "torch.device") -> "Tensor":
    """Copy a tensor of the CPU to a device, in the order of the device's work; the CPU goes on at once."""
    import torch

    if tensor.device == device:
        return tensor
    return torch.empty_like(tensor, device=device).copy_(pin(tensor, device), non_blocking=True)
