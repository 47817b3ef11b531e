"""Distributed training over gloo on the CPU equals training in one process, also when it is killed and resumed."""

import random

import pytest

from tests.helpers.commands import (
    LOSS_SECOND_MOMENT,
    MODEL,
    checkpoint_of,
    curves,
    differences,
    logs,
    losses_in,
    overflow,
    write_folder_config,
)

STEPS = 20
NO_DROPOUT = {"network": {**MODEL["network"], "dropout": 0.0}}
"""Dropout depends on the number of ranks."""
GLOBAL_BATCH = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Twenty steps with everything that could differ between ranks; five batches per epoch and a remainder."""
    return write_folder_config(
        tmp_path_factory.mktemp("ddp"),
        model={**LOSS_SECOND_MOMENT, **NO_DROPOUT},
        data={"num_workers": 0},
        trainer={"max_steps": STEPS, "accumulate_grad_batches": 2, "val_check_interval": 15, "num_sanity_val_steps": 0},
        save_every_steps=2,
    )


@pytest.fixture(scope="module")
def fit(config, start):
    """Start a run whose global batch size does not depend on the number of ranks."""

    def start_run(name, ranks, *flags, **options):
        size = ["--data.batch_size", str(GLOBAL_BATCH // ranks)]
        return start(config, config.parent / name, *size, *flags, ranks=ranks, **options)

    return start_run


@pytest.fixture(scope="module")
def two(fit):
    """An uninterrupted run of two processes."""
    return fit("two", 2)


def largest_difference(one, other):
    """Return the largest difference between the weights of two checkpoints, EMA and raw."""
    kinds = [(one[kind], other[kind]) for kind in ("state_dict", "current_model_state")]
    return max(float((a[name].double() - b[name].double()).abs().max()) for a, b in kinds for name in a)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_in_float32(fit, two, record_property):
    one, two_ranks = (losses_in(*logs(run.finish())) for run in (fit("one", 1), two))
    assert len(one) == len(two_ranks) == STEPS
    record_property(
        "largest difference of losses", worst := max(abs(a - b) for a, b in zip(one, two_ranks, strict=True))
    )
    assert worst < 1e-6


@pytest.mark.slow
def test_two_processes_reach_the_weights_of_one_in_float64_and_skip_the_same_batches(fit, record_property):
    flags = ["--trainer.precision", "64-true"]
    one, two = (fit(f"{ranks}64", ranks, *flags, prepare=overflow) for ranks in (1, 2))
    by_one, by_two = checkpoint_of(one.finish()), checkpoint_of(two.finish())
    record_property("largest difference of weights", worst := largest_difference(by_one, by_two))
    assert worst < 1e-9
    assert by_one["timestep_sampler"]["counts"].equal(by_two["timestep_sampler"]["counts"])
    assert by_one["num_skipped"] == by_two["num_skipped"] == 3
    loaders = [c["loops"]["fit_loop"]["state_dict"]["combined_loader"][0] for c in (by_one, by_two)]
    assert loaders[0]["images"] == loaders[1]["images"] > 0
    assert [loader["batch_size"] * loader["world_size"] for loader in loaders] == [8, 8]


@pytest.mark.slow
def test_two_processes_killed_and_resumed_end_with_the_same_weights_state_and_curves(fit, two):
    fit("interrupted", 2).kill_after_a_save(random.Random(0).uniform(0, 0.2))
    output = two.output.with_name("interrupted")
    before = checkpoint_of(output)["global_step"]
    fit("interrupted", 2, "--resume", "--save_every_steps", "1000").terminate()
    assert before < checkpoint_of(output)["global_step"] < STEPS
    fit("interrupted", 2, "--resume").finish()
    two.finish()
    assert differences(checkpoint_of(output), checkpoint_of(two.output)) == []
    assert curves(output) == curves(two.output)
