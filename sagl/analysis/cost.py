"""Time and memory of guidance (table 10)."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from sagl.analysis.figures import figure
from sagl.analysis.guided_images import guided_pipeline, sample_pipeline
from sagl.analysis.registry import AnalysisRequest
from sagl.models.memory import MemoryTracker
from sagl.sampling.pipeline import SamplingPipeline
from sagl.settings.guidance import ClassifierGuidance, GuidanceSettings
from sagl.settings.sampling import id_batches


def analyze_cost(request: AnalysisRequest) -> dict[str, Any]:
    """Measure seconds and memory of sampling without guidance and with each combination of SAG and a classifier.

    The classifier is left out if the request has none, or its samples no class labels. The memory is the peak of one
    batch in a run before the one that is timed: on a GPU that of the allocator, on a CPU that of the tensors.

    Returns:
        By combination: network evaluations per image, seconds per image, ratio to no guidance, gigabytes.

    Raises:
        UserError: a guidance does not fit the network; nothing has been measured.
    """
    numbers: dict[str, dict[str, float]] = {}
    combinations = _combinations(request)
    for guidances in combinations.values():
        guided_pipeline(request, guidances)  # raises if one does not fit; discarded, as it would count as memory
    for name, guidances in combinations.items():
        evaluations, seconds, peak = _measure(request, guidances)
        unguided = numbers.get("unguided", {}).get("seconds_per_image", seconds)
        numbers[name] = {
            "evaluations": evaluations,
            "seconds_per_image": round(seconds, 4),
            "ratio": round(seconds / unguided, 3),
            "gigabytes": round(peak / 1e9, 3),
        }
    with figure(request.figure, 1, 2, (4.5, 3.6)) as (_, axes):
        for ax, key, label in zip(axes[0], ("seconds_per_image", "gigabytes"), ("s per image", "GB"), strict=True):
            ax.barh(list(numbers), [row[key] for row in numbers.values()])
            ax.set_xlabel(label)
            ax.invert_yaxis()
    return numbers


def _measure(request: AnalysisRequest, guidances: Mapping[str, GuidanceSettings]) -> tuple[float, float, int]:
    """Return network evaluations and seconds per image, and the peak memory of one batch in bytes.

    Whole batches are sampled, so the seconds are divided by their images, of which the request may contain fewer.
    """
    pipeline, peak = _build_and_warm_up(request, guidances)
    start = time.perf_counter()
    sample_pipeline(request, pipeline)
    seconds = time.perf_counter() - start
    return pipeline.nfe, seconds / sum(map(len, id_batches(request.samples))), peak


def _build_and_warm_up(
    request: AnalysisRequest, guidances: Mapping[str, GuidanceSettings]
) -> tuple[SamplingPipeline, int]:
    """Build the pipeline and sample one batch, because the first run of a pipeline is slower than later ones.

    Returns:
        The pipeline, and the peak memory of the batch in bytes, the weights included.
    """
    batch = replace(request, samples=replace(request.samples, num_samples=request.samples.effective_batch_size))
    weights = list(request.pipeline.network.parameters())
    if weights[0].is_cuda:
        pipeline = guided_pipeline(request, guidances)
        torch.cuda.reset_peak_memory_stats(weights[0].device)
        sample_pipeline(batch, pipeline)
        return pipeline, torch.cuda.max_memory_allocated(weights[0].device)
    with MemoryTracker() as tracker:  # counts the weights of a classifier while it is loaded
        pipeline = guided_pipeline(request, guidances)
        sample_pipeline(batch, pipeline)
    return pipeline, tracker.peak + sum(weight.nbytes for weight in weights)


def _combinations(request: AnalysisRequest) -> Mapping[str, Mapping[str, GuidanceSettings]]:
    sag = replace(request.sag, scale=request.sag.scale or 1.0)
    combinations: dict[str, dict[str, GuidanceSettings]] = {"unguided": {}, "SAG": {"sag": sag}}
    has_labels = request.samples.labels != "null" and request.pipeline.network.settings.num_classes is not None
    if request.classifier and has_labels:
        classifier = ClassifierGuidance(scale=1.0, checkpoint=request.classifier)
        combinations["classifier"] = {"classifier": classifier}
        combinations["SAG + classifier"] = {"sag": sag, "classifier": classifier}
    return combinations
