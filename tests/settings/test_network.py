import dataclasses

import pytest

from sagl.settings.errors import UserError
from sagl.settings.network import DEFAULT_CHANNEL_MULT, ClassifierSettings, UNetSettings

SMALL = {"image_size": 32, "num_channels": 32, "channel_mult": (1, 2, 2)}


@pytest.mark.parametrize(
    ("changes", "named", "came"),
    [
        ({"attention_resolutions": (2, 4)}, "attention_resolutions", "[2, 4]"),
        ({"attention_resolutions": (32, 64)}, "attention_resolutions", "[64]"),
        ({"num_heads": 3}, "num_heads", "3"),
        ({"num_heads": 0}, "num_heads", "0"),
        ({"num_heads_upsample": 3}, "num_heads_upsample", "3"),
        ({"num_heads_upsample": -1}, "num_heads_upsample", "-1"),
        ({"num_head_channels": 24}, "num_head_channels", "24"),
        ({"num_head_channels": 128}, "num_head_channels", "128"),
        ({"num_head_channels": -1}, "num_head_channels", "-1"),
        ({"channel_mult": ()}, "channel_mult", "32"),
        ({"channel_mult": (1, 0.7, 2)}, "channel_mult", "22"),
        ({"channel_mult": (1, -1, 2)}, "channel_mult", "-32"),
        ({"image_size": 30}, "image_size", "30"),
        ({"image_size": 0}, "image_size", "0"),
        ({"in_channels": 0}, "in_channels", "0"),
        ({"num_channels": 40}, "num_channels", "40"),
        ({"num_res_blocks": 0}, "num_res_blocks", "0"),
        ({"dropout": 1.0}, "dropout", "1.0"),
        ({"dropout": -0.1}, "dropout", "-0.1"),
        ({"num_classes": 0}, "num_classes", "0"),
        ({"null_label": True}, "null_label", "None"),
    ],
)
def test_a_unet_that_cannot_be_built_is_refused_with_the_argument_and_what_came(changes, named, came):
    with pytest.raises(UserError) as error:
        UNetSettings(**{**SMALL, **changes})
    assert f"`{named}`" in str(error.value)
    assert came in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named", "came"),
    [
        ({"pool": "mean"}, "pool", "'mean'"),
        ({"num_head_channels": None}, "num_head_channels", "None"),
        ({"num_head_channels": 24}, "num_head_channels", "24"),
        ({"num_classes": 0}, "num_classes", "0"),
        ({"attention_resolutions": (2, 4)}, "attention_resolutions", "[2, 4]"),
    ],
)
def test_a_classifier_that_cannot_be_built_is_refused_with_the_argument_and_what_came(changes, named, came):
    with pytest.raises(UserError) as error:
        ClassifierSettings(**{**SMALL, "num_head_channels": 32, **changes})
    assert f"`{named}`" in str(error.value)
    assert came in str(error.value)


def test_attention_beyond_the_levels_is_explained_as_sides_and_not_factors():
    with pytest.raises(UserError, match=r"\(32, 16, 8\).*not downsampling factors"):
        UNetSettings(**SMALL, attention_resolutions=(2,))


@pytest.mark.parametrize("size", sorted(DEFAULT_CHANNEL_MULT))
def test_adms_own_multipliers_are_filled_in_by_image_size(size):
    settings = UNetSettings(image_size=size)
    assert settings.channel_mult == DEFAULT_CHANNEL_MULT[size]
    assert settings.resolutions[-1] == 8
    assert len(settings.widths) == len(settings.resolutions)


def test_widths_and_sides_go_from_the_finest_level_to_the_coarsest():
    settings = UNetSettings(image_size=32, num_channels=64, channel_mult=(0.5, 1, 4))
    assert settings.widths == (32, 64, 256)
    assert settings.resolutions == (32, 16, 8)


def test_channels_a_head_go_before_the_number_of_heads():
    assert UNetSettings(**SMALL, num_heads=2).heads_of(64) == 2
    assert UNetSettings(**SMALL, num_heads=3, num_head_channels=16).heads_of(64) == 4


def test_heads_need_only_divide_widths_that_have_attention():
    assert UNetSettings(**{**SMALL, "channel_mult": (1, 2, 3)}, num_heads=3, attention_resolutions=(8,)).num_heads == 3


@pytest.mark.parametrize("made", [UNetSettings(**SMALL), ClassifierSettings(**SMALL, num_head_channels=32)])
def test_settings_are_frozen_and_keyword_only(made):
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.image_size = 64
    with pytest.raises(TypeError, match="positional"):
        type(made)(32)
