import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sagl.errors import UserError
from sagl.utils import environment
from sagl.utils.environment import refuse_out_of_memory

SCRIPT = """
import json, resource, sys
import torch
from sagl.utils.environment import disable_malloc_trim
disabled = sys.argv[1] == "disabled" and disable_malloc_trim()
def step():
    x = torch.ones(64, 1024, 1024)
    return float((x * 2 + x).sum())
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
before = faults()
for _ in range(5):
    step()
print(json.dumps([disabled, faults() - before]))
"""


def page_faults(mode):
    """Return whether trimming was disabled, and the page faults of five steps that follow three."""
    run = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has mallopt")
def test_memory_of_freed_tensors_is_kept_for_the_next_step():
    disabled, faults = page_faults("disabled")
    assert disabled
    assert faults < 0.2 * page_faults("default")[1]  # not 0: the heap may still have to grow by one tensor


def test_other_c_libraries_are_not_affected(monkeypatch):
    monkeypatch.setattr(environment.platform, "libc_ver", lambda: ("musl", "1.2"))
    assert environment.disable_malloc_trim() is False


@pytest.fixture
def files(monkeypatch):
    """Contents of files by path; others are empty."""
    contents = {}
    monkeypatch.setattr(environment, "read_text_or_empty", lambda path: contents.get(path, ""))
    return contents


@pytest.mark.parametrize(
    ("flags", "bfloat16", "amx"),
    [
        ("flags: avx2 amx_bf16 amx_tile x", True, True),
        ("flags\t: avx512_bf16", True, False),
        ("avx512_bf16_other avx2", False, False),
        ("", False, False),
    ],
)
def test_instructions_are_read_from_the_processors_flags(flags, bfloat16, amx, files):
    files[Path("/proc/cpuinfo")] = flags
    assert environment.has_fast_bfloat16() == bfloat16
    assert environment.has_amx() == amx


def test_available_memory_is_the_systems_and_none_if_unknown(files):
    assert environment.available_bytes(torch.device("cpu")) is None
    files[Path("/proc/meminfo")] = "MemTotal:  9 kB\nMemAvailable:   123 kB\nBuffers: 7 kB\n"
    assert environment.available_bytes(torch.device("cpu")) == 123 * 1024


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 4), ("150000 100000", 2), ("800000 100000", 4), ("50000 100000", 1), ("", 4)]
)
def test_cores_are_those_of_the_affinity_and_of_the_quota(quota, cores, files, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5}, raising=False)
    files[Path("/sys/fs/cgroup/cpu.max")] = quota
    assert environment.available_cpus() == cores


@pytest.mark.parametrize(("tasks", "cores"), [("", 2), ("1", 2), ("4", 8), ("8", 8), ("2", 4)])
def test_processes_share_the_cores_but_tasks_of_slurm_have_their_own(tasks, cores, monkeypatch):
    monkeypatch.setattr(environment, "available_cpus", lambda: 8)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", tasks)
    assert environment.cores_per_process(4) == cores


@pytest.mark.parametrize(("setting", "threads"), [(None, 1), ("2", 2)])
def test_threads_are_no_more_than_cores_unless_the_user_sets_them(setting, threads, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if setting:
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
    monkeypatch.setattr(environment, "available_cpus", lambda: 1)
    try:
        torch.set_num_threads(2)
        assert environment.set_threads() == threads == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


class Machine:
    """A /proc/stat whose cores are busy for a share of every interval; a share per interval, for all cores."""

    def __init__(self, monkeypatch, busy, cpuinfo=""):
        self.busy, self.cpuinfo, self.intervals = busy, cpuinfo, 0
        self.ticks = {core: [0, 0] for core in range(len(busy[0]))}
        monkeypatch.setattr(environment, "read_text_or_empty", self.read)
        monkeypatch.setattr(environment.time, "sleep", self.sleep)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(len(busy[0]))), raising=False)
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        monkeypatch.delitem(sys.modules, "torch")

    def read(self, path):
        if path == Path("/proc/cpuinfo"):
            return self.cpuinfo
        if path != Path("/proc/stat"):
            return ""
        lines = [f"cpu{core} {user} 0 0 {idle} 0 0 0 0 0 0" for core, (user, idle) in self.ticks.items()]
        return "\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *lines, "cpu7 5 0 0 0 0 0 0 0 0 0", "ctxt 1234"])

    def sleep(self, seconds):
        for core, share in enumerate(self.busy[min(self.intervals, len(self.busy) - 1)]):
            self.ticks[core][0] += round(1000 * seconds * share)
            self.ticks[core][1] += round(1000 * seconds * (1 - share))
        self.intervals += 1


