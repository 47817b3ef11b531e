from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sagl.errors import UserError
from sagl.models.transfer import load_pretrained_weights
from sagl.modules.diffusion_module import DiffusionModule
from sagl.settings.diffusion import DiffusionSettings, LossSettings
from sagl.settings.network import UNetSettings
from sagl.settings.training import BlurAwareSettings, OptimizerSettings
from tests.helpers.reference import draw_weights
from tests.helpers.tiny import GREY, QUIET, trainer

pytestmark = QUIET

NULL = GREY["num_classes"]
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8, generator=GENERATOR)
LABELS = torch.arange(8) % NULL


def module_of(*, network=None, drawn=True, batch=0, rank=0, ranks=1, **options):
    """A module with drawn weights, told its batch and rank without a trainer; what it logs is in `logged`."""
    module = DiffusionModule(UNetSettings(**{**GREY, **(network or {})}), **options)
    if drawn:
        draw_weights(module.network, 1)
    optimizers, state = [SimpleNamespace(param_groups=[{"lr": 1.0}])], SimpleNamespace(fn="fit")
    loop = SimpleNamespace(total_batch_idx=batch)
    told = {"fit_loop": loop, "global_rank": rank, "world_size": ranks, "optimizers": optimizers, "state": state}
    module.trainer = SimpleNamespace(**told)
    module.trainer.strategy = SimpleNamespace(reduce=lambda values, reduce_op: values)
    module.logged = {}
    module.log = lambda name, value, **_: module.logged.update({name: float(torch.as_tensor(value).detach())})
    module.log_dict = lambda values: [module.log(name, value) for name, value in values.items()]
    return module


def told_to_network(module):
    """Arguments of every pass of the network: (x_t, timesteps, labels)."""
    calls = []
    module.network.register_forward_pre_hook(lambda _, args: calls.append(args))
    return calls


def loss_of(module, batch_idx=0):
    with torch.no_grad():
        return float(module.training_step((IMAGES, LABELS), batch_idx))


# -------------------------------------------------------------------------------------------------- what is drawn


def test_the_loss_of_a_step_depends_on_seed_batch_and_rank_alone():
    torch.manual_seed(1)
    options = {"network": {"dropout": 0.3}, "label_dropout": 0.5, "seed": 3, "rank": 1, "ranks": 2}
    first = loss_of(module_of(batch=10, **options))
    torch.manual_seed(2)
    busy = module_of(batch=0, **options)
    for batch in range(5):
        busy.trainer.fit_loop.total_batch_idx = batch
        loss_of(busy)
    busy.trainer.fit_loop.total_batch_idx = 10
    assert loss_of(busy) == first


@pytest.mark.parametrize("other", [{"seed": 4}, {"batch": 11}, {"rank": 0}])
def test_another_seed_batch_or_rank_gives_another_loss(other):
    told = {"seed": 3, "batch": 10, "rank": 1, "ranks": 2}
    assert loss_of(module_of(**{**told, **other})) != loss_of(module_of(**told))


BLURRED = BlurAwareSettings(probability=0.5, mask="random", blur_sigma=(0.5, 2.0))


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_sample_is_trained_with_the_same_whichever_rank_has_it(ranks):
    seen = {}
    for rank, of in [(0, 1), *((rank, ranks) for rank in range(ranks))]:
        module = module_of(seed=3, batch=10, rank=rank, ranks=of, label_dropout=0.5, blur_aware=BLURRED)
        calls = told_to_network(module)
        module.training_step((IMAGES[rank::of], LABELS[rank::of]), 0)
        seen[rank, of] = calls[0]
    for told in range(3):  # x_t, timesteps, labels
        mine = torch.stack([seen[rank, ranks][told] for rank in range(ranks)], dim=1).flatten(0, 1)
        torch.testing.assert_close(mine, seen[0, 1][told])


def test_every_sample_has_a_timestep_and_noise_of_its_own():
    module = module_of()
    calls = told_to_network(module)
    module.training_step((IMAGES[:1].expand(64, -1, -1, -1), LABELS[:1].expand(64)), 0)
    x_t, timesteps, _ = calls[0]
    assert len(set(timesteps.tolist())) > 50
    assert 0 <= int(timesteps.min()) <= int(timesteps.max()) < 1000
    assert len({x.numpy().tobytes() for x in x_t}) == 64


# -------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(("dropout", "low", "high"), [(0.0, 0, 0), (0.3, 0.22, 0.38), (1.0, 1, 1)])
def test_label_dropout_puts_the_null_label_in_place_of_its_share_and_leaves_the_rest(dropout, low, high):
    module = module_of(label_dropout=dropout)
    calls = told_to_network(module)
    labels = torch.arange(300) % NULL
    module.training_step((torch.zeros(300, 1, 8, 8, dtype=torch.uint8), labels), 0)
    seen = calls[0][2]
    dropped = seen == NULL
    assert low <= float(dropped.float().mean()) <= high
    assert torch.equal(seen[~dropped], labels[~dropped])


