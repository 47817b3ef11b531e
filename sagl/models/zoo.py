"""Networks by name, without loading torch: the one that comes with the package."""

import json
import struct
from pathlib import Path
from typing import Any

from sagl.settings.errors import UserError

EMBEDDED = Path(__file__).parent / "weights" / "fashion_mnist.safetensors"
"""32x32 Fashion-MNIST, ten classes and a null label; trained by configs/fashion_mnist.yaml."""
METADATA_KEY = "sagl"
"""Where a safetensors file of sagl keeps its settings, as JSON."""


def described(path: Path) -> dict[str, Any]:
    """What a safetensors file says of itself: network, diffusion, recommended; empty for other files.

    Raises:
        UserError: the file is damaged.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, path.stat().st_size)))
        return dict(json.loads(header.get("__metadata__", {}).get(METADATA_KEY, "{}")))
    except (struct.error, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"`checkpoint` must be a whole .safetensors file, and {path} is damaged.") from error
