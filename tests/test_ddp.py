"""Processes that share a training, over gloo on the CPU: they train as one, and may be killed as one."""

import random

import pytest

from tests.helpers.runs import (
    LOSS_SECOND_MOMENT,
    MODEL,
    OVERFLOWING,
    checkpoint_of,
    curves,
    differences,
    logs,
    losses_in,
    write_config,
)

STEPS = 20
NO_DROPOUT = {"network": {**MODEL["network"], "dropout": 0.0}}
"""Its masks alone are drawn for the samples of a rank together."""
GLOBAL_BATCH = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Twenty steps at the default rate, with all that could differ between ranks; five batches an epoch and a rest."""
    return write_config(
        tmp_path_factory.mktemp("ddp"),
        model={**LOSS_SECOND_MOMENT, **NO_DROPOUT},
        data={"num_workers": 0},
        trainer={"max_steps": STEPS, "accumulate_grad_batches": 2, "val_check_interval": 15, "num_sanity_val_steps": 0},
        save_every_steps=2,
    )


@pytest.fixture(scope="module")
def fit(config, start):
    """Begins a run whose batches are as large as those of any other number of ranks."""

    def begin(name, ranks, *flags, **options):
        size = ["--data.batch_size", str(GLOBAL_BATCH // ranks)]
        return start(config, config.parent / name, *size, *flags, ranks=ranks, **options)

    return begin


@pytest.fixture(scope="module")
def two(fit):
    """A run of two processes that nothing disturbs, under way."""
    return fit("two", 2)


def largest_difference(one, other):
    """Between weights of two checkpoints, averaged and not."""
    kinds = [(one[kind], other[kind]) for kind in ("state_dict", "current_model_state")]
    return max(float((a[name].double() - b[name].double()).abs().max()) for a, b in kinds for name in a)


def test_two_processes_lose_what_one_loses_in_float32(fit, two, record_property):
    one, both = (losses_in(*logs(run.ends_well())) for run in (fit("one", 1), two))
    assert len(one) == len(both) == STEPS
    record_property("largest difference of losses", worst := max(abs(a - b) for a, b in zip(one, both, strict=True)))
    assert worst < 1e-6


def test_two_processes_end_in_the_weights_of_one_in_float64_and_skip_the_same_batches(fit, record_property):
    flags = ["--trainer.precision", "64-true"]
    one, two = (fit(f"{ranks}64", ranks, *flags, program=OVERFLOWING) for ranks in (1, 2))
    alone, together = checkpoint_of(one.ends_well()), checkpoint_of(two.ends_well())
    record_property("largest difference of weights", worst := largest_difference(alone, together))
    assert worst < 1e-9
    assert alone["timestep_sampler"]["counts"].equal(together["timestep_sampler"]["counts"])
    assert alone["num_skipped"] == together["num_skipped"] == 3
    assert alone["loops"]["fit_loop"]["state_dict"] == together["loops"]["fit_loop"]["state_dict"]


def test_two_processes_that_are_killed_and_resumed_end_in_the_same_weights_state_and_curve(fit, two):
    fit("cut", 2).kill_after_a_save(random.Random(0).uniform(0, 0.2))
    output = two.output.with_name("cut")
    before = checkpoint_of(output)["global_step"]
    fit("cut", 2, "--resume", "--save_every_steps", "1000").ends_when_asked()
    assert before < checkpoint_of(output)["global_step"] < STEPS
    fit("cut", 2, "--resume").ends_well()
    two.ends_well()
    assert differences(checkpoint_of(output), checkpoint_of(two.output)) == []
    assert curves(output) == curves(two.output)
