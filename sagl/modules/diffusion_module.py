"""The Lightning shell around a network in training: loss, labels, optimiser, logs. No formulas."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW

from sagl.data.pixels import to_float
from sagl.diffusion.losses import (
    Losses,
    LossSecondMomentTimesteps,
    TimestepSampler,
    UniformTimesteps,
    training_losses,
)
from sagl.diffusion.schedule import make_schedule
from sagl.models.adm import UNet
from sagl.models.zoo import unet_named
from sagl.settings.diffusion import DiffusionSettings, LossSettings
from sagl.settings.errors import require
from sagl.settings.network import UNetSettings
from sagl.settings.training import OptimizerSettings
from sagl.shapes import Image, ImageUint8, Labels

Batch = tuple[ImageUint8, Labels]
QUARTERS = 4
"""Validation reports its loss in so many equal parts of the timesteps."""


def adamw(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> AdamW:
    """AdamW in one pass over memory."""
    s = settings
    optimizer = AdamW(parameters, lr=s.learning_rate, betas=s.betas, weight_decay=s.weight_decay, fused=True)
    optimizer._step_supports_amp_scaling = False  # it could unscale gradients itself; Lightning clips what it unscaled
    return optimizer


class DiffusionModule(LightningModule):
    """An ADM network in training (Dhariwal & Nichol 2021, appendix B): the hybrid loss on noised images.

    Weights begin from the seed; noise, timesteps and dropped labels are drawn from (seed, batch, rank) alone.
    """

    def __init__(
        self,
        network: UNetSettings | str,
        diffusion: DiffusionSettings | None = None,
        loss: LossSettings = LossSettings(),  # noqa: B008 (frozen)
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008
        label_dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Build the network.

        Args:
            network: the UNet: its settings, or the name of a released network that has them.
            diffusion: the process it is trained for; left out, the released network's, or ADM's.
            loss: what is minimised.
            optimizer: AdamW and its rate.
            label_dropout: share of training samples that see the null label instead of their own.
            seed: of first weights, noise, timesteps and dropped labels.

        Raises:
            UserError: settings that contradict each other.
        """
        super().__init__()
        named, of_name = unet_named(network) if isinstance(network, str) else (network, DiffusionSettings())
        network, diffusion = named, diffusion or of_name
        require(0 <= label_dropout <= 1, f"`label_dropout` must be in [0, 1], got {label_dropout}.")
        require(
            label_dropout == 0 or network.null_label,
            f"`label_dropout` needs a network with null_label: true, got {label_dropout} without. "
            "Set model.network.null_label.",
        )
        learned = diffusion.variance == "learned_range"
        require(
            learned == network.learn_sigma,
            f"`variance` must be learned_range exactly if learn_sigma is true, got {diffusion.variance} with "
            f"learn_sigma={network.learn_sigma}.",
        )
        settings = {"network": asdict(network), "diffusion": asdict(diffusion), "loss": asdict(loss)}
        settings |= {"optimizer": asdict(optimizer)}
        self.save_hyperparameters({**settings, "label_dropout": label_dropout, "seed": seed})
        self.network_settings, self.diffusion_settings = network, diffusion
        self.loss_settings, self.optimizer_settings = loss, optimizer
        self.label_dropout, self.seed = label_dropout, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = UNet(network)
        self.schedule = make_schedule(diffusion)
        self.timestep_sampler: TimestepSampler = {
            "uniform": UniformTimesteps,
            "loss_second_moment": LossSecondMomentTimesteps,
        }[loss.timestep_sampler](num_timesteps=diffusion.num_timesteps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of a batch, each sample at a timestep of its own."""
        x_0, labels = to_float(batch[0]), batch[1]
        generator = self._generator()
        timesteps, weights = self.timestep_sampler.sample(len(x_0), generator)
        noise = torch.randn(x_0.shape, generator=generator)
        dropped = torch.rand(len(x_0), generator=generator) < self.label_dropout
        losses = self._losses(x_0, timesteps, noise, self._with_null(labels, dropped))
        self.timestep_sampler.update(timesteps, losses.total.detach())
        loss = (losses.total * weights.to(losses.total)).mean()
        self.log_dict({"train/loss": loss, "train/mse": losses.mse.mean(), "train/vb": losses.vb.mean()})
        self.log("train/rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses at evenly spread timesteps and fixed noise, whole and by quarter of the timesteps (0 the cleanest)."""
        x_0, labels = to_float(batch[0]), batch[1]
        total = self.diffusion_settings.num_timesteps
        timesteps = (torch.arange(len(x_0)) * total) // len(x_0)
        generator = torch.Generator().manual_seed(batch_idx)
        losses = self._losses(x_0, timesteps, torch.randn(x_0.shape, generator=generator), self._labels(labels))
        self._log_validation(losses, timesteps * QUARTERS // total)

    def configure_optimizers(self) -> Any:  # noqa: ANN401 (Lightning's own union)
        """AdamW; the rate as `OptimizerSettings.rate_factor` has it, step by step."""
        s = self.optimizer_settings
        optimizer = adamw(self.network.parameters(), s)
        max_steps = self.trainer.max_steps
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: s.rate_factor(step, max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the timestep sampler has learned."""
        checkpoint["timestep_sampler"] = self.timestep_sampler.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with what it had learned."""
        self.timestep_sampler.restore(checkpoint.get("timestep_sampler", {}))

    def _losses(self, x_0: Image, timesteps: Tensor, noise: Image, labels: Labels | None) -> Losses:
        return training_losses(
            lambda x_t, t: self.network(x_t, t, labels).out,
            x_0,
            timesteps.to(x_0.device),
            noise.to(x_0.device),
            self.schedule,
            kind=self.loss_settings.kind,
            variance=self.diffusion_settings.variance,
            max_weight=self.loss_settings.max_weight,
        )

    def _labels(self, labels: Labels) -> Labels | None:
        return self._with_null(labels, torch.zeros_like(labels, dtype=torch.bool))

    def _with_null(self, labels: Labels, dropped: Tensor) -> Labels | None:
        """Labels with the null label where they are dropped, or where an image has none."""
        classes = self.network_settings.num_classes
        return None if classes is None else torch.where(dropped.to(labels.device) | (labels < 0), classes, labels)

    def _log_validation(self, losses: Losses, quarter: Tensor) -> None:
        self.log("val/loss", losses.total.mean(), batch_size=len(quarter), sync_dist=True)
        self.log("val/mse", losses.mse.mean(), batch_size=len(quarter), sync_dist=True)
        for q in range(QUARTERS):
            inside = losses.total[quarter == q]
            if len(inside):
                self.log(f"val/loss_quarter_{q}", inside.mean(), batch_size=len(inside), sync_dist=True)

    def _generator(self) -> torch.Generator:
        batch = self.trainer.fit_loop.total_batch_idx  # over all epochs, and a resumed run counts on
        words = np.random.SeedSequence([self.seed, batch, self.global_rank]).generate_state(1)
        return torch.Generator().manual_seed(int(words[0]))
