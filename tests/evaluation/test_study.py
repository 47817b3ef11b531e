import math
import shutil

import numpy as np
import pytest
import torch

from sagl.configuration.sample import parse_sample_config
from sagl.evaluation import study as module
from sagl.evaluation.extraction import FeatureExtraction
from sagl.evaluation.study import BATCH_SIZES, Comparison, Setting, Study, prepare_run
from sagl.metrics.accumulator import FeatureStatistics
from sagl.metrics.bootstrap import paired_difference, resample
from sagl.metrics.frechet import frechet_distance, statistics
from sagl.metrics.precision_recall import precision_recall
from sagl.metrics.statistics_file import Reference
from sagl.models.checkpoints import write_checkpoint
from sagl.sampling import batch, choices
from sagl.sampling.exports import write_npz
from sagl.settings.evaluation import ExtractionSettings
from sagl.settings.guidance import Autoguidance, ClassifierFreeGuidance, SelfAttentionGuidance
from sagl.settings.sampling import SamplerSettings
from sagl.utils.distributed import Ranks
from sagl.utils.files import json_sha256
from tests.helpers.commands import exit_code
from tests.helpers.errors import refused
from tests.helpers.networks import grey_weights, write_grey_unet

UNGUIDED = Setting(sampler=SamplerSettings(sampler="ddim", respacing="2"))
GUIDED = Setting(sampler=UNGUIDED.sampler, guidances={"sag": SelfAttentionGuidance(scale=0.5, site="middle")})


def columns(images_uint8):
    """Eight features: means of the first channel over columns."""
    return images_uint8[:, 0].float().mean(dim=1)


def open_study(tmp_path, *flags, version=""):
    checkpoint = tmp_path / "network.safetensors"
    if not checkpoint.exists():
        write_checkpoint(grey_weights(), checkpoint)
    flags = ["--batch_size", 4, "--labels", "balanced", "--trainer.precision", "32-true", *flags]
    arguments = ["--checkpoint", checkpoint, "--output", tmp_path / "study", "--trainer.accelerator", "cpu", *flags]
    run = prepare_run(parse_sample_config(list(map(str, arguments))))
    ranks, settings = Ranks(device=torch.device("cpu")), ExtractionSettings(progress="off")
    extraction = FeatureExtraction(name="columns", version=version, extract=columns, ranks=ranks, settings=settings)
    return Study.open(run, extraction)


def sampled(study, setting, ids):
    study.sample([setting], ids)
    return study.features(setting, ids)


def test_features_are_those_of_the_images_that_sample_writes(tmp_path):
    features = sampled(open_study(tmp_path), GUIDED, range(3, 9))
    flags = ["--batch_size", 4, "--labels", "balanced", "--sampler", "ddim", "--respacing", 2, "--progress", "off"]
    flags += ["--trainer.precision", "32-true"]
    flags += ["--sag.scale", 0.5, "--sag.site", "middle", "--first_id", 3, "--num_samples", 6]
    run = tmp_path / "run"
    assert exit_code("sample", "--checkpoint", tmp_path / "network.safetensors", "--output", run, *flags) == 0
    write_npz(run, tmp_path / "images.npz", 6)
    images = torch.from_numpy(np.load(tmp_path / "images.npz")["arr_0"]).permute(0, 3, 1, 2)
    assert torch.equal(features.pooled, columns(images))
    assert features.nfe == 4


def test_an_interrupted_study_samples_only_what_is_missing(tmp_path, monkeypatch):
    study, expected = open_study(tmp_path), sampled(open_study(tmp_path), GUIDED, range(8)).pooled
    for path in study.folder.rglob("4.npz"):
        path.unlink()
    assert study.missing([GUIDED, GUIDED], range(8)) == [(GUIDED, [4, 5, 6, 7])]
    compute = Study._compute_features
    monkeypatch.setattr(Study, "_compute_features", lambda *_: pytest.fail("sampled twice"))
    study.sample([GUIDED], range(4))
    monkeypatch.setattr(Study, "_compute_features", compute)
    assert torch.equal(sampled(study, GUIDED, range(8)).pooled, expected)


