"""Guided grids and their numbers, at every validation."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from sagl.callbacks.measures import PreviewMetrics
from sagl.errors import UserError
from sagl.metrics.extractors import get_extractor
from sagl.models.adm import UNet
from sagl.modules.diffusion_module import DiffusionModule
from sagl.sampling.grid import colorize_masks, image_grid, save_png
from sagl.sampling.pipeline import SamplingPipeline, build_pipeline, make_labels, run_to_end
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.sampling import RunSettings, SamplerSettings
from sagl.settings.training import PreviewSettings
from sagl.shapes import ImageUint8
from sagl.utils.files import atomic_file
from sagl.utils.images import to_uint8


class SAGSampling(Callback):
    """Samples the network, unguided and guided by self-attention at several scales, whenever validation ends.

    Sample ids, and so their noise and labels, are the same every time: what changes is the network. Grids go to the
    logger and to previews/step_N.png; numbers to val/frechet_SCALE and val/inception_score_SCALE. To be listed before
    the callback that puts the averages in the weights' place, so that it sees them.
    """

    def __init__(self, folder: Path, settings: PreviewSettings, sag: SelfAttentionGuidance) -> None:
        """What to draw.

        Args:
            folder: of the run: grids go to previews/.
            settings: how many, at which scales, in how many steps.
            sag: site, blur and the rest; its scale is not read.

        Raises:
            UserError: there is no such extractor.
        """
        get_extractor(settings.extractor)  # refused here, or it is there
        self.folder, self.settings, self.sag = folder, settings, sag
        self._measures: PreviewMetrics | None = None

    # ------------------------------------------------------------------------------------------- at validation

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse scales and steps that the network cannot have, before hours have been spent.

        Where the config says nothing of sag, and its default site is none of the network's, previews are unguided.

        Raises:
            UserError: the site has no attention, the kernel does not fit, there are no such steps.
        """
        if not (self.settings.num_samples or self.settings.num_metric_samples):
            return
        try:
            recipes = list(self._recipes(pl_module))
        except UserError as error:
            if self.sag.site != SelfAttentionGuidance().site or set(self.settings.scales) == {0.0}:
                raise
            print(f"Previews are unguided: {error}")
            self.settings = replace(self.settings, scales=(0.0,), best_scale=0.0)
            recipes = list(self._recipes(pl_module))
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            self._announce(trainer, recipes)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw and measure."""
        if trainer.sanity_checking or not (self.settings.num_samples or self.settings.num_metric_samples):
            return
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            recipes = list(self._recipes(pl_module))
            if self.settings.num_samples:
                self._draw(trainer, recipes)
            if self.settings.num_metric_samples:
                self._measure(trainer, pl_module, recipes)

    def _announce(self, trainer: Trainer, recipes: Sequence[tuple[float, SamplingPipeline]]) -> None:
        """What each validation will cost, before the first step: a forward of the size in use is timed."""
        images = max(self.settings.num_samples, 0) + self.settings.num_metric_samples
        passes = images * sum(recipe.nfe for _, recipe in recipes)
        seconds = passes / trainer.world_size * _seconds_a_pass(recipes[0][1].network, self.settings.batch_size)
        scales = " ".join(f"{scale:g}" for scale, _ in recipes)
        if trainer.is_global_zero:
            print(
                f"At every validation: {self.settings.num_samples} images drawn and {self.settings.num_metric_samples} measured at "
                f"scales {scales}: {passes} network evaluations, about {seconds:.0f} s. --preview.num_samples 0: none."
            )

    # ------------------------------------------------------------------------------------------------- images

    def _recipes(self, module: LightningModule) -> Iterator[tuple[float, SamplingPipeline]]:
        assert isinstance(module, DiffusionModule)
        chain = SamplerSettings(sampler=self.settings.sampler, respacing=self.settings.respacing)
        for scale in self.settings.scales:
            yield (
                scale,
                build_pipeline(
                    module.network, module.diffusion_settings, chain, {"sag": replace(self.sag, scale=scale)}
                ),
            )

    def _made(self, recipe: SamplingPipeline, ids: Sequence[int]) -> tuple[ImageUint8, Tensor | None]:
        """Images of these ids, and the masked shares; of labels every class in turn."""
        classes = recipe.network.settings.num_classes
        run = RunSettings(num_samples=len(ids), labels="null" if classes is None else "balanced")
        x, share = run_to_end(recipe.sample_progressive(run.seed, ids, make_labels(run, ids, recipe.network)))
        return to_uint8(x), share

    def _draw(self, trainer: Trainer, recipes: Sequence[tuple[float, SamplingPipeline]]) -> None:
        """One grid on rank 0; the other ranks make their share of it."""
        rows: list[ImageUint8] = []
        for _, recipe in recipes:
            images, shares = [], []
            for ids in self._shares(trainer, self.settings.num_samples):
                made, share = self._made(recipe, ids)
                images.append(made)
                shares += [] if share is None else [share]
            rows.append(_of_all(trainer, torch.cat(images))[: self.settings.num_samples])
            if shares:
                rows.append(colorize_masks(_of_all(trainer, torch.cat(shares))[: self.settings.num_samples].cpu()))
        if trainer.is_global_zero:
            picture = image_grid([row.cpu() for row in rows])
            path = self.folder / "previews" / f"step_{trainer.global_step:08d}.png"
            with atomic_file(path) as partial:
                save_png(picture, partial)
            scales = " ".join(f"{scale:g}" for scale, _ in recipes)
            for logger in trainer.loggers:
                _show(logger, f"preview/scales {scales}", picture, trainer.global_step)

    def _shares(self, trainer: Trainer, count: int) -> Iterator[list[int]]:
        """Ids of this rank, a few at a time: every world_size-th; the last go over the end so that all have as many."""
        world, size = trainer.world_size, self.settings.batch_size
        mine = list(range(trainer.global_rank, -(-count // world) * world, world))
        yield from (mine[start : start + size] for start in range(0, len(mine), size))

    # ------------------------------------------------------------------------------------------------- numbers

    def _measure(
        self, trainer: Trainer, module: LightningModule, recipes: Sequence[tuple[float, SamplingPipeline]]
    ) -> None:
        self._measures = self._measures or PreviewMetrics(self.settings.extractor, module.device)
        self._measures.update_real(_batches(trainer))
        for scale, recipe in recipes:
            ids = (i for i in self._shares(trainer, self.settings.num_metric_samples))
            inside = ([i for i in few if i < self.settings.num_metric_samples] for few in ids)
            for name, value in self._measures.compute(self._made(recipe, few)[0] for few in inside if few).items():
                module.log(f"val/{name}_{scale:g}", value, rank_zero_only=True)


def _batches(trainer: Trainer) -> Iterator[ImageUint8]:
    """Images of this process's share of the validation images."""
    loaders: Any = trainer.val_dataloaders
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        for images, *_ in loader:
            yield images


