import pytest
import torch

from sagl.sampling.batch import sample_batch
from sagl.sampling.pipeline import build_pipeline
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.sampling import RunSettings, SamplerSettings
from tests.helpers.errors import refused
from tests.helpers.networks import stable_unet


@pytest.mark.parametrize(("scale", "parameter"), [(0.5, "`sag.scale`"), (0.0, "`checkpoint`")])
def test_images_that_are_not_finite_are_refused_with_what_may_be_wrong(scale, parameter):
    network = stable_unet()
    torch.nn.init.constant_(network.out[2].bias, float("nan"))
    guidances = {"sag": SelfAttentionGuidance(scale=scale, site="middle")}
    pipeline = build_pipeline(network, DiffusionSettings(), SamplerSettings(respacing="2"), guidances)
    with refused(parameter, "32-true"):
        sample_batch(pipeline, RunSettings(labels="null"), [0, 1])
