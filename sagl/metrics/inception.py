"""The Inception v3 network of 2015 used for FID, sFID and IS, as ported by torch-fidelity.

The weights are downloaded, or read from one of the files that `weights_file` lists.
"""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sagl.errors import UserError, require
from sagl.metrics.features import Features
from sagl.shapes import ImageUint8
from sagl.utils.download import download
from sagl.utils.files import cache_folder, sha256

FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
VARIABLE = "SAGL_INCEPTION"
"""Environment variable with the path of the weights."""
IMAGE_SIZE = 299
NUM_SPATIAL = 7
"""Channels of Mixed_6d.branch1x1; their 17×17 positions are the 2,023 features of sFID (Nash et al. 2021)."""
LAYERS_TO_SPATIAL = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2 Mixed_5b"
LAYERS_TO_SPATIAL += " Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c"
LAYERS_FROM_SPATIAL = "Mixed_6d Mixed_6e Mixed_7a Mixed_7b Mixed_7c AvgPool"
"""Layers of the network in order, up to and from the input of Mixed_6d."""


class Inception:
    """Extractor as in OpenAI's evaluator: pooled (2048) and spatial features (2023), logits without bias (1008)."""

    resize = "bilinear to 299×299, as TensorFlow 1 does, no antialias"

    def __init__(self, network: nn.Module, version: str = "") -> None:
        """Hold a network; `version` identifies weights other than the published ones."""
        self.version = version
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def __call__(self, images_uint8: ImageUint8) -> Features:
        """Extract features: (B, 1 or 3, H, W) uint8 -> (B, 2048), (B, 2023), (B, 1008)."""
        net: Any = self.network
        images = images_uint8.to(net.fc.weight.device).expand(-1, 3, -1, -1).float()
        x = ((tf1_resize_bilinear(images, IMAGE_SIZE) - 128) / 128).contiguous(memory_format=torch.channels_last)
        x = self._run(LAYERS_TO_SPATIAL, x)
        spatial = net.Mixed_6d.branch1x1(x)[:, :NUM_SPATIAL].permute(0, 2, 3, 1).flatten(1)
        pooled = self._run(LAYERS_FROM_SPATIAL, x).flatten(1)
        return Features(pooled, spatial, pooled @ net.fc.weight.T)

    def _run(self, layers: str, x: Tensor) -> Tensor:
        for layer in layers.split():
            x = getattr(self.network, layer)(x)
        return x


def tf1_resize_bilinear(images: Tensor, size: int) -> Tensor:
    """Resize as TensorFlow 1's `resize_bilinear` with align_corners=False: (B, C, H, W) float -> (B, C, size, size).

    Output pixel i samples the input at i · H / size, half a pixel from PyTorch's position; no antialiasing.
    """
    for dim in (2, 3):
        length = images.shape[dim]
        position = torch.arange(size, device=images.device, dtype=torch.float32) * (length / size)
        low = position.floor().long().clamp(max=length - 1)
        weight = (position - low).view([-1 if d == dim else 1 for d in range(4)])
        first, second = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp(max=length - 1))
        images = first + (second - first) * weight
    return images


def inception(device: torch.device) -> Inception:
    """Load the extractor onto a device.

    Raises:
        UserError: torch-fidelity is not installed, or the weights cannot be downloaded or are another network's.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError("`extractor` inception needs torch-fidelity. Install it: pip install 'sagl[eval]'.") from error
    path = weights_file()
    _check_weights(path)
    try:
        network = FeatureExtractorInceptionV3("sagl", ["2048"], feature_extractor_weights_path=str(path))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"`extractor` inception needs the weights of {FILE}, and {path} holds another network's."
        ) from error
    return Inception(network.to(device), _version(path))


def weights_file() -> Path:
    """Return the path of the weights: $SAGL_INCEPTION, or in sagl's or torch.hub's cache; else download them.

    Raises:
        UserError: $SAGL_INCEPTION is not a file, or the download fails.
    """
    if path_from_environment := os.environ.get(VARIABLE):
        path = Path(path_from_environment)
        require(path.is_file(), f"`{VARIABLE}` must be the path of {FILE}, and there is no file {path}.")
        return path
    cached = cache_folder() / FILE
    for path in (cached, Path(torch.hub.get_dir()) / "checkpoints" / FILE):
        if path.is_file():
            return path
    return download(URL, cached, check=_check_digest, licence="Apache-2.0")


def _version(path: Path) -> str:
    """Return the first digits of a file's sha256; empty for the published file, whose name ends with eight of them."""
    digest = sha256(path)[:16]
    return "" if FILE.endswith(f"{digest[:8]}.pth") else digest


def _check_digest(path: Path) -> None:
    """Check that this is the published file."""
    version = _version(path)
    require(not version, f"`extractor` inception: {URL} has an unexpected sha256, {version}….")


def _check_weights(path: Path) -> None:
    """Check that the file holds tensors only, because torch-fidelity would also run code in a pickle.

    Raises:
        UserError: the file is damaged, or would run code.
    """
    try:
        state_dict = torch.load(path, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(
            f"`extractor` inception needs a file of tensors, and {path} is damaged, or would run code."
        ) from error
    is_valid = isinstance(state_dict, dict) and all(isinstance(value, Tensor) for value in state_dict.values())
    require(is_valid, f"`extractor` inception needs a file of tensors by name, and {path} is none.")
