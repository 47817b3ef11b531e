import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sagl.commands._config import read_config, sampling_settings
from sagl.models.checkpoints import build_network, in_dtype, read_checkpoint, write_checkpoint
from sagl.models.metadata import read_metadata
from sagl.models.zoo import DEFAULT_CHECKPOINT, RELEASED
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers.tiny import (
    GREY,
    contents,
    exit_code,
    grey_unet,
    network_file,
    write_tiny,
    write_tiny_classifier,
    write_training_checkpoint,
)


@pytest.mark.parametrize(("weights", "factor"), [("ema", 0.5), ("raw", 1.0)])
def test_a_training_checkpoint_becomes_a_file_with_its_averaged_or_its_raw_weights(weights, factor, tmp_path):
    checkpoint, target = write_training_checkpoint(tmp_path / "last.ckpt"), tmp_path / "network.safetensors"
    assert exit_code("convert", checkpoint, target, "--weights", weights) == 0
    found, raw = load_file(target), grey_unet().state_dict()
    assert found.keys() == raw.keys()
    for name, tensor in raw.items():
        assert torch.equal(found[name], factor * tensor), name
    file = read_checkpoint(target)
    assert file.model_settings == grey_unet().settings
    assert file.diffusion.noise_schedule == "cosine"


def test_the_ema_is_converted_by_default(tmp_path):
    checkpoint = write_training_checkpoint(tmp_path / "last.ckpt")
    for name, flags in {"asked": ["--weights", "ema"], "left": []}.items():
        assert exit_code("convert", checkpoint, tmp_path / f"{name}.safetensors", *flags) == 0
    assert (tmp_path / "asked.safetensors").read_bytes() == (tmp_path / "left.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_half_precision_is_half_the_size_and_close(dtype, tmp_path):
    checkpoint, target = write_training_checkpoint(tmp_path / "last.ckpt"), tmp_path / "half.safetensors"
    assert exit_code("convert", checkpoint, target, "--weights", "raw", "--dtype", str(dtype).split(".")[1]) == 0
    found = load_file(target)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    parameters = sum(tensor.numel() for tensor in found.values())
    assert target.stat().st_size < 2 * parameters + 20_000
    for name, tensor in grey_unet().state_dict().items():
        torch.testing.assert_close(found[name].float(), tensor, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_recommended_settings_are_written_and_printed(tmp_path, capsys):
    target, advice = tmp_path / "network.safetensors", {"respacing": "5", "sag": {"scale": 0.2, "site": "middle"}}
    checkpoint = write_training_checkpoint(tmp_path / "last.ckpt")
    assert exit_code("convert", checkpoint, target, "--recommended", json.dumps(advice)) == 0
    assert read_metadata(target)["recommended"] == advice
    assert json.dumps(advice) in capsys.readouterr().out


def test_recommended_settings_are_used_by_sample(tmp_path):
    target, advice = tmp_path / "network.safetensors", {"sampler": "ddim", "respacing": "3", "labels": "2"}
    checkpoint = write_training_checkpoint(tmp_path / "last.ckpt")
    assert exit_code("convert", checkpoint, target, "--recommended", json.dumps(advice)) == 0
    assert exit_code("sample", "--checkpoint", target, "--output", tmp_path / "run", "--num_samples", 2) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {name: record["settings"][name] for name in advice} == advice


def test_recommended_settings_of_a_file_are_kept_unless_new_ones_are_given(tmp_path):
    first = write_tiny(tmp_path / "first.safetensors", recommended={"respacing": "5"})
    assert exit_code("convert", first, tmp_path / "kept.safetensors", "--dtype", "float16") == 0
    assert read_metadata(tmp_path / "kept.safetensors")["recommended"] == {"respacing": "5"}
    assert exit_code("convert", first, tmp_path / "new.safetensors", "--recommended", '{"respacing": "7"}') == 0
    assert read_metadata(tmp_path / "new.safetensors")["recommended"] == {"respacing": "7"}
    assert torch.equal(build_network(read_checkpoint(first)).out[2].weight, network_file().state_dict["out.2.weight"])


def test_weights_that_do_not_fit_their_settings_are_refused_and_nothing_is_written(tmp_path, capsys):
    checkpoint = write_training_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    del content["state_dict"]["network.out.2.weight"]
    torch.save(content, checkpoint)
    before = contents(tmp_path)
    assert exit_code("convert", checkpoint, tmp_path / "network.safetensors") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "out.2.weight" in said
    assert contents(tmp_path) == before


@pytest.mark.parametrize("advice", ['{"sag": {"strength": 3}}', '{"respacing": []}', '{"sag": {"scale": "strong"}}'])
def test_invalid_recommended_settings_are_refused(advice, tmp_path, capsys):
    checkpoint = write_training_checkpoint(tmp_path / "last.ckpt")
    before = contents(tmp_path)
    assert exit_code("convert", checkpoint, tmp_path / "network.safetensors", "--recommended", advice) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert contents(tmp_path) == before


def test_another_suffix_is_refused(tmp_path, capsys):
    checkpoint = write_training_checkpoint(tmp_path / "last.ckpt")
    assert exit_code("convert", checkpoint, tmp_path / "network.pt") == 2
    assert "`target`" in capsys.readouterr().err
    assert not (tmp_path / "network.pt").exists()


@pytest.mark.parametrize(
    "target", ["new.pt", "new.ckpt", ".safetensors", "used", "used.safetensors", "file/new.safetensors", "file/new"]
)
def test_an_impossible_target_is_refused_before_anything_is_read(target, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sagl.models.loading.download_pretrained", lambda name: pytest.fail("fetched"))
    (tmp_path / "file").write_text("mine")
    for name in ("used", "used.safetensors"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    before = contents(tmp_path)
    assert exit_code("convert", "lsun_cat", tmp_path / target) == 2
    said = capsys.readouterr().err
    assert "`target`" in said
    assert said.count("\n") == 1
    assert contents(tmp_path) == before


def test_a_target_that_may_not_be_written_is_refused_before_anything_is_fetched(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sagl.models.loading.download_pretrained", lambda name: pytest.fail("fetched"))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert exit_code("convert", "lsun_cat", tmp_path / "new.safetensors") == 2
    said = capsys.readouterr().err
    assert f"Choose another place than {tmp_path / 'new.safetensors'}" in said


def test_each_tensor_keeps_its_dtype_unless_another_is_asked_for(tmp_path):
    source = tmp_path / "half.safetensors"
    write_checkpoint(in_dtype(network_file(), torch.float16), source)
    for flags, dtype in (([], torch.float16), (["--dtype", "float32"], torch.float32)):
        assert exit_code("convert", source, tmp_path / f"{dtype}.safetensors", *flags) == 0
        assert {tensor.dtype for tensor in load_file(tmp_path / f"{dtype}.safetensors").values()} == {dtype}


# -------------------------------------------------------------------------------------------- released networks


@pytest.fixture
def cat(monkeypatch, tmp_path):
    """A network as small as the others of the tests under the name of lsun_cat, its file in a cache of its own."""
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path))
    monkeypatch.setitem(RELEASED, "lsun_cat", replace(RELEASED["lsun_cat"], settings=grey_unet().settings))
    (tmp_path / "models").mkdir()
    torch.save(grey_unet().state_dict(), tmp_path / "models" / "lsun_cat.pt")
    return tmp_path / "models" / "lsun_cat.pt"


@pytest.mark.parametrize("how", ["name", "file", "renamed", "config"])
def test_the_paper_s_settings_go_with_a_released_network(how, cat, tmp_path):
    renamed = shutil.copy(cat, tmp_path / "mine.pt")
    (tmp_path / "mine.yaml").write_text("model: {network: lsun_cat}")
    source = {
        "name": ["lsun_cat"],
        "file": [cat],
        "renamed": [renamed, "--model", "lsun_cat"],
        "config": [renamed, "--config", tmp_path / "mine.yaml"],
    }
    assert exit_code("convert", source[how][0], tmp_path / "cat.safetensors", *source[how][1:]) == 0
    about = read_metadata(tmp_path / "cat.safetensors")
    assert about["recommended"] == sampling_settings(read_config("lsun_cat"))
    assert about["recommended"]["sag"]["scale"] == 0.05


def test_given_recommended_settings_replace_those_of_the_paper(cat, tmp_path):
    for advice in ({}, {"respacing": "5"}):
        target = tmp_path / "cat.safetensors"
        assert exit_code("convert", cat, target, "--recommended", json.dumps(advice)) == 0
        assert read_metadata(target)["recommended"] == advice


def test_a_renamed_classifier_is_converted_by_its_model(tmp_path, monkeypatch):
    file = read_checkpoint(write_tiny_classifier(tmp_path / "tiny.safetensors"))
    entry = replace(RELEASED["imagenet64_classifier"], settings=file.model_settings)
    monkeypatch.setitem(RELEASED, "imagenet64_classifier", entry)
    torch.save(dict(file.state_dict), tmp_path / "mine.pt")
    target = tmp_path / "classifier.safetensors"
    assert exit_code("convert", tmp_path / "mine.pt", target, "--model", "imagenet64_classifier") == 0
    assert read_checkpoint(target).model_settings == file.model_settings
    assert read_checkpoint(target).diffusion == entry.diffusion


def test_settings_of_the_bundled_network_are_used_by_name(tmp_path):
    torch.save(dict(read_checkpoint(DEFAULT_CHECKPOINT).state_dict), tmp_path / "mine.pt")
    target = tmp_path / "mine.safetensors"
    assert exit_code("convert", tmp_path / "mine.pt", target, "--model", "fashion_mnist") == 0
    assert read_checkpoint(target).model_settings == read_checkpoint(DEFAULT_CHECKPOINT).model_settings


def test_a_model_that_is_not_known_is_refused(tmp_path, capsys):
    torch.save(grey_unet().state_dict(), tmp_path / "plain.pt")
    assert exit_code("convert", tmp_path / "plain.pt", tmp_path / "a.safetensors", "--model", "lsun_cats") == 2
    assert "Did you mean lsun_cat?" in capsys.readouterr().err


@pytest.mark.parametrize("recommended", [[1], "abc"])
def test_a_file_that_recommends_no_settings_is_refused(recommended, tmp_path, capsys):
    source = write_tiny(tmp_path / "tiny.safetensors")
    about = {"sagl": json.dumps(read_metadata(source) | {"recommended": recommended})}
    save_file(load_file(source), tmp_path / "other.safetensors", metadata=about)
    for verb in (["convert"], ["sample", "--output", tmp_path / "run", "--checkpoint"]):
        target = [tmp_path / "new.safetensors"] if verb == ["convert"] else []
        assert exit_code(*verb, tmp_path / "other.safetensors", *target) == 2
        assert "recommended" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- diffusers


def test_a_folder_for_diffusers_comes_back_with_settings_advice_and_weights(tmp_path):
    source = write_tiny(tmp_path / "tiny.safetensors", recommended={"respacing": "5"})
    assert exit_code("convert", source, tmp_path / "folder") == 0
    assert exit_code("convert", tmp_path / "folder", tmp_path / "back.safetensors") == 0
    assert read_metadata(tmp_path / "back.safetensors") == read_metadata(source)
    was, back = load_file(source), load_file(tmp_path / "back.safetensors")
    assert was.keys() == back.keys()
    assert all(torch.equal(was[name], back[name]) for name in was)


def test_a_folder_has_the_dtype_asked_for_and_may_have_a_point_in_its_name(tmp_path):
    source = write_tiny(tmp_path / "tiny.safetensors")
    assert exit_code("convert", source, tmp_path / "tiny-v1.0", "--dtype", "float16") == 0
    state = load_file(tmp_path / "tiny-v1.0" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}


@pytest.mark.parametrize("flags", [["--weights", "raw"], ["--model", "lsun_cat"]])
def test_options_for_files_are_refused_for_a_folder(flags, tmp_path, capsys):
    assert exit_code("convert", write_tiny(tmp_path / "tiny.safetensors"), tmp_path / "folder") == 0
    assert exit_code("convert", tmp_path / "folder", tmp_path / "back.safetensors", *flags) == 2
    assert flags[0] in capsys.readouterr().err
    assert not (tmp_path / "back.safetensors").exists()


@pytest.mark.parametrize(("noted", "schedule"), [(True, "linear"), (False, "cosine")])
def test_the_process_of_a_config_is_a_folder_s_where_sagl_noted_none(noted, schedule, tmp_path):
    assert exit_code("convert", write_tiny(tmp_path / "tiny.safetensors"), tmp_path / "folder") == 0
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    kept = {name: value for name, value in config.items() if noted or name != "_sagl"}
    (tmp_path / "folder" / "config.json").write_text(json.dumps(kept))
    (tmp_path / "mine.yaml").write_text("model: {diffusion: {noise_schedule: cosine}}")
    target = tmp_path / "back.safetensors"
    assert exit_code("convert", tmp_path / "folder", target, "--config", tmp_path / "mine.yaml") == 0
    assert read_checkpoint(target).diffusion.noise_schedule == schedule


def test_a_folder_that_is_not_empty_is_left_as_it_is(tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    before = contents(tmp_path / "folder")
    assert exit_code("convert", write_tiny(tmp_path / "tiny.safetensors"), tmp_path / "folder") == 2
    assert "`target`" in capsys.readouterr().err
    assert contents(tmp_path / "folder") == before


# ------------------------------------------------------------------------------------------- plain state dicts


def test_a_plain_state_dict_is_converted_with_the_settings_of_a_config(tmp_path):
    torch.save(grey_unet().state_dict(), tmp_path / "plain.pt")
    config = {"model": {"network": {**GREY, "channel_mult": [1], "attention_resolutions": [8]}}}
    config["model"]["diffusion"] = {"noise_schedule": "cosine"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    target = tmp_path / "network.safetensors"
    assert exit_code("convert", tmp_path / "plain.pt", target, "--config", tmp_path / "mine.yaml") == 0
    assert read_checkpoint(target).model_settings == grey_unet().settings
    assert read_checkpoint(target).diffusion == DiffusionSettings(noise_schedule="cosine")


def test_a_plain_state_dict_of_another_network_is_refused_by_what_differs(tmp_path, capsys):
    torch.save(grey_unet().state_dict(), tmp_path / "plain.pt")
    assert exit_code("convert", tmp_path / "plain.pt", tmp_path / "a.safetensors", "--model", "lsun_cat") == 2
    said = capsys.readouterr().err
    assert "parameters differ: input_blocks.0.0.bias: settings (256,), file (32,); " in said
    assert said.count("; ") == 4
    assert not (tmp_path / "a.safetensors").exists()
