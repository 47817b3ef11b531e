"""Names for tensors, and the legend of their shapes.

B samples in a batch, C channels, H and W height and width in pixels, L = H·W tokens, d channels a head.
"""

from typing import Literal, NamedTuple

from torch import Tensor

Image = Tensor
"""(B, C, H, W) float in [-1, 1] or noise around it."""
ImageUint8 = Tensor
"""(B, C, H, W) uint8 in 0…255."""
Timestep = Tensor
"""(B,) what the network is conditioned on, 0…999 for ADM."""
Labels = Tensor
"""(B,) int64 class indices."""
PerSample = Tensor
"""(B,) one float a sample."""
AlphaBar = Tensor
"""() or (B, 1, 1, 1) float64: cumulative products of 1 - beta, eq. 2."""
Heads = Tensor
"""(B, head, L, d) queries, keys or values of one attention layer."""
TokenMap = Tensor
"""(B, head, H, W) a number for every token of a feature map, head by head."""
Mask = Tensor
"""(B, 1, H, W) bool: True where a pixel is degraded."""

HeadLayout = Literal["layer", "sag_release"]


class AttentionSite(NamedTuple):
    """Where attention is read: a block of the network, and how its channels are split into heads.

    `heads` is "layer" for the layer's own heads, or "sag_release" for the public SAG code's regrouping.
    """

    name: str
    heads: HeadLayout = "layer"
