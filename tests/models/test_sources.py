from dataclasses import replace

import pytest

from sagl.errors import UserError
from sagl.models.sources import resolve_network
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
    path = tmp_path / RELEASED["lsun_cat"].url.rsplit("/", 1)[-1]
    path.touch()
    source = resolve_network(None, str(path))
    assert (source.model, source.checkpoint, source.network) == ("lsun_cat", path, get_unet_settings("lsun_cat")[0])


def test_settings_that_contradict_those_of_the_file_are_refused(file):
    settings = get_unet_settings("lsun_cat")[0]
    with pytest.raises(UserError, match="network"):
        resolve_network(replace(settings, image_size=64), str(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((get_unet_settings("lsun_cat")[0], None), "`model.network` describes a network without weights"),
        ((None, "missing.safetensors"), "`checkpoint` must be a file"),
        (("hf:owner/name", "file.pt"), "`checkpoint` must be left out for hf:owner/name"),
        ((None, None, None, "raw"), r"`weights` is for training checkpoints \(.ckpt\), got raw"),
        (("fashion_mnist_classifier", None), "is a classifier"),
        (("emoij", None), "Did you mean emoji"),
    ],
)
def test_what_is_missing_or_unknown_is_said(arguments, message):
    with pytest.raises(UserError, match=message):
        resolve_network(*arguments)


def test_a_pt_file_of_unknown_name_needs_a_network(tmp_path):
    path = tmp_path / "mine.pt"
    path.touch()
    with pytest.raises(UserError, match="does not identify its network"):
        resolve_network(None, str(path))
