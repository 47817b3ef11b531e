from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from sagl.diffusion.noise import SampleKeys, batch_rngs, guidance_rngs
from sagl.diffusion.predictor import Condition, make_predictor
from sagl.diffusion.schedule import make_schedule
from sagl.errors import UserError
from sagl.guidance.base import with_guidance
from sagl.guidance.masks import (
    average_sites,
    build_mask,
    enlarge,
    mask_from_attention,
    num_tokens,
    random_rectangles,
    rectangle_sides,
    select_tokens,
)
from sagl.guidance.sag import gaussian_blur
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.shapes import AttentionSite
from tests.guidance.test_dino import dino_file
from tests.helpers.networks import toy_network
from tests.helpers.predictors import NO_CONDITION, Recorder, guidances_of
from tests.helpers.reference_values import generator

SCHEDULE = make_schedule(DiffusionSettings(), "6")
SITE, COARSE = AttentionSite("output.1"), AttentionSite("middle")
KEYS = Condition(samples=SampleKeys(3, (5, 7)))


def maps(*grid, heads=1, batch=2, seed=0):
    """Attention received, of mean 1."""
    attention_received = torch.rand(batch, heads, *grid, generator=generator(seed))
    return attention_received / attention_received.mean(dim=(2, 3), keepdim=True)


def images(side=16):
    return torch.rand(2, 3, side, side, generator=generator(1)) * 2 - 1


def mask(condition=KEYS, step=3, attention=None, side=16, **settings):
    """The mask of images of 16x16 pixels with 8x8 tokens."""
    s = SelfAttentionGuidance(**{"site": SITE.name, **settings})
    sites = [AttentionSite(name) for name in s.sites]
    return build_mask(s, sites)(images(side), step, condition, attention or {SITE: maps(8, 8)})


# ------------------------------------------------------------------------------------------------ choice of tokens


@pytest.mark.parametrize("threshold", [0.5, 1.0, 1.3])
@pytest.mark.parametrize(
    ("grid", "size"), [((4, 4), (16, 16)), ((8, 8), (8, 8)), ((4, 6), (16, 24)), ((3, 3), (16, 16))]
)
def test_the_mask_is_the_mean_over_heads_above_the_threshold_enlarged_by_nearest_neighbours(threshold, grid, size):
    attention_received = maps(*grid, heads=3)
    actual = mask_from_attention(attention_received, threshold, size)
    expected = F.interpolate((attention_received.sum(dim=1, keepdim=True) / 3 > threshold).float(), size=size) == 1
    assert actual.dtype == torch.bool
    assert torch.equal(actual, expected)
    assert 0 < float(actual.float().mean()) < 1


def test_a_token_above_the_threshold_masks_its_own_block_of_pixels_and_one_at_it_nothing():
    attention_received = torch.ones(1, 2, 2, 2)
    assert not mask_from_attention(attention_received, 1.0, (6, 6)).any()
    attention_received[..., 0, 1] = 4
    actual = mask_from_attention(attention_received, 1.0, (6, 6))[0, 0]
    assert actual[:3, 3:].all()
    assert int(actual.sum()) == 9


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.4, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("grid", [(8, 8), (7, 7), (4, 6)])
def test_an_area_fraction_takes_the_largest_scores_exact_to_a_token(fraction, grid):
    scores, count = maps(*grid), max(1, round(fraction * grid[0] * grid[1]))
    chosen = select_tokens(scores, 1.0, fraction)
    for s, c in zip(scores, chosen, strict=True):
        assert int(c.sum()) == count
        assert s[c].min() >= s[~c].max() if count < s.numel() else c.all()


def test_of_equal_scores_the_first_tokens_are_taken():
    chosen = select_tokens(torch.ones(1, 1, 2, 4), 1.0, 0.6)
    assert chosen.flatten().tolist() == [True] * 5 + [False] * 3


