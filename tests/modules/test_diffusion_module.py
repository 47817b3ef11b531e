from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sagl.errors import UserError
from sagl.models.transfer import load_pretrained_weights
from sagl.modules.diffusion_module import DiffusionModule
from sagl.settings.diffusion import DiffusionSettings, LossSettings
from sagl.settings.network import UNetSettings
from sagl.settings.training import BlurAwareSettings, DiffusionTrainingSettings, OptimizerSettings
from tests.helpers.networks import GREY, count_calls
from tests.helpers.training import (
    IGNORED_WARNINGS,
    IMAGES,
    LABELS,
    loss_of_step,
    record_steps,
    trainer,
    validate,
    with_stub_trainer,
)

pytestmark = IGNORED_WARNINGS

NULL = GREY["num_classes"]


def build(*, network=None, batch=0, rank=0, ranks=1, weights_seed=1, **options):
    settings = DiffusionTrainingSettings(network=UNetSettings(**{**GREY, **(network or {})}), **options)
    module = DiffusionModule(settings)
    return with_stub_trainer(module, batch=batch, rank=rank, ranks=ranks, weights_seed=weights_seed)


# ----------------------------------------------------------------------------------------------- random quantities


def test_dropout_and_label_dropout_of_a_step_do_not_depend_on_the_steps_before():
    options = {"network": {"dropout": 0.3}, "label_dropout": 0.5, "seed": 3, "rank": 1, "ranks": 2}
    first = loss_of_step(build(batch=10, **options))
    module = build(batch=0, **options)
    for batch in range(5):
        module.trainer.fit_loop.total_batch_idx = batch
        loss_of_step(module)
    module.trainer.fit_loop.total_batch_idx = 10
    assert loss_of_step(module) == first


@pytest.mark.parametrize("ranks", [2, 4])
def test_an_image_is_trained_alike_on_any_rank(ranks):
    blur_aware = BlurAwareSettings(probability=0.5, mask="random", blur_sigma=(0.5, 2.0))
    inputs = {}
    for rank, world_size in [(0, 1), *((rank, ranks) for rank in range(ranks))]:
        module = build(seed=3, batch=10, rank=rank, ranks=world_size, label_dropout=0.5, blur_aware=blur_aware)
        calls = count_calls(module.network)
        module.training_step((IMAGES[rank::world_size], LABELS[rank::world_size]), 0)
        inputs[rank, world_size] = calls[0]
    for k in range(3):  # x_t, timesteps, labels
        together = torch.stack([inputs[rank, ranks][k] for rank in range(ranks)], dim=1).flatten(0, 1)
        torch.testing.assert_close(together, inputs[0, 1][k])


def test_two_ranks_update_the_timestep_sampler_as_one_rank_does():
    options = {"loss": LossSettings(timestep_sampler="loss_second_moment")}
    options["diffusion"] = DiffusionSettings(num_timesteps=25)
    single, modules = build(**options), [build(rank=rank, ranks=2, **options) for rank in range(2)]
    losses = [[], []]
    for rank, module in enumerate(modules):
        module.trainer.strategy.all_gather = lambda values, rank=rank: (
            losses[rank].append(values) or torch.stack([values, values])
        )
        module.training_step((IMAGES[rank::2], LABELS[rank::2]), 0)
    both = build(rank=0, ranks=2, **options)
    both.trainer.strategy.all_gather = lambda _: torch.stack([losses[0][0], losses[1][0]])
    both.training_step((IMAGES[::2], LABELS[::2]), 0)
    loss_of_step(single)
    assert int(single.timestep_sampler.counts.sum()) == len(IMAGES)
    assert torch.equal(both.timestep_sampler.counts, single.timestep_sampler.counts)
    histories = both.timestep_sampler.losses, single.timestep_sampler.losses
    torch.testing.assert_close(*histories, rtol=1e-6, atol=0)  # float32 rounding: the batches differ in size


# -------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(("dropout", "low", "high"), [(0.0, 0, 0), (0.3, 0.22, 0.38), (1.0, 1, 1)])
def test_label_dropout_replaces_its_fraction_of_labels_by_the_null_label(dropout, low, high):
    module = build(label_dropout=dropout)
    calls = count_calls(module.network)
    labels = torch.arange(300) % NULL
    module.training_step((torch.zeros(300, 1, 8, 8, dtype=torch.uint8), labels), 0)
    dropped = calls[0][2] == NULL
    assert low <= float(dropped.float().mean()) <= high
    assert torch.equal(calls[0][2][~dropped], labels[~dropped])


def test_validation_drops_no_labels():
    module = build(label_dropout=1.0)
    calls = count_calls(module.network)
    module.validation_step((IMAGES, LABELS), 0)
    assert torch.equal(calls[0][2], LABELS)


def test_an_unconditional_network_gets_no_labels():
    module = build(network={"num_classes": None, "null_label": False})
    calls = count_calls(module.network)
    module.training_step((IMAGES, LABELS), 0)
    module.validation_step((IMAGES, LABELS), 0)
    assert [arguments[2] for arguments in calls] == [None, None]


