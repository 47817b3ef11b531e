import math

import pytest
import torch

from sagl.analysis.frequency import analyze_frequency, mean_magnitudes, patch_magnitudes, radial_profile
from sagl.errors import UserError
from tests.helpers.analyses import analysis_request
from tests.helpers.networks import stable_unet
from tests.helpers.reference_values import generator

IMAGES = torch.randn(3, 2, 16, 16, generator=generator(1))


def test_magnitudes_are_those_of_each_patch_alone():
    magnitudes = patch_magnitudes(IMAGES, 4)
    patch = IMAGES[1, :, 8:12, 4:8].mean(dim=0)
    expected = torch.fft.fftshift(torch.fft.fft2(patch).abs() / 4)
    torch.testing.assert_close(magnitudes[1, 2, 1], expected)
    torch.testing.assert_close(magnitudes[1, 2, 1].square().sum(), patch.square().sum())


@pytest.mark.parametrize("cycles", [1, 2, 3])
def test_the_profile_of_a_wave_is_at_its_frequency(cycles):
    wave = torch.cos(2 * math.pi * cycles * torch.arange(8) / 8).expand(1, 1, 8, 8)
    frequencies, profile = radial_profile(patch_magnitudes(wave, 1)[:, 0, 0])
    assert float(frequencies[profile[0].argmax()]) == cycles / 8


def test_masked_and_unmasked_patches_are_averaged_apart():
    magnitudes = patch_magnitudes(IMAGES, 4)
    mask = torch.rand(3, 1, 4, 4, generator=generator(2)) > 0.5
    masked, unmasked = mean_magnitudes(magnitudes, mask)
    torch.testing.assert_close(masked[0], magnitudes[0][mask[0, 0]].mean(dim=0))
    torch.testing.assert_close(unmasked[2], magnitudes[2][~mask[2, 0]].mean(dim=0))
    assert bool(mean_magnitudes(magnitudes, torch.ones_like(mask))[1].isnan().all())


def test_the_ratio_is_that_of_the_mean_profiles_and_lies_in_its_interval(tmp_path):
    values = analyze_frequency(analysis_request(stable_unet(), tmp_path))["output.1"]
    ratio = values["ratio"]
    assert ratio["estimate"] == pytest.approx(sum(values["masked"]) / sum(values["unmasked"]), abs=1e-4)
    assert ratio["low"] <= ratio["estimate"] <= ratio["high"]


def test_a_network_whose_attention_masks_nothing_is_refused(tmp_path):
    network = stable_unet()
    for name, parameter in network.named_parameters():
        if "qkv" in name:
            parameter.zero_()  # every token attends to all alike
    with pytest.raises(UserError, match=r"`analysis`.*output\.1"):
        analyze_frequency(analysis_request(network, tmp_path))
