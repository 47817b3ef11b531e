"""Features of images, as an extractor computes them. Metrics of different extractors must not be compared."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sagl.errors import require
from sagl.shapes import ImageUint8

BATCH_SIZE = 100
"""Images per batch in `extract_features`."""


class Features(NamedTuple):
    """Outputs of an extractor for B images."""

    pooled: Tensor
    """(B, D) float32, for the Fréchet distance, precision, recall and KID."""
    spatial: Tensor | None = None
    """(B, S) float32, some channels at every position, for sFID."""
    logits: Tensor | None = None
    """(B, K) float32 class logits, for the inception score."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Features":
        """Apply a function to every tensor."""
        return Features(*(None if part is None else function(part) for part in self))  # type: ignore[arg-type]


Extractor = Callable[[ImageUint8], Features | Tensor]
"""Maps (B, 1 or 3, H, W) uint8 to features; a single tensor (B, D) is taken as pooled features. An optional attribute
`resize` describes how images are resized; one of `version` differs for other weights."""


@torch.inference_mode()
def extract_features(images_uint8: ImageUint8, extract: Extractor) -> Features:
    """Extract features of (N, 1 or 3, H, W) images in batches, and return them on the CPU in float32.

    Raises:
        UserError: the images are not uint8, or the extractor returns anything but (B, D) tensors.
    """
    require(
        images_uint8.dtype == torch.uint8,
        f"`images_uint8` must be uint8, got {images_uint8.dtype}. `sagl.utils.images.to_uint8` converts samples.",
    )
    parts = [check_features(extract(batch), len(batch)) for batch in images_uint8.split(BATCH_SIZE)]
    return concatenate(parts)


def concatenate(parts: list[Features]) -> Features:
    """Concatenate features of consecutive batches."""
    pooled, *optional = zip(*parts, strict=True)
    return Features(torch.cat(pooled), *(None if part[0] is None else torch.cat(part) for part in optional))


def check_features(output: Features | Tensor, batch_size: int) -> Features:
    """Return the output of an extractor as `Features` on the CPU in float32.

    Raises:
        UserError: a part is not a (batch_size, D) tensor.
    """
    features = output if isinstance(output, Features) else Features(output)
    for part in (features.pooled, *(part for part in features[1:] if part is not None)):
        require(
            isinstance(part, Tensor) and part.dim() == 2 and len(part) == batch_size,
            f"`extractor` must return features of shape ({batch_size}, D) for {batch_size} images, got "
            f"{tuple(getattr(part, 'shape', ())) or type(part).__name__}.",
        )
    return features.map(lambda part: part.float().cpu())


def weights_version(extract: Extractor) -> str:
    """Return the extractor's text that differs for other weights; empty for published and packaged ones."""
    return str(getattr(extract, "version", ""))


def describe_resize(extract: Extractor) -> str:
    """Return the extractor's description of how it resizes images."""
    return str(getattr(extract, "resize", "its own"))
