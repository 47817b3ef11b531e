import pytest
import torch
from PIL import Image

from sagl.analysis.masks import (
    intersection_over_union,
    mass_mask,
    random_mask_like,
    read_masks,
    silhouettes,
    threshold_mask,
)
from sagl.errors import UserError
from tests.helpers.reference_values import generator

ATTENTION = torch.rand(5, 3, 6, 6, generator=generator(0)) + 0.1


def test_a_mass_mask_keeps_the_fewest_most_attended_tokens_that_hold_the_mass():
    mask = mass_mask(ATTENTION, 0.6)
    for values, kept in zip(ATTENTION.flatten(0, 1), mask.flatten(0, 1), strict=True):
        total, held = float(values.sum()), float(values[kept].sum())
        assert held >= 0.6 * total
        assert held - float(values[kept].min()) < 0.6 * total
        assert float(values[kept].min()) >= float(values[~kept].max())


def test_all_mass_is_every_token():
    assert bool(mass_mask(ATTENTION, 1.0).all())


def test_a_random_mask_has_the_area_of_each_sample_and_differs_by_seed():
    mask = threshold_mask(ATTENTION / ATTENTION.mean(dim=(1, 2, 3), keepdim=True))
    drawn = [random_mask_like(mask, seed) for seed in (0, 0, 1)]
    assert all(torch.equal(d.flatten(1).sum(1), mask.flatten(1).sum(1)) for d in drawn)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_intersection_over_union_is_that_of_sets():
    a = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool().view(3, 1, 2, 2)
    b = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool().view(3, 1, 2, 2)
    assert intersection_over_union(a, b).tolist() == pytest.approx([1 / 3, 1, 0])


@pytest.mark.parametrize("background", [0, 128, 255])
def test_a_silhouette_is_the_object_on_a_plain_background(background):
    images = torch.full((2, 3, 8, 8), background, dtype=torch.uint8)
    images[0, 1, 2:5, 3:6] = 60
    expected = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    expected[0, 0, 2:5, 3:6] = True
    assert torch.equal(silhouettes(images), expected)


def test_masks_of_a_folder_are_read_by_id_and_a_missing_or_wrong_one_is_refused(tmp_path):
    for sample_id, value in ((7, 255), (8, 0)):
        Image.new("L", (4, 4), value).save(tmp_path / f"{sample_id:06d}.png")
    assert read_masks(tmp_path, [7, 8], 4).flatten(1).float().mean(1).tolist() == [1, 0]
    with pytest.raises(UserError, match=r"`object_masks`.*000009\.png"):
        read_masks(tmp_path, [9], 4)
    (tmp_path / "000009.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"`object_masks`.*000009\.png is damaged"):
        read_masks(tmp_path, [9], 4)
    with pytest.raises(UserError, match=r"`object_masks`.*8x8"):
        read_masks(tmp_path, [7], 8)
