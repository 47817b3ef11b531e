import pytest
import torch

from sagl.models.adm import Norm
from sagl.models.channels import channel_affine, channel_moments

SHAPES = [(3, 512), (3, 64, 6), (3, 64, 5, 4)]


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def norm_pair(dtype, width=64):
    """Our norm and PyTorch's, with the same weights."""
    ours, theirs = Norm(width).to(dtype), torch.nn.GroupNorm(32, width).to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(1 + 0.3 * drawn(width, seed=1))
        theirs.bias.copy_(drawn(width, seed=2))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("shape", SHAPES)
def test_moments_are_mean_and_variance_of_every_channel(shape):
    x = drawn(*shape)
    mean, variance = channel_moments(x)
    pixels = x.double().reshape(*shape[:2], -1)
    torch.testing.assert_close(mean.double(), pixels.mean(dim=2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance.double(), pixels.var(dim=2, correction=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", [4, 32, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_norm_without_a_gradient_is_as_exact_where_the_mean_is_large(side, dtype, tolerance):
    ours, theirs = norm_pair(dtype)
    x = (20 + drawn(2, 64, side, side)).to(dtype).to(memory_format=torch.channels_last)
    scale, shift = (0.3 * drawn(2, 64, seed=seed).to(dtype) for seed in (5, 6))
    with torch.inference_mode():
        for told in ((), (scale, shift)):
            found, exact = ours(x, *told), theirs.double()(x.double())
            if told:
                exact = exact * (1 + scale.double()[..., None, None]) + shift.double()[..., None, None]
            assert float((found - exact).abs().max()) < tolerance * float(exact.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
def test_affine_scales_and_shifts_every_channel(shape):
    x, gain, offset = drawn(*shape), drawn(*shape[:2], seed=1), drawn(*shape[:2], seed=2)
    each = (*shape[:2], *[1] * (len(shape) - 2))
    torch.testing.assert_close(channel_affine(x, gain, offset), x * gain.view(each) + offset.view(each))


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 2, 3)])
def test_gradients_of_moments_are_those_of_finite_differences(shape):
    assert torch.autograd.gradcheck(channel_moments, drawn(*shape, dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 2, 3)])
def test_gradients_of_affine_are_those_of_finite_differences(shape):
    inputs = (drawn(*size, dtype=torch.float64).requires_grad_() for size in (shape, (2, 3), (2, 3)))
    assert torch.autograd.gradcheck(channel_affine, tuple(inputs))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_norm_and_its_gradients_are_group_normalisation(shape, dtype, tolerance):
    ours, theirs = norm_pair(dtype, shape[1])
    towards, found = drawn(*shape, dtype=dtype, seed=3), []
    for norm in (ours, theirs):
        x = (0.5 + drawn(*shape, dtype=dtype)).requires_grad_()
        y = norm(x)
        assert y.dtype == dtype
        found.append((y, *torch.autograd.grad((y * towards).sum(), (x, norm.weight, norm.bias))))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want.detach().abs().max()))


def test_norm_takes_channels_last_and_gives_the_same():
    ours, theirs = norm_pair(torch.float32)
    x = drawn(3, 64, 6, 6)
    got = ours(x.contiguous(memory_format=torch.channels_last))
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, theirs(x), rtol=1e-5, atol=1e-5)


def test_norm_scales_by_one_plus_scale_and_then_shifts():
    ours, theirs = norm_pair(torch.float32)
    x, scale, shift = drawn(3, 64, 6, 6), drawn(3, 64, seed=4), drawn(3, 64, seed=5)
    want = theirs(x) * (1 + scale)[:, :, None, None] + shift[:, :, None, None]
    torch.testing.assert_close(ours(x, scale, shift), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("offset", "spread", "tolerance"), [(10, 0.1, 1e-3), (30, 0.01, 1e-2), (1000, 1, 1e-2)])
def test_features_far_from_zero_are_normalised_as_by_group_normalisation(offset, spread, tolerance):
    ours, theirs = norm_pair(torch.float64)
    x = offset + spread * drawn(4, 64, 16, 16)
    got = ours.float()(x)
    torch.testing.assert_close(got, theirs(x.double()).float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("value", [0.0, 0.3, 7.7, 333.3])
def test_features_that_do_not_vary_become_the_bias(value):
    ours, _ = norm_pair(torch.float32)
    got = ours(torch.full((1, 64, 9, 9), value))
    torch.testing.assert_close(got, ours.bias[None, :, None, None].expand_as(got), rtol=0, atol=0.05)


def test_a_half_precision_norm_is_near_the_float32_one():
    ours, theirs = norm_pair(torch.float32)
    x = drawn(3, 64, 6, 6)
    got = ours.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), theirs(x), rtol=0.05, atol=0.05)
