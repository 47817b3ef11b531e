"""Settings of the guidances: one group each, `scale` 0 is off."""

from dataclasses import dataclass
from typing import Literal

from sagl.errors import require, require_finite
from sagl.settings.diffusion import require_choice

DEFAULT_KERNEL = 31
"""The paper's blur kernel (table 9)."""


def effective_kernel_size(kernel_size: int | None, image_size: int) -> int:
    """The kernel that is used on images of a size: the one asked for, or the paper's 31 as far as it fits.

    Raises:
        UserError: the kernel asked for reaches over the mirrored border.
    """
    largest = 2 * image_size - 1
    if kernel_size is None:
        return min(DEFAULT_KERNEL, largest)
    require(
        kernel_size <= largest,
        f"`sag.kernel_size` must be at most {largest} for {image_size}x{image_size} images, got {kernel_size}.",
    )
    return kernel_size


@dataclass(frozen=True, kw_only=True)
class SelfAttentionGuidance:
    """Self-attention guidance (SAG, Algorithm 1)."""

    scale: float = 0.0
    """The paper's s; 0 is off and costs nothing. The released code's flag is 1 + s."""
    site: str = "output.2"
    """Block whose attention makes the mask: input.k, middle or output.k."""
    threshold: float = 1.0
    """Pixels whose token receives more than this are degraded; attention received has mean 1."""
    blur_sigma: float = 3.0
    """Standard deviation of the Gaussian blur, in pixels."""
    kernel_size: int | None = None
    """Side of the blur kernel in pixels, odd; None: 31, or the largest that fits a smaller image."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Part of the chain that is guided, in fractions from the noisiest step (0) to the cleanest (1)."""
    clip_x0: bool = True
    """Clip x0_hat to [-1, 1] before the blur, as the released code does; Algorithm 1 does not."""
    heads: Literal["layer", "as_released"] = "layer"
    """Split the channels into the layer's own heads, or as the released code does, into num_heads of them."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning; what needs the network is checked when the run is prepared."""
        require_finite(self, "sag.")
        require(self.blur_sigma > 0, f"`sag.blur_sigma` must be above 0 pixels, got {self.blur_sigma}.")
        require(
            self.kernel_size is None or (self.kernel_size > 0 and self.kernel_size % 2 == 1),
            f"`sag.kernel_size` must be odd and at least 1, got {self.kernel_size}.",
        )
        start, end = self.interval
        require(
            0 <= start <= end <= 1, f"`sag.interval` must be two fractions 0 <= start <= end <= 1, got {self.interval}."
        )
        require_choice("sag.heads", self.heads, ("layer", "as_released"))


@dataclass(frozen=True, kw_only=True)
class ClassifierFreeGuidance:
    """Classifier-free guidance (CFG, eq. 11), for networks with a null label."""

    scale: float = 0.0
    """The paper's s: conditional + s · (conditional - null); 0 is off and costs nothing."""

    def __post_init__(self) -> None:
        """Refuse what is no number."""
        require_finite(self, "cfg.")


@dataclass(frozen=True, kw_only=True)
class ClassifierGuidance:
    """Classifier guidance (CG, eq. 9; Dhariwal & Nichol 2021, algorithms 1 and 2)."""

    scale: float = 0.0
    """Factor on grad log p(y | x_t); 0 is off and costs nothing."""
    checkpoint: str | None = None
    """Classifier of noisy images: the name of a released one, or a file."""

    def __post_init__(self) -> None:
        """Refuse what is no number."""
        require_finite(self, "classifier.")


GUIDANCES = {"sag": SelfAttentionGuidance, "cfg": ClassifierFreeGuidance, "classifier": ClassifierGuidance}
"""The guidances by the name of their group of settings."""
