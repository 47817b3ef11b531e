import copy
import inspect
import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import UNet2DModel

from sagl.errors import UserError
from sagl.models.adm import UNet
from sagl.models.checkpoints import NetworkWeights, build_network
from sagl.models.diffusers import (
    CONFIG,
    DEFAULTS,
    REQUIRED,
    SAGL_KEY,
    WEIGHTS,
    from_diffusers,
    read_diffusers,
    to_diffusers,
    write_diffusers,
)
from sagl.models.zoo import RELEASED
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import UNetSettings
from tests.helpers.errors import refused
from tests.helpers.networks import draw_weights, small_classifier
from tests.helpers.reference_values import KEY_LISTS, relative_error
from tests.models.test_zoo import KEY_LIST_OF, UNETS

EXACT = 1e-13
"""Relative error, due to the rounding of ADM's output to float32."""

SMALL = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2)}
SMALL |= {"attention_resolutions": (16, 8), "num_head_channels": 16}
VARIANTS = {
    "legacy_order": {},
    "new_order": {"use_new_attention_order": True},
    "classes": {"num_classes": 5},
    "null_label": {"num_classes": 5, "null_label": True},
    "added_timestep": {"use_scale_shift_norm": False},
    "residual_resampling": {"resblock_updown": True},
    "fixed_variance": {"learn_sigma": False},
    "grey": {"in_channels": 1},
    "grey_fixed_variance": {"in_channels": 1, "learn_sigma": False},
    "fractions": {"num_channels": 64, "channel_mult": (1, 1.5, 0.5), "num_head_channels": 32},
    "odd": {"channel_mult": (1, 3, 2), "image_size": 32, "num_res_blocks": 2},
    "attention_on_the_fine_level": {"attention_resolutions": (16,)},
    "attention_on_the_coarse_level": {"attention_resolutions": (8,), "resblock_updown": True},
    "attention_between": {"channel_mult": (1, 2, 2), "attention_resolutions": (8,), "resblock_updown": True},
    "attention_in_the_middle_alone": {"attention_resolutions": (), "resblock_updown": True},
    "plain_without_attention": {"attention_resolutions": (), "use_scale_shift_norm": False},
    "one_level": {"channel_mult": (1,), "attention_resolutions": (16,), "resblock_updown": True},
    "one_width_of_heads": {"num_head_channels": None, "num_heads": 4, "attention_resolutions": (8,)},
    "one_head": {"num_head_channels": None, "num_heads": 1},
    "heads_of_a_way_up_without_attention": {
        "num_head_channels": None,
        "num_heads_upsample": 2,
        "attention_resolutions": (),
    },
    "dropout_and_checkpoints": {"dropout": 0.1, "use_checkpoint": True, "num_heads": 2},
    "much": {"use_new_attention_order": True, "resblock_updown": True, "num_classes": 3, "num_res_blocks": 3},
}
FOREIGN = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
}
"""A network of diffusers with defaults for all other keys."""


@cache
def adm(name="legacy_order"):
    """A UNet with random weights."""
    return draw_weights(UNet(UNetSettings(**{**SMALL, **VARIANTS[name]})), 1).requires_grad_(False)


def unet2d(config, state):
    """diffusers' network with these weights, strictly loaded."""
    model = UNet2DModel.from_config(config)
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)


def foreign(**changes):
    """A `UNet2DModel` not written by sagl, with random weights."""
    return draw_weights(UNet2DModel(**{**FOREIGN, **changes}), 1).requires_grad_(False)