def _show(logger: Any, name: str, picture: ImageUint8, step: int) -> None:  # noqa: ANN401 (any of Lightning's)
    """A picture, (3, H, W) uint8, to a logger that takes any: TensorBoard, and those with `log_image`, as wandb's."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, picture, step)
    elif hasattr(logger, "log_image"):
        logger.log_image(key=name, images=[picture.permute(1, 2, 0).numpy()], step=step)


def _seconds_a_pass(network: UNet, batch_size: int) -> float:
    """Of one sample's network evaluation in a batch; the second of two is timed."""
    s, device = network.settings, next(network.parameters()).device
    x = torch.zeros(batch_size, s.in_channels, s.image_size, s.image_size, device=device)
    timesteps = torch.zeros(batch_size, dtype=torch.int64, device=device)
    labels = None if s.num_classes is None else torch.zeros_like(timesteps)
    started = 0.0
    for _ in range(2):
        started = time.monotonic()
        network(x, timesteps, labels).out.sum().item()  # waits for a GPU
    return (time.monotonic() - started) / batch_size


def _of_all(trainer: Trainer, mine: Tensor) -> Tensor:
    """Rows of every rank in the order of their ids: (n, …) of each -> (n · world_size, …)."""
    if trainer.world_size == 1:
        return mine
    gathered: Tensor = trainer.strategy.all_gather(mine)
    return gathered.transpose(0, 1).flatten(0, 1)
