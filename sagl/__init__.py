"""sagl: fine-tune ADM diffusion models and sample from them with self-attention guidance."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sagl.errors import UserError as UserError
    from sagl.models.checkpoints import build_classifier as build_classifier
    from sagl.models.checkpoints import build_network as build_network
    from sagl.models.loading import load as load
    from sagl.sampling.pipeline import build_pipeline as build_pipeline
    from sagl.sampling.pipeline import run_to_end as run_to_end
    from sagl.settings.guidance import Autoguidance as Autoguidance
    from sagl.settings.guidance import BlurGuidance as BlurGuidance
    from sagl.settings.guidance import ClassifierFreeGuidance as ClassifierFreeGuidance
    from sagl.settings.guidance import ClassifierGuidance as ClassifierGuidance
    from sagl.settings.guidance import EpsScaling as EpsScaling
    from sagl.settings.guidance import HistoryGuidance as HistoryGuidance
    from sagl.settings.guidance import PerturbedAttentionGuidance as PerturbedAttentionGuidance
    from sagl.settings.guidance import SelfAttentionGuidance as SelfAttentionGuidance
    from sagl.settings.guidance import SmoothedEnergyGuidance as SmoothedEnergyGuidance
    from sagl.settings.guidance import TimestepGuidance as TimestepGuidance
    from sagl.settings.guidance import TokenPerturbationGuidance as TokenPerturbationGuidance
    from sagl.settings.sampling import SamplerSettings as SamplerSettings

__version__ = "0.1.0"

PUBLIC = {
    "load": "sagl.models.loading",
    "build_network": "sagl.models.checkpoints",
    "build_classifier": "sagl.models.checkpoints",
    "build_pipeline": "sagl.sampling.pipeline",
    "run_to_end": "sagl.sampling.pipeline",
    "SamplerSettings": "sagl.settings.sampling",
    "UserError": "sagl.errors",
    "SelfAttentionGuidance": "sagl.settings.guidance",
    "BlurGuidance": "sagl.settings.guidance",
    "ClassifierFreeGuidance": "sagl.settings.guidance",
    "ClassifierGuidance": "sagl.settings.guidance",
    "PerturbedAttentionGuidance": "sagl.settings.guidance",
    "SmoothedEnergyGuidance": "sagl.settings.guidance",
    "TokenPerturbationGuidance": "sagl.settings.guidance",
    "TimestepGuidance": "sagl.settings.guidance",
    "Autoguidance": "sagl.settings.guidance",
    "HistoryGuidance": "sagl.settings.guidance",
    "EpsScaling": "sagl.settings.guidance",
}
"""Modules of the public names, imported at first access, so that `import sagl` loads no torch."""


def __getattr__(name: str) -> Any:  # noqa: ANN401 (PEP 562)
    if name not in PUBLIC:
        raise AttributeError(f"module 'sagl' has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*PUBLIC, "__version__"]
