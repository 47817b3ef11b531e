"""One thread or two: no bit of what a network says changes, and so no byte of an image."""

import pytest
import torch
from torch.nn import functional as F

from sagl.diffusion.predictor import AttentionSite
from sagl.models.adm import Norm, Pointwise
from sagl.models.checkpoints import build_network, cast_weights, read_checkpoint
from sagl.models.zoo import DEFAULT_CHECKPOINT

PRECISIONS = ["32-true", "bf16-true"]
DTYPES = [torch.float32, torch.bfloat16]


def with_one_thread_and_two(compute):
    """What `compute` gives with each."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                found.append(compute())
    finally:
        torch.set_num_threads(before)
    return found


def drawn(*shape, dtype=torch.float32, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", [1, 5])
def test_the_embedded_network_and_its_attention_are_the_same_with_one_thread_and_with_two(precision, batch):
    network = cast_weights(build_network(read_checkpoint(DEFAULT_CHECKPOINT)), precision, torch.device("cpu"))
    x, timesteps, labels = drawn(batch, 1, 32, 32), torch.full((batch,), 500), torch.arange(batch)
    site = AttentionSite("output.5", None)
    one, two = with_one_thread_and_two(lambda: network(x, timesteps, labels, attention_sites=(site,)))
    assert two.out.equal(one.out)
    assert two.attention[site].equal(one.attention[site])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 256, 64, 64), (3, 64, 33, 31)])
def test_a_norm_is_the_same_with_one_thread_and_with_two_where_pytorch_s_own_is_not(dtype, shape):
    x, norm = drawn(*shape, dtype=dtype), Norm(shape[1]).to(dtype)
    one, two = with_one_thread_and_two(lambda: norm(x))
    assert two.equal(one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "out", "side"), [(256, 512, 64), (512, 1024, 16), (2048, 1024, 8)])
def test_a_pointwise_convolution_is_pytorch_s_and_the_same_with_one_thread_and_with_two(dtype, width, out, side):
    x = drawn(1, width, side, side, dtype=dtype)
    conv = Pointwise(width, out, 1).to(dtype)
    one, two = with_one_thread_and_two(lambda: conv(x))
    assert two.equal(one)
    exact = F.conv2d(x.double(), *(parameter.detach().double() for parameter in conv.parameters()))
    assert float((one - exact).abs().max()) < {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert one.is_contiguous(memory_format=torch.channels_last)
