"""A network by name or by file: what is not at hand is fetched."""

import struct
import zlib
from pathlib import Path
from zipfile import BadZipFile, ZipFile, is_zipfile

from sagl.errors import UserError, require
from sagl.models.checkpoints import Checkpoint, check_state_dict, parameters_of, read_network
from sagl.models.zoo import WITHIN, name_from_filename, released
from sagl.utils.digest_cache import cached_sha256
from sagl.utils.download import fetch_released


def load(name_or_file: str | Path, weights: str = "ema") -> Checkpoint:
    """A network's weights and settings.

    Args:
        name_or_file: a released network (`lsun_cat`), an embedded one (`fashion_mnist`), or a file: .safetensors, .ckpt
            or .pt; a released file is known by its name.
        weights: of a training checkpoint: ema, ema:DECAY or raw.

    Raises:
        UserError: there is no such name or file, it cannot be fetched, or it is not a network.
    """
    path = Path(name_or_file)
    if path.is_file():
        if (known := name_from_filename(path)) is None:
            return read_network(path, weights)
        return read_network(path, weights, released(known).settings, released(known).diffusion)
    if path.suffix in (".pt", ".ckpt", ".safetensors"):
        raise UserError(f"`checkpoint` must be a file, and there is none at {path}.")
    name = str(name_or_file)
    if name in WITHIN:
        return read_network(WITHIN[name], weights)
    entry = released(name)
    require(weights == "ema", f"`weights` is for training checkpoints (.ckpt), and {name} has one set. Leave it out.")
    return read_network(fetch(name), weights, entry.settings, entry.diffusion)


def fetch(name: str) -> Path:
    """The file of a released network in the cache: bytes, names and shapes checked when it comes, its sha256 kept.

    Raises:
        UserError: it cannot be fetched, is not what it should be (says where to put a copy), or has changed since.
    """
    settings = released(name).settings

    def check(path: Path) -> None:
        _require_whole(path)
        check_state_dict(parameters_of(settings), read_network(path, settings=settings).state)

    path = fetch_released(name, check)
    cached_sha256(path)
    return path


def _require_whole(path: Path) -> None:
    """Refuse an archive, which newer .pt files are, whose bytes are not those of its checksums.

    Raises:
        UserError: names the file.
    """
    if not is_zipfile(path):
        return
    try:
        with ZipFile(path) as archive:
            damaged = archive.testzip()
    except (BadZipFile, RuntimeError, EOFError, ValueError, zlib.error, struct.error):  # of what is around the bytes
        damaged = path.name
    require(damaged is None, f"`checkpoint` must be a whole file, and {path} is damaged.")
