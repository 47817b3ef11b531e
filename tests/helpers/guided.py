"""One guided prediction of a small network, and what it is by formula."""

import torch

from sagl.diffusion.noise import SampleKeys
from sagl.diffusion.predictor import Condition, make_predictor
from sagl.diffusion.schedule import make_schedule
from sagl.guidance.base import with_guidance
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers import formulas
from tests.helpers.networks import small_unet
from tests.helpers.predictors import guidances_of

SCHEDULE, STEP = make_schedule(DiffusionSettings(), "10"), 6
NETWORK = small_unet()
KEYS = SampleKeys(5, (3, 8))


def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def guided(network=NETWORK, step=STEP, weak_network=None, **settings):
    """The guided prediction for `images` at a step."""
    predict = make_predictor(network, SCHEDULE, "learned_range")
    guidances = guidances_of(SCHEDULE, network=network, weak_network=weak_network, **settings)
    return with_guidance(predict, guidances)(images(), step, Condition(samples=KEYS))


def eps_by_formula(x=None, **options):
    """eps of `NETWORK` in float64, from its weights, for `images` or another x_t."""
    timesteps = SCHEDULE.timestep(STEP, 2, torch.device("cpu"))
    return formulas.adm(NETWORK, images() if x is None else x, timesteps, **options)[0][:, :3]
