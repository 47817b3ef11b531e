"""Sampling of one batch: to tensors, and to PNG files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sagl.diffusion.predictor import Trajectory
from sagl.errors import require
from sagl.sampling.pipeline import SamplingPipeline, make_labels, run_to_end
from sagl.sampling.run_folder import SAMPLES, Sample, encode_png
from sagl.settings.sampling import RunSettings
from sagl.shapes import Image, ImageUint8, Labels
from sagl.utils.images import to_rgb, to_uint8


class SampledBatch(NamedTuple):
    """Images of one pipeline for a whole batch, on the device of the pipeline."""

    labels: Labels | None
    """(B,) int64; None if the network has no classes or gets none."""
    images: Image
    """(B, C, H, W), finite unless `may_overflow` was set."""
    mask_frequency: Tensor | None
    """Fraction of the guided steps in which each pixel was masked, (B, 1, H, W); None if no step had a mask."""
    nfe: float
    """Network evaluations of each sample."""


def sample_batch(
    pipeline: SamplingPipeline,
    samples: RunSettings,
    ids: Sequence[int],
    track_steps: Callable[[Trajectory, int], Trajectory] = lambda steps, num_steps: steps,
    *,
    may_overflow: bool = False,
) -> SampledBatch:
    """Sample a whole batch.

    Args:
        pipeline: the pipeline.
        samples: seed and labels.
        ids: ids of the batch.
        track_steps: function (steps, number of steps) that yields the steps, and may show them.
        may_overflow: return images that are not finite, too.

    Raises:
        UserError: an image is not finite, or the network does not have a label.
    """
    nfe = list[float]()
    with torch.inference_mode():
        labels = make_labels(samples, ids, pipeline.network)
        steps = _collect_nfe(pipeline.sample_progressive(samples.seed, ids, labels), nfe)
        images, mask_frequency = run_to_end(track_steps(steps, pipeline.schedule.num_steps))
    require(
        may_overflow or bool(images.isfinite().all()),
        "`sag.scale` and other guidance scales must leave the images finite, but these overflowed. Lower the "
        "scales, or set `trainer.precision` to 32-true."
        if pipeline.guidances
        else "`checkpoint` must give finite images, but these overflowed without guidance. Set `trainer.precision` to "
        "32-true, or use other weights.",
    )
    return SampledBatch(labels, images, mask_frequency, sum(nfe))


def _collect_nfe(trajectory: Trajectory, nfe: list[float]) -> Trajectory:
    """Yield the steps of a trajectory, and append the network evaluations of each to `nfe`."""
    for step, x, prediction in trajectory:
        nfe.append(prediction.nfe)
        yield step, x, prediction


@dataclass(frozen=True, kw_only=True)
class BatchImages:
    """Images of one pipeline for consecutive ids of a batch, as PNG files."""

    ids: Sequence[int]
    labels: Sequence[int]
    """Classes; -1 for none."""
    images: Sequence[bytes]
    masks: Sequence[bytes] | None
    """Mask frequencies; None if no step had a mask."""
    mask_share: float | None
    """Share of the pixels that are masked, the mean over guided steps and samples; None if no step had a mask."""
    nfe: float
    """Network evaluations of each sample."""


def sample_images(
    pipeline: SamplingPipeline,
    samples: RunSettings,
    ids: Sequence[int],
    track_steps: Callable[[Trajectory, int], Trajectory],
) -> BatchImages:
    """Sample the batch that contains `ids`, and return the images of these ids.

    The batch is computed at full size, whichever ids are needed, so that an image never depends on them.

    Args:
        pipeline: the pipeline.
        samples: seed, labels and batch size.
        ids: consecutive ids of one batch.
        track_steps: function (steps, number of steps) that yields the steps, and shows them.

    Raises:
        UserError: an image is not finite.
    """
    batch_ids = full_batch(samples, ids)
    start = ids[0] - batch_ids[0]
    part = slice(start, start + len(ids))
    labels, images, mask_frequency, nfe = sample_batch(pipeline, samples, batch_ids, track_steps)
    masks = None if mask_frequency is None else (mask_frequency * 255).round().to(torch.uint8)
    return BatchImages(
        ids=ids,
        labels=[-1] * len(ids) if labels is None else labels[part].tolist(),
        images=encode_pngs(to_uint8(images[part])),
        masks=None if masks is None else encode_pngs(masks[part]),
        mask_share=None if mask_frequency is None else mask_frequency[part].mean().item(),
        nfe=nfe,
    )


def full_batch(samples: RunSettings, ids: Sequence[int]) -> list[int]:
    """Return all ids of the batch that contains `ids`."""
    size = samples.effective_batch_size
    first = ids[0] - ids[0] % size
    return list(range(first, first + size))


def make_samples(seed: int, batch: BatchImages, unguided: BatchImages | None = None) -> list[Sample]:
    """Return the samples of a batch; with unguided images, these and the masks are rows of each sample too."""
    rows = {} if unguided is None else {"unguided": unguided.images}
    rows[SAMPLES] = batch.images
    if unguided is not None and batch.masks is not None:
        rows["masks"] = batch.masks
    return [
        Sample(id=i, label=label, seed=seed, pngs={name: row[k] for name, row in rows.items()})
        for k, (i, label) in enumerate(zip(batch.ids, batch.labels, strict=True))
    ]


def encode_pngs(images: ImageUint8) -> list[bytes]:
    """Encode images as PNG files: (B, C, H, W), gray or RGB."""
    return [encode_png(image) for image in to_rgb(images).permute(0, 2, 3, 1).cpu().contiguous().numpy()]