def test_a_batch_size_that_is_left_open_is_chosen_once_for_a_network_and_precision(tmp_path, monkeypatch):
    sizes = iter((4, 3, 2, 1, 1))
    monkeypatch.setattr(choices, "default_batch_size", lambda *_: next(sizes))
    left_open = ("--batch_size", "null")
    first = open_study(tmp_path, *left_open)
    assert not first.folder.exists()
    first.sample([UNGUIDED], range(4))
    assert open_study(tmp_path, *left_open).missing([UNGUIDED], range(4)) == []
    explicit = open_study(tmp_path, "--batch_size", "5")
    explicit.sample([UNGUIDED], range(4))
    assert open_study(tmp_path, *left_open).samples.batch_size == 4
    assert open_study(tmp_path, *left_open, "--trainer.precision", "bf16-true").samples.batch_size == 1
    (first.folder / BATCH_SIZES).write_text('{"a": "b"}')
    with refused("`output`", first.folder / BATCH_SIZES):
        open_study(tmp_path, *left_open)


def test_settings_of_a_method_that_is_off_do_not_matter_but_all_others_do(tmp_path):
    study = open_study(tmp_path)
    study.sample([UNGUIDED], range(4))
    off = {"sag": SelfAttentionGuidance(site="output.0"), "cfg": ClassifierFreeGuidance()}
    assert study.missing([Setting(sampler=UNGUIDED.sampler, guidances=off)], range(4)) == []
    assert study.missing([GUIDED], range(4)) != []
    for flags in (("--seed", "1"), ("--labels", "null"), ("--trainer.precision", "bf16-true"), ("--batch_size", "2")):
        assert open_study(tmp_path, *flags).missing([UNGUIDED], range(4)) != []


def weak(tmp_path):
    """Autoguidance by a weaker network in a file."""
    path = tmp_path / "weak.safetensors"
    return Setting(sampler=UNGUIDED.sampler, guidances={"autoguidance": Autoguidance(scale=1.0, checkpoint=str(path))})


def test_features_of_a_weaker_network_that_was_replaced_are_not_used_again(tmp_path):
    setting, study = weak(tmp_path), open_study(tmp_path)
    write_grey_unet(tmp_path / "weak.safetensors", num_res_blocks=2)
    before = sampled(study, setting, range(4)).pooled
    assert open_study(tmp_path).missing([setting], range(4)) == []
    write_grey_unet(tmp_path / "weak.safetensors")
    assert open_study(tmp_path).missing([setting], range(4)) != []
    assert not torch.equal(sampled(open_study(tmp_path), setting, range(4)).pooled, before)
    with refused("`autoguidance.checkpoint`", tmp_path / "weak.safetensors"):
        study.sample([setting], range(8))  # its first features are of the file before
    (tmp_path / "weak.safetensors").unlink()
    with refused("`autoguidance.checkpoint`", tmp_path / "weak.safetensors"):
        study.features(setting, range(4))


def test_features_of_a_weaker_network_are_those_of_its_content_wherever_it_lies(tmp_path):
    study, path = open_study(tmp_path), write_grey_unet(tmp_path / "weak.safetensors", num_res_blocks=2)
    study.sample([weak(tmp_path)], range(4))
    (tmp_path / "other").mkdir()
    shutil.copy(path, tmp_path / "other" / path.name)
    assert study.missing([weak(tmp_path / "other")], range(4)) == []
    assert len(study.missing([weak(tmp_path), weak(tmp_path / "other")], range(8))) == 1


def test_the_name_of_a_weaker_network_is_looked_up_once_per_setting(tmp_path, monkeypatch):
    """On the Hub every look-up is a request."""
    weak, names = write_grey_unet(tmp_path / "weak.safetensors"), []
    monkeypatch.setattr("sagl.models.loading.find_file", lambda name: names.append(name) or weak)
    scales, study = (0.5, 1.0, 2.0), open_study(tmp_path)
    settings = [
        Setting(sampler=UNGUIDED.sampler, guidances={"autoguidance": Autoguidance(scale=scale, checkpoint="hf:a/b")})
        for scale in scales
    ]
    for _ in range(2):
        assert len(study.missing(settings, range(40))) == 10 * len(scales)
    assert names == ["hf:a/b"] * len(scales)


def test_features_without_further_weight_files_have_the_place_that_they_always_had(tmp_path):
    study = open_study(tmp_path)
    study.sample([GUIDED], range(4))
    (path,) = study.folder.rglob("*.npz")
    assert path.parent.name == json_sha256({**study.identity, **GUIDED.values})[:16]


