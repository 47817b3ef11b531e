import pytest
import torch

from sagl.diffusion.predictor import make_predictor
from sagl.errors import UserError
from sagl.sampling.pipeline import build_pipeline
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import Autoguidance
from sagl.settings.sampling import SamplerSettings
from tests.helpers.errors import refused
from tests.helpers.guided import NETWORK, SCHEDULE, STEP, guided, images
from tests.helpers.networks import draw_weights, grey_unet, small_unet, write_grey_unet, write_training_checkpoint
from tests.helpers.predictors import NO_CONDITION

FIXED = DiffusionSettings(variance="fixed_small")
SAMPLER = SamplerSettings(respacing="2")


@torch.no_grad()
def test_the_weak_prediction_is_that_of_the_weaker_network():
    weak_network = draw_weights(small_unet(learn_sigma=False), 2)
    base, weak_eps = (
        make_predictor(network, SCHEDULE, "fixed_small")(images(), STEP, NO_CONDITION).eps
        for network in (NETWORK, weak_network)
    )
    actual = guided(weak_network=weak_network, autoguidance={"scale": 0.7, "checkpoint": "weak"}).eps
    assert float((actual - (weak_eps + 1.7 * (base - weak_eps))).abs().max()) < 1e-5
    assert float((actual - base).abs().max()) > 0.01


COSINE = DiffusionSettings(noise_schedule="cosine")


def eps(network, path, weights="ema", labels=None):
    settings = Autoguidance(scale=1.0, checkpoint=str(path), weights=weights)
    pipeline = build_pipeline(network, COSINE, SAMPLER, {"autoguidance": settings})
    return next(pipeline.sample_progressive(0, (0,), labels))[2].eps


def test_the_weaker_network_may_be_another_average_of_the_same_training(tmp_path):
    path, network = write_training_checkpoint(tmp_path / "last.ckpt"), grey_unet()
    raw, average = eps(network, path, "raw"), eps(network, path)
    assert float((raw - average).abs().max()) > 0.01
    with pytest.raises(UserError, match=r"`autoguidance\.checkpoint`.*`weights`.*ema:0\.5"):
        eps(network, path, "ema:0.5")


@pytest.mark.parametrize(
    ("changes", "named"), [({"image_size": 16, "attention_resolutions": (16,)}, "16x16"), ({"num_classes": 4}, "4")]
)
def test_a_weaker_network_for_other_images_or_classes_is_refused(changes, named, tmp_path):
    path = write_grey_unet(tmp_path / "weak.safetensors", diffusion=COSINE, **changes)
    with pytest.raises(UserError, match=rf"`autoguidance\.checkpoint`.*{named}"):
        eps(grey_unet(), path)


def test_a_weaker_network_that_needs_labels_is_refused_without_them(tmp_path):
    path = write_grey_unet(tmp_path / "weak.safetensors", diffusion=COSINE, null_label=False)
    eps(grey_unet(), path, labels=torch.tensor([1]))
    with refused("`autoguidance.checkpoint`", "`labels` null"):
        eps(grey_unet(), path)
    with refused("`autoguidance.checkpoint`", "without classes"):
        eps(grey_unet(num_classes=None, null_label=False), path)


def test_a_weaker_network_of_another_process_or_none_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"`autoguidance\.checkpoint`.*cosine.*linear"):
        eps(grey_unet(), write_grey_unet(tmp_path / "weak.safetensors"))
    with pytest.raises(UserError, match=r"`autoguidance\.checkpoint`.*absent\.pt"):
        eps(grey_unet(), tmp_path / "absent.pt")
    with pytest.raises(UserError, match=r"`autoguidance\.checkpoint`"):
        Autoguidance(scale=1.0).check_network(grey_unet().settings)
