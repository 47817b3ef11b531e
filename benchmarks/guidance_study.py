r"""Metrics of many guidance settings over the same ids, with paired intervals, for any network and reference.

    python benchmarks/guidance_study.py --search sag.scale 0.1 0.3 --search sag.site middle output.5 \
        --sampler ddim --respacing ddim20 --labels balanced --num_samples 1000 --output study

Takes the flags of `sagl sample`. Every combination of the values of --search is a row, beside unguided sampling with as
many steps and with as many network evaluations. Below the table are the differences from the first setting. --also adds
networks, by flags that are appended to the others: --also "--trainer.precision bf16-true" --also "--checkpoint
other.safetensors". Features of all images are kept in the output folder: an interrupted study continues, and sagl tune
can use them. study.json there holds the table.
"""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from sagl.commands.tune import parse_search
from sagl.configuration.parser import Parser
from sagl.configuration.sample import network_parser, parse_sample_config
from sagl.data.webdataset_files import local_path
from sagl.errors import require
from sagl.evaluation.evaluate import default_extractor
from sagl.evaluation.report import Cell, Report, Row, Section, Table, print_report
from sagl.evaluation.study import Measurement, Setting, prepare_run
from sagl.evaluation.tuning import Tuning, make_candidates
from sagl.evaluation.tuning_report import COLUMNS, describe_setting, measurement_row
from sagl.metrics.bootstrap import Interval
from sagl.models.zoo import default_reference
from sagl.settings.tuning import TuningSettings
from sagl.utils.distributed import launch, num_processes
from sagl.utils.environment import disable_malloc_trim

ALL = 10_000
"""More candidates than any study has."""
JSONObject = dict[str, Any]
OTHER = "plain, equal cost"
"""Column of plain sampling at equal cost; in the unguided row of a further network it is the first network."""


def study_parser() -> Parser:
    p = network_parser("study", __doc__ or "")
    p.prog = "guidance_study.py"
    p.add_argument("--search", type=str, nargs="+", action="append", default=[], help="A setting and its values.")
    p.add_argument("--also", type=str, action="append", default=[], help="Flags of another network.")
    p.add_argument("--reference", type=str, default=None, help="Images or a statistics file, as for sagl tune.")
    p.add_argument("--extractor", type=str, default=None, help="Feature extractor, as for sagl evaluate.")
    p.add_argument("--bootstrap", type=int, default=200, help="Resamples of the paired intervals; 0: none.")
    p.add_argument("--output", type=str, default="study", help="Folder of the features.")
    return p


def main(arguments: list[str]) -> None:
    """Sample what is missing, network by network, and print a table of each."""
    disable_malloc_trim()
    flags, rows = study_parser().parse(arguments), list[JSONObject]()
    config = parse_sample_config(arguments, study_parser())
    require(
        not flags.also or num_processes(config.devices)[1] == 1,
        "`devices` must be 1 with --also, as the processes of a command end with its first network. Give "
        "--trainer.devices 1, or one command for each network.",
    )
    first: Measurement | None = None
    for variant in ["", *flags.also]:
        first = study_network([*arguments, *shlex.split(variant)], variant or "the first network", first, rows)
        Path(flags.output, "study.json").write_text(json.dumps(rows, indent=1))


def study_network(
    arguments: list[str], title: str, first: Measurement | None, results: list[JSONObject]
) -> Measurement:
    """Sample and measure the settings of one network; return the unguided measurement of the first network.

    Args:
        arguments: command line.
        title: name of the network in the table.
        first: unguided measurement of the first network, or None for the first network.
        results: receives the measurements, unguided sampling first.
    """
    parser = study_parser()
    flags, config = parser.parse(arguments), parse_sample_config(arguments, parser)
    run = prepare_run(config)
    space = parse_search(flags.search)
    candidates, samples = make_candidates(run, space, ALL), run.config.samples
    reference = flags.reference or default_reference(config.source.model)
    ids = range(samples.first_id, samples.first_id + samples.num_samples)
    tuning = Tuning(
        run=run,
        space=space,
        candidates=candidates,
        settings=TuningSettings(bootstrap=flags.bootstrap),
        reference=reference,
        extractor=flags.extractor or default_extractor(Path(local_path(reference, "reference"))),
    )
    with launch(config.devices) as ranks:
        study, comparison = tuning.open(ranks)
        unguided = Setting(sampler=config.sampler)
        missing = study.missing([unguided, *candidates], ids)
        nfe = sum(study.pipeline_for(setting).nfe * len(batch) for setting, batch in missing)
        print(
            f"{title}: {len(candidates)} settings, {nfe:,.0f} network evaluations, and at most as many of plain "
            "sampling.",
            flush=True,
        )
        study.sample([unguided, *candidates], ids, title, config.progress)
        plain = [study.at_equal_cost(candidate, study.features(candidate, ids).nfe) for candidate in candidates]
        study.sample(plain, ids, f"{title}, plain sampling", config.progress)
        settings = [unguided, *candidates, *plain]
    assert comparison is not None
    distinct = {str(setting.values): setting for setting in settings}  # several may have the same cost
    measured = {key: comparison.measure(study.features(setting, ids)) for key, setting in distinct.items()}
    baseline, *rows = (measured[str(setting.values)] for setting in settings)
    results += [_json(title, measurement, baseline) for measurement in (baseline, *rows)]
    names = [describe_setting(candidate, space) for candidate in candidates]
    guided, equal_cost = rows[: len(names)], rows[len(names) :]
    table_rows = [_row("unguided", baseline, baseline, first)]
    table_rows += map(_row, names, guided, [baseline] * len(names), equal_cost)
    section = Section(title=f"{len(ids)} images", note=f"ids {ids[0]} … {ids[-1]}", rows=tuple(table_rows))
    table = Table(title=title, columns=(*COLUMNS, OTHER, "from that"), sections=(section,), right_aligned=True)
    print_report(Report(title=title, notes=(), tables=(table,)))
    for name, measurement in zip(names[1:], guided[1:], strict=True):
        if difference := measurement.difference(guided[0]):
            print(f"{name}, minus {names[0]}: {_interval(difference)}.")
    return first or baseline


def _json(title: str, row: Measurement, baseline: Measurement) -> JSONObject:
    values = {"network": title, "setting": row.setting.values, "nfe": row.nfe, "num_samples": row.num_samples}
    return {**values, **row.json_values, "from_unguided": row.difference(baseline)}


def _row(name: str, row: Measurement, baseline: Measurement, other: Measurement | None) -> Row:
    """Return the row of a measurement, with another one and the difference from it in the last columns."""
    result = measurement_row(name, row, baseline)
    texts = ["", ""]
    if other is not None:
        difference = row.difference(other)
        texts = [f"{other.values['fd']:,.2f} ({other.nfe:g})"]
        texts.append(_interval(difference) if difference else "")
    return replace(result, cells=(*result.cells, *(Cell(text=text) for text in texts)))


def _interval(difference: Interval) -> str:
    return "{:+,.2f} ({:+,.2f} … {:+,.2f})".format(*difference)


if __name__ == "__main__":
    main(sys.argv[1:])
