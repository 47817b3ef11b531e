"""Settings of the guidance methods. Each method is one group of settings; `scale` 0 switches it off."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from sagl.errors import require, require_choices, require_finite
from sagl.settings.network import UNetSettings

DEFAULT_KERNEL_SIZE = 31
"""Side of the blur kernel in the paper (table 9)."""


@dataclass(frozen=True, kw_only=True)
class GuidanceSettings:
    """Base class of the settings of a guidance method."""

    group: ClassVar[str]
    """Name of the group of settings: the method's key in `sagl.guidance.registry.GUIDANCES`."""
    needs_labels: ClassVar[bool] = False
    """True if every sample must have a class label."""

    scale: float = 0.0
    """Guidance scale, the paper's s; 0 is off and costs nothing."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Guided part of the sampling steps, in fractions from the noisiest step (0) to the cleanest (1)."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning; `check_network` checks what depends on the network."""
        require_finite(self, f"{self.group}.")
        require_choices(self, f"{self.group}.")
        start, end = self.interval
        require(
            0 <= start <= end <= 1,
            f"`{self.group}.interval` must be two fractions 0 <= start <= end <= 1, got {self.interval}.",
        )

    def check_network(self, network: UNetSettings) -> None:
        """Raise a `UserError` if the method cannot guide this network. Called if the scale is not 0."""

    def notes(self, network: UNetSettings) -> list[str]:
        """Return sentences about settings that were left open and are chosen for this network."""
        return []


@dataclass(frozen=True, kw_only=True)
class SelfAttentionGuidance(GuidanceSettings):
    """Self-attention guidance (SAG; Hong et al. 2023, Algorithm 1)."""

    group = "sag"

    scale: float = 0.0
    """Guidance scale, the paper's s; 0 is off and costs nothing. The released code's flag is 1 + s."""
    site: str = "output.2"
    """UNet block whose attention makes the mask: input.k, middle or output.k."""
    threshold: float = 1.0
    """Pixels whose token receives more attention than this are degraded; the mean over tokens is 1."""
    blur_sigma: float = 3.0
    """Standard deviation of the Gaussian blur, in pixels."""
    kernel_size: int | None = None
    """Side of the blur kernel in pixels, odd; null: 31, or the largest that fits a smaller image."""
    clip_x0: bool = True
    """Clip x0_hat to [-1, 1] before the blur, as the released code does; Algorithm 1 does not."""
    heads: Literal["layer", "sag_release"] = "layer"
    """Attention heads: the layer's own, or num_heads of them as the released code splits the channels (sag_release)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.blur_sigma > 0, f"`sag.blur_sigma` must be above 0 pixels, got {self.blur_sigma}.")
        require(
            self.kernel_size is None or (self.kernel_size > 0 and self.kernel_size % 2 == 1),
            f"`sag.kernel_size` must be odd and at least 1, got {self.kernel_size}.",
        )

    def check_network(self, network: UNetSettings) -> None:
        """Require attention at the site and an image that is large enough for the kernel."""
        network.require_site(self.site, self.heads, group="sag.")
        effective_kernel_size(self.kernel_size, network.image_size)

    def notes(self, network: UNetSettings) -> list[str]:
        """Name the blur kernel if the default one does not fit."""
        side, size = network.image_size, effective_kernel_size(self.kernel_size, network.image_size)
        is_smaller = self.kernel_size is None and size < DEFAULT_KERNEL_SIZE
        return [f"Blur kernel {size}: the largest that fits {side}x{side} images."] if is_smaller else []


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

    scale: float = 0.0
    """Guidance scale, the factor on grad log p(y | x_t); 0 is off and costs nothing."""
    checkpoint: str | None = None
    """Classifier of noisy images: the name of a released one, or a file."""

    def check_network(self, network: UNetSettings) -> None:
        """Require a classifier; `check_classifier` compares it with the network once it is loaded."""
        require(
            self.checkpoint is not None,
            "`classifier.checkpoint` must be a classifier of noisy images for `classifier.scale`, got none.",
        )


def effective_kernel_size(kernel_size: int | None, image_size: int) -> int:
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
        f"`sag.kernel_size` must be at most {largest} for {image_size}x{image_size} images, got {kernel_size}.",
    )
    return kernel_size
