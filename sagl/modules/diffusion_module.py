"""The Lightning shell around a network in training: loss, labels, optimiser, logs. No formulas."""

import time
from collections.abc import Iterable, Sequence
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
    bound_timesteps,
    estimated_bits_per_dim,
    training_losses,
    without_bound,
)
from sagl.diffusion.schedule import make_schedule
from sagl.guidance.blur_aware import degraded_batch
from sagl.machine import peak_gigabytes
from sagl.models.adm import UNet
from sagl.models.transfer import freeze as freeze_parameters
from sagl.models.zoo import unet_named
from sagl.settings.diffusion import DiffusionSettings, LossSettings
from sagl.settings.errors import require
from sagl.settings.network import UNetSettings
from sagl.settings.training import BlurAwareSettings, OptimizerSettings
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


def _require_fitting(
    network: UNetSettings, diffusion: DiffusionSettings, label_dropout: float, blur_aware: BlurAwareSettings
) -> None:
    """Refuse settings that contradict each other.

    Raises:
        UserError: names the first.
    """
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
    if blur_aware.probability > 0 and blur_aware.mask == "attention":
        network.require_site(blur_aware.site)


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
        blur_aware: BlurAwareSettings = BlurAwareSettings(),  # noqa: B008
        freeze: Sequence[str] = (),
        max_skipped: int = 10,
        seed: int = 0,
    ) -> None:
        """Build the network.

        Args:
            network: the UNet: its settings, or the name of a released network that has them.
            diffusion: the process it is trained for; left out, the released network's, or ADM's.
            loss: what is minimised.
            optimizer: AdamW and its rate.
            label_dropout: share of training samples that see the null label instead of their own.
            blur_aware: images that are degraded as guidance degrades them.
            freeze: parameters that stay as they are, by patterns of their names: input_blocks.*, time_embed.*.
            max_skipped: a batch whose loss is not finite is skipped; after so many in a row the training ends.
            seed: of first weights, noise, timesteps and dropped labels.

        Raises:
            UserError: settings that contradict each other.
        """
        super().__init__()
        named, of_name = unet_named(network) if isinstance(network, str) else (network, DiffusionSettings())
        network, diffusion = named, diffusion or of_name
        _require_fitting(network, diffusion, label_dropout, blur_aware)
        require(max_skipped >= 0, f"`max_skipped` must be at least 0, got {max_skipped}.")
        settings = {"network": asdict(network), "diffusion": asdict(diffusion), "loss": asdict(loss)}
        settings |= {"optimizer": asdict(optimizer), "blur_aware": asdict(blur_aware)}
        more = {"freeze": list(freeze), "max_skipped": max_skipped}
        self.save_hyperparameters({**settings, "label_dropout": label_dropout, **more, "seed": seed})
        self.network_settings, self.diffusion_settings = network, diffusion
        self.loss_settings, self.optimizer_settings = loss, optimizer
        self.label_dropout, self.seed, self.blur_aware = label_dropout, seed, blur_aware
        self._batch_ended: float | None = None
        self.max_skipped, self.skipped, self.skipped_in_a_row = max_skipped, 0, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = UNet(network)
        freeze_parameters(self.network, freeze)
        self.schedule = make_schedule(diffusion)
        self.timestep_sampler: TimestepSampler = {
            "uniform": UniformTimesteps,
            "loss_second_moment": LossSecondMomentTimesteps,
        }[loss.timestep_sampler](num_timesteps=diffusion.num_timesteps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Mean loss of a batch, each sample at a timestep of its own; None, which trains nothing, if it is not finite.

        Raises:
            UserError: too many in a row were not.
        """
        x_0, labels = to_float(batch[0]), batch[1]
        generator = self._generator()
        timesteps, weights = self.timestep_sampler.sample(len(x_0), generator)
        noise = torch.randn(x_0.shape, generator=generator)
        dropped = torch.rand(len(x_0), generator=generator) < self.label_dropout
        losses = self._training_losses(x_0, timesteps, noise, self._with_null(labels, dropped), generator)
        loss = (losses.total * weights.to(losses.total)).mean()
        if not self._finite_everywhere(loss):
            return None
        self.timestep_sampler.update(self._of_all_ranks(timesteps), self._of_all_ranks(losses.total.detach()))
        self.log_dict({"train/loss": loss, "train/mse": losses.mse.mean(), "train/vb": losses.vb.mean()})
        self.log("train/rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def _training_losses(
        self, x_0: Image, timesteps: Tensor, noise: Image, labels: Labels | None, generator: torch.Generator
    ) -> Losses:
        """Of a batch, some of whose images are degraded where the training is blur-aware."""
        if self.blur_aware.probability == 0:
            return self._losses(x_0, timesteps, noise, labels)
        chosen = (torch.rand(len(x_0), generator=generator) < self.blur_aware.probability).to(x_0.device)
        there, noise = timesteps.to(x_0.device), noise.to(x_0.device)
        alpha_bar = self.schedule.alpha_bar(there)
        settings = self.blur_aware
        content, target = degraded_batch(
            settings, self.network, x_0, noise, alpha_bar, there, labels, chosen, generator
        )
        losses = self._losses(content, timesteps, noise, labels, target=target, degraded=chosen)
        return without_bound(losses, chosen)

    def _finite_everywhere(self, loss: Tensor) -> bool:
        """Whether the loss is finite on every rank; the skipped are counted."""
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

    def _of_all_ranks(self, values: Tensor) -> Tensor:
        """(B,) of every rank -> (B · ranks,), so that all ranks draw from the same histories."""
        alone = self.trainer.world_size == 1 or isinstance(self.timestep_sampler, UniformTimesteps)
        gathered: Tensor = values if alone else self.trainer.strategy.all_gather(values.to(self.device)).flatten()
        return gathered

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

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses at evenly spread timesteps and fixed noise, whole and by quarter of the timesteps (0 the cleanest).

        Outside of training also bits/dim, from one more pass an image.
        """
        x_0, labels = to_float(batch[0]), batch[1]
        total = self.diffusion_settings.num_timesteps
        timesteps = (torch.arange(len(x_0)) * total) // len(x_0)
        generator = torch.Generator().manual_seed(batch_idx)
        losses = self._losses(x_0, timesteps, torch.randn(x_0.shape, generator=generator), self._labels(labels))
        self._log_validation(losses, timesteps * QUARTERS // total)
        if self.trainer.state.fn != "fit":
            self._log_bits(x_0, self._labels(labels), generator)

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the timestep sampler has learned."""
        checkpoint["timestep_sampler"] = self.timestep_sampler.state()
        checkpoint["skipped"] = self.skipped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with what it had learned."""
        self.timestep_sampler.restore(checkpoint.get("timestep_sampler", {}))
        self.skipped = checkpoint.get("skipped", 0)

    def _losses(
        self,
        x_0: Image,
        timesteps: Tensor,
        noise: Image,
        labels: Labels | None,
        *,
        target: Image | None = None,
        degraded: Tensor | None = None,
    ) -> Losses:
        return training_losses(
            lambda x_t, t: self.network(x_t, t, labels, degraded=degraded).out,
            x_0,
            timesteps.to(x_0.device),
            noise.to(x_0.device),
            self.schedule,
            kind=self.loss_settings.kind,
            variance=self.diffusion_settings.variance,
            max_weight=self.loss_settings.max_weight,
            target=target,
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

    def _log_bits(self, x_0: Image, labels: Labels | None, generator: torch.Generator) -> None:
        """The estimate's mean, and what its error is made of."""
        schedule, size = self.schedule, len(x_0)
        timesteps, weights = bound_timesteps(size, schedule.num_steps, generator)
        noise = torch.randn(x_0.shape, generator=generator).to(x_0.device)
        bits = estimated_bits_per_dim(
            lambda x_t, t: self.network(x_t, t, labels).out,
            x_0,
            timesteps.to(x_0.device),
            weights,
            noise,
            schedule,
            variance=self.diffusion_settings.variance,
        )
        self.log("val/bits_per_dim", bits.mean(), batch_size=size, sync_dist=True)
        self.log("val/bits_per_dim_squared", bits.square().mean(), batch_size=size, sync_dist=True)
        self.log("val/images", float(size), reduce_fx="sum", sync_dist=True)

    def _generator(self) -> torch.Generator:
        batch = self.trainer.fit_loop.total_batch_idx  # over all epochs, and a resumed run counts on
        words = np.random.SeedSequence([self.seed, batch, self.global_rank]).generate_state(1)
        return torch.Generator().manual_seed(int(words[0]))
