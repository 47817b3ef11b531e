"""YAML configs: packaged ones by name, several merged, settings given twice refused; settings by name and as text."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sagl.errors import UserError, require, suggest
from sagl.utils.files import expand_path, expand_paths, packaged_configs


def read_configs(names: Iterable[str] | None) -> dict[str, Any]:
    """Read several configs, of which later ones override earlier ones setting by setting, as in `sagl fit`.

    Raises:
        UserError: one does not exist, is not a mapping, or has a setting twice.
    """
    merged: dict[str, Any] = {}
    for name in names or ():
        merged = _merge(merged, read_config(name))
    return merged


def _merge(earlier: dict[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(earlier)
    for key, value in later.items():
        old = merged.get(key)
        merged[key] = _merge(old, value or {}) if isinstance(old, dict) and isinstance(value, dict | None) else value
    return merged


def read_config(name: str) -> dict[str, Any]:
    """Read a config by its path, or a packaged one by its name.

    Raises:
        UserError: it does not exist, is not a mapping, or has a setting twice.
    """
    path = packaged_config(name)
    try:
        text = path.read_bytes()
        repeated = next(_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader)), None)
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise UserError(f"`config` {path} is not readable YAML: {str(error).splitlines()[0]}.") from error
    require(repeated is None, f"`config` {path} must have a setting once, and it has {repeated} twice. Remove one.")
    require(isinstance(config, dict), f"`config` {path} must be a mapping of settings, got {config!r:.60}.")
    return dict(expand_paths(config))


def _repeated_keys(node: yaml.Node | None, prefix: str = "") -> Iterator[str]:
    """Yield the full names of keys that a mapping of a YAML document has twice, of which PyYAML ignores the first."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _repeated_keys(item, prefix)
    elif isinstance(node, yaml.MappingNode):
        keys = [str(key.value) for key, _ in node.value]
        yield from (f"{prefix}{key}" for index, key in enumerate(keys) if key in keys[:index])
        for key, value in zip(keys, (value for _, value in node.value), strict=True):
            yield from _repeated_keys(value, f"{prefix}{key}.")


def packaged_config(name: str) -> Path:
    """Return the path of a config: `name` itself if it is a file, else the packaged config of this name.

    Raises:
        UserError: neither exists.
    """
    name = expand_path(name, "config")
    packaged = sorted(path.stem for path in packaged_configs().glob("*.yaml"))
    path = Path(name) if Path(name).is_file() or name not in packaged else packaged_configs() / f"{name}.yaml"
    if not path.is_file():
        listed = ", ".join(packaged)
        raise UserError(f"`config` must be a .yaml file or one of {listed}, got {name}.{suggest(name, packaged)}")
    return path


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by full names, in their order: {"sag": {"scale": 1}} -> {"sag.scale": 1}."""
    names: dict[str, Any] = {}
    for name, value in settings.items():
        names |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return names


def to_text(value: object) -> str:
    """Write a value as its flag is written: (0, 0.5) -> "0,0.5", None -> "null", True -> "true"."""
    if isinstance(value, tuple | list):
        return ",".join(map(to_text, value))
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
