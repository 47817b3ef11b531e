"""Requests of analyses of tiny networks."""

from sagl.analysis.registry import AnalysisRequest
from sagl.sampling.pipeline import build_pipeline
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.sampling import RunSettings, SamplerSettings
from sagl.utils.progress import ProgressReporter


def analysis_request(network, folder, **changes):
    """Return the request to analyze two samples of two steps."""
    sampler = SamplerSettings(sampler="ddim", respacing="2")
    return AnalysisRequest(
        pipeline=build_pipeline(network, DiffusionSettings(), sampler, {}),
        samples=RunSettings(num_samples=2, batch_size=2),
        sag=SelfAttentionGuidance(site="output.1", blur_sigma=1.0),
        figure=folder / "figure.png",
        progress=ProgressReporter("analysis", 2, "off"),
        **changes,
    )
