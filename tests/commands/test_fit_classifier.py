"""`sagl fit` of a classifier of noised images, and its use: converted, and guiding a network."""

import json

import pytest
import torch
import yaml

from sagl.models.checkpoints import build_classifier, read_checkpoint
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import ClassifierSettings
from tests.commands.test_fit import TRAINER, last
from tests.helpers.commands import exit_code, refusal
from tests.helpers.files import write_fashion_mnist_config
from tests.helpers.training import IGNORED_WARNINGS

pytestmark = IGNORED_WARNINGS

CLASSIFIER = {"image_size": 32, "in_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 1]}
CLASSIFIER |= {"attention_resolutions": [16], "num_head_channels": 32, "num_classes": 10}
COSINE = DiffusionSettings(noise_schedule="cosine")
MODEL = {"classifier": CLASSIFIER, "diffusion": {"noise_schedule": "cosine"}, "optimizer": {"learning_rate": 1e-3}}
CONFIG = {"model": MODEL, "trainer": TRAINER, "ema_decay": 0.9}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A whole configuration, with data of its own beside it."""
    return write_fashion_mnist_config(tmp_path_factory.mktemp("fit"), CONFIG, batch_size=8)


@pytest.fixture(scope="module")
def run(config):
    """The folder of a fit of four steps."""
    output = config.parent / "run"
    assert exit_code("fit", "--config", config, "--output", output) == 0
    return output


# --------------------------------------------------------------------------------------------------- the training


def test_a_fit_writes_configuration_logs_and_the_checkpoint_of_a_classifier(run):
    assert {path.name for path in run.iterdir()} == {"config.yaml", "logs", "checkpoints"}
    average, raw = read_checkpoint(last(run)), read_checkpoint(last(run), "raw")
    assert average.model_settings == raw.model_settings == ClassifierSettings(**CLASSIFIER)
    assert average.diffusion == COSINE
    assert average.recommended == {}
    assert any(not torch.equal(average.state_dict[name], raw.state_dict[name]) for name in raw.state_dict)
    build_classifier(average)
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["model"]["optimizer"]["weight_decay"] == 0.05
    assert not {"preview", "sag", "sampler"} & written.keys()


# -------------------------------------------------------------------------------------- conversion and guidance


def test_a_converted_classifier_guides_a_network_together_with_sag(run, tmp_path):
    file = tmp_path / "classifier.safetensors"
    assert exit_code("convert", last(run), file, "--dtype", "float16") == 0
    converted = read_checkpoint(file)
    assert (converted.model_settings, converted.diffusion) == (ClassifierSettings(**CLASSIFIER), COSINE)
    assert {tensor.dtype for tensor in converted.state_dict.values()} == {torch.float16}
    options = ["--model", "fashion_mnist", "--num_samples", 2, "--respacing", 4, "--sampler", "ddpm"]
    options += ["--classifier.checkpoint", file, "--trainer.precision", "32-true"]
    options += ["--sag.interval", "0,1"]  # the bundled network's own is shorter
    shards = set()
    for name, scales in {"sag": (0, 0.3), "classifier": (20, 0), "both": (20, 0.3)}.items():
        scale = ["--classifier.scale", scales[0], "--sag.scale", scales[1]]
        assert exit_code("sample", "--output", tmp_path / name, *options, *scale) == 0
        shards.add(next((tmp_path / name / "shards").iterdir()).read_bytes())
    assert len(shards) == 3
    record = json.loads((tmp_path / "both" / "run.json").read_text())
    assert (record["settings"]["classifier"]["scale"], record["nfe"]) == (20, 8)


def test_the_configuration_of_a_classifier_cannot_be_sampled_but_converts_a_state_dict(run, config, tmp_path, capsys):
    assert exit_code("sample", "--config", config, "--output", tmp_path / "run") == 2
    assert "classifier" in capsys.readouterr().err
    state = read_checkpoint(last(run)).state_dict
    torch.save(dict(state), tmp_path / "plain.pt")
    target = tmp_path / "c.safetensors"
    assert exit_code("convert", tmp_path / "plain.pt", target, "--config", config) == 0
    assert read_checkpoint(target).diffusion == COSINE
    assert all(torch.equal(state[name], tensor) for name, tensor in read_checkpoint(target).state_dict.items())


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--sag.scale", "0.3"], ["sag.scale"]),
        (["--model.label_dropout", "0.1"], ["model.label_dropout"]),
        (["--model.classifier.num_chanels", "32"], ["num_chanels", "num_channels"]),
        (["--model.classifier.pool", "best"], ["pool", "spatial_v2", "best"]),
        (["--model.classifier", "imagenet64"], ["model.classifier", "imagenet64"]),
        (["--checkpoint", "fashion_mnist"], ["checkpoint"]),
    ],
)
def test_invalid_options_of_a_classifier_are_refused_in_one_line_and_nothing_is_written(
    options, names, config, tmp_path, capsys
):
    refusal(capsys, tmp_path, "fit", "--config", config, "--output", tmp_path / "run", *options, names=names)
