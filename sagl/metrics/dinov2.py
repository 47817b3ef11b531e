"""DINOv2 ViT-L/14 (Oquab et al. 2023), whose distance people's judgement follows closer (Stein et al. 2023).

Network, resize and normalisation are torch-fidelity's `dinov2-vit-l-14`; code and weights come through torch.hub.
"""

import fcntl

import torch
from torch import nn

from sagl.errors import UserError
from sagl.metrics.features import Features
from sagl.shapes import ImageUint8
from sagl.utils.files import cache_folder

NAME = "dinov2-vit-l-14"
"""torch-fidelity's; 1024 features."""


class DINOv2:
    """The class token behind the last norm, 1024."""

    resize = "bilinear to 224×224, as TensorFlow 1 does, no antialias"

    def __init__(self, network: nn.Module) -> None:
        """With torch-fidelity's network, weights loaded."""
        self.network = network

    def __call__(self, images_uint8: ImageUint8) -> Features:
        """(B, 1 or 3, H, W) uint8 -> (B, 1024)."""
        device = next(self.network.parameters()).device
        return Features(self.network(images_uint8.to(device).expand(-1, 3, -1, -1))[0])


def dinov2(device: torch.device) -> DINOv2:
    """The extractor on a device.

    Raises:
        UserError: torch-fidelity is not installed, or torch.hub cannot fetch the network.
    """
    try:
        from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2
    except ImportError as error:
        raise UserError("`extractor` dinov2 needs torch-fidelity. Install it: pip install 'sagl[eval]'.") from error
    cache_folder().mkdir(parents=True, exist_ok=True)
    with (cache_folder() / "dinov2.lock").open("a") as file:  # of the processes of a machine one fetches
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            network = FeatureExtractorDinoV2(NAME, ["dinov2"])
        except (OSError, RuntimeError, ImportError) as error:
            raise UserError(
                f"`extractor` dinov2 needs facebookresearch/dinov2 and its weights (1.2 GB) through torch.hub, got: "
                f"{' '.join(str(error).split())}. Use it once where there is a network, and copy {torch.hub.get_dir()}."
            ) from error
    return DINOv2(network.to(device))
