from dataclasses import replace

import torch

from sagl.analysis.collect import last_sites, record_attention
from sagl.sampling.pipeline import build_pipeline
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.sampling import RunSettings, SamplerSettings
from sagl.shapes import AttentionSite
from sagl.utils.images import to_uint8
from tests.helpers.analyses import analysis_request
from tests.helpers.networks import stable_unet

SAMPLER = SamplerSettings(sampler="ddim", respacing="4")


def test_the_last_site_of_each_resolution_is_the_one_before_the_output():
    assert last_sites(stable_unet().settings) == {8: "output.1", 16: "output.3"}


def test_a_record_has_the_unguided_samples_and_the_attention_of_their_chain(tmp_path):
    network = stable_unet()
    guidance = {"sag": SelfAttentionGuidance(scale=2.0, site="output.1", blur_sigma=1.0)}
    pipeline = build_pipeline(network, DiffusionSettings(), SAMPLER, guidance)
    samples = RunSettings(num_samples=3, first_id=1, batch_size=2, labels="null")
    request = replace(analysis_request(network, tmp_path), pipeline=pipeline, samples=samples)
    record = record_attention(request, ["output.1"], [0, 3])
    assert record.steps == [3, 0]
    assert record.step_maps["output.1"].shape == (3, 2, 4, 8, 8)
    with torch.inference_mode():
        chain = list(pipeline.unguided.sample_progressive(0, [2, 3], None, [AttentionSite("output.1")]))
    maps = torch.stack([prediction.attention[AttentionSite("output.1")] for _, _, prediction in chain], dim=1)
    assert torch.equal(record.images[1:], to_uint8(chain[-1][1]))
    assert torch.equal(record.step_maps["output.1"][1:], maps[:, [0, 3]])
    torch.testing.assert_close(record.mean_maps["output.1"][1:], maps.mean(dim=1))
    assert record.step_images.shape == (3, 2, 3, 16, 16)
    assert torch.equal(record.step_images[1:, 1], record.images[1:])  # the last step's estimate is the sample
