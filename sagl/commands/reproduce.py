"""`sagl reproduce`: tables and figures of the paper, on its networks or translated to another."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from jsonargparse import Namespace

from sagl.analysis.registry import check_object_masks
from sagl.commands import analyze, evaluate, sample
from sagl.configuration.parser import Parser
from sagl.configuration.sample import recommended_settings
from sagl.data.webdataset_files import local_path
from sagl.errors import require
from sagl.evaluation.evaluate import default_extractor
from sagl.evaluation.paper import PaperItem, paper_items
from sagl.evaluation.reference import reference_digest
from sagl.evaluation.reproduction import ReproductionRow, Target, plan_reproduction
from sagl.evaluation.reproduction_report import ANALYSES, RUNS, read_weights_sha256, store_item, write_report
from sagl.evaluation.results import read_results
from sagl.metrics.extractors import extractor_version, get_extractor
from sagl.metrics.inception import VARIABLE
from sagl.models.hub_files import is_hub_name
from sagl.models.metadata import WEIGHT_SUFFIXES
from sagl.models.sources import NetworkSource, resolve_network
from sagl.models.zoo import BUNDLED_CLASSIFIERS, default_reference
from sagl.sampling.run_folder import count_images
from sagl.settings.evaluation import (
    EXTRACTOR_NAMES,
    INCEPTION,
    ExtractionSettings,
    MetricSettings,
    require_image_set,
)
from sagl.settings.sampling import DeviceSettings, SamplerSettings
from sagl.utils.distributed import has_launched_peers, num_processes
from sagl.utils.files import sha256
from sagl.utils.run_lock import lock_folder

SMOKE = {"num_samples": 4, "sampler": "ddim", "respacing": "2", "bootstrap": 0}
"""Settings of --smoke."""


def reproduce_parser() -> Parser:
    """Build the parser of `sagl reproduce`."""
    lines = "\n".join(f"  {name:<9} {item.title}" for name, item in paper_items().items())
    description = "Reproduce a table or figure of the paper, or write the report of all that were reproduced."
    extra = (
        "  table7    print the settings of all tables and figures\n  all       everything\n  report    write the report"
    )
    p = Parser("reproduce", description, f"items:\n{lines}\n{extra}")
    p.add_argument("item", type=str, nargs="?", help="Table or figure, see below. (required)")
    p.add_argument("--model", type=str, default=None, help="Network to take in place of the paper's: a name or file.")
    p.add_argument("--num_samples", type=int, default=None, help="Largest number of images; default: the paper's.")
    p.add_argument("--sampler", type=str, default="ddpm", help="Sampler.")
    p.add_argument("--respacing", type=str, default=None, help="Sampling steps; default: the paper's 250.")
    p.add_argument("--reference", type=str, default=None, help="Reference of the metrics, as of sagl evaluate.")
    p.add_argument("--extractor", type=str, default=None, help="Feature extractor, as of sagl evaluate.")
    p.add_argument("--bootstrap", type=int, default=200, help="Bootstrap resamples of intervals, as of sagl evaluate.")
    dino = "File of DINO weights, for the masks of table 4 that need it, as --sag.dino_checkpoint."
    p.add_argument("--dino_checkpoint", type=str, default=None, help=dino)
    p.add_argument("--object_masks", type=str, default="silhouette", help="Objects of overlap, as of sagl analyze.")
    p.add_argument("--devices", type=str, default="auto", help="Processes per machine, as --trainer.devices.")
    p.add_argument(
        "--smoke", action="store_true", help="Sample four images of two steps per row, to check that everything runs."
    )
    p.add_argument("--output", type=str, default="reproduction", help="Folder of the runs and of the report.")
    return p


def main(arguments: list[str]) -> None:
    """Run `sagl reproduce ITEM [--model NAME] [--num_samples N] [--reference R] [--output DIR]`.

    An interrupted command goes on where it stopped; tables share the runs with equal options.

    Raises:
        UserError: a setting is not valid; what has been sampled and evaluated is kept.
    """
    args, items = reproduce_parser().parse(arguments), paper_items()
    folder, chosen, evaluation = Path(args.output), list[PaperItem](), None
    choices = [*items, "table7", "all", "report"]
    require(args.item in choices, f"`item` must be one of {', '.join(choices)}, got {args.item}.")
    require(
        not has_launched_peers(),
        "`devices` sets the number of processes. Start sagl reproduce without torchrun and srun.",
    )
    if args.item != "report":
        if args.smoke:
            for name, value in SMOKE.items():
                args[name] = value
        target = _target(args)
        chosen = list(items.values()) if args.item in ("all", "table7") else [items[args.item]]
        plans = {item.name: plan_reproduction(item, target) for item in chosen}
        _print_plan(chosen, plans)
        if args.item == "table7":
            return
        if any(not (item.analysis or item.shows_samples) for item in chosen):
            evaluation = _Evaluation.plan(args)  # refuses a missing reference before anything is sampled
    with lock_folder(folder):
        for item in chosen:
            _reproduce(item, plans[item.name], args, folder, evaluation)
        print("Report: " + ", ".join(map(str, write_report(folder))))


def _target(args: Namespace) -> Target:
    model, num_samples = args.model, args.num_samples
    _check_settings(args)
    require(num_samples is None or num_samples >= 2, f"`num_samples` must be at least 2, got {num_samples}.")
    target = Target(
        num_samples=num_samples,
        sampler=args.sampler,
        respacing=args.respacing,
        dino_checkpoint=args.dino_checkpoint,
        object_masks=args.object_masks,
    )
    if model is None:
        return target
    source = _find_network(model)
    network, _ = source.read_settings()
    return replace(
        target,
        name=model,
        network=network,
        classifier=BUNDLED_CLASSIFIERS.get(model),
        recommended=recommended_settings(source.model, source.checkpoint),
    )


def _check_settings(args: Namespace) -> None:
    """Refuse settings of sampling, evaluation and analyses before anything is sampled."""
    SamplerSettings(sampler=args.sampler)
    MetricSettings(bootstrap=args.bootstrap)
    ExtractionSettings(extractor=args.extractor)
    DeviceSettings(devices=args.devices)
    check_object_masks(args.object_masks)
    dino = args.dino_checkpoint
    require(dino is None or Path(dino).is_file(), f"`dino_checkpoint` must be a file, and there is none at {dino}.")
    if args.reference is not None:
        require_image_set(args.reference, "reference")


def _print_plan(items: list[PaperItem], plans: dict[str, list[ReproductionRow]]) -> None:
    """Print the settings in force of every row, and the number of different runs."""
    for item in items:
        print(f"{item.heading}: {item.title}")
        for row in plans[item.name]:
            print(f"  {row.row.name}: {row.obstacle or ' '.join(row.options)}")
    runs = {row.run_name for item in items for row in plans[item.name] if not (row.obstacle or item.analysis)}
    analyses = sum(not row.obstacle for item in items for row in plans[item.name] if item.analysis)
    print(f"{len(runs)} runs to sample, {analyses} analyses; what is in the folder already is not repeated.")


@dataclass(frozen=True)
class _Evaluation:
    """Reference, extractor and bootstrap of the evaluation of every run."""

    reference: str
    path: str
    """Name or path of the reference, the local copy of a URL."""
    extractor: str
    bootstrap: int

    @classmethod
    def plan(cls, args: Namespace) -> "_Evaluation":
        """Find the reference, which is downloaded if it is a URL, and the extractor.

        Raises:
            UserError: the reference does not exist, or its extractor must be given.
        """
        reference = args.reference or default_reference(args.model)
        path = local_path(reference, "reference")
        return cls(reference, path, args.extractor or default_extractor(Path(path)), args.bootstrap)

    @cached_property
    def digest(self) -> str:
        """Digest of the reference, which takes long for many images."""
        return reference_digest(self.path)

    @cached_property
    def version(self) -> str:
        """Version of the extractor, which is loaded for it."""
        return extractor_version(self.extractor, get_extractor(self.extractor)(torch.device("cpu")))

    def _is_current(self, version: str) -> bool:
        """Return whether the extractor has this version now. It is not loaded if it has published weights and none."""
        has_own_weights = self.extractor == INCEPTION and bool(os.environ.get(VARIABLE))
        is_published = self.extractor in EXTRACTOR_NAMES and not has_own_weights
        return (is_published and not version) or version == self.version

    def is_done(self, run: Path) -> bool:
        """Return whether the last result of a run, which the report shows, is of this evaluation of all its images.

        A result without a digest is of images that never change, or of a version that stored none.
        """
        last = next(reversed(read_results(run)), None)
        own = (self.reference, self.extractor, self.bootstrap, count_images(run))
        return (
            last is not None
            and (last.reference, last.extractor, last.settings.get("bootstrap"), last.num_samples) == own
            and (not last.reference_digest or last.reference_digest == self.digest)
            and self._is_current(last.extractor_version)
        )

    @property
    def flags(self) -> list[str]:
        """Flags of `sagl evaluate`."""
        return ["--reference", self.reference, "--extractor", self.extractor, "--bootstrap", str(self.bootstrap)]


def _reproduce(
    item: PaperItem, rows: list[ReproductionRow], args: Namespace, folder: Path, evaluation: _Evaluation | None
) -> None:
    """Make what is missing of a table or figure, and store the commands of its rows."""
    commands = []
    for row in rows:
        words = [] if row.obstacle else _words(item, row, args)
        target = folder / (ANALYSES if item.analysis else RUNS) / row.run_name
        commands.append(shlex.join(["sagl", *words, "--output", str(target)]) if words else "")
        if not words:
            continue
        if item.analysis is None or not _is_analysed(target / f"{item.analysis}.json", row):
            _run([*words, "--output", str(target)], args.devices)
        if not (item.analysis or item.shows_samples):
            assert evaluation is not None
            if not evaluation.is_done(target):
                _run(["evaluate", str(target), *evaluation.flags, *_devices(args)], args.devices)
    store_item(folder, item, rows, commands)


def _words(item: PaperItem, row: ReproductionRow, args: Namespace) -> list[str]:
    """Return the command line of a row without its output."""
    if item.analysis:
        return ["analyze", item.analysis, *row.options]
    return ["sample", *row.options, *_devices(args)]


def _devices(args: Namespace) -> list[str]:
    return ["--trainer.devices", args.devices] if args.devices != "auto" else []


def _is_analysed(numbers: Path, row: ReproductionRow) -> bool:
    """Return whether the file of an analysis exists, and is of the weights that are in the row's weight file now.

    A file of a version that did not store the digest of the weights is kept.
    """
    if not numbers.is_file():
        return False
    stored = read_weights_sha256(numbers)
    _, name, *_ = row.options  # the network comes first
    return stored is None or stored == sha256(_find_network(name).find_file())


def _find_network(name: str) -> NetworkSource:
    """Return a network by its name or weight file."""
    is_file = Path(name).suffix in WEIGHT_SUFFIXES and not is_hub_name(name)
    return resolve_network(None if is_file else name, name if is_file else None)


def _run(words: Sequence[str], devices: str) -> None:
    """Run a command line of sagl.

    One of several processes runs as a child of this process, because its processes repeat its own command line.
    """
    if num_processes(DeviceSettings(devices=devices))[0] == 1:
        {"sample": sample, "evaluate": evaluate, "analyze": analyze}[words[0]].main(list(words[1:]))
        return
    sys.stdout.flush()
    code = subprocess.run([sys.executable, "-m", "sagl", *words], check=False).returncode
    if code:
        raise SystemExit(code if code > 0 else 128 - code)  # the child has printed its error
