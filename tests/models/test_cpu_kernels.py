import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sagl.models import cpu_kernels
from sagl.models.adm import UNet
from sagl.models.cpu_kernels import (
    MomentGroupNorm,
    RowConv1x1,
    RowConv2d,
    WinogradConv2d,
    optimize_for_cpu,
    transform_weight,
    winograd_convolution,
)
from sagl.models.layers import AdaGroupNorm, Conv1x1
from sagl.settings.network import UNetSettings
from tests.helpers.networks import draw_weights, small_unet
from tests.helpers.reference_values import relative_error

SHAPES = [(3, 512), (3, 64, 6), (3, 64, 5, 4)]


@pytest.fixture(autouse=True)
def every_processor(monkeypatch):
    """Use Winograd's convolution on every processor."""
    monkeypatch.setattr(cpu_kernels, "has_amx", lambda: False)


def randn(*shape, dtype=torch.float32, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.to(memory_format=torch.channels_last) if len(shape) == 4 else x


def test_layers_are_replaced_and_the_state_dict_stays():
    network = small_unet(image_size=64, num_channels=64, attention_resolutions=(32,), resblock_updown=True)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert optimize_for_cpu(network) is network
    kinds = {type(layer) for layer in network.modules()}
    assert {MomentGroupNorm, RowConv1x1, RowConv2d, WinogradConv2d} <= kinds
    assert not {AdaGroupNorm, Conv1x1} & kinds
    assert type(network.input_blocks[0][0]) is nn.Conv2d  # few channels
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(after[name].equal(before[name]) for name in before)


def test_processors_with_amx_keep_pytorchs_3x3_convolution(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "has_amx", lambda: True)
    network = optimize_for_cpu(small_unet(image_size=64, num_channels=64, attention_resolutions=(32,)))
    assert not any(isinstance(layer, WinogradConv2d) for layer in network.modules())


def test_convolutions_with_a_stride_are_not_replaced():
    network = optimize_for_cpu(small_unet(image_size=64, num_channels=64, attention_resolutions=(32,)))
    strided = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2)]
    assert {type(layer) for layer in strided} == {nn.Conv2d}


@pytest.mark.parametrize("changes", [{}, {"use_scale_shift_norm": False}, {"resblock_updown": True}])
def test_an_optimized_network_and_its_gradients_are_those_of_the_plain_one(changes):
    x, timesteps = randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([5, 600])
    results = []
    for optimize in (lambda network: network, optimize_for_cpu):
        network = optimize(small_unet(image_size=32, attention_resolutions=(32, 16), **changes)).double()
        out = network(x, timesteps).out
        gradients = torch.autograd.grad(out.square().mean(), list(network.parameters()))
        results.append([out, *gradients])
    largest = max(float(gradient.abs().max()) for gradient in results[0][1:])
    for plain, optimized in zip(*results, strict=True):
        torch.testing.assert_close(optimized, plain, rtol=1e-9, atol=1e-9 * largest)


def test_a_copy_of_an_optimized_network_computes_the_same():
    network, x = optimize_for_cpu(small_unet()), randn(2, 3, 16, 16)
    with torch.no_grad():
        assert copy.deepcopy(network)(x, torch.tensor([5, 600])).out.equal(network(x, torch.tensor([5, 600])).out)


def norm_pair(dtype, width=64):
    """Return our normalisation and PyTorch's with the same weights."""
    ours, reference = optimize_for_cpu(AdaGroupNorm(width)).to(dtype), nn.GroupNorm(32, width).to(dtype)
    with torch.no_grad():
        reference.weight.copy_(1 + 0.3 * randn(width, seed=1))
        reference.bias.copy_(randn(width, seed=2))
    ours.load_state_dict(reference.state_dict())
    return ours, reference


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_norm_and_its_gradients_are_group_normalisation(shape, dtype, tolerance):
    ours, reference = norm_pair(dtype, shape[1])
    weights, results = randn(*shape, dtype=dtype, seed=3), []
    for norm in (ours, reference):
        x = (0.5 + randn(*shape, dtype=dtype)).requires_grad_()
        y = norm(x)
        assert y.dtype == dtype
        results.append((y, *torch.autograd.grad((y * weights).sum(), (x, norm.weight, norm.bias))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.detach().abs().max()))


