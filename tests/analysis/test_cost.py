import pytest

from sagl.analysis.cost import analyze_cost
from sagl.analysis.registry import AnalysisRequest
from sagl.sampling.pipeline import build_pipeline
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.sampling import RunSettings, SamplerSettings
from sagl.utils.progress import ProgressReporter
from tests.helpers.networks import grey_unet, write_grey_classifier


@pytest.mark.parametrize("has_classifier", [False, True])
def test_the_cost_is_that_of_every_combination_with_the_classifier(has_classifier, tmp_path):
    classifier = str(write_grey_classifier(tmp_path / "c.safetensors")) if has_classifier else None
    pipeline = build_pipeline(grey_unet(), DiffusionSettings(), SamplerSettings(sampler="ddim", respacing="2"), {})
    with ProgressReporter("cost", 2, "off") as progress:
        request = AnalysisRequest(
            pipeline=pipeline,
            samples=RunSettings(num_samples=2, batch_size=2),
            sag=SelfAttentionGuidance(site="output.1", blur_sigma=1.0),
            figure=tmp_path / "cost.png",
            progress=progress,
            classifier=classifier,
        )
        numbers = analyze_cost(request)
    evaluations = {name: values["evaluations"] for name, values in numbers.items()}
    guided = {"classifier": 2, "SAG + classifier": 4} if has_classifier else {}
    assert evaluations == {"unguided": 2, "SAG": 4, **guided}
    assert all(values["seconds_per_image"] >= 0 for values in numbers.values())
