import os
import socket
import time

import pytest

from sagl.errors import UserError
from sagl.utils import launchers
from sagl.utils.distributed import global_rank, has_launched_peers
from sagl.utils.launchers import PARENT, RANKS, SLURM_RANKS, SLURM_TASKS, ignore_stale_ranks, num_launched

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
BATCH = {"SLURM_JOB_ID": "5", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "4"}


@pytest.fixture
def ranks_of(environ, monkeypatch):
    """Set the variables of launchers to exactly the given ones; return those that remain of the ranks."""
    monkeypatch.setattr(launchers, "WAIT_SECONDS", 1e6)  # a message would be an output of later tests

    def run(**variables):
        environ(**variables)
        ignore_stale_ranks()
        return {name for name in os.environ if name in {*RANKS, *SLURM_RANKS}}

    return run


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"LOCAL_RANK": "1"},
        {"NODE_RANK": "1"},
        {"NODE_RANK": "worker-1"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
        {"WORLD_SIZE": "8", "MASTER_ADDR": "node0", "MASTER_PORT": "29500", "NODE_RANK": "1"},
        {"TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": "0"},
        {**TORCHRUN, "MASTER_PORT": ""},
        {"LOCAL_RANK": "1", "WORLD_SIZE": "2", PARENT: "1"},  # a child of a process that is not the parent
        BATCH,
        {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},  # a launcher of one process
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
        {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "5"},  # a shell of salloc
        {**BATCH, "SLURM_JOB_NAME": "bash", SLURM_TASKS: "1"},  # srun --pty bash
    ],
    ids=str,
)
def test_ranks_that_no_launcher_set_are_ignored(variables, ranks_of):
    assert ranks_of(**variables) == set()
    assert (global_rank(), has_launched_peers(), num_launched()) == (0, False, 1)


def test_the_address_of_a_launcher_with_one_process_is_not_used(ranks_of):
    ranks_of(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    assert not {"MASTER_ADDR", "MASTER_PORT"} & os.environ.keys()


def test_the_ranks_of_torchrun_go_before_those_of_slurm(ranks_of):
    assert ranks_of(**TORCHRUN, **BATCH, **{SLURM_TASKS: "4"}) == {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
    assert (global_rank(), has_launched_peers(), num_launched()) == (1, True, 2)


def test_the_ranks_of_srun_go_before_incomplete_others(ranks_of):
    variables = {**BATCH, "SLURM_PROCID": "3", SLURM_TASKS: "4", "WORLD_SIZE": "8", "LOCAL_RANK": "7"}
    assert ranks_of(**variables) == set(SLURM_RANKS) & set(BATCH)
    assert (global_rank(), has_launched_peers(), num_launched()) == (3, True, 4)


def test_a_child_of_the_launching_process_keeps_its_local_rank(ranks_of):
    variables = {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0", PARENT: str(os.getppid())}
    assert ranks_of(**variables, **BATCH) == {"LOCAL_RANK", "WORLD_SIZE", "NODE_RANK"}
    assert (global_rank(), has_launched_peers()) == (1, False)


def test_ranks_of_a_torchrun_that_has_ended_are_ignored(ranks_of):
    with socket.create_server(("127.0.0.1", 0)) as server:
        agent = {**TORCHRUN, "MASTER_PORT": str(server.getsockname()[1]), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        assert "RANK" in ranks_of(**agent)
    assert ranks_of(**agent) == set()


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "worker-1"), ("RANK", "2"), ("WORLD_SIZE", "0x2"), ("LOCAL_RANK", "-1")]
)
def test_ranks_that_are_not_possible_are_refused_by_name(name, value, ranks_of):
    with pytest.raises(UserError, match=f"`{name}` .*{value}"):
        ranks_of(**{**TORCHRUN, name: value})
    for name in ("SLURM_NTASKS", "SLURM_LOCALID"):
        with pytest.raises(UserError, match=rf"`{name}` .*2\(x3\)"):
            ranks_of(**{**BATCH, SLURM_TASKS: "4", name: "2(x3)"})
    with pytest.raises(UserError, match=r"`SLURM_PROCID` .*9"):
        ranks_of(**{**BATCH, SLURM_TASKS: "4", "SLURM_PROCID": "9"})


def test_a_process_that_waits_for_others_says_so(ranks_of, monkeypatch, capsys):
    monkeypatch.setattr(launchers, "WAIT_SECONDS", 0.01)
    ranks_of(**TORCHRUN)
    deadline = time.monotonic() + 10
    error = ""
    while "RANK=1, WORLD_SIZE=2" not in error and time.monotonic() < deadline:
        time.sleep(0.01)
        error += capsys.readouterr().err
    assert "RANK=1, WORLD_SIZE=2" in error
