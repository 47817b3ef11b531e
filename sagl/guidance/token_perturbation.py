"""Token perturbation guidance: Rajabi et al. 2025, arXiv 2506.10036."""

from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sagl.diffusion.noise import SampleRngs, guidance_rngs
from sagl.diffusion.predictor import Condition
from sagl.guidance.base import Guidance, GuidanceContext, edit_attention, guide_by_condition
from sagl.settings.guidance import TokenPerturbationGuidance
from sagl.shapes import Heads, Image
from sagl.utils.prefetch import to_device


def build_tpg(settings: TokenPerturbationGuidance, context: GuidanceContext) -> Guidance:
    """Guide away from the prediction with the tokens of some sites shuffled: eps + s (eps - eps').

    In eps', the attention of a site takes P X for its tokens X, (L, C), with a random permutation matrix P of each
    sample, step and site. The skip connection around it is not shuffled. A guided step costs one more evaluation.
    """
    num_tokens = {site: context.network_settings.sites[site] ** 2 for site in settings.sites}

    def edited(x_t: Image, step: int, condition: Condition) -> Condition:
        rngs = guidance_rngs(condition.samples, settings.group, step)
        for site, count in num_tokens.items():
            permutations = to_device(draw_permutations(rngs, count), x_t.device)
            condition = edit_attention(condition, [site], partial(attend_to_shuffled, permutations))
        return condition

    return guide_by_condition(settings.scale, edited)


def draw_permutations(rngs: SampleRngs, count: int) -> Tensor:
    """Draw a permutation of `count` tokens for each sample: -> (B, L) int64."""
    return torch.from_numpy(np.stack([rng.permutation(count) for rng in rngs]))


def attend_to_shuffled(permutations: Tensor, query: Heads, key: Heads, value: Heads, _size: tuple[int, int]) -> Heads:
    """Return the heads of shuffled tokens, which are the shuffled heads: self-attention of P X is P times that of X."""
    heads = F.scaled_dot_product_attention(query, key, value)
    return heads.gather(-2, permutations[:, None, :, None].expand_as(heads))
