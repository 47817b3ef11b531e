"""`sagl tune`: search for guidance settings of a network, and report the best on other ids."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from sagl.commands.sample import print_machine_choices
from sagl.configuration.parser import Parser, field_names, from_namespace
from sagl.configuration.sample import network_parser, parse_sample_config, sample_parser
from sagl.errors import require
from sagl.guidance.registry import GUIDANCES
from sagl.models.zoo import default_reference
from sagl.settings.tuning import TuningSettings
from sagl.utils.distributed import global_rank, launch, refuse_on_all_ranks
from sagl.utils.run_lock import lock_folder

if TYPE_CHECKING:
    from sagl.evaluation.study import Study
    from sagl.evaluation.tuning import Tuning

DEFAULT_NUM_SAMPLES = 100


def tune_parser() -> Parser:
    """Build the parser of `sagl tune`."""
    p = network_parser("tune", "Search for guidance settings of a network by successive halving.")
    search = "A setting and its values, as its flag takes them: --search sag.scale 0.1 0.3. May be given several times."
    p.add_argument("--search", type=str, nargs="+", action="append", default=None, help=search)
    reference = "Images or a statistics file; by default the test images of a bundled network's data."
    p.add_argument("--reference", type=str, default=None, help=reference)
    p.add_argument("--extractor", type=str, default=None, help="Feature extractor, as for sagl evaluate.")
    p.add_argument("--output", type=str, default="tuning", help="Folder of the results and of the features.")
    dry_run = "Print the number of network evaluations, and sample nothing."
    p.add_argument("--dry_run", action="store_true", help=dry_run)
    p.add_settings(TuningSettings)
    p.set_defaults({"num_samples": DEFAULT_NUM_SAMPLES})
    num_samples = "Images of each candidate in the first round; twice as many in every further one."
    p._option_string_actions["--num_samples"].help = num_samples
    return p


def main(arguments: list[str]) -> None:
    """Run `sagl tune [--method M] [--search SETTING VALUE …] [--reference R] [--output DIR] …`.

    Raises:
        UserError: the request cannot be met; features that were computed remain, and the same command continues.
    """
    parser = tune_parser()
    flags, config = parser.parse(arguments), parse_sample_config(arguments, parser)
    settings, tuning = from_namespace(TuningSettings, flags), None
    from sagl.evaluation.tuning import Tuning

    with ExitStack() as stack:
        if global_rank() == 0:
            with refuse_on_all_ranks(config.devices):
                stack.enter_context(lock_folder(config.output))
                reference = flags.reference or default_reference(config.source.model)
                tuning = Tuning.plan(config, settings, parse_search(flags.search or ()), reference, flags.extractor)
        with launch(config.devices) as ranks:
            tuning = ranks.broadcast(tuning)
            study, comparison = tuning.open(ranks)
            if ranks.rank == 0:
                print_budget(tuning, study)
            if config.dry_run:
                return
            if ranks.rank == 0:
                print_machine_choices(config, tuning.run)
            rounds = tuning.search(study, comparison, config.progress)
            result = tuning.report(study, comparison, rounds, config.progress)
        assert result is not None
        from sagl.evaluation.report import print_report
        from sagl.evaluation.tuning_report import CONFIG_FILE, PAGE_FILE, build_report, write_results

        write_results(tuning, result, config.output)
        print_report(build_report(tuning, result))
        print(f"\nPlot: {config.output / PAGE_FILE}. Sample: sagl sample --config {config.output / CONFIG_FILE}")


def parse_search(search: Sequence[Sequence[str]]) -> dict[str, tuple[Any, ...]]:
    """Return the values of each setting of `--search`.

    Raises:
        UserError: a setting belongs to no guidance method, has no values, or an invalid one.
    """
    space, p = dict[str, tuple[Any, ...]](), sample_parser()
    for name, *texts in search:
        group, _, field = name.partition(".")
        known = group in GUIDANCES and field in field_names(GUIDANCES[group].settings_class)
        require(known, f"`search` must name settings of guidance methods, such as sag.scale, got {name!r}.")
        require(bool(texts), f"`search` must have values after {name}, got none.")
        require(name not in space, f"`search` must have every setting once, got {name} twice.")
        flags = [p.parse([f"--{name}", text])[group] for text in texts]
        values = [from_namespace(GUIDANCES[group].settings_class, group_flags, f"{group}.") for group_flags in flags]
        space[name] = tuple(dict.fromkeys(getattr(value, field) for value in values))
    return space


def print_budget(tuning: "Tuning", study: "Study") -> None:
    """Print the candidates and the largest cost of the search."""
    rounds = ", ".join(f"{size} over {len(ids)}" for size, ids in tuning.rounds)
    print(
        f"{len(tuning.candidates)} candidates: {rounds} images; then a report over {len(tuning.report_ids)} others. At "
        f"most {tuning.count_evaluations(study):,.0f} network evaluations. Features in the folder are used again.",
        flush=True,
    )
