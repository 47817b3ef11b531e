"""Runs of the real command line, killed at moments that a seed chose, end as a run that was left alone."""

import random

import pytest

from tests.helpers.runs import LOSS_SECOND_MOMENT, checkpoint_of, curves, differences, logs, saves, write_config

STEPS, ACCUMULATED = 60, 2


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Six whole batches an epoch and a rest; dropout, dropped labels, a timestep sampler that learns; validations."""
    trainer = {"max_steps": STEPS, "accumulate_grad_batches": ACCUMULATED, "val_check_interval": 9}
    return write_config(
        tmp_path_factory.mktemp("resume"),
        model=LOSS_SECOND_MOMENT,
        data={"batch_size": 7, "num_workers": 1},
        trainer=trainer,
        save_every_steps=3,
    )


def test_a_run_killed_again_and_again_ends_in_the_same_weights_state_and_curve(config, start):
    output, draw = config.parent / "cut", random.Random(0)
    whole = start(config, config.parent / "whole")

    begun = start(config, output)
    begun.until(lambda: logs(output))
    begun.kill()
    assert not saves(output)

    saving = start(config, output)
    saving.until(lambda: saves(output) and (output / "checkpoints" / "last.partial").exists())
    saving.kill()
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["last.ckpt", "last.partial"]

    for _ in range(2):
        start(config, output, "--resume").kill_after_a_save(draw.uniform(0, 0.2))

    before = checkpoint_of(output)["global_step"]
    start(config, output, "--resume", "--save_every_steps", "1000").ends_when_asked()  # saves then alone
    assert before < checkpoint_of(output)["global_step"] < STEPS

    start(config, output, "--resume").ends_well()
    whole.ends_well()
    assert differences(checkpoint_of(output), checkpoint_of(whole.output)) == []
    assert curves(output) == curves(whole.output)
    assert {step for tag, step in curves(output) if tag == "train/loss"} == set(range(STEPS))
    assert not list(output.rglob("*.partial"))
