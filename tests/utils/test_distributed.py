"""Ranks of a command over gloo on the CPU, started by Fabric and by torchrun."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from sagl.errors import UserError
from sagl.settings.sampling import DeviceSettings
from sagl.utils.distributed import (
    Ranks,
    global_rank,
    has_launched_peers,
    launch,
    num_processes,
    report_unused_gpu,
    require_launcher,
    select_device,
)
from tests.helpers.commands import environments
from tests.helpers.processes import import_from, run_program, run_ranks

PROGRAM = """
import sys
from sagl.errors import UserError
from sagl.settings.sampling import DeviceSettings
from sagl.utils.distributed import launch

devices, failing = sys.argv[1], sys.argv[2]
try:
    with launch(DeviceSettings(devices=devices, accelerator="cpu")) as ranks:
        word = ranks.broadcast("plan" if ranks.rank == 0 else None)
        items = []
        for item in ranks.share(range(5)):
            if str(ranks.rank) == failing:
                raise UserError(f"rank {ranks.rank} failed")
            items.append((word, item))
        gathered = ranks.gather(items)
        assert bool(gathered) == (ranks.rank == 0)
except UserError as error:
    print("error:", error)
else:
    print("result:", gathered)
"""
GATHERED = [[("plan", 0), ("plan", 2), ("plan", 4)], [("plan", 1), ("plan", 3)]]
"""Result of two processes."""
VARIABLES = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def run_ranks_of_fabric(folder, devices, failing="none"):
    """Run the program, which starts its other processes; return its output after exit code 0."""
    (folder / "program.py").write_text(PROGRAM)
    options = {"module": "program", "prepare": partial(import_from, folder), "variables": VARIABLES}
    code, output = run_program([devices, failing], folder, folder / "output.txt", timeout=60, **options)
    assert code == 0, output
    return output


def results_in(output):
    """Return the lines that the programs of this file print, without those of libraries."""
    return [line for line in output.splitlines() if line.startswith(("result:", "error:"))]


def test_ranks_share_items_in_turn_and_only_rank_0_goes_on(tmp_path):
    output = run_ranks_of_fabric(tmp_path, 2)
    assert results_in(output) == [f"result: {GATHERED}"]
    assert "Warning" not in output


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_any_rank_is_raised_on_rank_0_and_ends_the_others(failing, tmp_path):
    output = run_ranks_of_fabric(tmp_path, 3, failing)
    assert results_in(output) == [f"error: rank {failing} failed"]
    assert "Traceback" not in output


@pytest.mark.slow
def test_torchrun_s_processes_are_used_where_it_started_them(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command, env = [*torchrun, str(tmp_path / "program.py"), "auto", "none"], os.environ | VARIABLES
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"result: {GATHERED}\n"


def test_a_single_process_needs_no_launcher_and_keeps_its_errors(environ):
    with launch(DeviceSettings(devices="1", accelerator="cpu")) as ranks:
        assert ranks == Ranks(device=torch.device("cpu"))
        assert list(ranks.share("abc")) == ["a", "b", "c"]
        assert ranks.broadcast("plan") == "plan"
        assert ranks.gather(3) == [3]
    with pytest.raises(UserError, match="no space"), launch(DeviceSettings(accelerator="cpu")):
        raise UserError("no space")


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({}, 0),
        ({"RANK": "3", "LOCAL_RANK": "1", "SLURM_PROCID": "0"}, 3),
        ({"LOCAL_RANK": "1", "SLURM_PROCID": "0"}, 1),
        ({"LOCAL_RANK": "0", "SLURM_PROCID": "2"}, 0),
        ({"SLURM_PROCID": "2"}, 2),
    ],
)
def test_the_rank_is_torchrun_s_before_fabric_s_before_slurm_s(variables, rank, environ):
    environ(**variables)
    assert global_rank() == rank


def test_fabric_s_children_on_another_node_are_not_rank_0(environ):
    environ(NODE_RANK="1", LOCAL_RANK="0")
    assert global_rank() > 0


@pytest.mark.parametrize(
    ("variables", "peers"),
    [
        ({}, False),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"SLURM_NTASKS": "4"}, True),
        ({"SLURM_NTASKS": "1"}, False),
    ],
)
def test_peers_are_processes_that_a_launcher_started(variables, peers, environ):
    environ(**variables)
    assert has_launched_peers() == peers


@pytest.mark.parametrize("variables", [{"RANK": "1", "WORLD_SIZE": "2"}, {"SLURM_NTASKS": "2"}])
def test_several_nodes_need_a_launcher(variables, environ):
    devices = DeviceSettings(num_nodes=2)
    with pytest.raises(UserError, match=r"num_nodes.*2"):
        require_launcher(devices)
    environ(**variables)
    require_launcher(devices)
    require_launcher(DeviceSettings())


@pytest.mark.parametrize(
    ("devices", "nodes", "variables", "expected"),
    [
        ("auto", 1, {}, (1, 1)),
        ("3", 2, {}, (3, 6)),
        ("auto", 2, {"RANK": "1", "WORLD_SIZE": "8"}, (4, 8)),
        ("auto", 2, {"SLURM_NTASKS": "8"}, (4, 8)),
        ("4", 2, {"SLURM_NTASKS": "8"}, (4, 8)),
    ],
)
def test_processes_are_counted_by_setting_then_by_launcher(devices, nodes, variables, expected, environ):
    environ(**variables)
    assert num_processes(DeviceSettings(devices=devices, num_nodes=nodes, accelerator="cpu")) == expected


@pytest.mark.parametrize(
    ("variables", "advice"),
    [
        ({}, "got 4"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "trainer.num_nodes"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "--gpus-per-node"),
    ],
)
def test_more_processes_than_gpus_are_refused(variables, advice, environ, monkeypatch):
    environ(**variables)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=rf"`trainer.devices` .*at most 2.*{advice}"):
        num_processes(DeviceSettings(devices="4"))


def test_another_number_of_processes_than_the_launcher_started_is_refused(environ):
    environ(RANK="1", WORLD_SIZE="4")
    for devices, nodes in (("2", 1), ("auto", 3)):
        with pytest.raises(UserError, match=r"`trainer.devices` .*4"):
            num_processes(DeviceSettings(devices=devices, num_nodes=nodes, accelerator="cpu"))


@pytest.mark.parametrize("variables", [{}, {"LOCAL_RANK": "1", "SLURM_LOCALID": "3"}, {"SLURM_LOCALID": "2"}])
def test_each_process_of_a_node_has_a_gpu_of_its_own(variables, environ, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    environ(**variables)
    index = int(next(iter(variables.values()), "0"))
    assert select_device(DeviceSettings()) == torch.device("cuda", index)
    assert select_device(DeviceSettings(accelerator="cpu")) == torch.device("cpu")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"accelerator.*gpu"):
        select_device(DeviceSettings(accelerator="gpu"))


def test_processes_talk_over_gloo_and_need_no_nccl(monkeypatch):
    class LaunchedError(Exception):
        pass

    def launch_nothing(**options):
        assert options["strategy"]._process_group_backend == "gloo"
        raise LaunchedError

    monkeypatch.setattr("lightning.fabric.Fabric", launch_nothing)
    with pytest.raises(LaunchedError), launch(DeviceSettings(devices="2", accelerator="cpu")):
        pass


def test_running_out_of_memory_names_the_batch_size():
    with pytest.raises(UserError, match="`batch_size`"), launch(DeviceSettings(devices="1", accelerator="cpu")):
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("problem", ["", "its driver is too old"])
def test_a_gpu_that_torch_cannot_use_is_reported_and_left_or_refused(problem, environ, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sagl.utils.distributed.gpu_problem", lambda: problem)
    device = select_device(DeviceSettings())
    assert device.type == ("cpu" if problem else "cuda")
    report_unused_gpu(device)
    assert capsys.readouterr().err.count(problem or "GPU") == bool(problem)
    if problem:
        with pytest.raises(UserError, match=f"accelerator.*{problem}"):
            select_device(DeviceSettings(accelerator="gpu"))


REFUSED = """
from sagl.errors import UserError
from sagl.settings.sampling import DeviceSettings
from sagl.utils.distributed import global_rank, launch, refuse_on_all_ranks

devices = DeviceSettings(devices="2", accelerator="cpu")
try:
    if global_rank() == 0:
        with refuse_on_all_ranks(devices):
            raise UserError("refused before the launch")
    with launch(devices) as ranks:
        ranks.broadcast(None)
except UserError as error:
    print("error:", error)
"""


@pytest.mark.slow
def test_ranks_that_a_launcher_started_do_not_wait_for_one_that_is_refused_before_the_launch(tmp_path):
    (tmp_path / "program.py").write_text(REFUSED)
    ranks = run_ranks(
        [], tmp_path, environments(2), timeout=120, module="program", prepare=partial(import_from, tmp_path)
    )
    assert [code for code, _ in ranks] == [0, 0], ranks
    assert [results_in(output) for _, output in ranks] == [["error: refused before the launch"], []]
