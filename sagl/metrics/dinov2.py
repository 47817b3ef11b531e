"""DINOv2 ViT-L/14 (Oquab et al. 2023), whose Fréchet distance agrees better with human judgement (Stein et al. 2023).

Network, resizing and normalisation are torch-fidelity's `dinov2-vit-l-14`; torch.hub loads code and weights.
"""

import torch
from filelock import FileLock
from torch import nn

from sagl.errors import UserError
from sagl.metrics.features import Features
from sagl.shapes import ImageUint8
from sagl.utils.files import cache_folder

NAME = "dinov2-vit-l-14"
"""Name in torch-fidelity."""


class DINOv2:
    """Extractor of the class token after the last norm, 1024 dimensions."""

    resize = "bilinear to 224×224, as TensorFlow 1 does, no antialias"

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, images_uint8: ImageUint8) -> Features:
        """Extract features: (B, 1 or 3, H, W) uint8 -> (B, 1024)."""
        device = next(self.network.parameters()).device
        return Features(self.network(images_uint8.to(device).expand(-1, 3, -1, -1))[0])


def dinov2(device: torch.device) -> DINOv2:
    """Load the extractor onto a device.

    Raises:
        UserError: torch-fidelity is not installed, or torch.hub cannot load the network.
    """
    try:
        from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2
    except ImportError as error:
        raise UserError("`extractor` dinov2 needs torch-fidelity. Install it: pip install 'sagl[eval]'.") from error
    cache_folder().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_folder() / "dinov2.lock"):  # one process of a machine downloads
        try:
            network = FeatureExtractorDinoV2(NAME, ["dinov2"])
        except (OSError, RuntimeError, ImportError) as error:
            raise UserError(
                f"`extractor` dinov2 needs facebookresearch/dinov2 and its weights (1.2 GB) from torch.hub, got: "
                f"{' '.join(str(error).split())}. Load it once on a machine with a network, and copy "
                f"{torch.hub.get_dir()}."
            ) from error
    return DINOv2(network.to(device))
