"""Descriptions of the numbers of `sagl.analysis` for readers of a report, with their units."""

from collections.abc import Mapping

PIXELS = "mean absolute difference from unguided pixels (grey levels of 255)"
LABELS: Mapping[str, Mapping[str, str]] = {
    "attention": {"fraction_above_mean": "fraction of tokens that receive more than the mean,"},
    "heads": {
        "mass": "fraction of the attention's sum that a mask keeps",
        "area": "area of the masks (fraction of tokens),",
    },
    "frequency": {
        "patch_size": "side of a patch (pixels)",
        "num_images": "images",
        "ratio": "magnitude of masked over unmasked patches",
    },
    "overlap": {
        "object_masks": "method of the object masks",
        "num_with_object": "images with an object",
        "iou": "intersection over union,",
        "site": "block",
        "attention": "attention masks",
        "random": "random masks",
        "difference": "attention minus random",
    },
    "step": {
        "step": "step (0 is the last)",
        "masked_fraction": "masked fraction of the pixels",
        "relative_difference": "norm of ε − ε′ over that of ε",
    },
    "late": {"scale": "SAG scale", "mean_absolute_difference": PIXELS},
    "blur": {
        "blur": "blur guidance, scale",
        "SAG": "SAG, scale",
        "saturated_fraction_minus_unguided": "saturated pixels (fraction), minus unguided",
        "mean_absolute_difference": PIXELS,
    },
    "cost": {
        "evaluations": "network evaluations per image",
        "seconds_per_image": "seconds per image",
        "ratio": "time, unguided = 1",
        "gigabytes": "peak memory (GB)",
    },
}
"""By analysis: descriptions of the keys of its numbers, or of their first words."""


def label(analysis: str | None, name: str) -> str:
    """Describe a number, or a group of them, of an analysis: ("overlap", "iou 8x8") -> intersection over union, 8x8."""
    labels = LABELS.get(analysis or "", {})
    first, _, rest = name.partition(" ")
    return labels.get(name) or f"{labels.get(first, first)} {rest}".strip(" ,").replace("_", " ")
