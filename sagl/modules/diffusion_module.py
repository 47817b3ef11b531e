"""The Lightning shell around a network in training: loss, labels, optimiser, logs. No formulas."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

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
    spread_timesteps,
    training_losses,
    without_bound,
)
from sagl.diffusion.noise import (
    Streams,
    chance,
    initial_noise,
    normal,
    seed_dropout,
    timestep_generator,
    training_streams,
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

    Weights begin from the seed; what a sample is trained with is drawn from (seed, batch, its place in the batch of all
    ranks together), so that it is the same for any number of ranks. Dropout alone is drawn from (seed, batch, rank).
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
        self._learned, self._validated, self._sums = False, 0, torch.zeros(QUARTERS, 3, dtype=torch.float64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = UNet(network)
        freeze_parameters(self.network, freeze)
        self.schedule = make_schedule(diffusion)
        self.timestep_sampler: TimestepSampler = {
            "uniform": UniformTimesteps,
            "loss_second_moment": LossSecondMomentTimesteps,
        }[loss.timestep_sampler](num_timesteps=diffusion.num_timesteps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of a batch, each sample at a timestep of its own; one that trains nothing, if it is not finite.

        Raises:
            UserError: too many in a row were not.
        """
        x_0, labels = self._images(batch[0]), batch[1]
        rank, ranks, number = self.global_rank, self.trainer.world_size, self.trainer.fit_loop.total_batch_idx
        seed_dropout(self.seed, number, rank)
        streams = training_streams(self.seed, number, range(rank, len(x_0) * ranks, ranks))
        everywhere, weights = self.timestep_sampler.sample(len(x_0) * ranks, timestep_generator(self.seed, number))
        noise, dropped = normal(streams, x_0.shape[1:]), chance(streams, self.label_dropout)
        losses = self._training_losses(x_0, everywhere[rank::ranks], noise, self._with_null(labels, dropped), streams)
        loss = (losses.total * weights[rank::ranks].to(losses.total)).mean()
        means = self._of_ranks(torch.stack([loss, losses.mse.mean(), losses.vb.mean()]).detach(), "mean")
        if not self._is_finite(means[0]):
            return torch.stack([0 * p.sum() for p in self.network.parameters() if p.requires_grad]).sum()
        self._learned = True
        if self.loss_settings.timestep_sampler != "uniform":
            self.timestep_sampler.update(everywhere, self._of_all_ranks(losses.total.detach()))
        self.log_dict(dict(zip(("train/loss", "train/mse", "train/vb"), means, strict=True)))
        self.log("train/rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def _training_losses(
        self, x_0: Image, timesteps: Tensor, noise: Image, labels: Labels | None, streams: Streams
    ) -> Losses:
        """Of a batch, some of whose images are degraded where the training is blur-aware."""
        if self.blur_aware.probability == 0:
            return self._losses(x_0, timesteps, noise, labels)
        chosen = chance(streams, self.blur_aware.probability).to(x_0.device)
        there, noise = timesteps.to(x_0.device), noise.to(x_0)
        alpha_bar = self.schedule.alpha_bar(there)
        settings = self.blur_aware
        content, target = degraded_batch(settings, self.network, x_0, noise, alpha_bar, there, labels, chosen, streams)
        losses = self._losses(content, timesteps, noise, labels, target=target, degraded=chosen)
        return without_bound(losses, chosen)

    def _is_finite(self, loss: Tensor) -> bool:
        """Whether the mean loss of all ranks is finite, and so each of them; the skipped are counted."""
        skipped = not bool(torch.isfinite(loss))
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        require(
            self.skipped_in_a_row <= self.max_skipped,
            f"`model.max_skipped` allows {self.max_skipped} batches in a row whose loss is not finite, and there are "
            "more. Lower model.optimizer.learning_rate, or set trainer.gradient_clip_val, and --resume.",
        )
        self.log("train/skipped", float(self.skipped))
        return not skipped

    def _images(self, images: ImageUint8) -> Image:
        """In float32, or in float64 if the network is."""
        dtype = next(self.network.parameters()).dtype
        return to_float(images).to(torch.promote_types(dtype, torch.float32))

    def _of_ranks(self, values: Tensor, kind: str) -> Tensor:
        """Mean or sum of what every rank has its own of."""
        if self.trainer.world_size == 1:
            return values
        reduced: Tensor = self.trainer.strategy.reduce(values.to(self.device), reduce_op=kind)
        return reduced

    def _of_all_ranks(self, values: Tensor) -> Tensor:
        """(B,) of every rank -> (B · ranks,) by place in the whole batch, so that all ranks learn alike."""
        if self.trainer.world_size == 1:
            return values
        gathered: Tensor = self.trainer.strategy.all_gather(values)
        return gathered.T.flatten()

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
        """The norm of the gradient, before it is clipped; without one, if all that was accumulated was skipped."""
        if not self._learned:
            optimizer.zero_grad()  # gradients of 0 would still let AdamW's running means move the weights
        self._learned = False
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        if gradients:
            self.log("train/gradient_norm", torch.nn.utils.get_total_norm(gradients))

    def on_validation_epoch_start(self) -> None:
        """Begin to count."""
        self._validated, self._sums = 0, torch.zeros(QUARTERS, 3, dtype=torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses of images, each at a timestep and noise that stay its own, for any number of ranks.

        Outside of training also bits/dim, from one more pass an image.
        """
        x_0, labels = self._images(batch[0]), self._labels(batch[1])
        places = range(self._validated, self._validated + len(x_0))
        ids = [place * self.trainer.world_size + self.global_rank for place in places]
        self._validated += len(x_0)
        total = self.diffusion_settings.num_timesteps
        timesteps = spread_timesteps(ids, total)
        losses = self._losses(x_0, timesteps, initial_noise(0, ids, x_0.shape[1:]), labels)
        rows = torch.stack([torch.ones_like(losses.mse), losses.total, losses.mse], dim=1)
        self._sums.index_add_(0, timesteps * QUARTERS // total, rows.double().cpu())
        if self.trainer.state.fn != "fit":
            self._log_bits(x_0, labels, torch.Generator().manual_seed(batch_idx))

    def on_validation_epoch_end(self) -> None:
        """Mean losses of all ranks, whole and by quarter of the timesteps (0 the cleanest)."""
        sums = self._of_ranks(self._sums, "sum").cpu()
        images, loss, mse = sums.sum(dim=0).tolist()
        self.log_dict({"val/loss": loss / images, "val/mse": mse / images})
        for q, (inside, total, _) in enumerate(sums.tolist()):
            if inside:
                self.log(f"val/loss_quarter_{q}", total / inside)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As in validation, of other images."""
        self.validation_step(batch, batch_idx)

    on_test_epoch_start, on_test_epoch_end = on_validation_epoch_start, on_validation_epoch_end

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
        checkpoint["skipped"], checkpoint["skipped_in_a_row"] = self.skipped, self.skipped_in_a_row

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with what it had learned."""
        self.timestep_sampler.restore(checkpoint.get("timestep_sampler", {}))
        self.skipped, self.skipped_in_a_row = checkpoint.get("skipped", 0), checkpoint.get("skipped_in_a_row", 0)

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
        if degraded is None and self.network_settings.degraded_embedding:
            degraded = torch.zeros(
                len(x_0), dtype=torch.bool, device=x_0.device
            )  # DDP waits for a parameter that no loss reads
        return training_losses(
            lambda x_t, t: self.network(x_t, t, labels, degraded=degraded).out,
            x_0,
            timesteps.to(x_0.device),
            noise.to(x_0),
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
