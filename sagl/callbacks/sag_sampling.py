"""Guided grids, distances and the best checkpoints, at every validation."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from sagl.data.grid import mask_pictures, save_png, stacked_grid
from sagl.data.pixels import to_uint8
from sagl.metrics.distance import FrechetDistance
from sagl.metrics.features import EXTRACTORS, Extractor, features_of
from sagl.modules.diffusion_module import DiffusionModule
from sagl.recipe import Recipe, collect, labels_of, prepare
from sagl.settings.diffusion import one_of
from sagl.settings.errors import UserError
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.sampling import ChainSettings, RunSettings
from sagl.settings.training import PreviewSettings
from sagl.shapes import ImageUint8


class SAGSampling(Callback):
    """Samples the network, unguided and guided by self-attention at several scales, whenever validation ends.

    Sample ids, and so their noise and labels, are the same every time: what changes is the network. Grids go to the
    logger and to previews/step_N.png; distances to val/frechet_SCALE. To be listed before the callback that puts the
    averages in the weights' place, so that it sees them.
    """

    def __init__(self, folder: Path, settings: PreviewSettings, sag: SelfAttentionGuidance) -> None:
        """What to draw.

        Args:
            folder: of the run: grids go to previews/, the best checkpoints to checkpoints/.
            settings: how many, at which scales, in how many steps.
            sag: site, blur and the rest; its scale is not read.

        Raises:
            UserError: there is no such extractor.
        """
        one_of("preview.extractor", settings.extractor, tuple(EXTRACTORS))
        self.folder, self.settings, self.sag = folder, settings, sag
        self._extract: Extractor | None = None
        self._metric: FrechetDistance | None = None
        self._due: float | None = None
        self.best: list[tuple[float, str]] = []

    # ------------------------------------------------------------------------------------------- at validation

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse scales and steps that the network cannot have, before hours have been spent.

        Where the config says nothing of sag, and its default site is none of the network's, previews are unguided.

        Raises:
            UserError: the site has no attention, the kernel does not fit, there are no such steps.
        """
        if not (self.settings.samples or self.settings.measured):
            return
        try:
            list(self._recipes(pl_module))
        except UserError as error:
            if self.sag.site != SelfAttentionGuidance().site or set(self.settings.scales) == {0.0}:
                raise
            print(f"Previews are unguided: {error}")
            self.settings = replace(self.settings, scales=(0.0,), best_scale=0.0)
            list(self._recipes(pl_module))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw and measure."""
        if trainer.sanity_checking or not (self.settings.samples or self.settings.measured):
            return
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            recipes = list(self._recipes(pl_module))
            if self.settings.samples:
                self._draw(trainer, recipes)
            if self.settings.measured:
                self._measure(trainer, pl_module, recipes)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the checkpoint if it is one of the best; by now the weights are back in their place."""
        if self._due is not None and self.settings.keep_best:
            self._keep(trainer, self._due)
        self._due = None

    def state_dict(self) -> dict[str, Any]:
        """The best so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them; those that are gone are forgotten."""
        self.best = [(distance, name) for distance, name in state_dict["best"] if (self._checkpoints / name).exists()]

    # ------------------------------------------------------------------------------------------------- images

    def _recipes(self, module: LightningModule) -> Iterator[tuple[float, Recipe]]:
        assert isinstance(module, DiffusionModule)
        chain = ChainSettings(sampler=self.settings.sampler, respacing=self.settings.respacing)
        for scale in self.settings.scales:
            yield scale, prepare(module.network, module.diffusion_settings, chain, replace(self.sag, scale=scale))

    def _made(self, recipe: Recipe, ids: Sequence[int]) -> tuple[ImageUint8, Tensor | None]:
        """Images of these ids, and the masked shares; of labels every class in turn."""
        classes = recipe.network.settings.num_classes
        run = RunSettings(num_samples=len(ids), labels="null" if classes is None else "balanced")
        x, share = collect(recipe.chain(run.seed, ids, labels_of(run, ids, recipe.network)))
        return to_uint8(x), share

    def _draw(self, trainer: Trainer, recipes: Sequence[tuple[float, Recipe]]) -> None:
        """One grid on rank 0; the other ranks make their share of it."""
        rows: list[ImageUint8] = []
        for _, recipe in recipes:
            images, shares = [], []
            for ids in self._shares(trainer, self.settings.samples):
                made, share = self._made(recipe, ids)
                images.append(made)
                shares += [] if share is None else [share]
            rows.append(_of_all(trainer, torch.cat(images))[: self.settings.samples])
            if shares:
                rows.append(mask_pictures(_of_all(trainer, torch.cat(shares))[: self.settings.samples].cpu()))
        if trainer.is_global_zero:
            picture = stacked_grid([row.cpu() for row in rows])
            path = self.folder / "previews" / f"step_{trainer.global_step:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(picture, path)
            scales = " ".join(f"{scale:g}" for scale, _ in recipes)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(f"preview/scales {scales}", picture, trainer.global_step)

    def _shares(self, trainer: Trainer, count: int) -> Iterator[list[int]]:
        """Ids of this rank, a few at a time: every world_size-th; the last go over the end so that all have as many."""
        world, size = trainer.world_size, self.settings.batch_size
        mine = list(range(trainer.global_rank, -(-count // world) * world, world))
        yield from (mine[start : start + size] for start in range(0, len(mine), size))

    # ----------------------------------------------------------------------------------------------- distances

    def _measure(self, trainer: Trainer, module: LightningModule, recipes: Sequence[tuple[float, Recipe]]) -> None:
        metric = self._against_validation_images(trainer, module)
        for scale, recipe in recipes:
            metric.forget_made()
            for ids in self._shares(trainer, self.settings.measured):
                inside = [i for i in ids if i < self.settings.measured]
                if inside:
                    metric.update(self._features(self._made(recipe, inside)[0]).to(module.device), real=False)
            distance = float(metric.compute())
            module.log(f"val/frechet_{scale:g}", distance, rank_zero_only=True)
            if scale == self.settings.best_scale:
                self._due = distance

    def _against_validation_images(self, trainer: Trainer, module: LightningModule) -> FrechetDistance:
        """The metric with the validation images in it, which are looked at once."""
        if self._metric is None:
            for images, _ in _batches(trainer):
                features = self._features(images).to(module.device)
                self._metric = self._metric or FrechetDistance(features.shape[1]).to(module.device)
                self._metric.update(features, real=True)
            assert self._metric is not None, "validation has no images"
        return self._metric

    def _features(self, images: ImageUint8) -> Tensor:
        self._extract = self._extract or EXTRACTORS[self.settings.extractor]()
        return features_of(images.cpu(), self._extract)

    # --------------------------------------------------------------------------------------- best checkpoints

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _keep(self, trainer: Trainer, distance: float) -> None:
        """Save if there is room among the best; the worst of them makes it."""
        worst = max(self.best)[0] if len(self.best) >= self.settings.keep_best else float("inf")
        if not trainer.strategy.broadcast(distance < worst):
            return
        name = f"best_{trainer.global_step:08d}.ckpt"
        dropped = [old for _, old in sorted(self.best)[self.settings.keep_best - 1 :]]
        self.best = [*sorted(self.best)[: self.settings.keep_best - 1], (distance, name)]
        partial = self._checkpoints / f"{name}.partial"
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            os.replace(partial, self._checkpoints / name)
            for old in dropped:
                (self._checkpoints / old).unlink(missing_ok=True)


def _batches(trainer: Trainer) -> Iterator[Any]:
    loaders: Any = trainer.val_dataloaders
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        yield from loader


def _of_all(trainer: Trainer, mine: Tensor) -> Tensor:
    """Rows of every rank in the order of their ids: (n, …) of each -> (n · world_size, …)."""
    if trainer.world_size == 1:
        return mine
    gathered: Tensor = trainer.strategy.all_gather(mine)
    return gathered.transpose(0, 1).flatten(0, 1)
