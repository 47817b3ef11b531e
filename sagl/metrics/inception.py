"""The Inception v3 of 2015 behind the literature's FID, sFID and IS, by torch-fidelity's port of its graph.

Its weights come from a download; whoever has the file puts it where `weights_file` looks.
"""

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sagl.errors import UserError, require
from sagl.metrics.features import Features
from sagl.shapes import ImageUint8
from sagl.utils.download import download
from sagl.utils.download_progress import progress_bar
from sagl.utils.files import cache_folder, sha256

FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
VARIABLE = "SAGL_INCEPTION"
"""Names the weights' file, where it lies elsewhere."""
SIDE = 299
SPATIAL = 7
"""Channels of Mixed_6d.branch1x1, whose 17×17 places make the 2,023 features of sFID (Nash et al. 2021)."""
UP_TO_SPATIAL = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2 Mixed_5b"
UP_TO_SPATIAL += " Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c"
FROM_SPATIAL = "Mixed_6d Mixed_6e Mixed_7a Mixed_7b Mixed_7c AvgPool"
"""The network's parts, in order."""


class Inception:
    """Pooled features, 2048; those of sFID, 2023; logits without bias, 1008: as OpenAI's evaluator takes them."""

    resize = "bilinear to 299×299, as TensorFlow 1 does, no antialias"

    def __init__(self, network: nn.Module) -> None:
        """With torch-fidelity's network, weights loaded."""
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def __call__(self, images_uint8: ImageUint8) -> Features:
        """(B, 1 or 3, H, W) uint8 -> (B, 2048), (B, 2023), (B, 1008)."""
        net: Any = self.network
        images = images_uint8.to(net.fc.weight.device).expand(-1, 3, -1, -1).float()
        x = ((resized(images, SIDE) - 128) / 128).contiguous(memory_format=torch.channels_last)
        x = self._through(UP_TO_SPATIAL, x)
        spatial = net.Mixed_6d.branch1x1(x)[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)
        pooled = self._through(FROM_SPATIAL, x).flatten(1)
        return Features(pooled, spatial, pooled @ net.fc.weight.T)

    def _through(self, parts: str, x: Tensor) -> Tensor:
        for part in parts.split():
            x = getattr(self.network, part)(x)
        return x


def resized(images: Tensor, side: int) -> Tensor:
    """Bilinear as TensorFlow 1 has it, corners not aligned: output pixel i lies at i · H / side of the input.

    (B, C, H, W) float -> (B, C, side, side). Half a pixel beside PyTorch's; nothing is averaged where it shrinks.
    """
    for dim in (2, 3):
        size = images.shape[dim]
        at = torch.arange(side, device=images.device, dtype=torch.float32) * (size / side)
        low = at.floor().long().clamp(max=size - 1)
        share = (at - low).view([-1 if d == dim else 1 for d in range(4)])
        first, second = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp(max=size - 1))
        images = first + (second - first) * share
    return images


def inception(device: torch.device) -> Inception:
    """The extractor on a device.

    Raises:
        UserError: torch-fidelity is not installed, or the weights are not to be had, or are not those.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError("`extractor` inception needs torch-fidelity. Install it: pip install 'sagl[eval]'.") from error
    path = weights_file()
    _require_weights(path)
    try:
        network = FeatureExtractorInceptionV3("sagl", ["2048"], feature_extractor_weights_path=str(path))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"`extractor` inception needs the weights of {FILE}, and {path} holds another network's."
        ) from error
    return Inception(network.to(device))


def weights_file() -> Path:
    """The file at $SAGL_INCEPTION, in our cache or in torch.hub's; else downloaded to our cache.

    Raises:
        UserError: $SAGL_INCEPTION names no file, or the download fails: says where to put a copy.
    """
    if chosen := os.environ.get(VARIABLE):
        require(Path(chosen).is_file(), f"`{VARIABLE}` must name the file {FILE}, and there is none at {chosen}.")
        return Path(chosen)
    ours = cache_folder() / FILE
    for path in (ours, Path(torch.hub.get_dir()) / "checkpoints" / FILE):
        if path.is_file():
            return path
    print(f"Fetching {URL} (Apache-2.0 licence) to {ours}", file=sys.stderr, flush=True)
    with progress_bar(FILE) as on_progress:
        return download(URL, ours, check=_require_published, on_progress=on_progress)


def _require_published(path: Path) -> None:
    """The file's name ends in the first eight digits of its sha256."""
    found = sha256(path)[:8]
    require(
        FILE.endswith(f"{found}.pth"),
        f"`extractor` inception: {URL} gave a file of another sha256, {found}.",
    )


def _require_weights(path: Path) -> None:
    """Tensors alone: torch-fidelity would also run code that a file holds.

    Raises:
        UserError: it is damaged, or wants to run code.
    """
    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(
            f"`extractor` inception needs a file of tensors alone, and {path} is damaged, or would run code."
        ) from error
    tensors = isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())
    require(tensors, f"`extractor` inception needs a file of tensors by name, and {path} is none.")
