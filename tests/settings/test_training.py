import math

import pytest

from sagl.errors import UserError
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.direction_head import DirectionHeadOptions, HeadTrainingSettings
from sagl.settings.network import HeadSettings
from sagl.settings.training import (
    BlurAwareSettings,
    CheckpointSettings,
    OptimizerSettings,
    PreviewSettings,
    TrainingSettings,
)
from tests.helpers.errors import refused
from tests.helpers.heads import SHAPE


@pytest.mark.parametrize(
    ("settings_class", "name", "value"),
    [
        (OptimizerSettings, "learning_rate", 0.0),
        (OptimizerSettings, "weight_decay", -0.1),
        (OptimizerSettings, "warmup_steps", -1),
        (OptimizerSettings, "decay_steps", -5),
        (OptimizerSettings, "decay", "steps"),
        (CheckpointSettings, "ema_decay", 1.0),
        (CheckpointSettings, "extra_ema_decays", (-0.1,)),
        (CheckpointSettings, "save_every_steps", 0),
        (CheckpointSettings, "save_every_minutes", -1.0),
        (TrainingSettings, "max_nonfinite_batches", -1),
        (PreviewSettings, "preview.num_samples", -1),
        (PreviewSettings, "preview.num_metric_samples", 1),
        (PreviewSettings, "preview.batch_size", 0),
        (PreviewSettings, "preview.scales", ()),
        (PreviewSettings, "preview.max_checkpoint_gb", 0.0),
    ],
)
def test_invalid_settings_are_refused_with_name_and_value(settings_class, name, value):
    with refused(f"`{name}`", str(value).strip("(),")):
        settings_class(**{name.removeprefix("preview."): value})


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"keep_best": 2}, "preview.num_metric_samples"),
        ({"keep_best": 2, "num_metric_samples": 9, "best_scale": 0.2}, "preview.best_scale"),
        ({"sampler": "euler"}, "sampler"),
    ],
)
def test_previews_without_what_they_need_are_refused(settings, name):
    with pytest.raises(UserError, match=name):
        PreviewSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "max_steps", "multipliers"),
    [
        ({"warmup_steps": 4}, -1, [0.2, 0.4, 0.6, 0.8, 1, 1, 1]),
        ({"decay_steps": 4}, 8, [1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]),
        (
            {"decay_steps": 4, "decay": "cosine"},
            8,
            [1, 1, 1, 1, *((1 + math.cos(math.pi * k / 4)) / 2 for k in range(5))],
        ),
        ({}, 100, [1] * 5),
    ],
)
def test_the_learning_rate_rises_in_warm_up_and_decays_to_the_last_step(settings, max_steps, multipliers):
    settings = OptimizerSettings(**settings)
    assert [settings.lr_multiplier(step, max_steps) for step in range(len(multipliers))] == pytest.approx(multipliers)


def test_a_training_without_end_has_no_decay():
    assert OptimizerSettings(decay_steps=4).lr_multiplier(10**9, -1) == 1


@pytest.mark.parametrize(
    ("settings_class", "name", "value"),
    [
        (OptimizerSettings, "learning_rate", math.inf),
        (OptimizerSettings, "weight_decay", math.nan),
        (OptimizerSettings, "betas", (0.9, math.nan)),
        (OptimizerSettings, "betas", (1.0, 0.9)),
        (OptimizerSettings, "betas", (-0.1, 0.9)),
        (TrainingSettings, "seed", -1),
        (TrainingSettings, "seed", 2**63),
        (PreviewSettings, "scales", (0.0, math.inf)),
        (BlurAwareSettings, "threshold", math.nan),
        (BlurAwareSettings, "blur_sigma", (1.0, math.inf)),
        (DirectionHeadOptions, "scales", (0.0, math.inf)),
        (HeadSettings, "depth", 60_000),
        (HeadSettings, "coarse_width", 0),
        *((HeadSettings, "map_channels", channels) for channels in ((), (48,), (-32,), (32,) * 13)),
    ],
)
def test_numbers_with_which_no_training_can_run_are_refused(settings_class, name, value):
    others = SHAPE | {"method": "sag", "network_rms": ()} if settings_class is HeadSettings else {}
    with refused(f"{name}`"):
        settings_class(**{**others, name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("freeze", ("convs.*",)), ("use_checkpoint", True), ("diffusion", DiffusionSettings())]
)
def test_a_direction_head_has_no_settings_of_its_network(name, value):
    with refused(f"`model.{name}`"):
        HeadTrainingSettings(direction_head=DirectionHeadOptions(), **{name: value})
