"""The processes of a command, and where they compute."""

import os
from typing import TYPE_CHECKING

from sagl.errors import require
from sagl.settings.sampling import DeviceSettings

if TYPE_CHECKING:  # torch is imported once the command line has been accepted
    import torch


def require_launcher(s: DeviceSettings) -> None:
    """Several machines need a launcher: nothing must wait for processes that nobody starts.

    Raises:
        UserError: there is none.
    """
    named = bool({"MASTER_ADDR", "SLURM_NTASKS"} & set(os.environ))
    require(
        s.num_nodes == 1 or named,
        f"`trainer.num_nodes` {s.num_nodes} needs processes on each, and nothing says where they are. Start them by "
        "torchrun or srun, see docs/sampling.md.",
    )


def select_device(s: DeviceSettings) -> "torch.device":
    """Where this process computes.

    Raises:
        UserError: a GPU was asked for, and there is none.
    """
    import torch

    there = torch.cuda.is_available()
    require(s.accelerator != "gpu" or there, "`trainer.accelerator` gpu needs a GPU, and torch sees none.")
    return torch.device("cuda" if there and s.accelerator != "cpu" else "cpu")


def num_processes(s: DeviceSettings) -> tuple[int, int]:
    """How many processes work on this machine, and in all."""
    if s.devices.isdecimal():
        here = int(s.devices)
    elif os.environ.get("LOCAL_WORLD_SIZE", "").isdecimal():  # torchrun has started them
        here = int(os.environ["LOCAL_WORLD_SIZE"])
    else:
        here = _num_gpus() if select_device(s).type == "cuda" else 1
    return here, here * s.num_nodes


def has_peers() -> bool:
    """Whether processes that torchrun or SLURM started wait to hear that nothing is left for them."""
    return any(int(os.environ.get(name) or 1) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS"))


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
