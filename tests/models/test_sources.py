from dataclasses import replace

import pytest

from sagl.errors import UserError
from sagl.models.metadata import read_metadata, settings_from_metadata
from sagl.models.sources import NetworkSource, resolve_network
from sagl.models.zoo import BUNDLED, DEFAULT_MODEL, RELEASED, get_unet_settings
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers.networks import write_grey_unet

NOTHING = (None, None)


@pytest.fixture
def file(tmp_path):
    return write_grey_unet(tmp_path / "grey.safetensors")


@pytest.mark.parametrize("name", [DEFAULT_MODEL, "fashion_mnist"])
def test_the_file_of_a_bundled_network_contains_its_settings(name):
    source = resolve_network(name, None)
    assert (source.model, source.checkpoint) == (name, BUNDLED[name])
    assert (source.network, source.diffusion) == NOTHING


def test_nothing_stands_for_the_default_network():
    assert resolve_network(None, None) == resolve_network(DEFAULT_MODEL, None)


def test_a_released_network_has_settings_and_no_file_yet():
    source = resolve_network("lsun_cat", None)
    assert (source.model, source.checkpoint) == ("lsun_cat", None)
    assert (source.network, source.diffusion) == get_unet_settings("lsun_cat")


def test_the_diffusion_process_of_a_config_replaces_that_of_a_released_network():
    diffusion = DiffusionSettings(noise_schedule="cosine")
    assert resolve_network("lsun_cat", None, diffusion).diffusion == diffusion


def test_a_file_with_metadata_contains_its_settings(file):
    source = resolve_network(None, str(file))
    assert (source.model, source.checkpoint) == (None, file)
    assert (source.network, source.diffusion) == NOTHING


def test_a_file_of_openai_is_known_by_its_name(tmp_path):
    path = tmp_path / RELEASED["lsun_cat"].file
    path.touch()
    source = resolve_network(None, str(path))
    assert (source.model, source.checkpoint, source.network) == ("lsun_cat", path, get_unet_settings("lsun_cat")[0])


@pytest.mark.parametrize("name", ["lsun_cat", "fashion_mnist"])
def test_a_name_and_a_file_are_the_named_network_with_the_weights_of_the_file(name, tmp_path):
    path = tmp_path / "mine.pt"
    path.touch()
    assert resolve_network(name, str(path)) == NetworkSource(name, path, "ema", *get_unet_settings(name))


def test_a_file_of_another_network_than_the_named_one_is_refused():
    with pytest.raises(UserError, match="`model` must agree"):
        resolve_network("emoji", str(BUNDLED["fashion_mnist"]))


def test_settings_that_equal_those_of_the_file_are_left_to_the_file(file):
    settings = settings_from_metadata(read_metadata(file), file)[0]
    assert resolve_network(settings, str(file)).network is None


def test_settings_that_contradict_those_of_the_file_are_refused(file):
    settings = settings_from_metadata(read_metadata(file), file)[0]
    with pytest.raises(UserError, match="num_res_blocks"):
        resolve_network(replace(settings, num_res_blocks=settings.num_res_blocks + 1), str(file))


def test_settings_describe_a_file_without_metadata(tmp_path):
    path, settings = tmp_path / "mine.pt", get_unet_settings("lsun_cat")[0]
    path.touch()
    assert resolve_network(settings, str(path)).network == settings


def test_the_diffusion_process_of_a_config_must_be_that_of_the_file(file):
    own = settings_from_metadata(read_metadata(file), file)[1]
    assert resolve_network(None, str(file), own) == resolve_network(None, str(file))
    with pytest.raises(UserError, match=r"`model\.diffusion`"):
        resolve_network(None, str(file), replace(own, num_timesteps=own.num_timesteps + 1))


def test_the_diffusion_process_of_a_config_is_kept_with_a_file_without_its_own(tmp_path):
    path, diffusion = tmp_path / "mine.pt", DiffusionSettings(noise_schedule="cosine")
    path.touch()
    assert resolve_network("lsun_cat", str(path), diffusion).diffusion == diffusion


@pytest.mark.parametrize("weights", ["raw", "ema:0.5"])
def test_a_training_checkpoint_has_several_weights_and_other_files_have_one(weights, file, monkeypatch):
    monkeypatch.setattr("sagl.models.sources.read_metadata", lambda _: {})
    checkpoint = file.rename(file.with_suffix(".ckpt"))
    assert resolve_network(None, str(checkpoint), weights=weights).weights == weights
    with pytest.raises(UserError, match=f"`weights`.*{weights}"):
        resolve_network(None, str(checkpoint.rename(file)), weights=weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((get_unet_settings("lsun_cat")[0], None), "`model.network`"),
        ((None, "missing.safetensors"), "`checkpoint`.*missing.safetensors"),
        (("hf:owner/name", "file.pt"), "`checkpoint`.*hf:owner/name, got file.pt"),
        (("fashion_mnist_classifier", None), "`model`.*fashion_mnist_classifier"),
        (("emoij", None), "`model`.*'emoij'.* emoji"),
        (("", None), "`model`.*''"),
    ],
)
def test_what_is_missing_or_unknown_is_said(arguments, message):
    with pytest.raises(UserError, match=message):
        resolve_network(*arguments)


def test_a_pt_file_of_unknown_name_needs_a_network(tmp_path):
    path = tmp_path / "mine.pt"
    path.touch()
    with pytest.raises(UserError, match=r"`checkpoint`.*mine\.pt.*`model`"):
        resolve_network(None, str(path))