def test_validation_drops_no_labels():
    module = module_of(label_dropout=1.0)
    calls = told_to_network(module)
    module.validation_step((IMAGES, LABELS), 0)
    assert torch.equal(calls[0][2], LABELS)


def test_outside_of_training_validation_also_estimates_bits_per_dim_with_one_more_pass():
    module = module_of()
    calls = told_to_network(module)
    assert "val/bits_per_dim" not in validated(module, WHOLE)
    module.trainer.state.fn = "validate"
    logged = validated(module, WHOLE)
    assert len(calls) == 1 + 2
    assert torch.equal(calls[2][2], LABELS)
    assert logged["val/images"] == 8
    assert logged["val/bits_per_dim_squared"] >= logged["val/bits_per_dim"] ** 2 > 0


def test_an_unconditional_network_is_told_no_labels():
    module = module_of(network={"num_classes": None, "null_label": False})
    calls = told_to_network(module)
    module.training_step((IMAGES, LABELS), 0)
    module.validation_step((IMAGES, LABELS), 0)
    assert [args[2] for args in calls] == [None, None]


@pytest.mark.parametrize(
    ("network", "options", "named"),
    [
        ({"null_label": False}, {"label_dropout": 0.1}, "`label_dropout` needs a network with null_label: true"),
        ({}, {"label_dropout": 1.5}, "`label_dropout` must be in [0, 1], got 1.5"),
        ({}, {"label_dropout": -0.1}, "`label_dropout` must be in [0, 1], got -0.1"),
        ({}, {"diffusion": DiffusionSettings(variance="fixed_small")}, "`variance`"),
        ({"learn_sigma": False}, {}, "`variance`"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(network, options, named):
    with pytest.raises(UserError) as error:
        module_of(network=network, **options)
    assert named in str(error.value)


# --------------------------------------------------------------------------------------------- what a checkpoint holds


def plain(value):
    """Whether a value is made of dicts, lists, tuples, numbers and strings alone."""
    if isinstance(value, dict):
        return all(type(name) is str and plain(inner) for name, inner in value.items())
    if type(value) in (list, tuple):
        return all(plain(inner) for inner in value)
    return value is None or type(value) in (bool, int, float, str)


def test_hyperparameters_are_plain_and_rebuild_the_settings():
    loss, optimizer = LossSettings(timestep_sampler="loss_second_moment"), OptimizerSettings(warmup_steps=7)
    diffusion = DiffusionSettings(noise_schedule="cosine")
    module = module_of(diffusion=diffusion, loss=loss, optimizer=optimizer, label_dropout=0.25, seed=5)
    saved = dict(module.hparams)
    assert plain(saved)
    assert UNetSettings(**saved["network"]) == module.network.settings
    assert DiffusionSettings(**saved["diffusion"]) == diffusion
    assert LossSettings(**saved["loss"]) == loss
    assert OptimizerSettings(**saved["optimizer"]) == optimizer
    assert (saved["label_dropout"], saved["seed"]) == (0.25, 5)


# ----------------------------------------------------------------------------------------------------- the loss


def test_a_fresh_network_predicts_nothing_so_its_error_is_that_of_the_noise():
    module = module_of(drawn=False)
    module.training_step((IMAGES.repeat(16, 1, 1, 1), LABELS.repeat(16)), 0)
    assert module.logged["train/mse"] == pytest.approx(1, abs=0.05)
    assert module.logged["train/rate"] == 1.0


@pytest.mark.parametrize(("kind", "parts"), [("hybrid", ("train/mse", "train/vb")), ("simple", ("train/mse",))])
def test_the_loss_that_is_logged_is_the_one_that_is_minimised_and_the_sum_of_its_parts(kind, parts):
    module = module_of(loss=LossSettings(kind=kind))
    loss = module.training_step((IMAGES, LABELS), 0)
    assert module.logged["train/loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert sum(module.logged[name] for name in parts) == pytest.approx(float(loss.detach()), rel=1e-5)
    loss.backward()
    assert float(module.network.out[2].weight.grad.abs().max()) > 0


def test_the_second_moment_sampler_learns_from_every_sample():
    loss = LossSettings(timestep_sampler="loss_second_moment")
    module = module_of(loss=loss, diffusion=DiffusionSettings(num_timesteps=25))
    loss_of(module)
    counts, losses = module.timestep_sampler.counts, module.timestep_sampler.losses
    assert int(counts.sum()) == 8
    assert float(losses.sum()) > 0


# --------------------------------------------------------------------------------------------------- validation


WHOLE = (IMAGES, LABELS)


def validated(module, *batches):
    """What is logged of a validation of these batches."""
    module.logged.clear()
    module.on_validation_epoch_start()
    for k, batch in enumerate(batches):
        module.validation_step(batch, k)
    module.on_validation_epoch_end()
    return dict(module.logged)


def test_validation_looks_at_evenly_spread_timesteps_with_the_same_noise_every_time():
    module = module_of()
    calls = told_to_network(module)
    first = validated(module, WHOLE)
    torch.manual_seed(9)
    module.trainer.fit_loop.total_batch_idx = 50
    assert validated(module, WHOLE) == first
    assert sorted(calls[0][1].tolist()) == [0, 125, 250, 375, 500, 625, 750, 875]
    assert torch.equal(calls[0][0], calls[1][0])


def test_a_validation_is_the_same_in_batches_of_any_size_and_on_any_number_of_ranks():
    whole = validated(module_of(), WHOLE)
    assert validated(module_of(), (IMAGES[:5], LABELS[:5]), (IMAGES[5:], LABELS[5:])) == pytest.approx(whole)
    sums = []
    for rank in range(3):
        module = module_of(rank=rank, ranks=3)
        validated(module, (IMAGES[rank::3], LABELS[rank::3]))
        sums.append(module._sums)
    module = module_of()
    module._sums = {name: sum(of_rank[name] for of_rank in sums) for name in sums[0]}
    module.on_validation_epoch_end()
    assert module.logged == pytest.approx(whole)


def test_the_loss_of_a_quarter_is_that_of_its_timesteps():
    whole = validated(module_of(), WHOLE)
    quarters = [whole[f"val/loss_quarter_{q}"] for q in range(4)]
    assert sum(quarters) / 4 == pytest.approx(whole["val/loss"], rel=1e-5)
    other = IMAGES.clone()
    other[2], other[6] = 255 - other[2], 255 - other[6]  # of timesteps 250 and 375
    changed = validated(module_of(), (other, LABELS))
    differs = [changed[f"val/loss_quarter_{q}"] != quarters[q] for q in range(4)]
    assert differs == [False, True, False, False]


def test_a_quarter_that_no_image_fell_into_is_not_logged():
    logged = validated(module_of(), (IMAGES[:2], LABELS[:2]))
    assert {name for name in logged if "quarter" in name} == {"val/loss_quarter_0", "val/loss_quarter_2"}


# ------------------------------------------------------------------------------------------------------- training


def fit(module, max_steps, images):
    """Train on a handful of images, four at a time; the metrics of every step."""
    data = TensorDataset(images, LABELS[: len(images)])
    seen = []
    run = trainer(max_steps=max_steps, gradient_clip_val=1.0)
    module.on_train_batch_end = lambda *_: seen.append({n: float(v) for n, v in run.callback_metrics.items()})
    loader = DataLoader(data, batch_size=4)
    run.fit(module, loader, loader)
    return seen


def test_a_handful_of_images_is_overfitted_in_a_few_dozen_steps():
    torch.manual_seed(0)
    module = DiffusionModule(UNetSettings(**GREY), optimizer=OptimizerSettings(learning_rate=3e-3))
    seen = fit(module, 60, IMAGES[:4])
    assert seen[0]["train/mse"] > 0.8
    assert sum(step["train/mse"] for step in seen[-10:]) / 10 < 0.35


def test_the_rate_of_every_step_rises_in_warm_up_and_falls_at_the_end():
    settings = OptimizerSettings(learning_rate=0.01, warmup_steps=3, decay_steps=4)
    seen = fit(DiffusionModule(UNetSettings(**GREY), optimizer=settings), 10, IMAGES)  # two steps an epoch
    rates = [step["train/rate"] / 0.01 for step in seen]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_the_optimiser_is_adamw_as_the_settings_have_it():
    settings = OptimizerSettings(learning_rate=0.01, betas=(0.8, 0.95), weight_decay=0.2)
    module = module_of(optimizer=settings)
    module.trainer.max_steps = 10
    optimizer = module.configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.8, 0.95), 0.2)
    assert {id(p) for p in group["params"]} == {id(p) for p in module.network.parameters()}


# ------------------------------------------------------------------------------------------- losses that overflow


class Overflowing(DiffusionModule):
    """A module whose loss is not finite in the batches that it is told."""

    bad: tuple[int, ...] = ()

    def _losses(self, *arguments):
        losses = super()._losses(*arguments)
        if self.trainer.training and self.trainer.fit_loop.total_batch_idx in self.bad:
            return replace(losses, total=losses.total * float("nan"))
        return losses


def weights_after(bad, steps=4, accumulate_grad_batches=1, **options):
    module = Overflowing(UNetSettings(**GREY), optimizer=OptimizerSettings(learning_rate=1e-3), **options)
    module.bad, seen = bad, []
    module.on_train_batch_end = lambda *_: seen.append(module.network.out[2].weight.detach().clone())
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)
    trainer(max_steps=steps, accumulate_grad_batches=accumulate_grad_batches).fit(module, loader, loader)
    return module, seen


def test_a_batch_whose_loss_is_not_finite_trains_nothing_and_is_counted():
    module, weights = weights_after(bad=(1,))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert all(torch.isfinite(weight).all() for weight in weights)
    assert (module.skipped, module.skipped_in_a_row) == (1, 0)


def test_too_many_in_a_row_end_the_training_with_the_way_out():
    with pytest.raises(
        UserError, match=r"`model.max_nonfinite_batches` allows 2 .* Lower model.optimizer.learning_rate"
    ):
        weights_after(bad=(1, 2, 3), steps=8, max_nonfinite_batches=2)
    assert weights_after(bad=(1, 2, 4, 5), steps=8, max_nonfinite_batches=2)[0].skipped == 4


@pytest.mark.parametrize(("bad", "learns"), [((2, 3), False), ((2,), True), ((3,), True)])
def test_an_accumulated_step_learns_from_those_of_its_batches_that_are_finite(bad, learns):
    module, weights = weights_after(bad=bad, accumulate_grad_batches=2)
    assert torch.equal(weights[1], weights[3]) != learns
    assert torch.isfinite(weights[-1]).all()
    assert module.skipped == len(bad)


def test_what_was_learned_of_timesteps_is_what_one_process_would_have_learned():
    loss = LossSettings(timestep_sampler="loss_second_moment")
    options = {"loss": loss, "diffusion": DiffusionSettings(num_timesteps=25)}
    alone, modules = module_of(**options), [module_of(rank=rank, ranks=2, **options) for rank in range(2)]
    seen = [[], []]
    for rank, module in enumerate(modules):
        module.trainer.strategy.all_gather = lambda mine, rank=rank: (
            seen[rank].append(mine) or torch.stack([mine, mine])
        )
        module.training_step((IMAGES[rank::2], LABELS[rank::2]), 0)
    both = module_of(rank=0, ranks=2, **options)
    both.trainer.strategy.all_gather = lambda mine: torch.stack([seen[0][0], seen[1][0]])
    both.training_step((IMAGES[::2], LABELS[::2]), 0)
    loss_of(alone)
    assert torch.equal(both.timestep_sampler.counts, alone.timestep_sampler.counts)
    losses = both.timestep_sampler.losses, alone.timestep_sampler.losses
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)  # float32 rounding: the batches differ in size


