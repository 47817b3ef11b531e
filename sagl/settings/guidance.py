"""Settings of the guidance methods. Each method is one group of settings; `scale` 0 switches it off."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from sagl.errors import require, require_choices, require_finite
from sagl.settings.network import UNetSettings

DEFAULT_KERNEL_SIZE = 31
"""Side of the blur kernel in the paper (table 9)."""

FILE_SETTINGS = ("checkpoint", "direction_head")
"""Ends of the names of settings that are weight files, by path or by name."""


@dataclass(frozen=True, kw_only=True)
class GuidanceSettings:
    """Base class of the settings of a guidance method."""

    group: ClassVar[str]
    """Name of the group of settings: the method's key in `sagl.guidance.registry.GUIDANCES`."""
    needs_labels: ClassVar[bool] = False
    """True if every sample must have a class label."""
    has_weak_prediction: ClassVar[bool] = True
    """True if the term is scale · (eps - eps of a weak prediction of the same step), which a head can learn."""

    scale: float = 0.0
    """Guidance scale, the paper's s; 0 is off and costs nothing."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Guided part of the sampling steps, in fractions from the noisiest step (0) to the cleanest (1)."""
    direction_head: str | None = None
    """Direction head in place of the second evaluation: a file, or auto for WEIGHTS_METHOD_head.safetensors."""
    renew_every: int = 1
    """Evaluate the term at every k-th guided step; the others reuse the last term, or the output of direction_head, at
    no cost. With a head, 1 means that only the head is used."""
    reuse_before: str | None = None
    """Output block, such as output.3, before which the weak evaluation reuses features of the base evaluation; it
    costs less the later the block. null: nothing is reused."""
    stop_below: float = 0.0
    """End a sample's guidance when weak and base x0_hat differ by less than this fraction of x0_hat; 0: never."""
    max_norm: float | None = None
    """Largest root mean square of the difference of weak and base x0_hat (APG); null: no limit."""
    shape: Literal["none", "off_x0", "off_unsharp", "high_pass"] = "none"
    """Part of the term to remove: along x0_hat (APG), along an unsharp mask of x0_hat, or low frequencies (FDG)."""
    shape_weight: float = 0.0
    """Weight of the part that shape removes: 0 removes all of it, 1 nothing."""
    shape_sigma: float | None = None
    """Standard deviation in pixels of the blur in shape; null: the method's blur_sigma, or 3."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning; `check_network` checks what depends on the network."""
        require_finite(self, f"{self.group}.")
        require_choices(self, f"{self.group}.")
        start, end = self.interval
        require(
            0 <= start <= end <= 1,
            f"`{self.group}.interval` must be two fractions 0 <= start <= end <= 1, got {self.interval}.",
        )
        # a config has lists and integers: equal intervals have one representation, which hashes of settings need
        object.__setattr__(self, "interval", (float(start), float(end)))
        require(self.renew_every >= 1, f"`{self.group}.renew_every` must be at least 1, got {self.renew_every}.")
        require(self.stop_below >= 0, f"`{self.group}.stop_below` must be at least 0, got {self.stop_below}.")
        for name in ("max_norm", "shape_sigma"):
            value = getattr(self, name)
            require(value is None or value > 0, f"`{self.group}.{name}` must be above 0 or null, got {value}.")
        for name in ("direction_head", "reuse_before"):
            value = getattr(self, name)
            require(
                value is None or self.has_weak_prediction,
                f"`{self.group}.{name}` must be null for a method without weak prediction, got {value}.",
            )
        require(self.direction_head != "", f"`{self.group}.direction_head` must be a file, auto or null, got ''.")

    @property
    def weak_prediction_settings(self) -> dict[str, Any]:
        """Settings that determine the weak prediction, by name: all but those that every method has."""
        shared = GuidanceSettings.__dataclass_fields__
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in shared}

    @property
    def file_settings(self) -> list[str]:
        """Names of the settings that hold a weight file which the method uses."""
        names = [name for name in self.__dataclass_fields__ if name.endswith(FILE_SETTINGS)]
        return [name for name in names if getattr(self, name) is not None]

    def check_network(self, network: UNetSettings) -> None:
        """Raise a `UserError` if the method cannot guide this network. Called if the scale is not 0."""

    def notes(self, network: UNetSettings) -> list[str]:
        """Return sentences about settings that were left open and are chosen for this network."""
        return []


