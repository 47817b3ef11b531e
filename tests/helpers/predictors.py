"""Inputs of samplers, a predictor without a network, a recorder of calls, and the guidances of settings."""

import torch

from sagl.diffusion.predictor import Condition, Prediction
from sagl.guidance.base import GuidanceContext
from sagl.guidance.build import build_guidances
from sagl.guidance.registry import GUIDANCES
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers.networks import SEED


def pixels(seed=0):
    """Return three images of 6x6 pixels in [-1, 1], float64."""
    return 2 * torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def standard_normal(seed=0):
    """Return noise for `pixels`, float64."""
    return torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(seed)).double()


def draws(steps):
    """Return x_T and a noise for every step, float64, of 2 images of 8x8 pixels."""
    x, *noise = torch.randn(steps + 1, 2, 3, 8, 8, generator=torch.Generator().manual_seed(SEED)).double()
    return x, noise


class Recorder:
    """A function that records the arguments of every call."""

    def __init__(self, called):
        self.called, self.calls = called, []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.called(*args, **kwargs)


def linear_predictor(x_t, step, condition):
    """A noise predictor of one line."""
    return Prediction(eps=0.5 * x_t + 0.01 * step, log_variance=torch.tensor(-3.0))


def forbidden_noise(step):
    raise AssertionError(f"noise was drawn at step {step}")


NO_CONDITION = Condition()


def guidances_of(schedule, *, classifier_network=None, network=None, weak_network=None, head=None, **settings):
    """Return the guidances of settings by group, such as sag={"scale": 0.5}."""
    context = GuidanceContext(
        network=network,
        network_settings=getattr(network, "settings", None),
        diffusion=DiffusionSettings(),
        schedule=schedule,
        load_network=lambda name, weights: weak_network,
        load_classifier=lambda name: classifier_network,
        share_of_evaluation=lambda start: 0.5,
        load_head=lambda settings, has_mask: head,
    )
    return build_guidances({name: GUIDANCES[name].settings_class(**s) for name, s in settings.items()}, context)
