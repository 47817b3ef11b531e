"""The list of guidance methods.

Command-line flags, configuration keys, compatibility checks, run metadata, the comparison page and the documentation
derive from `GUIDANCES`. The table imports nothing until an entry is used, so that `--help` needs no PyTorch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
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
        settings_class: type[GuidanceSettings] = resolve_name(self.settings)
        return settings_class

    @property
    def build(self) -> Callable[[Any, "GuidanceContext"], "Guidance"]:
        """The imported builder."""
        build: Callable[[Any, GuidanceContext], Guidance] = resolve_name(self.builder)
        return build


GUIDANCES: dict[str, GuidanceEntry] = {
    "sag": GuidanceEntry("sagl.settings.guidance:SelfAttentionGuidance", "sagl.guidance.sag:build_sag"),
    "blur": GuidanceEntry("sagl.settings.guidance:BlurGuidance", "sagl.guidance.blur:build_blur"),
    "cfg": GuidanceEntry("sagl.settings.guidance:ClassifierFreeGuidance", "sagl.guidance.classifier_free:build_cfg"),
    "classifier": GuidanceEntry(
        "sagl.settings.guidance:ClassifierGuidance", "sagl.guidance.classifier:build_classifier_guidance"
    ),
    "pag": GuidanceEntry(
        "sagl.settings.guidance:PerturbedAttentionGuidance", "sagl.guidance.perturbed_attention:build_pag"
    ),
    "seg": GuidanceEntry("sagl.settings.guidance:SmoothedEnergyGuidance", "sagl.guidance.smoothed_energy:build_seg"),
    "tpg": GuidanceEntry(
        "sagl.settings.guidance:TokenPerturbationGuidance", "sagl.guidance.token_perturbation:build_tpg"
    ),
    "tsg": GuidanceEntry("sagl.settings.guidance:TimestepGuidance", "sagl.guidance.timestep:build_tsg"),
    "autoguidance": GuidanceEntry(
        "sagl.settings.guidance:Autoguidance", "sagl.guidance.autoguidance:build_autoguidance"
    ),
    "history": GuidanceEntry("sagl.settings.guidance:HistoryGuidance", "sagl.guidance.history:build_history"),
    "eps_scaling": GuidanceEntry("sagl.settings.guidance:EpsScaling", "sagl.guidance.eps_scaling:build_eps_scaling"),
}
"""Guidance methods by the name of their group of settings; terms are summed in this order."""
