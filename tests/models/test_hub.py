from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file

from sagl.errors import UserError
from sagl.models.hub import HubUNet
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers.tiny import grey_unet, network_file


@pytest.fixture
def saved(tmp_path):
    """A tiny network as the Hub would hold it."""
    file = network_file(recommended={"respacing": "5"}, diffusion=DiffusionSettings(noise_schedule="cosine"))
    HubUNet.of(file).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_network_comes_back_with_settings_process_advice_and_outputs(saved):
    back = HubUNet.from_pretrained(saved)
    assert not back.training
    assert back.settings == grey_unet().settings
    assert back.file.diffusion == DiffusionSettings(noise_schedule="cosine")
    assert back.file.recommended == {"respacing": "5"}
    told = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 2])
    assert torch.equal(back(*told).out, grey_unet()(*told).out)


def test_weights_keep_openai_s_names(saved):
    assert load_file(saved / "model.safetensors").keys() == grey_unet().state_dict().keys()


def test_a_parameter_that_is_missing_is_refused_by_its_name(saved):
    state = load_file(saved / "model.safetensors")
    del state["out.2.bias"]
    save_file(state, saved / "model.safetensors")
    with pytest.raises(UserError, match=r"1 parameters differ: out\.2\.bias"):
        HubUNet.from_pretrained(saved, strict=True)


def test_a_damaged_file_is_refused(saved):
    (saved / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="is damaged"):
        HubUNet.from_pretrained(saved)


def test_a_repository_with_a_pickle_alone_is_refused(monkeypatch, saved):
    def download(repo_id, filename, **_):
        if filename == "model.safetensors":
            raise EntryNotFoundError(filename)
        return str(saved / filename)

    torch.save(grey_unet().state_dict(), saved / "pytorch_model.bin")
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    with pytest.raises(
        UserError, match=r"must be on the Hub as model\.safetensors, and there is pytorch_model\.bin alone"
    ):
        HubUNet.from_pretrained("owner/name")


def test_a_network_to_be_pushed_is_ready_for_use():
    assert not HubUNet.of(network_file()).training


def test_weights_that_do_not_fit_are_not_taken():
    file = network_file()
    with pytest.raises(UserError, match="parameters differ"):
        HubUNet.of(replace(file, model_settings=replace(file.model_settings, num_classes=7)))


def test_the_model_card_says_what_is_known_of_the_network(saved):
    card = (saved / "README.md").read_text()
    for part in (
        "library_name: sagl",
        "8x8 images, 3 classes",
        "| `noise_schedule` | cosine |",
        "HubUNet.from_pretrained",
    ):
        assert part in card


def test_pushing_sends_weights_settings_and_card(monkeypatch):
    sent = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: type("Repo", (), {"repo_id": repo_id})())

    def upload(self, *, repo_id, folder_path, **_):
        sent.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()}, to=repo_id)

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    HubUNet.of(network_file()).push_to_hub("owner/name")
    assert sent["to"] == "owner/name"
    assert {"model.safetensors", "config.json", "README.md"} < sent.keys()
    assert b'from_pretrained("owner/name")' in sent["README.md"]
