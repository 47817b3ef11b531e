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
    assert set(metadata) == {"network", "diffusion", "recommended", "sha256"}
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
        ("network", "num_channels", "32"),
        ("network", "learn_sigma", 1),
        ("network", "channel_mult", ["wide"]),
        ("network", "channel_mult", [1, float("nan")]),
        ("network", "dropout", float("inf")),
        ("diffusion", "num_timesteps", 99.5),
        ("diffusion", "num_timesteps", True),
        ("diffusion", "noise_schedule", ["linear"]),
    ],
)
def test_values_of_another_type_are_refused_by_name(part, name, value):
    metadata = {"network": asdict(grey_weights().model_settings), "diffusion": asdict(DiffusionSettings())}
    metadata[part][name] = value
    with pytest.raises(UserError, match=rf"`checkpoint` .*a\.safetensors.*`{name}` must be"):
        settings_from_metadata(metadata, Path("a.safetensors"))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("network", "image_size", 2**40),
        ("network", "in_channels", 10**9),
        ("network", "num_channels", 32 * 10**9),
        ("network", "num_res_blocks", 10**9),
        ("network", "channel_mult", [1] * 10**6),
        ("network", "channel_mult", [1e29]),
        ("network", "num_heads", 10**30),
        ("network", "num_classes", 10**12),
        ("diffusion", "num_timesteps", 10**10),
    ],
)
def test_sizes_are_bounded_before_anything_is_built(part, name, value):
    metadata = {"network": asdict(grey_weights().model_settings), "diffusion": asdict(DiffusionSettings())}
    metadata[part][name] = value
    with pytest.raises(UserError, match=f"`{name}`"):
        settings_from_metadata(metadata, Path("a.safetensors"))


def test_settings_of_other_names_are_refused():
    metadata = {"network": asdict(grey_weights().model_settings) | {"depth": 3}, "diffusion": {}}
    with pytest.raises(UserError, match=r"`checkpoint` .*a\.safetensors"):
        settings_from_metadata(metadata, Path("a.safetensors"))


@pytest.mark.parametrize("header", [b"[" * 200_000, b"", b"{}" + b" " * 10])
@pytest.mark.parametrize("length", [None, 2**63, 10**9])
def test_a_header_that_is_too_deep_or_longer_than_the_file_is_refused(header, length, tmp_path):
    length = len(header) + 1 if length is None else length
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + header)
    with pytest.raises(UserError, match=r"`checkpoint` .*damaged"):
        read_metadata(tmp_path / "a.safetensors")
