"""Attention maps of all layers over time (figure 8), and masks by head and layer (figures 3, 9, 10)."""

from typing import Any

from torch import Tensor

from sagl.analysis.collect import AttentionRecord, last_sites, record_attention
from sagl.analysis.figures import figure, show_image, tint
from sagl.analysis.masks import mass_mask
from sagl.analysis.registry import AnalysisRequest
from sagl.guidance.masks import enlarge
from sagl.sampling.exports import evenly_spaced_steps

NUM_STEPS_SHOWN = 6
"""Steps of the figure, as in the paper's figure 8."""
MASS = 0.6
"""Share of the attention's sum that a mask keeps, as DINO's visualisation does."""


def analyze_attention(request: AnalysisRequest) -> dict[str, Any]:
    """Draw the attention received in every layer at six steps of the first sample (figure 8).

    Returns:
        For every site and step the fraction of tokens that receive more than the average, over all samples.
    """
    sites = request.pipeline.network.settings.sites
    steps = evenly_spaced_steps(request.pipeline.schedule.num_steps, NUM_STEPS_SHOWN)
    record = record_attention(request, list(sites), steps)
    maps = {site: record.step_maps[site].mean(dim=2) for site in sites}  # over heads: (N, step, H, W)
    with figure(request.figure, len(steps), len(sites) + 1, (1.6, 1.75)) as (fig, axes):
        for row, step in enumerate(record.steps):
            show_image(axes[row, 0], record.step_images[0, row], "estimate of x₀" if row == 0 else "")
            axes[row, 0].set_ylabel(f"step {step}")
            for column, (site, side) in enumerate(sites.items(), start=1):
                title = f"{site}\n{side}×{side}" if row == 0 else ""
                shown = show_image(axes[row, column], maps[site][0, row], title, vmin=0, vmax=3, cmap="viridis")
        fig.colorbar(shown, ax=axes, label="attention received (mean 1)", shrink=0.6)
    fractions = {site: (values > 1).float().mean(dim=(0, 2, 3)).tolist() for site, values in maps.items()}
    names = [f"step {step}" for step in record.steps]
    return {
        "fraction_above_mean": {
            site: {name: round(value, 4) for name, value in zip(names, values, strict=True)}
            for site, values in fractions.items()
        }
    }


def analyze_heads(request: AnalysisRequest) -> dict[str, Any]:
    """Draw the masks of each head of the last layer of every resolution (figures 3, 9, 10).

    Attention is averaged over the steps. The masks keep the tokens that hold 60 % of its sum.

    Returns:
        The mean area of the masks by site: of each head, and of the average over heads.
    """
    sites = last_sites(request.pipeline.network.settings)
    record = record_attention(request, list(sites.values()))
    num_heads = max(record.mean_maps[site].shape[1] for site in sites.values())
    with figure(request.figure, len(sites), num_heads + 2, (2, 2.1)) as (_, axes):
        for row, (side, site) in enumerate(sites.items()):
            _draw_heads(axes[row], record, site, f"{site}, {side}×{side}")
    areas = {}
    for site in sites.values():
        maps = _with_average(record.mean_maps[site], dim=1)
        areas[site] = {name: round(float(mass_mask(v, MASS).float().mean()), 4) for name, v in maps.items()}
    return {"mass": MASS, "area": areas}


def _with_average(heads: Tensor, dim: int) -> dict[str, Tensor]:
    """Return the maps of all heads, and their average, by name."""
    return {f"head {k + 1}": values for k, values in enumerate(heads.unbind(dim))} | {"average": heads.mean(dim)}


def _draw_heads(axes: Any, record: AttentionRecord, site: str, label: str) -> None:  # noqa: ANN401 (matplotlib's axes)
    image, heads = record.images[0], record.mean_maps[site][0]
    show_image(axes[0], image, "sample")
    axes[0].set_ylabel(label)
    columns = _with_average(heads, dim=0)
    for ax, (title, values) in zip(axes[1:], columns.items(), strict=False):
        mask = enlarge(mass_mask(values, MASS)[None, None], (image.shape[-2], image.shape[-1]))[0, 0]
        show_image(ax, tint(image, mask), title)
    for ax in axes[1 + len(columns) :]:
        ax.set_visible(False)
