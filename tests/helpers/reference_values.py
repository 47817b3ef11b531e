"""The reference values, and the weights, inputs and noise that they were computed with (tests/assets/README.md)."""

import gzip
import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from sagl.diffusion.predictor import Condition, make_predictor
from sagl.diffusion.schedule import make_schedule
from sagl.guidance.base import with_guidance
from sagl.models.adm import Classifier, UNet
from sagl.models.cpu_kernels import optimize_for_cpu
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import ClassifierSettings, UNetSettings
from tests.helpers.networks import SEED, draw_weights
from tests.helpers.predictors import guidances_of

ASSETS = Path(__file__).parents[1] / "assets"
META = json.loads((ASSETS / "meta.json").read_text())
KEY_LISTS = json.loads(gzip.decompress((ASSETS / "adm_state_dict_keys.json.gz").read_bytes()))
REFERENCE_LABELS = {"adm_a": None, "adm_b": torch.tensor([4, 500, 999])}
WEIGHTS = {"adm_a": 1, "adm_a8": 1, "adm_b": 2, "classifier_c": 3}


@cache
def values(name):
    """The tensors of one file."""
    return load_file(ASSETS / f"{name}.safetensors")


def relative_error(actual, expected):
    """Largest difference as a share of the largest value."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float((actual.detach().double() - expected.double()).abs().max() / expected.double().abs().max())


def generator(offset):
    return torch.Generator().manual_seed(SEED + offset)


def loss_inputs():
    """Images and noise of the reference losses."""
    g = generator(77)
    return 2 * torch.rand(3, 3, 32, 32, generator=g) - 1, torch.randn(3, 3, 32, 32, generator=g)


def _numbers(text):
    return tuple(int(part) for part in text.split(","))


@cache
def network(name, optimized=True):
    """A reference UNet, with or without kernels for CPUs; `META` has the flags of guided-diffusion."""
    flags = dict(META["models"][name])
    flags.pop("noise_schedule")
    flags["num_classes"] = 1000 if flags.pop("class_cond") else None
    for sides in ("channel_mult", "attention_resolutions"):
        flags[sides] = _numbers(flags[sides])
    network = draw_weights(UNet(UNetSettings(**flags)), WEIGHTS[name])
    return optimize_for_cpu(network) if optimized else network


@cache
def classifier(optimized=True):
    flags = dict(META["models"]["classifier_c"])
    flags["num_channels"], flags["num_classes"] = flags.pop("model_channels"), flags.pop("out_channels")
    flags["attention_resolutions"] = tuple(flags["image_size"] // f for f in flags["attention_resolutions"])
    flags["channel_mult"] = tuple(flags["channel_mult"])
    network = draw_weights(Classifier(ClassifierSettings(**flags)), WEIGHTS["classifier_c"])
    return optimize_for_cpu(network) if optimized else network


def schedule_of(name, respacing=None):
    """The schedule that a reference UNet goes with."""
    return make_schedule(DiffusionSettings(noise_schedule=META["models"][name]["noise_schedule"]), respacing)


def trajectory_names(sampler):
    return [name for name, settings in META["trajectories"].items() if settings["sampler"] == sampler]


def trajectory_error(name, sample):
    """Run a trajectory by `sample` (ddpm or ddim): the largest relative error of each step."""
    m, expected = META["trajectories"][name], values("trajectories")[name]
    schedule = schedule_of(m["model"], m["respacing"])
    steps = schedule.num_steps
    g = generator(5)
    x = torch.randn(expected.shape[1:], generator=g)
    noise = {step: torch.randn(x.shape, generator=g) for step in reversed(range(steps))}
    torch.testing.assert_close(x, expected[0], rtol=0, atol=0)
    sag = {name: m[name] for name in ("site", "threshold", "blur_sigma", "kernel_size", "clip_x0")}
    sag["scale"], sag["heads"] = m["sag_scale"], "sag_release" if "as_released" in name else "layer"
    sag["interval"] = (0.0 if m["guide_last_steps"] is None else 1 - m["guide_last_steps"] / steps, 1.0)
    classifier_settings = {"scale": m["classifier_scale"], "checkpoint": "classifier_c"}
    guidances = guidances_of(schedule, sag=sag, classifier=classifier_settings, classifier_network=classifier())
    predict = with_guidance(make_predictor(network(m["model"]), schedule, "learned_range"), guidances)
    condition = Condition(labels=torch.tensor(m["classifier_labels"]) if m["classifier_labels"] else None)
    options = {"clip_x0": m["clip_x0"]} | ({} if m["eta"] is None else {"eta": m["eta"]})
    with torch.inference_mode():
        chain = list(sample(predict, x, condition, schedule, noise.__getitem__, **options))
    assert [step for step, _, _ in chain] == list(reversed(range(steps)))
    assert len(expected) == steps + 1
    return [relative_error(x, after) for (_, x, _), after in zip(chain, expected[1:], strict=True)]
