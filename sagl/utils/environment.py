"""This machine and this process: allocator, threads, precision, memory."""

import ctypes
import math
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sagl.errors import UserError
from sagl.settings.sampling import WeightPrecision

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Parameters of mallopt, from glibc's malloc.h."""
NEVER = -1
"""Trim threshold that is never reached. The largest int, 2^31 - 1, is less than what a training step frees."""
PAD_BYTES = 64 << 20
"""Least number of bytes by which the heap grows."""
SPIN_COUNT = 300_000
"""libgomp's own default of GOMP_SPINCOUNT, some milliseconds."""
LOAD_SECONDS = (0.05, 0.1)
"""Lengths of the two samples of the machine's load."""


def disable_malloc_trim() -> bool:
    """Make glibc keep the memory of freed tensors for the next step, instead of returning it to the kernel.

    By default glibc maps every large tensor anew and the kernel clears its pages at every step, about a third of a
    network's time. Call it before the first large tensor. The peak does not change, but the process holds it until it
    ends. Other C libraries are not affected.

    Returns:
        Whether it took effect.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    options = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_TOP_PAD, PAD_BYTES))
    results = [mallopt(name, value) for name, value in options]
    return all(result == 1 for result in results)


# ------------------------------------------------------------------------------------------------ processor


def default_precision(device: "torch.device") -> WeightPrecision:
    """Return the fastest weight precision that does not change the metrics of the images.

    bfloat16 if the device computes in it (AVX512-BF16, AMX; GPUs of compute capability 8.0 and above), otherwise
    float16 on GPUs and float32 on CPUs.
    """
    if device.type == "cuda":
        return "bf16-true" if gpu_has_bfloat16(device) else "16-true"
    return "bf16-true" if has_fast_bfloat16() else "32-true"


def gpu_has_bfloat16(device: "torch.device") -> bool:
    """Return whether a GPU has bfloat16 instructions; others compute in it slowly."""
    import torch

    return torch.cuda.get_device_capability(device) >= (8, 0)


def has_fast_bfloat16() -> bool:
    """Return whether the processor has bfloat16 instructions; always False where /proc/cpuinfo does not exist."""
    return bool(_cpu_flags() & {"avx512_bf16", "amx_bf16"})


def has_amx() -> bool:
    """Return whether the processor has AMX (Intel Xeons from Sapphire Rapids on)."""
    return "amx_tile" in _cpu_flags()


def _cpu_flags() -> set[str]:
    return set(read_text_or_empty(Path("/proc/cpuinfo")).split())


# ----------------------------------------------------------------------------------------------------- GPUs


def gpu_problem() -> str:
    """Return why PyTorch cannot use the GPU of this machine; empty if it can, or if there is none."""
    import torch

    available = torch.cuda.is_available()
    if not available and torch.cuda.device_count() == 0:
        return ""
    try:
        capability = torch.cuda.get_device_capability()
    except (RuntimeError, AssertionError) as error:
        return "" if available else " ".join(str(error).split("\n")[0].split())
    architectures = torch.cuda.get_arch_list()
    if not architectures or has_kernels(capability, architectures):
        return ""
    return f"it has compute capability {capability[0]}.{capability[1]}, and this PyTorch {', '.join(architectures)}"


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Return whether a build of PyTorch for some architectures, such as sm_80 and compute_90, runs on a GPU.

    Compiled kernels (sm) run on the same major version from their minor version on; PTX (compute) on all later ones.
    """
    for kind, major, minor in re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(architectures)):
        version = int(major), int(minor)
        if version <= capability and (kind == "compute" or version[0] == capability[0]):
            return True
    return False


def disable_tf32() -> None:
    """Compute float32 in float32 on GPUs; cuDNN would round the factors of convolutions to TF32, with 10 bits."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def use_deterministic_algorithms() -> None:
    """Let the gradients of classifier guidance have the same bits every time; on GPUs some sums have a random order.

    Call it before the first product on a GPU. Operations without a deterministic algorithm still run, with a warning,
    but for those inside of `strictly_deterministic`.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def strictly_deterministic() -> Iterator[None]:
    """After `use_deterministic_algorithms`, refuse operations in the body that have no deterministic algorithm.

    The gradients of scaled_dot_product_attention have one that PyTorch chooses in this mode alone, in part in the
    forward pass: it does not use cuDNN's attention then.
    """
    import torch

    was_enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if was_enabled:
        torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_enabled, warn_only=warn_only)


# --------------------------------------------------------------------------------------------------- memory