# --------------------------------------------------------------------------------------------- blur-aware training

BLUR_AWARE = BlurAwareSettings(probability=1.0, site="output.0", blur_sigma=(1.0, 1.0))


def test_degraded_images_train_the_mean_alone():
    module = module_of(blur_aware=BLUR_AWARE)
    loss_of(module)
    assert module.logged["train/vb"] == 0
    assert module.logged["train/loss"] == pytest.approx(module.logged["train/mse"])
    half = module_of(blur_aware=replace(BLUR_AWARE, probability=0.5))
    loss_of(half)
    assert half.logged["train/vb"] > 0


def test_the_network_is_told_which_images_were_degraded_and_is_unchanged_until_it_learns():
    told = []
    plain, aware = (
        module_of(blur_aware=BLUR_AWARE),
        module_of(network={"degraded_embedding": True}, blur_aware=BLUR_AWARE),
    )
    load_pretrained_weights(aware.network, plain.network.state_dict())
    aware.network.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs.get("degraded")), with_kwargs=True
    )
    assert loss_of(aware) == loss_of(plain)
    assert told[0] is None  # the plain pass for the mask
    assert told[1].tolist() == [True] * len(IMAGES)
    with torch.no_grad():
        aware.network.degraded_emb += 0.5
    assert loss_of(aware) != loss_of(plain)


def test_probability_0_is_plain_training_to_the_bit():
    assert loss_of(module_of(blur_aware=BlurAwareSettings())) == loss_of(module_of())


def test_an_attention_mask_needs_a_site_of_the_network():
    with pytest.raises(UserError, match="site"):
        module_of(blur_aware=replace(BLUR_AWARE, site="output.9"))
    module_of(blur_aware=replace(BLUR_AWARE, site="output.9", mask="random"))
