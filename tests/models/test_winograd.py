import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sagl.models.adm import UNet
from sagl.models.winograd import Conv3x3, convolution, transform
from sagl.settings.network import UNetSettings
from tests.helpers.reference import draw_weights
from tests.test_threads import drawn, with_one_thread_and_two


def frozen(width=64, out=96, seed=0):
    torch.manual_seed(seed)
    return Conv3x3(width, out).requires_grad_(False)


def exact(x, conv):
    return F.conv2d(x.double(), conv.weight.detach().double(), conv.bias.detach().double(), padding=1)


def error(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(("batch", "height", "side"), [(1, 64, 64), (2, 64, 68), (1, 128, 64), (1, 4, 4), (3, 8, 12)])
def test_tiles_give_the_convolution(batch, height, side):
    x, conv = drawn(batch, 64, height, side), frozen()
    made = convolution(x, transform(conv.weight), conv.bias)
    assert error(made, exact(x, conv)) < 1e-5
    assert made.is_contiguous(memory_format=torch.channels_last)


def test_tiles_are_exact_in_float64():
    x, conv = drawn(1, 8, 12, 16).double(), frozen(8, 5).double()
    torch.testing.assert_close(convolution(x, transform(conv.weight), conv.bias), exact(x, conv), rtol=0, atol=1e-13)


def test_the_length_of_a_strip_changes_nothing(monkeypatch):
    x, conv = drawn(2, 64, 64, 64), frozen()
    whole = convolution(x, transform(conv.weight), conv.bias)
    monkeypatch.setattr("sagl.models.winograd.STRIP", 36 * 16 * 160 * 3)  # three rows of tiles; the last strip has one
    torch.testing.assert_close(convolution(x, transform(conv.weight), conv.bias), whole, rtol=1e-5, atol=1e-5)


def test_an_image_is_the_same_alone_and_in_a_batch():
    x, conv = drawn(3, 64, 64, 64), frozen()
    with torch.inference_mode():
        assert conv(x)[1:2].equal(conv(x[1:2]))


def test_one_thread_and_two_give_the_same_bits():
    x, conv = drawn(1, 128, 64, 64), frozen(128, 128)
    one, two = with_one_thread_and_two(lambda: conv(x))
    assert two.equal(one)


def by_tiles(conv, x, monkeypatch):
    calls = []
    monkeypatch.setattr("sagl.models.winograd.convolution", lambda *args: calls.append(args) or x)
    conv(x)
    return bool(calls)


def test_large_maps_of_frozen_weights_go_by_tiles(monkeypatch):
    conv = frozen(64, 64)
    with torch.inference_mode():
        assert by_tiles(conv, drawn(1, 64, 64, 64), monkeypatch)


@pytest.mark.parametrize(
    ("conv", "x"),
    [
        (frozen(64, 64), drawn(1, 64, 32, 32)),
        (frozen(64, 64), drawn(1, 64, 66, 66)),
        (frozen(3, 64), drawn(1, 3, 64, 64)),
        (frozen(64, 64).bfloat16(), drawn(1, 64, 64, 64).bfloat16()),
        (frozen(64, 64).double(), drawn(1, 64, 64, 64).double()),
        (Conv3x3(64, 64), drawn(1, 64, 64, 64)),
    ],
    ids=["small", "no whole tiles", "narrow", "16 bits", "float64", "still training"],
)
def test_all_others_are_pytorch_s(conv, x, monkeypatch):
    with torch.inference_mode():
        assert not by_tiles(conv, x, monkeypatch)


def test_a_gradient_passes_through_frozen_weights(monkeypatch):
    conv, x = frozen(64, 64), drawn(1, 64, 64, 64).requires_grad_()
    conv(x).sum().backward()
    assert float(x.grad.abs().sum()) > 0
    assert not by_tiles(conv, x, monkeypatch)


def test_weights_that_changed_are_transformed_anew_and_others_are_not():
    conv, x = frozen(64, 64), drawn(1, 64, 64, 64)
    with torch.inference_mode():
        before, kept = conv(x), conv._kept
        conv(x)
    assert conv._kept is kept
    conv.load_state_dict(frozen(64, 64, seed=1).state_dict())
    with torch.inference_mode():
        after = conv(x)
    assert error(after, exact(x, conv)) < 1e-5
    assert error(before, exact(x, conv)) > 0.1


def test_it_is_a_conv2d_to_checkpoints_and_copies():
    conv, plain = frozen(64, 64), nn.Conv2d(64, 64, 3, padding=1)
    with torch.inference_mode():
        conv(drawn(1, 64, 64, 64))
    plain.load_state_dict(conv.state_dict())
    assert copy.deepcopy(conv).weight.equal(plain.weight)


def test_a_network_says_the_same_by_tiles_and_without():
    s = UNetSettings(image_size=64, num_channels=64, num_res_blocks=1, channel_mult=(1, 1), attention_resolutions=(32,))
    network = draw_weights(UNet(s), 0)
    x, timesteps = drawn(1, 3, 64, 64), torch.tensor([500])
    with torch.inference_mode():
        plain = network(x, timesteps).out
        tiled = network.requires_grad_(False)(x, timesteps).out
    assert not tiled.equal(plain)
    assert error(tiled, plain) < 1e-4