def test_features_of_other_weights_or_code_of_the_extractor_are_not_used_again(tmp_path):
    study = open_study(tmp_path)
    assert "extractor_version" not in study.identity  # features of earlier versions of sagl are found
    study.sample([UNGUIDED], range(4))
    assert open_study(tmp_path).missing([UNGUIDED], range(4)) == []
    for version in ("a", "b"):
        other = open_study(tmp_path, version=version)
        assert other.missing([UNGUIDED], range(4)) != []
        other.sample([UNGUIDED], range(4))


def test_metrics_and_differences_are_those_of_the_metrics_package():
    real, first, second = (torch.randn(60, 8, generator=torch.Generator().manual_seed(k)) for k in range(3))
    reference = Reference(statistics=FeatureStatistics(pooled=statistics(real), features=real), extractor="columns")
    comparison = Comparison(reference, num_resamples=20, seed=3)
    features = [module.Features(setting=UNGUIDED, pooled=pooled, nfe=2) for pooled in (first, second)]
    measurements = [comparison.measure(part) for part in features]
    distance = frechet_distance(statistics(real), statistics(second))
    assert measurements[1].values == {"fd": pytest.approx(distance), **precision_recall(second, real)._asdict()}
    resamples = (resample(part, comparison.distance, num_resamples=20, seed=3) for part in (first, second))
    expected = paired_difference(distance - comparison.distance(first), *resamples)
    assert measurements[1].difference(measurements[0]) == pytest.approx(expected)


def test_a_setting_whose_images_are_not_finite_has_an_infinite_distance_and_unguided_sampling_is_refused(
    tmp_path, monkeypatch
):
    reference = Reference(statistics=FeatureStatistics(pooled=statistics(torch.randn(60, 8))), extractor="columns")
    comparison, study = Comparison(reference, num_resamples=20), open_study(tmp_path)
    unguided = comparison.measure(sampled(study, UNGUIDED, range(8)))
    run_to_end = batch.run_to_end

    def overflow(steps):
        images, frequency = run_to_end(steps)
        return images.index_fill(0, torch.tensor([1]), math.inf), frequency

    monkeypatch.setattr(batch, "run_to_end", overflow)
    features = sampled(study, GUIDED, range(8))
    assert features.pooled.isnan().any(dim=1).tolist() == [False, True, False, False] * 2
    guided = comparison.measure(features)
    assert (guided.values, guided.json_values) == ({"fd": math.inf}, {"fd": None})
    assert unguided.difference(guided) is guided.difference(unguided) is None
    with refused("`checkpoint`"):
        study.sample([UNGUIDED], range(8, 12))


@pytest.mark.parametrize(
    ("respacing", "interval", "expected"),
    [
        ("ddim25", (0, 1), "ddim50"),
        ("ddim25", (0.5, 1), "ddim38"),
        ("ddim25", (0.52, 1), "37"),
        ("25", (0, 1), "50"),
        ("logsnr9", (0, 1), "logsnr18"),
        ("5,4,3", (0, 1), "24"),
        ("900", (0, 1), "1000"),
    ],
)
def test_plain_sampling_at_equal_cost_has_a_step_for_every_network_evaluation(respacing, interval, expected, tmp_path):
    guidances = {"sag": SelfAttentionGuidance(scale=0.5, site="middle", interval=interval)}
    guided = Setting(sampler=SamplerSettings(sampler="ddim", respacing=respacing), guidances=guidances)
    study = open_study(tmp_path)
    plain = study.at_equal_cost(guided, study.pipeline_for(guided).nfe)
    assert (plain.sampler.sampler, plain.sampler.respacing, plain.guidances) == ("ddim", expected, {})


def test_damaged_features_are_sampled_again(tmp_path):
    study = open_study(tmp_path)
    expected = sampled(study, UNGUIDED, range(8)).pooled
    first, second = sorted(study.folder.rglob("*.npz"))
    first.write_bytes(first.read_bytes()[:-40])
    content = bytearray(second.read_bytes())
    content[len(content) // 2] ^= 1
    second.write_bytes(content)
    assert torch.equal(sampled(study, UNGUIDED, range(8)).pooled, expected)
