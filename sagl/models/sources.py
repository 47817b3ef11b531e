"""Resolve a model name, a weight file or settings to a network.

torch is imported inside the functions that read weights, so that a request can be refused before it is loaded.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sagl.errors import require
from sagl.models.hub_files import download_from_hub, is_hub_name
from sagl.models.metadata import check_same_network, read_metadata, settings_from_metadata
from sagl.models.zoo import (
    BUNDLED,
    BUNDLED_REFERENCES,
    DEFAULT_MODEL,
    UNET_NAMES,
    get_unet_settings,
    name_from_filename,
)
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import UNetSettings

if TYPE_CHECKING:
    from sagl.models.checkpoints import NetworkWeights


class NetworkSource(NamedTuple):
    """Name, weight file and settings of a network whose weights have not been read."""

    model: str | None
    """Name of a pretrained network; None for a network that only `checkpoint` identifies."""
    checkpoint: Path | None
    """Weight file; None stands for that of `model`, which is downloaded if necessary."""
    weights: str
    """Weights of a training checkpoint: ema, ema:DECAY or raw."""
    network: UNetSettings | None
    """Network settings; None if the weight file contains them."""
    diffusion: DiffusionSettings | None
    """Diffusion process of training; None for that of the weight file."""

    def read_settings(self) -> tuple[UNetSettings, DiffusionSettings]:
        """Return the settings of network and diffusion process; the weights are read only if nothing else has them.

        Raises:
            UserError: the weight file is damaged, or of a classifier or a head.
        """
        if self.network is not None:
            return self.network, self.diffusion or DiffusionSettings()
        assert self.checkpoint is not None
        if metadata := read_metadata(self.checkpoint):
            settings, diffusion = settings_from_metadata(metadata, self.checkpoint)
        else:
            checkpoint = self.read_weights(self.checkpoint)
            settings, diffusion = checkpoint.model_settings, checkpoint.diffusion
        require(
            isinstance(settings, UNetSettings),
            f"`checkpoint` must be a diffusion model, and {self.checkpoint} is a classifier or a head, "
            "which go into `classifier.checkpoint` and `sag.direction_head`.",
        )
        assert isinstance(settings, UNetSettings)
        return settings, diffusion

    def find_file(self) -> Path:
        """Return the weight file; that of a released network is downloaded if it is not in the cache.

        Raises:
            UserError: it cannot be downloaded.
        """
        if self.checkpoint is not None:
            return self.checkpoint
        from sagl.models.loading import download_pretrained

        assert self.model is not None
        return download_pretrained(self.model)

    def read_weights(self, file: Path) -> "NetworkWeights":
        """Read the weights of the file.

        Raises:
            UserError: the file is damaged, or does not fit the settings.
        """
        from sagl.models.checkpoints import read_checkpoint

        return read_checkpoint(file, self.weights, self.network, self.diffusion)


def resolve_network(
    model: str | UNetSettings | None,
    checkpoint: str | None,
    diffusion: DiffusionSettings | None = None,
    weights: str = "ema",
) -> NetworkSource:
    """Find the network that a command line or a config describes.

    Args:
        model: name of a pretrained network, hf:OWNER/NAME, or settings. None stands for the network of `checkpoint`, or
            for the default one.
        checkpoint: path of a weight file; None for that of the named network.
        diffusion: diffusion process; None for that of the network.
        weights: weights of a training checkpoint: ema, ema:DECAY or raw.

    Raises:
        UserError: the name or file does not exist, the file cannot be read or contradicts the settings, only settings
            or only weights are given, or `weights` are given for a file that is no training checkpoint.
    """
    if isinstance(model, str) and is_hub_name(model):
        require(checkpoint is None, f"`checkpoint` must be left out for {model}, got {checkpoint}.")
        checkpoint, model = str(download_from_hub(model)), None
    path = None if checkpoint is None else Path(checkpoint)
    require(
        weights == "ema" or (path is not None and path.suffix == ".ckpt"),
        f"`weights` is for training checkpoints (.ckpt), got {weights} for another file. Leave it out.",
    )
    if path is not None:
        return _from_file(path, model, diffusion, weights)
    require(
        not isinstance(model, UNetSettings),
        "`model.network` describes a network without weights. Set `checkpoint`, or leave out `config` and set `model` "
        f"to one of {', '.join(UNET_NAMES)}.",
    )
    name = DEFAULT_MODEL if model is None else str(model)
    if name in BUNDLED_REFERENCES:
        return _from_file(BUNDLED[name], name, diffusion, weights)
    network, named_diffusion = get_unet_settings(name)
    return NetworkSource(name, None, weights, network, diffusion or named_diffusion)


def _from_file(
    path: Path, model: str | UNetSettings | None, diffusion: DiffusionSettings | None, weights: str
) -> NetworkSource:
    """Return a network whose weights are in the file `path`."""
    require(path.is_file(), f"`checkpoint` must be a file, and {path} is none.")
    require(os.access(path, os.R_OK), f"`checkpoint` must be readable, and {path} is not.")
    metadata = read_metadata(path)
    if model is None and not metadata:
        model = _name_of_file(path)
    name = model if isinstance(model, str) else None
    network, named_diffusion = (None, None) if name is None else get_unet_settings(name)
    if isinstance(model, UNetSettings):
        network = model
    if not metadata:
        return NetworkSource(name, path, weights, network, diffusion or named_diffusion)
    own_network, own_diffusion = settings_from_metadata(metadata, path)
    if network is not None:
        check_same_network(network, own_network, path)
    require(
        diffusion in (None, own_diffusion),
        f"`model.diffusion` must agree with `checkpoint`, and {path} has {own_diffusion}, got {diffusion}. "
        "Leave it out.",
    )
    return NetworkSource(name, path, weights, network=None, diffusion=None)


def _name_of_file(path: Path) -> str | None:
    """Return the released network that a .pt file belongs to; None for other files, which are refused when read."""
    if path.suffix != ".pt":
        return None
    name = name_from_filename(path)
    require(
        name is not None,
        f"`checkpoint` {path} does not identify its network. Set `model` to one of {', '.join(UNET_NAMES)}, or "
        "`config` to a file with model.network.",
    )
    return name
