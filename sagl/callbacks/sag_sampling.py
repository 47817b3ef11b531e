"""Previews: image grids at several guidance scales, and their metrics, at every validation."""

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from sagl.callbacks.progress import TrainingProgress
from sagl.errors import UserError, require
from sagl.metrics.extractors import extractor_version, get_extractor
from sagl.metrics.feature_metrics import FeatureMetrics
from sagl.models.adm import UNet
from sagl.modules.diffusion_module import DiffusionModule
from sagl.modules.training_module import gather_batch
from sagl.sampling.exports import colorize_masks
from sagl.sampling.pipeline import SamplingPipeline, build_pipeline, make_labels
from sagl.settings.evaluation import EXTRACTOR_NAMES
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.sampling import RunSettings, SamplerSettings
from sagl.settings.training import PreviewSettings
from sagl.shapes import ImageUint8
from sagl.utils.files import atomic_file, cache_file, cache_folder
from sagl.utils.images import image_grid, save_png, to_uint8

Pipelines = Mapping[float, SamplingPipeline]
"""Sampling pipelines by guidance scale."""


def preview_metrics(extractor: str, real_batches: Iterable[ImageUint8], device: torch.device) -> FeatureMetrics:
    """Return metrics over all processes, with the real images of this process.

    The sums over the real images are cached by their pixels and the extractor's weights. Those of an extractor of the
    user, whose code may change, are not cached.
    """
    extract, images = get_extractor(extractor)(device), [batch.cpu() for batch in real_batches]
    metrics = FeatureMetrics(extract, images[0][:1], device)
    path = None
    if extractor in EXTRACTOR_NAMES:
        parts = ("preview-float32", extractor, extractor_version(extractor, extract), _fingerprint(images))
        path = cache_folder() / "statistics" / ("-".join(filter(None, parts)) + ".npz")
    if path is not None and path.is_file():
        with np.load(path) as arrays:
            metrics.real_state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        return metrics
    for batch in images:
        metrics.update_real(batch)
    if path is None:
        return metrics
    state: dict[str, Any] = {name: value.cpu().numpy() for name, value in metrics.real_state.items()}
    with cache_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **state)
    return metrics