def test_a_soft_weight_is_a_half_at_the_threshold_and_at_most_1():
    scores = torch.tensor([0.0, 0.6, 1.2, 1.8, 2.4, 9.0]).reshape(1, 1, 2, 3)
    weights = select_tokens(scores, 1.2, soft=True).flatten()
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 1.0]))


@pytest.mark.parametrize("fraction", [0.1, 0.4, 1.0])
def test_a_set_area_has_soft_weights_above_a_half(fraction):
    scores = maps(8, 8)
    weights = select_tokens(scores, 1.0, fraction, soft=True)
    assert torch.equal(weights > 0.5, select_tokens(scores, 1.0, fraction))
    assert 0 <= float(weights.min()) <= float(weights.max()) <= 1


def test_a_rectangle_lies_inside_at_any_position_of_the_grid():
    corners = Counter()
    for rectangle in random_rectangles((2, 3), (4, 4), batch_rngs(0, 0, range(200)))[:, 0]:
        rows, columns = rectangle.any(dim=1), rectangle.any(dim=0)
        assert (int(rows.sum()), int(columns.sum())) == (2, 3)
        assert torch.equal(rectangle, rows[:, None] & columns[None])
        corners[int(rows.int().argmax()), int(columns.int().argmax())] += 1
    assert len(corners) == 6


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (5, 9), (2, 12)])
def test_the_sides_of_a_rectangle_fit_the_grid_and_hold_the_tokens(size):
    for count in range(1, size[0] * size[1] + 1):
        rows, columns = rectangle_sides(count, size)
        assert rows <= size[0]
        assert columns <= size[1]
        assert count <= rows * columns < count + rows


# ----------------------------------------------------------------------------------------------------- strategies


def test_a_global_mask_covers_the_image_and_needs_no_attention():
    assert mask(mask="global", attention={}).all()


def test_a_random_mask_has_the_largest_of_uniform_numbers_of_seed_id_and_step():
    actual = mask(mask="random", area_fraction=0.3)
    for row, rng in zip(actual, guidance_rngs(KEYS.samples, "sag", 3), strict=True):
        uniform = torch.from_numpy(rng.random((1, 8, 8)))
        limit = uniform.flatten().sort(descending=True).values[18]  # round(0.3 · 64) = 19 tokens
        assert torch.equal(row[:, ::2, ::2], uniform >= limit)
    assert not torch.equal(actual, mask(mask="random", area_fraction=0.3, step=2))


def test_a_square_mask_is_one_rectangle_whose_last_row_may_be_shorter():
    for row in mask(mask="square", area_fraction=0.4)[:, 0, ::2, ::2]:  # 26 of 64 tokens: 6 rows of 5, less 4
        assert int(row.sum()) == 26
        used_rows, columns = row.any(dim=1).nonzero()[:, 0], row.any(dim=0)
        assert row.sum(dim=1)[used_rows].tolist() == [5, 5, 5, 5, 5, 1]
        assert int(columns.sum()) == 5


@pytest.mark.parametrize("kind", ["random", "square"])
def test_a_random_mask_does_not_depend_on_the_rest_of_the_batch(kind):
    settings = SelfAttentionGuidance(mask=kind, site=SITE.name)
    alone = build_mask(settings, [SITE])(
        images()[1:], 3, Condition(samples=SampleKeys(3, (7,))), {SITE: maps(8, 8)[1:]}
    )
    assert torch.equal(mask(mask=kind)[1:], alone)


def test_random_masks_need_the_keys_of_the_samples():
    with pytest.raises(UserError, match="`samples`"):
        mask(NO_CONDITION, mask="random")


@pytest.mark.parametrize("kind", ["attention", "random", "square", "dino"])
@pytest.mark.parametrize("fraction", [0.25, 0.4])
def test_all_strategies_choose_as_many_tokens_of_the_same_grid(kind, fraction, tmp_path):
    actual = mask(mask=kind, area_fraction=fraction, dino_checkpoint=dino_file(tmp_path), side=24)
    tokens = actual[:, :, ::3, ::3]
    assert torch.equal(actual, enlarge(tokens, (24, 24)))
    assert tokens.sum(dim=(1, 2, 3)).tolist() == [num_tokens(fraction, (8, 8))] * 2


