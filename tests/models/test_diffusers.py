import copy
import inspect
import json
import os
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sagl.errors import UserError
from sagl.models.adm import UNet
from sagl.models.checkpoints import Checkpoint, build_network, write_checkpoint
from sagl.models.diffusers import (
    CONFIG,
    FIXED,
    FREE,
    OWN_KEY,
    WEIGHTS,
    from_diffusers,
    read_diffusers,
    to_diffusers,
    write_diffusers,
)
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import UNetSettings
from tests.helpers.reference import KEY_LISTS, draw_weights, relative_error, small_classifier
from tests.models.test_adm import RELEASED

EXACT = 1e-13
"""Of the largest value: the rounding of ADM's answer to float32."""

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
"""A network as diffusers' own training would make it: every other key at its default."""
NOTED = {"network": SMALL}
"""What sagl notes of the first variant."""


@cache
def adm(name="legacy_order"):
    """A UNet with drawn weights."""
    return draw_weights(UNet(UNetSettings(**{**SMALL, **VARIANTS[name]})), 1).requires_grad_(False)


def unet2d(config, state):
    """diffusers' network with these weights, strictly loaded."""
    model = UNet2DModel.from_config(config)
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)


def foreign(**changes):
    """A `UNet2DModel` of somebody else, with drawn weights."""
    return draw_weights(UNet2DModel(**{**FOREIGN, **changes}), 1).requires_grad_(False)


