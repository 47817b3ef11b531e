"""Blur-aware training (Hong et al., appendix D): degrade training images as guidance degrades x0_hat."""

import torch
from torch import Tensor

from sagl.diffusion.noise import SampleRngs
from sagl.diffusion.predictor import EpsNetwork
from sagl.diffusion.process import add_noise
from sagl.guidance.masks import enlarge, mask_from_attention, random_rectangles, uniform_scores
from sagl.guidance.sag import blend, gaussian_blur
from sagl.settings.guidance import effective_kernel_size
from sagl.settings.training import BlurAwareSettings
from sagl.shapes import AlphaBar, AttentionSite, Image, Labels, Mask, Timestep

MASK_GRID = 16
"""Side of the grid of blocks, comparable to tokens, on which a random mask is drawn."""


def degrade_batch(
    settings: BlurAwareSettings,
    network: EpsNetwork,
    x_0: Image,
    noise: Image,
    alpha_bar: AlphaBar,
    timesteps: Timestep,
    labels: Labels | None,
    degrade_mask: Tensor,
    rngs: SampleRngs,
) -> tuple[Image, Image]:
    """Degrade the samples of a batch that `degrade_mask`, (B,) bool, marks; only these need attention masks.

    Returns:
        The images to add noise to, (B, C, H, W), and the eps that L_simple compares with. With target clean, that eps
        leads from the degraded x_t to x_0: the difference of the images times √(alpha_bar / (1 - alpha_bar)), a factor
        of at most 10, so that the cleanest timesteps do not dominate the loss.
    """
    idx, x0_input = degrade_mask.nonzero()[:, 0], x_0.clone()
    if len(idx):
        x_t = add_noise(x_0, noise, alpha_bar)[idx]
        sub_labels, sub_rngs = None if labels is None else labels[idx], [rngs[i] for i in idx.tolist()]
        mask = degradation_mask(settings, network, x_t, timesteps[idx], sub_labels, sub_rngs)
        x0_input[idx] = blend(x_0[idx], blur_each(x_0[idx], settings, sub_rngs), mask)
    if settings.target == "noise":
        return x0_input, noise
    factor = (alpha_bar / (1 - alpha_bar)).sqrt().clamp(max=10).to(x_0)
    return x0_input, noise + factor * (x0_input - x_0)


def degradation_mask(
    settings: BlurAwareSettings,
    network: EpsNetwork,
    x_t: Image,
    timesteps: Timestep,
    labels: Labels | None,
    rngs: SampleRngs,
) -> Mask:
    """Choose the pixels to blur, given x_t before degradation: (B, C, H, W) -> (B, 1, H, W) bool, without gradient."""
    size = (x_t.shape[-2], x_t.shape[-1])
    if settings.mask == "attention":
        site = AttentionSite(settings.site)
        with torch.no_grad():
            attention_received = network(x_t, timesteps, labels, attention_sites=(site,)).attention[site]
        return mask_from_attention(attention_received, settings.threshold, size)
    if settings.mask == "random":
        blocks = uniform_scores(rngs, (MASK_GRID, MASK_GRID)) < settings.area_fraction
        return enlarge(blocks, size).to(x_t.device)
    if settings.mask == "square":
        height, width = (round(length * settings.area_fraction**0.5) for length in size)
        return random_rectangles((height, width), size, rngs).to(x_t.device)
    return torch.ones(len(x_t), 1, *size, dtype=torch.bool, device=x_t.device)


def blur_each(x_0: Image, settings: BlurAwareSettings, rngs: SampleRngs) -> Image:
    """Blur each image with its own standard deviation, uniform in `blur_sigma`: (B, C, H, W) -> the same."""
    smallest, largest = settings.blur_sigma
    kernel_size = effective_kernel_size(None, min(x_0.shape[-2:]))
    if smallest == largest:
        return gaussian_blur(x_0, kernel_size, smallest)
    sigmas = [rng.uniform(smallest, largest) for rng in rngs]
    return torch.cat([gaussian_blur(x, kernel_size, sigma) for x, sigma in zip(x_0.split(1), sigmas, strict=True)])
