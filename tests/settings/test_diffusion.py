import pytest

from sagl.diffusion.schedule import make_schedule
from sagl.errors import UserError
from sagl.settings.diffusion import DiffusionSettings, LossSettings


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (DiffusionSettings, {"noise_schedule": "sqrt"}),
        (DiffusionSettings, {"variance": "learned"}),
        (DiffusionSettings, {"num_timesteps": 0}),
        (DiffusionSettings, {"num_timesteps": 10}),
        (LossSettings, {"kind": "mse"}),
        (LossSettings, {"timestep_sampler": "importance"}),
    ],
)
def test_what_has_no_process_is_refused_with_the_argument_and_what_came(settings, changes):
    ((name, value),) = changes.items()
    with pytest.raises(UserError) as error:
        settings(**changes)
    assert f"`{name}`" in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("noise_schedule", ["linear", "cosine"])
@pytest.mark.parametrize("num_timesteps", [21, 250, 1000, 4000])
def test_every_process_that_is_allowed_has_betas_between_zero_and_one(noise_schedule, num_timesteps):
    betas = make_schedule(DiffusionSettings(noise_schedule=noise_schedule, num_timesteps=num_timesteps)).betas
    assert 0 < float(betas.min()) <= float(betas.max()) < 1
