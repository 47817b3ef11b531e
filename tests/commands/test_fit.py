import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sagl.models.checkpoints import build_network, read_checkpoint
from sagl.modules.diffusion_module import DiffusionModule
from sagl.settings.network import UNetSettings
from tests.helpers.commands import exit_code, refusal
from tests.helpers.files import contents, read_png, write_fashion_mnist, write_fashion_mnist_config, write_lsun
from tests.helpers.training import IGNORED_WARNINGS

pytestmark = IGNORED_WARNINGS

NETWORK = {"image_size": 32, "in_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 1]}
NETWORK |= {"attention_resolutions": [16], "num_classes": 10, "null_label": True}
TRAINER = {
    "max_steps": 4,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "log_every_n_steps": 1,
    "val_check_interval": 2,
    "check_val_every_n_epoch": None,
}
CONFIG = {
    "model": {
        "network": NETWORK,
        "diffusion": {"noise_schedule": "cosine"},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "label_dropout": 0.1,
    },
    "trainer": TRAINER,
    "ema_decay": 0.9,
    "preview": {"num_samples": 0},
}
NO_VALIDATION = ["--trainer.limit_val_batches", 0]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A whole configuration, with data of its own beside it."""
    return write_fashion_mnist_config(tmp_path_factory.mktemp("fit"), CONFIG)


@pytest.fixture(scope="module")
def run(config):
    """The folder of a fit of four steps."""
    output = config.parent / "run"
    assert exit_code("fit", "--config", config, "--output", output) == 0
    return output


class Recorder:
    """Records step, learning rate and weights at the start of every training step."""

    def __init__(self, monkeypatch):
        self.steps, self.rates, self.weights = [], [], []
        training_step = DiffusionModule.training_step

        def recorded(module, batch, batch_idx):
            self.steps.append(module.global_step)
            self.rates.append(module.trainer.optimizers[0].param_groups[0]["lr"])
            self.weights.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
            return training_step(module, batch, batch_idx)

        monkeypatch.setattr(DiffusionModule, "training_step", recorded)


@pytest.fixture
def recorder(monkeypatch):
    return Recorder(monkeypatch)


def last(run):
    return run / "checkpoints" / "last.ckpt"


def read(run):
    return torch.load(last(run), weights_only=True)


# ------------------------------------------------------------------------------------------------------- output


def test_a_fit_writes_configuration_logs_and_last_checkpoint_and_nothing_else(run):
    written = {path.relative_to(run) for path in contents(run)}
    assert {Path("config.yaml"), Path("checkpoints/last.ckpt")} <= written
    assert {path.parts[0] for path in written} == {"config.yaml", "logs", "checkpoints"}
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert {name: config["model"]["network"][name] for name in NETWORK} == NETWORK
    assert config["model"]["optimizer"]["warmup_steps"] == 2
    assert config["model"]["diffusion"]["num_timesteps"] == 1000
    assert (config["ema_decay"], config["save_every_minutes"]) == (0.9, 5.0)


def test_losses_throughput_memory_and_gradient_norm_are_logged(run):
    logs = EventAccumulator(str(run / "logs")).Reload()
    scalars = {tag: [(e.step, e.value) for e in logs.Scalars(tag)] for tag in logs.Tags()["scalars"]}
    assert [step for step, _ in scalars["train/loss"]] == [0, 1, 2, 3]
    for name in ("images_per_second", "peak_memory_gb", "grad_norm", "lr", "mse", "vlb"):
        assert all(value >= 0 for _, value in scalars[f"train/{name}"]), name
    assert [value for _, value in scalars["train/skipped_batches"]] == [0.0] * 4
    for tag in ("val/loss", "val/mse", *(f"val/loss_q{q}" for q in range(4))):
        assert [step for step, _ in scalars[tag]] == [1, 3]  # after steps 0, 1 and 2, 3


def test_the_last_checkpoint_is_read_without_running_code_and_holds_both_sets_of_weights(run):
    assert read(run)["global_step"] == 4
    average, raw = read_checkpoint(last(run)), read_checkpoint(last(run), "raw")
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in NETWORK.items()}
    assert average.model_settings == raw.model_settings == UNetSettings(**settings)
    assert average.diffusion.noise_schedule == "cosine"
    assert any(not torch.equal(average.state_dict[name], raw.state_dict[name]) for name in raw.state_dict)
    build_network(average)


def test_previews_are_in_the_folder_and_in_the_logs(config, tmp_path):
    options = ["--preview.num_samples", "3", "--preview.scales", "[0, 0.5]", "--preview.respacing", "2"]
    options += ["--sag.site", "middle", "--sag.blur_sigma", "1"]
    assert exit_code("fit", "--config", config, "--output", tmp_path / "run", *options) == 0
    grids = sorted((tmp_path / "run" / "previews").iterdir())
    assert [path.name for path in grids] == ["step_00000002.png", "step_00000004.png"]
    logs = EventAccumulator(str(tmp_path / "run" / "logs"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in logs.Images("preview/scales 0 0.5")] == [2, 4]
    assert read_png(grids[0]).shape == (3 * 66 + 2, 3 * 66 + 2, 3)


# -------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("stop", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_a_resumed_fit_ends_in_the_weights_of_an_uninterrupted_one_bit_for_bit(config, stop, tmp_path):
    write_fashion_mnist(tmp_path, train=32, test=8)
    fit = ["fit", "--config", config, "--data.root", tmp_path, "--data.batch_size", 8]  # 3 batches an epoch
    fit += ["--trainer.log_every_n_steps", 3]
    assert exit_code(*fit, "--output", tmp_path / "whole", "--trainer.max_steps", 5) == 0
    assert exit_code(*fit, "--output", tmp_path / "cut", "--trainer.max_steps", stop) == 0
    assert exit_code(*fit, "--output", tmp_path / "cut", "--trainer.max_steps", 5, "--resume") == 0
    whole, cut = read(tmp_path / "whole"), read(tmp_path / "cut")
    for kind in ("state_dict", "current_model_state"):
        assert [name for name, tensor in whole[kind].items() if not torch.equal(cut[kind][name], tensor)] == []


def test_a_resumed_fit_uses_changed_settings_names_them_and_records_them(run, config, recorder, tmp_path, capsys):
    output = shutil.copytree(run, tmp_path / "run")
    changes = ["--model.optimizer.learning_rate", 1e-4, "--model.optimizer.weight_decay", 0.5]
    assert exit_code("fit", "--config", config, "--output", output, "--resume", "--trainer.max_steps", 6, *changes) == 0
    assert recorder.rates == pytest.approx([1e-4, 1e-4])
    groups = read(output)["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5]
    settings = yaml.safe_load((output / "config.yaml").read_text())["model"]["optimizer"]
    assert (settings["learning_rate"], settings["weight_decay"]) == (1e-4, 0.5)
    text = capsys.readouterr().out
    assert all(name in text for name in ("learning_rate 0.0001 (was 0.001)", "weight_decay 0.5 (was 0.0)"))


@pytest.mark.parametrize("changes", [["--model.network.num_channels", 64], ["--checkpoint", "fashion_mnist"]])
def test_a_resumed_fit_refuses_another_network_or_start_and_changes_nothing(changes, run, config, tmp_path, capsys):
    output = shutil.copytree(run, tmp_path / "run")
    command = ["fit", "--config", config, "--output", output, "--resume", "--trainer.max_steps", 6, *changes]
    refusal(capsys, output, *command, names=[changes[0].lstrip("-")])


def test_a_decay_that_nothing_ends_is_refused(config, tmp_path, capsys):
    flags = ["--model.optimizer.decay_steps", 2, "--trainer.max_steps", -1, "--trainer.max_epochs", 1]
    command = ["fit", "--config", config, "--output", tmp_path / "run", *flags]
    refusal(capsys, tmp_path, *command, names=["--model.optimizer.decay_steps", "trainer.max_steps"])


@pytest.mark.parametrize("name", ["run", "new"])
def test_a_trial_writes_nothing(name, run, config, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    before = contents(tmp_path)
    previews = ["--preview.num_samples", 2, "--preview.respacing", 2, "--sag.site", "middle", "--sag.blur_sigma", 1]
    command = ["fit", "--config", config, "--output", tmp_path / name, "--resume", "--trainer.fast_dev_run", "true"]
    assert exit_code(*command, *previews) == 0
    assert contents(tmp_path) == before
    assert (tmp_path / "new").exists() is False


def test_resume_without_a_checkpoint_starts_from_the_beginning(config, recorder, tmp_path):
    command = ["fit", "--config", config, "--output", tmp_path / "new", "--resume", "--trainer.max_steps", 2]
    assert exit_code(*command) == 0
    assert recorder.steps == [0, 1]
    assert recorder.rates == pytest.approx([1e-3 / 3, 2e-3 / 3])


def test_the_written_configuration_fits_again_to_the_same_weights(run, tmp_path):
    assert exit_code("fit", "--config", run / "config.yaml", "--output", tmp_path / "again") == 0
    again, first = read(tmp_path / "again"), read(run)
    for kind in ("state_dict", "current_model_state"):
        for name, tensor in first[kind].items():
            torch.testing.assert_close(again[kind][name], tensor, msg=f"{kind} {name}")


def test_an_existing_run_is_refused_without_resume_and_a_damaged_one_with_it(run, config, tmp_path, capsys):
    last(tmp_path).parent.mkdir()
    last(tmp_path).write_bytes(b"damaged")
    for output, options, name in ((run, [], "output"), (tmp_path, ["--resume"], "checkpoint")):
        refusal(capsys, output, "fit", "--config", config, "--output", output, *options, names=[name])


# ---------------------------------------------------------------------------------------------- initial weights


def test_training_starts_from_the_weights_of_a_checkpoint_and_frozen_ones_remain(
    run, config, recorder, tmp_path, capsys
):
    options = [
        "--checkpoint",
        last(run),
        "--trainer.max_steps",
        2,
        "--model.freeze",
        '["input_blocks.*"]',
        *NO_VALIDATION,
    ]
    options += ["--model.network.num_classes", "12"]
    assert exit_code("fit", "--config", config, "--output", tmp_path / "run", *options) == 0
    output = capsys.readouterr().out
    assert "has 10 classes: the 12 of the network start as their mean" in output
    assert "random weights" not in output
    first, second = recorder.weights
    expected = build_network(read_checkpoint(last(run))).state_dict()
    del expected["label_emb.weight"]
    assert [name for name, tensor in expected.items() if not torch.equal(first[f"network.{name}"], tensor)] == []
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed
    assert not any(name.startswith("network.input_blocks.") for name in changed)
    assert recorder.steps == [0, 1]


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--model.optimizer.learning_rate", "0"], ["learning_rate", "0.0"]),
        (["--model.network.null_label", "false"], ["label_dropout"]),
        (["--model.network.image_size", "big"], ["image_size"]),
        (["--checkpoint", "fashion_mnist"], ["checkpoint"]),  # of another network
        (["--trainer.devices", "0"], ["trainer", "devices"]),
        (["--trainer.precision", "12"], ["trainer", "12"]),
    ],
)
def test_invalid_options_are_refused_in_one_line_and_nothing_is_written(options, names, config, tmp_path, capsys):
    refusal(capsys, tmp_path, "fit", "--config", config, "--output", tmp_path / "run", *options, names=names)


def test_what_the_trainer_refuses_during_a_fit_is_one_line(config, tmp_path, capsys):
    options = ["--trainer.val_check_interval", "1000", "--trainer.check_val_every_n_epoch", "1"]
    assert exit_code("fit", "--config", config, "--output", tmp_path / "run", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "val_check_interval" in line


def test_a_fit_without_logs_and_checkpoints_writes_its_configuration_alone_and_says_how_it_starts(
    config, tmp_path, capsys
):
    options = ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false", "--trainer.max_steps", "1"]
    assert exit_code("fit", "--config", config, "--output", tmp_path / "run", *options) == 0
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["config.yaml"]
    assert "random weights" in capsys.readouterr().out


def test_a_signal_that_ends_a_fit_without_checkpoints_says_that_nothing_was_saved(
    config, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    command = ["fit", "--config", config, "--output", tmp_path / "run", "--trainer.enable_checkpointing", "false"]
    assert exit_code(*command) == 128 + signal.SIGTERM
    assert "nothing of it was saved" in capsys.readouterr().err


def test_a_fit_without_an_output_folder_is_refused(config, capsys):
    refusal(capsys, config.parent, "fit", "--config", config, names=["output"])


# ----------------------------------------------------------------------------------------------------- sampling


def test_a_checkpoint_can_be_sampled_with_and_without_its_configuration(run, tmp_path):
    options = ["--num_samples", 2, "--batch_size", 2, "--respacing", 2, "--checkpoint", last(run)]
    sag = ["--sag.scale", 0.3, "--sag.site", "output.0"]
    assert exit_code("sample", *options, *sag, "--output", tmp_path / "checkpoint") == 0
    assert (tmp_path / "checkpoint" / "samples_2x32x32x3.npz").is_file()
    assert exit_code("sample", *options, "--config", run / "config.yaml", "--output", tmp_path / "with_config") == 0


@pytest.mark.parametrize("options", [["--config"], ["--config", "", "--resume"]])
def test_a_config_without_a_name_is_refused(options, tmp_path, capsys):
    line = refusal(capsys, tmp_path, "fit", "--output", tmp_path / "new", *options, names=["config"])
    assert "data" not in line  # which a config would have


# ---------------------------------------------------------------------------------------------------------- LSUN


def test_lsun_cat_is_trained_by_its_configuration_from_an_lmdb(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))
    write_lsun(tmp_path / "cat", "JPEG")
    network = {"image_size": 16, "num_channels": 32, "channel_mult": [1], "attention_resolutions": [16]}
    options = ["--data.root", tmp_path, "--data.batch_size", 2, "--data.num_validation", 2, "--data.num_workers", 0]
    options += ["--model.network", json.dumps(network), "--preview.num_samples", 1, "--preview.respacing", 2]
    options += ["--preview.scales", "[0,0.05]"]
    options += ["--trainer.max_steps", 2, "--trainer.accelerator", "cpu", "--global_batch_size", 4]
    options += ["--trainer.log_every_n_steps", 1, "--trainer.enable_progress_bar", "false"]
    assert exit_code("fit", "--config", "lsun_cat", "--output", tmp_path / "run", *options) == 0
    assert read(tmp_path / "run")["global_step"] == 2
