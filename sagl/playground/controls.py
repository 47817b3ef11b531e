"""Controls of the page and the command line that their values stand for.

The page has one control for every setting of `sagl sample` that decides an image, with the help of its flag. Values
become a command line, which the parser of `sagl sample` reads: the page refuses what the command refuses, in its words.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sagl.errors import require, require_range
from sagl.guidance.registry import GUIDANCES
from sagl.models.hub_files import is_hub_name
from sagl.models.zoo import CLASSIFIER_NAMES, UNET_NAMES
from sagl.sampling.run import SampleConfig
from sagl.settings.guidance import FILE_SETTINGS
from sagl.settings.sampling import RunSettings, SamplerSettings
from sagl.utils.config_files import to_text

Value = str | float | bool | None
"""Value of a control; None is null."""
Kind = Literal["choice", "checkbox", "integer", "number", "text"]
MAX_IMAGES = 64
"""Largest number of images on the page."""
QUICK = ("--num_samples=4", "--sampler=unipc", "--respacing=logsnr10", "--eta=0")
"""Settings of the page, unless they are given: few images and steps, so that a change is seen at once."""
SAMPLES = ("seed", "num_samples", "labels", "first_id")
"""Settings of the samples in the order of the page."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """A setting as the page shows it."""

    name: str
    """Name of the flag: seed, sag.scale."""
    kind: Kind
    choices: tuple[str, ...] = ()
    """Values of a choice."""
    help: str
    """Help text of the flag."""


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The parts of the parser of `sagl sample` that the page uses."""

    parse: Callable[[list[str]], SampleConfig]
    """Resolve the arguments."""
    help_texts: Mapping[str, str]
    """Help of the flags by name."""
    with_flags: Callable[[str], str]
    """Turn the names of parameters in an error into flags."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Settings of the page, resolved."""

    config: SampleConfig
    arguments: list[str]
    """The shortest arguments of `sagl sample` for them."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """The controls of the page, and how their values become a request."""

    command_line: CommandLine
    network: str
    """Name or file of the network at the start."""
    network_arguments: Sequence[str]
    """Arguments that choose it."""
    device_arguments: Sequence[str]
    """Arguments for every network: batch size, device and precision."""
    start: SampleConfig
    """Settings at the start."""
    allow_files: bool = False
    """Accept paths of this machine from the browser."""
    _defaults: dict[str, SampleConfig] = field(default_factory=dict)

    @property
    def networks(self) -> list[str]:
        """Names of the networks to choose from."""
        return list(dict.fromkeys([self.network, *UNET_NAMES]))

    @property
    def groups(self) -> dict[str, list[Control]]:
        """The controls of samples, of the sampler, and of every guidance method."""
        samples = {control.name: control for control in self._controls(RunSettings)}
        groups = {"samples": [samples[name] for name in SAMPLES], "sampler": list(self._controls(SamplerSettings))}
        return groups | {
            name: list(self._controls(entry.settings_class, f"{name}.")) for name, entry in GUIDANCES.items()
        }

    def start_values(self, network: str) -> dict[str, Value]:
        """Return the values of all controls after a network was chosen.

        Raises:
            UserError: there is no such network.
        """
        config = self.start
        if network != self.network:
            config = self.command_line.parse([*self._network_arguments(network), *QUICK])
        return {name: _to_value(value) for name, value in flat_settings(config).items()}

    def request(self, network: str, values: Mapping[str, Value]) -> Request:
        """Resolve the values of the controls.

        Raises:
            UserError: a value is refused.
        """
        self._check_files(values)
        arguments = self._network_arguments(network)
        config = self.command_line.parse([*arguments, *(f"--{name}={to_text(v)}" for name, v in values.items())])
        require_range("num_samples", config.samples.num_samples, 1, MAX_IMAGES)
        if network not in self._defaults:
            self._defaults[network] = self.command_line.parse(arguments)
        defaults = self._defaults[network]
        off = {
            name: replace(g, scale=0.0) for name, g in defaults.guidances.items() if not config.guidances[name].scale
        }
        config = replace(config, guidances={**config.guidances, **off})
        changes = changed_settings(config, defaults)
        flags = [part for name, value in changes.items() for part in (f"--{name}", to_text(value))]
        return Request(config=config, arguments=[*arguments, *flags])

    def _controls(self, cls: type, prefix: str = "") -> Iterator[Control]:
        hints = get_type_hints(cls)
        for item in fields(cls):
            kind, choices = _kind(hints[item.name])
            name = f"{prefix}{item.name}"
            yield Control(name=name, kind=kind, choices=choices, help=self.command_line.help_texts[name])

    def _network_arguments(self, network: str) -> list[str]:
        """Return the arguments for a network.

        Raises:
            UserError: it is neither that of the start nor a pretrained one, and files are not allowed.
        """
        if network == self.network:
            chosen = list(self.network_arguments)
        elif self.allow_files and network not in UNET_NAMES:
            chosen = [f"--{'model' if is_hub_name(network) else 'checkpoint'}={network}"]
        else:
            require(
                network in UNET_NAMES,
                f"`model` must be one of {', '.join(UNET_NAMES)} on this page, got {network!r}. For another network, "
                "start sagl playground with it, or with --allow_files.",
            )
            chosen = [f"--model={network}"]
        return [*chosen, *self.device_arguments]

    def _check_files(self, values: Mapping[str, Value]) -> None:
        """Refuse paths, and variables that the command line would expand, unless files are allowed."""
        if self.allow_files:
            return
        start = self.start_values(self.network) if any(map(_is_file, values)) else {}
        for name, value in values.items():
            known = value in (None, "", "auto", start.get(name), *UNET_NAMES, *CLASSIFIER_NAMES)
            require(
                known or not _is_file(name),
                f"`{name}` must be the name of a pretrained network, got {value!r}. This page opens no files: start "
                "sagl playground with --allow_files, or set the file there.",
            )
            require(
                known or not (isinstance(value, str) and re.search(r"[$~]", value)),
                f"`{name}` must not contain $ or ~ on this page, got {value!r}.",
            )


def flat_settings(config: SampleConfig) -> dict[str, Any]:
    """Return the settings that have a control, by name."""
    settings = {name: getattr(config.samples, name) for name in SAMPLES} | vars(config.sampler)
    for group, guidance in config.guidances.items():
        settings |= {f"{group}.{name}": value for name, value in vars(guidance).items()}
    return settings


def changed_settings(config: SampleConfig, defaults: SampleConfig) -> dict[str, Any]:
    """Return the settings that differ from the defaults."""
    old = flat_settings(defaults)
    return {name: value for name, value in flat_settings(config).items() if value != old[name]}


def _to_value(value: object) -> Value:
    return to_text(value) if isinstance(value, tuple) else value  # type: ignore[return-value]


def _is_file(name: str) -> bool:
    return name.endswith(FILE_SETTINGS)


def _kind(hint: Any) -> tuple[Kind, tuple[str, ...]]:  # noqa: ANN401
    """Return the kind of control for a type, and the values of a choice."""
    types = [part for part in get_args(hint) if part is not NoneType] if NoneType in get_args(hint) else [hint]
    if get_origin(types[0]) is Literal:
        return "choice", get_args(types[0])
    kinds: dict[Any, Kind] = {bool: "checkbox", int: "integer", float: "number"}
    return kinds.get(types[0], "text"), ()
