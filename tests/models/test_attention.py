import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

from sagl.models import attention as module
from sagl.models.attention import attention, attention_received, split_qkv, split_qkv_legacy
from tests.helpers import formulas


def heads(tokens=300, batch=2, num_heads=3, channels=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(batch, num_heads, tokens, channels, generator=g) for _ in range(3)]


def explicit_map(query, key):
    return torch.einsum("bhid,bhjd->bhij", query.double(), key.double()).div(math.sqrt(query.shape[-1])).softmax(dim=-1)


@pytest.mark.parametrize(("split", "order"), [(split_qkv_legacy, "legacy"), (split_qkv, "new")])
@pytest.mark.parametrize("num_heads", [1, 2, 6])
def test_channels_are_split_into_heads_in_the_legacy_or_the_new_order(split, order, num_heads):
    qkv = torch.randn(2, 36, 7, generator=torch.Generator().manual_seed(0))
    actual = split(qkv.mT, num_heads)
    expected = formulas.split_heads(qkv, num_heads, order)
    for i in range(3):
        torch.testing.assert_close(actual[i].mT, torch.stack([head[i] for head in expected], dim=1), rtol=0, atol=0)


@pytest.mark.parametrize("trained", [False, True])
def test_attention_is_the_softmax_of_the_products_with_and_without_gradients(trained):
    query, key, value = heads()
    expected = explicit_map(query, key) @ value.double()
    actual = attention(query.requires_grad_(trained), key, value)
    torch.testing.assert_close(actual.detach().double(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_attention_are_those_of_the_products():
    inputs = [x.double().requires_grad_() for x in heads(tokens=4, num_heads=2, channels=3)]
    assert torch.autograd.gradcheck(attention, inputs)


def test_gradients_in_16_bits_are_those_of_float64_to_rounding():
    halves = [x.bfloat16().requires_grad_() for x in heads()]
    doubles = [x.detach().double().requires_grad_() for x in halves]
    weights = torch.randn(halves[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    actual = torch.autograd.grad(attention(*halves), halves, weights)
    expected = torch.autograd.grad(attention(*doubles), doubles, weights.double())
    for half, double in zip(actual, expected, strict=True):
        assert (half.double() - double).norm() <= 0.02 * double.norm()


@pytest.mark.parametrize("tokens", [1, 64, 300])
def test_attention_received_is_the_map_summed_over_queries(tokens):
    query, key, _ = heads(tokens)
    expected = explicit_map(query, key).sum(dim=-2)
    torch.testing.assert_close(attention_received(query, key).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("elements", [1, 3 * 300 * 7, 3 * 300 * 300 - 1, 3 * 300 * 300, 6 * 300 * 300])
def test_chunking_changes_nothing(monkeypatch, elements):
    query, key, _ = heads()
    whole = attention_received(query, key)
    monkeypatch.setitem(module.MAX_MAP_ELEMENTS, "cpu", elements)
    torch.testing.assert_close(attention_received(query, key), whole, rtol=1e-5, atol=1e-6)


def test_only_a_part_of_the_map_exists_at_a_time(monkeypatch):
    class Largest(TorchFunctionMode):
        numel = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.numel = max(self.numel, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    monkeypatch.setitem(module.MAX_MAP_ELEMENTS, "cpu", 3 * 300 * 10)
    query, key, _ = heads()
    with Largest() as largest:
        attention_received(query, key)
    assert largest.numel <= max(3 * 300 * 10, query.numel())


def test_attention_received_is_float32_and_close_for_half_precision_keys():
    query, key, _ = heads()
    actual = attention_received(query.bfloat16(), key.bfloat16())
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.mean(dim=-1), torch.ones(2, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(actual, attention_received(query, key), rtol=0.2, atol=0.05)
