import dataclasses

import pytest

from sagl.settings.errors import UserError
from sagl.settings.guidance import ClassifierGuidance, SelfAttentionGuidance


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


def test_guidances_are_off_until_a_scale_is_given():
    assert SelfAttentionGuidance().scale == ClassifierGuidance().scale == 0


def test_settings_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SelfAttentionGuidance().scale = 1.0
    with pytest.raises(TypeError, match="positional"):
        SelfAttentionGuidance(0.5)
