"""Sampling of one batch to PNG files."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sagl.errors import require
from sagl.sampling.pipeline import SamplingPipeline, Trajectory, make_labels, run_to_end
from sagl.sampling.run_folder import SAMPLES, Sample, encode_png
from sagl.settings.sampling import RunSettings
from sagl.shapes import Image, ImageUint8
from sagl.utils.images import to_rgb, to_uint8
from sagl.utils.progress import ProgressReporter


def sample_batch(
    pipeline: SamplingPipeline,
    samples: RunSettings,
    ids: Sequence[int],
    progress: ProgressReporter,
    *,
    compare: bool = False,
) -> tuple[list[Sample], float]:
    """Sample the batch that contains `ids`: return the samples of these ids, and the network evaluations of each.

    The batch is computed at full size, whichever ids are needed, so that an image never depends on them.

    Args:
        pipeline: the pipeline.
        samples: seed, labels and batch size.
        ids: consecutive ids of one batch.
        progress: shows the steps.
        compare: whether to add the unguided images and the mask frequencies.

    Raises:
        UserError: an image is not finite.
    """
    size = samples.effective_batch_size
    start = ids[0] % size
    batch_ids = list(range(ids[0] - start, ids[0] - start + size))
    rows: dict[str, ImageUint8] = {}
    with torch.inference_mode():
        labels = make_labels(samples, batch_ids, pipeline.network)

        def sample(pipeline: SamplingPipeline) -> tuple[Image, Tensor | None, float]:
            nfe: list[float] = []
            steps = collect_nfe(pipeline.sample_progressive(samples.seed, batch_ids, labels), nfe)
            images, mask_frequency = run_to_end(progress.track_steps(steps, pipeline.schedule.num_steps))
            check_finite(images)
            return images, mask_frequency, sum(nfe)

        if compare:
            rows["unguided"] = to_uint8(sample(pipeline.unguided)[0])
        images, mask_frequency, nfe = sample(pipeline)
        rows[SAMPLES] = to_uint8(images)
        if compare and mask_frequency is not None:
            rows["masks"] = (mask_frequency * 255).round().to(torch.uint8)
    classes = [-1] * size if labels is None else labels.tolist()
    part = slice(start, start + len(ids))
    pngs = {name: _encode_pngs(row[part]) for name, row in rows.items()}
    result = [
        Sample(id=i, label=label, seed=samples.seed, pngs={name: row[k] for name, row in pngs.items()})
        for k, (i, label) in enumerate(zip(ids, classes[part], strict=True))
    ]
    return result, nfe


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


def _encode_pngs(images: ImageUint8) -> list[bytes]:
    return [encode_png(image) for image in to_rgb(images).permute(0, 2, 3, 1).cpu().contiguous().numpy()]
