from types import SimpleNamespace

import pytest
import torch

from sagl.models.direction_head import Pairs
from sagl.modules.direction_head_module import DirectionHeadModule
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.direction_head import DirectionHeadOptions, HeadTrainingSettings
from sagl.settings.training import OptimizerSettings
from tests.helpers.heads import head_settings
from tests.helpers.training import IGNORED_WARNINGS, record_steps, trainer, validate, with_stub_trainer

pytestmark = IGNORED_WARNINGS


def pairs(seed, count=64):
    """Steps whose direction is a function of the inputs that a head can learn."""
    generator = torch.Generator().manual_seed(seed)
    images, fine = (torch.randn(count, channels, 8, 8, generator=generator) for channels in (5, 32))
    coarse = torch.randn(count, 64, 4, 4, generator=generator)
    timesteps = torch.randint(1000, (count,), generator=generator)
    direction = images[:, 2:3] * (timesteps > 500)[:, None, None, None] + 0.3 * fine[:, :1]
    direction += 0.3 * coarse[:, :1].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return Pairs(images, (coarse, fine), timesteps, direction)


class Source:
    """A source of such steps that records the rounds it was asked for."""

    def __init__(self):
        self.rounds = []

    def __deepcopy__(self, _):
        return self

    def to(self, device):
        pass

    def levels(self):
        return torch.full((3, 50), 0.8)

    def training_round(self, index, rank, world_size):
        self.rounds.append((index, rank, world_size))
        return pairs(index)

    def validation_pairs(self, rank, world_size):
        return pairs(1000)


def build(source=None, *, compile=False, **options):
    options = DirectionHeadOptions(**{"batches_per_round": 5, "batch_size": 16, **options})
    optimizer = OptimizerSettings(learning_rate=1e-2)
    settings = HeadTrainingSettings(direction_head=options, optimizer=optimizer, compile=compile)
    return DirectionHeadModule(settings, head_settings(map_channels=(64, 32)), DiffusionSettings(), source or Source())


def test_the_loss_is_the_squared_error_in_units_of_the_direction():
    module = with_stub_trainer(build(), batch=7)
    module.network.levels.data.fill_(0.5)
    with torch.no_grad():
        loss = module.training_step((torch.zeros(16), torch.zeros(16)), 0)
        rows = torch.randint(64, (16,), generator=torch.Generator().manual_seed(7))
        part = pairs(1).select(rows)
        errors = (module.network(part.images, part.maps, part.timesteps) - part.direction) / 0.5
    torch.testing.assert_close(loss, errors.square().mean())


def test_a_compiled_head_serves_training_steps(monkeypatch):
    calls = []
    monkeypatch.setattr("torch.compiler.cudagraph_mark_step_begin", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda head, **_: lambda *args: calls.append(1) or head(*args))
    module = with_stub_trainer(build(compile=True)).train()
    module.on_train_start()
    module.training_step((torch.zeros(16), torch.zeros(16)), 0)
    assert calls == [1]


def test_training_lowers_the_loss_with_a_new_round_after_some_batches():
    module, run = build(source := Source()), trainer(max_steps=40)
    steps = record_steps(module, run)
    run.fit(module)
    losses = [step["train/loss"] for step in steps]
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert source.rounds == [(k, 0, 1) for k in range(8)]
    assert (module.network.levels == 0.8).all()


@torch.no_grad()
def test_validation_logs_the_explained_variance_by_range_of_timesteps():
    module = with_stub_trainer(build(), weights_seed=None)
    module.network.levels.data.fill_(2.0)
    logged = validate(module, (torch.zeros(1), torch.zeros(1)))
    assert all(logged[f"val/{name}"] == pytest.approx(0) for name in ("r2", "r2_q0", "r2_q3"))  # a new head
    module.network.gains.bias.data[2] = 0.5
    logged = validate(module, (torch.zeros(1), torch.zeros(1)))
    held_out = pairs(1000)
    prediction, energies = 0.5 * held_out.images[:, 2:3], held_out.direction.square().sum(dim=(1, 2, 3))
    errors = (prediction - held_out.direction).square().sum(dim=(1, 2, 3))
    assert logged["val/r2"] == pytest.approx(float(1 - errors.sum() / energies.sum()), abs=1e-4)
    last = held_out.timesteps >= 750
    assert logged["val/r2_q3"] == pytest.approx(float(1 - errors[last].sum() / energies[last].sum()), abs=1e-4)


def test_a_checkpoint_identifies_the_shape_of_its_head():
    module = build()
    assert module.hparams["direction_head"]["width"] == 8
    assert module.hparams["direction_head_training"]["batch_size"] == 16
    assert SimpleNamespace(**module.hparams["direction_head"]).network_rms == head_settings().network_rms
