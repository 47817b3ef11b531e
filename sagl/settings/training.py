"""Settings of training: optimiser, averages, checkpoints."""

import math
from dataclasses import dataclass
from typing import Literal

from sagl.errors import require
from sagl.settings.diffusion import require_choice
from sagl.settings.evaluation import require_extractor
from sagl.settings.sampling import Sampler, SamplerSettings


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """What is averaged, and how often it is saved."""

    ema_decay: float = 0.9999
    """Of the average of the weights, a step."""
    extra_ema_decays: tuple[float, ...] = ()
    """Of further averages, which cost memory for a copy of the weights each; read as --weights ema:DECAY."""
    save_every_steps: int = 1000
    """Steps between two checkpoints."""
    save_every_minutes: float = 5.0
    """Minutes between two checkpoints, whichever comes first."""

    def __post_init__(self) -> None:
        """Refuse what would never save, or never learn."""
        require(0 <= self.ema_decay < 1, f"`ema_decay` must be in [0, 1), got {self.ema_decay}.")
        for decay in self.extra_ema_decays:
            require(0 <= decay < 1, f"`extra_ema_decays` must be in [0, 1), got {decay}.")
        for name in ("save_every_steps", "save_every_minutes"):
            require(getattr(self, name) > 0, f"`{name}` must be above 0, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class PreviewSettings:
    """What validation draws from the averaged weights, at seeds that stay the same through the training."""

    num_samples: int = 16
    """Images of a grid: a row unguided, then a row guided and a row of masks for every scale. 0: no grids."""
    scales: tuple[float, ...] = (0.0, 0.1, 0.3)
    """Of self-attention guidance; site, blur and the rest are those of the config's sag."""
    sampler: Sampler = "ddim"
    """As for sampling."""
    respacing: str = "ddim25"
    """As for sampling; few steps are enough to see whether a network learns."""
    batch_size: int = 16
    """Images at once, a process."""
    num_metric_samples: int = 0
    """Images that the Fréchet distance from the validation images is taken of, scale by scale. 0: none."""
    extractor: str = "effnet_lite0_64"
    """Features that it is taken in: by name, or a function of yours that makes them, as package.function."""
    keep_best: int = 0
    """So many checkpoints with the smallest distances are kept beside last.ckpt."""
    max_checkpoint_gb: float = 50.0
    """They are fewer where together they would take more; the best one always stays."""
    best_scale: float = 0.0
    """The scale whose distance decides."""

    def __post_init__(self) -> None:
        """Refuse what could not be drawn or measured."""
        for name in ("num_samples", "num_metric_samples", "keep_best"):
            require(getattr(self, name) >= 0, f"`preview.{name}` must be at least 0, got {getattr(self, name)}.")
        require(self.num_metric_samples != 1, "`preview.num_metric_samples` must be 0 or at least 2, got 1.")
        require(
            self.max_checkpoint_gb > 0, f"`preview.max_checkpoint_gb` must be above 0, got {self.max_checkpoint_gb}."
        )
        require(self.batch_size >= 1, f"`preview.batch_size` must be at least 1, got {self.batch_size}.")
        require(
            len(self.scales) > 0,
            "`preview.scales` must name a scale, got none. Set num_samples and num_metric_samples to 0.",
        )
        require(
            self.keep_best == 0 or self.num_metric_samples > 0,
            f"`preview.keep_best` needs distances, got {self.keep_best} without. Set preview.num_metric_samples.",
        )
        require(
            self.keep_best == 0 or self.best_scale in self.scales,
            f"`preview.best_scale` must be one of preview.scales {list(self.scales)}, got {self.best_scale}.",
        )
        require_extractor(self.extractor, "preview.extractor")
        SamplerSettings(sampler=self.sampler, respacing=self.respacing)


@dataclass(frozen=True, kw_only=True)
class BlurAwareSettings:
    """Blur-aware training (Hong et al., appendix D): the network learns what self-attention guidance will show it."""

    probability: float = 0.0
    """Of a training image to be degraded as in guidance, before its noise is added; 0: plain training."""
    mask: Literal["attention", "random", "square", "global"] = "attention"
    """What is blurred: what the network attends to at the same x_t, random blocks, one square, or all."""
    site: str = "output.2"
    """Of mask attention: the block whose attention is read."""
    threshold: float = 1.0
    """Of mask attention: tokens that receive more are blurred."""
    area_fraction: float = 0.4
    """Of masks random and square: the part of the image that is blurred; an attention mask's is about as large."""
    blur_sigma: tuple[float, float] = (3.0, 3.0)
    """Least and largest standard deviation of the blur in pixels, drawn evenly between for each image."""
    target: Literal["noise", "clean"] = "noise"
    """noise: eps as it was drawn; clean: the eps that leads from the degraded x_t to the image before the blur."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        require_choice("blur_aware.mask", self.mask, ("attention", "random", "square", "global"))
        require_choice("blur_aware.target", self.target, ("noise", "clean"))
        for name in ("probability", "area_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"`blur_aware.{name}` must be in [0, 1], got {value}.")
        least, largest = self.blur_sigma
        require(
            0 < least <= largest,
            f"`blur_aware.blur_sigma` must be two numbers 0 < least <= largest, got {self.blur_sigma}.",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW and its learning rate over time."""

    learning_rate: float = 1e-4
    """The rate after warm-up."""
    weight_decay: float = 0.0
    """ADM uses none for networks that draw, 0.05 for classifiers."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of the two running means."""
    warmup_steps: int = 0
    """Steps in which the rate rises linearly from 0."""
    decay_steps: int = 0
    """Last steps before trainer.max_steps, in which the rate falls to 0; 0: constant to the end."""
    decay: Literal["linear", "cosine"] = "linear"
    """How it falls: along a line, or along half a cosine (which with decay_steps = max_steps is the usual one)."""

    def __post_init__(self) -> None:
        """Refuse rates and lengths that make no sense."""
        require_choice("decay", self.decay, ("linear", "cosine"))
        require(self.learning_rate > 0, f"`learning_rate` must be above 0, got {self.learning_rate}.")
        require(self.weight_decay >= 0, f"`weight_decay` must be at least 0, got {self.weight_decay}.")
        for name in ("warmup_steps", "decay_steps"):
            require(getattr(self, name) >= 0, f"`{name}` must be at least 0, got {getattr(self, name)}.")

    def lr_multiplier(self, step: int, max_steps: int) -> float:
        """The rate at a step as a share of `learning_rate`; `max_steps` -1 is no end."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        left = (max_steps - step) / self.decay_steps if self.decay_steps and max_steps > 0 else 1.0
        left = max(0.0, min(1.0, left))
        return warm * (left if self.decay == "linear" else (1 - math.cos(math.pi * left)) / 2)
