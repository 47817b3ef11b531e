"""`sagl analyze`: figures and numbers of the paper's analyses, for any network."""

import shlex

from sagl.analysis.registry import ANALYSES, AnalysisRequest, run_analysis
from sagl.configuration.parser import Parser
from sagl.configuration.sample import network_parser, parse_sample_config
from sagl.errors import require
from sagl.models.zoo import BUNDLED_CLASSIFIERS
from sagl.sampling.run import SamplingRun
from sagl.settings.guidance import ClassifierGuidance, SelfAttentionGuidance
from sagl.utils.distributed import select_device
from sagl.utils.environment import set_threads
from sagl.utils.files import require_writable, sha256
from sagl.utils.progress import ProgressReporter
from sagl.utils.run_lock import lock_file


def analyze_parser() -> Parser:
    """Build the parser of `sagl analyze`."""
    lines = "\n".join(f"  {name:<12} {analysis.description}" for name, analysis in ANALYSES.items())
    p = network_parser(
        "analyze", "Make a figure of one of the paper's analyses, and its numbers.", f"analyses:\n{lines}"
    )
    p.add_argument("analysis", type=str, nargs="?", help="Name of the analysis, see below. (required)")
    p.add_argument("--output", type=str, default="analysis", help="Folder for ANALYSIS.png and ANALYSIS.json.")
    objects = "Object masks of overlap: silhouette, mask_rcnn, or a folder of ID.png."
    p.add_argument("--object_masks", type=str, default="silhouette", help=objects)
    return p


def main(arguments: list[str]) -> None:
    """Run `sagl analyze ANALYSIS [--output DIR] [options of sagl sample]`.

    Raises:
        UserError: the request cannot be met; nothing has been written.
    """
    parser = analyze_parser()
    flags, config = parser.parse(arguments), parse_sample_config(arguments, parser)
    require(flags.analysis in ANALYSES, f"`analysis` must be one of {', '.join(ANALYSES)}, got {flags.analysis}.")
    require(config.devices.devices in ("auto", "1"), f"`trainer.devices` must be 1, got {config.devices.devices}.")
    set_threads()
    require_writable(config.output)
    figure = config.output / f"{flags.analysis}.png"
    run, sag, classifier = SamplingRun.without_folder(config), config.guidances["sag"], config.guidances["classifier"]
    assert isinstance(sag, SelfAttentionGuidance)
    assert isinstance(classifier, ClassifierGuidance)
    sag.check_network(run.network)
    with (
        lock_file(figure),
        ProgressReporter(flags.analysis, config.samples.num_samples, config.progress) as progress,
    ):
        request = AnalysisRequest(
            pipeline=run.build_pipeline(select_device(config.devices)),
            samples=run.config.samples,
            sag=sag,
            figure=figure,
            progress=progress,
            object_masks=flags.object_masks,
            classifier=classifier.checkpoint or BUNDLED_CLASSIFIERS.get(config.source.model or ""),
        )
        command = shlex.join(["sagl", "analyze", *arguments])
        settings = {"command": command, **run.config.image_settings, "weights_sha256": sha256(run.checkpoint)}
        numbers = run_analysis(flags.analysis, request, settings)
    print(f"{figure}, {numbers}: {config.samples.num_samples} samples.")