@pytest.mark.parametrize(
    ("network", "options", "name"),
    [
        ({"null_label": False}, {"label_dropout": 0.1}, "`label_dropout`"),
        ({}, {"label_dropout": 1.5}, "`label_dropout`"),
        ({}, {"diffusion": DiffusionSettings(variance="fixed_small")}, "`variance`"),
        ({"learn_sigma": False}, {}, "`variance`"),
        ({}, {"blur_aware": BlurAwareSettings(probability=1, site="output.9")}, "site"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(network, options, name):
    with pytest.raises(UserError, match=name):
        build(network=network, **options)


# ------------------------------------------------------------------------------------------- loss and validation


def test_a_fresh_network_predicts_zero_so_its_error_is_the_variance_of_the_noise():
    module = build(weights_seed=None)
    module.training_step((IMAGES.repeat(16, 1, 1, 1), LABELS.repeat(16)), 0)
    assert module.logged["train/mse"] == pytest.approx(1, abs=0.05)
    assert module.logged["train/lr"] == 1.0


@pytest.mark.parametrize(("kind", "parts"), [("hybrid", ("train/mse", "train/vlb")), ("simple", ("train/mse",))])
def test_the_logged_loss_is_the_one_that_is_minimised_and_the_sum_of_its_parts(kind, parts):
    module = build(loss=LossSettings(kind=kind))
    loss = module.training_step((IMAGES, LABELS), 0)
    assert module.logged["train/loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert sum(module.logged[name] for name in parts) == pytest.approx(float(loss.detach()), rel=1e-5)
    loss.backward()
    assert float(module.network.out[2].weight.grad.abs().max()) > 0


def test_validation_uses_evenly_spaced_timesteps_and_the_same_noise_every_time():
    module = build()
    calls = count_calls(module.network)
    validate(module, (IMAGES, LABELS))
    validate(module, (IMAGES, LABELS))
    assert sorted(calls[0][1].tolist()) == [0, 125, 250, 375, 500, 625, 750, 875]
    assert torch.equal(calls[0][0], calls[1][0])


def test_outside_of_fit_validation_also_estimates_bits_per_dim_with_one_more_forward_pass():
    module = build()
    calls = count_calls(module.network)
    assert "val/bits_per_dim" not in validate(module, (IMAGES, LABELS))
    module.trainer.state.fn = "validate"
    logged = validate(module, (IMAGES, LABELS))
    assert len(calls) == 1 + 2
    assert torch.equal(calls[2][2], LABELS)
    assert logged["val/num_images"] == 8
    assert logged["val/bits_per_dim_squared"] >= logged["val/bits_per_dim"] ** 2 > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_bits_per_dim_depend_on_neither_batch_size_nor_number_of_ranks(ranks):
    module = build()
    module.trainer.state.fn = "validate"
    whole = validate(module, (IMAGES, LABELS))["val/bits_per_dim"]
    parts = []
    for rank in range(ranks):
        module.trainer.global_rank, module.trainer.world_size = rank, ranks
        images, labels = IMAGES[rank::ranks], LABELS[rank::ranks]
        parts.append(validate(module, (images[:3], labels[:3]), (images[3:], labels[3:]))["val/bits_per_dim"])
    assert sum(parts) / ranks == pytest.approx(whole, rel=1e-6)


def test_a_handful_of_images_is_overfitted_in_a_few_dozen_steps():
    settings = DiffusionTrainingSettings(network=UNetSettings(**GREY), optimizer=OptimizerSettings(learning_rate=3e-3))
    module, run = DiffusionModule(settings), trainer(max_steps=60, gradient_clip_val=1.0)
    steps, loader = record_steps(module, run), DataLoader(TensorDataset(IMAGES[:4], LABELS[:4]), batch_size=4)
    run.fit(module, loader, loader)
    assert steps[0]["train/mse"] > 0.8
    assert sum(step["train/mse"] for step in steps[-10:]) / 10 < 0.35


# --------------------------------------------------------------------------------------------- blur-aware training

BLUR_AWARE = BlurAwareSettings(probability=1.0, site="output.0", blur_sigma=(1.0, 1.0))


def test_degraded_images_train_the_mean_alone():
    module = build(blur_aware=BLUR_AWARE)
    loss_of_step(module)
    assert module.logged["train/vlb"] == 0
    assert module.logged["train/loss"] == pytest.approx(module.logged["train/mse"])
    half = build(blur_aware=replace(BLUR_AWARE, probability=0.5))
    loss_of_step(half)
    assert half.logged["train/vlb"] > 0


def test_the_degraded_embedding_gets_the_degraded_images_and_changes_nothing_until_it_is_trained():
    plain, aware = build(blur_aware=BLUR_AWARE), build(network={"degraded_embedding": True}, blur_aware=BLUR_AWARE)
    load_pretrained_weights(aware.network, plain.network.state_dict())
    flags = []
    aware.network.register_forward_pre_hook(lambda _, args, kw: flags.append(kw.get("degraded")), with_kwargs=True)
    assert loss_of_step(aware) == loss_of_step(plain)
    assert flags[0] is None  # the plain pass for the mask
    assert flags[1].tolist() == [True] * len(IMAGES)
    with torch.no_grad():
        aware.network.degraded_emb += 0.5
    assert loss_of_step(aware) != loss_of_step(plain)


def test_probability_0_is_plain_training_to_the_bit():
    assert loss_of_step(build(blur_aware=BlurAwareSettings())) == loss_of_step(build())


def test_only_the_mask_from_attention_needs_a_site_with_attention():
    build(blur_aware=replace(BLUR_AWARE, site="output.9", mask="random"))
