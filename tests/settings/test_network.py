import dataclasses

import pytest
import torch

from sagl.errors import UserError
from sagl.models.adm import AttentionBlock, UNet
from sagl.models.zoo import RELEASED
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
    assert UNetSettings(**SMALL, num_heads=2).num_heads_for(64) == 2
    assert UNetSettings(**SMALL, num_heads=3, num_head_channels=16).num_heads_for(64) == 4


def test_heads_need_only_divide_widths_that_have_attention():
    assert UNetSettings(**{**SMALL, "channel_mult": (1, 2, 3)}, num_heads=3, attention_resolutions=(8,)).num_heads == 3


@pytest.mark.parametrize(("kind", "more"), [(UNetSettings, {}), (ClassifierSettings, {"num_head_channels": 32})])
def test_lists_as_json_has_them_become_tuples(kind, more):
    tuples = {"channel_mult": (1, 2, 2), "attention_resolutions": (16, 8)}
    lists = {name: list(value) for name, value in tuples.items()}
    made = kind(**{**SMALL, **more, **lists})
    assert made == kind(**{**SMALL, **more, **tuples})
    assert hash(made)


@pytest.mark.parametrize("made", [UNetSettings(**SMALL), ClassifierSettings(**SMALL, num_head_channels=32)])
def test_settings_are_frozen_and_keyword_only(made):
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.image_size = 64
    with pytest.raises(TypeError, match="positional"):
        type(made)(32)


# ------------------------------------------------------------------------------------------------------- sites

UNETS = {name: entry.settings for name, entry in RELEASED.items() if isinstance(entry.settings, UNetSettings)}
UNETS |= {
    "middle alone": UNetSettings(**SMALL, attention_resolutions=()),
    "every level": UNetSettings(**SMALL, attention_resolutions=(32, 16, 8), num_res_blocks=1),
    "the finest": UNetSettings(**SMALL, attention_resolutions=(32,), num_res_blocks=3),
    "resampling blocks": UNetSettings(**SMALL, attention_resolutions=(16,), resblock_updown=True),
    "one level": UNetSettings(image_size=8, num_channels=32, channel_mult=(1,), attention_resolutions=(8,)),
}


@pytest.mark.parametrize("name", UNETS)
def test_sites_are_the_blocks_of_the_network_that_hold_attention_in_their_order(name):
    with torch.device("meta"):
        network = UNet(UNETS[name])
    stages = [*network.input_blocks, network.middle_block, *network.output_blocks]
    held = [stage.name for stage in stages if any(isinstance(layer, AttentionBlock) for layer in stage)]
    assert list(UNETS[name].sites) == held


@pytest.mark.parametrize("name", [name for name in UNETS if name not in RELEASED])
def test_a_site_tells_the_side_of_the_feature_maps_that_its_attention_sees(name):
    network, seen = UNet(UNETS[name]), {}
    for stage in (*network.input_blocks, network.middle_block, *network.output_blocks):
        for layer in stage:
            if isinstance(layer, AttentionBlock):
                layer.register_forward_pre_hook(lambda _, args, at=stage.name: seen.update({at: args[0].shape[-1]}))
    side = UNETS[name].image_size
    with torch.no_grad():
        network(torch.zeros(1, 3, side, side), torch.tensor([0]))
    assert seen == UNETS[name].sites


@pytest.mark.parametrize("site", ["output.9", "input.0", "input.3", "output", "", "Middle"])
def test_a_block_without_attention_is_no_site_and_the_sites_are_listed(site):
    settings = UNetSettings(**SMALL, attention_resolutions=(8,), num_res_blocks=1)
    with pytest.raises(UserError) as error:
        settings.require_site(site)
    listed = "input.5 (8x8), middle (8x8), output.0 (8x8), output.1 (8x8)"
    assert f"`site` must be a block with attention: {listed}; got {site!r}" in str(error.value)


@pytest.mark.parametrize("heads", ["layer", "sag_release"])
@pytest.mark.parametrize("name", UNETS)
def test_every_site_can_be_asked_for_where_num_heads_divides_the_widths(name, heads):
    for site in UNETS[name].sites:
        UNETS[name].require_site(site, heads)


def test_heads_sag_release_must_divide_the_width_of_the_site():
    settings = UNetSettings(**SMALL, attention_resolutions=(8,), num_heads=3, num_head_channels=32)
    settings.require_site("middle")
    with pytest.raises(UserError, match=r"`heads`.*`num_heads`.*64"):
        settings.require_site("middle", "sag_release")
