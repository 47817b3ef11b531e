import pytest
import yaml

from sagl.configuration.sample import parse_sample_config
from sagl.errors import UserError
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.sampling import RunSettings, SamplerSettings
from tests.helpers.networks import write_grey_unet

RECOMMENDED = {"sampler": "ddim", "respacing": "3", "sag": {"scale": 0.4, "site": "output.1"}}


@pytest.mark.parametrize(
    ("flags", "scale", "respacing"),
    [(["--sag.scale", "0.1"], 0.1, "3"), (["--respacing", "5"], 0.4, "5"), (["--sag.scale", "0"], 0.0, "3")],
)
def test_a_flag_goes_before_the_recommendation_of_the_file_and_leaves_the_rest(flags, scale, respacing, tmp_path):
    network = write_grey_unet(tmp_path / "tiny.safetensors", recommended=RECOMMENDED)
    config = parse_sample_config(["--checkpoint", str(network), *flags])
    assert (config.guidances["sag"].scale, config.guidances["sag"].site) == (scale, "output.1")
    assert (config.sampler.respacing, config.sampler.sampler) == (respacing, "ddim")


def test_without_a_recommendation_settings_have_the_defaults_of_their_fields(tmp_path):
    tiny = write_grey_unet(tmp_path / "tiny.safetensors")
    config = parse_sample_config(["--checkpoint", str(tiny)])
    expected = (RunSettings(), SamplerSettings(), SelfAttentionGuidance())
    assert (config.samples, config.sampler, config.guidances["sag"]) == expected


def test_a_recommendation_of_unknown_settings_is_refused(tmp_path):
    network = write_grey_unet(tmp_path / "tiny.safetensors", recommended={"sag": {"strength": 3}})
    with pytest.raises(UserError, match=r"`recommended`.*strength"):
        parse_sample_config(["--checkpoint", str(network)])


def write_config(folder, **settings):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["--config", str(path)]


@pytest.mark.parametrize(
    ("trainer", "flag", "expected"),
    [
        ({"precision": "64-true"}, ["--trainer.precision", "32-true"], ("precision", "32-true")),
        ({"accelerator": "tpu"}, ["--trainer.accelerator=cpu"], ("accelerator", "cpu")),
        ({"devices": [0, 1]}, ["--trainer.devices", "1"], ("devices", "1")),
        ({"precision": 32}, [], ("precision", "32-true")),
        ({"precision": "bf16"}, [], ("precision", "auto")),
        ({"accelerator": "cuda"}, [], ("accelerator", "gpu")),
    ],
)
def test_what_a_training_config_has_for_lightning_is_translated_or_replaced_by_a_flag(
    trainer, flag, expected, tmp_path
):
    tiny = write_grey_unet(tmp_path / "tiny.safetensors")
    config = parse_sample_config([*write_config(tmp_path, trainer=trainer), "--checkpoint", str(tiny), *flag])
    assert getattr(config.devices, expected[0]) == expected[1]


def test_a_flag_repairs_settings_of_a_config_and_a_weight_file_that_contradict_each_other(tmp_path):
    tiny = write_grey_unet(tmp_path / "tiny.safetensors", recommended={"sampler": "ddpm"})
    config = [*write_config(tmp_path, eta=0.5), "--checkpoint", str(tiny)]
    with pytest.raises(UserError, match="`eta`"):
        parse_sample_config(config)
    assert parse_sample_config([*config, "--eta", "0"]).sampler == SamplerSettings(sampler="ddpm", eta=0.0)


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("unipc", 0.0), ("ddim", 0.5)])
@pytest.mark.parametrize("place", ["weight file and flag", "weight file and config", "config and flag"])
def test_another_sampler_replaces_the_eta_that_belongs_to_ddim(place, sampler, eta, tmp_path):
    first, second = place.split(" and ")
    ddim = {"sampler": "ddim", "eta": 0.5}
    tiny = write_grey_unet(tmp_path / "tiny.safetensors", recommended=ddim if first == "weight file" else {})
    arguments = ["--checkpoint", str(tiny)]
    arguments += write_config(tmp_path, **ddim) if first == "config" else []
    arguments += ["--sampler", sampler] if second == "flag" else write_config(tmp_path, sampler=sampler)
    assert parse_sample_config(arguments).sampler == SamplerSettings(sampler=sampler, eta=eta)


def test_a_group_of_settings_on_the_command_line_leaves_the_other_settings_of_the_group(tmp_path):
    recommended = {"sag": {"scale": 0.5, "blur_sigma": 2.0}}
    tiny = write_grey_unet(tmp_path / "tiny.safetensors", recommended=recommended)
    config = write_config(tmp_path, sag={"site": "output.0", "threshold": 1.3})
    sag = parse_sample_config([*config, "--checkpoint", str(tiny), "--sag", '{"scale": 0.9}']).guidances["sag"]
    assert sag == SelfAttentionGuidance(scale=0.9, blur_sigma=2.0, site="output.0", threshold=1.3)


def test_whole_numbers_of_a_config_give_the_settings_of_flags_to_the_letter(tmp_path):
    sag = {"scale": 1, "interval": [0, 1], "max_norm": 2, "shape_sigma": 3}
    flags = ["--sag.scale", "1", "--sag.interval", "0,1", "--sag.max_norm", "2", "--sag.shape_sigma", "3"]
    from_config, from_flags = parse_sample_config(write_config(tmp_path, sag=sag)), parse_sample_config(flags)
    assert repr(from_config.guidances["sag"]) == repr(from_flags.guidances["sag"])


def test_flags_that_name_a_network_replace_the_weights_of_a_config(tmp_path):
    tiny = write_grey_unet(tmp_path / "tiny.safetensors")
    config = write_config(tmp_path, checkpoint=str(write_grey_unet(tmp_path / "other.safetensors")))
    assert parse_sample_config([*config, "--checkpoint", str(tiny)]).source.checkpoint == tiny
    assert parse_sample_config([*config, "--model", "emoji"]).source.find_file().name == "emoji.safetensors"
    raw = write_config(tmp_path, weights="raw", checkpoint="missing.ckpt")
    assert parse_sample_config([*raw, "--checkpoint", str(tiny)]).source.weights == "ema"


@pytest.mark.parametrize("value", [3, ["a", "b"]])
def test_a_checkpoint_in_a_config_is_a_text(value, tmp_path):
    with pytest.raises(UserError, match=r"`checkpoint` in a config must be a text"):
        parse_sample_config(write_config(tmp_path, checkpoint=value))
