"""Blur-aware training (Hong et al., appendix D): training images degraded as guidance degrades its estimates."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sagl.diffusion.noise import SampleRngs
from sagl.diffusion.predictor import EpsNetwork
from sagl.diffusion.process import add_noise
from sagl.guidance.sag import attention_mask, blend, gaussian_blur
from sagl.settings.guidance import effective_kernel_size
from sagl.settings.training import BlurAwareSettings
from sagl.shapes import AlphaBar, AttentionSite, Image, Labels, Mask, Timestep

BLOCKS = 16
"""A random mask is drawn on so many blocks a side, as if they were tokens."""


def training_mask(
    settings: BlurAwareSettings,
    network: EpsNetwork,
    x_t: Image,
    timesteps: Timestep,
    labels: Labels | None,
    rngs: SampleRngs,
) -> Mask:
    """What is to be blurred: (B, C, H, W), noised but not degraded -> (B, 1, H, W) bool. No gradient is kept."""
    batch, size = len(x_t), (x_t.shape[-2], x_t.shape[-1])
    if settings.mask == "attention":
        site = AttentionSite(settings.site)
        with torch.no_grad():
            received = network(x_t, timesteps, labels, attention_sites=(site,)).attention[site]
        return attention_mask(received, settings.threshold, size)
    if settings.mask == "random":
        drawn = np.stack([rng.random((1, BLOCKS, BLOCKS)) for rng in rngs])
        blocks = torch.from_numpy(drawn) < settings.area_fraction
        return F.interpolate(blocks.float(), size=size, mode="nearest").bool().to(x_t.device)
    if settings.mask == "square":
        return _squares(settings.area_fraction, size, rngs).to(x_t.device)
    return torch.ones(batch, 1, *size, dtype=torch.bool, device=x_t.device)


def _squares(share: float, size: tuple[int, int], rngs: SampleRngs) -> Mask:
    """A rectangle of the image's proportions, `share` of its area, anywhere inside."""
    inside = torch.ones(len(rngs), 1, *size, dtype=torch.bool)
    for axis, length in zip((2, 3), size, strict=True):
        side = round(length * share**0.5)
        first = torch.tensor([[int(rng.integers(length - side + 1))] for rng in rngs])
        at = torch.arange(length)
        line = (at >= first) & (at < first + side)
        inside &= line[:, None, :, None] if axis == 2 else line[:, None, None, :]
    return inside


def blurred(x_0: Image, settings: BlurAwareSettings, rngs: SampleRngs) -> Image:
    """Each image blurred by a sigma of its own: (B, C, H, W) -> the same."""
    least, largest = settings.blur_sigma
    kernel = effective_kernel_size(None, min(x_0.shape[-2:]))
    if least == largest:
        return gaussian_blur(x_0, kernel, least)
    sigmas = [rng.uniform(least, largest) for rng in rngs]
    return torch.cat([gaussian_blur(x, kernel, sigma) for x, sigma in zip(x_0.split(1), sigmas, strict=True)])


def degraded_batch(
    settings: BlurAwareSettings,
    network: EpsNetwork,
    x_0: Image,
    noise: Image,
    alpha_bar: AlphaBar,
    timesteps: Timestep,
    labels: Labels | None,
    chosen: Tensor,
    rngs: SampleRngs,
) -> tuple[Image, Image]:
    """A batch of which the `chosen` samples, (B,) bool, are degraded; only they pay for a mask.

    Returns:
        What is noised in the place of x_0, (B, C, H, W), and the eps that L_simple asks for: with target clean it
        leads back to x_0, by √(alpha_bar / (1 - alpha_bar)) times the difference, a factor of at most 10, so that
        the cleanest timesteps do not drown all.
    """
    rows, content = chosen.nonzero()[:, 0], x_0.clone()
    if len(rows):
        x_t, few = add_noise(x_0, noise, alpha_bar)[rows], None if labels is None else labels[rows]
        own = [rngs[row] for row in rows.tolist()]
        mask = training_mask(settings, network, x_t, timesteps[rows], few, own)
        content[rows] = blend(x_0[rows], blurred(x_0[rows], settings, own), mask)
    if settings.target == "noise":
        return content, noise
    ratio = (alpha_bar / (1 - alpha_bar)).sqrt().clamp(max=10).to(x_0)
    return content, noise + ratio * (content - x_0)
