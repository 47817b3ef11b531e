"""The list of guidance methods.

Command-line flags, configuration keys, compatibility checks, run metadata, the comparison page and the documentation
derive from `GUIDANCES`. The table imports nothing until an entry is used, so that `--help` needs no PyTorch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sagl.guidance.base import Guidance, GuidanceContext
    from sagl.settings.guidance import GuidanceSettings


@dataclass(frozen=True)
class GuidanceEntry:
    """Import strings, "module:attribute", of the two parts of a guidance method."""

    settings: str
    """Subclass of `GuidanceSettings`."""
    builder: str
    """Function (settings, context) -> `Guidance`."""

    @property
    def settings_class(self) -> type["GuidanceSettings"]:
        """The imported settings class."""
        return _import(self.settings)

    @property
    def build(self) -> Callable[[Any, "GuidanceContext"], "Guidance"]:
        """The imported builder."""
        return _import(self.builder)


GUIDANCES: dict[str, GuidanceEntry] = {
    "sag": GuidanceEntry("sagl.settings.guidance:SelfAttentionGuidance", "sagl.guidance.sag:build_sag"),
    "cfg": GuidanceEntry("sagl.settings.guidance:ClassifierFreeGuidance", "sagl.guidance.classifier_free:build_cfg"),
    "classifier": GuidanceEntry(
        "sagl.settings.guidance:ClassifierGuidance", "sagl.guidance.classifier:build_classifier_guidance"
    ),
}
"""Guidance methods by the name of their group of settings; terms are summed in this order."""


def _import(path: str) -> Any:  # noqa: ANN401 (whatever the string names)
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