TERM_OPTIONS = tuple(field.name for field in fields(GuidanceSettings) if field.name not in ("scale", "interval"))
"""Settings of every method that the help of a command describes once."""


@dataclass(frozen=True, kw_only=True)
class BlurGuidance(GuidanceSettings):
    """Blur guidance (Hong et al. 2023, eq. 15): the weak prediction is for x_t blurred as a whole."""

    group = "blur"

    blur_sigma: float = 3.0
    """Standard deviation of the Gaussian blur, in pixels."""
    kernel_size: int | None = None
    """Side of the blur kernel in pixels, odd; null: 31, or the largest that fits a smaller image."""
    clip_x0: bool = True
    """Clip x0_hat to [-1, 1] before the blur, as the released code does; Algorithm 1 does not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.blur_sigma > 0, f"`{self.group}.blur_sigma` must be above 0 pixels, got {self.blur_sigma}.")
        require(
            self.kernel_size is None or (self.kernel_size > 0 and self.kernel_size % 2 == 1),
            f"`{self.group}.kernel_size` must be odd and at least 1, got {self.kernel_size}.",
        )

    def check_network(self, network: UNetSettings) -> None:
        """Require an image that is large enough for the kernel."""
        effective_kernel_size(self.kernel_size, network.image_size, self.group)

    def notes(self, network: UNetSettings) -> list[str]:
        """Name the blur kernel if the default one does not fit."""
        side, size = network.image_size, effective_kernel_size(self.kernel_size, network.image_size)
        is_smaller = self.kernel_size is None and size < DEFAULT_KERNEL_SIZE
        return [f"Blur kernel {size}: the largest that fits {side}x{side} images."] if is_smaller else []


@dataclass(frozen=True, kw_only=True)
class SelfAttentionGuidance(BlurGuidance):
    """Self-attention guidance (SAG; Hong et al. 2023, Algorithm 1)."""

    group = "sag"

    scale: float = 0.0
    """Guidance scale, the paper's s; 0 is off and costs nothing. The released code's flag is 1 + s."""
    mask: Literal["attention", "global", "random", "square", "dino"] = "attention"
    """Degraded tokens: the most attended ones, all (blur guidance, eq. 15), random ones, a square, DINO's attention."""
    site: str = "output.2"
    """UNet block whose attention makes the mask: input.k, middle or output.k; the average of several with commas."""
    head: int | None = None
    """Attention head whose map makes the mask, from 0; null: the mean of all heads."""
    threshold: float = 1.0
    """Pixels whose token receives more attention than this are degraded; the mean over tokens is 1."""
    area_fraction: float | None = None
    """Degrade this fraction of the tokens, in place of a threshold; random, square: 0.4."""
    soft: bool = False
    """Mask weights attention / (2 · threshold), at most 1; for masks attention and dino."""
    dino_checkpoint: str | None = None
    """File of released DINO weights for mask dino, such as dino_deitsmall8_pretrain.pth."""
    heads: Literal["layer", "sag_release"] = "layer"
    """Attention heads: the layer's own, or num_heads of them as the released code splits the channels (sag_release)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        area = self.area_fraction
        require(area is None or 0 < area <= 1, f"`sag.area_fraction` must be above 0 and at most 1, got {area}.")
        require(
            not self.soft or (self.mask in ("attention", "dino") and self.threshold > 0),
            "`sag.soft` needs `sag.mask` attention or dino and a `sag.threshold` above 0, "
            f"got {self.mask} and {self.threshold}.",
        )

    @property
    def is_random(self) -> bool:
        """True for masks that are drawn at random."""
        return self.mask in ("random", "square")

    @property
    def sites(self) -> list[str]:
        """Blocks whose attention is read; the first one's grid is that of the mask. None for a global mask."""
        return [] if self.mask == "global" else [name.strip() for name in self.site.split(",")]

    @property
    def file_settings(self) -> list[str]:
        """Names of the settings that hold a weight file which the method uses: DINO's only for its mask."""
        return [name for name in super().file_settings if name != "dino_checkpoint" or self.mask == "dino"]

    def check_network(self, network: UNetSettings) -> None:
        """Require attention at the sites, the head, DINO's weights, and an image large enough for the kernel."""
        for site in self.sites:
            network.require_site(site, self.heads, group="sag.")
            num_heads = network.num_heads_at(site, self.heads)
            require(
                self.head is None or 0 <= self.head < num_heads,
                f"`sag.head` must be one of the heads of {site}, 0 … {num_heads - 1}, got {self.head}.",
            )
        require(
            self.mask != "dino" or self.dino_checkpoint is not None,
            "`sag.dino_checkpoint` must be a file of DINO weights for `sag.mask` dino, got none. Download one: "
            "https://dl.fbaipublicfiles.com/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
        )
        super().check_network(network)


