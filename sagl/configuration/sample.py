"""Configuration of `sagl sample`. Precedence: flags, config, recommendation of the weight file, defaults."""

from collections.abc import Iterator, Mapping, Set
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from sagl.configuration.parser import Parser, field_names, from_namespace
from sagl.configuration.training import TRAINING_SETTINGS
from sagl.errors import UserError, require, suggest
from sagl.guidance.registry import GUIDANCES
from sagl.models.metadata import read_metadata
from sagl.models.sources import resolve_network
from sagl.models.zoo import DEFAULT_MODEL, RELEASED, UNET_NAMES, with_default_classifier
from sagl.sampling.run import DEFAULT_EXPORTS, DEFAULT_EXPORTS_MAX_IMAGES, EXPORTS, SampleConfig
from sagl.settings.diffusion import DiffusionSettings, LossSettings
from sagl.settings.guidance import TERM_OPTIONS
from sagl.settings.network import ClassifierSettings, UNetSettings
from sagl.settings.sampling import DeviceSettings, ProgressKind, RunSettings, SamplerSettings
from sagl.settings.training import BlurAwareSettings, CheckpointSettings, OptimizerSettings
from sagl.utils.config_files import read_config, read_configs, to_text

SAMPLING_KEYS = {"checkpoint", "weights", "compare", "exports", *GUIDANCES}
SAMPLING_KEYS |= {*field_names(RunSettings), *field_names(SamplerSettings)}
"""Top-level keys of a config for `sagl sample`."""
DEFAULTS = """Sampler, labels and guidance default to the settings that are recommended for the network, by its weight
file or, for a released network, by its packaged config. The defaults printed here apply where nothing is
recommended."""
"""Part of the help of every command that samples."""
TRAINING_KEYS = {"model", "trainer", "data", "preview", *field_names(CheckpointSettings)}
TRAINING_KEYS |= {"output", "global_batch_size", "resume"}
"""Other top-level keys: those for `sagl fit`. `model` and `trainer` are read in part."""
MODEL_GROUPS = {
    "network": UNetSettings,
    "classifier": ClassifierSettings,
    "diffusion": DiffusionSettings,
    "loss": LossSettings,
    "optimizer": OptimizerSettings,
    "blur_aware": BlurAwareSettings,
}
"""Groups of settings below `model`."""
MODEL_KEYS = {name for cls in TRAINING_SETTINGS.values() for name in field_names(cls)}


def sample_parser() -> Parser:
    """Build the parser of `sagl sample`; the help texts are the docstrings of the settings' fields."""
    p = network_parser("sample", "Sample images from a diffusion model, with or without guidance.")
    p.add_argument("--output", type=str, default="samples", help="Run folder.")
    p.add_argument("--compare", action="store_true", help="Also save unguided images of the same seeds, and the masks.")
    exports = (
        f"Exports of the run: {', '.join(EXPORTS)}, separated by commas. {', '.join(DEFAULT_EXPORTS)} are always "
        f"written for up to {DEFAULT_EXPORTS_MAX_IMAGES:,} images, strip only if it is named."
    )
    p.add_argument("--exports", type=str, default="", help=exports)
    p.add_argument("--dry_run", action="store_true", help="Print the expected time and memory, and write nothing.")
    return p


def network_parser(command: str, description: str, epilog: str = "") -> Parser:
    """Build a parser with the options of `SampleConfig` that all commands have which sample from a network."""
    first, *others = GUIDANCES
    p = Parser(command, description, "\n\n".join(text for text in (epilog, DEFAULTS, shared_flags(first)) if text))
    add_config_argument(
        p, "A .yaml file, or the name of a packaged one, such as lsun_cat; several are merged in order."
    )
    model = f"Pretrained network (default: {DEFAULT_MODEL}, unless --checkpoint or a config names one): "
    p.add_argument("--model", type=str, default=None, help=f"{model}{', '.join(UNET_NAMES)}; or hf:OWNER/NAME.")
    p.add_argument("--checkpoint", type=str, default=None, help="Weight file: .safetensors, .ckpt or .pt.")
    p.add_argument("--weights", type=str, default=None, help="Weights of a .ckpt: ema (default), ema:DECAY or raw.")
    p.add_argument(
        "--progress", type=ProgressKind, default="auto", help="Progress; auto: a bar on a terminal, else lines."
    )
    p.add_settings(RunSettings)
    p.add_settings(SamplerSettings)
    for group, cls in _groups().items():
        p.add_settings(cls, group, repeated=TERM_OPTIONS if group in others else ())
    return p


def shared_flags(first: str) -> str:
    """Return the part of the help on the flags that every guidance method has and the help lists for `first` alone."""
    without = [name for name, entry in GUIDANCES.items() if not entry.settings_class.has_weak_prediction]
    return f"""Every guidance method has these flags too, with the meanings of those of --{first}:
{", ".join(TERM_OPTIONS)}.
Exceptions: {", ".join(without)} have no weak prediction and refuse direction_head and reuse_before;
autoguidance refuses reuse_before; history refuses a renew_every above 1."""


