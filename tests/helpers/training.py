"""Trainers that leave no files, and LightningModules outside of a trainer."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch.utils.data import DataLoader

from sagl.configuration.parser import from_namespace
from sagl.settings.training import CheckpointSettings
from sagl.training.setup import prepare_fit
from tests.helpers.networks import draw_weights

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8, generator=GENERATOR)
LABELS = torch.arange(8) % 3


def with_stub_trainer(module, *, batch=0, rank=0, ranks=1, weights_seed=1):
    """Give a module random weights and a trainer with batch index and rank; its logged values go to `module.logged`."""
    if weights_seed is not None:
        draw_weights(module.network, weights_seed)
    module.trainer = SimpleNamespace(
        fit_loop=SimpleNamespace(total_batch_idx=batch),
        global_rank=rank,
        world_size=ranks,
        optimizers=[SimpleNamespace(param_groups=[{"lr": 1.0}])],
        state=SimpleNamespace(fn="fit"),
        max_steps=10,
        accumulate_grad_batches=1,
        strategy=SimpleNamespace(),
        _logger_connector=SimpleNamespace(should_update_logs=True),
    )
    module._all_reduce = lambda values, op: values
    module.logged = {}
    module.log = lambda name, value, **_: module.logged.update({name: float(torch.as_tensor(value).detach())})
    module.log_dict = lambda values: [module.log(name, value) for name, value in values.items()]
    return module


def loss_of_step(module, images=IMAGES, labels=LABELS):
    with torch.no_grad():
        return float(module.training_step((images, labels), 0))


def validate(module, *batches):
    """Return what a validation of these batches logs."""
    module.logged.clear()
    module.on_validation_epoch_start()
    for k, batch in enumerate(batches):
        module.validation_step(batch, k)
    module.on_validation_epoch_end()
    return dict(module.logged)


def record_steps(module, run):
    """Return a list that gets the metrics of every training step of a trainer."""
    steps = []
    module.on_train_batch_end = lambda *_: steps.append({n: float(v) for n, v in run.callback_metrics.items()})
    return steps


IGNORED_WARNINGS = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`isinstance.treespec, LeafSpec.` is deprecated",  # Lightning's own walk over batches
        "The '(train|val)_dataloader' does not have many workers",  # on purpose: the data are in memory
    )
]
"""Marks that ignore what Lightning warns of in any short fit."""


def trainer(*, callbacks=(), **options):
    """Return a trainer that writes no files and validates only if `val_check_interval` is given."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks)}
    quiet |= {} if "val_check_interval" in options else {"limit_val_batches": 0}
    quiet["log_every_n_steps"] = 1
    return Trainer(accelerator="cpu", max_epochs=-1, callbacks=list(callbacks), **{**quiet, **options})


class Line(LightningModule):
    """Two weights that change at every step; `history` has their values."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        self.history = {"train": [], "validation": []}

    def training_step(self, batch, batch_idx):
        self.history["train"].append(self.weight.detach().clone())
        return (self.weight * batch).square().sum() + self.weight.sum() * (self.global_step % 3 - 1)

    def validation_step(self, batch, batch_idx):
        self.history["validation"].append(self.weight.detach().clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


def line_data(count=100):
    """Return equal batches of one, so that the begin of an epoch makes no difference."""
    return DataLoader(torch.ones(count, 2), batch_size=1)


def fit_line(*, callbacks, ckpt_path=None, **options):
    """Fit a `Line`; return it and its trainer."""
    line, run = Line(), trainer(callbacks=callbacks, **options)
    run.fit(line, line_data(), line_data(4), ckpt_path=ckpt_path)
    return line, run


def prepare_training(parser, arguments):
    """Return module, data and trainer of a command line of `sagl fit`."""
    config = parser.parse(arguments)
    return prepare_fit(parser, config, from_namespace(CheckpointSettings, config))
