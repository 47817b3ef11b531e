"""Table of the results of `sagl validate` and `sagl test`."""

import math
from collections.abc import Iterator, Mapping

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sagl.modules.training_module import NUM_TIMESTEP_BINS

MEANS = ("loss", "mse", "accuracy", "accuracy_top_5")


class LossTable(Callback):
    """Prints losses over all timesteps and by range, bits/dim with its standard error, and metrics of previews."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and trainer.state.fn != "fit":
            num_images = int(trainer.callback_metrics["val/num_images"])
            table = Table("", f"{num_images} images", title="validation" if trainer.validating else "test")
            for row in rows(trainer.callback_metrics, pl_module.hparams["diffusion"]["num_timesteps"]):
                table.add_row(*row)
            Console().print(table)

    on_test_end = on_validation_end


def rows(metrics: Mapping[str, Tensor], num_timesteps: int) -> Iterator[tuple[str, str]]:
    """Yield the name and the formatted value of each row."""
    for name in MEANS:
        if f"val/{name}" in metrics:
            yield name.replace("_", " "), f"{float(metrics[f'val/{name}']):.5f}"
        for q in range(NUM_TIMESTEP_BINS):
            if (key := f"val/{name}_q{q}") in metrics:
                first, end = (k * num_timesteps // NUM_TIMESTEP_BINS for k in (q, q + 1))
                yield f"  at timesteps {first} to {end - 1}", f"{float(metrics[key]):.5f}"
    if "val/bits_per_dim" in metrics:
        mean, squared = (float(metrics[f"val/{name}"]) for name in ("bits_per_dim", "bits_per_dim_squared"))
        standard_error = math.sqrt(max(0.0, squared - mean**2) / float(metrics["val/num_images"]))
        yield "bits/dim", f"{mean:.3f} ± {standard_error:.3f}"
    for key, value in metrics.items():
        if key.startswith(("val/frechet_", "val/inception_score_")):  # such as val/inception_score_0.3
            name, scale = key.removeprefix("val/").rsplit("_", 1)
            yield f"{name.replace('_', ' ')} at scale {scale}", f"{float(value):.2f}"
