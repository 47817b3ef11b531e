"""Time and memory of guidance (table 10)."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from sagl.analysis.figures import figure
from sagl.analysis.guided_images import sample_guided
from sagl.analysis.registry import AnalysisRequest
from sagl.models.memory import MemoryTracker
from sagl.sampling.pipeline import build_pipeline
from sagl.settings.guidance import ClassifierGuidance, GuidanceSettings


def analyze_cost(request: AnalysisRequest) -> dict[str, Any]:
    """Measure seconds and memory of sampling without guidance and with each combination of SAG and a classifier.

    The classifier is left out if the request has none. The memory is the peak of one batch in a further run:
    on a GPU that of the allocator, on a CPU that of the tensors.

    Returns:
        By combination: network evaluations per image, seconds per image, ratio to no guidance, gigabytes.
    """
    sample_guided(request, {})  # the first run is slower
    numbers: dict[str, dict[str, float]] = {}
    for name, guidances in _combinations(request).items():
        start = time.perf_counter()
        sample_guided(request, guidances)
        seconds = (time.perf_counter() - start) / request.samples.num_samples
        base = request.pipeline
        pipeline = build_pipeline(base.network, base.diffusion, base.sampler_settings, guidances)
        unguided = numbers.get("unguided", {}).get("seconds_per_image", seconds)
        numbers[name] = {
            "evaluations": pipeline.nfe,
            "seconds_per_image": round(seconds, 4),
            "ratio": round(seconds / unguided, 3),
            "gigabytes": round(_peak_bytes(request, guidances) / 1e9, 3),
        }
    with figure(request.figure, 1, 2, (4.5, 3.6)) as (_, axes):
        for ax, key, label in zip(axes[0], ("seconds_per_image", "gigabytes"), ("s per image", "GB"), strict=True):
            ax.barh(list(numbers), [row[key] for row in numbers.values()])
            ax.set_xlabel(label)
            ax.invert_yaxis()
    return numbers


def _peak_bytes(request: AnalysisRequest, guidances: Mapping[str, GuidanceSettings]) -> int:
    """Return the peak of the memory of one batch, the weights included."""
    batch = replace(request, samples=replace(request.samples, num_samples=request.samples.effective_batch_size))
    weights = list(request.pipeline.network.parameters())
    if weights[0].is_cuda:
        torch.cuda.reset_peak_memory_stats(weights[0].device)
        sample_guided(batch, guidances)
        return torch.cuda.max_memory_allocated(weights[0].device)
    with MemoryTracker() as tracker:
        sample_guided(batch, guidances)
    return tracker.peak + sum(weight.nbytes for weight in weights)


def _combinations(request: AnalysisRequest) -> Mapping[str, Mapping[str, GuidanceSettings]]:
    sag = replace(request.sag, scale=request.sag.scale or 1.0)
    combinations: dict[str, dict[str, GuidanceSettings]] = {"unguided": {}, "SAG": {"sag": sag}}
    if request.classifier:
        classifier = ClassifierGuidance(scale=1.0, checkpoint=request.classifier)
        combinations["classifier"] = {"classifier": classifier}
        combinations["SAG + classifier"] = {"sag": sag, "classifier": classifier}
    return combinations
