r"""Guidance methods side by side on one network, each at its best scale, beside plain sampling at equal cost.

    python benchmarks/methods.py --sampler unipc --respacing logsnr10 --labels null --sag.scale 0 --output methods
    python benchmarks/methods.py --model fashion_mnist --labels balanced --methods SAG CFG --sampler unipc \
        --respacing logsnr10 --sag.scale 0 --output fashion

Takes the flags of `sagl sample`. The values of each method in METHODS are compared over --choice_samples ids from 0 on;
the best is reported over --num_samples other ids, from --first_id on, with paired intervals. Features of all images are
kept in the output folder: an interrupted study continues. Writes methods.json, methods.md and methods.png there.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sagl.analysis.figures import figure
from sagl.commands.tune import parse_search
from sagl.configuration.parser import Parser
from sagl.configuration.sample import network_parser, parse_sample_config
from sagl.data.webdataset_files import local_path
from sagl.evaluation.evaluate import default_extractor
from sagl.evaluation.study import Comparison, Measurement, Setting, Study, prepare_run
from sagl.evaluation.tuning import Tuning, make_candidates
from sagl.evaluation.tuning_report import describe_setting
from sagl.metrics.bootstrap import Interval
from sagl.models.zoo import default_reference
from sagl.sampling.run import SampleConfig, SamplingRun
from sagl.settings.tuning import TuningSettings
from sagl.utils.distributed import launch
from sagl.utils.environment import disable_malloc_trim

SCALES = ("0.1", "0.25", "0.5", "1", "2")
EDITS = {"scale": ("0.1", "0.25", "0.5", "1"), "site": ("middle", "last")}
"""Values to try of methods that edit the attention; `last` is the last block with attention."""
UNSHAPED, OFF_UNSHARP = {"sag.shape": ("none",)}, {"sag.shape": ("off_unsharp",)}
"""Shapes of SAG, whatever the network recommends."""
METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "SAG": {"sag.scale": SCALES, **UNSHAPED},
    "SAG, off_unsharp": {"sag.scale": SCALES, **OFF_UNSHARP},
    "SAG, off_unsharp, every second step": {"sag.scale": SCALES, **OFF_UNSHARP, "sag.renew_every": ("2",)},
    "SAG, every second step": {"sag.scale": SCALES, **UNSHAPED, "sag.renew_every": ("2",)},
    "SAG, every fourth step": {"sag.scale": SCALES, **UNSHAPED, "sag.renew_every": ("4",)},
    "SAG, off_unsharp, shallow": {"sag.scale": SCALES, **OFF_UNSHARP, "sag.reuse_before": ("output.3",)},
    "SAG, off_unsharp, shallow, every second step": {
        "sag.scale": SCALES,
        **OFF_UNSHARP,
        "sag.reuse_before": ("output.3",),
        "sag.renew_every": ("2",),
    },
    "SAG, first half": {"sag.scale": SCALES, **UNSHAPED, "sag.interval": ("[0,0.5]",)},
    "SAG, second half": {"sag.scale": SCALES, **UNSHAPED, "sag.interval": ("[0.5,1]",)},
    "blur": {"blur.scale": SCALES, "blur.blur_sigma": ("2",)},
    "PAG": {f"pag.{key}": values for key, values in EDITS.items()},
    "SEG": {f"seg.{key}": values for key, values in EDITS.items()},
    "TPG": {f"tpg.{key}": values for key, values in EDITS.items()},
    "TSG": {"tsg.scale": SCALES},
    "autoguidance": {"autoguidance.scale": SCALES},
    "CFG": {"cfg.scale": SCALES},
    "classifier": {"classifier.scale": SCALES},
    "history, previous step": {"history.scale": SCALES},
    "history, average of x0_hat": {"history.scale": SCALES, "history.average": ("x0_hat",), "history.decay": ("0.6",)},
    "epsilon scaling": {"eps_scaling.scale": ("0.001", "0.0025", "0.005", "0.01")},
}
"""Values to try of each method's settings."""
NEEDS_MORE = {"autoguidance", "CFG", "classifier"}
"""Methods that need another network or labels; compared if --methods names them."""
HEADINGS = [
    "method",
    "settings",
    "evaluations",
    "distance",
    "from unguided",
    "from plain, equal cost",
    "precision",
    "recall",
]


def methods_parser() -> Parser:
    p = network_parser("methods", __doc__ or "")
    p.prog = "methods.py"
    default = [name for name in METHODS if name not in NEEDS_MORE]
    p.add_argument("--methods", type=str, nargs="+", default=default, choices=METHODS, help="Methods to compare.")
    p.add_argument("--choice_samples", type=int, default=100, help="Images of each setting for the choice.")
    p.add_argument("--reference", type=str, default=None, help="Images or a statistics file, as for sagl tune.")
    p.add_argument("--extractor", type=str, default=None, help="Feature extractor, as for sagl evaluate.")
    p.add_argument("--bootstrap", type=int, default=200, help="Resamples of the paired intervals; 0: none.")
    p.add_argument("--output", type=str, default="methods", help="Folder of the features and results.")
    p.set_defaults({"num_samples": 500, "first_id": 10_000})
    return p


