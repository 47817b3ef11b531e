"""The checkpoints of the smallest Fréchet distances, within a number and a budget of disk."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sagl.settings.training import PreviewSettings


class BestCheckpoints(Callback):
    """Keeps checkpoints/best_STEP.ckpt where val/frechet_SCALE of the scale that decides was smallest."""

    def __init__(self, folder: Path, settings: PreviewSettings) -> None:
        """In `folder`, at most `keep_best` of them and `max_checkpoint_gb` together."""
        self.folder, self.settings = folder, settings
        self.best: list[tuple[float, str]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if it is one of the best; by now the raw weights are back in their place."""
        distance = trainer.callback_metrics.get(f"val/frechet_{self.settings.best_scale:g}")
        if trainer.sanity_checking or not self.settings.keep_best:
            return
        if trainer.strategy.broadcast(distance is not None and float(distance) < self._worst()):
            self._save(trainer, 0.0 if distance is None else float(distance))

    def state_dict(self) -> dict[str, Any]:
        """The best so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them; those that are gone are forgotten."""
        self.best = [(distance, name) for distance, name in state_dict["best"] if (self.folder / name).exists()]

    def _worst(self) -> float:
        """A distance must be below it to be kept."""
        return max(self.best)[0] if len(self.best) >= self.settings.keep_best else float("inf")

    def _save(self, trainer: Trainer, distance: float) -> None:
        """Write it, then drop the worst while they are too many or too large; the best one always stays."""
        name = f"best_{trainer.global_step:08d}.ckpt"
        partial = self.folder / f"{name}.partial"
        self.best = sorted([*(kept for kept in self.best if kept[1] != name), (distance, name)])
        trainer.save_checkpoint(partial)
        if not trainer.is_global_zero:
            return
        os.replace(partial, self.folder / name)
        while len(self.best) > 1 and (len(self.best) > self.settings.keep_best or self._too_large()):
            (self.folder / self.best.pop()[1]).unlink(missing_ok=True)

    def _too_large(self) -> bool:
        files = (self.folder / name for _, name in self.best)
        return sum(file.stat().st_size for file in files if file.exists()) > self.settings.max_checkpoint_gb * 1e9
