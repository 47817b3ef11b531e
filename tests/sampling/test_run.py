from dataclasses import replace

from sagl.configuration.sample import parse_sample_config
from sagl.models.flops import flops_per_evaluation
from sagl.sampling import run
from sagl.sampling.pipeline import build_pipeline
from sagl.sampling.run_folder import read_run_json
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.sampling import SamplerSettings
from tests.helpers.networks import stable_unet


def test_the_recorded_evaluations_are_the_mean_of_the_batches(tmp_path):
    """Guidance methods may decide while they run whether to evaluate the network."""
    pipeline = build_pipeline(stable_unet(), DiffusionSettings(), SamplerSettings(respacing="2"))
    metadata = {"settings": {}, "nfe": 0, "flops": 0, "seconds": 0.0, "num_timed_batches": 0}
    sampling_run = run.SamplingRun(
        config=replace(parse_sample_config([]), output=tmp_path), checkpoint=tmp_path, network=None, metadata=metadata
    )
    for nfe in (2.0, 3.0, 4.0):
        sampling_run.record_batch(pipeline, nfe, 1.5)
    recorded = read_run_json(tmp_path)
    assert (recorded["nfe"], recorded["seconds"]) == (3.0, 4.5)
    assert recorded["flops"] == 3 * flops_per_evaluation(pipeline.network.settings)
