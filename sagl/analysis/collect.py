"""Attention and images of unguided samples, from which the analyses of the paper's figures are computed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sagl.analysis.registry import AnalysisRequest
from sagl.diffusion.noise import initial_noise
from sagl.diffusion.process import x0_hat_from_eps
from sagl.metrics.bootstrap import resample, shifted_interval
from sagl.sampling.pipeline import make_labels
from sagl.settings.network import UNetSettings
from sagl.settings.sampling import id_batches
from sagl.shapes import AttentionSite, ImageUint8
from sagl.utils.images import to_uint8

NUM_RESAMPLES = 1000
"""Bootstrap resamples of the samples, for the intervals of analyses."""


def named_interval(values: Tensor, metric: Callable[[Tensor], float]) -> dict[str, float]:
    """Return the metric of all samples with its 95 % interval: (N, D) -> estimate, low, high."""
    resamples = resample(values, metric, num_resamples=NUM_RESAMPLES, seed=0)
    return {name: round(value, 4) for name, value in shifted_interval(metric(values), resamples)._asdict().items()}


@dataclass(frozen=True, kw_only=True)
class AttentionRecord:
    """Unguided samples and the attention of their chains, on the CPU."""

    images: ImageUint8
    """(N, C, H, W), the samples."""
    mean_maps: Mapping[str, Tensor]
    """Attention received at each site, mean over all steps: (N, head, side, side) float32."""
    steps: Sequence[int]
    """Steps whose maps and x0_hat are kept, the noisiest first."""
    step_maps: Mapping[str, Tensor]
    """Attention received at each site at `steps`: (N, step, head, side, side) float32."""
    step_images: ImageUint8
    """Estimates of the clean images at `steps`: (N, step, C, H, W)."""


def last_sites(network: UNetSettings) -> dict[int, str]:
    """Return the last block with attention of each resolution, by the side of its feature map, the smallest first."""
    last: dict[int, str] = {}
    for site, side in network.sites.items():
        last[side] = site
    return dict(sorted(last.items()))


def record_attention(request: AnalysisRequest, sites: Sequence[str], steps: Sequence[int] = ()) -> AttentionRecord:
    """Sample without guidance, and record the attention received at the sites; keep maps and x0_hat at `steps`.

    Raises:
        UserError: a site has no attention.
    """
    samples, steps = request.samples, sorted(steps, reverse=True)
    records = []
    for batch in id_batches(samples):
        records.append(_record_batch(request, batch, sites, steps))
        request.progress.update(len(records) * len(batch))
    first = samples.first_id % samples.effective_batch_size
    part = slice(first, first + samples.num_samples)
    return AttentionRecord(
        images=torch.cat([record.images for record in records])[part],
        mean_maps={site: torch.cat([record.mean_maps[site] for record in records])[part] for site in sites},
        steps=steps,
        step_maps={site: torch.cat([record.step_maps[site] for record in records])[part] for site in sites},
        step_images=torch.cat([record.step_images for record in records])[part],
    )


@torch.inference_mode()
def _record_batch(
    request: AnalysisRequest, batch: Sequence[int], sites: Sequence[str], steps: Sequence[int]
) -> AttentionRecord:
    pipeline, samples = request.pipeline.unguided, request.samples
    num_steps, labels = pipeline.schedule.num_steps, make_labels(samples, batch, pipeline.network)
    chain = pipeline.sample_progressive(samples.seed, batch, labels, [AttentionSite(site) for site in sites])
    x = initial_noise(samples.seed, batch, pipeline.image_shape)
    totals: dict[str, Tensor] = {}
    maps: dict[str, list[Tensor]] = {site: [] for site in sites}
    x0_predictions: list[ImageUint8] = []
    for step, x_next, prediction in request.progress.track_steps(chain, num_steps):
        attention = {site: prediction.attention[AttentionSite(site)].float().cpu() for site in sites}
        totals = {site: totals[site] + attention[site] for site in sites} if totals else attention
        if step in steps:
            x0_hat = x0_hat_from_eps(x.to(x_next), prediction.eps, pipeline.schedule.alpha_bar(step))
            x0_predictions.append(to_uint8(x0_hat).cpu())
            for site in sites:
                maps[site].append(attention[site])
        x = x_next
    nothing = torch.empty(len(batch), 0)
    return AttentionRecord(
        images=to_uint8(x).cpu(),
        mean_maps={site: total / num_steps for site, total in totals.items()},
        steps=steps,
        step_maps={site: torch.stack(kept, dim=1) if kept else nothing for site, kept in maps.items()},
        step_images=torch.stack(x0_predictions, dim=1) if x0_predictions else nothing.byte(),
    )
