import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import lmdb
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sagl.models.checkpoints import build_network, read_checkpoint
from sagl.modules.diffusion_module import DiffusionModule
from sagl.settings.network import UNetSettings
from tests.helpers.tiny import QUIET, QUIET_CLI, contents, exit_code, read_png, write_config, write_tiny

pytestmark = [*QUIET, *QUIET_CLI]

NETWORK = {"image_size": 32, "in_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 1]}
NETWORK |= {"attention_resolutions": [16], "num_classes": 10, "null_label": True}
CONFIG = {
    "model": {
        "network": NETWORK,
        "diffusion": {"noise_schedule": "cosine"},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "label_dropout": 0.1,
    },
    "trainer": {
        "max_steps": 4,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
    },
    "ema_decay": 0.9,
    "preview": {"num_samples": 0},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A whole configuration, with data of its own beside it."""
    return write_config(tmp_path_factory.mktemp("fit"), CONFIG)


class ProgressReporter:
    """What the training steps of a fit began with, and its module."""

    def __init__(self, monkeypatch):
        self.steps, self.optimizer, self.rates, self.raw, self.module = [], [], [], [], None
        step = DiffusionModule.training_step

        def watched(module, batch, batch_idx):
            optimizer = module.trainer.optimizers[0]
            self.module = module
            self.steps.append(module.global_step)
            self.optimizer.append([{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()])
            self.rates.append(optimizer.param_groups[0]["lr"])
            self.raw.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
            return step(module, batch, batch_idx)

        monkeypatch.setattr(DiffusionModule, "training_step", watched)


@pytest.fixture
def watch(monkeypatch):
    return ProgressReporter(monkeypatch)


@pytest.fixture(scope="module")
def fitted(config):
    """A fit of four steps, as it came out."""
    output = config.parent / "fitted"
    assert exit_code("fit", "--config", config, "--output", output) == 0
    return output


def copy_of(run, folder):
    """A run folder that may be changed: the configuration and the checkpoint."""
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "checkpoints/last.ckpt"):
        (folder / name).write_bytes((run / name).read_bytes())
    return folder


def checkpoint_of(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def scalars_of(run):
    """What was logged: name -> (step, value), ..."""
    events = EventAccumulator(str(run / "logs")).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# ---------------------------------------------------------------------------------------------- what is written


def test_a_fit_writes_its_configuration_logs_and_last_checkpoint_and_nothing_else(fitted):
    written = {path.relative_to(fitted) for path in contents(fitted)}
    assert {Path("config.yaml"), Path("checkpoints/last.ckpt")} <= written
    assert any(path.parent == Path("logs") and "tfevents" in path.name for path in written)
    assert {path.parts[0] for path in written} == {"config.yaml", "logs", "checkpoints"}
    assert [path.name for path in (fitted / "checkpoints").iterdir()] == ["last.ckpt"]


def test_the_configuration_that_is_written_says_what_was_asked_and_what_was_left_out(fitted):
    written = yaml.safe_load((fitted / "config.yaml").read_text())
    assert {name: written["model"]["network"][name] for name in NETWORK} == NETWORK
    assert written["model"]["optimizer"]["warmup_steps"] == 2
    assert written["model"]["diffusion"]["num_timesteps"] == 1000
    assert written["ema_decay"] == 0.9
    assert written["save_every_minutes"] == 5.0


def test_validation_logs_the_loss_whole_and_by_quarter_of_the_timesteps(fitted):
    scalars = scalars_of(fitted)
    quarters = [f"val/loss_quarter_{q}" for q in range(4)]
    for tag in ("val/loss", "val/mse", *quarters):
        assert [step for step, _ in scalars[tag]] == [1, 3]  # after steps 0, 1 and 2, 3
    for k in range(2):
        parts = [scalars[tag][k][1] for tag in quarters]
        assert len(set(parts)) == 4
        assert sum(parts) / 4 == pytest.approx(scalars["val/loss"][k][1], rel=1e-5)
    assert [step for step, _ in scalars["train/loss"]] == [0, 1, 2, 3]


def test_the_last_checkpoint_is_read_without_running_code_and_holds_both_sets_of_weights(fitted):
    checkpoint = checkpoint_of(fitted)
    assert checkpoint["global_step"] == 4
    path = fitted / "checkpoints" / "last.ckpt"
    average, raw = read_checkpoint(path), read_checkpoint(path, "raw")
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in NETWORK.items()}
    assert average.model_settings == raw.model_settings == UNetSettings(**settings)
    assert average.diffusion.noise_schedule == "cosine"
    assert any(not torch.equal(average.state_dict[name], raw.state_dict[name]) for name in raw.state_dict)
    build_network(average)


# -------------------------------------------------------------------------------------------------------- resume


def test_resume_goes_on_from_the_step_weights_averages_and_optimiser_that_were_saved(
    fitted, config, watch, tmp_path, monkeypatch
):
    output = copy_of(fitted, tmp_path / "run")
    saved, averages = checkpoint_of(output), []
    monkeypatch.setattr(
        "sagl.callbacks.ema.EMA.on_train_start",
        lambda callback, *_: averages.append({k: v.clone() for k, v in callback._average_model.state_dict().items()}),
    )
    command = ["fit", "--config", config, "--output", output, "--resume"]
    assert exit_code(*command, "--trainer.max_steps", 7) == 0
    assert watch.steps == [4, 5, 6]
    for name, tensor in saved["current_model_state"].items():
        assert torch.equal(watch.raw[0][name], tensor), name
    for name, tensor in saved["state_dict"].items():
        assert torch.equal(averages[0][f"module.{name}"], tensor), name
    assert int(averages[0]["n_averaged"]) == 4
    moments = saved["optimizer_states"][0]["state"]
    assert len(watch.optimizer[0]) == len(moments)
    for found, want in zip(watch.optimizer[0], moments.values(), strict=True):
        assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in want.items()}
    assert {float(s["step"]) for s in watch.optimizer[0]} == {4.0}
    assert checkpoint_of(output)["global_step"] == 7


@pytest.mark.parametrize("stopped_at", [2, 3, 4])
def test_a_resumed_fit_ends_in_the_weights_of_an_uninterrupted_one_bit_for_bit(config, stopped_at, tmp_path):
    fit = ["fit", "--config", config, "--data.batch_size", 64, "--trainer.log_every_n_steps", 3]  # 3 batches an epoch
    assert exit_code(*fit, "--output", tmp_path / "whole", "--trainer.max_steps", 7) == 0
    assert exit_code(*fit, "--output", tmp_path / "cut", "--trainer.max_steps", stopped_at) == 0
    assert exit_code(*fit, "--output", tmp_path / "cut", "--trainer.max_steps", 7, "--resume") == 0
    whole, cut = checkpoint_of(tmp_path / "whole"), checkpoint_of(tmp_path / "cut")
    for kind in ("state_dict", "current_model_state"):
        assert [name for name, tensor in whole[kind].items() if not torch.equal(cut[kind][name], tensor)] == []


def test_resume_with_nothing_saved_starts_from_the_beginning(config, watch, tmp_path):
    command = ["fit", "--config", config, "--output", tmp_path / "new", "--resume", "--trainer.max_steps", 2]
    assert exit_code(*command) == 0
    assert watch.steps == [0, 1]
    assert watch.rates == pytest.approx([1e-3 / 3, 2e-3 / 3])
    assert checkpoint_of(tmp_path / "new")["global_step"] == 2


def test_the_written_configuration_fits_again_by_itself_to_the_same_weights(fitted, watch, tmp_path):
    assert exit_code("fit", "--config", fitted / "config.yaml", "--output", tmp_path / "again") == 0
    again, first = checkpoint_of(tmp_path / "again"), checkpoint_of(fitted)
    assert watch.steps == [0, 1, 2, 3]
    for kind in ("state_dict", "current_model_state"):
        for name, tensor in first[kind].items():
            torch.testing.assert_close(again[kind][name], tensor, msg=f"{kind} {name}")


def test_an_existing_run_is_refused_without_resume_and_left_alone(fitted, config, capsys):
    before = contents(fitted)
    assert exit_code("fit", "--config", config, "--output", fitted) == 2
    assert "`output` must be a new folder" in capsys.readouterr().err
    assert contents(fitted) == before


class Touch:
    """Unpickled, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_last_checkpoint_that_wants_to_run_code_is_refused_and_the_code_not_run(fitted, config, tmp_path, capsys):
    output, touched = copy_of(fitted, tmp_path / "run"), tmp_path / "touched"
    torch.save({**checkpoint_of(fitted), "extra": Touch(touched)}, output / "checkpoints" / "last.ckpt")
    try:
        code = exit_code("fit", "--config", config, "--output", output, "--resume")
    finally:
        assert not touched.exists(), "the code in the checkpoint was run"
    assert code == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model.optimizer.learning_rate", "0"], "`learning_rate`"),
        (["--model.label_dropout", "2"], "`label_dropout` must be in [0, 1], got 2.0"),
        (["--model.network.null_label", "false"], "`label_dropout` needs a network with null_label"),
        (["--model.diffusion.variance", "fixed_small"], "`variance`"),
        (["--ema_decay", "1"], "decay` must be in [0, 1), got 1.0"),
        (["--save_every_steps", "0"], "`save_every_steps` must be above 0, got 0"),
        (["--save_every_minutes", "-1"], "`save_every_minutes` must be above 0, got -1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line_and_nothing_is_written(
    flags, named, config, tmp_path, capsys
):
    assert exit_code("fit", "--config", config, "--output", tmp_path / "run", *flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("sagl fit: ")
    assert said.count("\n") == 1
    assert named in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--nonsense", "3"], "--nonsense"),
        (["--model.network.image_size", "big"], "image_size"),
        (["--trainer.max_steps", "many"], "max_steps"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--ckpt_path", "absent.ckpt"], "ckpt_path"),
    ],
)
def test_flags_that_the_parser_does_not_know_are_refused_in_one_line_and_nothing_is_written(
    flags, named, config, tmp_path, capsys
):
    assert exit_code("fit", "--config", config, "--output", tmp_path / "run", *flags) == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_refused_fit_says_one_line_in_a_process_of_its_own(config, fitted):
    command = [sys.executable, "-m", "sagl.cli", "fit", "--config", str(config), "--output", str(fitted)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("sagl fit: `output` must be a new folder")
    assert ended.stderr.count("\n") == 1, ended.stderr


# ------------------------------------------------------------------------------------------------------- SIGTERM


def test_a_polite_end_saves_and_resume_goes_on_from_there(config, watch, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "sagl.cli", "fit", "--config", str(config), "--output", str(output)]
    flags = ["--trainer.max_steps", "1000000", "--trainer.val_check_interval", "1000000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("w") as said:
        fit = subprocess.Popen([*command, *flags], stdout=said, stderr=said, env=environment)
        try:
            deadline = time.monotonic() + 100
            while "train/loss" not in logged(output):
                assert fit.poll() is None, (tmp_path / "said").read_text()
                assert time.monotonic() < deadline, "no step was logged"
                time.sleep(0.2)
            fit.send_signal(signal.SIGTERM)
            fit.wait(timeout=100)
        finally:
            fit.kill()
            fit.wait()
    lines = (tmp_path / "said").read_text()
    assert "GPU available" in lines
    assert not any(word in lines for word in ("litlogger", "TPU", "weights_only"))  # nobody can act on them
    step = checkpoint_of(output)["global_step"]
    assert step > 0
    assert exit_code("fit", "--config", config, "--output", output, "--resume", "--trainer.max_steps", step + 1) == 0
    assert watch.steps == [step]


def logged(run):
    """Tags of a run that may not have begun to write."""
    return scalars_of(run) if list(run.glob("logs/*tfevents*")) else {}


# -------------------------------------------------------------------------------------------------- what comes next


def test_what_fit_wrote_can_be_sampled_from(fitted, tmp_path):
    flags = ["--num_samples", 2, "--batch_size", 2, "--respacing", 2, "--sag.scale", 0.3, "--sag.site", "output.0"]
    checkpoint = fitted / "checkpoints" / "last.ckpt"
    assert exit_code("sample", "--checkpoint", checkpoint, "--output", tmp_path / "run", *flags) == 0
    assert (tmp_path / "run" / "samples_2x32x32x3.npz").is_file()


def test_the_written_configuration_samples_as_well_as_it_fits(fitted, tmp_path):
    flags = ["--num_samples", 2, "--batch_size", 2, "--respacing", 2]
    command = ["sample", "--config", fitted / "config.yaml", "--checkpoint", fitted / "checkpoints" / "last.ckpt"]
    assert exit_code(*command, "--output", tmp_path / "run", *flags) == 0


# --------------------------------------------------------------------------------------------------------- help


def test_help_is_two_screens_and_loads_no_torch(capsys):
    script = "import sys; from sagl.cli import main; main(['fit', '--help']); assert 'torch' not in sys.modules"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert len(said.splitlines()) <= 70
    assert max(map(len, said.splitlines())) <= 120
    assert "--help_all" in said


def test_every_flag_that_help_shows_is_one_that_fit_takes(capsys):
    exit_code("fit", "--help_all")
    taken = set(re.findall(r"--[\w.]+", capsys.readouterr().out)) | {"--help", "--model.optimizer", "--model.loss"}
    exit_code("fit", "--help")
    shown = set(re.findall(r"^  (?:-h, )?(--[\w.]+)", capsys.readouterr().out, re.M))
    assert {flag.rstrip(".") for flag in shown} - {"--help_all", "--data", "--trainer"} <= taken


def test_previews_are_in_the_folder_and_in_the_logs(config, tmp_path):
    flags = ["--preview.num_samples", "3", "--preview.scales", "[0, 0.5]", "--preview.respacing", "2"]
    flags += ["--sag.site", "middle", "--sag.blur_sigma", "1"]
    assert exit_code("fit", "--config", config, "--output", tmp_path / "run", *flags) == 0
    drawn = sorted(path.name for path in (tmp_path / "run" / "previews").iterdir())
    assert drawn == ["step_00000002.png", "step_00000004.png"]
    logs = EventAccumulator(str(tmp_path / "run" / "logs"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in logs.Images("preview/scales 0 0.5")] == [2, 4]
    assert read_png(tmp_path / "run" / "previews" / drawn[0]).shape == (3 * 66 + 2, 3 * 66 + 2, 3)


def test_training_begins_from_the_weights_of_a_checkpoint(fitted, config, watch, tmp_path, capsys):
    start = fitted / "checkpoints" / "last.ckpt"
    more = ["--checkpoint", start, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
    assert exit_code("fit", "--config", config, "--output", tmp_path / "run", *more) == 0
    want = build_network(read_checkpoint(start)).state_dict()
    got = {name.removeprefix("network."): tensor for name, tensor in watch.raw[0].items()}
    assert all(torch.equal(tensor, got[name]) for name, tensor in want.items())
    assert watch.steps[0] == 0
    capsys.readouterr()
    others = ["--model.network.num_classes", "12"]
    assert exit_code("fit", "--config", config, "--output", tmp_path / "other", *more, *others) == 0
    assert "The checkpoint has 11 labels: the network's 13 are new" in capsys.readouterr().out


def test_a_checkpoint_of_another_network_is_refused_and_nothing_is_written(config, tmp_path, capsys):
    other = write_tiny(tmp_path / "other.safetensors")
    command = ["fit", "--config", config, "--output", tmp_path / "run", "--checkpoint", other]
    assert exit_code(*command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "`checkpoint` must fit the network" in said
    assert not (tmp_path / "run").exists()


def test_frozen_parameters_stay_as_they_were(config, watch, tmp_path):
    flags = ["--model.freeze", '["input_blocks.*"]', "--trainer.limit_val_batches", "0"]
    assert exit_code("fit", "--config", config, "--output", tmp_path / "run", *flags) == 0
    same = {name: torch.equal(watch.raw[0][name], watch.raw[-1][name]) for name in watch.raw[0]}
    assert all(same[name] for name in same if name.startswith("network.input_blocks."))
    assert not all(same.values())


def test_what_a_researcher_watches_is_logged(fitted):
    logs = EventAccumulator(str(fitted / "logs")).Reload()
    for name in ("gradient_norm", "images_per_second", "peak_gigabytes", "skipped", "rate", "loss", "mse", "vb"):
        values = [event.value for event in logs.Scalars(f"train/{name}")]
        assert values, name
        assert all(value >= 0 for value in values)
    assert max(event.value for event in logs.Scalars("train/gradient_norm")) > 0
    assert [event.value for event in logs.Scalars("train/skipped")] == [0.0] * 4


# ---------------------------------------------------------------------------------------------------------- LSUN

TINY_CAT = {"image_size": 32, "num_channels": 32, "num_res_blocks": 2, "channel_mult": [1, 1]}
TINY_CAT |= {"attention_resolutions": [16], "num_head_channels": 32, "learn_sigma": True}


def write_cats(folder, count):
    """Pictures of many sizes as LSUN packs them."""
    environment = lmdb.open(str(folder / "cat"), map_size=1 << 26)
    with environment.begin(write=True) as transaction:
        for i in range(count):
            file = io.BytesIO()
            Image.new("RGB", (40 + i % 9, 36), (i % 256, 9, 200)).save(file, "JPEG")
            transaction.put(f"{i:040x}".encode(), file.getvalue())
    environment.close()


def test_lsun_cat_is_trained_by_its_configuration_from_an_lmdb(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))
    write_cats(tmp_path, 1600)
    flags = ["--data.root", tmp_path, "--trainer.max_steps", "2", "--model.network", json.dumps(TINY_CAT)]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    assert exit_code("fit", "--config", "configs/lsun_cat.yaml", "--output", tmp_path / "run", *flags, *quiet) == 0
    assert checkpoint_of(tmp_path / "run")["global_step"] == 2


def test_without_lsun_one_line_says_what_to_fetch_and_where_to_put_it(tmp_path, capsys):
    flags = ["--output", tmp_path / "run", "--data.root", tmp_path / "lsun", "--model.network", json.dumps(TINY_CAT)]
    assert exit_code("fit", "--config", "configs/lsun_cat.yaml", *flags) == 2
    said = capsys.readouterr().err.strip()
    assert said.splitlines()[-1].startswith("sagl fit: `data.root` must hold LSUN's cat")
    assert "objects/cat.zip" in said
    assert str(tmp_path / "lsun" / "cat") in said
