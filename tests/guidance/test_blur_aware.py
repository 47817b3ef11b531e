import pytest
import torch

from sagl.diffusion.noise import batch_rngs
from sagl.diffusion.process import add_noise, x0_hat_from_eps
from sagl.diffusion.schedule import make_schedule
from sagl.errors import UserError
from sagl.guidance.blur_aware import blur_each, degradation_mask, degrade_batch
from sagl.guidance.masks import mask_from_attention
from sagl.guidance.sag import degrade_input, gaussian_blur
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.training import BlurAwareSettings
from sagl.shapes import AttentionSite
from tests.helpers.networks import count_calls, stable_unet

SCHEDULE = make_schedule(DiffusionSettings())
TIMESTEPS = torch.tensor([30, 200, 600, 900])
LABELS = torch.tensor([0, 1, 2, 3])
SITE = "output.1"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rngs(seed=0, count=4):
    return batch_rngs(seed, 0, range(count))


def images(seed):
    return torch.randn(4, 3, 16, 16, generator=generator(seed)).clamp(-1, 1)


def settings(**changes):
    return BlurAwareSettings(**{"probability": 0.5, "site": SITE, "blur_sigma": (1.0, 1.0), **changes})


def batch(s, degrade_mask, network=None):
    return degrade_batch(
        s,
        network or stable_unet(),
        images(0),
        images(1),
        SCHEDULE.alpha_bar(TIMESTEPS),
        TIMESTEPS,
        LABELS,
        torch.tensor(degrade_mask),
        rngs(),
    )


def test_degraded_inputs_are_those_of_guidance_at_the_true_image():
    network, x_0, noise, alpha_bar = stable_unet(), images(0), images(1), SCHEDULE.alpha_bar(TIMESTEPS)
    x0_input, target = batch(settings(), [True] * 4, network)
    site, x_t = AttentionSite(SITE), add_noise(x_0, noise, alpha_bar)
    attention_received = network(x_t, TIMESTEPS, LABELS, attention_sites=(site,)).attention[site]
    mask = mask_from_attention(attention_received, 1.0, (16, 16))
    expected = degrade_input(x_0, gaussian_blur(x_0, 31, 1.0), mask, noise, alpha_bar)
    torch.testing.assert_close(add_noise(x0_input, noise, alpha_bar), expected)
    assert torch.equal(target, noise)
    assert 0.1 < float(mask.float().mean()) < 0.9


def test_samples_outside_the_mask_stay_unchanged():
    x0_input, target = batch(settings(target="clean"), [True, False, True, False])
    changed = (x0_input != images(0)).flatten(1).any(dim=1)
    assert changed.tolist() == [True, False, True, False]
    assert torch.equal(target[1::2], images(1)[1::2])


def test_the_clean_target_gives_the_image_before_the_blur():
    x0_input, target = batch(settings(target="clean", mask="global"), [True] * 4)
    alpha_bar = SCHEDULE.alpha_bar(TIMESTEPS)
    x_t = add_noise(x0_input, images(1), alpha_bar)
    x0_hat = x0_hat_from_eps(x_t, target, alpha_bar)
    torch.testing.assert_close(x0_hat[1:], images(0)[1:], rtol=0, atol=1e-4)
    assert (target[0] - images(1)[0]).abs().max() <= 10 * (x0_input - images(0))[0].abs().max() + 1e-6  # limited


def test_an_attention_mask_costs_one_evaluation_without_gradient_and_other_masks_none():
    network = stable_unet().requires_grad_(True)
    x = images(0)
    for kind, num_calls in (("attention", 1), ("random", 0), ("square", 0), ("global", 0)):
        calls = count_calls(network)
        mask = degradation_mask(settings(mask=kind), network, x, TIMESTEPS, LABELS, rngs())
        assert len(calls) == num_calls
        assert (mask.dtype, tuple(mask.shape), mask.requires_grad) == (torch.bool, (4, 1, 16, 16), False)


@pytest.mark.parametrize("mask", ["random", "square", "attention"])
def test_the_degradation_of_an_image_does_not_depend_on_the_rest_of_the_batch(mask):
    s, x, noise, network = settings(mask=mask, blur_sigma=(0.5, 2.0)), images(0), images(1), stable_unet()
    alpha_bar, all_samples = SCHEDULE.alpha_bar(TIMESTEPS), torch.ones(4, dtype=torch.bool)

    def degraded(rows):
        inputs = (x[rows], noise[rows], alpha_bar[rows], TIMESTEPS[rows], LABELS[rows], all_samples[rows])
        return degrade_batch(s, network, *inputs, rngs()[rows])[0]

    torch.testing.assert_close(torch.cat([degraded(slice(0, 1)), degraded(slice(1, 4))]), degraded(slice(0, 4)))


@pytest.mark.parametrize("kind", ["random", "square"])
def test_random_masks_cover_their_area_and_depend_on_the_generators_alone(kind):
    x = torch.zeros(200, 3, 32, 32)

    def masks(seed):
        return degradation_mask(
            settings(mask=kind, area_fraction=0.4), stable_unet(), x, TIMESTEPS, LABELS, rngs(seed, 200)
        )

    assert float(masks(0).float().mean()) == pytest.approx(0.4, abs=0.02)
    assert torch.equal(masks(0), masks(0))
    assert not torch.equal(masks(0), masks(1))
    assert len({tuple(row.flatten().tolist()) for row in masks(0)}) > 50


def test_a_square_is_one_rectangle():
    mask = degradation_mask(
        settings(mask="square", area_fraction=0.25), stable_unet(), images(0), TIMESTEPS, LABELS, rngs()
    )
    for square in mask[:, 0]:
        rows, columns = square.any(dim=1), square.any(dim=0)
        assert (int(rows.sum()), int(columns.sum())) == (8, 8)
        assert torch.equal(square, rows[:, None] & columns[None])


def test_every_image_has_its_own_blur_within_the_range():
    x = images(0)
    actual = blur_each(x, settings(blur_sigma=(0.5, 4.0)), rngs(3))
    sigmas = [rng.uniform(0.5, 4.0) for rng in rngs(3)]
    expected = torch.cat([gaussian_blur(x[i : i + 1], 31, sigmas[i]) for i in range(4)])
    torch.testing.assert_close(actual, expected)
    assert max(sigmas) - min(sigmas) > 0.5


@pytest.mark.parametrize(
    "changes",
    [{"probability": 1.5}, {"area_fraction": -0.1}, {"mask": "face"}, {"target": "x"}, {"blur_sigma": (2.0, 1.0)}],
)
def test_impossible_settings_are_refused(changes):
    with pytest.raises(UserError, match=rf"`blur_aware.{next(iter(changes))}`"):
        settings(**changes)
