"""From attention received to the mask of what is degraded (section "Self-Attention Guidance", Algorithm 1)."""

from torch.nn import functional as F

from sagl.shapes import Mask, TokenMap


def attention_mask(received: TokenMap, threshold: float, size: tuple[int, int]) -> Mask:
    """True where a token receives more attention than the threshold: (B, head, H', W') -> (B, 1, H, W) bool.

    The mean over heads has mean 1 over tokens, so 1 is "more than average". Nearest neighbours carry it to the image.
    """
    chosen = received.mean(dim=1, keepdim=True) > threshold
    return F.interpolate(chosen.float(), size=size, mode="nearest").bool()
