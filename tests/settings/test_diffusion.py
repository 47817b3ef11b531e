import pytest

from sagl.diffusion.schedule import make_schedule
from sagl.settings.diffusion import DiffusionSettings, LossSettings
from tests.helpers.errors import refused


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
def test_an_impossible_setting_is_refused_with_its_name_and_value(settings, changes):
    ((name, value),) = changes.items()
    with refused(f"`{name}`", repr(value)):
        settings(**changes)


@pytest.mark.parametrize("noise_schedule", ["linear", "cosine"])
@pytest.mark.parametrize("num_timesteps", [21, 250, 1000, 4000])
def test_every_allowed_process_has_betas_between_zero_and_one(noise_schedule, num_timesteps):
    betas = make_schedule(DiffusionSettings(noise_schedule=noise_schedule, num_timesteps=num_timesteps)).betas
    assert 0 < float(betas.min()) <= float(betas.max()) < 1
