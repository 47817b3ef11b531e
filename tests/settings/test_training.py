import math
import re

import pytest

from sagl.errors import UserError
from sagl.settings.training import CheckpointSettings, OptimizerSettings


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": 0.0}, {"weight_decay": -0.1}, {"warmup_steps": -1}, {"decay_steps": -5}, {"decay": "steps"}],
)
def test_rates_and_lengths_that_make_no_sense_are_refused_with_the_argument_and_what_came(changes):
    ((name, value),) = changes.items()
    with pytest.raises(UserError) as error:
        OptimizerSettings(**changes)
    assert f"`{name}`" in str(error.value)
    assert str(value) in str(error.value)


def test_the_rate_rises_linearly_in_warm_up():
    settings = OptimizerSettings(warmup_steps=4)
    assert [settings.lr_multiplier(step, -1) for step in range(7)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])


def test_the_rate_falls_linearly_to_the_last_step():
    settings = OptimizerSettings(decay_steps=4)
    assert [settings.lr_multiplier(step, 8) for step in range(9)] == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_the_rate_falls_along_half_a_cosine_where_that_is_asked_for():
    settings = OptimizerSettings(decay_steps=4, decay="cosine")
    falls = [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(5)]
    assert [settings.lr_multiplier(step, 8) for step in range(9)] == pytest.approx([1, 1, 1, 1, *falls])


def test_the_rate_is_constant_without_warm_up_and_end():
    assert [OptimizerSettings().lr_multiplier(step, 100) for step in (0, 50, 100)] == [1, 1, 1]
    assert OptimizerSettings(decay_steps=4).lr_multiplier(10**9, -1) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ema_decay": -0.1}, "`ema_decay` must be in [0, 1), got -0.1"),
        ({"ema_decay": 1.0}, "`ema_decay` must be in [0, 1), got 1.0"),
        ({"save_every_steps": 0}, "`save_every_steps` must be above 0, got 0"),
        ({"save_every_minutes": 0.0}, "`save_every_minutes` must be above 0, got 0.0"),
        ({"save_every_minutes": -1.0}, "`save_every_minutes` must be above 0, got -1.0"),
    ],
)
def test_averages_that_never_learn_and_intervals_that_never_end_are_refused(options, said):
    with pytest.raises(UserError, match=re.escape(said)):
        CheckpointSettings(**options)
