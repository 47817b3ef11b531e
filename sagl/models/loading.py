"""Networks by name or in any format: safetensors, training checkpoint, .pt file, folder for diffusers.

Released ones are downloaded at first use.
"""

from pathlib import Path

import torch

from sagl.errors import UserError, require
from sagl.models.checkpoints import NetworkWeights, in_dtype, meta_state_dict, read_checkpoint, write_checkpoint
from sagl.models.diffusers import read_diffusers, write_diffusers
from sagl.models.hub_files import download_from_hub, is_hub_name
from sagl.models.metadata import SAFETENSORS, WEIGHT_SUFFIXES
from sagl.models.state_dicts import check_state_dict
from sagl.models.zoo import BUNDLED, RELEASED, get_entry, get_settings, name_from_filename
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import NetworkSettings
from sagl.utils.digest_cache import cached_sha256
from sagl.utils.download import download
from sagl.utils.files import cache_folder


def load(name_or_file: str | Path, weights: str = "ema") -> NetworkWeights:
    """Load the weights and settings of a network.

    Args:
        name_or_file: A pretrained network (`fashion_mnist`, `lsun_cat`), one of the Hub (`hf:OWNER/NAME`), or a
            .safetensors, .ckpt or .pt file. The file name of a released network identifies its settings.
        weights: Weights of a training checkpoint: ema, ema:DECAY or raw.

    Raises:
        UserError: There is no such name or file, the download fails, or the file is not a network.
    """
    name = None if Path(name_or_file).is_file() or str(name_or_file) not in RELEASED else str(name_or_file)
    require(
        name is None or weights == "ema",
        f"`weights` must be left out for {name}, got {weights!r}: only a training checkpoint (.ckpt) has several.",
    )
    path = find_file(name_or_file)
    name = name or name_from_filename(path)
    if name is None:
        return read_checkpoint(path, weights)
    return read_checkpoint(path, weights, get_entry(name).settings, get_entry(name).diffusion)


def find_file(name_or_file: str | Path) -> Path:
    """Return the weight file of a network; a released one, or one of the Hub, is downloaded if it is missing.

    Args:
        name_or_file: As of `load`.

    Raises:
        UserError: There is no such name or file, or the download fails.
    """
    path = download_from_hub(str(name_or_file), "checkpoint") if is_hub_name(name_or_file) else Path(name_or_file)
    if path.is_file():
        return path
    if path.suffix in WEIGHT_SUFFIXES:
        raise UserError(f"`checkpoint` must be a file, and {path} does not exist.")
    name = str(name_or_file)
    return BUNDLED[name] if name in BUNDLED else download_pretrained(name)


def download_pretrained(name: str) -> Path:
    """Return the file of a released network in the cache; download it if it is missing, and say so on stderr.

    A download is checked for damage and for the names and shapes of its parameters; its sha256 is recorded, and
    compared at later calls.

    Raises:
        UserError: The download fails (says where to put a copy), is another file, or has changed since.
    """
    entry = get_entry(name)
    target = cache_folder() / "models" / entry.file

    def check(path: Path) -> None:
        checkpoint = read_checkpoint(path, settings=entry.settings)
        check_state_dict(meta_state_dict(entry.settings), checkpoint.state_dict)

    download(entry.url, target, check=check, licence=entry.licence)
    cached_sha256(target)
    return target


def read_network(
    checkpoint: str,
    weights: str = "ema",
    model: str | NetworkSettings | None = None,
    diffusion: DiffusionSettings | None = None,
) -> NetworkWeights:
    """Read a folder of diffusers, a file, or a network by name.

    Args:
        checkpoint: path or name.
        weights: weights of a training checkpoint: ema, ema:DECAY or raw.
        model: name or settings of the network, for a file without them.
        diffusion: process of the network; None for that of the file or of `model`.

    Raises:
        UserError: it cannot be read, or `weights` is given for a folder.
    """
    path = Path(checkpoint)
    if path.is_dir():
        require(weights == "ema", f"`weights` must be left out for a folder, got {weights}.")
        return read_diffusers(path, diffusion)
    if model is None:
        return load(checkpoint, weights)
    settings, default_diffusion = get_settings(model) if isinstance(model, str) else (model, None)
    return read_checkpoint(path, weights, settings, diffusion or default_diffusion)


def write_network(network: NetworkWeights, target: Path, dtype: str | None = None) -> None:
    """Write a network to a .safetensors file, or else to a new folder for diffusers.

    Args:
        network: weights and settings.
        target: the file or folder.
        dtype: data type of the weights, such as float16; None for that of each tensor.

    Raises:
        UserError: it cannot be written, or diffusers has no such network.
    """
    if dtype is not None:
        network = in_dtype(network, getattr(torch, dtype))
    if target.name.endswith(SAFETENSORS):
        check_state_dict(meta_state_dict(network.model_settings), network.state_dict)
        write_checkpoint(network, target)
    else:
        write_diffusers(network, target)
