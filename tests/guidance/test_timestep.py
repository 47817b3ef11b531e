import pytest
import torch

from sagl.diffusion.noise import guidance_rngs
from sagl.errors import UserError
from sagl.settings.guidance import TimestepGuidance
from tests.helpers.guided import KEYS, SCHEDULE, STEP, eps_by_formula, guided
from tests.helpers.reference_values import relative_error


@pytest.mark.parametrize(("noise_scale", "exponent"), [(1.0, 0.0), (2.0, 1.0), (0.5, 0.25)])
def test_the_weak_prediction_has_noise_on_the_timestep_embedding(noise_scale, exponent):
    rngs = guidance_rngs(KEYS, "tsg", STEP)
    noise = torch.stack([torch.from_numpy(rng.standard_normal(128, "float32")) for rng in rngs]).double()
    factor = noise_scale * (SCHEDULE.timesteps[STEP].item() / 1000) ** exponent
    base, weak_eps = eps_by_formula(), eps_by_formula(emb_noise=factor * noise)
    actual = guided(tsg={"scale": 1.5, "noise_scale": noise_scale, "noise_exponent": exponent}).eps
    assert relative_error(actual, base + 1.5 * (base - weak_eps)) < 1e-5
    assert relative_error(actual, base) > 1e-3


@pytest.mark.parametrize("exponent", [-0.1, float("nan")])
def test_an_impossible_exponent_is_refused(exponent):
    with pytest.raises(UserError, match=r"`tsg\.noise_exponent`"):
        TimestepGuidance(noise_exponent=exponent)
