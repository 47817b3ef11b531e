"""Pictures of guidance: one step (figure 2), guidance in the last third (figure 1), large scales (figure 6)."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from sagl.analysis.figures import figure, show_image
from sagl.analysis.registry import AnalysisRequest
from sagl.diffusion.noise import SampleKeys, initial_noise
from sagl.diffusion.predictor import Condition, make_predictor
from sagl.diffusion.process import add_noise
from sagl.guidance.masks import average_sites
from sagl.guidance.sag import attention_sites, blend, build_degrade
from sagl.sampling.batch import sample_batch
from sagl.sampling.pipeline import SamplingPipeline, build_pipeline, make_labels
from sagl.settings.guidance import GuidanceSettings
from sagl.settings.sampling import id_batches
from sagl.shapes import ImageUint8
from sagl.utils.images import noise_to_uint8, to_uint8

LARGE_SCALES = (1.0, 2.0, 4.0, 8.0)
"""Scales at which blur guidance and self-attention guidance are compared."""
NUM_SHOWN = 8
"""Samples in a figure."""


def sample_guided(request: AnalysisRequest, guidances: Mapping[str, GuidanceSettings]) -> ImageUint8:
    """Sample the request's images with these guidances: -> (N, C, H, W) on the CPU."""
    return sample_pipeline(request, guided_pipeline(request, guidances))


def guided_pipeline(request: AnalysisRequest, guidances: Mapping[str, GuidanceSettings]) -> SamplingPipeline:
    """Return the request's pipeline with these guidances.

    Do not call it in inference mode: classifier guidance needs gradients.
    """
    base = request.pipeline
    return build_pipeline(base.network, base.diffusion, base.sampler_settings, guidances, checkpoint=base.checkpoint)


def sample_pipeline(request: AnalysisRequest, pipeline: SamplingPipeline) -> ImageUint8:
    """Sample the request's images with a pipeline, in whole batches: -> (N, C, H, W) on the CPU."""
    samples, batches = request.samples, []
    for batch in id_batches(samples):
        images = sample_batch(pipeline, samples, batch, request.progress.track_steps).images
        batches.append(to_uint8(images).cpu())
    first = samples.first_id % samples.effective_batch_size
    return torch.cat(batches)[first : first + samples.num_samples]


def analyze_late(request: AnalysisRequest) -> dict[str, Any]:
    """Draw samples without guidance, and with guidance in the last third of the steps (figure 1).

    Returns:
        The mean absolute difference of the pixels, in grey levels of 255, and those of the settings.
    """
    sag = replace(request.sag, scale=request.sag.scale or 1.0, interval=(2 / 3, 1.0))
    unguided, guided = sample_guided(request, {}), sample_guided(request, {"sag": sag})
    _draw_rows(request, {"unguided": unguided, f"SAG, scale {sag.scale:g}": guided})
    difference = (unguided.float() - guided.float()).abs().mean()
    return {"scale": sag.scale, "interval": list(sag.interval), "mean_absolute_difference": round(float(difference), 3)}


def analyze_blur(request: AnalysisRequest) -> dict[str, Any]:
    """Draw samples of blur guidance and of self-attention guidance at large scales (figure 6).

    Returns:
        By method and scale: the fraction of saturated pixels (0 or 255) beyond that of the unguided samples, and the
        mean absolute difference from them in grey levels of 255.
    """
    unguided = sample_guided(request, {})
    rows, numbers = {"unguided": unguided}, {}
    for scale in LARGE_SCALES:
        sag = replace(request.sag, scale=scale)
        everywhere = replace(sag, mask="global", area_fraction=None, soft=False, direction_head=None)  # eq. 15
        for name, settings in {"blur": everywhere, "SAG": sag}.items():
            images = rows[f"{name}, scale {scale:g}"] = sample_guided(request, {"sag": settings})
            numbers[f"{name} {scale:g}"] = {
                "saturated_fraction_minus_unguided": round(_saturated(images) - _saturated(unguided), 4),
                "mean_absolute_difference": round(float((images.float() - unguided.float()).abs().mean()), 3),
            }
    _draw_rows(request, rows)
    return numbers