def add_config_argument(p: Parser, help_text: str) -> None:
    """Add --config, which can be given several times."""
    p.add_argument("--config", type=str, action="append", default=None, help=help_text)


def _groups() -> dict[str, type]:
    """Return the settings classes of the groups of flags."""
    return {**{name: entry.settings_class for name, entry in GUIDANCES.items()}, "trainer": DeviceSettings}


def parse_sample_config(arguments: list[str], parser: Parser | None = None) -> SampleConfig:
    """Resolve a command line.

    Args:
        arguments: the command line.
        parser: parser of the command, made by `network_parser`; None: that of `sagl sample`.

    Raises:
        UserError: a flag, the config or the recommendation of the weight file is invalid.
    """
    p = parser or sample_parser()
    flags = p.parse(arguments)
    for name in ("config", "model", "checkpoint", "output"):
        require(flags.get(name) not in ("", [""]), f"`{name}` must not be empty.")
    config, config_names = read_configs(flags.config), ", ".join(flags.config or ())
    model, sampling = model_settings(config), sampling_settings(config)
    require(
        "classifier" not in model,
        f"`config` must describe a diffusion model, and {config_names} describes a classifier. Classifiers go into "
        "`classifier.checkpoint`.",
    )
    checkpoint, weights = _weights_of(sampling, flags)
    source = resolve_network(
        flags.model or model.get("network"),
        flags.checkpoint or checkpoint,
        model.get("diffusion"),
        flags.weights or weights or "ema",
    )
    recommended = recommended_settings(source.model, source.checkpoint)
    given = {argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")} - _groups().keys()
    sampler = flags.sampler if "sampler" in given else None
    configured = given | sampling.keys() - GUIDANCES.keys()
    set_recommended_defaults(p, recommended, _replaced(configured, sampler or sampling.get("sampler")))
    known = {name: value for name, value in sampling.items() if f"--{name}" in p._option_string_actions}
    _set_defaults(p, known, f"`config` {config_names}: ", _replaced(given, sampler))
    if recommended or known:  # the first parse found the network, this one has the new defaults
        flags = p.parse(arguments)
    guidances = {
        name: with_default_classifier(from_namespace(entry.settings_class, flags[name], f"{name}."), source.model)
        for name, entry in GUIDANCES.items()
    }
    return SampleConfig(
        source=source,
        output=Path(flags.get("output", "samples")),
        compare=flags.get("compare", False),
        exports=tuple(name.strip() for name in flags.get("exports", "").strip("[]").split(",") if name.strip()),
        samples=from_namespace(RunSettings, flags),
        sampler=from_namespace(SamplerSettings, flags),
        guidances=guidances,
        devices=from_namespace(DeviceSettings, flags.trainer, "trainer."),
        progress=flags.progress,
        dry_run=flags.get("dry_run", False),
    )


def _weights_of(sampling: Mapping[str, Any], flags: Namespace) -> tuple[str | None, str | None]:
    """Return the weight file of a config and which of its weights; None where flags name the network.

    A file without settings of its own is used beside --model, which names its architecture.

    Raises:
        UserError: they are no texts.
    """
    for name in ("checkpoint", "weights"):
        value = sampling.get(name)
        require(value is None or isinstance(value, str), f"`{name}` in a config must be a text, got {value!r:.60}.")
    checkpoint, weights = sampling.get("checkpoint"), sampling.get("weights")
    if flags.checkpoint or (flags.model and checkpoint and read_metadata(Path(checkpoint))):
        return None, None
    return checkpoint, weights


def _replaced(names: Set[str], sampler: str | None) -> Set[str]:
    """Return the names of settings that given ones replace: eta, too, where the given sampler is not DDIM."""
    return names if sampler in (None, "ddim") else names | {"eta"}


def _without(values: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    """Return settings without those of these names, such as sag.scale, which flags replace."""
    rest = {name: value for name, value in values.items() if name not in names}
    for group, value in rest.items():
        if isinstance(value, dict):
            rest[group] = {name: part for name, part in value.items() if f"{group}.{name}" not in names}
    return rest


# ---------------------------------------------------------------------------------------------- recommendations


def is_recommendable(name: str) -> bool:
    """Return whether a weight file may recommend a setting: it may set the chain, the labels and the guidance."""
    return name in {"labels", *field_names(SamplerSettings), *GUIDANCES}


def recommended_settings(model: str | None, checkpoint: Path | None) -> dict[str, Any]:
    """Return the sampling settings that the weight file or the config of a released network recommends."""
    if checkpoint is not None and (recommended := read_metadata(checkpoint).get("recommended")):
        return dict(recommended)
    config = RELEASED[model].config if model in RELEASED else None
    settings = sampling_settings(read_config(config)) if config else {}
    return {name: value for name, value in settings.items() if is_recommendable(name)}


# ------------------------------------------------------------------------------------------------------- config


def sampling_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a config that `sagl sample` reads, in the form of its flags.

    Raises:
        UserError: a key is unknown, or a group is not a mapping.
    """
    for key in config:
        known = SAMPLING_KEYS | TRAINING_KEYS
        require(key in known, f"a config has no setting {key!r}.{suggest(str(key), known)}")
    for group in ("trainer", "data", "model"):
        value = config.get(group) or {}
        require(isinstance(value, dict), f"`{group}` in a config must be a mapping of settings, got {value!r:.60}.")
    empty_groups = {key for key in GUIDANCES if config.get(key) is None}
    settings = {key: value for key, value in config.items() if key in SAMPLING_KEYS - empty_groups}
    compare = settings.get("compare", False)
    require(isinstance(compare, bool), f"`compare` must be true or false, got {compare}.")
    settings |= {key: to_text(settings[key]) for key in ("labels", "respacing", "exports") if key in settings}
    devices = dict(_device_settings(config.get("trainer") or {}))
    return settings | ({"trainer": devices} if devices else {})


def _device_settings(trainer: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a config's `trainer` that sampling shares with training.

    Raises:
        UserError: a key is similar to one of them.
    """
    names = field_names(DeviceSettings)
    for key, value in trainer.items():
        similar = get_close_matches(str(key), names, n=1, cutoff=0.8)
        require(
            key in names or not similar,
            f"there is no setting 'trainer.{key}'. Did you mean trainer.{similar and similar[0]}?",
        )
        if key not in names or value is None or (key == "precision" and _is_mixed(str(value))):
            continue
        if key == "precision":
            yield key, f"{value}-true" if str(value) == "32" else value
        elif key == "accelerator":
            yield key, "gpu" if value == "cuda" else value
        else:
            yield key, to_text(value) if key == "devices" else value


def _is_mixed(precision: str) -> bool:
    """Return whether a precision of Lightning is a mixed one, which is for training only."""
    return precision.endswith("-mixed") or precision in ("16", "bf16")


def model_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings objects of a config's `model`; network and classifier may be names instead.

    Raises:
        UserError: a key is unknown, or a value is invalid.
    """
    model = config.get("model") or {}
    require(isinstance(model, dict), f"`model` in a config must be a mapping, got {model!r:.60}.")
    for key in model:
        known = [f"model.{name}" for name in sorted(MODEL_KEYS)]
        require(key in MODEL_KEYS, f"there is no setting 'model.{key}'.{suggest(f'model.{key}', known)}")
    return {
        name: model[name] if isinstance(model[name], str) else _build_group(cls, model[name], name)
        for name, cls in MODEL_GROUPS.items()
        if model.get(name) is not None
    }


def _build_group(cls: type, values: Any, name: str) -> Any:  # noqa: ANN401 (a mapping -> an instance of cls)
    require(isinstance(values, dict), f"`model.{name}` must be a mapping of settings, got {values!r:.60}.")
    p = Parser("sample", name)
    p.add_class_arguments(cls, f"model.{name}")
    return from_namespace(cls, p.parse_object({"model": {name: values}}).model[name])


# ----------------------------------------------------------------------------------------------------- defaults


def set_recommended_defaults(p: Parser, recommended: Mapping[str, Any], replaced: Set[str] = frozenset()) -> None:
    """Make recommended settings the defaults of the parser of `sagl sample`, but for the names in `replaced`.

    Raises:
        UserError: they are not settings of `sagl sample`, or may not be recommended.
    """
    for name in recommended:
        require(
            is_recommendable(name),
            f"`recommended` settings of a weight file may set sampler, labels and guidance, but not {name}. Replace "
            "them: sagl convert FILE NEW_FILE --recommended JSON.",
        )
    source = f"`recommended` must be settings of sagl sample, got {dict(recommended)}: "
    _set_defaults(p, dict(recommended), source, replaced)


def _set_defaults(p: Parser, values: dict[str, Any], source: str, replaced: Set[str]) -> None:
    """Check settings and make them the parser's defaults, but for the names in `replaced`.

    Messages begin with `source`. Settings that contradict each other are left to the end if some of them are replaced.
    """
    if not values:
        return
    rest = _without(values, replaced)
    try:
        for group in _groups():
            value = values.get(group, {})
            require(isinstance(value, dict), f"`{group}` must be a mapping of settings, got {value!r}.")
        namespace = p.parse_object(rest)
        if rest == values:
            from_namespace(RunSettings, namespace)
            from_namespace(SamplerSettings, namespace)
            for group, cls in _groups().items():
                from_namespace(cls, namespace[group], f"{group}.")
    except UserError as error:
        raise UserError(f"{source}{error}") from error
    if rest:
        p.set_defaults(rest)
