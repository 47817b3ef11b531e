"""What `sagl validate` and `sagl test` print."""

import math
from collections.abc import Iterator, Mapping

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sagl.modules.training_module import NUM_TIMESTEP_BINS

MEANS = ("loss", "mse", "accuracy", "accuracy_top_5")
Row = tuple[str, str]
"""What, and its number."""


class LossTable(Callback):
    """Loss whole and by quarter of the timesteps, bits/dim with its standard error, distances where they were taken."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print, on rank 0."""
        if trainer.is_global_zero and trainer.state.fn != "fit":
            images = int(trainer.callback_metrics["val/images"])
            table = Table("", f"{images} images", title="validation" if trainer.validating else "test")
            for row in rows(trainer.callback_metrics, pl_module.hparams["diffusion"]["num_timesteps"]):
                table.add_row(*row)
            Console().print(table)

    on_test_end = on_validation_end


def rows(metrics: Mapping[str, Tensor], num_timesteps: int) -> list[Row]:
    """The lines of the table."""
    found = [row for name in MEANS if f"val/{name}" in metrics for row in _mean_rows(metrics, name, num_timesteps)]
    if "val/bits_per_dim" in metrics:
        found.append(("bits/dim", f"{float(metrics['val/bits_per_dim']):.3f} ± {_standard_error(metrics):.3f}"))
    others = (name for name in metrics if name.startswith(("val/frechet_", "val/inception_score_")))
    return found + [(_spoken(name), f"{float(metrics[name]):.2f}") for name in others]


def _mean_rows(metrics: Mapping[str, Tensor], name: str, num_timesteps: int) -> Iterator[Row]:
    """A mean over all images, and over those of each quarter of the timesteps where it was taken."""
    yield name.replace("_", " "), f"{float(metrics[f'val/{name}']):.5f}"
    for q in range(NUM_TIMESTEP_BINS):
        if (of_quarter := f"val/{name}_quarter_{q}") in metrics:
            first, last = q * num_timesteps // NUM_TIMESTEP_BINS, (q + 1) * num_timesteps // NUM_TIMESTEP_BINS - 1
            yield f"  at timesteps {first} to {last}", f"{float(metrics[of_quarter]):.5f}"


def _standard_error(metrics: Mapping[str, Tensor]) -> float:
    mean, squared = float(metrics["val/bits_per_dim"]), float(metrics["val/bits_per_dim_squared"])
    return math.sqrt(max(0.0, squared - mean**2) / float(metrics["val/images"]))


def _spoken(name: str) -> str:
    """val/inception_score_0.3 -> inception score at scale 0.3."""
    what, scale = name.removeprefix("val/").rsplit("_", 1)
    return f"{what.replace('_', ' ')} at scale {scale}"
