"""LightningModules outside of a trainer."""

from types import SimpleNamespace

import torch

from tests.helpers.reference import draw_weights

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8, generator=GENERATOR)
LABELS = torch.arange(8) % 3


def with_stub_trainer(module, *, batch=0, rank=0, ranks=1, weights_seed=1):
    """Give a module drawn weights and a trainer that knows batch index and rank; `module.logged` has what it logs."""
    if weights_seed is not None:
        draw_weights(module.network, weights_seed)
    module.trainer = SimpleNamespace(
        fit_loop=SimpleNamespace(total_batch_idx=batch),
        global_rank=rank,
        world_size=ranks,
        optimizers=[SimpleNamespace(param_groups=[{"lr": 1.0}])],
        state=SimpleNamespace(fn="fit"),
        max_steps=10,
        strategy=SimpleNamespace(reduce=lambda values, reduce_op: values),
    )
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
