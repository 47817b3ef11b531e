import math

import pytest
import torch

from sagl.errors import UserError
from sagl.guidance.smoothed_energy import blur_matrix
from sagl.settings.guidance import SmoothedEnergyGuidance
from tests.helpers.guided import eps_by_formula, guided
from tests.helpers.reference_values import relative_error

CPU = torch.device("cpu")


def blurred_weights(sigma):
    """Attention of one head with its whole map blurred over the grid of queries before the softmax, by definition."""
    taps = {offset: math.exp(-(offset**2) / (2 * sigma**2)) for offset in range(-20, 21)}

    def attend(q, k, v):
        side = math.isqrt(q.shape[2])
        mirrored = [*range(side), *reversed(range(side))]
        logits = torch.einsum("bdi,bdj->bij", q, k).unflatten(1, (side, side))  # a map of keys for each query
        for dim in (1, 2):
            shifted = {o: torch.tensor([mirrored[(i + o) % (2 * side)] for i in range(side)]) for o in taps}
            logits = sum(w * logits.index_select(dim, shifted[o]) for o, w in taps.items()) / sum(taps.values())
        return torch.einsum("bij,bdj->bdi", (logits.flatten(1, 2) / math.sqrt(q.shape[1])).softmax(dim=2), v)

    return attend


def mean_weights(q, k, v):
    """Attention of one head with the mean of all rows of the map before the softmax."""
    logits = torch.einsum("bdi,bdj->bij", q, k).mean(dim=1, keepdim=True).expand(-1, q.shape[2], -1)
    return torch.einsum("bij,bdj->bdi", (logits / math.sqrt(q.shape[1])).softmax(dim=2), v)


@pytest.mark.parametrize(
    ("sigma", "attend"), [(0.7, blurred_weights(0.7)), (2.0, blurred_weights(2.0)), (None, mean_weights)]
)
@pytest.mark.parametrize("site", ["middle", "output.0,output.3"])
def test_the_weak_prediction_has_blurred_attention_weights_at_the_sites(sigma, attend, site):
    base, weak_eps = eps_by_formula(), eps_by_formula(edits=dict.fromkeys(site.split(","), attend))
    actual = guided(seg={"scale": 3.0, "site": site, "blur_sigma": sigma}).eps
    assert relative_error(actual, base + 3.0 * (base - weak_eps)) < 1e-5
    assert relative_error(actual, base) > 1e-4


@pytest.mark.parametrize("size", [1, 4, 8, 15])
def test_the_blur_keeps_the_mean_and_tends_to_it(size):
    for sigma in (0.3, 1.0, 5.0, 2.0 * size, 1e9):
        matrix = blur_matrix(size, sigma, CPU)
        for dim in (0, 1):
            torch.testing.assert_close(matrix.sum(dim=dim), torch.ones(size, dtype=torch.float64))
    torch.testing.assert_close(matrix, torch.full_like(matrix, 1 / size), rtol=1e-5, atol=0)
    torch.testing.assert_close(blur_matrix(size, 0.05, CPU), torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan])
def test_an_impossible_sigma_is_refused(sigma):
    with pytest.raises(UserError, match=r"`seg\.blur_sigma`"):
        SmoothedEnergyGuidance(blur_sigma=sigma)
