import json
import os
import subprocess
import sys

import pytest
import torch

from sagl.utils import environment

SCRIPT = """
import json, resource, sys
import torch
from sagl.utils.environment import disable_malloc_trim
kept = sys.argv[1] == "kept" and disable_malloc_trim()
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
print(json.dumps([kept, faults() - before]))
"""


def faults_of(how):
    """Whether it took effect, and page faults of five steps that follow three."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is what is told")
def test_memory_of_freed_tensors_is_kept_for_the_next_step():
    kept, faults = faults_of("kept")
    assert kept
    assert faults < 0.2 * faults_of("given back")[1]  # not 0: the heap may still have to grow by one tensor


def test_other_c_libraries_are_left_alone(monkeypatch):

    monkeypatch.setattr(environment.platform, "libc_ver", lambda: ("musl", "1.2"))
    assert environment.disable_malloc_trim() is False


@pytest.mark.parametrize(
    ("flags", "fast"),
    [("flags: avx2 amx_bf16 x", True), ("flags\t: avx512_bf16", True), ("avx512_bf16_other avx2", False), ("", False)],
)
def test_bfloat16_is_fast_where_the_processor_says_so(flags, fast, monkeypatch):
    monkeypatch.setattr(environment, "read_text_or_empty", lambda _: flags)
    assert environment.has_fast_bfloat16() == fast


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 4), ("150000 100000", 2), ("800000 100000", 4), ("50000 100000", 1), ("", 4)]
)
def test_cores_are_those_of_the_affinity_and_of_the_quota(quota, cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5}, raising=False)
    monkeypatch.setattr(environment, "read_text_or_empty", lambda _: quota)
    assert environment.available_cpus() == cores


@pytest.mark.parametrize(("told", "threads"), [(None, 1), ("2", 2)])
def test_threads_are_no_more_than_cores_unless_the_user_says_so(told, threads, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    monkeypatch.setattr(environment, "available_cpus", lambda: 1)
    try:
        torch.set_num_threads(2)
        assert environment.set_threads() == threads == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def test_available_memory_is_the_system_s_and_none_where_it_does_not_say(monkeypatch):
    monkeypatch.setattr(environment, "read_text_or_empty", lambda _: "MemTotal:  9 kB\nMemAvailable:   123 kB\nBuffers: 7 kB\n")
    assert environment.available_bytes(torch.device("cpu")) == 123 * 1024
    monkeypatch.setattr(environment, "read_text_or_empty", lambda _: "")
    assert environment.available_bytes(torch.device("cpu")) is None
