"""The files of a network for the Hugging Face Hub: weights, settings, and a model card made from a run.

Needs the extra `hub`.
"""

from pathlib import Path
from typing import Any

from sagl.errors import require
from sagl.evaluation.metric_display import format_interval, format_value, metric_name
from sagl.evaluation.results import read_results
from sagl.guidance.registry import GUIDANCES
from sagl.models.hub import HubUNet
from sagl.models.loading import find_file, read_network
from sagl.models.metadata import settings_from_metadata
from sagl.sampling.run_folder import is_run, read_run_json
from sagl.settings.guidance import FILE_SETTINGS
from sagl.settings.network import UNetSettings
from sagl.utils.config_files import flatten
from sagl.utils.digest_cache import weights_sha256

SAMPLING_SETTINGS = ("sampler", "respacing", "eta", "clip_x0", "labels", "seed", "precision")
"""Settings of a run that its model card shows, besides those of the guidance that is on."""


def write_hub_folder(folder: Path, run: str, repository: str, *, licence: str, weights: str = "ema") -> None:
    """Write weights, settings and model card of a network into a folder, as a repository of the Hub has them.

    Args:
        folder: folder to write; created if there is none.
        run: folder of sagl sample or sagl fit, a weight file, or a name.
        repository: OWNER/NAME on the Hub.
        licence: identifier of the licence of the weights.
        weights: weights of a training checkpoint: ema, ema:DECAY or raw; a sampling run has its own.

    Raises:
        UserError: the network or the run cannot be read, or the weight file has changed since the run was sampled.
    """
    source = Path(run)
    metadata = read_run_json(source, "run") if is_run(source) else {}
    settings = metadata.get("settings", {})
    weights = settings.get("weights", weights)
    last = source / "checkpoints" / "last.ckpt"
    checkpoint = metadata.get("checkpoint") or (str(last) if last.is_file() else run)
    if "weights_sha256" in settings and not Path(checkpoint).is_dir():
        _check_weights(run, find_file(checkpoint), settings["weights_sha256"])
    if "network" in settings:  # the weight file does not contain them
        network = read_network(checkpoint, weights, *settings_from_metadata(settings, source))
    else:
        network = read_network(checkpoint, weights, metadata.get("model"))
    require(
        isinstance(network.model_settings, UNetSettings),
        f"`run` must be a diffusion model, and {run} is a classifier or a head.",
    )
    folder.mkdir(parents=True, exist_ok=True)
    grid = _find_grid(source)
    if grid is not None:
        (folder / "grid.png").write_bytes(grid.read_bytes())
    card = {
        "licence": licence,
        "repo_id": repository,
        "has_grid": grid is not None,
        "sampling": sampling_settings(metadata),
        "metrics": metrics(source) if metadata else [],
    }
    HubUNet.from_checkpoint(network).save_pretrained(folder, model_card_kwargs=card)


def _check_weights(run: str, checkpoint: Path, expected: object) -> None:
    """Refuse a weight file that is not the one whose images, metrics and settings the run has."""
    digest = weights_sha256(checkpoint)
    require(
        digest == expected,
        f"`run` must be a run of the weights that its file has now, and {checkpoint} has changed since {run} was "
        f"sampled: sha256 {expected!s:.12}…, got {digest:.12}…. Sample again into a new folder, or give the weight "
        "file as `run`.",
    )


def _find_grid(run: Path) -> Path | None:
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
            interval = format_interval(name, result.intervals.get(name, ()))
            shown = format_value(name, value) + (f" ({interval})" if interval else "")
            rows.append({"name": metric_name(name), "value": shown, "of": condition})
    return rows
