"""A training killed at random moments and resumed equals an uninterrupted one."""

import random

import pytest

from tests.helpers.commands import (
    LOSS_SECOND_MOMENT,
    checkpoint_of,
    curves,
    differences,
    logs,
    save_time,
    write_folder_config,
)

STEPS, ACCUMULATED = 60, 2


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Six whole batches per epoch and a remainder; dropout, label dropout, an adaptive timestep sampler, validation."""
    trainer = {"max_steps": STEPS, "accumulate_grad_batches": ACCUMULATED, "val_check_interval": 9}
    return write_folder_config(
        tmp_path_factory.mktemp("resume"),
        model=LOSS_SECOND_MOMENT,
        data={"batch_size": 7, "num_workers": 1},
        trainer=trainer,
        save_every_steps=3,
    )


@pytest.mark.slow
def test_a_run_killed_repeatedly_ends_with_the_same_weights_state_and_curves(config, start):
    output, rng = config.parent / "interrupted", random.Random(0)
    uninterrupted = start(config, config.parent / "uninterrupted")

    starting = start(config, output)
    starting.pause_when(lambda: logs(output))
    starting.kill()
    assert not save_time(output)

    saving = start(config, output)
    saving.pause_when(lambda: save_time(output) and list((output / "checkpoints").glob("last.ckpt.*.partial")))
    saving.kill()
    assert len(list((output / "checkpoints").iterdir())) == 2

    for _ in range(2):
        start(config, output, "--resume").kill_after_a_save(rng.uniform(0, 0.2))

    before = checkpoint_of(output)["global_step"]
    start(config, output, "--resume", "--save_every_steps", "1000").terminate()  # the only save is that of SIGTERM
    assert before < checkpoint_of(output)["global_step"] < STEPS

    start(config, output, "--resume").finish()
    uninterrupted.finish()
    assert differences(checkpoint_of(output), checkpoint_of(uninterrupted.output)) == []
    assert curves(output) == curves(uninterrupted.output)
    assert {step for tag, step in curves(output) if tag == "train/loss"} == set(range(STEPS))
    assert not list(output.rglob("*.partial"))
