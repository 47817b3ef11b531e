import math

import pytest
import torch

from sagl.diffusion.process import x0_hat_from_eps
from sagl.guidance.sag import degrade_input, gaussian_blur

BAR = torch.tensor(0.3, dtype=torch.float64)


def drawn(dtype=torch.float64):
    x_t, eps = torch.randn(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    x0_hat = x0_hat_from_eps(x_t, eps, BAR)
    return x_t, eps, x0_hat, gaussian_blur(x0_hat, 9, 2.0)


def test_with_nothing_masked_x_t_comes_back():
    x_t, eps, x0_hat, blurred = drawn()
    nothing = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    torch.testing.assert_close(degrade_input(x0_hat, blurred, nothing, eps, BAR), x_t, rtol=0, atol=1e-12)


def test_mixing_before_the_noise_is_eq_16_which_mixes_after_it():
    x_t, eps, x0_hat, blurred = drawn()
    mask = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1)) < 0.4
    noised = math.sqrt(BAR) * blurred + math.sqrt(1 - BAR) * eps
    want = (~mask) * x_t + mask * noised
    torch.testing.assert_close(degrade_input(x0_hat, blurred, mask, eps, BAR), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_noise_in_it_is_the_same_eps(dtype):
    _, eps, x0_hat, blurred = drawn(dtype)
    everything = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    got = degrade_input(x0_hat, blurred, everything, eps, BAR)
    assert got.dtype == dtype
    torch.testing.assert_close(x0_hat_from_eps(got, eps, BAR), blurred, rtol=0, atol=1e-5)
