import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file

from sagl.errors import UserError
from sagl.models.adm import UNet
from sagl.models.hub import HubUNet
from sagl.models.hub_files import download_from_hub
from sagl.models.metadata import read_metadata
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers.commands import exit_code
from tests.helpers.networks import grey_unet, grey_weights

COSINE = DiffusionSettings(noise_schedule="cosine")


@pytest.fixture
def saved(tmp_path):
    """A tiny network in the files of the Hub."""
    checkpoint = grey_weights(recommended={"respacing": "5"}, diffusion=COSINE)
    HubUNet.from_checkpoint(checkpoint).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_network_comes_back_with_settings_and_outputs(saved):
    network = HubUNet.from_pretrained(saved)
    assert not network.training
    assert network.settings == grey_unet().settings
    assert (network.checkpoint.diffusion, network.checkpoint.recommended) == (COSINE, {"respacing": "5"})
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 2])
    plain = UNet(network.settings)
    plain.load_state_dict(grey_unet().state_dict())
    assert torch.equal(network(*inputs).out, plain(*inputs).out)


def test_weights_keep_openais_names(saved):
    assert load_file(saved / "model.safetensors").keys() == grey_unet().state_dict().keys()


@pytest.mark.parametrize("complete", [True, False])
def test_a_repository_with_only_a_pickle_is_loaded_strictly(complete, monkeypatch, saved):
    def download(repo_id, filename, **_):
        if filename == "model.safetensors":
            raise EntryNotFoundError(filename)
        return str(saved / filename)

    state_dict = dict(grey_unet().state_dict())
    if not complete:
        del state_dict["out.2.bias"]
    torch.save(state_dict, saved / "pytorch_model.bin")
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    if complete:
        assert torch.equal(HubUNet.from_pretrained("owner/name").state_dict()["out.2.bias"], state_dict["out.2.bias"])
    else:
        with pytest.raises(UserError, match=r"out\.2\.bias"):
            HubUNet.from_pretrained("owner/name")


def test_weights_that_do_not_match_are_refused():
    checkpoint = grey_weights()
    settings = replace(checkpoint.model_settings, num_classes=7)
    with pytest.raises(UserError, match="parameters differ"):
        HubUNet.from_checkpoint(replace(checkpoint, model_settings=settings))


def test_the_model_card_describes_the_network(saved):
    card = (saved / "README.md").read_text()
    parts = "library_name: sagl", "8x8 images", "3 classes", "| `noise_schedule` | cosine |", "HubUNet.from_pretrained"
    assert [part for part in parts if part not in card] == []


def test_no_path_of_the_machine_is_in_a_file_and_those_left_out_are_printed(tmp_path, capsys):
    names = {"autoguidance": {"scale": 1.0, "checkpoint": "hf:me/weak"}, "pag": {"scale": 1.0}}
    names |= {"classifier": {"checkpoint": "fashion_mnist_classifier"}, "respacing": "5"}
    paths = {"sag": {"scale": 0.5, "direction_head": "secret/head.safetensors", "dino_checkpoint": "/secret/dino.pth"}}
    paths |= {"blur": {"direction_head": "secret.safetensors"}, "seg": {"direction_head": None}}
    paths |= {"tsg": {"scale": 1.0, "direction_head": "auto"}}
    network = HubUNet.from_checkpoint(grey_weights(recommended={**names, **paths}))
    (line,) = capsys.readouterr().out.splitlines()
    for name in ("sag.direction_head", "sag.dino_checkpoint", "blur.direction_head", "tsg.direction_head"):
        assert name in line
    network.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir() if b"secret" in path.read_bytes()} == set()
    kept = HubUNet.from_pretrained(tmp_path / "saved").checkpoint.recommended
    assert kept == {**names, "sag": {"scale": 0.5}, "blur": {}, "seg": {"direction_head": None}, "tsg": {"scale": 1.0}}
    assert read_metadata(tmp_path / "saved" / "model.safetensors")["recommended"] == kept
    capsys.readouterr()
    HubUNet.from_checkpoint(grey_weights(recommended=names))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("group", "settings"),
    [
        ("sag", {"scale": 1.0, "mask": "dino", "dino_checkpoint": "/secret/dino.pth"}),
        ("autoguidance", {"scale": 1.0, "checkpoint": "/secret/weak.safetensors"}),
        ("classifier", {"scale": 1.0, "checkpoint": "secret.safetensors"}),
        ("sag", {"scale": 1.0, "site": "output.0", "direction_head": "auto"}),
    ],
)
def test_a_pushed_network_can_be_sampled_with_its_default_settings(group, settings, tmp_path):
    HubUNet.from_checkpoint(grey_weights(recommended={group: settings, "respacing": "2"})).save_pretrained(tmp_path)
    output = tmp_path / "samples"
    flags = ("--checkpoint", tmp_path / "model.safetensors", "--num_samples", "1", "--output", output)
    assert exit_code("sample", *flags, "--progress", "off") == 0
    scale = json.loads((output / "run.json").read_text())["settings"].get(group, {}).get("scale", 0.0)
    assert bool(scale) == ("site" in settings)


def test_a_push_uploads_weights_settings_and_card(monkeypatch):
    uploaded = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: type("Repo", (), {"repo_id": repo_id})())

    def upload(self, *, repo_id, folder_path, **_):
        uploaded.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()}, to=repo_id)

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    HubUNet.from_checkpoint(grey_weights()).push_to_hub("owner/name")
    assert uploaded["to"] == "owner/name"
    assert {"model.safetensors", "config.json", "README.md"} < uploaded.keys()
    assert b'from_pretrained("owner/name")' in uploaded["README.md"]


@pytest.mark.parametrize(
    "name", ["hf:../..", "hf:-a/b-", "hf:a/" + "b" * 200, "hf:a/b@../../x", "hf:a/b@x y", "hf:a", "hf:"]
)
def test_a_name_that_no_repository_has_is_refused_and_leads_nowhere(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sagl.models.hub_files.is_reachable", lambda: False)
    with pytest.raises(UserError, match="`model`"):
        download_from_hub(name)
    assert list(tmp_path.iterdir()) == []


def test_a_model_card_escapes_what_utf8_does_not_have(saved):
    card = HubUNet.from_pretrained(saved).generate_model_card(sampling={"reference": "caf\udce9"})
    assert "caf\\udce9" in str(card)
