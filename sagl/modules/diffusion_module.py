"""The Lightning shell around a network in training: loss, labels, optimiser, logs. No formulas."""

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from sagl.diffusion.likelihood import estimated_bits_per_dim, sample_vlb_timesteps
from sagl.diffusion.losses import Losses, mask_vlb, training_losses
from sagl.diffusion.noise import SampleRngs, bernoulli
from sagl.diffusion.schedule import make_schedule
from sagl.diffusion.timestep_samplers import LossSecondMomentTimesteps, UniformTimesteps
from sagl.errors import require
from sagl.guidance.blur_aware import degrade_batch
from sagl.models.adm import UNet
from sagl.models.transfer import freeze as freeze_parameters
from sagl.models.zoo import get_unet_settings
from sagl.modules.training_module import Batch, TrainingModule, seeded_init
from sagl.settings.diffusion import DiffusionSettings, LossSettings
from sagl.settings.network import UNetSettings
from sagl.settings.training import BlurAwareSettings, OptimizerSettings
from sagl.shapes import Image, Labels


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


class DiffusionModule(TrainingModule):
    """An ADM network in training (Dhariwal & Nichol 2021, appendix B): the hybrid loss on noised images.

    Weights begin from the seed; what an image is trained with is drawn as for every `TrainingModule`.
    """

    network: UNet

    def __init__(
        self,
        network: UNetSettings | str,
        diffusion: DiffusionSettings | None = None,
        loss: LossSettings = LossSettings(),  # noqa: B008 (frozen)
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008
        label_dropout: float = 0.0,
        blur_aware: BlurAwareSettings = BlurAwareSettings(),  # noqa: B008
        freeze: Sequence[str] = (),
        max_nonfinite_batches: int = 10,
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
            max_nonfinite_batches: a batch whose loss is not finite is skipped; after so many in a row the training ends.
            seed: of first weights, noise, timesteps and dropped labels.

        Raises:
            UserError: settings that contradict each other.
        """
        super().__init__(optimizer, max_nonfinite_batches, seed)
        named, of_name = get_unet_settings(network) if isinstance(network, str) else (network, DiffusionSettings())
        network, diffusion = named, diffusion or of_name
        _require_fitting(network, diffusion, label_dropout, blur_aware)
        settings = {"network": asdict(network), "diffusion": asdict(diffusion), "loss": asdict(loss)}
        settings |= {"optimizer": asdict(optimizer), "blur_aware": asdict(blur_aware)}
        more = {"freeze": list(freeze), "max_nonfinite_batches": max_nonfinite_batches}
        self.save_hyperparameters({**settings, "label_dropout": label_dropout, **more, "seed": seed})
        self.network_settings, self.diffusion_settings = network, diffusion
        self.loss_settings, self.label_dropout, self.blur_aware = loss, label_dropout, blur_aware
        self.network = seeded_init(lambda: UNet(network), seed)
        freeze_parameters(self.network, freeze)
        self.schedule = make_schedule(diffusion)
        self.timestep_sampler: UniformTimesteps = {
            "uniform": UniformTimesteps,
            "loss_second_moment": LossSecondMomentTimesteps,
        }[loss.timestep_sampler](num_timesteps=diffusion.num_timesteps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of a batch, each sample at a timestep of its own; one that trains nothing, if it is not finite.

        Raises:
            UserError: too many in a row were not.
        """
        x_0 = self._images(batch[0])
        drawn = self._drawn(x_0)
        labels = self._with_null(batch[1], bernoulli(drawn.rngs, self.label_dropout))
        losses = self._training_losses(x_0, drawn.timesteps, drawn.noise, labels, drawn.rngs)
        loss = (losses.total * drawn.weights.to(losses.total)).mean()
        if not self._learns({"loss": loss, "mse": losses.mse.mean(), "vb": losses.vlb.mean()}):
            return self._nothing()
        if self.loss_settings.timestep_sampler != "uniform":
            self.timestep_sampler.update(drawn.everywhere, self._of_all_ranks(losses.total.detach()))
        return loss

    def _training_losses(
        self, x_0: Image, timesteps: Tensor, noise: Image, labels: Labels | None, rngs: SampleRngs
    ) -> Losses:
        """Of a batch, some of whose images are degraded where the training is blur-aware."""
        if self.blur_aware.probability == 0:
            return self._losses(x_0, timesteps, noise, labels)
        chosen = bernoulli(rngs, self.blur_aware.probability).to(x_0.device)
        there, noise = timesteps.to(x_0.device), noise.to(x_0)
        alpha_bar = self.schedule.alpha_bar(there)
        settings = self.blur_aware
        content, target = degrade_batch(settings, self.network, x_0, noise, alpha_bar, there, labels, chosen, rngs)
        losses = self._losses(content, timesteps, noise, labels, target=target, degraded=chosen)
        return mask_vlb(losses, chosen)

    def _of_all_ranks(self, values: Tensor) -> Tensor:
        """(B,) of every rank -> (B · ranks,) by place in the whole batch, so that all ranks learn alike."""
        if self.trainer.world_size == 1:
            return values
        gathered: Tensor = self.trainer.strategy.all_gather(values)
        return gathered.T.flatten()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses of images, each at a timestep and noise that stay its own, for any number of ranks.

        Outside of training also bits/dim, from one more pass an image.
        """
        x_0, labels = self._images(batch[0]), self._labels(batch[1])
        timesteps, noise = self._shown(x_0)
        losses = self._losses(x_0, timesteps, noise, labels)
        self._count("loss", losses.total, timesteps)
        self._count("mse", losses.mse)
        if self.trainer.state.fn != "fit":
            self._count_bits(x_0, labels, batch_idx)

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
            max_snr_weight=self.loss_settings.max_snr_weight,
            target=target,
        )

    def _labels(self, labels: Labels) -> Labels | None:
        return self._with_null(labels, torch.zeros_like(labels, dtype=torch.bool))

    def _with_null(self, labels: Labels, dropped: Tensor) -> Labels | None:
        """Labels with the null label where they are dropped, or where an image has none."""
        classes = self.network_settings.num_classes
        return None if classes is None else torch.where(dropped.to(labels.device) | (labels < 0), classes, labels)

    def _count_bits(self, x_0: Image, labels: Labels | None, batch_idx: int) -> None:
        """The estimate's mean, and what its error is made of."""
        schedule, size = self.schedule, len(x_0)
        generator = torch.Generator().manual_seed(batch_idx + 1)
        timesteps, weights = sample_vlb_timesteps(size, schedule.num_steps, generator)
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
        self._count("bits_per_dim", bits)
        self._count("bits_per_dim_squared", bits.square())
