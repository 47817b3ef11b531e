"""What `sagl validate` and `sagl test` print."""

import math
from collections.abc import Mapping

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sagl.modules.diffusion_module import QUARTERS

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
    found = [("loss", f"{float(metrics['val/loss']):.5f}"), ("mse", f"{float(metrics['val/mse']):.5f}")]
    for q in range(QUARTERS):
        if (name := f"val/loss_quarter_{q}") in metrics:
            first, last = q * num_timesteps // QUARTERS, (q + 1) * num_timesteps // QUARTERS - 1
            found.append((f"  loss at timesteps {first} to {last}", f"{float(metrics[name]):.5f}"))
    found.append(("bits/dim", f"{float(metrics['val/bits_per_dim']):.3f} ± {_standard_error(metrics):.3f}"))
    others = (name for name in metrics if name.startswith(("val/frechet_", "val/inception_score_")))
    return found + [(_spoken(name), f"{float(metrics[name]):.2f}") for name in others]


def _standard_error(metrics: Mapping[str, Tensor]) -> float:
    mean, squared = float(metrics["val/bits_per_dim"]), float(metrics["val/bits_per_dim_squared"])
    return math.sqrt(max(0.0, squared - mean**2) / float(metrics["val/images"]))


def _spoken(name: str) -> str:
    """val/inception_score_0.3 -> inception score at scale 0.3."""
    what, scale = name.removeprefix("val/").rsplit("_", 1)
    return f"{what.replace('_', ' ')} at scale {scale}"
