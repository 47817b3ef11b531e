"""The launcher of this process (torchrun, SLURM's srun, or sagl itself), by the variables that it sets."""

import os
import socket
import sys
import threading
from contextlib import suppress

from sagl.errors import require, whole_number

RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun and launches like it set, always all of them."""
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "TORCHELASTIC_RUN_ID")
SLURM_RANKS = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")
SLURM_TASKS = "SLURM_STEP_NUM_TASKS"
"""Number of the processes that srun started. A batch script, or a shell of salloc, has SLURM_NTASKS without it."""
PARENT = "SAGL_LAUNCHER_PID"
"""Variable with the id of the process that starts the others, in the environment of all of them."""
WAIT_SECONDS = 30.0


def ignore_stale_ranks() -> None:
    """Remove from the environment the ranks that no launcher set for this process.

    A shell can have them from an earlier launch, a batch job or the image of a machine. sagl, Lightning and torch would
    wait for processes that nobody starts.

    Raises:
        UserError: The variables of a launcher contradict each other.
    """
    env = os.environ
    if RENDEZVOUS[0] in env and _has_rendezvous():
        _check_rank("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        is_alone = int(env["WORLD_SIZE"]) == 1  # as without a launcher; torchrun itself may hold the port
        stale: tuple[str, ...] = (*SLURM_RANKS, *(dict.fromkeys(RANKS + RENDEZVOUS) if is_alone else ()))
    elif env.get(PARENT) == str(os.getppid()) and "LOCAL_RANK" in env:
        stale = ("RANK", *SLURM_RANKS)  # of a child process of the launcher in `distributed.py`, or of Lightning's
    elif "SLURM_PROCID" in env and env.get(SLURM_TASKS, "1") != "1":
        stale = RANKS
        _check_rank("SLURM_PROCID", SLURM_TASKS, "SLURM_NTASKS", "SLURM_LOCALID")
    else:
        stale = RANKS + SLURM_RANKS
    for name in stale:
        env.pop(name, None)
    if num_launched() > 1:
        _announce_wait()
    env[PARENT] = str(os.getpid())


def num_launched() -> int:
    """Return the number of processes that torchrun or srun started on all nodes; 1 without them."""
    env = os.environ
    return int(env["WORLD_SIZE"] if "RANK" in env else env.get("SLURM_NTASKS") or 1)


def _has_rendezvous() -> bool:
    """Return whether all variables of a rendezvous are set, and torchrun, if it set them, still runs."""
    env = os.environ
    if any(not env.get(name) for name in RENDEZVOUS):
        return False
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    with suppress(OSError, ValueError), socket.create_connection((env["MASTER_ADDR"], int(env["MASTER_PORT"])), 10):
        return True
    return False


def _check_rank(rank: str, world_size: str, *others: str) -> None:
    """Refuse a rank or a number of processes that is not possible, and other variables that are no numbers."""
    for name in (rank, world_size, *others):
        value = os.environ.get(name, "0")
        hint = "Unset it, or start the processes with torchrun or srun."
        require(whole_number(value) is not None, f"`{name}` must be a whole number, got {value!r:.60}. {hint}")
    number, count = int(os.environ[rank]), int(os.environ[world_size])
    require(number < count, f"`{rank}` must be less than {world_size}, {count}, got {number}. Unset both.")


def _announce_wait() -> None:
    """Say so if this process is not connected with the others after some time."""

    def announce() -> None:
        torch = sys.modules.get("torch")
        if torch is None or not torch.distributed.is_initialized():
            names = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "MASTER_ADDR", "MASTER_PORT")
            text = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
            print(f"Waiting for the other processes ({text}).", file=sys.stderr, flush=True)

    timer = threading.Timer(WAIT_SECONDS, announce)
    timer.daemon = True
    timer.start()
