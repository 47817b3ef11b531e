"""Extractors by name, and those of a user's own."""

from collections.abc import Callable
from importlib import import_module

import torch

from sagl.errors import require
from sagl.metrics.dinov2 import dinov2
from sagl.metrics.effnet import effnet_lite0
from sagl.metrics.features import Extractor
from sagl.metrics.inception import inception
from sagl.settings.evaluation import require_extractor

Maker = Callable[[torch.device], Extractor]
MAKERS: dict[str, Maker] = {
    "inception": inception,
    "effnet_lite0_64": lambda device: effnet_lite0(64, device),
    "effnet_lite0_224": lambda device: effnet_lite0(224, device),
    "dinov2": dinov2,
}
"""By the names in the settings."""


def get_extractor(name: str) -> Maker:
    """What makes an extractor: by one of the names above, or one's own function, as package.function.

    One's own gets the device, and returns what takes images and gives features.

    Raises:
        UserError: there is none of this name.
    """
    if name in MAKERS:
        return MAKERS[name]
    require_extractor(name)
    module, _, function = name.rpartition(".")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError):
        found = None
    require(
        callable(found),
        f"`extractor` must be one of {', '.join(MAKERS)}, or a function of yours that makes one, and there is no "
        f"function {name}.",
    )
    assert found is not None
    made: Maker = found
    return made
