"""What every Lightning shell around a network in training has: random numbers, optimiser, skipped batches, logs."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW

from sagl.machine import peak_gigabytes
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.errors import require
from sagl.settings.training import OptimizerSettings
from sagl.shapes import Image, ImageUint8, Labels, PerSample, Timestep

Batch = tuple[ImageUint8, Labels]
Network = TypeVar("Network", bound=nn.Module)
QUARTERS = 4
"""Validation reports its loss in so many equal parts of the timesteps."""


def adamw(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> AdamW:
    """AdamW in one pass over memory."""
    s = settings
    optimizer = AdamW(parameters, lr=s.learning_rate, betas=s.betas, weight_decay=s.weight_decay, fused=True)
    optimizer._step_supports_amp_scaling = False  # it could unscale gradients itself; Lightning clips what it unscaled
    return optimizer


def built_from_seed(build: Callable[[], Network], seed: int) -> Network:
    """A network whose first weights are drawn from the seed alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def fixed_noise(x_0: Image, num_timesteps: int, batch_idx: int) -> tuple[Timestep, Image]:
    """What validation shows of a batch every time: evenly spread timesteps, (B,), and noise, (B, C, H, W)."""
    timesteps = (torch.arange(len(x_0)) * num_timesteps) // len(x_0)
    return timesteps, torch.randn(x_0.shape, generator=torch.Generator().manual_seed(batch_idx))


class TrainingModule(LightningModule):
    """A network in training on noised images. A subclass builds `network` and says what a batch teaches it."""

    network: nn.Module
    diffusion_settings: DiffusionSettings

    def __init__(self, optimizer: OptimizerSettings, max_skipped: int, seed: int) -> None:
        """What does not depend on the network.

        Args:
            optimizer: AdamW and its rate.
            max_skipped: a batch whose loss is not finite is skipped; after so many in a row the training ends.
            seed: of all that is drawn.

        Raises:
            UserError: `max_skipped` is below 0.
        """
        super().__init__()
        require(max_skipped >= 0, f"`max_skipped` must be at least 0, got {max_skipped}.")
        self.optimizer_settings, self.seed = optimizer, seed
        self._batch_ended: float | None = None
        self.max_skipped, self.skipped, self.skipped_in_a_row = max_skipped, 0, 0

    def _generator(self) -> torch.Generator:
        """Of all that a training step draws: from (seed, batch, rank)."""
        batch = self.trainer.fit_loop.total_batch_idx  # over all epochs, and a resumed run counts on
        words = np.random.SeedSequence([self.seed, batch, self.global_rank]).generate_state(1)
        return torch.Generator().manual_seed(int(words[0]))

    def _finite_everywhere(self, loss: Tensor) -> bool:
        """Whether the loss is finite on every rank; the skipped are counted.

        Raises:
            UserError: too many in a row were not.
        """
        finite = torch.isfinite(loss.detach()).float()
        if self.trainer.world_size > 1:
            finite = self.trainer.strategy.reduce(finite, reduce_op="sum") == self.trainer.world_size
        skipped = not bool(finite)
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        require(
            self.skipped_in_a_row <= self.max_skipped,
            f"`model.max_skipped` allows {self.max_skipped} batches in a row whose loss is not finite, and there are "
            "more. Lower model.optimizer.learning_rate, or set trainer.gradient_clip_val, and --resume.",
        )
        self.log("train/skipped", float(self.skipped))
        return not skipped

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As in validation, of other images."""
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:  # noqa: ANN401 (Lightning's own union)
        """AdamW; the rate as `OptimizerSettings.rate_factor` has it, step by step."""
        s = self.optimizer_settings
        optimizer = adamw((p for p in self.network.parameters() if p.requires_grad), s)
        max_steps = self.trainer.max_steps
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: s.rate_factor(step, max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    # ---------------------------------------------------------------------------------------------------- logs

    def _log_training(self, values: Mapping[str, Tensor]) -> None:
        """Under train/, with the rate."""
        self.log_dict({f"train/{name}": value for name, value in values.items()})
        self.log("train/rate", self.trainer.optimizers[0].param_groups[0]["lr"])

    def _log_by_quarter(self, name: str, values: PerSample, timesteps: Timestep) -> None:
        """The mean of (B,) values as val/NAME, and those of each quarter of the timesteps (0 the cleanest)."""
        self.log(f"val/{name}", values.mean(), batch_size=len(values), sync_dist=True)
        quarter = timesteps * QUARTERS // self.diffusion_settings.num_timesteps
        for q in range(QUARTERS):
            inside = values[quarter == q]
            if len(inside):
                self.log(f"val/{name}_quarter_{q}", inside.mean(), batch_size=len(inside), sync_dist=True)
        if name == "loss" and self.trainer.state.fn != "fit":
            self.log("val/images", float(len(values)), reduce_fx="sum", sync_dist=True)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:  # noqa: ANN401 (Lightning's own)
        """How fast it goes, data and all, and the most memory held so far."""
        now = time.monotonic()
        if self._batch_ended is not None:
            images = len(batch[0]) * self.trainer.world_size
            self.log("train/images_per_second", images / (now - self._batch_ended))
        self._batch_ended = now
        self.log("train/peak_gigabytes", peak_gigabytes())

    def on_validation_end(self) -> None:
        """The time of validation is no training time."""
        self._batch_ended = None

    def on_before_optimizer_step(self, optimizer: Any) -> None:  # noqa: ANN401 (Lightning's own)
        """The norm of the gradient, before it is clipped."""
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        if gradients:
            self.log("train/gradient_norm", torch.nn.utils.get_total_norm(gradients))

    # --------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """How many batches were skipped."""
        checkpoint["skipped"] = self.skipped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Count on."""
        self.skipped = checkpoint.get("skipped", 0)