class SAGPreviews(Callback):
    """Samples the network at every validation, unguided and with self-attention guidance at several scales.

    Sample ids, and so noise and labels, are the same every time. Grids are written to previews/step_N.png and to the
    logger; metrics are logged as val/frechet_SCALE and val/inception_score_SCALE. The callback must be listed before
    `EMA`, which puts the raw weights back at the end of validation.
    """

    def __init__(self, folder: Path, settings: PreviewSettings, sag: SelfAttentionGuidance) -> None:
        """Check that the extractor exists.

        Args:
            folder: folder of the run.
            settings: numbers of images, scales and sampler.
            sag: guidance settings; the scale is not used.

        Raises:
            UserError: there is no such extractor.
        """
        get_extractor(settings.extractor)
        self.folder, self.settings, self.sag = folder, settings, sag
        self._metrics: FeatureMetrics | None = None
        self._num_sampled = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check scales and respacing against the network, and print what each validation will cost.

        If `sag` has its default site, and the network has no attention there, previews are unguided. Without validation
        there are none, which is said if their number is not the default.

        Raises:
            UserError: the site has no attention, the kernel is too large, or the respacing is impossible; or there is
                no validation that could find the best checkpoints.
        """
        if not (self.settings.num_samples or self.settings.num_metric_samples):
            return
        if not trainer.enable_validation:
            require(
                self.settings.keep_best == 0,
                f"`preview.keep_best` must be 0 without validation images, got {self.settings.keep_best}. Set "
                "`data.num_validation`.",
            )
            default, s = PreviewSettings(), self.settings
            is_default = (s.num_samples, s.num_metric_samples) == (default.num_samples, default.num_metric_samples)
            if trainer.is_global_zero and not is_default:
                print(
                    "No previews: they are sampled at validations, and this training has none, because "
                    "data.num_validation or trainer.limit_val_batches is 0."
                )
            return
        try:
            pipelines = self._build_pipelines(pl_module)
        except UserError as error:
            selects_guided = self.settings.keep_best > 0 and self.settings.best_scale != 0
            if self.sag.site != SelfAttentionGuidance().site or set(self.settings.scales) == {0.0} or selects_guided:
                raise
            print(f"Previews are unguided: {error}")
            self.settings = replace(self.settings, scales=(0.0,), best_scale=0.0)
            pipelines = self._build_pipelines(pl_module)
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            self._print_cost(trainer, pipelines)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log a grid of guided images and their metrics, as far as the settings ask for them."""
        if trainer.sanity_checking or not (self.settings.num_samples or self.settings.num_metric_samples):
            return
        self._num_sampled = 0
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            pipelines = self._build_pipelines(pl_module)
            if self.settings.num_samples:
                self._log_grid(trainer, pipelines)
            images = {scale: self._metric_samples(trainer, pipeline) for scale, pipeline in pipelines.items()}
        if self.settings.num_metric_samples:
            with torch.inference_mode():
                self._log_metrics(trainer, pl_module, images)

    def _build_pipelines(self, module: LightningModule) -> Pipelines:
        assert isinstance(module, DiffusionModule)
        sampler = SamplerSettings(sampler=self.settings.sampler, respacing=self.settings.respacing)
        guidances = {scale: {"sag": replace(self.sag, scale=scale)} for scale in self.settings.scales}
        return {
            scale: build_pipeline(module.network, module.diffusion_settings, sampler, guidance)
            for scale, guidance in guidances.items()
        }

    def _print_cost(self, trainer: Trainer, pipelines: Pipelines) -> None:
        s = self.settings
        nfe = (s.num_samples + s.num_metric_samples) * sum(pipeline.nfe for pipeline in pipelines.values())
        network = next(iter(pipelines.values())).network
        seconds = nfe / trainer.world_size * _seconds_per_evaluation(network, s.batch_size)
        if trainer.is_global_zero:
            print(
                f"Every validation samples {s.num_samples} preview images and {s.num_metric_samples} for metrics at "
                f"scales {_join(pipelines)}: {nfe:g} network evaluations, about {seconds:.0f} s. "
                "Set preview.num_samples to 0 for none."
            )

    def _log_grid(self, trainer: Trainer, pipelines: Pipelines) -> None:
        """Write a grid with a row of images for each scale and a row of masks under each guided one."""
        rows: list[ImageUint8] = []
        for pipeline in pipelines.values():
            batches = [
                self._sample(trainer, pipeline, ids) for ids in self._rank_batches(trainer, self.settings.num_samples)
            ]
            images, mask_frequencies = zip(*batches, strict=True)
            rows.append(self._all_gather(trainer, images))
            if mask_frequencies[0] is not None:
                rows.append(colorize_masks(self._all_gather(trainer, mask_frequencies)))
        if trainer.is_global_zero:
            grid = image_grid(rows)
            with atomic_file(self.folder / "previews" / f"step_{trainer.global_step:08d}.png") as partial:
                save_png(grid, partial)
            for logger in trainer.loggers:
                log_image(logger, f"preview/scales {_join(pipelines)}", grid, trainer.global_step)

    def _metric_samples(self, trainer: Trainer, pipeline: SamplingPipeline) -> list[ImageUint8]:
        """Sample this rank's images for metrics."""
        count = self.settings.num_metric_samples
        ids = ([i for i in batch if i < count] for batch in self._rank_batches(trainer, count))
        return [self._sample(trainer, pipeline, batch)[0].cpu() for batch in ids if batch]

    def _log_metrics(
        self, trainer: Trainer, module: LightningModule, images: Mapping[float, Sequence[ImageUint8]]
    ) -> None:
        """Log the metrics of each scale's images. Extractors compute in float32, whatever the trainer's precision."""
        if self._metrics is None:
            self._metrics = preview_metrics(self.settings.extractor, _validation_images(trainer), module.device)
        for scale, batches in images.items():
            for name, value in self._metrics.compute(batches).items():
                module.log(f"val/{name}_{scale:g}", value, sync_dist=True)

    def _sample(
        self, trainer: Trainer, pipeline: SamplingPipeline, ids: Sequence[int]
    ) -> tuple[ImageUint8, Tensor | None]:
        """Sample images of these ids and their mask frequencies: of every class in turn if the images have classes.

        On images without labels, only the null label of a network with classes is trained.
        """
        has_classes = pipeline.network.settings.num_classes is not None
        has_labels = has_classes and getattr(trainer.datamodule, "has_labels", True)  # type: ignore[attr-defined]
        samples = RunSettings(num_samples=len(ids), labels="balanced" if has_labels else "null")
        x, mask_frequency = pipeline.sample(samples.seed, ids, make_labels(samples, ids, pipeline.network))
        self._num_sampled += len(ids) * trainer.world_size
        if isinstance(trainer.progress_bar_callback, TrainingProgress):
            total = (self.settings.num_samples + self.settings.num_metric_samples) * len(self.settings.scales)
            trainer.progress_bar_callback.update_part("previews", min(self._num_sampled, total), total)
        return to_uint8(x), mask_frequency

    def _rank_batches(self, trainer: Trainer, count: int) -> Iterator[list[int]]:
        """Yield this rank's ids, every world_size-th, in batches; the last ones exceed `count` on some ranks."""
        world_size, size = trainer.world_size, self.settings.batch_size
        ids = list(range(trainer.global_rank, -(-count // world_size) * world_size, world_size))
        yield from (ids[start : start + size] for start in range(0, len(ids), size))

    def _all_gather(self, trainer: Trainer, batches: Sequence[Tensor]) -> Tensor:
        """Concatenate batches of all ranks in the order of sample ids, on the CPU: (num_samples, …)."""
        return gather_batch(torch.cat(list(batches)), trainer)[: self.settings.num_samples].cpu()


def log_image(logger: Any, name: str, image: ImageUint8, step: int) -> None:  # noqa: ANN401 (any of Lightning's)
    """Log a (3, H, W) image to TensorBoard, or to a logger with `log_image`, such as wandb's."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, image, step)
    elif hasattr(logger, "log_image"):
        logger.log_image(key=name, images=[image.permute(1, 2, 0).numpy()], step=step)


def _validation_images(trainer: Trainer) -> Iterator[ImageUint8]:
    """Yield the validation images of this rank."""
    loaders: Any = trainer.val_dataloaders
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        for images, *_ in loader:
            yield images


def _seconds_per_evaluation(network: UNet, batch_size: int) -> float:
    """Time the second of two forward passes of a batch; return seconds per sample."""
    s, device = network.settings, next(network.parameters()).device
    x = torch.zeros(batch_size, s.in_channels, s.image_size, s.image_size, device=device)
    timesteps = torch.zeros(batch_size, dtype=torch.int64, device=device)
    labels = None if s.num_classes is None else torch.zeros_like(timesteps)
    start = 0.0
    for _ in range(2):
        start = time.monotonic()
        network(x, timesteps, labels).out.sum().item()  # waits for a GPU
    return (time.monotonic() - start) / batch_size


def _join(pipelines: Pipelines) -> str:
    return " ".join(f"{scale:g}" for scale in pipelines)


def _fingerprint(batches: Iterable[ImageUint8]) -> str:
    """Hash the pixels."""
    digest = hashlib.sha256()
    for images in batches:
        digest.update(images.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
