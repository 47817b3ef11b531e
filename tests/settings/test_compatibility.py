from dataclasses import replace

import pytest

from sagl.errors import UserError
from sagl.models.zoo import UNET_NAMES, get_unet_settings
from sagl.settings.compatibility import check_classifier, check_compatible, check_labels
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import ClassifierFreeGuidance, SelfAttentionGuidance
from sagl.settings.network import ClassifierSettings, UNetSettings
from sagl.settings.sampling import RunSettings

NETWORK = UNetSettings(
    image_size=16,
    num_channels=32,
    channel_mult=(1, 2),
    num_heads=2,
    num_head_channels=32,
    attention_resolutions=(8,),
    num_classes=10,
    null_label=True,
)
CLASSIFIER = ClassifierSettings(
    image_size=16,
    num_channels=32,
    channel_mult=(1, 2),
    num_head_channels=32,
    attention_resolutions=(8,),
    num_classes=10,
)
PLAIN = replace(NETWORK, num_classes=None, null_label=False)
NO_NULL = replace(NETWORK, null_label=False)
FIXED = DiffusionSettings(variance="fixed_small")


def sag(**changes):
    return SelfAttentionGuidance(**{"scale": 0.5, "site": "output.0", **changes})


@pytest.mark.parametrize(
    ("network", "diffusion", "guidances"),
    [
        (NETWORK, DiffusionSettings(), {}),
        (replace(NETWORK, learn_sigma=False), FIXED, {}),
        (NETWORK, FIXED, {"sag": sag()}),
        (NETWORK, FIXED, {"sag": sag(heads="sag_release", site="middle", kernel_size=31)}),
        (NETWORK, FIXED, {"cfg": ClassifierFreeGuidance(scale=-1.0)}),
        (PLAIN, FIXED, {"sag": sag(), "cfg": ClassifierFreeGuidance()}),
        (PLAIN, FIXED, {"sag": sag(scale=0.0, site="output.99", kernel_size=99)}),
    ],
)
def test_what_the_network_can_do_is_allowed_and_a_guidance_of_scale_0_asks_nothing(network, diffusion, guidances):
    check_compatible(network, diffusion, guidances)


@pytest.mark.parametrize(
    ("network", "diffusion", "guidances", "named"),
    [
        (replace(NETWORK, learn_sigma=False), DiffusionSettings(), {}, ("`variance`", "fixed_small or fixed_large")),
        (NETWORK, FIXED, {"sag": sag(site="output.99")}, ("`site`", "output.0 (8x8)", "'output.99'")),
        (NETWORK, FIXED, {"sag": sag(site="input.0", scale=-0.1)}, ("`site`", "'input.0'")),
        (replace(NETWORK, num_heads=3), FIXED, {"sag": sag(heads="sag_release")}, ("`heads`", "(3)", "64")),
        (NETWORK, FIXED, {"sag": sag(kernel_size=33)}, ("`sag.kernel_size`", "at most 31", "got 33")),
        (NO_NULL, FIXED, {"cfg": ClassifierFreeGuidance(scale=0.1)}, ("`cfg.scale`", "null label")),
        (PLAIN, FIXED, {"cfg": ClassifierFreeGuidance(scale=-0.1)}, ("`cfg.scale`", "null label")),
    ],
)
def test_what_the_network_cannot_do_is_refused_with_the_argument_and_the_way_out(network, diffusion, guidances, named):
    with pytest.raises(UserError) as error:
        check_compatible(network, diffusion, guidances)
    assert [part for part in named if part not in str(error.value)] == []


@pytest.mark.parametrize("name", UNET_NAMES)
def test_every_network_that_comes_with_a_name_goes_with_its_own_process(name):
    check_compatible(*get_unet_settings(name), {})


@pytest.mark.parametrize(
    ("network", "labels"),
    [(NETWORK, labels) for labels in ("random", "balanced", "null", "0", "9", "0, 9,3")]
    + [(NO_NULL, labels) for labels in ("random", "balanced", "7")]
    + [(PLAIN, labels) for labels in ("random", "null")],
)
def test_labels_that_the_network_knows_are_allowed(network, labels):
    check_labels(RunSettings(labels=labels), network)


@pytest.mark.parametrize(
    ("network", "labels", "said"),
    [
        (NETWORK, "10", "must be classes 0 … 9, got 10"),
        (NETWORK, "0,12,3", "must be classes 0 … 9, got 12"),
        (NO_NULL, "null", "null needs a network with a null label"),
        (PLAIN, "balanced", "is for class-conditional networks, got 'balanced'"),
        (PLAIN, "3", "is for class-conditional networks, got '3'"),
    ],
)
def test_labels_that_the_network_does_not_know_are_refused(network, labels, said):
    with pytest.raises(UserError) as error:
        check_labels(RunSettings(labels=labels), network)
    assert f"`labels` {said}" in str(error.value)


# --------------------------------------------------------------------------------------------------- classifiers


@pytest.mark.parametrize("network", [NETWORK, PLAIN])
def test_a_classifier_of_the_network_s_images_classes_and_process_may_guide_it(network):
    check_classifier(CLASSIFIER, FIXED, network, DiffusionSettings())  # the variance is no concern of a classifier


@pytest.mark.parametrize(
    ("changes", "diffusion", "named"),
    [
        (
            {"image_size": 32, "attention_resolutions": (16,)},
            FIXED,
            "3 channels of 16x16 pixels .* got one for 3 channels of 32x32 pixels",
        ),
        ({"in_channels": 1}, FIXED, "got one for 1 channels of 16x16"),
        ({"num_classes": 4}, FIXED, "4 classes"),
        ({}, DiffusionSettings(noise_schedule="cosine"), "a linear schedule of 1000 .* a cosine schedule of 1000"),
        ({}, DiffusionSettings(num_timesteps=400), "a linear schedule of 1000 .* a linear schedule of 400"),
    ],
)
def test_a_classifier_of_something_else_is_refused_with_both(changes, diffusion, named):
    with pytest.raises(UserError, match=f"`classifier.checkpoint` .*{named}"):
        check_classifier(replace(CLASSIFIER, **changes), diffusion, NETWORK, FIXED)
