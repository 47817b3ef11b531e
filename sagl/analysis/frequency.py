"""Spatial frequency of masked and unmasked patches (figure 4)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sagl.analysis.collect import last_sites, named_interval, record_attention
from sagl.analysis.figures import figure
from sagl.analysis.masks import threshold_mask
from sagl.analysis.registry import AnalysisRequest
from sagl.errors import require
from sagl.shapes import Image, Mask
from sagl.utils.images import to_float


def patch_magnitudes(images: Image, tokens: int) -> Tensor:
    """Return the magnitude of the Fourier transform of every patch of the images' mean over channels.

    Args:
        images: (N, C, H, H) in [-1, 1].
        tokens: patches along each side; it divides H.

    Returns:
        (N, tokens, tokens, P, P) with P = H / tokens, the zero frequency at index P // 2.
    """
    size = images.shape[-1] // tokens
    patches = images.mean(dim=1).unfold(1, size, size).unfold(2, size, size)
    return torch.fft.fftshift(torch.fft.fft2(patches, norm="ortho").abs(), dim=(-2, -1))


def mean_magnitudes(magnitudes: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """Return the mean magnitude of the masked and of the unmasked patches of each image: -> 2 x (N, P, P).

    An image without patches of a kind has nan.
    """
    weights = mask[:, 0, :, :, None, None].to(magnitudes)
    masked = (magnitudes * weights).sum(dim=(1, 2)) / weights.sum(dim=(1, 2))
    unmasked = (magnitudes * (1 - weights)).sum(dim=(1, 2)) / (1 - weights).sum(dim=(1, 2))
    return masked, unmasked


def radial_profile(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """Average magnitudes over the directions of the frequency: (N, P, P) -> (K,) cycles per pixel, (N, K).

    Frequencies are rounded to multiples of 1 / P; the zero frequency, which is the patch's mean, is left out.
    """
    size = magnitudes.shape[-1]
    frequency = torch.fft.fftshift(torch.fft.fftfreq(size, dtype=torch.float64))
    ring = (frequency[:, None] ** 2 + frequency[None] ** 2).sqrt().mul(size).round().long()
    rings = [k for k in range(1, int(ring.max()) + 1) if bool((ring == k).any())]
    profile = torch.stack([magnitudes[:, ring == k].mean(dim=1) for k in rings], dim=1)
    return torch.tensor(rings, dtype=torch.float64) / size, profile


def analyze_frequency(request: AnalysisRequest) -> dict[str, Any]:
    """Draw the spectra of masked and unmasked patches at the last layer of every resolution (figure 4).

    The masks are those of attention averaged over heads and steps, above 1. The surface is the percentage by which the
    magnitude of masked patches exceeds that of unmasked ones, for the largest patches.

    Returns:
        For every resolution the frequencies, both spectra, and the ratio of the means over all frequencies but zero
        with its 95 % interval by bootstrap over images.
    """
    network = request.pipeline.network.settings
    sites = {side: site for side, site in last_sites(network).items() if side < network.image_size}
    require(
        bool(sites), f"`analysis` frequency needs attention below {network.image_size}x{network.image_size}, got none."
    )
    record = record_attention(request, list(sites.values()))
    images = to_float(record.images)
    numbers: dict[str, Any] = {}
    difference = None
    with figure(request.figure, 1, len(sites) + 1, (4.4, 4)) as (fig, axes):
        for ax, (side, site) in zip(axes[0], sites.items(), strict=False):
            masked, unmasked = mean_magnitudes(patch_magnitudes(images, side), threshold_mask(record.mean_maps[site]))
            complete = ~(masked.isnan() | unmasked.isnan()).any(dim=(1, 2))
            require(bool(complete.any()), f"`analysis` frequency needs samples with a mask, and at {site} it is empty.")
            masked, unmasked = masked[complete], unmasked[complete]
            size = images.shape[-1] // side
            ax.set(title=f"{site}: patches of {size}×{size}", xlabel="frequency (cycles per pixel)", xlim=(0, 0.8))
            numbers[site] = {"patch_size": size, "num_images": len(masked), **_draw_profiles(ax, masked, unmasked)}
            if difference is None:
                difference = 100 * (masked.mean(dim=0) / unmasked.mean(dim=0) - 1)
        axes[0, 0].set_ylabel("mean magnitude")
        axes[0, 0].legend(frameon=False)
        assert difference is not None
        _draw_surface(fig, axes[0, -1], difference)
    return numbers


def _draw_profiles(ax: Any, masked: Tensor, unmasked: Tensor) -> dict[str, Any]:  # noqa: ANN401 (matplotlib's axes)
    """Draw the mean spectra of masked and unmasked patches, 2 x (N, P, P); return them and the ratio of their means."""
    frequencies, masked_profile = radial_profile(masked)
    unmasked_profile = radial_profile(unmasked)[1]
    for label, profile in (("masked", masked_profile), ("unmasked", unmasked_profile)):
        ax.plot(frequencies.numpy(), profile.mean(dim=0).numpy(), marker="o", label=label)
    ax.set_ylim(0, 1.1 * ax.dataLim.y1)
    means = torch.stack([masked_profile.mean(dim=1), unmasked_profile.mean(dim=1)], dim=1)
    return {
        "cycles_per_pixel": frequencies.tolist(),
        "masked": masked_profile.mean(dim=0).tolist(),
        "unmasked": unmasked_profile.mean(dim=0).tolist(),
        "ratio": named_interval(means, _ratio_of_means),
    }


def _ratio_of_means(pairs: Tensor) -> float:
    masked, unmasked = pairs.mean(dim=0).tolist()
    return float(masked / unmasked)


def _draw_surface(fig: Any, axes: Any, difference: Tensor) -> None:  # noqa: ANN401 (matplotlib's objects)
    """Replace the axes by a surface over horizontal and vertical frequency: (P, P) in percent."""
    position = axes.get_subplotspec()
    axes.remove()
    surface = fig.add_subplot(position, projection="3d")
    size = len(difference)
    ticks = [-0.5, 0, 0.5]
    frequency = torch.fft.fftshift(torch.fft.fftfreq(size)).numpy()
    surface.plot_surface(*np.meshgrid(frequency, frequency), difference.numpy(), cmap="viridis")
    surface.set(title="masked over unmasked (%)\nby cycles per pixel", xticks=ticks, yticks=ticks)
    surface.set_xlabel("horizontal", labelpad=8)
    surface.set_ylabel("vertical", labelpad=8)
