"""Metrics of every sampler at few steps, unguided and with the guidance of the flags, over the same ids.

    python benchmarks/solvers.py --num_samples 500 --labels balanced --sag.scale 0.3 --output solvers

Takes the flags of `sagl sample`, for any network, and --reference. Differences are from unguided DDIM of the first
respacing, with paired intervals. Features of all images are kept in the output folder: an interrupted study continues.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sagl.configuration.parser import Parser
from sagl.configuration.sample import network_parser, parse_sample_config
from sagl.data.webdataset_files import local_path
from sagl.evaluation.evaluate import default_extractor
from sagl.evaluation.report import Report, Section, Table, print_report
from sagl.evaluation.study import Measurement, Setting, prepare_run
from sagl.evaluation.tuning import Tuning
from sagl.evaluation.tuning_report import COLUMNS, measurement_row
from sagl.settings.sampling import SAMPLERS
from sagl.settings.tuning import TuningSettings
from sagl.utils.distributed import launch
from sagl.utils.environment import disable_malloc_trim

SOLVERS = [name for name in SAMPLERS if name != "ddpm"]


def solvers_parser() -> Parser:
    p = network_parser("solvers", __doc__ or "")
    p.prog = "solvers.py"
    p.add_argument("--samplers", type=str, nargs="+", default=SOLVERS, help="Samplers to compare.")
    p.add_argument("--respacings", type=str, nargs="+", default=["10", "logsnr10", "20", "logsnr20"])
    p.add_argument("--reference", type=str, default="emoji_test", help="Images or a statistics file.")
    p.add_argument("--extractor", type=str, default=None, help="Feature extractor, as for sagl evaluate.")
    p.add_argument("--bootstrap", type=int, default=200, help="Resamples of the paired intervals; 0: none.")
    p.add_argument("--dry_run", action="store_true", help="Print the number of network evaluations.")
    p.add_argument("--output", type=str, default="solvers", help="Folder of the features.")
    return p


def main(arguments: list[str]) -> None:
    """Sample what is missing, and print a table for each respacing."""
    disable_malloc_trim()
    parser = solvers_parser()
    flags, config = parser.parse(arguments), parse_sample_config(arguments, parser)
    run, samples = prepare_run(config), config.samples
    ids = range(samples.first_id, samples.first_id + samples.num_samples)
    guidances = [{}, config.guidances] if any(g.scale for g in config.guidances.values()) else [{}]
    settings = {
        respacing: [
            Setting(sampler=replace(config.sampler, sampler=sampler, respacing=respacing, eta=0.0), guidances=guidance)
            for guidance in guidances
            for sampler in flags.samplers
        ]
        for respacing in flags.respacings
    }
    tuning = Tuning(
        run=run,
        space={},
        candidates=[setting for group in settings.values() for setting in group],
        settings=TuningSettings(bootstrap=flags.bootstrap),
        reference=flags.reference,
        extractor=flags.extractor or default_extractor(Path(local_path(flags.reference, "reference"))),
    )
    with launch(config.devices) as ranks:
        study, comparison = tuning.open(ranks)
        missing = study.missing(tuning.candidates, ids)
        nfe = sum(study.pipeline_for(setting).nfe * len(batch) for setting, batch in missing)
        print(f"{len(tuning.candidates)} settings, {nfe:,.0f} network evaluations to do.", flush=True)
        if config.dry_run:
            return
        for group in settings.values():
            study.sample(group, ids, "solvers", config.progress)
    if comparison is not None:
        measured = {
            name: [comparison.measure(study.features(s, ids)) for s in group] for name, group in settings.items()
        }
        print_report(build_report(measured))


def build_report(measured: Mapping[str, Sequence[Measurement]]) -> Report:
    """Return a section for each respacing; differences are from the first measurement of all."""
    baseline, sections = next(iter(measured.values()))[0], []
    for respacing, group in measured.items():
        names = [f"{m.setting.sampler.sampler}, {'guided' if m.setting.guidances else 'unguided'}" for m in group]
        rows = (measurement_row(name, m, baseline) for name, m in zip(names, group, strict=True))
        sections.append(Section(title=f"--respacing {respacing}", rows=tuple(rows)))
    title = f"Samplers, {baseline.num_samples:,} images"
    table = Table(title=title, columns=COLUMNS, sections=tuple(sections), right_aligned=True)
    return Report(title=title, notes=(), tables=(table,))


if __name__ == "__main__":
    main(sys.argv[1:])
