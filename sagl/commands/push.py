"""`sagl push`: upload a network to the Hugging Face Hub, with a model card made from its run."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sagl.commands._parser import Parser
from sagl.errors import require
from sagl.evaluation.metric_display import format_value, metric_name
from sagl.evaluation.results import read_results
from sagl.guidance.registry import GUIDANCES
from sagl.models.hub_files import HUB_PREFIX, hub_errors, is_reachable, require_repository
from sagl.sampling.run_folder import is_run, read_run_json
from sagl.utils.config_files import flatten
from sagl.utils.files import require_unused

SAMPLING_SETTINGS = ("sampler", "respacing", "eta", "clip_x0", "labels", "seed", "precision")
"""Settings of a run that its model card shows, besides those of the guidance that is on."""

FILE_SETTINGS = ("checkpoint", "direction_head")
"""Ends of the names of settings that are paths."""


def push_parser() -> Parser:
    """Build the parser of `sagl push`."""
    p = Parser("push", "Upload a network to the Hugging Face Hub, with a model card made from its run.")
    p.add_argument("run", type=str, help="Folder of sagl sample or sagl fit, a weight file, or a name.")
    p.add_argument("repository", type=str, help="OWNER/NAME on the Hub; created if there is none.")
    p.add_argument("--licence", type=str, required=True, help="Licence of the weights: mit, apache-2.0, cc-by-4.0, ….")
    p.add_argument("--weights", type=str, default="ema", help="Weights of a .ckpt: ema, ema:DECAY or raw.")
    p.add_argument("--private", action="store_true", help="Create a private repository.")
    p.add_argument("--output", type=str, default=None, help="New folder for the files; nothing is uploaded then.")
    return p


def main(arguments: list[str]) -> None:
    """Run `sagl push RUN_OR_FILE OWNER/NAME --licence ID [--private] [--output DIR]`.

    Raises:
        UserError: the network cannot be read, or the repository not be written.
    """
    args = push_parser().parse(arguments)
    require(bool(args.licence.strip()), "`licence` must be that of the weights, such as mit, got nothing.")
    require_repository(args.repository, "repository")
    if args.output is not None:
        require_unused(Path(args.output), "output")
    with hub_errors(args.repository, "repository"):
        import huggingface_hub

        if args.output is not None:
            write_files(args, Path(args.output))
            print(f"{args.output}: the files of {args.repository}. Nothing was uploaded.")
            return
        require(is_reachable(), f"`repository` {args.repository} needs the Hub, which does not answer. See `output`.")
        with TemporaryDirectory() as name:
            write_files(args, Path(name))
            api = huggingface_hub.HfApi()
            api.create_repo(args.repository, private=args.private or None, exist_ok=True)
            api.upload_folder(repo_id=args.repository, folder_path=name, commit_message="Upload with sagl push")
    print(f"{args.repository} is on the Hub: sagl sample --model {HUB_PREFIX}{args.repository}")


def write_files(args: Any, folder: Path) -> None:  # noqa: ANN401 (the parser's namespace)
    """Write weights, settings and model card into a folder.

    Raises:
        UserError: the network or the run cannot be read.
    """
    from sagl.models.conversion import read_network
    from sagl.models.hub import HubUNet
    from sagl.settings.network import UNetSettings

    source = Path(args.run)
    metadata = read_run_json(source, "run") if is_run(source) else {}
    weights = metadata.get("settings", {}).get("weights", args.weights)
    last = source / "checkpoints" / "last.ckpt"
    checkpoint = metadata.get("checkpoint") or (str(last) if last.is_file() else args.run)
    network = read_network(checkpoint, weights, metadata.get("model"))
    require(
        isinstance(network.model_settings, UNetSettings),
        f"`run` must be a diffusion model, and {args.run} is a classifier or a head.",
    )
    folder.mkdir(parents=True, exist_ok=True)
    grid = find_grid(source)
    if grid is not None:
        (folder / "grid.png").write_bytes(grid.read_bytes())
    card = {
        "licence": args.licence,
        "repo_id": args.repository,
        "has_grid": grid is not None,
        "sampling": sampling_settings(metadata),
        "metrics": metrics(source) if metadata else [],
    }
    HubUNet.from_checkpoint(network).save_pretrained(folder, model_card_kwargs=card)


def find_grid(run: Path) -> Path | None:
    """Return the grid of a sampling run, or the last preview of a training; None if there is none."""
    previews = sorted(run.glob("previews/step_*.png"), key=lambda path: path.stat().st_mtime)
    return next((path for path in (run / "grid.png", *reversed(previews)) if path.is_file()), None)


def sampling_settings(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of sampler and guidance of a run, without paths."""
    settings = flatten(metadata.get("settings", {}))
    shown = {name: settings[name] for name in SAMPLING_SETTINGS if name in settings}
    for name, value in settings.items():
        group, _, key = name.partition(".")
        if group in GUIDANCES and settings.get(f"{group}.scale") and not key.endswith(FILE_SETTINGS):
            default = GUIDANCES[group].settings_class()
            shown |= {name: value} if value != _as_json(getattr(default, key, None)) else {}
    return shown


def _as_json(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def metrics(run: Path) -> list[dict[str, str]]:
    """Return the rows of the table of metrics of a run that was evaluated: names of references, without their paths.

    Raises:
        UserError: the file with the results is damaged.
    """
    rows = []
    for result in read_results(run):
        condition = f"{result.num_samples:,} images, {Path(result.reference).name}, {result.extractor}"
        for name, value in result.values.items():
            low_high = [format_value(name, bound) for bound in result.intervals.get(name, ())]
            interval = f" ({' … '.join(low_high)})" if low_high else ""
            rows.append({"name": metric_name(name), "value": format_value(name, value) + interval, "of": condition})
    return rows
