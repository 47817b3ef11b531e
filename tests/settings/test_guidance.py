import pytest

from sagl.errors import UserError
from sagl.guidance.registry import GUIDANCES
from sagl.settings.guidance import EpsScaling, SelfAttentionGuidance, effective_kernel_size
from tests.helpers.errors import refused

every_method = pytest.mark.parametrize("name", GUIDANCES)
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("kernel_size", 8),
        ("kernel_size", 0),
        ("kernel_size", -3),
        ("blur_sigma", 0.0),
        ("blur_sigma", -1.0),
        ("blur_sigma", NAN),
        ("threshold", INFINITY),
        ("heads", "all"),
    ],
)
def test_an_impossible_setting_is_refused_with_its_name_and_value(setting, value):
    with refused(f"`sag.{setting}`", value):
        SelfAttentionGuidance(**{setting: value})


@every_method
def test_an_impossible_interval_is_refused(name):
    for interval in ((0.6, 0.4), (-0.1, 0.4), (0.0, 25), (0.0, NAN)):
        with pytest.raises(UserError, match=rf"`{name}\.interval`"):
            GUIDANCES[name].settings_class(interval=interval)


@every_method
def test_an_interval_may_hold_all_steps_or_none(name):
    for interval in ((0, 1), (0.5, 0.5), (0, 0), (1, 1)):
        assert GUIDANCES[name].settings_class(interval=interval).interval == interval


def test_intervals_of_integers_and_of_floats_are_written_alike():
    intervals = [SelfAttentionGuidance(interval=interval).interval for interval in ((0, 1), [0, 1], (0.0, 1.0))]
    assert set(map(repr, intervals)) == {"(0.0, 1.0)"}


@every_method
def test_any_finite_scale_is_allowed(name):
    for scale in (-0.1, 0.0, 3.0):
        assert GUIDANCES[name].settings_class(scale=scale).scale == scale
    for scale in (-INFINITY, INFINITY, NAN):
        with pytest.raises(UserError, match=rf"`{name}\.scale`"):
            GUIDANCES[name].settings_class(scale=scale)


@pytest.mark.parametrize("scale", [-1.0, -2.0])
def test_a_divisor_of_eps_that_is_not_positive_is_refused(scale):
    with refused("`eps_scaling.scale`", scale):
        EpsScaling(scale=scale)


@every_method
def test_a_method_is_off_by_default_and_its_settings_carry_its_name(name):
    assert GUIDANCES[name].settings_class().scale == 0
    assert GUIDANCES[name].settings_class.group == name


@pytest.mark.parametrize(("side", "expected"), [(256, 31), (16, 31), (15, 29), (8, 15), (1, 1)])
def test_the_default_kernel_is_31_or_the_largest_that_fits(side, expected):
    assert effective_kernel_size(None, side) == expected


def test_a_kernel_size_is_used_or_refused_never_changed():
    assert effective_kernel_size(29, 15) == 29
    with pytest.raises(UserError, match=r"`sag\.kernel_size`.*29.*15x15.*31"):
        effective_kernel_size(31, 15)
