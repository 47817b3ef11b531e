from dataclasses import replace

import pytest

from sagl.configuration.sample import parse_sample_config
from sagl.models.flops import flops_per_evaluation
from sagl.sampling import batch, run
from sagl.sampling.pipeline import build_pipeline
from sagl.sampling.run_folder import read_run_json, write_run_json
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.sampling import SamplerSettings
from sagl.utils.progress import ProgressReporter
from tests.helpers.errors import refused
from tests.helpers.networks import stable_unet

NO_COST = {"settings": {}, "nfe": 0, "flops": 0, "mask_share": None, "seconds": 0.0, "num_timed_batches": 0}


@pytest.fixture
def pipeline():
    return build_pipeline(stable_unet(), DiffusionSettings(), SamplerSettings(respacing="2"))


def run_in(folder, *flags):
    config = replace(parse_sample_config(["--labels", "null", *flags]), output=folder)
    return run.SamplingRun(config=config, checkpoint=folder, network=None, metadata=dict(NO_COST))


def test_a_missing_guidance_file_is_refused_before_the_network_is_downloaded(monkeypatch):
    monkeypatch.setattr("sagl.models.loading.download_pretrained", lambda _: pytest.fail("downloaded"))
    flags = ["--model", "lsun_cat", "--sag.scale", "1", "--sag.direction_head", "absent.safetensors"]
    config = parse_sample_config(flags)
    for check in (run.SamplingRun.open, run.SamplingRun.without_folder):
        with refused("`sag.direction_head`", "absent.safetensors"):
            check(config)


def batch_images(nfe, mask_share=None):
    return batch.BatchImages(ids=[0], labels=[-1], images=[b""], masks=None, mask_share=mask_share, nfe=nfe)


def test_the_recorded_evaluations_are_the_mean_of_the_batches(pipeline, tmp_path):
    """Guidance methods may decide while they run whether to evaluate the network."""
    sampling_run = run_in(tmp_path)
    for nfe in (2.0, 3.0, 4.0):
        sampling_run.record_batch(pipeline, batch_images(nfe), 1.5)
    recorded = read_run_json(tmp_path)
    assert (recorded["nfe"], recorded["seconds"]) == (3.0, 4.5)
    assert recorded["flops"] == 3 * flops_per_evaluation(pipeline.network.settings)
    assert recorded["mask_share"] is None


def test_the_recorded_share_of_masked_pixels_is_the_mean_of_the_batches(pipeline, tmp_path):
    sampling_run = run_in(tmp_path)
    for share in (0.1, 0.2, 0.6):
        sampling_run.record_batch(pipeline, batch_images(2.0, share), 1.5)
    assert read_run_json(tmp_path)["mask_share"] == pytest.approx(0.3)


def test_the_seconds_of_a_batch_are_without_its_unguided_images(pipeline, tmp_path, monkeypatch):
    seconds, sample_images = [0.0], batch.sample_images

    def sample_with_times(pipeline, *args):
        seconds[0] += 5 if len(seconds) == 1 else 2
        seconds.append(0)
        return sample_images(pipeline, *args)

    monkeypatch.setattr(batch, "sample_images", sample_with_times)
    monkeypatch.setattr(run.time, "monotonic", lambda: seconds[0])
    sampling_run = run_in(tmp_path / "run", "--compare", "--num_samples", "2", "--batch_size", "2")
    with ProgressReporter("sampling", 2, "off") as progress:
        images, seconds = sampling_run.write_batch(pipeline, [0, 1], progress)
    assert (images.nfe, seconds) == (2.0, 2.0)


def test_a_record_of_another_process_is_not_replaced_by_that_of_the_beginning(pipeline, tmp_path, monkeypatch):
    recorded = {**NO_COST, "seconds": 3.0, "num_timed_batches": 1}

    def cost(_, nfe):
        write_run_json(tmp_path / "run", recorded)  # while this process counts operations
        return {"nfe": nfe, "flops": 1}

    monkeypatch.setattr(type(pipeline), "cost", cost)
    sampling_run = run_in(tmp_path / "run", "--num_samples", "2", "--batch_size", "2")
    with ProgressReporter("sampling", 2, "off") as progress:
        sampling_run.write_batch(pipeline, [0, 1], progress)
    assert read_run_json(tmp_path / "run")["num_timed_batches"] == 1
