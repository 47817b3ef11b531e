"""Registry of feature extractors."""

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from sagl.errors import UserError, require
from sagl.metrics.dinov2 import dinov2
from sagl.metrics.effnet import effnet_lite0
from sagl.metrics.features import Extractor, weights_version
from sagl.metrics.inception import inception
from sagl.settings.evaluation import require_extractor
from sagl.utils.files import sha256

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


def extractor_version(name: str, extract: Extractor) -> str:
    """Return a text that differs for other weights or other code of an extractor; empty for sagl's own as published.

    For package.function, it has the sha256 of the file that defines the function. Code without a file has none.
    """
    parts = [weights_version(extract)]
    if name not in EXTRACTORS:
        module, _, function = name.rpartition(".")
        parts.append(_source_digest(import_module(module), function))
    return "-".join(filter(None, parts))


def _source_digest(module: ModuleType, function: str) -> str:
    """Return the first digits of the sha256 of the file that defines a function of a module."""
    try:
        file = inspect.getfile(inspect.unwrap(getattr(module, function)))
    except (TypeError, OSError):  # neither a function nor a class of a file
        file = getattr(module, "__file__", None) or ""
    return sha256(Path(file))[:16] if Path(file).is_file() else ""
