"""The analyses of the paper: what each computes with, and the table of all."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from sagl.errors import require
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.sampling import RunSettings
from sagl.utils.files import write_text

if TYPE_CHECKING:
    from sagl.sampling.pipeline import SamplingPipeline
    from sagl.utils.progress import ProgressReporter


@dataclass(frozen=True, kw_only=True)
class AnalysisRequest:
    """Inputs of an analysis: network, samples and settings, and the file of its figure."""

    pipeline: "SamplingPipeline"
    """Network, sampler and steps; analyses that compare guidance methods set their own guidance."""
    samples: RunSettings
    """Number, ids, seed, labels and batch size of the samples."""
    sag: SelfAttentionGuidance
    """Settings of self-attention guidance, for analyses that use it."""
    figure: Path
    """PNG file of the figure."""
    progress: "ProgressReporter"
    object_masks: str = "silhouette"
    """Object masks of the analysis overlap; see `sagl.analysis.overlap.object_finder`."""
    classifier: str | None = None
    """Classifier of the analysis cost, by name or file."""


@dataclass(frozen=True)
class Analysis:
    """One analysis: its function, and what it shows."""

    function: str
    """Import string of a function (request) -> numbers, which also writes the figure."""
    description: str
    """One line, with the figures and tables of the paper that it makes."""

    @property
    def run(self) -> Callable[[AnalysisRequest], dict[str, Any]]:
        """The imported function."""
        function: Callable[[AnalysisRequest], dict[str, Any]] = resolve_name(self.function)
        return function


ANALYSES = {
    "attention": Analysis(
        "sagl.analysis.attention_maps:analyze_attention", "attention maps of all layers over time (figure 8)"
    ),
    "heads": Analysis("sagl.analysis.attention_maps:analyze_heads", "masks by layer and head (figures 3, 9, 10)"),
    "frequency": Analysis(
        "sagl.analysis.frequency:analyze_frequency", "spectra of masked and unmasked patches (figure 4)"
    ),
    "overlap": Analysis(
        "sagl.analysis.overlap:analyze_overlap", "overlap of attention masks and object masks (table 1, figure 5)"
    ),
    "step": Analysis("sagl.analysis.guided_images:analyze_step", "one step of self-attention guidance (figure 2)"),
    "late": Analysis("sagl.analysis.guided_images:analyze_late", "guidance in the last third of the steps (figure 1)"),
    "blur": Analysis("sagl.analysis.guided_images:analyze_blur", "blur guidance and SAG at large scales (figure 6)"),
    "cost": Analysis("sagl.analysis.cost:analyze_cost", "time and memory of guidance (table 10)"),
}
"""Analyses by name."""


def run_analysis(name: str, request: AnalysisRequest, settings: Mapping[str, Any]) -> Path:
    """Run an analysis, and write its figure and its numbers.

    Args:
        name: a key of `ANALYSES`.
        request: what it computes with.
        settings: settings to record beside the numbers.

    Returns:
        The JSON file, beside the figure.

    Raises:
        UserError: the network or the machine lacks something that it needs.
    """
    check_object_masks(request.object_masks)
    numbers = ANALYSES[name].run(request)
    path = request.figure.with_suffix(".json")
    write_text(path, json.dumps({"analysis": name, "settings": settings, "numbers": numbers}, indent=1))
    return path


def check_object_masks(source: str) -> None:
    """Refuse a source of object masks that does not exist, before anything is sampled.

    Raises:
        UserError: it is neither the name of a method nor a folder.
    """
    require(
        source in ("silhouette", "mask_rcnn") or Path(source).is_dir(),
        f"`object_masks` must be silhouette, mask_rcnn or a folder of ID.png, got {source}.",
    )