@dataclass(frozen=True, kw_only=True)
class ClassifierFreeGuidance(GuidanceSettings):
    """Classifier-free guidance (CFG, eq. 11), for networks with a null label."""

    group = "cfg"
    needs_labels = True

    scale: float = 0.0
    """Guidance scale, s in conditional + s · (conditional - null); 0 is off and costs nothing."""

    def check_network(self, network: UNetSettings) -> None:
        """Require a null label."""
        require(network.null_label, "`cfg.scale` needs a class-conditional network with a null label, got one without.")


@dataclass(frozen=True, kw_only=True)
class ClassifierGuidance(GuidanceSettings):
    """Classifier guidance (CG, eq. 9; Dhariwal & Nichol 2021, algorithms 1 and 2)."""

    group = "classifier"
    needs_labels = True
    has_weak_prediction = False

    scale: float = 0.0
    """Guidance scale, the factor on grad log p(y | x_t); 0 is off and costs nothing."""
    checkpoint: str | None = None
    """Classifier of noisy images: the name of a released one, or a file; null: the bundled one, for fashion_mnist."""

    def check_network(self, network: UNetSettings) -> None:
        """Require a classifier; `check_second_network` compares it with the network once it is loaded."""
        require(
            self.checkpoint is not None,
            "`classifier.checkpoint` must be a classifier of noisy images for `classifier.scale`, got none.",
        )


@dataclass(frozen=True, kw_only=True)
class AttentionEditSettings(GuidanceSettings):
    """Base class of the settings of methods that edit self-attention in the weak prediction."""

    site: str = "middle"
    """UNet blocks whose attention is edited, separated by commas: input.k, middle or output.k."""

    @property
    def sites(self) -> list[str]:
        """Names of the blocks."""
        return [name.strip() for name in self.site.split(",")]

    def check_network(self, network: UNetSettings) -> None:
        """Require attention at every site, in a block that the weak evaluation computes."""
        for site in self.sites:
            network.require_site(site, group=f"{self.group}.", start=self.reuse_before)


@dataclass(frozen=True, kw_only=True)
class PerturbedAttentionGuidance(AttentionEditSettings):
    """Perturbed-attention guidance (PAG; Ahn et al. 2024): the weak prediction has the identity as attention map."""

    group = "pag"


