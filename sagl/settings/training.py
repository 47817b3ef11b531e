"""Settings of training: network, optimiser, averages, checkpoints, previews."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from sagl.errors import require, require_choices, require_finite, require_seed
from sagl.settings.diffusion import DiffusionSettings, LossSettings
from sagl.settings.evaluation import require_extractor
from sagl.settings.network import ClassifierSettings, UNetSettings
from sagl.settings.sampling import Sampler, SamplerSettings

AnySettings = TypeVar("AnySettings", UNetSettings, ClassifierSettings)


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Averages of the weights, and how often a checkpoint is saved."""

    ema_decay: float = 0.9999
    """EMA decay per optimiser step."""
    extra_ema_decays: tuple[float, ...] = ()
    """Decays of further EMAs, each with the memory of the weights; read as ema:DECAY."""
    save_every_steps: int = 1000
    """Optimiser steps between two checkpoints."""
    save_every_minutes: float = 5.0
    """Minutes between two checkpoints, whichever comes first."""

    def __post_init__(self) -> None:
        for name in ("ema_decay", "extra_ema_decays"):
            for decay in self.extra_ema_decays if name == "extra_ema_decays" else (self.ema_decay,):
                require(0 <= decay < 1, f"`{name}` must be in [0, 1), got {decay}.")
        for name in ("save_every_steps", "save_every_minutes"):
            require(getattr(self, name) > 0, f"`{name}` must be above 0, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class PreviewSettings:
    """Images sampled from the EMA weights at every validation, with the same seeds throughout a training."""

    num_samples: int = 16
    """Images per row of a grid: a row for each scale, and a row of masks under each guided one. 0: no grids."""
    scales: tuple[float, ...] = (0.0, 0.1, 0.3)
    """Scales of self-attention guidance; its other settings are those of the group `sag`."""
    sampler: Sampler = "ddim"
    """Sampler of the previews; heun evaluates the network twice per step."""
    respacing: str = "ddim25"
    """Steps of the sampler; few are enough to see whether a network learns."""
    batch_size: int = 16
    """Images per batch and process."""
    num_metric_samples: int = 0
    """Generated images per scale for the Fréchet distance to the validation images. 0: no metrics."""
    extractor: str = "effnet_lite0_64"
    """Feature extractor of the metrics: a name, or a function that builds one, as package.function."""
    keep_best: int = 0
    """Number of checkpoints with the smallest Fréchet distances to keep beside last.ckpt."""
    max_checkpoint_gb: float = 50.0
    """Limit on the total size of these checkpoints in GB; the best one is kept in any case."""
    best_scale: float = 0.0
    """Scale whose Fréchet distance selects the best checkpoints."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_metric_samples", "keep_best"):
            require(getattr(self, name) >= 0, f"`preview.{name}` must be at least 0, got {getattr(self, name)}.")
        require(all(map(math.isfinite, self.scales)), f"`preview.scales` must be finite numbers, got {self.scales}.")
        require(self.num_metric_samples != 1, "`preview.num_metric_samples` must be 0 or at least 2, got 1.")
        require(self.batch_size >= 1, f"`preview.batch_size` must be at least 1, got {self.batch_size}.")
        require(
            self.max_checkpoint_gb > 0, f"`preview.max_checkpoint_gb` must be above 0, got {self.max_checkpoint_gb}."
        )
        require(
            len(self.scales) > 0,
            "`preview.scales` must have at least one scale, got none. "
            "Set preview.num_samples and preview.num_metric_samples to 0 to have no previews.",
        )
        require(
            self.keep_best == 0 or self.num_metric_samples > 0,
            f"`preview.num_metric_samples` must be above 0 for `preview.keep_best` {self.keep_best}, got 0.",
        )
        require(
            self.keep_best == 0 or self.best_scale in self.scales,
            f"`preview.best_scale` must be one of preview.scales {list(self.scales)}, got {self.best_scale}.",
        )
        require_extractor(self.extractor, "preview.extractor")
        SamplerSettings(sampler=self.sampler, respacing=self.respacing)


@dataclass(frozen=True, kw_only=True)
class BlurAwareSettings:
    """Blur-aware training (Hong et al., appendix D): train on images degraded as self-attention guidance does it."""

    probability: float = 0.0
    """Probability that a training image is degraded before its noise is added; 0: plain training."""
    mask: Literal["attention", "random", "square", "global"] = "attention"
    """Blurred area: high attention at the same x_t, random blocks, one square, or the whole image."""
    site: str = "output.2"
    """UNet block whose attention makes the mask (mask="attention")."""
    threshold: float = 1.0
    """Tokens that receive more attention than this are blurred (mask="attention")."""
    area_fraction: float = 0.4
    """Blurred fraction of the image's area (mask="random" or "square")."""
    blur_sigma: tuple[float, float] = (3.0, 3.0)
    """Smallest and largest standard deviation of the blur in pixels, drawn uniformly for each image."""
    target: Literal["noise", "clean"] = "noise"
    """noise: the eps of the degraded image; clean: the eps that leads from its x_t to the image before the blur."""

    def __post_init__(self) -> None:
        require_finite(self, "blur_aware.")
        require_choices(self, "blur_aware.")
        for name in ("probability", "area_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"`blur_aware.{name}` must be in [0, 1], got {value}.")
        low, high = self.blur_sigma
        require(0 < low <= high, f"`blur_aware.blur_sigma` must be two numbers 0 < low <= high, got {self.blur_sigma}.")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 1e-4
    """Learning rate after warm-up."""
    weight_decay: float = 0.0
    """AdamW weight decay; ADM: 0 for diffusion models, 0.05 for classifiers."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    decay_steps: int = 0
    """Last steps before trainer.max_steps, in which the learning rate falls to 0; 0: constant."""
    decay: Literal["linear", "cosine"] = "linear"
    """Shape of the decay: a line, or half a cosine."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_choices(self)
        require(all(0 <= beta < 1 for beta in self.betas), f"`betas` must be in [0, 1), got {self.betas}.")
        require(self.learning_rate > 0, f"`learning_rate` must be above 0, got {self.learning_rate}.")
        for name in ("weight_decay", "warmup_steps", "decay_steps"):
            require(getattr(self, name) >= 0, f"`{name}` must be at least 0, got {getattr(self, name)}.")

    def lr_multiplier(self, step: int, max_steps: int) -> float:
        """Return the factor on `learning_rate` at a step; `max_steps` is -1 for a training without end."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        remaining = (max_steps - step) / self.decay_steps if self.decay_steps and max_steps > 0 else 1.0
        remaining = max(0.0, min(1.0, remaining))
        return warmup * (remaining if self.decay == "linear" else (1 - math.cos(math.pi * remaining)) / 2)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings common to the training of diffusion models and classifiers."""

    diffusion: DiffusionSettings | None = None
    """Diffusion process; by default that of the released network, or ADM's."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """AdamW and its learning-rate schedule."""
    use_checkpoint: bool | None = None
    """Activation checkpointing: less memory, a third more time. null: as the network."""
    compile: bool = False
    """Compile the network, on GPUs with CUDA graphs: the first step takes a minute or more."""
    freeze: tuple[str, ...] = ()
    """Patterns of names of parameters that are not trained, such as input_blocks.*."""
    max_nonfinite_batches: int = 10
    """Skipped batches between two optimiser steps before training ends."""
    seed: int = 0
    """Seed of initial weights, noise, timesteps, label dropout and dropout."""

    def __post_init__(self) -> None:
        require(
            self.max_nonfinite_batches >= 0,
            f"`max_nonfinite_batches` must be at least 0, got {self.max_nonfinite_batches}.",
        )
        require_seed("model.seed", self.seed)

    def apply_to(self, network: AnySettings) -> AnySettings:
        """Return the settings of a network with this `use_checkpoint`, so that a released one may have it, too."""
        return network if self.use_checkpoint is None else replace(network, use_checkpoint=self.use_checkpoint)


@dataclass(frozen=True, kw_only=True)
class DiffusionTrainingSettings(TrainingSettings):
    """Training of an ADM diffusion model (Dhariwal & Nichol 2021, appendix B)."""

    network: UNetSettings | str
    """UNet: its settings, or the name of a released network that has them."""
    loss: LossSettings = field(default_factory=LossSettings)
    """Training loss."""
    label_dropout: float = 0.0
    """Probability that a training label is replaced by the null label."""
    blur_aware: BlurAwareSettings = field(default_factory=BlurAwareSettings)
    """Training on degraded images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.label_dropout <= 1, f"`label_dropout` must be in [0, 1], got {self.label_dropout}.")


@dataclass(frozen=True, kw_only=True)
class ClassifierTrainingSettings(TrainingSettings):
    """Training of an ADM classifier of noisy images (Dhariwal & Nichol 2021, section 4.1)."""

    classifier: ClassifierSettings | str
    """Classifier: its settings, or the name of a released one that has them."""
    optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings(learning_rate=3e-4, weight_decay=0.05)
    )
    """AdamW and its learning-rate schedule, by default as for ADM's classifiers."""
