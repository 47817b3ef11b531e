"""Sampling of one batch to PNG files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sagl.diffusion.predictor import Trajectory
from sagl.errors import require
from sagl.sampling.pipeline import SamplingPipeline, make_labels, run_to_end
from sagl.sampling.run_folder import SAMPLES, Sample, encode_png
from sagl.settings.sampling import RunSettings
from sagl.shapes import Image, ImageUint8
from sagl.utils.images import to_rgb, to_uint8


@dataclass(frozen=True, kw_only=True)
class BatchImages:
    """Images of one pipeline for consecutive ids of a batch, as PNG files."""

    ids: Sequence[int]
    labels: Sequence[int]
    """Classes; -1 for none."""
    images: Sequence[bytes]
    masks: Sequence[bytes] | None
    """Mask frequencies; None if no step had a mask."""
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
    part, nfe = slice(start, start + len(ids)), list[float]()
    with torch.inference_mode():
        labels = make_labels(samples, batch_ids, pipeline.network)
        steps = collect_nfe(pipeline.sample_progressive(samples.seed, batch_ids, labels), nfe)
        images, mask_frequency = run_to_end(track_steps(steps, pipeline.schedule.num_steps))
        check_finite(images)
    masks = None if mask_frequency is None else (mask_frequency * 255).round().to(torch.uint8)
    return BatchImages(
        ids=ids,
        labels=[-1] * len(ids) if labels is None else labels[part].tolist(),
        images=encode_pngs(to_uint8(images[part])),
        masks=None if masks is None else encode_pngs(masks[part]),
        nfe=sum(nfe),
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


def collect_nfe(trajectory: Trajectory, nfe: list[float]) -> Trajectory:
    """Yield the steps of a trajectory, and append the network evaluations of each to `nfe`."""
    for step, x, prediction in trajectory:
        nfe.append(prediction.nfe)
        yield step, x, prediction


def check_finite(images: Image) -> None:
    """Refuse images that overflowed.

    Raises:
        UserError: a value is not finite.
    """
    require(
        bool(images.isfinite().all()),
        "`sag.scale` and other guidance scales must leave the images finite, but these overflowed. Lower the "
        "scales, or set `trainer.precision` to 32-true.",
    )


def encode_pngs(images: ImageUint8) -> list[bytes]:
    """Encode images as PNG files: (B, C, H, W), gray or RGB."""
    return [encode_png(image) for image in to_rgb(images).permute(0, 2, 3, 1).cpu().contiguous().numpy()]
