"""Overlap of attention masks with object masks (table 1, figure 5)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sagl.analysis.collect import last_sites, named_interval, record_attention
from sagl.analysis.figures import figure, show_image
from sagl.analysis.masks import (
    intersection_over_union,
    random_mask_like,
    read_masks,
    silhouettes,
    threshold_mask,
)
from sagl.analysis.registry import AnalysisRequest
from sagl.guidance.masks import enlarge
from sagl.shapes import ImageUint8, Mask

NUM_SHOWN = 8
"""Samples in the figure."""
MIN_SCORE = 0.5
"""Score from which an object of Mask R-CNN counts, and probability from which a pixel belongs to it."""


def analyze_overlap(request: AnalysisRequest) -> dict[str, Any]:
    """Compare attention masks with object masks, beside random masks of equal area (table 1, figure 5).

    Attention is averaged over heads and steps, and masks the tokens above 1. Samples without an object are left out.

    Returns:
        The number of samples with an object; by resolution, if there are any, the mean intersection over union of
        attention masks, of random masks, and of their difference with its 95 % interval over samples.
    """
    network, samples = request.pipeline.network.settings, request.samples
    sites, ids = last_sites(network), range(samples.first_id, samples.first_id + samples.num_samples)
    find_objects = object_finder(request.object_masks, ids, network.image_size)
    record = record_attention(request, list(sites.values()))
    objects = find_objects(record.images)
    has_object = objects.flatten(1).any(dim=1)
    size, rows, numbers = (record.images.shape[-2], record.images.shape[-1]), {"objects": objects}, {}
    for side, site in sites.items():
        tokens = threshold_mask(record.mean_maps[site])
        attention = enlarge(tokens, size)
        rows[f"{site}, {side}×{side}"] = attention
        if has_object.any():
            masks = [attention, enlarge(random_mask_like(tokens, samples.seed), size)]
            own, chance = (intersection_over_union(mask, objects)[has_object] for mask in masks)
            numbers[f"{side}x{side}"] = {
                "site": site,
                "attention": round(float(own.mean()), 4),
                "random": round(float(chance.mean()), 4),
                "difference": named_interval(own - chance, lambda values: float(values.mean())),
            }
    _draw(request.figure, record.images, rows)
    return {"object_masks": request.object_masks, "num_with_object": int(has_object.sum()), "iou": numbers}


def object_finder(source: str, ids: Sequence[int], size: int) -> Callable[[ImageUint8], Mask]:
    """Return the function that computes the object masks of samples: (N, C, H, W) -> (N, 1, H, W).

    Args:
        source: silhouette, for objects on a background of one color; mask_rcnn, torchvision's network, whose weights
            are downloaded; or a folder with a mask ID.png of every sample, which is read here.
        ids: ids of the samples.
        size: their side in pixels.

    Raises:
        UserError: a mask of the folder is missing, damaged, or has another size.
    """
    if source == "silhouette":
        return silhouettes
    if source == "mask_rcnn":
        return mask_rcnn
    masks = read_masks(Path(source), ids, size)
    return lambda images: masks


@torch.inference_mode()
def mask_rcnn(images: ImageUint8) -> Mask:
    """Return the union of the objects that torchvision's Mask R-CNN (ResNet-50, COCO) finds: -> (N, 1, H, W)."""
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights, maskrcnn_resnet50_fpn

    network = maskrcnn_resnet50_fpn(weights=MaskRCNN_ResNet50_FPN_Weights.DEFAULT).eval()
    masks = []
    for image in images:
        (found,) = network([image.expand(3, -1, -1).float() / 255])
        objects = found["masks"][found["scores"] >= MIN_SCORE]
        masks.append((objects > MIN_SCORE).any(dim=0))
    return torch.stack(masks)


def _draw(path: Path, images: ImageUint8, rows: dict[str, Mask]) -> None:
    count = min(NUM_SHOWN, len(images))
    with figure(path, len(rows) + 1, count, (1.6, 1.65)) as (_, axes):
        for column in range(count):
            show_image(axes[0, column], images[column])
            for row, mask in enumerate(rows.values(), start=1):
                show_image(axes[row, column], mask[column, 0].byte(), vmin=0, vmax=1, cmap="gray")
        for row, label in enumerate(["samples", *rows]):
            axes[row, 0].set_ylabel(label)
