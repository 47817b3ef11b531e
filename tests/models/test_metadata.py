import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sagl.errors import UserError
from sagl.models.metadata import read_metadata, settings_from_metadata
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers.networks import grey_weights, write_grey_unet


def test_a_file_contains_the_settings_of_its_network(tmp_path):
    file = grey_weights(recommended={"respacing": "5"})
    metadata = read_metadata(write_grey_unet(tmp_path / "a.safetensors", recommended={"respacing": "5"}))
    assert set(metadata) == {"network", "diffusion", "recommended"}
    assert metadata["recommended"] == {"respacing": "5"}
    assert metadata["diffusion"] == asdict(file.diffusion)
    assert metadata["network"]["channel_mult"] == [1]


def test_other_files_have_no_metadata(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    torch.save({}, tmp_path / "last.ckpt")
    for name in ("other.safetensors", "last.ckpt", "absent.safetensors"):
        assert read_metadata(tmp_path / name) == {}


def test_the_metadata_of_a_training_checkpoint_are_its_hyperparameters(tmp_path):
    metadata = {"network": {"image_size": 8}, "recommended": {"respacing": "5"}}
    torch.save({"hyper_parameters": metadata, "state_dict": {}}, tmp_path / "last.ckpt")
    assert read_metadata(tmp_path / "last.ckpt") == metadata


@pytest.mark.parametrize("recommended", [[1], "abc", 3])
def test_a_recommendation_that_is_no_mapping_is_refused(recommended, tmp_path):
    metadata = {"sagl": json.dumps({"recommended": recommended})}
    save_file({"weight": torch.zeros(3)}, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(UserError, match="`recommended`"):
        read_metadata(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("network", "num_res_blocks", 1.5),
        ("network", "num_classes", 2.5),
        ("network", "num_heads", 2.0),
        ("diffusion", "num_timesteps", 99.5),
    ],
)
def test_fractions_in_place_of_integers_are_refused(part, name, value):
    metadata = {"network": asdict(grey_weights().model_settings), "diffusion": asdict(DiffusionSettings())}
    metadata[part][name] = value
    with pytest.raises(UserError, match=f"`{name}` must be an integer, got {value}"):
        settings_from_metadata(metadata, Path("a.safetensors"))


@pytest.mark.parametrize("change", [{"channel_mult": ["wide"]}, {"channel_mult": [1e308, 1e308]}, {"depth": 3}])
def test_invalid_settings_are_refused(change):
    metadata = {"network": asdict(grey_weights().model_settings) | change, "diffusion": {}}
    with pytest.raises(UserError, match=r"`checkpoint` .*a\.safetensors"):
        settings_from_metadata(metadata, Path("a.safetensors"))
