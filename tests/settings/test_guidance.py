import dataclasses

import pytest

from sagl.errors import UserError
from sagl.guidance.registry import GUIDANCES
from sagl.settings.guidance import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    SelfAttentionGuidance,
    effective_kernel_size,
)
from sagl.settings.sampling import SamplerSettings


@pytest.mark.parametrize(
    ("changes", "named", "came"),
    [
        ({"kernel_size": 8}, "sag.kernel_size", "8"),
        ({"kernel_size": 0}, "sag.kernel_size", "0"),
        ({"kernel_size": -3}, "sag.kernel_size", "-3"),
        ({"blur_sigma": 0.0}, "sag.blur_sigma", "0.0"),
        ({"blur_sigma": -1.0}, "sag.blur_sigma", "-1.0"),
        ({"blur_sigma": float("nan")}, "sag.blur_sigma", "nan"),
        ({"interval": (0.6, 0.4)}, "sag.interval", "(0.6, 0.4)"),
        ({"interval": (-0.1, 0.4)}, "sag.interval", "(-0.1, 0.4)"),
        ({"interval": (0.0, 25)}, "sag.interval", "(0.0, 25)"),
        ({"heads": "all"}, "sag.heads", "'all'"),
    ],
)
def test_what_has_no_meaning_is_refused_with_the_argument_and_what_came(changes, named, came):
    with pytest.raises(UserError) as error:
        SelfAttentionGuidance(**changes)
    assert f"`{named}`" in str(error.value)
    assert came in str(error.value)


@pytest.mark.parametrize("interval", [(0, 1), (0.5, 0.5), (0, 0), (1, 1)])
def test_an_interval_may_be_the_whole_chain_or_empty(interval):
    assert SelfAttentionGuidance(interval=interval).interval == interval


@pytest.mark.parametrize("scale", [-0.1, 0.0, 3.0])
def test_any_scale_is_allowed(scale):
    assert SelfAttentionGuidance(scale=scale).scale == scale
    assert ClassifierGuidance(scale=scale).scale == scale
    assert ClassifierFreeGuidance(scale=scale).scale == scale


def test_guidances_are_off_until_a_scale_is_given():
    assert {entry.settings_class().scale for entry in GUIDANCES.values()} == {0}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        *((entry.settings_class, {"scale": None}, f"{group}.scale") for group, entry in GUIDANCES.items()),
        (SelfAttentionGuidance, {"threshold": None}, "sag.threshold"),
        (SelfAttentionGuidance, {"blur_sigma": None}, "sag.blur_sigma"),
        (SelfAttentionGuidance, {"interval": (0.0, None)}, "sag.interval"),
        (SamplerSettings, {"sampler": "ddim", "eta": None}, "eta"),
    ],
)
def test_a_setting_that_is_no_finite_number_is_refused_by_its_name(kind, changes, named, number):
    put = {
        name: tuple(number if part is None else part for part in value) if isinstance(value, tuple) else value or number
        for name, value in changes.items()
    }
    with pytest.raises(UserError) as error:
        kind(**put)
    assert str(error.value) == f"`{named}` must be a finite number, got {number}."


@pytest.mark.parametrize(("side", "want"), [(256, 31), (16, 31), (15, 29), (8, 15), (1, 1)])
def test_the_default_kernel_is_31_or_the_largest_that_fits(side, want):
    assert effective_kernel_size(None, side) == want


def test_a_kernel_that_was_asked_for_is_used_or_refused_never_changed():
    assert effective_kernel_size(29, 15) == 29
    with pytest.raises(UserError, match=r"`sag.kernel_size` must be at most 29 for 15x15 images, got 31"):
        effective_kernel_size(31, 15)


def test_settings_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SelfAttentionGuidance().scale = 1.0
    with pytest.raises(TypeError, match="positional"):
        SelfAttentionGuidance(0.5)
