"""A run's micro-batches over several processes, by Lightning's predict loop: the i-th goes to rank i mod world size.

The first process knows what is missing and tells the others; each writes its own shards, and who made which leaves no
trace. Words between them are few: the plan, "I am done", and what one was refused.
"""

import logging
import signal
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.distributed_c10d import Store, _get_default_store
from torch.utils.data import DataLoader

from sagl.commands.drawing import Drawing, recipe_of
from sagl.commands.request import Request
from sagl.errors import UserError
from sagl.sampling.run_folder import count_images
from sagl.utils.distributed import num_processes
from sagl.utils.environment import set_threads
from sagl.utils.progress import ProgressReporter
from sagl.utils.run_lock import RunLock, sharing

LONGEST = timedelta(days=30)
"""That one process may wait for another: the launcher notices when one has died."""
DONE, REFUSED = "sagl/done", "sagl/refused"
"""Words in the store that all processes see."""


class Share(LightningModule):
    """One process's share of a plan."""

    def __init__(self, drawing: Drawing | None = None, lock: RunLock | None = None) -> None:
        """Of the first process, with what it has begun; of the others, with nothing."""
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # near the end there is not one for each
        self.drawing, self.lock = drawing, lock
        self._held = ExitStack()

    def setup(self, stage: str) -> None:
        """Hear what is to be done, and load the weights; outside of the loop, so that gradients can be taken."""
        if self.lock is not None:
            self.lock.share()
        plan = self.trainer.strategy.broadcast(None if self.drawing is None else self.drawing.plan)
        assert plan is not None
        if self.drawing is None:
            self._held.enter_context(sharing(plan.job.folder))
            processes = self.trainer.world_size
            self.drawing = Drawing(plan=plan, recipe=recipe_of(plan.job), watch=ProgressReporter(), processes=processes)
        self._before = count_images(plan.job.folder)

    def predict_dataloader(self) -> DataLoader[list[int]]:
        """Ids wanted of each micro-batch of this rank."""
        assert self.drawing is not None
        mine: Any = self.drawing.plan.missing[self.global_rank :: self.trainer.world_size]
        return DataLoader(mine, batch_size=None, collate_fn=list)

    def on_predict_start(self) -> None:
        """SIGTERM ends the process, as ever: what is on the disk is whole. Lightning would only take note of it."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def predict_step(self, wanted: Sequence[int], batch_idx: int) -> None:
        """Make one micro-batch, unless a process has been refused one."""
        assert self.drawing is not None
        if self._store.check([REFUSED]):
            return
        try:
            self.drawing.lead(wanted) if self.lock else self.drawing.make(wanted)
        except UserError as error:
            self._store.set(REFUSED, str(error))
        self._show()

    def teardown(self, stage: str) -> None:
        """The first process leaves last."""
        done = self._store.add(DONE, 1)
        while self.lock and done < self.trainer.world_size:
            time.sleep(0.2)
            done = self._store.add(DONE, 0)
            self._show()
        self._held.close()

    def refused(self) -> str | None:
        """What a process was refused."""
        return self._store.get(REFUSED).decode() if self._store.check([REFUSED]) else None

    @property
    def _store(self) -> Store:
        return _get_default_store()

    def _show(self) -> None:
        """Move the bar by what all processes have put on the disk."""
        if self.lock is None or self.drawing is None:
            return
        held = count_images(self.drawing.plan.job.folder)
        if held > self._before:
            self.drawing.watch.images(held - self._before)
            self._before = held


def spread(drawing: Drawing, processes: int, lock: RunLock) -> None:
    """Make all that is missing, in this process and in those that it starts or that were started beside it.

    Args:
        drawing: what is to be done, and what this process does it with.
        processes: on this machine.
        lock: of the folder, held by this process alone.

    Raises:
        UserError: a process could not go on; what is on the disk is whole.
    """
    share = Share(drawing, lock)
    _run(share, drawing.plan.job.request, processes)
    if refused := share.refused():
        raise UserError(refused)


def follow(request: Request) -> None:
    """Do what the first process tells; for all the others."""
    _run(Share(), request, num_processes(request.device)[0])


def _run(share: Share, request: Request, processes: int) -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # there is nothing to load
    warnings.filterwarnings("ignore", message="predict returned None")  # what is made is on the disk
    warnings.filterwarnings("ignore", message="Total length of")  # nothing is missing
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # Lightning's own use of torch
    set_threads(processes)
    plugins: list[Any] = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    trainer = Trainer(
        accelerator=request.device.accelerator,
        devices=processes,
        num_nodes=request.device.num_nodes,
        strategy=DDPStrategy(timeout=LONGEST),
        plugins=plugins,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.predict(share, return_predictions=False)
