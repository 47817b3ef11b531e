import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource, sys
import torch
from sagl.machine import keep_freed_memory
kept = sys.argv[1] == "kept" and keep_freed_memory()
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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is what is told")
def test_memory_of_freed_tensors_is_kept_for_the_next_step():
    kept, faults = faults_of("kept")
    assert kept
    assert faults < 0.2 * faults_of("given back")[1]  # not 0: the heap may still have to grow by one tensor


def test_other_c_libraries_are_left_alone(monkeypatch):
    from sagl import machine

    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("musl", "1.2"))
    assert machine.keep_freed_memory() is False
