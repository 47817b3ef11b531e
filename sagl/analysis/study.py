"""The studies of the paper's analyses: what each is given, and the table of all."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.sampling import RunSettings
from sagl.utils.files import atomic_file

if TYPE_CHECKING:
    from sagl.sampling.pipeline import SamplingPipeline
    from sagl.utils.progress import ProgressReporter


@dataclass(frozen=True, kw_only=True)
class StudyRequest:
    """What a study computes with."""

    pipeline: "SamplingPipeline"
    """Network, sampler and steps; studies that compare guidance methods set their own guidance."""
    samples: RunSettings
    """Number, ids, seed, labels and batch size of the samples."""
    sag: SelfAttentionGuidance
    """Settings of self-attention guidance, for studies that use it."""
    figure: Path
    """PNG file of the figure."""
    progress: "ProgressReporter"
    object_masks: str = "silhouette"
    """Object masks of the study overlap; see `sagl.analysis.overlap.find_objects`."""
    classifier: str | None = None
    """Classifier of the study cost, by name or file."""


@dataclass(frozen=True)
class Study:
    """One study: its function, and what it shows."""

    function: str
    """Import string of a function (request) -> numbers, which also writes the figure."""
    description: str
    """One line, with the figures and tables of the paper that it makes."""

    @property
    def run(self) -> Callable[[StudyRequest], dict[str, Any]]:
        """The imported function."""
        function: Callable[[StudyRequest], dict[str, Any]] = resolve_name(self.function)
        return function


STUDIES = {
    "attention": Study(
        "sagl.analysis.attention_maps:analyze_attention", "attention maps of all layers over time (figure 8)"
    ),
    "heads": Study("sagl.analysis.attention_maps:analyze_heads", "masks by layer and head (figures 3, 9, 10)"),
    "frequency": Study(
        "sagl.analysis.frequency:analyze_frequency", "spectra of masked and unmasked patches (figure 4)"
    ),
    "overlap": Study(
        "sagl.analysis.overlap:analyze_overlap", "overlap of attention masks and object masks (table 1, figure 5)"
    ),
    "step": Study("sagl.analysis.guided_images:analyze_step", "one step of self-attention guidance (figure 2)"),
    "late": Study("sagl.analysis.guided_images:analyze_late", "guidance in the last third of the steps (figure 1)"),
    "blur": Study("sagl.analysis.guided_images:analyze_blur", "blur guidance and SAG at large scales (figure 6)"),
    "cost": Study("sagl.analysis.cost:analyze_cost", "time and memory of guidance (table 10)"),
}
"""Studies by name."""


def run_study(name: str, request: StudyRequest, settings: Mapping[str, Any]) -> Path:
    """Run a study, and write its figure and its numbers.

    Args:
        name: a key of `STUDIES`.
        request: what it computes with.
        settings: settings to record beside the numbers.

    Returns:
        The JSON file, beside the figure.

    Raises:
        UserError: the network or the machine lacks something that the study needs.
    """
    numbers = STUDIES[name].run(request)
    path = request.figure.with_suffix(".json")
    with atomic_file(path) as partial:
        partial.write_text(json.dumps({"study": name, "settings": settings, "numbers": numbers}, indent=1))
    return path
