"""Guidances of a run, from their settings."""

from collections.abc import Mapping

from sagl.errors import require
from sagl.guidance.base import Guidance, GuidanceContext, limit_to_interval
from sagl.guidance.direction_head import use_head
from sagl.guidance.policies import renew_every, reuse_deep_blocks, stop_when_close
from sagl.guidance.registry import GUIDANCES
from sagl.guidance.shaping import shape_guidance
from sagl.settings.guidance import GuidanceSettings


def build_guidances(settings: Mapping[str, GuidanceSettings], context: GuidanceContext) -> dict[str, Guidance]:
    """Build the guidances whose scale is not 0, in the order of the registry.

    Raises:
        UserError: a name that the registry does not have, settings of another method, or a method that lacks something,
            such as a classifier.
    """
    for name in settings:
        require(name in GUIDANCES, f"`guidances` must be among {', '.join(GUIDANCES)}, got {name!r}.")
        own, given = GUIDANCES[name].settings_class, type(settings[name])
        require(given is own, f"`guidances` must have {own.__name__} for {name!r}, got {given.__name__}.")
    return {
        name: add_options(entry.build(settings[name], context), settings[name], context)
        for name, entry in GUIDANCES.items()
        if name in settings and settings[name].scale
    }


def add_options(guidance: Guidance, settings: GuidanceSettings, context: GuidanceContext) -> Guidance:
    """Add what every method has, in the order of a guided step: when, the method's own term, its shape.

    Options at their defaults add nothing.
    """
    schedule = context.schedule
    guidance = limit_to_interval(guidance, settings.interval, schedule.num_steps)
    if settings.direction_head is not None:
        guidance = use_head(guidance, settings, context)
    if settings.reuse_before is not None:
        guidance = reuse_deep_blocks(
            guidance, settings.reuse_before, context.share_of_evaluation(settings.reuse_before)
        )
    if settings.stop_below:
        guidance = stop_when_close(guidance, settings, schedule)
    if settings.shape != "none" or settings.max_norm is not None:
        guidance = shape_guidance(guidance, settings, schedule)
    if settings.renew_every > 1 and settings.direction_head is None:  # use_head has this policy too
        guidance = renew_every(guidance, settings.renew_every, schedule.num_steps)
    return guidance
