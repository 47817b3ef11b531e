import numpy as np
import pytest
import torch

from sagl.diffusion.schedule import make_schedule
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers import formulas
from tests.helpers.reference_values import values

WHOLE = [key for key in values("schedules") if key.count(".") == 1]
RESPACED = [key.removesuffix(".betas") for key in values("schedules") if ".respaced." in key and key.endswith(".betas")]


def schedule_of(kind="linear", respacing=None, total=1000):
    return make_schedule(DiffusionSettings(noise_schedule=kind, num_timesteps=total), respacing)


@pytest.mark.parametrize("key", WHOLE)
def test_betas_equal_the_reference_values(key):
    torch.testing.assert_close(schedule_of(key.split(".")[0]).betas, values("schedules")[key], rtol=0, atol=1e-12)


@pytest.mark.parametrize("key", RESPACED)
def test_respaced_betas_and_timesteps_equal_the_reference_values(key):
    kind, respacing = key.split(".respaced.")
    schedule = schedule_of(kind, respacing)
    torch.testing.assert_close(schedule.betas, values("schedules")[f"{key}.betas"], rtol=0, atol=1e-12)
    assert schedule.timesteps.tolist() == values("schedules")[f"{key}.timesteps"].tolist()


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("respacing", "total"), [(None, 1000), ("17", 1000), ("ddim20", 1000), ("3,4", 400), ("1", 1000)]
)
def test_tables_are_those_of_an_independent_implementation(kind, respacing, total):
    schedule = schedule_of(kind, respacing, total)
    process = formulas.Process(kind, schedule.timesteps.tolist(), total)
    for step in range(schedule.num_steps):
        actual = [schedule.alpha_bar(step), schedule.alpha_bar(step - 1), schedule.betas[step], schedule.log_beta(step)]
        expected = [process.bar[step], process.bar_prev[step], process.beta[step], np.log(process.beta[step])]
        np.testing.assert_allclose([float(v) for v in actual], expected, rtol=1e-9, atol=1e-12)
        for variance, log_variance in (
            ("fixed_small", schedule.log_posterior_variance(step)),
            ("fixed_large", schedule.log_fixed_large_variance(step)),
        ):
            assert float(log_variance) == pytest.approx(process.log_variance(step, variance), abs=1e-9)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("respacing", ["1000", "ddim1000", "500,500"])
def test_respacing_to_all_timesteps_is_the_identity(kind, respacing):
    whole, respaced = schedule_of(kind), schedule_of(kind, respacing)
    assert respaced.timesteps.tolist() == list(range(1000))
    torch.testing.assert_close(respaced.alphas_cumprod, whole.alphas_cumprod, rtol=0, atol=0)


def test_a_batch_of_steps_gets_the_values_of_each():
    schedule, steps = schedule_of(respacing="20"), torch.tensor([0, 7, 19])
    for table in (
        schedule.alpha_bar,
        schedule.log_beta,
        schedule.log_posterior_variance,
        schedule.log_fixed_large_variance,
    ):
        actual = table(steps)
        assert actual.shape == (3, 1, 1, 1)
        assert actual.dtype == torch.float64
        assert actual.flatten().tolist() == [float(table(int(step))) for step in steps]


def test_the_step_before_the_cleanest_is_the_clean_image():
    schedule = schedule_of(respacing="20")
    assert float(schedule.alpha_bar(-1)) == 1
    assert schedule.alpha_bar(torch.tensor([0, 1]) - 1).flatten().tolist() == [1, float(schedule.alpha_bar(0))]


def test_the_timestep_is_that_of_the_original_process():
    actual = schedule_of(respacing="ddim4").timestep(3, 2, torch.device("cpu"))
    assert actual.tolist() == [750, 750]
    assert actual.dtype == torch.int64
