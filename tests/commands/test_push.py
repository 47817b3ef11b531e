"""`sagl push` and `--model hf:…`, against a server with the Hub's interface on this machine."""

import json
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from huggingface_hub import constants
from PIL import Image

from sagl.models.checkpoints import read_checkpoint, write_checkpoint
from tests.helpers.commands import exit_code
from tests.helpers.hub_server import TOKEN, hub_server
from tests.helpers.networks import grey_weights
from tests.helpers.run_folders import write_run

SHORT = ["--num_samples", "2", "--batch_size", "2", "--respacing", "2", "--progress", "off"]


@pytest.fixture(scope="module")
def hub():
    with hub_server() as (address, repositories):
        yield address, repositories


@pytest.fixture
def run(hub, tmp_path, monkeypatch, capfd):
    """A function that runs a command with an account of the server, or without; returns exit code and output."""

    def run(*arguments, token=TOKEN, address=hub[0]):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        capfd.readouterr()
        code = exit_code(*arguments)
        output = capfd.readouterr()
        return code, output.err if code else output.out

    return run


@pytest.fixture
def weights(tmp_path):
    write_checkpoint(grey_weights(recommended={"respacing": "5", "sag": {"scale": 0.2}}), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


@pytest.mark.slow
def test_a_pushed_run_samples_the_same_images_by_its_name(hub, run, weights, tmp_path):
    sag = ["--sag.scale", "0.5", "--sag.site", "middle"]
    assert run("sample", "--checkpoint", "tiny.safetensors", *sag, *SHORT, "--output", "local")[0] == 0
    code, output = run("push", "local", "me/tiny", "--licence", "mit")
    assert (code, "hf:me/tiny" in output) == (0, True)
    files = hub[1]["me/tiny"]
    assert {"model.safetensors", "config.json", "README.md", "grid.png"} <= files.keys()
    card = files["README.md"].decode()
    for part in ("license: mit", "hf:me/tiny", "| `sag.scale` | 0.5 |", "| `respacing` | 2 |", "grid.png"):
        assert part in card
    assert str(tmp_path) not in card
    assert run("sample", "--model", "hf:me/tiny", *sag, *SHORT, "--output", "remote")[0] == 0
    images = [sorted((tmp_path / name / "images").iterdir()) for name in ("local", "remote")]
    assert [path.read_bytes() for path in images[0]] == [path.read_bytes() for path in images[1]]


def test_a_network_of_the_hub_is_converted_and_stays_in_the_cache(hub, run, weights, tmp_path):
    assert run("push", "tiny.safetensors", "me/cached", "--licence", "mit")[0] == 0
    assert run("convert", "hf:me/cached", "again.safetensors")[0] == 0
    original, again = read_checkpoint(weights), read_checkpoint(tmp_path / "again.safetensors")
    assert asdict(original.model_settings) == asdict(again.model_settings)
    assert again.recommended == original.recommended
    code, output = run("convert", "hf:me/cached", "offline.safetensors", address="http://127.0.0.1:9")
    assert code == 0, output


def test_new_weights_of_a_repository_are_used(run, weights, tmp_path):
    digests = set()
    for name in ("first", "second"):
        checkpoint = grey_weights()
        state_dict = {key: tensor * (1.01 if name == "second" else 1) for key, tensor in checkpoint.state_dict.items()}
        write_checkpoint(replace(checkpoint, state_dict=state_dict), weights)
        assert run("push", "tiny.safetensors", "me/updated", "--licence", "mit")[0] == 0
        code, output = run("sample", "--model", "hf:me/updated", *SHORT, "--output", name)
        assert code == 0, output
        digests.add(json.loads((tmp_path / name / "run.json").read_text())["settings"]["weights_sha256"])
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (["sample", "--model", "hf:me/none"], {}, ["me/none", "--model", "does not exist"]),
        (["sample", "--model", "hf:private/net"], {"token": ""}, ["private/net", "HF_TOKEN"]),
        (["sample", "--model", "hf:me/tiny"], {"address": "http://127.0.0.1:9"}, ["me/tiny", "network"]),
        (["sample", "--model", "hf:tiny"], {}, ["OWNER/NAME", "'tiny'"]),
        (["push", "tiny.safetensors", "me/tiny", "--licence", "mit"], {"token": ""}, ["me/tiny", "HF_TOKEN"]),
        (["push", "tiny.safetensors", "me/tiny"], {}, ["licence"]),
        (["push", "none.safetensors", "me/tiny", "--licence", "mit"], {}, ["none.safetensors"]),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(hub, run, weights, arguments, options, words):
    hub[1]["private/net"] = {}
    code, output = run(*arguments, **options)
    assert code == 2, output
    assert len(output.strip().splitlines()) == 1, output
    assert [word for word in words if word not in output] == []


def test_a_repository_without_a_network_is_refused(hub, run):
    hub[1]["me/empty"] = {"README.md": b"hello"}
    code, output = run("sample", "--model", "hf:me/empty")
    assert (code, "model.safetensors" in output) == (2, True), output


def test_files_can_be_written_without_an_upload(run, weights, tmp_path):
    (tmp_path / "previews").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "grid.png")
    code, output = run("push", "tiny.safetensors", "me/local", "--licence", "mit", "--output", "files", token="")
    assert code == 0, output
    config = json.loads((tmp_path / "files" / "config.json").read_text())
    assert config["settings"]["image_size"] == 8


@pytest.mark.parametrize("changes", [{"checkpoint": 3}, {"model": 3}, {"settings": 3}])
def test_a_damaged_description_of_a_run_is_refused(changes, tmp_path, capsys):
    run = write_run(tmp_path / "run")
    content = json.loads((run / "run.json").read_text()) | changes
    del content["sha256"]
    (run / "run.json").write_text(json.dumps(content))
    assert exit_code("push", run, "a/b", "--licence", "mit", "--output", tmp_path / "new") == 2
    assert "run.json" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_named_and_the_network_is_not_blamed(run, weights, tmp_path):
    (tmp_path / "file").touch()
    code, output = run("push", "tiny.safetensors", "me/tiny", "--licence", "mit", "--output", "file/new", token="")
    assert code == 2, output
    assert "file/new" in output
    assert "reached" not in output


def test_a_run_of_a_network_that_a_config_describes_is_pushed_with_its_settings_and_process(run, tmp_path):
    network = grey_weights()
    torch.save(dict(network.state_dict), tmp_path / "grey.pt")
    diffusion = {"noise_schedule": "cosine", "num_timesteps": 50}
    config = {"model": {"network": json.loads(json.dumps(asdict(network.model_settings))), "diffusion": diffusion}}
    (tmp_path / "grey.yaml").write_text(yaml.safe_dump(config))
    sample = [
        "sample",
        "--config",
        "grey.yaml",
        "--checkpoint",
        "grey.pt",
        "--labels",
        "balanced",
        "--output",
        "samples",
    ]
    code, output = run(*sample, "--output", "samples", *SHORT)
    assert code == 0, output
    code, output = run("push", "samples", "me/grey", "--licence", "mit", "--output", "files", token="")
    assert code == 0, output
    pushed = read_checkpoint(tmp_path / "files" / "model.safetensors")
    assert pushed.model_settings == network.model_settings
    assert (pushed.diffusion.noise_schedule, pushed.diffusion.num_timesteps) == ("cosine", 50)
