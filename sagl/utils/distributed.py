"""One launcher, on Lightning Fabric, for commands that compute in several processes outside of training.

The processes are started by Fabric, torchrun or SLURM, and all of them run the same command line. torch and Lightning
are imported inside the functions, because commands read the rank before they need either.
"""

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, TypeVar

from sagl.errors import UserError, require, whole_number
from sagl.settings.sampling import DeviceSettings
from sagl.utils.environment import disable_tf32, gpu_problem, refuse_out_of_memory, set_threads
from sagl.utils.launchers import num_launched
from sagl.utils.signals import end_at_stop_signals

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")
TIMEOUT = timedelta(days=30)
"""Longest wait for another process. It is never reached: the launcher ends all processes when one dies."""
MIN_POLL_SECONDS, MAX_POLL_SECONDS = 0.005, 0.2
ERROR_KEY, LEFT_KEY = "sagl/error", "sagl/left"


# ---------------------------------------------------------------------------------------------- environment


def global_rank() -> int:
    """Return the rank of this process as torchrun, Fabric or SLURM announce it; 0 without a launcher.

    Fabric's own children have LOCAL_RANK and NODE_RANK but no RANK. LOCAL_RANK goes before SLURM_PROCID, which children
    of a command inside a SLURM job inherit. With several nodes, a rank from LOCAL_RANK is only exact as to being 0.
    """
    env = os.environ
    if "RANK" in env:
        return int(env["RANK"])
    if "LOCAL_RANK" in env:
        return int(env.get("NODE_RANK") or 0) * 1024 + int(env["LOCAL_RANK"])
    return int(env.get("SLURM_PROCID") or 0)


def has_launched_peers() -> bool:
    """Return whether torchrun or SLURM started other processes, which wait for this one even if nothing is to do."""
    return num_launched() > 1


def require_launcher(devices: DeviceSettings) -> None:
    """Refuse several nodes without a launcher, where a process would wait for others that nobody starts.

    Raises:
        UserError: `num_nodes` is above 1, and neither torchrun nor SLURM started this process.
    """
    require(
        devices.num_nodes == 1 or num_launched() > 1,
        f"`trainer.num_nodes` must be 1 without a launcher, got {devices.num_nodes}. Start the processes with torchrun "
        "or srun, see docs/sampling.md.",
    )


def select_device(devices: DeviceSettings) -> "torch.device":
    """Return the device of this process: a GPU by its local rank if one is usable and allowed, else the CPU.

    Raises:
        UserError: `accelerator` is gpu, and there is none that torch can use.
    """
    import torch

    if devices.accelerator == "cpu":
        return torch.device("cpu")
    problem = gpu_problem()
    available = torch.cuda.is_available() and not problem
    require(
        devices.accelerator != "gpu" or available,
        f"`trainer.accelerator` gpu needs a GPU that torch can use, and {problem or 'torch finds none'}.",
    )
    if not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0))


def report_unused_gpu(device: "torch.device") -> None:
    """Print on rank 0 why the GPU of this machine is not used, if `device` is the CPU in spite of it."""
    if device.type == "cpu" and global_rank() == 0 and (problem := gpu_problem()):
        print(f"The GPU is not used: {problem}. Computing on the CPU.", file=sys.stderr)


