"""A network by name or by file: what is not at hand is fetched."""

from pathlib import Path

from sagl.models.checkpoints import NetworkFile, read_network, require_fit
from sagl.models.download import fetch_released
from sagl.models.zoo import DEFAULT_MODEL, EMBEDDED, RELEASED, released
from sagl.settings.errors import UserError


def load(name_or_file: str | Path, weights: str = "ema") -> NetworkFile:
    """A network's weights and settings.

    Args:
        name_or_file: a released network (`lsun_cat`), the embedded `fashion_mnist`, or a .safetensors, .ckpt or .pt
            file; a released file is known by its name.
        weights: of a training checkpoint: ema, ema:DECAY or raw.

    Raises:
        UserError: there is no such name or file, it cannot be fetched, or it is not a network.
    """
    path = Path(name_or_file)
    if path.is_file():
        for entry in RELEASED.values():
            if entry.file == path.name:
                return read_network(path, weights, entry.settings, entry.diffusion)
        return read_network(path, weights)
    if path.suffix in (".pt", ".ckpt", ".safetensors"):
        raise UserError(f"`checkpoint` must be a file, and there is none at {path}.")
    name = str(name_or_file)
    if name == DEFAULT_MODEL:
        return read_network(EMBEDDED, weights)
    entry = released(name)
    return read_network(fetch(name), weights, entry.settings, entry.diffusion)


def fetch(name: str) -> Path:
    """The file of a released network in the cache, its names and shapes checked when it comes.

    Raises:
        UserError: it cannot be fetched, or is not what it should be; says where to put a copy.
    """
    settings = released(name).settings

    def check(path: Path) -> None:
        require_fit(settings, read_network(path, settings=settings).state)

    return fetch_released(name, check)