@contextmanager
def refuse_out_of_memory(parameter: str, advice: str = "") -> Iterator[None]:
    """Turn running out of memory in the body into a `UserError`.

    Args:
        parameter: the batch size.
        advice: what else may help, as a sentence.
    """
    import torch

    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        reason = ". ".join(" ".join(str(error).split()).split(". ")[:2])
        raise UserError(f"`{parameter}` is too large for this device's memory. Lower it. {advice}({reason})") from error


def available_bytes(device: "torch.device") -> int | None:
    """Return the free memory of the device; None if it is unknown."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    for line in read_text_or_empty(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def peak_gigabytes() -> float:
    """Return the peak memory so far: of the GPU if one is in use, otherwise of the process."""
    import resource

    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# -------------------------------------------------------------------------------------------------- threads


def available_cpus() -> int:
    """Return the number of cores that this process may use, by affinity and by the container's quota."""
    cores = len(_affinity())
    quota, _, period = read_text_or_empty(Path("/sys/fs/cgroup/cpu.max")).strip().partition(" ")
    return min(cores, math.ceil(int(quota) / int(period))) if quota.isdecimal() and period.isdecimal() else cores


def cores_per_process(num_processes: int) -> int:
    """Return the cores of each of several processes on this machine. SLURM gives each of its tasks cores of its own."""
    tasks = os.environ.get("SLURM_NTASKS_PER_NODE", "")
    num_sharing = num_processes // max(1, int(tasks)) if tasks.isdecimal() else num_processes
    return max(1, available_cpus() // max(1, num_sharing))


def set_threads(processes: int = 1) -> int:
    """Limit torch to this process's share of the cores, unless OMP_NUM_THREADS is set, and return its threads.

    Args:
        processes: number of processes that share this machine.
    """
    import torch

    share = max(1, available_cpus() // processes)
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > share:
        torch.set_num_threads(share)
    return torch.get_num_threads()


def choose_thread_waiting() -> None:
    """Choose how OpenMP threads wait for each other: spinning on a quiet machine, sleeping beside other programs.

    Spinning is faster while every thread has its own core. If another program needs the core, a spinning thread
    keeps it from the thread that it waits for. The choice is made from the load at the start and set as GOMP_SPINCOUNT,
    which child processes inherit. libgomp reads it when it is loaded, so call this before torch is imported. A waiting
    policy that the user has set is kept.
    """
    if "torch" in sys.modules or os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        return
    threads = os.environ.get("OMP_NUM_THREADS", "")
    num_threads = int(threads) if threads.isdecimal() else max(1, available_cpus() // _threads_per_core())
    os.environ["GOMP_SPINCOUNT"] = "0" if is_busy(num_threads) else str(SPIN_COUNT)


def is_busy(num_threads: int) -> bool:
    """Return whether other programs leave fewer cores idle than `num_threads`, in two samples one after the other.

    The first sample decides alone if it is quiet; a short burst of another program does not make a machine busy.
    """
    return all(_idle_cores(seconds) < num_threads - 0.5 for seconds in LOAD_SECONDS)


def _idle_cores(seconds: float) -> float:
    """Return how many of the process's cores were idle over the next `seconds`; infinity without /proc/stat."""
    before = _core_times()
    time.sleep(seconds)
    after = _core_times()
    spans = [(after[core][0] - idle, after[core][1] - total) for core, (idle, total) in before.items() if core in after]
    return sum(idle / total if total else 1.0 for idle, total in spans) if spans else math.inf


def _core_times() -> dict[int, tuple[int, int]]:
    """Return (idle, total) clock ticks of each core of the process's affinity."""
    times = {}
    for line in read_text_or_empty(Path("/proc/stat")).splitlines():
        name, *values = line.split() or [""]
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in _affinity():
            ticks = [int(value) for value in values[:8]]  # user, nice, system, idle, iowait, irq, softirq, steal
            times[int(name[3:])] = ticks[3] + ticks[4], sum(ticks)
    return times


def _threads_per_core() -> int:
    """Return the hardware threads per core; torch starts one thread per core."""
    lines = (line.partition(":") for line in read_text_or_empty(Path("/proc/cpuinfo")).splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    siblings, cores = fields.get("siblings", ""), fields.get("cpu cores", "")
    return max(1, int(siblings) // int(cores)) if siblings.isdecimal() and cores.isdecimal() else 1


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def read_text_or_empty(path: Path) -> str:
    """Return the content of a file, or an empty string if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
