"""Sampling in several processes over gloo on the CPU: the bytes depend neither on their number nor on kills."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sagl.sampling.run_folder import iter_samples, list_shards
from sagl.utils.run_lock import lock_folder
from tests.helpers.commands import environments, exit_code
from tests.helpers.networks import write_grey_unet
from tests.helpers.processes import Process, is_alive

COUNT, BATCH = 90, 3
FLAGS = ["--sampler", "ddpm", "--respacing", 30, "--num_samples", COUNT, "--batch_size", BATCH, "--exports", "npz"]
FLAGS += ["--sag.scale", 0.5, "--sag.site", "output.0", "--sag.blur_sigma", 1, "--seed", 3]
FLAGS += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--progress", "lines"]
SHORT = ["--num_samples", 12, "--respacing", 4]
TIMEOUT_SECONDS = 180


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return write_grey_unet(tmp_path_factory.mktemp("network") / "tiny.safetensors")


@pytest.fixture
def sampling(network, tmp_path):
    """Start the command with one thread per process in a session of its own, which ends with the test."""
    processes_started = []

    def start(name, processes, *flags, prepare=os.setsid, variables=None):
        command = ["sample", "--checkpoint", network, "--output", tmp_path / name, *FLAGS]
        command += ["--trainer.devices", processes, *flags]
        variables, log = {"OMP_NUM_THREADS": "1", **(variables or {})}, tmp_path / f"{len(processes_started)}.output"
        process = Process(command, Path.cwd(), log, variables, prepare=prepare)
        process.output = log
        processes_started.append(process)
        return process

    yield start
    for run in processes_started:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()


def start_session_with_small_files():
    """Start a session whose processes cannot write files of more than 2,000 bytes."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


def sample_here(network, folder, *flags):
    """Sample in this process; return the files of the run."""
    command = ["sample", "--checkpoint", network, "--output", folder, *FLAGS, "--trainer.devices", 1, *flags]
    assert exit_code(*command) == 0
    return files(folder)


@pytest.fixture(scope="module")
def expected(network, tmp_path_factory):
    """The files of an uninterrupted run of one process."""
    return sample_here(network, tmp_path_factory.mktemp("expected") / "run")


def files(folder):
    """Return the bytes of shards and npz by name."""
    return {path.name: path.read_bytes() for path in sorted([*folder.glob("shards/*"), *folder.glob("*.npz")])}


def wait_for_success(run):
    assert run.wait(TIMEOUT_SECONDS) == 0, run.output.read_text()
    return run.output.read_text()


def children(pid):
    """Return the child processes of a process."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition):
    end = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def wait_for_more(folder, run):
    """Wait until the run has written another shard."""
    before = len(list_shards(folder))
    wait_for(lambda: len(list_shards(folder)) > before or run.poll() is not None)
    assert run.poll() is None, "it ended before it could be killed"


@pytest.mark.slow
def test_several_processes_write_the_bytes_of_one(network, sampling, tmp_path):
    output = wait_for_success(sampling("run", 3, *SHORT))
    assert files(tmp_path / "run") == sample_here(network, tmp_path / "single", *SHORT)
    assert "12/12 images" in output
    assert "Traceback" not in output
    assert "Warning" not in output


@pytest.mark.slow
def test_kills_damage_and_other_numbers_of_processes_change_no_byte(expected, sampling, tmp_path):
    folder, rng = tmp_path / "run", random.Random(0)
    for processes, victim in ((2, "first"), (3, "all"), (1, "all"), (2, "last")):
        run = sampling("run", processes)
        wait_for_more(folder, run)
        others = children(run.pid)
        time.sleep(rng.uniform(0, 0.3))
        if victim == "all":
            os.killpg(run.pid, signal.SIGKILL)
        else:
            os.kill(run.pid if victim == "first" else others[-1], signal.SIGKILL)
        assert run.wait(TIMEOUT_SECONDS) == -signal.SIGKILL
        wait_for(lambda others=others: not any(map(is_alive, others)))
    num_shards = len(list_shards(folder))
    assert 0 < num_shards < COUNT // BATCH
    damaged = next(iter(list_shards(folder).values()))
    damaged.write_bytes(damaged.read_bytes()[:-600])
    wait_for_success(sampling("run", 2))
    assert files(folder) == expected
    assert [sample.id for sample in iter_samples(folder)] == list(range(COUNT))
    assert not list(folder.rglob("*.partial"))


def test_a_run_that_another_command_holds_is_not_changed(network, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sagl.utils.run_lock.LOCK_TIMEOUT_SECONDS", 0.2)
    with lock_folder(tmp_path / "run"):
        command = ["sample", "--checkpoint", network, "--output", tmp_path / "run", *FLAGS]
        assert exit_code(*command) == 2
    assert str(tmp_path / "run") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_full_disk_of_one_process_ends_all_with_one_line_and_the_run_can_be_continued(expected, sampling, tmp_path):
    variables = {"PYTHONDONTWRITEBYTECODE": "1"}
    run = sampling("run", 2, prepare=start_session_with_small_files, variables=variables)
    exit_code = run.wait(TIMEOUT_SECONDS)
    output = run.output.read_text()
    assert exit_code == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("sagl sample:")]
    assert "--output" in line
    assert "Traceback" not in output
    wait_for_success(sampling("run", 2))
    assert files(tmp_path / "run") == expected


@pytest.mark.slow
def test_processes_of_torchrun_share_a_run_and_end_when_nothing_is_missing(expected, network, sampling, tmp_path):
    flags = ["--checkpoint", network, "--output", tmp_path / "run", *FLAGS]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "sagl.cli"]
    run = subprocess.run(
        [str(part) for part in [*command, "sample", *flags]],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert f"{COUNT} images in" in run.stdout
    assert files(tmp_path / "run") == expected
    run_again = [sampling("run", 2, variables=variables) for variables in environments(2)]
    assert "already contains this run" in "".join(map(wait_for_success, run_again))
    assert files(tmp_path / "run") == expected