@dataclass(frozen=True, kw_only=True)
class SmoothedEnergyGuidance(AttentionEditSettings):
    """Smoothed energy guidance (SEG; Hong 2024): the weak prediction has blurred attention weights."""

    group = "seg"

    blur_sigma: float | None = None
    """Standard deviation of the Gaussian blur of the queries, in tokens; null: no limit, so that all are their mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sigma = self.blur_sigma
        require(sigma is None or sigma > 0, f"`seg.blur_sigma` must be above 0 tokens, got {sigma}.")


@dataclass(frozen=True, kw_only=True)
class TokenPerturbationGuidance(AttentionEditSettings):
    """Token perturbation guidance (TPG; Rajabi et al. 2025): the weak prediction has shuffled tokens."""

    group = "tpg"


@dataclass(frozen=True, kw_only=True)
class TimestepGuidance(GuidanceSettings):
    """Time-step guidance (TSG; Sadat et al. 2024): the weak prediction has a noisy timestep embedding."""

    group = "tsg"

    noise_scale: float = 1.0
    """Noise of the timestep embedding, in units of its standard deviation, at the noisiest timestep; the paper's s."""
    noise_exponent: float = 0.0
    """Exponent of the time, 0 … 1, as a factor of the noise; 0: the same noise at all times; the paper's alpha."""

    def __post_init__(self) -> None:
        super().__post_init__()
        exponent = self.noise_exponent
        require(exponent >= 0, f"`tsg.noise_exponent` must be at least 0, got {exponent}.")


@dataclass(frozen=True, kw_only=True)
class Autoguidance(GuidanceSettings):
    """Autoguidance (Karras et al. 2024): the weak prediction is that of a weaker network."""

    group = "autoguidance"

    checkpoint: str | None = None
    """Weaker network: the name of a released one or a file, such as an earlier checkpoint of the same training."""
    weights: str = "ema"
    """Weights of its training checkpoint (.ckpt): ema, ema:DECAY or raw."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.reuse_before is None,
            f"`autoguidance.reuse_before` must be null, because the weaker network has other features, got "
            f"{self.reuse_before}.",
        )

    def check_network(self, network: UNetSettings) -> None:
        """Require a weaker network; `check_second_network` compares both once it is loaded."""
        require(
            self.checkpoint is not None,
            "`autoguidance.checkpoint` must be a weaker network for `autoguidance.scale`, got none.",
        )


@dataclass(frozen=True, kw_only=True)
class HistoryGuidance(GuidanceSettings):
    """Guidance by the history of the chain (Self-Guidance, Momentum Guidance, HiGS), at no network evaluation."""

    group = "history"
    has_weak_prediction = False

    decay: float = 0.0
    """Decay per step of the average of earlier predictions, which is the weak one; 0: the previous step alone."""
    average: Literal["eps", "x0_hat"] = "eps"
    """Averaged prediction: eps (Self-Guidance, Momentum Guidance) or x0_hat (HiGS)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.renew_every == 1,
            "`history.renew_every` must be 1, because the average needs every step, and the term costs no evaluation; "
            f"got {self.renew_every}.",
        )
        require(0 <= self.decay < 1, f"`history.decay` must be at least 0 and below 1, got {self.decay}.")


@dataclass(frozen=True, kw_only=True)
class EpsScaling(GuidanceSettings):
    """Epsilon scaling (ADM-ES; Ning et al. 2024): eps divided by 1 + scale + slope · step, at no network evaluation."""

    group = "eps_scaling"
    has_weak_prediction = False

    scale: float = 0.0
    """Excess of the divisor over 1 in the cleanest step, such as 0.005; 0 is off and costs nothing."""
    slope: float = 0.0
    """Increase of the divisor per step, from the cleanest to the noisiest, if the scale is not 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.scale > -1, f"`eps_scaling.scale` must be above -1, for a divisor above 0, got {self.scale}.")


def effective_kernel_size(kernel_size: int | None, image_size: int, group: str = "sag") -> int:
    """Return the blur kernel's size for images of a size; None stands for the paper's 31, or less if that is too large.

    Raises:
        UserError: a given kernel exceeds 2 · image_size - 1, so that its mirrored border would need more pixels than
            the image has.
    """
    largest = 2 * image_size - 1
    if kernel_size is None:
        return min(DEFAULT_KERNEL_SIZE, largest)
    require(
        kernel_size <= largest,
        f"`{group}.kernel_size` must be at most {largest} for {image_size}x{image_size} images, got {kernel_size}.",
    )
    return kernel_size