@pytest.mark.parametrize("side", [4, 32, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_norm_scales_by_one_plus_scale_and_shifts_also_if_the_mean_is_large(side, dtype, tolerance):
    ours, reference = norm_pair(dtype)
    x = (20 + randn(2, 64, side, side)).to(dtype)
    scale, shift = (0.3 * randn(2, 64, seed=seed).to(dtype) for seed in (5, 6))
    with torch.inference_mode():
        normalised = reference.double()(x.double())
        adapted = normalised * (1 + scale.double()[..., None, None]) + shift.double()[..., None, None]
        for actual, expected in ((ours(x), normalised), (ours(x, scale, shift), adapted)):
            assert actual.is_contiguous(memory_format=torch.channels_last)
            assert float((actual - expected).abs().max()) < tolerance * float(expected.abs().max())


@pytest.mark.parametrize(
    ("offset", "spread", "tolerance"),
    [(10, 0.1, 1e-3), (30, 0.01, 1e-2), (1000, 1, 1e-2), *((constant, 0, 0.05) for constant in (0, 0.3, 7.7, 333.3))],
)
def test_features_far_from_zero_and_constant_ones_are_normalised_as_by_group_normalisation(offset, spread, tolerance):
    ours, reference = norm_pair(torch.float64)
    x = (offset + spread * randn(4, 64, 16, 16)).float()
    torch.testing.assert_close(ours.float()(x), reference(x.double()).float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("width", "out", "side"), [(256, 512, 64), (512, 1024, 16), (2048, 1024, 8)])
def test_a_1x1_convolution_equals_pytorchs(dtype, tolerance, width, out, side):
    x, conv = randn(1, width, side, side, dtype=dtype), optimize_for_cpu(nn.Conv2d(width, out, 1)).to(dtype)
    tokens = optimize_for_cpu(Conv1x1(width, out)).to(dtype)
    tokens.load_state_dict({"weight": conv.weight[..., 0], "bias": conv.bias})
    with torch.inference_mode():
        expected = F.conv2d(x.double(), conv.weight.double(), conv.bias.double())
        for actual in (conv(x), tokens(x)):
            assert float((actual - expected).abs().max()) < tolerance
            assert actual.is_contiguous(memory_format=torch.channels_last)


def winograd(in_channels=64, out_channels=96, seed=0):
    torch.manual_seed(seed)
    return optimize_for_cpu(nn.Conv2d(in_channels, out_channels, 3, padding=1)).requires_grad_(False)


def exact(x, conv):
    return F.conv2d(x.double(), conv.weight.detach().double(), conv.bias.detach().double(), padding=1)


@pytest.mark.parametrize(("batch", "height", "side"), [(1, 64, 64), (2, 64, 68), (1, 128, 64), (1, 4, 4), (3, 8, 12)])
def test_tiles_give_the_convolution(batch, height, side):
    x, conv = randn(batch, 64, height, side), winograd()
    out = winograd_convolution(x, transform_weight(conv.weight), conv.bias)
    assert relative_error(out, exact(x, conv)) < 1e-5
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_tiles_are_exact_in_float64():
    x, conv = randn(1, 8, 12, 16, dtype=torch.float64), winograd(8, 5).double()
    out = winograd_convolution(x, transform_weight(conv.weight), conv.bias)
    torch.testing.assert_close(out, exact(x, conv), rtol=0, atol=1e-13)


def test_the_length_of_a_strip_changes_nothing(monkeypatch):
    x, conv = randn(2, 64, 64, 64), winograd()
    whole = winograd_convolution(x, transform_weight(conv.weight), conv.bias)
    monkeypatch.setattr(cpu_kernels, "STRIP", 36 * 16 * 160 * 3)  # three rows of tiles; the last strip has one
    strips = winograd_convolution(x, transform_weight(conv.weight), conv.bias)
    torch.testing.assert_close(strips, whole, rtol=1e-5, atol=1e-5)


def uses_tiles(conv, x, monkeypatch):
    calls = []
    monkeypatch.setattr(cpu_kernels, "winograd_convolution", lambda *args: calls.append(args) or x)
    conv(x)
    return bool(calls)


def test_large_maps_of_frozen_weights_use_tiles(monkeypatch):
    conv = winograd(64, 64)
    with torch.inference_mode():
        assert uses_tiles(conv, randn(1, 64, 64, 64), monkeypatch)


@pytest.mark.parametrize(
    ("change", "x"),
    [
        (lambda conv: conv, randn(1, 64, 32, 32)),
        (lambda conv: conv, randn(1, 64, 66, 66)),
        (lambda conv: conv.bfloat16(), randn(1, 64, 64, 64, dtype=torch.bfloat16)),
        (lambda conv: conv.double(), randn(1, 64, 64, 64, dtype=torch.float64)),
        (lambda conv: conv.requires_grad_(), randn(1, 64, 64, 64)),
    ],
    ids=["small", "no whole tiles", "16 bits", "float64", "trainable"],
)
def test_others_use_pytorchs_convolution(change, x, monkeypatch):
    conv = change(winograd(64, 64))
    with torch.inference_mode():
        assert not uses_tiles(conv, x, monkeypatch)


def test_a_gradient_passes_through_frozen_weights(monkeypatch):
    conv, x = winograd(64, 64), randn(1, 64, 64, 64).requires_grad_()
    conv(x).sum().backward()
    assert float(x.grad.abs().sum()) > 0
    assert not uses_tiles(conv, x, monkeypatch)


def test_weights_are_transformed_once_and_again_after_a_change():
    conv, x = winograd(64, 64), randn(1, 64, 64, 64)
    with torch.inference_mode():
        before, cache = conv(x), conv._cache
        conv(x)
    assert conv._cache is cache
    conv.load_state_dict(winograd(64, 64, seed=1).state_dict())
    with torch.inference_mode():
        after = conv(x)
    assert relative_error(after, exact(x, conv)) < 1e-5
    assert relative_error(before, exact(x, conv)) > 0.1


def test_a_network_with_tiles_agrees_with_the_plain_one():
    s = UNetSettings(image_size=64, num_channels=64, num_res_blocks=1, channel_mult=(1, 1), attention_resolutions=(32,))
    network, x, timesteps = draw_weights(UNet(s), 0).requires_grad_(False), randn(1, 3, 64, 64), torch.tensor([500])
    with torch.inference_mode():
        plain = network(x, timesteps).out
        tiled = optimize_for_cpu(network)(x, timesteps).out
    assert not tiled.equal(plain)
    assert relative_error(tiled, plain) < 1e-4


def test_winograds_layer_compiles_without_a_break():
    conv = optimize_for_cpu(torch.nn.Conv2d(64, 64, 3, padding=1)).requires_grad_(False)
    assert isinstance(conv, WinogradConv2d)
    x = randn(1, 64, 64, 64)
    with torch.no_grad():
        compiled = torch.compile(conv, backend="eager", fullgraph=True)(x)
        assert compiled.equal(F.conv2d(x, conv.weight, conv.bias, padding=1))
