"""Gradients of several processes on CPUs, summed in one order whatever was before, so that a resume is exact."""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class RankOrder(Callback):
    """Has DDP sum gradients in the order of ranks where it runs over gloo.

    Gloo's own order is another for every part of a bucket, and DDP lays its buckets out anew after the first batch of
    a process: of three ranks or more, a resumed run's first gradients would differ in their last digits.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first batch; GPUs, and a hook that the user chose, are left alone."""
        strategy = trainer.strategy
        if not isinstance(strategy, DDPStrategy) or strategy.root_device.type != "cpu" or strategy._ddp_comm_hook:
            return
        if isinstance(strategy.model, DistributedDataParallel):
            strategy.model.register_comm_hook(None, mean_in_rank_order)


def mean_in_rank_order(
    state: Any,  # noqa: ANN401 (torch's own)
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # torch insists on it
) -> torch.futures.Future[Tensor]:
    """The mean of all ranks' gradients: a communication hook of DDP."""
    mine, ranks = bucket.buffer(), dist.get_world_size()
    gathered = [torch.empty_like(mine) for _ in range(ranks)]
    work = dist.all_gather(gathered, mine, async_op=True)

    def mean(_: Any) -> Tensor:  # noqa: ANN401 (torch's own)
        for other in gathered[1:]:
            gathered[0] += other
        return gathered[0].div_(ranks)

    return work.get_future().then(mean)
