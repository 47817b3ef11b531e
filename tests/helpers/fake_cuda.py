"""Computing on fake CUDA tensors, which have shapes and devices but no data, and counting what is dispatched."""

from collections import Counter
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sagl.guidance.sag import blur_matrix


class DispatchCounter(TorchDispatchMode):
    """Counts dispatched operations by name, and the copies between the CPU and a GPU."""

    def __init__(self):
        super().__init__()
        self.operations, self.to_gpu, self.to_cpu = Counter(), 0, 0

    @property
    def total(self):
        """Number of operations; asking a fake tensor for its device is none."""
        return self.operations.total() - self.operations["prim.device.default"]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations[str(func)] += 1
        if str(func) in ("aten._to_copy.default", "aten.copy_.default"):
            source = args[1] if str(func) == "aten.copy_.default" else args[0]
            before, after = source.device.type, out.device.type
            self.to_gpu += (before, after) == ("cpu", "cuda")
            self.to_cpu += (before, after) == ("cuda", "cpu")
        elif str(func) in ("aten._local_scalar_dense.default", "aten.nonzero.default"):
            self.to_cpu += any(x.device.type == "cuda" for x in tree_leaves(args) if isinstance(x, torch.Tensor))
        return out


@contextmanager
def fake_cuda(autocast=None):
    """Make new tensors with device "cuda" fake; with `autocast`, the data type of CUDA's autocast."""
    blur_matrix.cache_clear()
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            if autocast is not None:  # torch.autocast would turn itself off without a GPU
                torch.set_autocast_enabled("cuda", True)
                torch.set_autocast_dtype("cuda", autocast)
            yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        blur_matrix.cache_clear()


def on_fake_cuda(network):
    """Give a network of the meta device fake parameters on a GPU, in place; to be called inside of `fake_cuda`."""
    for module in network.modules():
        for name, p in module._parameters.items():
            empty = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="cuda")
            module._parameters[name] = torch.nn.Parameter(empty, p.requires_grad)
    return network
