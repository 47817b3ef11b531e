"""Registry of feature extractors."""

from collections.abc import Callable
from importlib import import_module

import torch

from sagl.errors import UserError, require
from sagl.metrics.dinov2 import dinov2
from sagl.metrics.effnet import effnet_lite0
from sagl.metrics.features import Extractor
from sagl.metrics.inception import inception
from sagl.settings.evaluation import require_extractor

ExtractorFactory = Callable[[torch.device], Extractor]
EXTRACTORS: dict[str, ExtractorFactory] = {
    "inception": inception,
    "effnet_lite0_64": lambda device: effnet_lite0(64, device),
    "effnet_lite0_224": lambda device: effnet_lite0(224, device),
    "dinov2": dinov2,
}
"""Extractors by name; the names are those of `sagl.settings.evaluation.EXTRACTOR_NAMES`."""


def get_extractor(name: str) -> ExtractorFactory:
    """Return the factory of an extractor, which maps a device to the extractor.

    Args:
        name: a key of `EXTRACTORS`, or the full name of a function, package.function.

    Raises:
        UserError: there is no extractor of this name. The factory of a function raises it if the function fails.
    """
    if name in EXTRACTORS:
        return EXTRACTORS[name]
    require_extractor(name)
    module, _, function = name.rpartition(".")
    try:
        factory: ExtractorFactory | None = getattr(import_module(module), function)
    except (ImportError, AttributeError):
        factory = None
    require(
        callable(factory),
        f"`extractor` must be one of {', '.join(EXTRACTORS)} or package.function, and there is no function {name}.",
    )
    assert factory is not None

    def load(device: torch.device) -> Extractor:
        try:
            extract = factory(device)
            require(callable(extract), f"it returned {extract!r:.60}")
        except Exception as error:
            raise UserError(f"`extractor` {name} must return an extractor for a device: {error!r}.") from error
        return extract

    return load
