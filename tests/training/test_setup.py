"""Devices, strategies and batches of a training, which are chosen before Lightning's Trainer is built."""

import pytest
import torch

from sagl.configuration.training import rename_network_flags, training_parser
from sagl.errors import UserError
from tests.helpers.errors import refused
from tests.helpers.training import prepare_training


@pytest.fixture
def setup(tmp_path):
    """Parse flags of a training on meta tensors, and return its trainer, module and data."""

    def parse(*flags):
        parser = training_parser("fit", full=True)
        arguments = ["--config", "configs/lsun_cat.yaml", "--output", str(tmp_path / "run"), *flags]
        with torch.device("meta"):
            return prepare_training(parser, arguments)

    return parse


CPU = ("--trainer.accelerator", "cpu")


@pytest.mark.parametrize(("devices", "batch_size", "accumulated"), [(1, 8, 32), (2, 8, 16), (4, 64, 1)])
def test_accumulation_follows_from_the_global_batch_and_the_processes(devices, batch_size, accumulated, setup):
    flags = ("--trainer.devices", str(devices), "--data.batch_size", str(batch_size), "--trainer.strategy", "ddp")
    assert setup(*CPU, *flags).trainer.accumulate_grad_batches == accumulated


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--data.batch_size", "3"), ("global_batch_size", "256", "3")),
        (("--data.batch_size", "0"), ("data.batch_size", "0")),
        (("--global_batch_size", "4"), ("global_batch_size", "4", "8")),
        (("--trainer.accumulate_grad_batches", "2"), ("accumulate_grad_batches", "global_batch_size", "2")),
        (("--trainer.strategy", "fsdp"), ("trainer.strategy", "fsdp")),
        (("--trainer.strategy", "deepspeed_stage_2"), ("trainer.strategy", "deepspeed_stage_2")),
        (("--trainer.accelerator", "mps"), ("trainer.accelerator", "mps")),
        (("--trainer.overfit_batches", "3"), ("trainer.overfit_batches", "3")),
        (("--trainer.overfit_batches", "0.5"), ("trainer.overfit_batches", "0.5")),
        (("--trainer.reload_dataloaders_every_n_epochs", "2"), ("trainer.reload_dataloaders_every_n_epochs", "2")),
    ],
)
def test_what_cannot_be_trained_is_refused(flags, names, setup):
    with pytest.raises(UserError) as error:
        setup(*CPU, *flags)
    assert all(name in str(error.value) for name in names)


def test_several_processes_cannot_validate_by_their_clocks(setup):
    flags = ("--trainer.val_check_interval", "00:01:00:00", "--trainer.strategy", "ddp")
    assert setup(*CPU, *flags, "--trainer.devices", "1").trainer._val_check_time_interval == 3600
    with refused("`trainer.val_check_interval`", "00:01:00:00", "2 processes"):
        setup(*CPU, *flags, "--trainer.devices", "2")


@pytest.mark.parametrize("num_validation", [0, 1])
def test_there_is_no_validation_without_images_for_which_a_due_save_would_wait(num_validation, setup):
    trainer = setup(*CPU, "--data.num_validation", str(num_validation)).trainer
    assert (trainer.limit_val_batches > 0) == (num_validation > 0)


@pytest.mark.parametrize("flag", ["model.use_checkpoint", "model.network.use_checkpoint"])
def test_checkpoints_of_activations_can_be_chosen_for_a_named_network(flag, setup):
    for value in (True, False):
        arguments = rename_network_flags([f"--{flag}", str(value).lower()])
        network = setup(*CPU, *arguments).module.network
        assert network.settings.use_checkpoint == network.middle_block.use_checkpoint == value