@pytest.mark.parametrize(
    ("busy", "spins"),
    [
        ([(0, 0)], True),
        ([(0.2, 0.2)], True),
        ([(1, 0)], False),
        ([(1, 1)], False),
        ([(0.4, 0.4)], False),
        ([(1, 1), (0, 0)], True),
        ([(0, 0), (1, 1)], True),
    ],
    ids=["quiet", "little", "one core", "both cores", "half", "burst before", "quiet first"],
)
def test_threads_spin_on_a_quiet_machine_and_sleep_beside_other_programs(busy, spins, monkeypatch):
    Machine(monkeypatch, busy)
    environment.choose_thread_waiting()
    assert (os.environ["GOMP_SPINCOUNT"] != "0") == spins


@pytest.mark.parametrize(
    ("threads", "cpuinfo", "spins"),
    [("1", "", True), ("2", "", True), ("3", "", False), ("", "", False), ("", "siblings: 4\ncpu cores: 2\n", True)],
)
def test_threads_spin_while_each_has_an_idle_core_or_hardware_thread(threads, cpuinfo, spins, monkeypatch):
    Machine(monkeypatch, [(1, 1, 0, 0)], cpuinfo)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    environment.choose_thread_waiting()
    assert (os.environ["GOMP_SPINCOUNT"] != "0") == spins


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_a_waiting_policy_that_the_user_set_is_kept(name, monkeypatch):
    machine = Machine(monkeypatch, [(1, 1)])
    monkeypatch.setenv(name, "user's")
    environment.choose_thread_waiting()
    assert {key: os.environ.get(key) for key in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} == {
        "OMP_WAIT_POLICY": None,
        "GOMP_SPINCOUNT": None,
        name: "user's",
    }
    assert machine.intervals == 0


def test_the_choice_is_made_once_for_child_processes_too_and_not_after_torch_has_been_loaded(monkeypatch):
    machine = Machine(monkeypatch, [(0, 0), (1, 1)])
    environment.choose_thread_waiting()
    environment.choose_thread_waiting()
    assert machine.intervals == 1
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setitem(sys.modules, "torch", torch)
    environment.choose_thread_waiting()
    assert machine.intervals == 1


def test_a_machine_without_proc_stat_counts_as_quiet(files):
    assert not environment.is_busy(2)


# ----------------------------------------------------------------------------------------------------- GPUs


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that torch can use; returns a function that changes its capability, or the error of its driver."""

    def change(*, capability=(9, 0), architectures=("sm_80", "sm_90"), error=None):
        def get_device_capability(device=None):
            if error:
                raise RuntimeError(error)
            return capability

        monkeypatch.setattr(torch.cuda, "is_available", lambda: error is None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", get_device_capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(architectures))

    change()
    return change


def test_a_gpu_is_used_unless_its_driver_is_too_old_or_torch_has_no_kernels_for_it(gpu):
    assert environment.gpu_problem() == ""
    gpu(error="The NVIDIA driver on your system is too old (found version 11040).\nPlease update.")
    assert "too old (found version 11040)" in environment.gpu_problem()
    gpu(capability=(6, 1))
    assert "6.1" in environment.gpu_problem()
    assert "sm_80" in environment.gpu_problem()


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((9, 0), ["sm_80", "compute_80"], True),
        ((10, 0), ["sm_90", "sm_100"], True),
        ((7, 0), ["sm_75", "compute_75"], False),
    ],
)
def test_kernels_run_on_later_minor_versions_and_ptx_on_all_later_ones(capability, architectures, runs):
    assert environment.has_kernels(capability, architectures) == runs


@pytest.mark.parametrize(("capability", "precision"), [((8, 0), "bf16-true"), ((7, 5), "16-true")])
def test_gpus_without_bfloat16_get_float16(capability, precision, gpu):
    gpu(capability=capability)
    assert environment.default_precision(torch.device("cuda", 0)) == precision


def test_float32_is_not_tf32_after_it_is_disabled():
    before = torch.backends.cudnn.allow_tf32
    try:
        environment.disable_tf32()
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_out_of_memory_names_the_batch_size(error):
    with pytest.raises(UserError, match=r"`batch_size`.*allocate") as caught, refuse_out_of_memory("batch_size"):
        raise error
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="other"), refuse_out_of_memory("batch_size"):
        raise RuntimeError("other")


@pytest.mark.parametrize(("platform", "gigabytes"), [("linux", 2.048), ("darwin", 0.002)])
def test_peak_memory_is_in_bytes_on_macos_and_in_kilobytes_elsewhere(platform, gigabytes, monkeypatch):
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=2 * 10**6))
    monkeypatch.setattr(sys, "platform", platform)
    assert environment.peak_gigabytes() == gigabytes