def test_random_masks_cover_two_fifths_of_the_area_by_default():
    for kind in ("random", "square"):
        assert torch.equal(mask(mask=kind), mask(mask=kind, area_fraction=0.4))


# ----------------------------------------------------------------------------------------------- sites and heads


def test_several_sites_are_averaged_on_the_grid_of_the_first():
    fine, coarse = maps(8, 8, heads=2), maps(4, 4, heads=3, seed=1)
    on_fine = (fine.mean(dim=1) + coarse.mean(dim=1).repeat_interleave(2, 1).repeat_interleave(2, 2)) / 2
    on_coarse = (coarse.mean(dim=1) + fine.mean(dim=1).unflatten(2, (4, 2)).unflatten(1, (4, 2)).mean(dim=(2, 4))) / 2
    torch.testing.assert_close(average_sites([fine, coarse])[:, 0], on_fine)
    torch.testing.assert_close(average_sites([coarse, fine])[:, 0], on_coarse)
    for average in (average_sites([fine, coarse]), average_sites([coarse, fine])):
        torch.testing.assert_close(average.mean(dim=(1, 2, 3)), torch.ones(2))


def test_sites_are_listed_with_commas_and_their_attention_is_requested():
    network = Recorder(toy_network)
    guidances = guidances_of(SCHEDULE, sag={"scale": 0.5, "site": "output.1, middle", "blur_sigma": 1.0})
    with_guidance(make_predictor(network, SCHEDULE, "learned_range"), guidances)(images(), 3, NO_CONDITION)
    assert [kwargs["attention_sites"] for _, kwargs in network.calls] == [(SITE, COARSE), ()]


@pytest.mark.parametrize("head", [0, 2])
def test_one_heads_attention_can_make_the_mask(head):
    attention_received = maps(8, 8, heads=3)
    expected = mask_from_attention(attention_received[:, head : head + 1], 1.0, (16, 16))
    assert torch.equal(mask(attention={SITE: attention_received}, head=head), expected)
    assert not torch.equal(mask(attention={SITE: attention_received}), expected)


# --------------------------------------------------------------------------------------------------- guided steps


def guided(network=toy_network, **settings):
    guidances = guidances_of(SCHEDULE, sag={"scale": 0.5, "site": SITE.name, "blur_sigma": 1.0, **settings})
    return with_guidance(make_predictor(network, SCHEDULE, "learned_range"), guidances)(images(), 3, KEYS)


@pytest.mark.parametrize(
    "settings", [{"mask": "global"}, {"soft": True}, {"soft": True, "area_fraction": 0.3}], ids=str
)
def test_a_step_blends_by_the_mask_as_eq_16_says(settings):
    network = Recorder(toy_network)
    prediction = guided(network, clip_x0=False, **settings)
    (base, _), (degraded, _) = network.calls
    bar = float(SCHEDULE.alpha_bar(3))
    eps = toy_network(*base).out[:, :3]
    x0_blurred = gaussian_blur((base[0] - (1 - bar) ** 0.5 * eps) / bar**0.5, 31, 1.0)
    weight, x_blurred = prediction.terms["sag"].extras["mask"].float(), bar**0.5 * x0_blurred + (1 - bar) ** 0.5 * eps
    torch.testing.assert_close(degraded[0], (1 - weight) * base[0] + weight * x_blurred, rtol=0, atol=2e-5)
    assert prediction.nfe == 2


@pytest.mark.parametrize(
    "settings", [{"mask": "global"}, {"mask": "random"}, {"mask": "square"}, {"soft": True}], ids=str
)
def test_every_mask_guides_otherwise_than_the_default_at_the_same_cost(settings):
    network = Recorder(toy_network)
    prediction = guided(network, **settings)
    assert len(network.calls) == prediction.nfe == 2
    assert float((prediction.eps - guided().eps).abs().max()) > 1e-4