def _saturated(images: ImageUint8) -> float:
    return float(((images == 0) | (images == 255)).float().mean())


def _draw_rows(request: AnalysisRequest, rows: Mapping[str, ImageUint8]) -> None:
    count = min(NUM_SHOWN, request.samples.num_samples)
    with figure(request.figure, len(rows), count, (1.6, 1.65)) as (_, axes):
        for row, (label, images) in enumerate(rows.items()):
            axes[row, 0].set_ylabel(label)
            for column in range(count):
                show_image(axes[row, column], images[column])


@torch.inference_mode()
def analyze_step(request: AnalysisRequest) -> dict[str, Any]:
    """Draw the parts of one step of self-attention guidance in the middle of the chain of the first sample (figure 2).

    Returns:
        The step, its timestep, the masked fraction, and the ratio of the norms of eps - eps' and eps.
    """
    pipeline, samples, sag = request.pipeline.unguided, request.samples, request.sag
    network, schedule = pipeline.network, pipeline.schedule
    device = next(network.parameters()).device
    batch, shown = next(id_batches(samples)), schedule.num_steps // 2
    row = samples.first_id % samples.effective_batch_size
    labels = make_labels(samples, batch, network)
    chain = islice(pipeline.sample_progressive(samples.seed, batch, labels), schedule.num_steps - 1 - shown)
    x_t = initial_noise(samples.seed, batch, pipeline.image_shape).to(device)
    for _, x_t, _ in chain:  # noqa: B007 (the last x is the input of the step)
        pass
    sites = attention_sites(sag)
    condition = Condition(
        labels=None if labels is None else labels.to(device),
        attention_sites=sites,
        samples=SampleKeys(samples.seed, batch),
    )
    predict = make_predictor(network, schedule, pipeline.diffusion.variance)
    base = predict(x_t, shown, condition)
    x0_hat, x0_blurred, mask, x_t_degraded = build_degrade(sag, schedule)(x_t, shown, condition, base)
    weak_pred = predict(x_t_degraded, shown, replace(condition, attention_sites=(), degraded=True))
    panels = {
        "xₜ": x_t,
        "estimate of x₀": x0_hat,
        "x̃ₜ": add_noise(x0_blurred, base.eps, schedule.alpha_bar(shown)),
        "masked part blurred": blend(x0_hat, x0_blurred, mask),
        "x̄ₜ": x_t_degraded,
        "ε": base.eps,
        "ε′": weak_pred.eps,
    }
    difference = base.eps[row] - weak_pred.eps[row]
    attention = average_sites([base.attention[site] for site in sites], sag.head)[row, 0] if sites else None
    with figure(request.figure, 2, (len(panels) + 3) // 2, (2.2, 2.4)) as (_, grid):
        axes = grid.ravel()
        axes[0].set_visible(attention is not None)
        if attention is not None:
            show_image(axes[0], attention.float().cpu(), f"attention, {sag.site}", vmin=0, vmax=3, cmap="viridis")
        show_image(axes[1], mask[row, 0].float().cpu(), "mask", vmin=0, vmax=1, cmap="gray")
        for ax, (title, image) in zip(axes[2:], panels.items(), strict=False):
            show_image(ax, noise_to_uint8(image[row]).cpu(), title)
        show_image(axes[-1], difference.abs().mean(dim=0).float().cpu(), "|ε − ε′|", cmap="magma")
    return {
        "step": shown,
        "timestep": int(schedule.timesteps[shown]),
        "masked_fraction": round(float(mask[row].float().mean()), 4),
        "relative_difference": round(float(difference.norm() / base.eps[row].norm()), 5),
    }
