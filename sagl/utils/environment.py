"""What suits this machine: its memory, its cores, the numbers that it is fast with."""

import ctypes
import math
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from sagl.settings.sampling import WeightPrecision

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Names of glibc's malloc.h."""
NEVER = -1
"""No free end of the heap is large enough to be given back; 2^31 - 1, the most that an int holds, is less than a
training step frees, and cost a fifth of it."""
PAD_BYTES = 64 << 20
"""The heap grows by at least so much."""


def disable_malloc_trim() -> bool:
    """Have the C library keep the memory of freed tensors for the next step, instead of giving it back to the kernel.

    By default glibc maps every large tensor anew, and the kernel clears its pages again at every step: seen here, a
    third of a network's time. To be called before the first large tensor. The peak does not change, but the process
    holds it until its end. Other C libraries are left alone.

    Returns:
        Whether it took effect.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_TOP_PAD, PAD_BYTES))
    taken = [mallopt(what, value) == 1 for what, value in wanted]
    return all(taken)


def default_precision(device: "torch.device") -> WeightPrecision:
    """The precision of weights that a forward is fastest in at no loss that the images' numbers show.

    bfloat16 where the device computes in it (AVX512-BF16, AMX; GPUs from compute capability 8.0 on), else float16 on
    GPUs and float32 on CPUs.
    """
    if device.type == "cuda":
        import torch

        return "bf16-true" if torch.cuda.get_device_capability(device) >= (8, 0) else "16-true"
    return "bf16-true" if has_fast_bfloat16() else "32-true"


def has_fast_bfloat16() -> bool:
    """Whether the processor has instructions for it; known on Linux alone."""
    words = set(_text(Path("/proc/cpuinfo")).split())
    return bool(words & {"avx512_bf16", "amx_bf16"})


def available_bytes(device: "torch.device") -> int | None:
    """Memory that can still be taken on the device; None where that is not known."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    for line in _text(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def peak_gigabytes() -> float:
    """Most memory held so far: the GPU's where there is one, else the process's."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def available_cpus() -> int:
    """Cores that this process may keep busy: by affinity, and by a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _text(Path("/sys/fs/cgroup/cpu.max")).strip().partition(" ")
    return min(cores, math.ceil(int(quota) / int(period))) if quota.isdecimal() and period.isdecimal() else cores


def set_threads(processes: int = 1) -> int:
    """Have torch use no more threads than this process's share of the cores, and say how many.

    OMP_NUM_THREADS has its way.

    Args:
        processes: that share this machine.
    """
    import torch

    share = max(1, available_cpus() // processes)
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > share:
        torch.set_num_threads(share)
    return torch.get_num_threads()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
