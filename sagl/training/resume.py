"""Settings of a resumed training: those that may change, and those that may not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sagl.errors import UserError, require
from sagl.models.direction_head import is_same_rms
from sagl.models.metadata import TRAINING_ONLY
from sagl.settings.network import SETTINGS_CLASSES
from sagl.utils.config_files import flatten
from sagl.utils.distributed import global_rank

START_SETTINGS = ("checkpoint", "weights")
"""Settings of the beginning of a training, which a resumed one does not read again."""
COMMAND_SETTINGS = ("config", "output", "resume")
"""Settings of one command."""


def check_same_parameters(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse another network, diffusion process or frozen parts than those of the checkpoint; its state would not fit.

    Args:
        saved: hyperparameters in the checkpoint.
        current: hyperparameters of the module.

    Raises:
        UserError: names the first setting that differs.
    """
    for key in SETTINGS_CLASSES:
        settings = current.get(key)
        require((settings is None) == (saved.get(key) is None), f"`model.{key}` must be that of the run, got another.")
        for name, value in (settings or {}).items():
            old = saved[key].get(name, value)
            if name == "network_rms":  # its last digits depend on the processor and the number of threads
                require(
                    is_same_rms(old, value),
                    "`checkpoint` must be the network with which the training of the head began, got another one. "
                    "Restore its file, or choose a new `output`.",
                )
                continue
            require(
                name in TRAINING_ONLY or _plain(value) == _plain(old),
                f"`model.{key}.{name}` must be {old}, as in the run that is resumed, got {value}.",
            )
    for name, value in current["diffusion"].items():
        old = saved["diffusion"].get(name, value)
        require(value == old, f"`model.diffusion.{name}` must be {old}, as in the run that is resumed, got {value}.")
    old, new = (list(parameters.get("freeze", ())) for parameters in (saved, current))
    require(old == new, f"`model.freeze` must be {old}, as in the run that is resumed, got {new}.")


def report_changes(config_file: Path, text: str) -> None:
    """Print the settings of a resumed training that differ from its config.yaml; see `changed_settings`.

    Raises:
        UserError: a setting of `START_SETTINGS` differs.
    """
    changes = changed_settings(config_file, text)
    if changes and global_rank() == 0:
        print(f"The training in {config_file.parent} continues with {', '.join(changes)}.")


def changed_settings(config_file: Path, text: str) -> list[str]:
    """Return the settings of a resumed training that differ from its config.yaml: ["seed 1 (was 0)"].

    Args:
        config_file: config.yaml of the run; may be missing.
        text: new content of the file.

    Raises:
        UserError: a setting of `START_SETTINGS` differs.
    """
    if not config_file.is_file():
        return []
    try:
        old = flatten(dict(yaml.safe_load(config_file.read_text(encoding="utf-8", errors="surrogateescape")) or {}))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"`output` must have an intact config.yaml, and {config_file} is damaged. Delete it to continue with the "
            "settings of this command."
        ) from error
    new = flatten(yaml.safe_load(text) or {})
    for name in START_SETTINGS:
        require(
            old.get(name) == new.get(name),
            f"`{name}` must be {old.get(name)}, with which the training in {config_file.parent} began, got "
            f"{new.get(name)}.",
        )
    names = [name for name in dict.fromkeys((*new, *old)) if name.split(".")[0] not in COMMAND_SETTINGS]
    return [f"{name} {new.get(name)} (was {old.get(name)})" for name in names if new.get(name) != old.get(name)]


def _plain(value: Any) -> Any:  # noqa: ANN401 (any setting)
    return list(value) if isinstance(value, tuple) else value
