import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sagl.configuration.sample import sampling_settings
from sagl.models.checkpoints import in_dtype, read_checkpoint, write_checkpoint
from sagl.models.metadata import read_metadata
from sagl.models.zoo import RELEASED
from sagl.settings.diffusion import DiffusionSettings
from sagl.utils.config_files import read_config
from tests.helpers.commands import exit_code, refusal
from tests.helpers.networks import (
    GREY,
    grey_unet,
    grey_weights,
    write_grey_classifier,
    write_grey_unet,
    write_training_checkpoint,
)


def convert(source, target, *flags):
    """Run the command; return the file or folder that it wrote."""
    assert exit_code("convert", source, target, *flags) == 0
    return target


@pytest.fixture
def training(tmp_path):
    return write_training_checkpoint(tmp_path / "last.ckpt")


# ------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize(("flags", "factor"), [([], 0.5), (["--weights", "ema"], 0.5), (["--weights", "raw"], 1.0)])
def test_a_training_checkpoint_becomes_a_file_with_its_ema_or_raw_weights(flags, factor, training, tmp_path):
    target = convert(training, tmp_path / "network.safetensors", *flags)
    state, expected = load_file(target), grey_unet().state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], factor * tensor) for name, tensor in expected.items())
    file = read_checkpoint(target)
    assert (file.model_settings, file.diffusion.noise_schedule) == (grey_unet().settings, "cosine")


def test_each_tensor_keeps_its_dtype_unless_another_is_set(tmp_path):
    source = tmp_path / "half.safetensors"
    write_checkpoint(in_dtype(grey_weights(), torch.float16), source)
    for flags, dtype in (([], torch.float16), (["--dtype", "float32"], torch.float32)):
        target = convert(source, tmp_path / f"{dtype}.safetensors", *flags)
        assert {tensor.dtype for tensor in load_file(target).values()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_half_precision_is_half_the_size_and_close(dtype, tmp_path):
    source = write_grey_unet(tmp_path / "tiny.safetensors")
    target = convert(source, tmp_path / "half.safetensors", "--dtype", str(dtype).removeprefix("torch."))
    state = load_file(target)
    assert target.stat().st_size < 2 * sum(tensor.numel() for tensor in state.values()) + 20_000
    for name, tensor in grey_unet().state_dict().items():
        torch.testing.assert_close(state[name].float(), tensor, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_plain_state_dict_is_converted_with_the_settings_of_a_config(tmp_path):
    torch.save(grey_unet().state_dict(), tmp_path / "plain.pt")
    network = {**GREY, "channel_mult": [1], "attention_resolutions": [8]}
    config = {"model": {"network": network, "diffusion": {"noise_schedule": "cosine"}}}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    target = convert(tmp_path / "plain.pt", tmp_path / "network.safetensors", "--config", tmp_path / "my.yaml")
    assert read_checkpoint(target).model_settings == grey_unet().settings
    assert read_checkpoint(target).diffusion == DiffusionSettings(noise_schedule="cosine")


def test_a_renamed_classifier_is_converted_by_its_model(tmp_path, monkeypatch):
    file = read_checkpoint(write_grey_classifier(tmp_path / "tiny.safetensors"))
    entry = replace(RELEASED["imagenet64_classifier"], settings=file.model_settings)
    monkeypatch.setitem(RELEASED, "imagenet64_classifier", entry)
    torch.save(dict(file.state_dict), tmp_path / "renamed.pt")
    target = convert(tmp_path / "renamed.pt", tmp_path / "c.safetensors", "--model", "imagenet64_classifier")
    assert (read_checkpoint(target).model_settings, read_checkpoint(target).diffusion) == (
        file.model_settings,
        entry.diffusion,
    )


def test_a_network_comes_back_from_a_folder_for_diffusers(tmp_path):
    source = write_grey_unet(tmp_path / "tiny.safetensors", recommended={"respacing": "5"})
    back = convert(convert(source, tmp_path / "tiny-v1.0"), tmp_path / "back.safetensors")
    assert read_metadata(back) == read_metadata(source)
    expected, state = load_file(source), load_file(back)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


# --------------------------------------------------------------------------------------------- recommended settings


def test_recommended_settings_are_written_and_printed_and_remain_unless_others_are_set(training, tmp_path, capsys):
    recommended = {"respacing": "5", "sag": {"scale": 0.2, "site": "middle"}}
    first = convert(training, tmp_path / "first.safetensors", "--recommended", json.dumps(recommended))
    assert read_metadata(first)["recommended"] == recommended
    assert json.dumps(recommended) in capsys.readouterr().out
    same = convert(first, tmp_path / "same.safetensors", "--dtype", "float16")
    assert read_metadata(same)["recommended"] == recommended
    other = convert(first, tmp_path / "other.safetensors", "--recommended", '{"respacing": "7"}')
    assert read_metadata(other)["recommended"] == {"respacing": "7"}


@pytest.fixture
def cat(monkeypatch, tmp_path):
    """The cached file of a tiny network under the name of lsun_cat."""
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path))
    monkeypatch.setitem(RELEASED, "lsun_cat", replace(RELEASED["lsun_cat"], settings=grey_unet().settings))
    (tmp_path / "models").mkdir()
    torch.save(grey_unet().state_dict(), tmp_path / "models" / "lsun_cat.pt")
    return tmp_path / "models" / "lsun_cat.pt"