def outputs(net, settings, labels="drawn"):
    """What a network of either kind predicts, in float64: in float32 the two round differently, by up to 2e-6."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, settings.in_channels, settings.image_size, settings.image_size, generator=g)
    rows = (settings.num_classes or 0) + settings.null_label
    if labels == "drawn":
        labels = torch.tensor([0, rows - 1]) if rows else None
    found = copy.deepcopy(net).double()(x.double(), torch.tensor([3, 777]), labels)
    return (found.out.double() if isinstance(net, UNet) else found.sample).detach()


def equal(found, want):
    """Whether two state dicts have the same names and bytes."""
    return found.keys() == want.keys() and all(torch.equal(found[name], tensor) for name, tensor in want.items())


def network_file(net, **options):
    return Checkpoint(
        model_settings=net.settings,
        diffusion=options.pop("diffusion", DiffusionSettings()),
        state_dict=net.state_dict(),
        **options,
    )


# ----------------------------------------------------------------------------------------------- to diffusers


@pytest.mark.parametrize("name", VARIANTS)
def test_diffusers_computes_what_adm_computes_and_the_way_back_loses_nothing(name):
    net = adm(name)
    config, state = to_diffusers(net.settings, net.state_dict())
    got, want = outputs(unet2d(config, state), net.settings), outputs(net, net.settings)
    assert relative_error(got, want) < EXACT
    settings, back = from_diffusers(config, state)
    assert settings == net.settings
    assert equal(back, net.state_dict())


@pytest.mark.parametrize("name", ["legacy_order", "new_order", "null_label", "one_width_of_heads", "one_head", "much"])
def test_without_sagls_note_the_function_comes_back_in_the_new_order(name):
    net = adm(name)
    config, state = to_diffusers(net.settings, net.state_dict())
    settings, back = from_diffusers({key: config[key] for key in config if key != OWN_KEY}, state)
    assert settings.use_new_attention_order
    built = build_network(Checkpoint(model_settings=settings, diffusion=DiffusionSettings(), state_dict=back))
    assert relative_error(outputs(built, settings), outputs(net, net.settings)) < EXACT
    assert equal(back, net.state_dict()) == (name in ("new_order", "one_head", "much"))  # one head: the orders agree
    assert equal(to_diffusers(settings, back)[1], state)


def test_the_null_label_is_the_last_class_of_diffusers():
    net = adm("null_label")
    model = unet2d(*to_diffusers(net.settings, net.state_dict()))
    last, none = outputs(model, net.settings, torch.tensor([5, 5])), outputs(net, net.settings, None)
    assert relative_error(last, none) < EXACT


@pytest.mark.parametrize("name", sorted(name for name in RELEASED if not name.startswith("classifier")))
def test_released_networks_have_just_the_parameters_of_a_unet2d_or_are_refused(name):
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in KEY_LISTS[name].items()}
        if name in ("imagenet128", "imagenet512"):  # heads of many widths; a first level half as wide
            with pytest.raises(UserError, match="`num_heads`" if name == "imagenet128" else "`channel_mult`"):
                to_diffusers(RELEASED[name], state)
            return
        config, found = to_diffusers(RELEASED[name], state)
        want = UNet2DModel.from_config(config).state_dict()
    assert {key: t.shape for key, t in found.items()} == {key: t.shape for key, t in want.items()}
    settings, back = from_diffusers(config, found)
    assert settings == RELEASED[name]
    assert {key: list(t.shape) for key, t in back.items()} == dict(KEY_LISTS[name])


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
    with pytest.raises(UserError) as error:
        to_diffusers(net.settings, net.state_dict())
    assert [part for part in (*named, "own format") if part not in str(error.value)] == []


def test_parameters_of_other_settings_are_refused():
    net = adm()
    with pytest.raises(UserError, match=r"parameters differ: input_blocks\.1\.1\.norm\.bias: settings have none"):
        to_diffusers(replace(net.settings, channel_mult=(1,), attention_resolutions=()), net.state_dict())


# --------------------------------------------------------------------------------------------- from diffusers


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
    assert (
        relative_error(outputs(build_network(file), file.model_settings), outputs(model, file.model_settings)) < EXACT
    )
    variance = "learned_range" if changes.get("out_channels") == 6 else "fixed_small"
    assert (file.diffusion, file.recommended) == (DiffusionSettings(variance=variance), {})


def test_keys_that_a_configuration_leaves_out_are_at_diffusers_defaults():
    theirs = inspect.signature(UNet2DModel.__init__).parameters
    ours = {key: allowed[0] for key, allowed in FIXED.items()} | FREE
    assert ours == {key: theirs[key].default for key in ours}
    assert theirs.keys() - ours.keys() == {"self", "num_train_timesteps"}  # of a learned embedding alone
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
        ("resnet_time_scale_shift", "scale_shift"),  # its middle would not normalise
        ("attn_norm_num_groups", 8),
        ("downsample_type", "fir"),
        ("upsample_type", "resnet"),
        ("sample_size", None),
        ("sample_size", (16, 24)),
        ("sample_size", 15),
        ("block_out_channels", (40, 64)),
        ("attention_head_dim", 48),
        ("down_block_types", ("DownBlock2D", "AttnSkipDownBlock2D")),
        ("down_block_types", ("DownBlock2D",)),
        ("down_block_types", ("ResnetDownsampleBlock2D", "AttnDownBlock2D")),
        ("up_block_types", ("UpBlock2D", "AttnUpBlock2D")),
    ],
)
def test_what_adm_cannot_express_is_refused_with_key_and_value(key, value):
    with pytest.raises(UserError) as error:
        from_diffusers({**FOREIGN, key: value}, {})
    assert "\n" not in str(error.value)
    other = {("upsample_type", "resnet"): "down_block_types", ("sample_size", 15): "image_size"}
    other |= {("resnet_time_scale_shift", "scale_shift"): "attn_norm_num_groups"}
    other |= {("block_out_channels", (40, 64)): "(40, 64)", ("attention_head_dim", 48): "48"}
    assert other.get((key, value), key) in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_out_channels", []),
        ("block_out_channels", None),
        ("block_out_channels", (0, 0)),
        ("block_out_channels", (32.5, 65)),
        ("down_block_types", None),
        ("up_block_types", [["UpBlock2D"], "UpBlock2D"]),
        ("sample_size", 16.0),
        ("layers_per_block", 1.5),
        ("in_channels", None),
        ("num_class_embeds", 2.5),
        ("attention_head_dim", "8"),
        ("dropout", "none"),
    ],
)
def test_values_that_no_unet2d_has_are_refused_in_one_line(key, value):
    with pytest.raises(UserError, match=r"`.+` .*must be") as error:
        from_diffusers({**FOREIGN, key: value}, {})
    assert "\n" not in str(error.value)


def test_widths_come_back_where_their_quotient_is_rounded_down():
    widths = (352, 480)
    assert int(480 / 352 * 352) == 479
    with torch.device("meta"):
        state = UNet2DModel(**{**FOREIGN, "block_out_channels": widths}).state_dict()
    assert from_diffusers({**FOREIGN, "block_out_channels": widths}, state)[0].widths == widths


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_in.weight": None}, "1 parameters differ: conv_in.weight: settings (32, 3, 3, 3), file has none"),
        ({"mid_block.attentions.0.to_k.bias": None}, "mid_block.attentions.0.to_k.bias: settings (64,), file has none"),
        ({f"skip.{k}": torch.zeros(1) for k in range(9)}, "9 parameters differ: skip.0: settings have none, file (1,)"),
        ({"conv_in.bias": torch.zeros(1, 32)}, "conv_in.bias: settings (32,), file (1, 32). If an older diffusers"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(change, message):
    state = {name: tensor for name, tensor in (foreign().state_dict() | change).items() if tensor is not None}
    with pytest.raises(UserError) as error:
        from_diffusers(FOREIGN, state)
    assert message in str(error.value)


# ---------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("name", ["null_label", "new_order"])
def test_a_folder_keeps_everything_also_through_diffusers_own_saving(name, tmp_path):
    advice = {"sampler": "ddim", "sag": {"scale": 0.3, "interval": [0.25, 1]}}
    diffusion = DiffusionSettings(noise_schedule="cosine", num_timesteps=400, variance="fixed_large")
    file = network_file(adm(name), diffusion=diffusion, recommended=advice)
    write_diffusers(file, tmp_path / "new" / "a")
    assert sorted(path.name for path in (tmp_path / "new").rglob("*")) == ["a", CONFIG, WEIGHTS]
    model, report = UNet2DModel.from_pretrained(tmp_path / "new" / "a", output_loading_info=True)
    assert not any(report.values())
    model.save_pretrained(tmp_path / "b")
    for folder in (tmp_path / "new" / "a", tmp_path / "b"):
        found = read_diffusers(folder)
        assert (found.model_settings, found.diffusion, found.recommended) == (file.model_settings, diffusion, advice)
        assert equal(found.state_dict, file.state_dict)
    assert (
        relative_error(outputs(build_network(found), found.model_settings), outputs(model.eval(), found.model_settings))
        < EXACT
    )


def test_a_process_that_is_given_counts_where_sagl_noted_none(tmp_path):
    cosine, linear = DiffusionSettings(noise_schedule="cosine"), DiffusionSettings()
    foreign().save_pretrained(tmp_path / "theirs")
    write_diffusers(network_file(adm()), tmp_path / "ours")
    assert read_diffusers(tmp_path / "theirs", cosine).diffusion == cosine
    assert read_diffusers(tmp_path / "ours", cosine).diffusion == linear


def test_diffusers_says_nothing_of_sagls_note(tmp_path, caplog):
    write_diffusers(network_file(adm()), tmp_path / "a")
    with caplog.at_level("WARNING", logger="diffusers"):
        UNet2DModel.from_pretrained(tmp_path / "a", low_cpu_mem_usage=False)
    assert caplog.messages == []


def test_a_classifier_is_refused(tmp_path):
    net = small_classifier()
    file = Checkpoint(model_settings=net.settings, diffusion=DiffusionSettings(), state_dict=net.state_dict())
    with pytest.raises(UserError, match="this one is a classifier"):
        write_diffusers(file, tmp_path / "a")


def test_half_precision_stays_half(tmp_path):
    write_diffusers(network_file(copy.deepcopy(adm()).half()), tmp_path / "a")
    assert {tensor.dtype for tensor in read_diffusers(tmp_path / "a").state_dict.values()} == {torch.float16}


def test_a_folder_in_use_is_left_alone_and_an_empty_one_is_filled(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    for taken in (tmp_path / "used", tmp_path / "used" / "notes.txt"):
        with pytest.raises(UserError, match=r"`target` must be a new or an empty folder, and .* is in use"):
            write_diffusers(network_file(adm()), taken)
    assert [path.read_text() for path in (tmp_path / "used").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    write_diffusers(network_file(adm()), tmp_path / "empty")
    assert read_diffusers(tmp_path / "empty").model_settings == adm().settings


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full_disk(state, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("sagl.models.checkpoints.save_file", full_disk)
    for write, name in ((write_diffusers, "a"), (write_checkpoint, "a.safetensors")):
        with pytest.raises(UserError) as error:
            write(network_file(adm()), tmp_path / name)
        said = f"`target` {tmp_path / name} cannot be written: No space left on device. Make room"
        assert str(error.value).startswith(said)
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_folder_are_on_the_disk_before_it_has_its_name_and_others_may_read_them(tmp_path, monkeypatch):
    done, replace_file = [], os.replace
    monkeypatch.setattr("os.fsync", lambda descriptor: done.append(os.fstat(descriptor).st_size))
    monkeypatch.setattr("os.replace", lambda old, new: [done.append(new), replace_file(old, new)])
    before = os.umask(0o022)
    try:
        write_diffusers(network_file(adm()), tmp_path / "a")
    finally:
        os.umask(before)
    files = list((tmp_path / "a").iterdir())
    assert {file.stat().st_mode & 0o777 for file in files} == {0o644}
    assert sorted(done[:2]) == sorted(file.stat().st_size for file in files)
    assert done[2:] == [tmp_path / "a"]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_or_damaged_file_is_refused(name, tmp_path):
    write_diffusers(network_file(adm()), tmp_path / "a")
    path = tmp_path / "a" / name
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(UserError, match="`checkpoint` must be a folder with whole files"):
        read_diffusers(tmp_path / "a")
    path.unlink()
    with pytest.raises(UserError, match=f"has no {name}. UNet2DModel.save_pretrained"):
        read_diffusers(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"dropout": 0.5},
            r"`dropout` of the configuration must be what sagl noted in _sagl, 0.0, got 0.5. Delete _sagl",
        ),
        ({OWN_KEY: {}}, "`_sagl` of the configuration must be what sagl notes there"),
        ({OWN_KEY: {"network": {"depth": 3}}}, "`_sagl` of the configuration must be what sagl notes there"),
        ({OWN_KEY: NOTED | {"diffusion": None}}, "`_sagl` of the configuration must be what sagl notes there"),
        ({OWN_KEY: NOTED | {"diffusion": {"num_timesteps": 99.5}}}, "`num_timesteps` must be an integer"),
        ({OWN_KEY: NOTED | {"recommended": [1]}}, "`recommended` must be a mapping"),
        ({OWN_KEY: NOTED | {"recommended": "abc"}}, "`recommended` must be a mapping"),
    ],
)
def test_a_note_that_the_other_keys_contradict_or_that_is_unreadable_is_refused(change, message, tmp_path):
    write_diffusers(network_file(adm()), tmp_path / "a")
    path = tmp_path / "a" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        read_diffusers(tmp_path / "a")


def test_weights_of_another_network_are_refused(tmp_path):
    write_diffusers(network_file(adm()), tmp_path / "a")
    state = load_file(tmp_path / "a" / WEIGHTS)
    state["class_embedding.weight"] = torch.zeros(3, 128)
    save_file(state, tmp_path / "a" / WEIGHTS)
    with pytest.raises(UserError, match=r"1 parameters differ: class_embedding\.weight: settings have none"):
        read_diffusers(tmp_path / "a")
