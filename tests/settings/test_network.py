import dataclasses

import pytest

from sagl.errors import UserError
from sagl.settings.network import DEFAULT_CHANNEL_MULT, ClassifierSettings, UNetSettings
from tests.helpers.errors import refused

SMALL = {"image_size": 32, "num_channels": 32, "channel_mult": (1, 2, 2)}
SMALL_CLASSIFIER = {**SMALL, "num_head_channels": 32}


@pytest.mark.parametrize(
    ("cls", "changes", "name", "value"),
    [
        (UNetSettings, {"attention_resolutions": (2, 4)}, "attention_resolutions", "[2, 4]"),
        (UNetSettings, {"attention_resolutions": (32, 64)}, "attention_resolutions", "[64]"),
        (UNetSettings, {"num_heads": 3}, "num_heads", "3"),
        (UNetSettings, {"num_heads": 0}, "num_heads", "0"),
        (UNetSettings, {"num_heads_upsample": 3}, "num_heads_upsample", "3"),
        (UNetSettings, {"num_heads_upsample": -1}, "num_heads_upsample", "-1"),
        (UNetSettings, {"num_head_channels": 24}, "num_head_channels", "24"),
        (UNetSettings, {"num_head_channels": 128}, "num_head_channels", "128"),
        (UNetSettings, {"num_head_channels": -1}, "num_head_channels", "-1"),
        (UNetSettings, {"channel_mult": ()}, "channel_mult", "32"),
        (UNetSettings, {"channel_mult": (1, 0.7, 2)}, "channel_mult", "22"),
        (UNetSettings, {"channel_mult": (1, -1, 2)}, "channel_mult", "-32"),
        (UNetSettings, {"image_size": 30}, "image_size", "30"),
        (UNetSettings, {"image_size": 0}, "image_size", "0"),
        (UNetSettings, {"in_channels": 0}, "in_channels", "0"),
        (UNetSettings, {"num_channels": 40}, "num_channels", "40"),
        (UNetSettings, {"num_res_blocks": 0}, "num_res_blocks", "0"),
        (UNetSettings, {"dropout": 1.0}, "dropout", "1.0"),
        (UNetSettings, {"dropout": -0.1}, "dropout", "-0.1"),
        (UNetSettings, {"num_classes": 0}, "num_classes", "0"),
        (UNetSettings, {"null_label": True}, "null_label", "None"),
        (ClassifierSettings, {"pool": "mean"}, "pool", "'mean'"),
        (ClassifierSettings, {"num_head_channels": None}, "num_head_channels", "None"),
        (ClassifierSettings, {"num_classes": 0}, "num_classes", "0"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused_with_the_argument_and_its_value(cls, changes, name, value):
    with refused(f"`{name}`", value):
        cls(**{**(SMALL if cls is UNetSettings else SMALL_CLASSIFIER), **changes})


@pytest.mark.parametrize("size", sorted(DEFAULT_CHANNEL_MULT))
def test_adms_multipliers_are_filled_in_by_image_size(size):
    settings = UNetSettings(image_size=size)
    assert settings.channel_mult == DEFAULT_CHANNEL_MULT[size]
    assert settings.resolutions[-1] == 8
    assert len(settings.widths) == len(settings.resolutions)


def test_widths_and_resolutions_go_from_the_finest_level_to_the_coarsest():
    settings = UNetSettings(image_size=32, num_channels=64, channel_mult=(0.5, 1, 4))
    assert settings.widths == (32, 64, 256)
    assert settings.resolutions == (32, 16, 8)


def test_channels_per_head_take_precedence_over_the_number_of_heads():
    assert UNetSettings(**SMALL, num_heads=2).num_heads_for(64) == 2
    assert UNetSettings(**SMALL, num_heads=3, num_head_channels=16).num_heads_for(64) == 4


def test_heads_need_only_divide_widths_that_have_attention():
    assert UNetSettings(**{**SMALL, "channel_mult": (1, 2, 3)}, num_heads=3, attention_resolutions=(8,)).num_heads == 3


@pytest.mark.parametrize(("cls", "base"), [(UNetSettings, SMALL), (ClassifierSettings, SMALL_CLASSIFIER)])
def test_settings_are_frozen_keyword_only_and_hashable_also_from_lists(cls, base):
    tuples = {"channel_mult": (1, 2, 2), "attention_resolutions": (16, 8)}
    settings = cls(**{**base, **{name: list(value) for name, value in tuples.items()}})
    assert settings == cls(**{**base, **tuples})
    assert hash(settings)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.image_size = 64
    with pytest.raises(TypeError, match="positional"):
        cls(32)


@pytest.mark.parametrize("site", ["output.9", "input.0", "input.3", "output", "", "Middle"])
def test_a_block_without_attention_is_refused_and_the_sites_are_listed(site):
    settings = UNetSettings(**SMALL, attention_resolutions=(8,), num_res_blocks=1)
    with refused("`site`", "input.5 (8x8), middle (8x8), output.0 (8x8), output.1 (8x8)", repr(site)):
        settings.require_site(site)


def test_heads_of_the_sag_release_must_divide_the_width_of_the_site():
    settings = UNetSettings(**SMALL, attention_resolutions=(8,), num_heads=3, num_head_channels=32)
    settings.require_site("middle")
    with pytest.raises(UserError, match=r"`heads`.*`num_heads`.*64"):
        settings.require_site("middle", "sag_release")
