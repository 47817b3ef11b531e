import pytest

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
