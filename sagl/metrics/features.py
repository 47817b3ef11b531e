"""Features of images: what distances between sets of images are taken in. A number belongs to its extractor."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sagl.errors import require
from sagl.shapes import ImageUint8


class Features(NamedTuple):
    """What one pass of an extractor gives."""

    pooled: Tensor
    """(B, D) float32, for the Fréchet distance, precision, recall and the kernel distance."""
    spatial: Tensor | None = None
    """(B, S) float32, of some channels at every place, for sFID."""
    logits: Tensor | None = None
    """(B, K) float32, of classes, for the inception score."""

    def each(self, change: Callable[[Tensor], Tensor]) -> "Features":
        """All that are there, changed."""
        spatial, logits = (None if part is None else change(part) for part in self[1:])
        return Features(change(self.pooled), spatial, logits)


Extractor = Callable[[ImageUint8], Features | Tensor]
"""(B, 1 or 3, H, W) uint8 -> features; a tensor (B, D) alone is pooled features. An attribute `resize` says in words
how images come to its size."""
IMAGES_AT_ONCE = 100


@torch.inference_mode()
def extract_features(images_uint8: ImageUint8, extract: Extractor) -> Features:
    """Features of many images, a few at a time: (N, 1 or 3, H, W) uint8 -> on the CPU, float32.

    Raises:
        UserError: the extractor gives something else.
    """
    parts = [seen(extract(part), len(part)) for part in images_uint8.split(IMAGES_AT_ONCE)]
    pooled, spatial, logits = zip(*parts, strict=True)
    return Features(torch.cat(pooled), *(None if part[0] is None else torch.cat(part) for part in (spatial, logits)))


def seen(found: Features | Tensor, count: int) -> Features:
    """What an extractor gave for `count` images, on the CPU in float32.

    Raises:
        UserError: it is no features (B, D), a row an image.
    """
    features = found if isinstance(found, Features) else Features(found)
    for part in (features.pooled, *(part for part in features[1:] if part is not None)):
        require(
            isinstance(part, Tensor) and part.dim() == 2 and len(part) == count,
            f"`extractor` must give features ({count}, D) of {count} images, got "
            f"{tuple(getattr(part, 'shape', ())) or type(part).__name__}.",
        )
    return features.each(lambda part: part.float().cpu())


def describe_resize(extract: Extractor) -> str:
    """How images come to the extractor's size, in words."""
    return str(getattr(extract, "resize", "its own"))
