import pytest
import torch
from torch.nn import functional as F

from sagl.guidance.sag import attention_mask


def received(seed=0, heads=3, side=(4, 4)):
    maps = torch.rand(2, heads, *side, generator=torch.Generator().manual_seed(seed))
    return maps / maps.mean(dim=(2, 3), keepdim=True)


@pytest.mark.parametrize("threshold", [0.5, 1.0, 1.3])
@pytest.mark.parametrize(
    ("side", "size"), [((4, 4), (16, 16)), ((8, 8), (8, 8)), ((4, 6), (16, 24)), ((3, 3), (16, 16))]
)
def test_the_mean_over_heads_is_cut_at_the_threshold_and_enlarged_by_nearest_neighbours(threshold, side, size):
    maps = received(side=side)
    mask = attention_mask(maps, threshold, size)
    assert mask.shape == (2, 1, *size)
    assert mask.dtype == torch.bool
    want = F.interpolate((maps.sum(dim=1, keepdim=True) / 3 > threshold).float(), size=size) == 1
    assert torch.equal(mask, want)
    assert 0 < float(mask.float().mean()) < 1


def test_a_token_at_the_threshold_is_not_masked():
    assert not attention_mask(torch.ones(1, 2, 4, 4), 1.0, (8, 8)).any()


def test_a_threshold_of_zero_masks_all_and_a_high_one_nothing():
    assert attention_mask(received(), 0.0, (8, 8)).all()
    assert not attention_mask(received(), 100.0, (8, 8)).any()


def test_every_token_covers_its_own_block_of_pixels():
    maps = torch.zeros(1, 1, 2, 2)
    maps[0, 0, 0, 1] = 4
    mask = attention_mask(maps, 1.0, (6, 6))[0, 0]
    assert mask[:3, 3:].all()
    assert int(mask.sum()) == 9


def test_masks_of_samples_do_not_depend_on_one_another():
    maps = received()
    assert torch.equal(attention_mask(maps, 1.0, (8, 8))[1:], attention_mask(maps[1:], 1.0, (8, 8)))