def main(arguments: list[str]) -> None:
    """Choose and report method after method, then print the table."""
    disable_malloc_trim()
    parser = methods_parser()
    flags, config = parser.parse(arguments), parse_sample_config(arguments, parser)
    run, reference = prepare_run(config), flags.reference or default_reference(config.source.model)
    tuning = Tuning(
        run=run,
        space={},
        candidates=(),
        settings=TuningSettings(bootstrap=flags.bootstrap),
        reference=reference,
        extractor=flags.extractor or default_extractor(Path(local_path(reference, "reference"))),
    )
    choice_ids = range(flags.choice_samples)
    with launch(config.devices) as ranks:
        study, comparison = tuning.open(ranks)
        results = dict[str, Any]()
        for name in flags.methods:
            space = parse_search([(key, *values) for key, values in search_values(name, run).items()])
            candidates = make_candidates(run, space, sys.maxsize)
            study.sample(candidates, choice_ids, f"{name}, choice", config.progress)
            best = None
            if comparison is not None:
                best = min(candidates, key=lambda c: comparison.distance(study.features(c, choice_ids).pooled))
            best = ranks.broadcast(best)
            row = report(study, comparison, best, config)
            if row is not None:
                results[name] = {"settings": describe_setting(best, space), **row}
                (config.output / "methods.json").write_text(json.dumps(results, indent=1))
    if comparison is not None:
        table = "\n".join(format_table(results))
        (config.output / "methods.md").write_text(table + "\n")
        print(table)
        plot_front(results, tuning.extractor, config.output / "methods.png")


def search_values(name: str, run: SamplingRun) -> dict[str, tuple[str, ...]]:
    """Return the values to try of a method's settings for a network."""
    last = str(list(run.network.sites)[-1])
    return {key: tuple(last if v == "last" else v for v in values) for key, values in METHODS[name].items()}


def report(study: Study, comparison: Comparison | None, best: Setting, config: SampleConfig) -> dict[str, Any] | None:
    """Sample the best setting, unguided and plain sampling on the ids of the report; return them on rank 0."""
    ids = range(config.samples.first_id, config.samples.first_id + config.samples.num_samples)
    study.sample([best.unguided, best], ids, "report", config.progress)
    plain = study.at_equal_cost(best, study.features(best, ids).nfe)
    study.sample([plain], ids, "report", config.progress)
    if comparison is None:
        return None
    names = ("unguided", "guided", "plain")
    rows = {
        name: comparison.measure(study.features(setting, ids))
        for name, setting in zip(names, (best.unguided, best, plain), strict=True)
    }
    return {name: _values(row, rows["unguided"], rows["plain"]) for name, row in rows.items()}


def _values(row: Measurement, unguided: Measurement, plain: Measurement) -> dict[str, Any]:
    values = {"setting": row.setting.values, "nfe": row.nfe, "num_samples": row.num_samples, **row.values}
    return {**values, "from_unguided": row.difference(unguided), "from_plain": row.difference(plain)}


def format_table(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a Markdown table: plain sampling at every cost, then the methods."""
    yield _line(HEADINGS)
    yield "|---" * len(HEADINGS) + "|"
    for row in _plain_rows(results):
        difference = row["from_unguided"]
        difference = _text(difference) if difference and difference[0] else ""
        yield _line(("plain sampling", row["setting"]["respacing"], *_numbers(row), difference, "", *_shares(row)))
    for name, result in results.items():
        row = result["guided"]
        differences = (_text(row[key]) for key in ("from_unguided", "from_plain"))
        yield _line((name, result["settings"], *_numbers(row), *differences, *_shares(row)))


def plot_front(results: Mapping[str, Any], extractor: str, path: Path) -> None:
    """Draw the distance over the cost: a line through plain sampling, and a point per method.

    Methods of equal cost stand side by side, the interval of each one's difference from unguided sampling around it.
    """
    plain = [(row["nfe"], row["fd"]) for row in _plain_rows(results)]
    spacing = (plain[-1][0] - plain[0][0]) / 30
    by_cost = Counter(result["guided"]["nfe"] for result in results.values())
    placed = Counter[float]()
    with figure(path, size=(12, 6)) as (_, axes):
        ax = axes[0, 0]
        ax.plot(*zip(*plain, strict=True), color="black", marker="o", label="plain sampling")
        for number, (name, result) in enumerate(results.items()):
            row, marker = result["guided"], "sD^vP*X"[number // 10]
            cost, (estimate, low, high) = row["nfe"], row["from_unguided"] or (0.0, 0.0, 0.0)
            x = cost + spacing * (placed[cost] - (by_cost[cost] - 1) / 2)
            placed[cost] += 1
            error = [[max(0.0, estimate - low)], [max(0.0, high - estimate)]]
            ax.errorbar(x, row["fd"], yerr=error, fmt=marker, color=f"C{number % 10}", label=name, capsize=3)
        count = next(iter(results.values()))["guided"]["num_samples"]
        ax.set(
            xlabel="network evaluations per image (methods of equal cost side by side)",
            ylabel=f"Fréchet distance ({extractor}), {count:,} images",
            xticks=[cost for cost, _ in plain],
        )
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _plain_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [result[name] for result in results.values() for name in ("unguided", "plain")]
    return [row for _, row in sorted({row["nfe"]: row for row in rows}.items())]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(difference: Interval | Sequence[float] | None) -> str:
    return "{:+.1f} ({:+.1f} … {:+.1f})".format(*difference) if difference else ""


def _numbers(row: Mapping[str, Any]) -> tuple[str, str]:
    return f"{round(row['nfe'], 1):g}", f"{row['fd']:,.1f}"


def _shares(row: Mapping[str, Any]) -> list[str]:
    """Return precision and recall; empty without features of the reference."""
    return [f"{row[name]:.3f}" if name in row else "" for name in ("precision", "recall")]


if __name__ == "__main__":
    main(sys.argv[1:])
