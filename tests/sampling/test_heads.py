from dataclasses import replace

import pytest
import torch

from sagl.models.checkpoints import (
    NetworkWeights,
    build_network,
    cast_weights,
    read_checkpoint,
    write_checkpoint,
)
from sagl.models.direction_head import network_rms
from sagl.models.zoo import BUNDLED
from sagl.sampling.guidance_files import head_path
from sagl.sampling.heads import load_head
from sagl.sampling.pipeline import build_pipeline
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import PerturbedAttentionGuidance, SelfAttentionGuidance
from sagl.settings.sampling import SamplerSettings
from tests.helpers.errors import refused
from tests.helpers.heads import SAG, random_head, write_head
from tests.helpers.networks import count_calls, grey_unet, write_grey_classifier

CHAIN = SamplerSettings(sampler="ddim", respacing="6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a head of a network that would be net.safetensors."""
    path = tmp_path_factory.mktemp("heads")
    write_head(path / "net_sag_head.safetensors")
    return path


def sag(folder, **changes):
    return replace(SAG, **{"scale": 0.5, "direction_head": str(folder / "net_sag_head.safetensors"), **changes})


def load(settings, network):
    return load_head(settings, True, network, DiffusionSettings(), None)


def sample(settings, network=None, checkpoint=None):
    """Two images, and the network evaluations that they took."""
    network = network or grey_unet()
    calls = count_calls(network)
    pipeline = build_pipeline(network, DiffusionSettings(), CHAIN, {"sag": settings}, checkpoint=checkpoint)
    with torch.inference_mode():
        return pipeline.sample(0, [0, 1], None)[0], len(calls)


def test_a_head_of_these_settings_guides_at_one_evaluation_a_step(folder):
    images, calls = sample(sag(folder))
    real, real_calls = sample(SAG.__class__(**{**SAG.weak_prediction_settings, "scale": 0.5}))
    assert (calls, real_calls) == (6, 12)
    assert images.isfinite().all()
    assert not torch.equal(images, real)


def test_auto_is_the_head_beside_the_weight_file(folder):
    by_name, _ = sample(sag(folder, direction_head="auto"), checkpoint=folder / "net.safetensors")
    assert torch.equal(by_name, sample(sag(folder))[0])
    with refused("`sag.direction_head`", "other_sag_head.safetensors"):
        head_path(sag(folder, direction_head="auto"), folder / "other.safetensors")
    with refused("`sag.direction_head`", "auto"):
        head_path(sag(folder, direction_head="auto"), None)


def test_scale_0_gives_the_unguided_images_and_loads_no_head(folder):
    unguided, _ = sample(replace(SAG, scale=0.0))
    images, calls = sample(sag(folder, scale=0.0, direction_head="missing.safetensors"))
    assert torch.equal(images, unguided)
    assert calls == 6


def test_a_head_of_zeros_gives_the_unguided_images(tmp_path):
    head = random_head()
    for layer in (head.out, head.gains):
        for parameter in layer.parameters():
            parameter.zero_()
    images, _ = sample(sag(tmp_path, direction_head=str(write_head(tmp_path / "zero.safetensors", head))))
    assert torch.equal(images, sample(replace(SAG, scale=0.0))[0])


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true"])
@pytest.mark.parametrize("num_levels", [1, 2])
def test_a_head_has_the_precision_of_its_network(tmp_path, precision, num_levels):
    levels = {"channel_mult": (1, 2)[:num_levels], "attention_resolutions": (8, 4)[:num_levels]}
    network = grey_unet(**levels)
    changes = {"map_channels": network.settings.map_channels, "network_rms": network_rms(network)}
    settings = sag(tmp_path, direction_head=str(write_head(tmp_path / "head.safetensors", random_head(**changes))))
    network = cast_weights(network, precision, torch.device("cpu"))
    head = load(settings, network)
    assert head.out.weight.dtype == next(network.parameters()).dtype
    assert torch.equal(head.levels, random_head(**changes).levels)  # in float32, without rounding
    images, calls = sample(settings, network)
    assert calls == 6
    assert images.dtype == torch.float32
    assert images.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_of_a_head_is_on_the_device_of_its_network(folder, dtype, monkeypatch):
    monkeypatch.setattr("sagl.sampling.heads.is_same_network", lambda *_: True)  # the meta device has no values
    head = load(sag(folder), grey_unet().to("meta", dtype))
    assert {parameter.device.type for parameter in head.parameters()} == {"meta"}
    assert (head.out.weight.dtype, head.levels.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize(
    ("name", "value"), [("site", "output.1"), ("blur_sigma", 2.0), ("mask", "global"), ("head", 0)]
)
def test_a_head_for_other_settings_is_refused(folder, name, value):
    with refused("`sag.direction_head`", f"sag.{name}", value):
        load(sag(folder, **{name: value}), grey_unet())


def test_a_head_of_another_method_or_network_and_other_files_are_refused(folder, tmp_path):
    path = str(folder / "net_sag_head.safetensors")
    with refused("`pag.direction_head`", "sag"):
        load(PerturbedAttentionGuidance(scale=1.0, direction_head=path), grey_unet())
    with refused("`sag.direction_head`", "another network"):
        load(sag(folder), grey_unet(num_res_blocks=2))
    with refused("`sag.direction_head`", "missing"):
        load(sag(folder, direction_head="missing"), grey_unet())
    classifier = write_grey_classifier(tmp_path / "classifier.safetensors")
    with refused("`sag.direction_head`", "classifier.safetensors"):
        load(sag(folder, direction_head=str(classifier)), grey_unet())


def test_the_bundled_network_has_a_head_for_the_guidance_that_it_recommends():
    file = read_checkpoint(BUNDLED["emoji"])
    settings = SelfAttentionGuidance(**file.recommended["sag"], direction_head="auto")
    assert load_head(settings, True, build_network(file), file.diffusion, BUNDLED["emoji"]).out.weight.any()


@pytest.mark.parametrize(
    ("name", "value"),
    [("in_channels", 3), ("map_channels", (64, 32)), ("has_mask", False), ("num_timesteps", 10)],
)
def test_a_head_of_another_shape_is_refused(name, value, tmp_path):
    path = write_head(tmp_path / "head.safetensors", random_head(**{name: value}))
    with refused("`sag.direction_head`", name, value):
        load(sag(tmp_path, direction_head=str(path)), grey_unet())


@pytest.mark.parametrize("recommended", [3, [], None, {}])
def test_a_head_without_the_settings_of_its_guidance_is_refused(recommended, tmp_path):
    head, path = random_head(), tmp_path / "head.safetensors"
    content = NetworkWeights(
        model_settings=head.settings,
        diffusion=DiffusionSettings(),
        state_dict=head.state_dict(),
        recommended={"sag": recommended},
    )
    write_checkpoint(content, path)
    with refused("`sag.direction_head`", "sag.blur_sigma"):
        load(sag(tmp_path, direction_head=str(path)), grey_unet())
