"""`sagl fit` of a classifier of noised images, and what becomes of it: converted, and guiding a network."""

import json

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sagl.commands.training import module_for
from sagl.errors import UserError
from sagl.models.checkpoints import build_classifier, read_checkpoint
from sagl.modules.classifier_module import ClassifierModule
from sagl.modules.diffusion_module import DiffusionModule
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import ClassifierSettings
from tests.helpers.tiny import QUIET, QUIET_CLI, exit_code, write_config, write_tiny, write_tiny_classifier

pytestmark = [*QUIET, *QUIET_CLI]

CLASSIFIER = {"image_size": 32, "in_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 1]}
CLASSIFIER |= {"attention_resolutions": [16], "num_head_channels": 32, "num_classes": 10}
COSINE = DiffusionSettings(noise_schedule="cosine")
CONFIG = {
    "model": {
        "classifier": CLASSIFIER,
        "diffusion": {"noise_schedule": "cosine"},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
    },
    "trainer": {
        "max_steps": 4,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "log_every_n_steps": 1,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
    },
    "ema_decay": 0.9,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A whole configuration, with data of its own beside it."""
    return write_config(tmp_path_factory.mktemp("fit"), CONFIG, batch_size=8)


@pytest.fixture(scope="module")
def fitted(config):
    """A fit of four steps, as it came out."""
    output = config.parent / "fitted"
    assert exit_code("fit", "--config", config, "--output", output) == 0
    return output


def last_of(run):
    return run / "checkpoints" / "last.ckpt"


def weights_of(run):
    checkpoint = torch.load(last_of(run), weights_only=True)
    return {f"{kind} {n}": t for kind in ("state_dict", "current_model_state") for n, t in checkpoint[kind].items()}


# --------------------------------------------------------------------------------------------------- the training


def test_a_fit_writes_configuration_logs_and_a_checkpoint_that_is_a_classifier_s(fitted):
    assert {path.name for path in fitted.iterdir()} == {"config.yaml", "logs", "checkpoints"}
    average, raw = read_checkpoint(last_of(fitted)), read_checkpoint(last_of(fitted), "raw")
    assert average.model_settings == raw.model_settings == ClassifierSettings(**CLASSIFIER)
    assert average.diffusion == COSINE
    assert average.recommended == {}
    assert any(not torch.equal(average.state_dict[name], raw.state_dict[name]) for name in raw.state_dict)
    build_classifier(average)
    written = yaml.safe_load((fitted / "config.yaml").read_text())
    assert written["model"]["optimizer"]["weight_decay"] == 0.05
    assert not {"preview", "sag", "sampler"} & written.keys()


def test_what_a_researcher_watches_is_logged(fitted):
    logs = EventAccumulator(str(fitted / "logs")).Reload()
    tags = set(logs.Tags()["scalars"])
    train = ("loss", "accuracy", "accuracy_top_5", "gradient_norm", "rate", "images_per_second", "peak_gigabytes")
    assert {f"train/{name}" for name in (*train, "skipped")} <= tags
    assert [event.step for event in logs.Scalars("train/loss")] == [0, 1, 2, 3]
    for name in ("val/loss", "val/accuracy", "val/accuracy_top_5"):
        assert {name, *(f"{name}_quarter_{q}" for q in range(4))} <= tags


def test_a_resumed_fit_ends_in_the_weights_of_an_uninterrupted_one_bit_for_bit(config, tmp_path):
    fit = ["fit", "--config", config, "--data.batch_size", 64, "--trainer.log_every_n_steps", 3]  # 3 batches an epoch
    fit += ["--trainer.limit_val_batches", 0]
    assert exit_code(*fit, "--output", tmp_path / "whole", "--trainer.max_steps", 6) == 0
    assert exit_code(*fit, "--output", tmp_path / "cut", "--trainer.max_steps", 4) == 0
    assert exit_code(*fit, "--output", tmp_path / "cut", "--trainer.max_steps", 6, "--resume") == 0
    whole, cut = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert [name for name, tensor in whole.items() if not torch.equal(cut[name], tensor)] == []


def test_training_begins_from_the_weights_of_a_checkpoint_of_other_classes_too(fitted, config, tmp_path, capsys):
    flags = ["--checkpoint", last_of(fitted), "--trainer.max_steps", 1, "--trainer.limit_val_batches", 0]
    flags += ["--model.freeze", '["input_blocks.*"]', "--model.classifier.num_classes", 12]
    assert exit_code("fit", "--config", config, "--output", tmp_path / "run", *flags) == 0
    assert "The checkpoint has 10 classes: the classifier's 12 are new" in capsys.readouterr().out
    old, new = read_checkpoint(last_of(fitted)).state_dict, read_checkpoint(last_of(tmp_path / "run"), "raw").state_dict
    same = {name: old[name].shape == new[name].shape and torch.equal(old[name], new[name]) for name in old}
    assert all(same[name] for name in same if name.startswith("input_blocks."))
    assert not all(same.values())


# ----------------------------------------------------------------------------------------------- what comes of it


def test_a_converted_classifier_guides_a_network_together_with_sag(fitted, tmp_path):
    file = tmp_path / "classifier.safetensors"
    assert exit_code("convert", last_of(fitted), file, "--dtype", "float16") == 0
    read = read_checkpoint(file)
    assert (read.model_settings, read.diffusion) == (ClassifierSettings(**CLASSIFIER), COSINE)
    assert {tensor.dtype for tensor in read.state_dict.values()} == {torch.float16}
    flags = ["--num_samples", 2, "--respacing", 4, "--sampler", "ddpm", "--classifier.checkpoint", file]
    flags += ["--trainer.precision", "32-true", "--sag.interval", "0,1"]  # the embedded network's other advice stands
    for name, scales in {"sag": (0, 0.3), "classifier": (20, 0), "both": (20, 0.3)}.items():
        scale = ["--classifier.scale", scales[0], "--sag.scale", scales[1]]
        assert exit_code("sample", "--output", tmp_path / name, *flags, *scale) == 0
    shards = {name: next((tmp_path / name / "shards").iterdir()).read_bytes() for name in ("sag", "classifier", "both")}
    assert len(set(shards.values())) == 3
    record = json.loads((tmp_path / "both" / "run.json").read_text())
    assert (record["settings"]["classifier"]["scale"], record["nfe"]) == (20, 8)


def test_a_classifier_of_another_process_than_the_network_s_is_refused(tmp_path, capsys):
    network = write_tiny(tmp_path / "tiny.safetensors")
    classifier = write_tiny_classifier(tmp_path / "classifier.safetensors", diffusion=COSINE)
    flags = ["--checkpoint", network, "--classifier.checkpoint", classifier, "--classifier.scale", 1, "--respacing", 2]
    assert exit_code("sample", "--output", tmp_path / "run", *flags) == 2
    assert "process, a linear schedule of 1000 timesteps, and this one is for a cosine" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_classifier_s_config_draws_nothing_and_a_state_dict_is_converted_by_it(fitted, config, tmp_path, capsys):
    assert exit_code("sample", "--config", config, "--output", tmp_path / "run") == 2
    assert "has a classifier" in capsys.readouterr().err
    state = read_checkpoint(last_of(fitted)).state_dict
    torch.save(dict(state), tmp_path / "plain.pt")
    target = tmp_path / "c.safetensors"
    assert exit_code("convert", tmp_path / "plain.pt", target, "--config", config) == 0
    assert read_checkpoint(target).diffusion == COSINE
    assert all(torch.equal(state[name], tensor) for name, tensor in read_checkpoint(target).state_dict.items())


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--sag.scale", "0.3"], "`sag.scale` is for networks that draw"),
        (["--preview.num_samples", "0"], "`preview.num_samples` is for networks that draw"),
        (["--respacing", "10"], "`respacing` is for networks that draw"),
        (["--model.network.num_channels", "32"], "`model` must have a network or a classifier, got both"),
        (["--model.label_dropout", "0.1"], "there is no option '--model.label_dropout'"),
        (["--model.classifier.num_chanels", "32"], "'num_chanels'. Did you mean num_channels?"),
        (["--model.classifier.pool", "best"], "`pool` must be one of attention, adaptive, spatial, spatial_v2"),
        (["--model.classifier.num_channels", "33"], "`num_channels` times each of `channel_mult`"),
        (["--model.classifier", "imagenet64"], "`model.classifier` must be one of fashion_mnist_classifier"),
        (["--model.max_nonfinite_batches", "-1"], "`max_nonfinite_batches` must be at least 0"),
        (["--checkpoint", "fashion_mnist"], "A checkpoint may differ from the network in its classes alone"),
    ],
)
def test_what_a_classifier_cannot_be_trained_with_is_refused_in_one_line_and_nothing_is_written(
    flags, named, config, tmp_path, capsys
):
    assert exit_code("fit", "--config", config, "--output", tmp_path / "run", *flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("sagl fit: ")
    assert said.count("\n") == 1
    assert named in said
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_name_in_a_classifier_s_config_is_found(config, tmp_path, capsys):
    said = yaml.safe_load(config.read_text())
    said["model"]["classifier"]["num_chanels"] = 32
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(said))
    assert exit_code("fit", "--config", tmp_path / "wrong.yaml", "--output", tmp_path / "run") == 2
    assert "model.classifier: there is no setting 'num_chanels'. Did you mean num_channels?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "module"),
    [
        ([], DiffusionModule),
        (["--config", "fashion_mnist", "--sag.scale", "0.1"], DiffusionModule),
        (["--config=lsun_cat", "--classifier.scale=1"], DiffusionModule),
        (["--config=fashion_mnist_classifier"], ClassifierModule),
        (["--model.classifier=imagenet64_classifier"], ClassifierModule),
        (["--config"], DiffusionModule),
    ],
)
def test_a_command_line_trains_a_classifier_exactly_if_it_or_its_config_describes_one(arguments, module):
    assert module_for(arguments) is module


def test_a_config_of_sampling_beside_a_classifier_is_refused():
    with pytest.raises(UserError, match=r"`classifier\.scale` is for networks that draw"):
        module_for(["--config", "fashion_mnist_classifier", "--classifier.scale", "1"])
