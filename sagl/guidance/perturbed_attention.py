"""Perturbed-attention guidance: Ahn et al. 2024, arXiv 2403.17377."""

from sagl.diffusion.predictor import Condition
from sagl.guidance.base import Guidance, GuidanceContext, edit_attention, guide_by_condition
from sagl.settings.guidance import PerturbedAttentionGuidance
from sagl.shapes import Heads, Image


def build_pag(settings: PerturbedAttentionGuidance, _: GuidanceContext) -> Guidance:
    """Guide away from the prediction with the identity as attention map: eps + s (eps - eps').

    In eps', the heads softmax(Q Kᵀ / √d) V of some sites are I V. The scale is the paper's s. A guided step costs one
    more network evaluation.
    """

    def edited(_x_t: Image, _step: int, condition: Condition) -> Condition:
        return edit_attention(condition, settings.sites, attend_to_self)

    return guide_by_condition(settings.scale, edited)


def attend_to_self(_query: Heads, _key: Heads, value: Heads, _size: tuple[int, int]) -> Heads:
    """Return the heads of the identity as attention map."""
    return value