def outputs(net, settings, labels="drawn"):
    """Prediction of a network of either kind in float64: in float32 the two are rounded differently, by up to 2e-6."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, settings.in_channels, settings.image_size, settings.image_size, generator=g)
    rows = (settings.num_classes or 0) + settings.null_label
    if labels == "drawn":
        labels = torch.tensor([0, rows - 1]) if rows else None
    converted = copy.deepcopy(net).double()(x.double(), torch.tensor([3, 777]), labels)
    return (converted.out.double() if isinstance(net, UNet) else converted.sample).detach()


def equal(converted, expected):
    """Whether two state dicts have the same names and bytes."""
    return converted.keys() == expected.keys() and all(
        torch.equal(converted[name], tensor) for name, tensor in expected.items()
    )


def weights_of(net, **options):
    options = {"diffusion": DiffusionSettings(), **options}
    return NetworkWeights(model_settings=net.settings, state_dict=net.state_dict(), **options)


@pytest.mark.parametrize("name", VARIANTS)
def test_diffusers_computes_the_same_and_the_conversion_back_is_exact(name):
    net = adm(name)
    config, state = to_diffusers(net.settings, net.state_dict())
    assert relative_error(outputs(unet2d(config, state), net.settings), outputs(net, net.settings)) < EXACT
    settings, back = from_diffusers(config, state)
    assert settings == net.settings
    assert equal(back, net.state_dict())


@pytest.mark.parametrize("name", ["legacy_order", "new_order", "null_label", "one_width_of_heads", "one_head", "much"])
def test_without_sagls_settings_the_function_comes_back_in_the_new_order(name):
    net = adm(name)
    config, state = to_diffusers(net.settings, net.state_dict())
    settings, back = from_diffusers({key: config[key] for key in config if key != SAGL_KEY}, state)
    assert settings.use_new_attention_order
    built = build_network(NetworkWeights(model_settings=settings, diffusion=DiffusionSettings(), state_dict=back))
    assert relative_error(outputs(built, settings), outputs(net, net.settings)) < EXACT
    assert equal(back, net.state_dict()) == (name in ("new_order", "one_head", "much"))  # one head: the orders agree
    assert equal(to_diffusers(settings, back)[1], state)


def test_the_null_label_is_the_last_class_of_diffusers():
    net = adm("null_label")
    model = unet2d(*to_diffusers(net.settings, net.state_dict()))
    last, none = outputs(model, net.settings, torch.tensor([5, 5])), outputs(net, net.settings, None)
    assert relative_error(last, none) < EXACT


@pytest.mark.parametrize("name", UNETS)
def test_released_networks_have_the_parameters_of_a_unet2d_or_are_refused(name):
    settings, shapes = RELEASED[name].settings, KEY_LISTS[KEY_LIST_OF[name]]
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
        if name in ("imagenet128", "imagenet512"):  # heads of many widths; a first level half as wide
            with pytest.raises(UserError, match="`num_heads`" if name == "imagenet128" else "`channel_mult`"):
                to_diffusers(settings, state)
            return
        config, converted = to_diffusers(settings, state)
        expected = UNet2DModel.from_config(config).state_dict()
    assert {key: t.shape for key, t in converted.items()} == {key: t.shape for key, t in expected.items()}
    original, back = from_diffusers(config, converted)
    assert original == settings
    assert {key: list(t.shape) for key, t in back.items()} == dict(shapes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_head_channels": None}, ("`num_heads`", "8, 16 channels", "num_heads=4", "attention_head_dim")),
        (
            {"num_head_channels": None, "attention_resolutions": (8,), "num_heads_upsample": 8},
            ("`num_heads`", "8, 16 channels", "num_heads_upsample=8"),
        ),
        ({"num_channels": 64, "channel_mult": (0.5, 1)}, ("`channel_mult`", "must begin with 1", "(0.5, 1)")),
    ],
)
def test_a_network_that_diffusers_cannot_express_is_refused(changes, named):
    net = UNet(UNetSettings(**{**SMALL, **changes}))
    with refused(*named, "format"):
        to_diffusers(net.settings, net.state_dict())


def test_parameters_of_other_settings_are_refused():
    with pytest.raises(UserError, match=r"parameters differ: input_blocks\.1\.1\.norm\.bias"):
        to_diffusers(replace(adm().settings, channel_mult=(1,), attention_resolutions=()), adm().state_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "attention_head_dim": None,
            "down_block_types": ("AttnDownBlock2D",) * 2,
            "up_block_types": ("AttnUpBlock2D",) * 2,
        },
        {"num_class_embeds": 4, "out_channels": 6},
        {"in_channels": 1, "out_channels": 1, "sample_size": (16, 16), "time_embedding_dim": 128},
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32, "act_fn": "swish"},
        {"downsample_type": "resnet", "upsample_type": "resnet", "downsample_padding": 0}
        | {"down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D")}
        | {"up_block_types": ("ResnetUpsampleBlock2D", "UpBlock2D")},
    ],
)
def test_a_folder_that_diffusers_saved_computes_the_same(changes, tmp_path):
    model = foreign(**changes)
    model.register_to_config(power=0.75)  # diffusers' average of weights notes such things
    model.save_pretrained(tmp_path)
    file = read_diffusers(tmp_path)
    settings = file.model_settings
    assert relative_error(outputs(build_network(file), settings), outputs(model, settings)) < EXACT
    variance = "learned_range" if changes.get("out_channels") == 6 else "fixed_small"
    assert (file.diffusion, file.recommended) == (DiffusionSettings(variance=variance), {})


def test_keys_that_a_configuration_leaves_out_are_at_diffusers_defaults():
    public = inspect.signature(UNet2DModel.__init__).parameters
    ours = {key: allowed[0] for key, allowed in REQUIRED.items()} | DEFAULTS
    assert ours == {key: public[key].default for key in ours}
    assert public.keys() - ours.keys() == {"self", "num_train_timesteps"}  # of a learned embedding alone
    model = foreign()
    settings, _ = from_diffusers(FOREIGN, model.state_dict())
    assert settings == from_diffusers(model.config, model.state_dict())[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "UNet2DConditionModel"),
        ("center_input_sample", True),
        ("time_embedding_type", "fourier"),
        ("time_embedding_dim", 64),
        ("freq_shift", 1),
        ("flip_sin_to_cos", False),
        ("mid_block_type", None),
        ("mid_block_scale_factor", 1.4),
        ("downsample_padding", 0),
        ("act_fn", "gelu"),
        ("norm_num_groups", 16),
        ("norm_eps", 1e-6),
        ("add_attention", False),
        ("class_embed_type", "timestep"),
        ("out_channels", 4),
        ("resnet_time_scale_shift", "spatial"),
        ("attn_norm_num_groups", 8),
        ("downsample_type", "fir"),
        ("sample_size", None),
        ("sample_size", (16, 24)),
        ("down_block_types", ("DownBlock2D", "AttnSkipDownBlock2D")),
        ("down_block_types", ("DownBlock2D",)),
        ("down_block_types", ("ResnetDownsampleBlock2D", "AttnDownBlock2D")),
        ("up_block_types", ("UpBlock2D", "AttnUpBlock2D")),
    ],
)
def test_a_value_that_adm_cannot_express_is_refused_by_its_key(key, value):
    with pytest.raises(UserError, match=key):
        from_diffusers({**FOREIGN, key: value}, {})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups"),  # its middle would not normalise
        ({"upsample_type": "resnet"}, "down_block_types"),
        ({"sample_size": 15}, "`image_size` .*15"),
        ({"block_out_channels": (40, 64)}, r"`num_channels` .*\(40, 64\)"),
        ({"attention_head_dim": 48}, "`num_head_channels` .*48"),
        ({"block_out_channels": []}, "`config`"),
        ({"block_out_channels": (0, 0)}, "`config`"),
        ({"block_out_channels": (32.5, 65)}, "`num_channels` .*32.5"),
        ({"down_block_types": None}, "`config`"),
        ({"up_block_types": [["UpBlock2D"], "UpBlock2D"]}, "`config`"),
        ({"sample_size": 16.0}, "`config`"),
        ({"layers_per_block": 1.5}, "`num_res_blocks` .*1.5"),
        ({"in_channels": None}, "`config`"),
        ({"num_class_embeds": 2.5}, "`num_classes` .*2.5"),
        ({"attention_head_dim": "8"}, "`config`"),
        ({"dropout": "none"}, "`config`"),
    ],
)
def test_values_of_other_types_or_that_contradict_another_key_are_refused(change, named):
    with pytest.raises(UserError, match=named):
        from_diffusers(FOREIGN | change, {})


def test_widths_come_back_where_their_quotient_is_rounded_down():
    widths = (352, 480)
    assert int(480 / 352 * 352) == 479
    with torch.device("meta"):
        state = UNet2DModel(**{**FOREIGN, "block_out_channels": widths}).state_dict()
    assert from_diffusers({**FOREIGN, "block_out_channels": widths}, state)[0].widths == widths


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_in.weight": None}, "1 parameters differ: conv_in.weight: settings (32, 3, 3, 3)"),
        ({f"skip.{k}": torch.zeros(1) for k in range(9)}, "9 parameters differ: skip.0: "),
        ({"conv_in.bias": torch.zeros(1, 32)}, "conv_in.bias: settings (32,), file (1, 32)"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(change, message):
    state = {name: tensor for name, tensor in (foreign().state_dict() | change).items() if tensor is not None}
    with refused(message):
        from_diffusers(FOREIGN, state)


@pytest.mark.parametrize("name", ["null_label", "new_order"])
def test_a_folder_keeps_all_settings_also_when_diffusers_saves_it(name, tmp_path):
    recommended = {"sampler": "ddim", "sag": {"scale": 0.3, "interval": [0.25, 1]}}
    diffusion = DiffusionSettings(noise_schedule="cosine", num_timesteps=400, variance="fixed_large")
    file = weights_of(adm(name), diffusion=diffusion, recommended=recommended)
    write_diffusers(file, tmp_path / "new" / "a")
    assert sorted(path.name for path in (tmp_path / "new").rglob("*")) == ["a", CONFIG, WEIGHTS]
    model, report = UNet2DModel.from_pretrained(tmp_path / "new" / "a", output_loading_info=True)
    assert not any(report.values())
    model.save_pretrained(tmp_path / "b")
    for folder in (tmp_path / "new" / "a", tmp_path / "b"):
        converted = read_diffusers(folder)
        settings = converted.model_settings
        assert (settings, converted.diffusion, converted.recommended) == (file.model_settings, diffusion, recommended)
        assert equal(converted.state_dict, file.state_dict)
    assert relative_error(outputs(build_network(converted), settings), outputs(model.eval(), settings)) < EXACT


def test_diffusion_settings_of_the_call_are_used_for_folders_without_sagls(tmp_path):
    cosine, linear = DiffusionSettings(noise_schedule="cosine"), DiffusionSettings()
    foreign().save_pretrained(tmp_path / "theirs")
    write_diffusers(weights_of(adm()), tmp_path / "ours")
    assert read_diffusers(tmp_path / "theirs", cosine).diffusion == cosine
    assert read_diffusers(tmp_path / "ours", cosine).diffusion == linear


def test_diffusers_does_not_warn_of_sagls_key(tmp_path, caplog):
    write_diffusers(weights_of(adm()), tmp_path / "a")
    with caplog.at_level("WARNING", logger="diffusers"):
        UNet2DModel.from_pretrained(tmp_path / "a", low_cpu_mem_usage=False)
    assert caplog.messages == []


def test_a_classifier_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"`checkpoint` .*classifier"):
        write_diffusers(weights_of(small_classifier()), tmp_path / "a")


def test_half_precision_stays_half(tmp_path):
    write_diffusers(weights_of(copy.deepcopy(adm()).half()), tmp_path / "a")
    assert {tensor.dtype for tensor in read_diffusers(tmp_path / "a").state_dict.values()} == {torch.float16}


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_or_damaged_file_is_refused(name, tmp_path):
    write_diffusers(weights_of(adm()), tmp_path / "a")
    path = tmp_path / "a" / name
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(UserError, match=r"`checkpoint` .*damaged"):
        read_diffusers(tmp_path / "a")
    path.unlink()
    with pytest.raises(UserError, match=f"`checkpoint` .*no {name}"):
        read_diffusers(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout": 0.5}, r"`dropout` .*_sagl, 0.0, got 0.5"),
        ({SAGL_KEY: {}}, "`_sagl`"),
        ({SAGL_KEY: {"network": {"depth": 3}}}, "`_sagl`"),
        ({SAGL_KEY: {"network": SMALL, "diffusion": None}}, "`_sagl`"),
        ({SAGL_KEY: {"network": SMALL, "diffusion": {"num_timesteps": 99.5}}}, "`num_timesteps` .*99.5"),
        ({SAGL_KEY: {"network": SMALL, "recommended": [1]}}, r"`recommended` .*\[1\]"),
    ],
)
def test_settings_of_sagl_that_are_invalid_or_contradict_other_keys_are_refused(change, message, tmp_path):
    write_diffusers(weights_of(adm()), tmp_path / "a")
    path = tmp_path / "a" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        read_diffusers(tmp_path / "a")
