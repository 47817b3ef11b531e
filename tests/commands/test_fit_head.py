"""`sagl fit` of a direction head, and its use: converted, and in place of the second evaluation."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml

from sagl.models.checkpoints import build_head, read_checkpoint
from sagl.models.direction_head import network_rms
from tests.helpers.commands import checkpoint_of, differences, exit_code, refusal
from tests.helpers.networks import grey_unet, write_grey_unet
from tests.helpers.processes import run_program
from tests.helpers.training import IGNORED_WARNINGS

pytestmark = IGNORED_WARNINGS

OPTIONS = {"num_groups": 2, "group_size": 2, "num_steps": [2, 4], "batches_per_round": 4, "batch_size": 8}
TRAINER = {"max_steps": 6, "accelerator": "cpu", "devices": 1, "val_check_interval": 3}
TRAINER |= {"check_val_every_n_epoch": None, "num_sanity_val_steps": 0, "enable_progress_bar": False}
TWO_LEVELS = {"channel_mult": (1, 2), "attention_resolutions": (8, 4)}
SAG = {"site": "output.0", "blur_sigma": 1.0}
GUIDED = ["--sag.scale", 0.5, "--sag.site", "output.0", "--sag.blur_sigma", 1, "--respacing", 5, "--num_samples", 4]
GUIDED += ["--batch_size", 2, "--trainer.precision", "32-true"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("head")
    network = write_grey_unet(folder / "net.safetensors", **TWO_LEVELS)
    options = {**OPTIONS, "num_validation_groups": 2}
    content = {"checkpoint": str(network), "model": {"direction_head": options}, "sag": SAG, "trainer": TRAINER}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**content, "ema_decay": 0.5}))
    return path


@pytest.fixture(scope="module")
def run(config):
    output = config.parent / "run"
    assert exit_code("fit", "--config", config, "--output", output) == 0
    return output


@pytest.fixture(scope="module")
def head(run):
    """The head beside its network."""
    path = run.parent / "net_sag_head.safetensors"
    assert exit_code("convert", run / "checkpoints" / "last.ckpt", path) == 0
    return path


def test_a_fit_ends_in_a_head_that_names_its_network_and_its_guidance(head):
    file = read_checkpoint(head)
    assert file.model_settings.network_rms == pytest.approx(network_rms(grey_unet(**TWO_LEVELS)))
    assert {name: file.recommended["sag"][name] for name in SAG} == SAG
    network = build_head(file)
    assert network.out.weight.any()
    assert not (network.levels == 1).any()


def test_a_resumed_fit_ends_in_the_weights_of_an_uninterrupted_one_bit_for_bit(config, run):
    output = config.parent / "resumed"
    assert exit_code("fit", "--config", config, "--output", output, "--trainer.max_steps", 3) == 0
    assert exit_code("fit", "--config", config, "--output", output, "--resume") == 0
    assert differences(checkpoint_of(output), checkpoint_of(run)) == []


def test_samples_of_a_head_cost_one_evaluation_a_step_and_record_it(head, tmp_path):
    checkpoint = ["--checkpoint", head.with_name("net.safetensors")]
    for name, flags in {"auto": ["auto"], "file": [head], "renewed": [head, "--sag.renew_every", 2]}.items():
        command = ["sample", *checkpoint, *GUIDED, "--output", tmp_path / name, "--sag.direction_head", *flags]
        assert exit_code(*command) == 0
    by_name = {name: json.loads((tmp_path / name / "run.json").read_text()) for name in ("auto", "file", "renewed")}
    assert [by_name[name]["nfe"] for name in by_name] == [5, 5, 8]
    assert len(by_name["auto"]["settings"]["guidance_sha256"]["sag.direction_head"]) == 64
    first, second = ((tmp_path / name / "grid.png").read_bytes() for name in ("auto", "file"))
    assert first == second


@pytest.mark.slow
def test_two_processes_sample_the_bytes_of_one(head, tmp_path):
    command = ["sample", "--checkpoint", head.with_name("net.safetensors"), *GUIDED]
    command += ["--sag.direction_head", "auto", "--trainer.accelerator", "cpu"]
    shards = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        arguments = [*command, "--output", folder, "--trainer.devices", processes]
        log, variables = tmp_path / f"{processes}.output", {"OMP_NUM_THREADS": "1"}
        code, output = run_program(arguments, Path.cwd(), log, variables=variables, prepare=os.setsid)
        assert code == 0, output
        shards.append({path.name: path.read_bytes() for path in folder.glob("shards/*.tar")})
    assert len(shards[0]) == 2
    assert shards[0] == shards[1]


@pytest.mark.slow
def test_two_processes_train_one_head(config, start, run):
    two = start(config, config.parent / "two", ranks=2)
    state = checkpoint_of(two.finish())["state_dict"]
    one = checkpoint_of(run)["state_dict"]
    assert torch.equal(state["network.levels"], one["network.levels"])
    assert state["network.out.weight"].isfinite().all()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--model.direction_head.method", "history"], ["model.direction_head.method", "history"]),
        (["--model.direction_head.num_steps", "[5,3]"], ["direction_head.num_steps", "5"]),
        (["--sag.site", "output.9"], ["sag.site", "output.9"]),
        (["--preview.num_samples", "4"], ["preview.num_samples", "direction_head"]),
        (["--checkpoint", "nothing"], ["nothing"]),
    ],
)
def test_settings_without_a_meaning_are_refused(config, tmp_path, capfd, flags, parts):
    refusal(capfd, tmp_path, "fit", "--config", config, "--output", tmp_path / "run", *flags, names=parts)


def test_a_head_is_validated_by_its_training(run, capfd):
    refusal(capfd, run, "validate", run, names=["direction_head"])
