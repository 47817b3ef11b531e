"""Runs of the real command line, killed at moments that a seed chose, end as a run that was left alone."""

import random
import signal
import time

import pytest

from tests.runs import LOSS_SECOND_MOMENT, checkpoint_of, curves, differences, saves, write_config

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


def logs(output):
    return set(output.glob("logs/*tfevents*"))


def saving(run):
    return (run.output / "checkpoints" / "last.partial").exists()


def killed(run, happened):
    """Once it has happened; what is left in the folder of checkpoints."""
    run.when(happened)
    run.kill()
    return sorted(path.name for path in (run.output / "checkpoints").glob("*"))


def test_a_run_killed_again_and_again_ends_in_the_same_weights_state_and_curve(config, start):
    output, draw = config.parent / "cut", random.Random(0)
    whole = start(config, config.parent / "whole")

    first = start(config, output)
    killed(first, lambda: logs(output))

    in_a_save = start(config, output, "--resume")
    in_a_save.when(lambda: saves(output))
    in_a_save.send(signal.SIGCONT)
    assert killed(in_a_save, lambda: saving(in_a_save)) == ["last.ckpt", "last.partial"]

    for _ in range(2):
        anywhere, before = start(config, output, "--resume"), saves(output)
        anywhere.when(lambda before=before: saves(output) != before)
        anywhere.send(signal.SIGCONT)
        time.sleep(draw.uniform(0, 0.2))
        anywhere.kill()

    before, files = checkpoint_of(output)["global_step"], logs(output)
    asked = start(config, output, "--resume", "--save_every_steps", "1000")  # so that SIGTERM alone has it save
    asked.when(lambda: any(path.stat().st_size > 4000 for path in logs(output) - files))
    asked.send(signal.SIGTERM)
    asked.send(signal.SIGCONT)
    assert asked.wait() == [0], asked.log.read_text()
    assert before < checkpoint_of(output)["global_step"] < STEPS

    start(config, output, "--resume").ends_well()
    whole.ends_well()
    assert differences(checkpoint_of(output), checkpoint_of(whole.output)) == []
    assert curves(output) == curves(whole.output)
    assert {step for tag, step in curves(output) if tag == "train/loss"} == set(range(STEPS))
    assert not list(output.rglob("*.partial"))
