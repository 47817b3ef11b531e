"""Properties of any `TrainingModule`, tested on the diffusion module or the classifier, whichever is simpler."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sagl.errors import UserError
from sagl.modules.classifier_module import ClassifierModule
from sagl.modules.diffusion_module import DiffusionModule
from sagl.modules.training_module import TrainingModule, seeded_init
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import ClassifierSettings, UNetSettings
from sagl.settings.training import ClassifierTrainingSettings, DiffusionTrainingSettings, OptimizerSettings
from tests.helpers.networks import GREY, GREY_CLASSIFIER
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


def diffusion(**options):
    return DiffusionModule(DiffusionTrainingSettings(network=UNetSettings(**GREY), **options))


def classifier(**options):
    return ClassifierModule(ClassifierTrainingSettings(classifier=ClassifierSettings(**GREY_CLASSIFIER), **options))


BOTH = pytest.mark.parametrize("build", [diffusion, classifier])


def test_initial_weights_depend_on_the_seed_alone_and_do_not_change_the_global_generator():
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    first, other = (seeded_init(lambda: nn.Linear(3, 3), seed) for seed in (5, 6))
    assert torch.equal(torch.randn(3), expected)
    assert torch.equal(seeded_init(lambda: nn.Linear(3, 3), 5).weight, first.weight)
    assert not torch.equal(first.weight, other.weight)


@BOTH
@pytest.mark.parametrize("other", [{"seed": 4}, {"batch": 11}, {"rank": 0}])
def test_the_loss_of_a_step_depends_on_seed_batch_and_rank_alone(build, other):
    def loss(seed=3, batch=10, rank=1):
        return loss_of_step(with_stub_trainer(build(seed=seed), batch=batch, rank=rank, ranks=2))

    torch.manual_seed(1)
    first = loss()
    torch.manual_seed(2)
    assert loss() == first
    assert loss(**other) != first


def test_timesteps_are_uniform_and_noise_is_standard_normal():
    noise = with_stub_trainer(classifier())._sample_noise(torch.zeros(4000, 1, 2, 2))
    fractions = torch.histc(noise.timesteps.float(), bins=4, min=0, max=1000) / 4000
    assert fractions.tolist() == pytest.approx([0.25] * 4, abs=0.03)
    assert (float(noise.noise.mean()), float(noise.noise.std())) == pytest.approx((0, 1), abs=0.03)
    assert len({x.numpy().tobytes() for x in noise.noise}) == 4000


@pytest.mark.parametrize(("before", "size"), [((), 4), ((9,), 4), ((9,), 2), ((5,), 4)])
def test_noise_drawn_ahead_is_that_of_its_own_batch(before, size):
    """Whatever batch was drawn before it: the one before, with as many images or more, or another one."""

    def draw(module, batch, size):
        module.trainer.fit_loop.total_batch_idx = batch
        drawn = module._sample_noise(torch.zeros(size, 1, 2, 2))
        return drawn.noise, [rng.random() for rng in drawn.rngs]

    module = with_stub_trainer(classifier())
    for batch in before:
        draw(module, batch, 4)
    noise, numbers = draw(module, 10, size)
    expected_noise, expected_numbers = draw(with_stub_trainer(classifier()), 10, size)
    assert torch.equal(noise, expected_noise)
    assert numbers == expected_numbers


def test_values_are_logged_only_where_a_logger_receives_them():
    module = with_stub_trainer(diffusion())
    module.trainer._logger_connector.should_update_logs = False
    loss_of_step(module)
    module.on_train_batch_end(None, (IMAGES, LABELS), 0)
    assert module.logged == {}


# -------------------------------------------------------------------------------------------------- compilation


class StubCompiled(nn.Module):
    """What a stub of torch.compile returns: a module, as the real one does, that counts its calls."""

    def __init__(self, network, **options):
        super().__init__()
        self.network, self.options, self.calls = network, options, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.network(*args, **kwargs)


@pytest.fixture
def compiled(monkeypatch):
    """The networks that a stub of torch.compile was given."""
    networks = []
    monkeypatch.setattr("torch.compiler.cudagraph_mark_step_begin", lambda: None)  # it imports the real compiler
    monkeypatch.setattr(
        torch, "compile", lambda *args, **kw: networks.append(StubCompiled(*args, **kw)) or networks[-1]
    )
    return networks


@BOTH
def test_a_compiled_network_serves_training_steps_and_not_validation(build, compiled):
    module = with_stub_trainer(build(compile=True)).train()
    module.on_train_start()
    assert loss_of_step(module) == loss_of_step(with_stub_trainer(build()))
    assert [network.calls for network in compiled] == [1]
    assert validate(module.eval(), (IMAGES, LABELS)) == validate(with_stub_trainer(build()), (IMAGES, LABELS))
    assert [network.calls for network in compiled] == [1]


def test_a_compiled_network_is_not_part_of_the_state_dict(compiled):
    module = with_stub_trainer(classifier(compile=True))
    names = module.state_dict().keys()
    module.on_train_start()
    assert len(compiled) == 1
    assert module.state_dict().keys() == names


def test_a_network_is_compiled_only_if_the_settings_ask_for_it(compiled):
    with_stub_trainer(classifier()).on_train_start()
    assert not compiled


@pytest.mark.parametrize(
    ("device", "batches", "mode"), [("cuda", 1, "reduce-overhead"), ("cuda", 2, None), ("cpu", 1, None)]
)
def test_cuda_graphs_are_used_on_gpus_if_no_gradients_are_accumulated(device, batches, mode, compiled):
    module = SimpleNamespace(
        settings=SimpleNamespace(compile=True),
        device=torch.device(device),
        trainer=SimpleNamespace(accumulate_grad_batches=batches),
        network=nn.Identity(),
    )
    TrainingModule.on_train_start(module)
    assert [network.options for network in compiled] == [{"dynamic": False, "mode": mode}]


@pytest.mark.slow
def test_a_compiled_network_learns_the_same_weights(monkeypatch):
    """In float64: AdamW divides a gradient that is zero but for rounding by its own size."""

    def weights(**options):
        module = classifier(optimizer=OptimizerSettings(learning_rate=1e-3), **options)
        loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)
        trainer(max_steps=2, precision="64-true").fit(module, loader, loader)
        return module.network.state_dict()

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.testing.assert_close(weights(compile=True), weights())


# --------------------------------------------------------------------------------------------------- validation


@BOTH
def test_validation_does_not_depend_on_batch_size_number_of_ranks_or_training(build):
    whole = validate(with_stub_trainer(build()), (IMAGES, LABELS))
    torch.manual_seed(9)
    assert validate(with_stub_trainer(build(), batch=50), (IMAGES, LABELS)) == whole
    halves = (IMAGES[:5], LABELS[:5]), (IMAGES[5:], LABELS[5:])
    assert validate(with_stub_trainer(build()), *halves) == pytest.approx(whole)
    modules = [with_stub_trainer(build(), rank=rank, ranks=3) for rank in range(3)]
    for rank, module in enumerate(modules):
        validate(module, (IMAGES[rank::3], LABELS[rank::3]))
    single = with_stub_trainer(build())
    single._sums = {name: sum(module._sums[name] for module in modules) for name in modules[0]._sums}
    single.on_validation_epoch_end()
    assert single.logged == pytest.approx(whole)


@BOTH
def test_the_loss_of_a_range_of_timesteps_is_that_of_its_images(build):
    whole = validate(with_stub_trainer(build()), (IMAGES, LABELS))
    bins = [whole[f"val/loss_q{q}"] for q in range(4)]
    assert sum(bins) / 4 == pytest.approx(whole["val/loss"], rel=1e-5)
    images = IMAGES.clone()
    images[2], images[6] = 255 - images[2], 255 - images[6]  # at timesteps 250 and 375
    changed = validate(with_stub_trainer(build()), (images, LABELS))
    assert [changed[f"val/loss_q{q}"] != bins[q] for q in range(4)] == [False, True, False, False]


def test_a_range_of_timesteps_without_images_is_not_logged():
    logged = validate(with_stub_trainer(diffusion()), (IMAGES[:2], LABELS[:2]))
    assert {name for name in logged if "loss_q" in name} == {"val/loss_q0", "val/loss_q2"}


# ------------------------------------------------------------------------------------------------------- optimiser


def test_the_optimiser_is_adamw_with_the_settings_and_without_frozen_parameters():
    settings = OptimizerSettings(learning_rate=0.01, betas=(0.8, 0.95), weight_decay=0.2)
    module = with_stub_trainer(diffusion(optimizer=settings, freeze=("input_blocks.*",)))
    optimizer = module.configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["initial_lr"], group["betas"], group["weight_decay"]) == (0.01, (0.8, 0.95), 0.2)
    trained = {id(p) for n, p in module.network.named_parameters() if not n.startswith("input_blocks.")}
    assert {id(p) for p in group["params"]} == trained


def test_a_classifier_has_adm_s_learning_rate_and_weight_decay_by_default():
    (group,) = with_stub_trainer(classifier()).configure_optimizers()["optimizer"].param_groups
    assert (group["initial_lr"], group["weight_decay"]) == (3e-4, 0.05)


def test_the_learning_rate_of_every_step_follows_warm_up_and_decay():
    module = diffusion(optimizer=OptimizerSettings(learning_rate=0.01, warmup_steps=3, decay_steps=4))
    run = trainer(max_steps=10)
    steps, loader = record_steps(module, run), DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)
    run.fit(module, loader, loader)
    rates = [step["train/lr"] / 0.01 for step in steps]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25])


# ------------------------------------------------------------------------------------------- losses that overflow


def fit_with_nan(nan_batches, steps=4, accumulate_grad_batches=1, **options):
    """Fit with a loss of nan in these batches; return the module and a weight after every batch."""
    module, weights = diffusion(optimizer=OptimizerSettings(learning_rate=1e-3), **options), []
    log_if_finite = module._log_if_finite

    def with_nan(values):
        bad = module.trainer.fit_loop.total_batch_idx in nan_batches
        return log_if_finite({**values, "loss": values["loss"] * (torch.nan if bad else 1)})

    module._log_if_finite = with_nan
    module.on_train_batch_end = lambda *_: weights.append(module.network.out[2].weight.detach().clone())
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)
    trainer(max_steps=steps, accumulate_grad_batches=accumulate_grad_batches).fit(module, loader, loader)
    return module, weights


def test_a_batch_with_a_loss_that_is_not_finite_is_skipped_and_counted():
    module, weights = fit_with_nan((1,))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert (module.num_skipped, module.num_skipped_since_step) == (1, 0)


def test_too_many_skipped_batches_in_a_row_end_the_training():
    with pytest.raises(UserError) as error:
        fit_with_nan((1, 2, 3), steps=8, max_nonfinite_batches=2)
    assert "max_nonfinite_batches" in str(error.value)
    assert "learning_rate" in str(error.value)
    assert fit_with_nan((1, 2, 4, 5), steps=8, max_nonfinite_batches=2)[0].num_skipped == 4


def fit_with_nan_gradient(nan_steps, steps, **options):
    """Fit with a gradient of nan in these steps; return the module and a weight after every batch."""
    module, weights = diffusion(optimizer=OptimizerSettings(learning_rate=1e-3), **options), []
    module.on_train_batch_end = lambda *_: weights.append(module.network.out[2].weight.detach().clone())
    module.network.out[2].weight.register_hook(lambda g: g * torch.nan if module.global_step in nan_steps else g)
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)
    trainer(max_steps=steps).fit(module, loader, loader)
    return module, weights


def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_and_counted():
    module, weights = fit_with_nan_gradient((1,), steps=3)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert all(p.isfinite().all() for p in module.network.parameters())
    assert (module.num_skipped, module.num_skipped_since_step) == (1, 0)


def test_too_many_gradients_in_a_row_that_are_not_finite_end_the_training():
    with pytest.raises(UserError, match="max_nonfinite_batches"):
        fit_with_nan_gradient((1, 2, 3), steps=8, max_nonfinite_batches=2)


@pytest.mark.parametrize(("nan_batches", "is_refused"), [((2, 3), True), ((3, 4), False)])
def test_skipped_batches_are_counted_from_one_step_of_the_optimiser_to_the_next(nan_batches, is_refused):
    with pytest.raises(UserError, match="max_nonfinite_batches") if is_refused else nullcontext():
        fit_with_nan(nan_batches, accumulate_grad_batches=2, max_nonfinite_batches=1)


@pytest.mark.parametrize(("nan_batches", "learns"), [((2, 3), False), ((2,), True), ((3,), True)])
def test_an_accumulated_step_learns_from_its_finite_batches(nan_batches, learns):
    module, weights = fit_with_nan(nan_batches, accumulate_grad_batches=2)
    assert torch.equal(weights[1], weights[3]) != learns
    assert torch.isfinite(weights[-1]).all()
    assert module.num_skipped == len(nan_batches)


# ------------------------------------------------------------------------------------------------- hyperparameters


def is_plain(value):
    """Return whether a value consists of dicts, lists, tuples, numbers and strings."""
    if isinstance(value, dict):
        return all(type(name) is str and is_plain(inner) for name, inner in value.items())
    if type(value) in (list, tuple):
        return all(is_plain(inner) for inner in value)
    return value is None or type(value) in (bool, int, float, str)


@BOTH
def test_hyperparameters_are_plain_and_rebuild_the_settings(build):
    cosine, optimizer = DiffusionSettings(noise_schedule="cosine"), OptimizerSettings(warmup_steps=7)
    module = build(diffusion=cosine, optimizer=optimizer, freeze=("time_embed.*",), seed=5)
    saved = dict(module.hparams)
    assert is_plain(saved)
    name, settings_class = {diffusion: ("network", UNetSettings), classifier: ("classifier", ClassifierSettings)}[build]
    assert settings_class(**saved[name]) == module.network.settings
    assert DiffusionSettings(**saved["diffusion"]) == cosine
    assert OptimizerSettings(**saved["optimizer"]) == optimizer
    assert (saved["freeze"], saved["seed"], saved["max_nonfinite_batches"]) == (("time_embed.*",), 5, 10)