def num_processes(devices: DeviceSettings) -> tuple[int, int]:
    """Return the number of processes on this node and on all nodes.

    Raises:
        UserError: torchrun or SLURM started another number.
    """
    import torch

    launched, count = num_launched(), whole_number(devices.devices)
    num_gpus = torch.cuda.device_count() if select_device(devices).type == "cuda" else None
    local = count or (launched // devices.num_nodes if launched > 1 else num_gpus or 1)
    advice = " With several machines, give `trainer.num_nodes`." if launched > 1 else ""
    advice += " Give srun --gpus-per-node, not --gpus-per-task." if "SLURM_PROCID" in os.environ else ""
    require(
        num_gpus is None or local <= num_gpus,
        f"`trainer.devices` must be at most {num_gpus}, the GPUs that this process sees, got {local}.{advice}",
    )
    require(
        launched in (1, local * devices.num_nodes),
        f"`trainer.devices` times `trainer.num_nodes` must be {launched}, the number of processes that torchrun or "
        f"srun started, got {devices.devices} times {devices.num_nodes}.",
    )
    return local, local * devices.num_nodes


def exit_when_parent_dies() -> None:
    """Start a thread that ends this process as soon as its parent has ended, for whatever reason."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)  # the main thread may be blocked in a collective

    threading.Thread(target=watch, daemon=True).start()


# ------------------------------------------------------------------------------------------------- launcher


@dataclass(kw_only=True)
class Ranks:
    """The processes of a command as one of them sees them.

    Objects travel through CPU memory (gloo). `broadcast`, `gather` and `wait` must be called by all ranks in the same
    order. Each of them, and `share`, raises the `UserError` of a rank that failed.
    """

    rank: int = 0
    world_size: int = 1
    device: "torch.device"
    store: "Store | None" = None
    """Key-value store that rank 0 serves; None for a single process."""
    _num_waits: int = 0

    def share(self, items: Sequence[T]) -> Iterator[T]:
        """Yield this rank's items: every `world_size`-th one, starting with the item at index `rank`."""
        for item in items[self.rank :: self.world_size]:
            self._raise_if_failed()
            yield item

    def broadcast(self, obj: T | None) -> T:
        """Return rank 0's `obj` on all ranks; the argument of the other ranks is ignored."""
        objects: list[Any] = [obj]
        if self.world_size > 1:
            from torch import distributed

            self.wait()
            distributed.broadcast_object_list(objects, src=0)
        return objects[0]

    def gather(self, obj: T) -> list[T]:
        """Return the objects of all ranks, in order of ranks, on rank 0; an empty list on the others."""
        if self.world_size == 1:
            return [obj]
        from torch import distributed

        self.wait()
        objects: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        distributed.gather_object(obj, objects, dst=0)
        return objects or []

    def wait(self, on_poll: Callable[[], None] = lambda: None) -> None:
        """Wait until all ranks have called this; call `on_poll` meanwhile.

        A rank that failed never enters a collective, so this goes before each of them.
        """
        self._num_waits += 1
        self._wait_for_count(f"sagl/wait/{self._num_waits}", on_poll, self._raise_if_failed)

    def leave(self) -> None:
        """Disconnect. Rank 0 waits for the others, because it serves the store."""
        assert self.store is not None
        from torch import distributed

        if self.rank == 0:
            self._wait_for_count(LEFT_KEY)
        else:
            self.store.add(LEFT_KEY, 1)
        distributed.destroy_process_group()

    def _wait_for_count(self, key: str, *on_poll: Callable[[], None]) -> None:
        if self.store is None:
            return
        count, seconds = self.store.add(key, 1), MIN_POLL_SECONDS
        while count < self.world_size:
            for function in on_poll:
                function()
            time.sleep(seconds)
            seconds = min(1.5 * seconds, MAX_POLL_SECONDS)
            count = self.store.add(key, 0)

    def _raise_if_failed(self) -> None:
        if self.store is not None and self.store.check([ERROR_KEY]):
            raise UserError(self.store.get(ERROR_KEY).decode())


@contextmanager
def launch(devices: DeviceSettings) -> Iterator[Ranks]:
    """Run the body in all processes of this command, which are started here unless torchrun or SLURM did that.

    Only rank 0 goes on after the body; the processes of the other ranks exit with code 0. A process whose parent dies
    ends at once. Any exception but `UserError` ends its process, and the launcher then ends the others.

    Raises:
        UserError: on rank 0, the one that any rank raised. All ranks have left the body by then.
    """
    num_local, num_total = num_processes(devices)
    threads = set_threads(num_local)
    disable_tf32()
    if devices.accelerator == "auto":
        report_unused_gpu(select_device(devices))
    if num_total == 1:
        with refuse_out_of_memory("batch_size"):
            yield Ranks(device=select_device(devices))
        return
    if global_rank() > 0:
        exit_when_parent_dies()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # for the child processes; Lightning would choose another
    ranks = _connect(devices, num_local)
    assert ranks.store is not None
    error = None
    try:
        with refuse_out_of_memory("batch_size"):
            yield ranks
        ranks.wait()
    except UserError as caught:
        error = caught
        ranks.store.set(ERROR_KEY, str(error))
    ranks.leave()
    if ranks.rank > 0:
        sys.exit(0)
    if error is not None:
        raise error


@contextmanager
def refuse_on_all_ranks(devices: DeviceSettings) -> Iterator[None]:
    """Raise a `UserError` of the body on all ranks. For what rank 0 does before `launch`, where the others wait."""
    try:
        yield
    except UserError:
        if not has_launched_peers():
            raise
        with launch(devices):
            raise


@contextmanager
def lightning_errors() -> Iterator[None]:
    """Convert errors about the settings of a trainer to a `UserError`: those that Lightning's own code raises."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except UserError:
        raise
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ZeroDivisionError, ImportError) as error:
        raised_in = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)][-1]
        if not raised_in.startswith("lightning."):
            raise
        raise UserError(f"`trainer` has settings that cannot be used: {error}") from error


def _connect(devices: DeviceSettings, num_local: int) -> Ranks:
    """Start the other processes where that is needed, and connect with all of them."""
    from lightning.fabric import Fabric
    from lightning.fabric.strategies.ddp import DDPStrategy
    from torch.distributed.distributed_c10d import _get_default_store

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # Lightning uses a deprecated class of torch
    with lightning_errors(), end_at_stop_signals():
        fabric = Fabric(
            accelerator=select_device(devices).type,
            devices=num_local,
            num_nodes=devices.num_nodes,
            strategy=DDPStrategy(process_group_backend="gloo", timeout=TIMEOUT),
        )
        fabric.launch()
    store = _get_default_store()
    return Ranks(rank=fabric.global_rank, world_size=fabric.world_size, device=fabric.device, store=store)
