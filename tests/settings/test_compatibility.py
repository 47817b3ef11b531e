from dataclasses import replace

import pytest

from sagl.models.zoo import UNET_NAMES, get_unet_settings
from sagl.settings.compatibility import check_compatible, check_labels, check_second_network
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
)
from sagl.settings.network import ClassifierSettings, UNetSettings
from sagl.settings.sampling import RunSettings
from tests.helpers.errors import refused

ENCODER = {"image_size": 16, "num_channels": 32, "channel_mult": (1, 2), "num_head_channels": 32}
ENCODER |= {"attention_resolutions": (8,), "num_classes": 10}
NETWORK = UNetSettings(**ENCODER, num_heads=2, null_label=True)
CLASSIFIER = ClassifierSettings(**ENCODER)
UNCONDITIONAL = replace(NETWORK, num_classes=None, null_label=False)
NO_NULL = replace(NETWORK, null_label=False)
FIXED = DiffusionSettings(variance="fixed_small")


def sag(**changes):
    return {"sag": SelfAttentionGuidance(**{"scale": 0.5, "site": "output.0", **changes})}


def cfg(scale):
    return {"cfg": ClassifierFreeGuidance(scale=scale)}


@pytest.mark.parametrize(
    ("network", "diffusion", "guidances"),
    [
        (NETWORK, DiffusionSettings(), {}),
        (replace(NETWORK, learn_sigma=False), FIXED, {}),
        (NETWORK, FIXED, sag()),
        (NETWORK, FIXED, sag(heads="sag_release", site="middle", kernel_size=31)),
        (NETWORK, FIXED, sag(site="middle, output.0", head=1, mask="dino", dino_checkpoint="file")),
        (NETWORK, FIXED, sag(site="none", mask="global")),
        (NETWORK, FIXED, cfg(-1.0)),
        (UNCONDITIONAL, FIXED, {**sag(), **cfg(0.0), "classifier": ClassifierGuidance()}),
        (UNCONDITIONAL, FIXED, sag(scale=0.0, site="output.99", kernel_size=99)),
    ],
)
def test_a_guidance_that_the_network_supports_is_allowed_and_one_of_scale_0_requires_nothing(
    network, diffusion, guidances
):
    check_compatible(network, diffusion, guidances)


@pytest.mark.parametrize(
    ("network", "diffusion", "guidances", "parts"),
    [
        (replace(NETWORK, learn_sigma=False), DiffusionSettings(), {}, ("`variance`", "fixed_small")),
        (NETWORK, FIXED, sag(site="output.99"), ("`sag.site`", "output.0 (8x8)", "'output.99'")),
        (NETWORK, FIXED, sag(site="input.0", scale=-0.1), ("`sag.site`", "'input.0'")),
        (replace(NETWORK, num_heads=3), FIXED, sag(heads="sag_release"), ("`sag.heads`", "64", "got 3")),
        (NETWORK, FIXED, sag(site="output.0,output.99"), ("`sag.site`", "'output.99'")),
        (NETWORK, FIXED, sag(head=2), ("`sag.head`", "0 … 1", "got 2")),
        (NETWORK, FIXED, sag(head=-1), ("`sag.head`", "0 … 1", "got -1")),
        (NETWORK, FIXED, sag(reuse_before="output.99"), ("`sag.reuse_before`", "output.0", "'output.99'")),
        (NETWORK, FIXED, sag(reuse_before="middle"), ("`sag.reuse_before`", "'middle'")),
        (
            NETWORK,
            FIXED,
            {"pag": PerturbedAttentionGuidance(scale=1.0, reuse_before="output.1")},
            ("`pag.site`", "middle"),
        ),
        (NETWORK, FIXED, sag(mask="dino"), ("`sag.dino_checkpoint`", "got none")),
        (NETWORK, FIXED, sag(kernel_size=33), ("`sag.kernel_size`", "31", "33")),
        (NO_NULL, FIXED, cfg(0.1), ("`cfg.scale`", "null label")),
        (UNCONDITIONAL, FIXED, cfg(-0.1), ("`cfg.scale`", "null label")),
        (NETWORK, FIXED, {"classifier": ClassifierGuidance(scale=1.0)}, ("`classifier.checkpoint`",)),
    ],
)
def test_what_the_network_does_not_support_is_refused(network, diffusion, guidances, parts):
    with refused(*parts):
        check_compatible(network, diffusion, guidances)


@pytest.mark.parametrize("name", UNET_NAMES)
def test_every_released_network_is_compatible_with_its_own_process(name):
    check_compatible(*get_unet_settings(name), {})


@pytest.mark.parametrize(
    ("network", "labels"),
    [
        *((NETWORK, labels) for labels in ("random", "balanced", "null", "0", "9", "0, 9,3")),
        *((NO_NULL, labels) for labels in ("random", "balanced", "7")),
        *((UNCONDITIONAL, labels) for labels in ("random", "null")),
    ],
)
def test_labels_that_the_network_has_are_allowed(network, labels):
    check_labels(RunSettings(labels=labels), network)


@pytest.mark.parametrize(
    ("network", "labels", "guidances", "parts"),
    [
        (NETWORK, "10", {}, ("`labels`", "0 … 9", "10")),
        (NETWORK, "0,12,3", {}, ("`labels`", "0 … 9", "12")),
        (NO_NULL, "null", {}, ("`labels`", "null label")),
        (UNCONDITIONAL, "balanced", {}, ("`labels`", "'balanced'")),
        (UNCONDITIONAL, "3", {}, ("`labels`", "'3'")),
        (NETWORK, "null", cfg(0.5), ("`cfg.scale`", "`labels`")),
        (UNCONDITIONAL, "random", {"classifier": ClassifierGuidance(scale=1.0)}, ("`classifier.scale`", "labels")),
    ],
)
def test_labels_that_the_network_lacks_or_a_guidance_misses_are_refused(network, labels, guidances, parts):
    with refused(*parts):
        check_labels(RunSettings(labels=labels), network, guidances)


@pytest.mark.parametrize("network", [NETWORK, UNCONDITIONAL])
def test_a_classifier_of_the_networks_images_classes_and_process_is_allowed_for_any_variance(network):
    check_second_network("classifier.checkpoint", CLASSIFIER, FIXED, network, DiffusionSettings())


@pytest.mark.parametrize(
    ("changes", "diffusion", "parts"),
    [
        ({"image_size": 32, "attention_resolutions": (16,)}, FIXED, ("3 channels of 16x16", "3 channels of 32x32")),
        ({"in_channels": 1}, FIXED, ("3 channels of 16x16", "1 channels of 16x16")),
        ({"num_classes": 4}, FIXED, ("4 classes",)),
        ({}, DiffusionSettings(noise_schedule="cosine"), ("linear schedule of 1000", "cosine schedule of 1000")),
        ({}, DiffusionSettings(num_timesteps=400), ("linear schedule of 1000", "linear schedule of 400")),
    ],
)
def test_a_classifier_of_other_images_classes_or_noise_is_refused_with_both(changes, diffusion, parts):
    with refused("`classifier.checkpoint`", *parts):
        check_second_network("classifier.checkpoint", replace(CLASSIFIER, **changes), diffusion, NETWORK, FIXED)