@pytest.mark.parametrize("kind", ["name", "file", "model", "config"])
def test_a_released_network_gets_the_settings_of_the_paper(kind, cat, tmp_path):
    renamed = shutil.copy(cat, tmp_path / "renamed.pt")
    (tmp_path / "my.yaml").write_text("model: {network: lsun_cat}")
    arguments = {
        "name": ["lsun_cat"],
        "file": [cat],
        "model": [renamed, "--model", "lsun_cat"],
        "config": [renamed, "--config", tmp_path / "my.yaml"],
    }
    source, *flags = arguments[kind]
    recommended = read_metadata(convert(source, tmp_path / "cat.safetensors", *flags))["recommended"]
    assert recommended == sampling_settings(read_config("lsun_cat"))
    assert recommended["sag"]["scale"] == 0.05


def test_recommended_settings_may_be_empty_for_a_released_network(cat, tmp_path):
    assert read_metadata(convert(cat, tmp_path / "cat.safetensors", "--recommended", "{}"))["recommended"] == {}


# ------------------------------------------------------------------------------------------------------ refusals


INVALID = ['{"sag": {"strength": 3}}', '{"respacing": []}', '{"sag": {"scale": "strong"}}', '{"output": "a"}', "["]


@pytest.mark.parametrize("text", INVALID)
def test_invalid_recommended_settings_are_refused(text, training, tmp_path, capsys):
    command = ["convert", training, tmp_path / "network.safetensors", "--recommended", text]
    refusal(capsys, tmp_path, *command, names=["recommended"])


@pytest.mark.parametrize("name", ["output", "exports", "num_samples", "checkpoint", "config", "compare", "trainer"])
def test_a_weight_file_recommends_sampler_labels_and_guidance_only(name, tmp_path, capsys):
    source = write_grey_unet(tmp_path / "tiny.safetensors", recommended={name: "elsewhere", "sampler": "ddim"})
    for command in (["convert", source, tmp_path / "b.safetensors"], ["sample", "--checkpoint", source]):
        refusal(capsys, tmp_path, *command, names=[name])
    convert(source, tmp_path / "b.safetensors", "--recommended", "{}")


def test_weights_of_another_network_are_refused(training, tmp_path, capsys):
    content = torch.load(training, weights_only=True)
    del content["state_dict"]["network.out.2.weight"]
    torch.save(content, training)
    refusal(capsys, tmp_path, "convert", training, tmp_path / "network.safetensors", names=["out.2.weight"])


@pytest.mark.parametrize(
    "target", ["new.pt", "new.ckpt", ".safetensors", "used", "used.safetensors", "file/new.safetensors", "file/new"]
)
def test_an_impossible_target_is_refused_before_a_download(target, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sagl.models.loading.download_pretrained", lambda name: pytest.fail("downloaded"))
    (tmp_path / "file").write_text("text")
    for name in ("used", "used.safetensors"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("text")
    refusal(capsys, tmp_path, "convert", "lsun_cat", tmp_path / target, names=["`target`"])


@pytest.mark.parametrize("flags", [["--weights", "raw"], ["--model", "lsun_cat"]])
def test_options_for_files_are_refused_for_a_folder(flags, tmp_path, capsys):
    folder = convert(write_grey_unet(tmp_path / "tiny.safetensors"), tmp_path / "folder")
    refusal(capsys, tmp_path, "convert", folder, tmp_path / "back.safetensors", *flags, names=flags[:1])


@pytest.mark.parametrize("text", ["[]", "[1]", "null", "", '{"eta": 0, "eta": 1}', '{"sag": {"scale": 1, "scale": 2}}'])
def test_recommended_settings_are_an_object_with_every_name_once(text, tmp_path, capsys):
    source = write_grey_unet(tmp_path / "tiny.safetensors")
    flags = ["--recommended", text]
    refusal(capsys, tmp_path, "convert", source, tmp_path / "new.safetensors", *flags, names=flags[:1])
