"""Names of tensor types with their shapes.

B samples of a batch, C channels, H and W height and width in pixels, L = H·W tokens, d channels per head.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from torch import Tensor

Image = Tensor
"""(B, C, H, W) float, images in [-1, 1] or noisy images."""
ImageUint8 = Tensor
"""(B, C, H, W) uint8 in 0…255."""
Timestep = Tensor
"""(B,) int64 timesteps of the original process, 0…999 for ADM."""
Labels = Tensor
"""(B,) int64 class indices."""
PerSample = Tensor
"""(B,) one float per sample."""
AlphaBar = Tensor
"""() or (B, 1, 1, 1) float64: cumulative products of 1 - beta, eq. 2."""
Heads = Tensor
"""(B, head, L, d) queries, keys or values of one attention layer."""
TokenMap = Tensor
"""(B, head, H, W) one number per token of a feature map and head."""
Mask = Tensor
"""(B, 1, H, W): bool, True where a pixel is degraded; or float in [0, 1], the weight of its degraded value."""

AttentionEdit = Callable[[Heads, Heads, Heads, tuple[int, int]], Heads]
"""(queries, keys, values, (H, W)) -> (B, head, L, d): a function that replaces eq. 14 in one attention layer."""

HeadLayout = Literal["layer", "sag_release"]


class AttentionSite(NamedTuple):
    """A block of the network whose attention is read, and how its channels are split into heads.

    `heads` is "layer" for the layer's own heads, or "sag_release" for the split of the released SAG code.
    """

    name: str
    heads: HeadLayout = "layer"


class NetworkOutput(NamedTuple):
    """Output of one forward pass. `features` and `block_inputs` are read only if they were requested."""

    out: Tensor
    """(B, C or 2C, H, W) float32: eps, followed by the variance channels if the network learns the variance."""
    attention: Mapping[AttentionSite, TokenMap]
    """Attention received at each requested site, (B, head, H, W), mean 1."""
    features: Tensor | None = None
    """(B, F, H, W): input of the last convolution, if it was requested."""
    block_inputs: Mapping[str, Tensor] = {}
    """Input of each requested output block before its skip connection is appended, (B, C, H, W)."""
