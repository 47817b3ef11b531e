"""LightningModule of the ADM diffusion model: loss and validation of a batch."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sagl.diffusion.likelihood import estimated_bits_per_dim, sample_vlb_timesteps
from sagl.diffusion.losses import Losses, mask_vlb, training_losses
from sagl.diffusion.noise import SampleRngs, batch_rngs, bernoulli, randn
from sagl.diffusion.timestep_samplers import LossSecondMomentTimesteps, UniformTimesteps
from sagl.errors import require
from sagl.guidance.blur_aware import degrade_batch
from sagl.models.adm import UNet
from sagl.models.transfer import freeze
from sagl.models.zoo import get_unet_settings
from sagl.modules.training_module import Batch, TrainingModule, gather_batch, seeded_init
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import UNetSettings
from sagl.settings.training import DiffusionTrainingSettings
from sagl.shapes import Image, Labels, PerSample, Timestep
from sagl.utils.prefetch import to_device

TIMESTEP_SAMPLERS = {"uniform": UniformTimesteps, "loss_second_moment": LossSecondMomentTimesteps}


def check_training_settings(
    network: UNetSettings, diffusion: DiffusionSettings, settings: DiffusionTrainingSettings
) -> None:
    """Check the network against the other settings of its training.

    Raises:
        UserError: label dropout without a null label, a variance that the network does not predict, or a blur-aware
            site without attention.
    """
    require(
        settings.label_dropout == 0 or network.null_label,
        f"`label_dropout` must be 0 for a network without a null label, got {settings.label_dropout}. "
        "Set model.network.null_label.",
    )
    require(
        (diffusion.variance == "learned_range") == network.learn_sigma,
        f"`variance` must be learned_range exactly if learn_sigma is true, got {diffusion.variance} with "
        f"learn_sigma={network.learn_sigma}.",
    )
    if settings.blur_aware.probability > 0 and settings.blur_aware.mask == "attention":
        network.require_site(settings.blur_aware.site, group="model.blur_aware.")


class DiffusionModule(TrainingModule):
    """Training of an ADM diffusion model (Dhariwal & Nichol 2021, appendix B)."""

    network: UNet
    settings: DiffusionTrainingSettings

    def __init__(self, settings: DiffusionTrainingSettings) -> None:
        """Build the UNet.

        Raises:
            UserError: there is no released network of that name, or settings contradict each other.
        """
        network, diffusion = settings.network, DiffusionSettings()
        if isinstance(network, str):
            network, diffusion = get_unet_settings(network)
        network, diffusion = settings.apply_to(network), settings.diffusion or diffusion
        check_training_settings(network, diffusion, settings)
        super().__init__(replace(settings, network=network), diffusion)
        self.network_settings = network  # read by the data module
        self.network = seeded_init(lambda: UNet(network), settings.seed)
        freeze(self.network, settings.freeze)
        sampler_class = TIMESTEP_SAMPLERS[settings.loss.timestep_sampler]
        self.timestep_sampler = sampler_class(num_timesteps=diffusion.num_timesteps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of a batch, or a loss without gradients if it is not finite.

        Raises:
            UserError: the loss was not finite too many times in a row.
        """
        x_0 = self._to_float(batch[0])
        draw = self._sample_noise(x_0)
        labels = self._drop_labels(batch[1], bernoulli(draw.rngs, self.settings.label_dropout))
        losses = self._compute_losses(x_0, draw.timesteps, draw.noise, labels, draw.rngs)
        loss = (losses.total * to_device(draw.weights, losses.total.device).to(losses.total.dtype)).mean()
        if not self._log_if_finite({"loss": loss, "mse": losses.mse.mean(), "vlb": losses.vlb.mean()}):
            return self._zero_loss()
        if self.settings.loss.timestep_sampler != "uniform":
            self.timestep_sampler.update(draw.global_timesteps, gather_batch(losses.total.detach(), self.trainer))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Accumulate losses at fixed timesteps and noise; outside of `fit` also bits/dim, from one more pass."""
        x_0 = self._to_float(batch[0])
        labels = self._drop_labels(batch[1], torch.zeros_like(batch[1], dtype=torch.bool))
        ids = self._next_validation_ids(len(x_0))
        timesteps, noise = self._validation_noise(ids, x_0.shape[1:])
        losses = self._compute_losses(x_0, timesteps, noise, labels)
        self._accumulate("loss", losses.total, timesteps)
        self._accumulate("mse", losses.mse)
        if self.trainer.state.fn != "fit":
            bits = self._estimate_bits_per_dim(x_0, labels, ids)
            self._accumulate("bits_per_dim", bits)
            self._accumulate("bits_per_dim_squared", bits.square())

    def _compute_losses(
        self, x_0: Image, timesteps: Timestep, noise: Image, labels: Labels | None, rngs: SampleRngs | None = None
    ) -> Losses:
        """Compute the training losses; with `rngs`, blur-aware training degrades some of the images first."""
        timesteps, noise = to_device(timesteps, x_0.device), to_device(noise, x_0.device).to(x_0.dtype)
        x_input, target, degraded = x_0, noise, None
        blur_aware = self.settings.blur_aware
        if rngs is not None and blur_aware.probability > 0:
            degraded = to_device(bernoulli(rngs, blur_aware.probability), x_0.device)
            alpha_bar = self.schedule.alpha_bar(timesteps)
            x_input, target = degrade_batch(
                blur_aware, self.network, x_0, noise, alpha_bar, timesteps, labels, degraded, rngs
            )
        flags = degraded
        if flags is None and self.network.settings.degraded_embedding:  # DDP needs a gradient of every parameter
            flags = torch.zeros(len(x_0), dtype=torch.bool, device=x_0.device)
        losses = training_losses(
            lambda x_t, t: self._call_network(x_t, t, labels, degraded=flags).out,
            x_input,
            timesteps,
            noise,
            self.schedule,
            kind=self.settings.loss.kind,
            variance=self.diffusion_settings.variance,
            max_v_weight=self.settings.loss.max_v_weight,
            target=target,
        )
        return losses if degraded is None else mask_vlb(losses, degraded)

    def _drop_labels(self, labels: Labels, dropped: Tensor) -> Labels | None:
        """Replace labels that are dropped (B,) or below 0 by the null label; None for an unconditional network."""
        null_label = self.network.settings.num_classes
        if null_label is None:
            return None
        return torch.where(to_device(dropped, labels.device) | (labels < 0), null_label, labels)

    def _estimate_bits_per_dim(self, x_0: Image, labels: Labels | None, ids: Sequence[int]) -> PerSample:
        rngs = batch_rngs(0, 0, ids)
        timesteps, weights = sample_vlb_timesteps(rngs, self.schedule.num_steps)
        noise = randn(rngs, x_0.shape[1:]).to(x_0.device)
        return estimated_bits_per_dim(
            lambda x_t, t: self.network(x_t, t, labels).out,
            x_0,
            timesteps.to(x_0.device),
            weights,
            noise,
            self.schedule,
            variance=self.diffusion_settings.variance,
        )
