import pytest
import torch

from sagl.models.normalization import _channel_norm, _norm_and_affine


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("conditioned", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_the_normalisation_of_large_maps_on_gpus_and_its_gradients_are_group_normalisation(
    dtype, tolerance, conditioned
):
    x = (3 + 2 * randn(2, 64, 6, 5, seed=0)).to(dtype).to(memory_format=torch.channels_last)
    parameters = [randn(64, seed=1), randn(64, seed=2)]
    parameters += [0.3 * randn(2, 64, seed=3), randn(2, 64, seed=4)] if conditioned else [None, None]
    weights, results = randn(2, 64, 6, 5, seed=5), []
    for norm, kind in ((_channel_norm, torch.promote_types(dtype, torch.float32)), (_norm_and_affine, torch.float64)):
        inputs = [
            x.clone() if norm is _channel_norm else x.double(),
            *(p if p is None else p.to(kind) for p in parameters),
        ]
        used = [value.requires_grad_() for value in inputs if value is not None]
        out = norm(*inputs, 1e-5)
        assert out.is_contiguous(memory_format=torch.channels_last)
        results.append([out, *torch.autograd.grad((out.double() * weights).sum(), used)])
    assert results[0][0].dtype == dtype
    for actual, expected in zip(*results, strict=True):
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert float(error.detach()) < tolerance


def test_a_channel_without_variance_stays_finite_in_16_bits():
    x = torch.full((1, 32, 8, 8), 100.0, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    out = _channel_norm(x, torch.ones(32), torch.zeros(32), None, None, 1e-5)
    assert out.isfinite().all()
    assert float(out.abs().max()) < 0.5
