import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from sagl.errors import UserError
from sagl.settings.guidance import BlurGuidance
from tests.helpers.guided import NETWORK, SCHEDULE, STEP, eps_by_formula, guided, images
from tests.helpers.reference_values import relative_error


@pytest.mark.parametrize("clip", [True, False])
def test_the_weak_prediction_is_for_the_blurred_image_with_the_same_noise(clip):
    bar, base = float(SCHEDULE.alpha_bar(STEP)), eps_by_formula()
    x0_hat = (images().double() - (1 - bar) ** 0.5 * base) / bar**0.5
    blurred = gaussian_blur(x0_hat.clamp(-1, 1) if clip else x0_hat, [7, 7], [1.5, 1.5])
    weak_eps = eps_by_formula(x=bar**0.5 * blurred + (1 - bar) ** 0.5 * base)
    actual = guided(blur={"scale": 2.0, "blur_sigma": 1.5, "kernel_size": 7, "clip_x0": clip}).eps
    assert relative_error(actual, base + 2.0 * (base - weak_eps)) < 1e-5


def test_it_is_self_attention_guidance_with_all_pixels_masked():
    sag = guided(sag={"scale": 2.0, "site": "middle", "threshold": -1.0})
    assert torch.equal(guided(blur={"scale": 2.0}).eps, sag.eps)


def test_a_blur_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"`blur\.kernel_size`.*33"):
        BlurGuidance(kernel_size=33).check_network(NETWORK.settings)
    for setting, value in (("kernel_size", 8), ("blur_sigma", 0.0)):
        with pytest.raises(UserError, match=rf"`blur\.{setting}`"):
            BlurGuidance(**{setting: value})
