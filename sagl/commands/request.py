"""What `sagl sample` is asked for: flags over a config over what the weights recommend over the fields' defaults."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml

from sagl.commands.parser import Parser, field_names, from_namespace, suggest
from sagl.errors import UserError, require
from sagl.guidance.registry import GUIDANCES
from sagl.models.metadata import check_same_network, read_metadata, settings_from_metadata
from sagl.models.zoo import (
    DEFAULT_CHECKPOINT,
    DEFAULT_CLASSIFIER,
    DEFAULT_MODEL,
    RELEASED,
    UNET_NAMES,
    get_unet_settings,
    name_from_filename,
)
from sagl.settings.diffusion import DiffusionSettings, LossSettings
from sagl.settings.guidance import ClassifierGuidance, GuidanceSettings
from sagl.settings.network import ClassifierSettings, UNetSettings
from sagl.settings.sampling import DeviceSettings, RunSettings, SamplerSettings, WeightPrecision
from sagl.settings.training import BlurAwareSettings, OptimizerSettings
from sagl.utils.files import packaged_configs

VIEWS = ("grid", "images", "npz", "strip")
ALL_VIEWS_UP_TO = 1000
"""Larger runs make only the views that are named."""
GROUPS: dict[str, type] = {
    **{name: entry.settings_class for name, entry in GUIDANCES.items()},
    "trainer": DeviceSettings,
}
OF_SAMPLE = {"checkpoint", "weights", "compare", "views", *GROUPS} - {"trainer"}
OF_SAMPLE |= {name for kind in (RunSettings, SamplerSettings) for name in kind.__dataclass_fields__}
"""Top-level keys of a config that `sagl sample` reads."""
OF_FIT = {
    "model",
    "trainer",
    "data",
    "preview",
    "seed_everything",
    "ema_decay",
    "extra_ema_decays",
    "save_every_steps",
    "save_every_minutes",
    "output",
    "resume",
    "ckpt_path",
    "weights_only",
}
"""Top-level keys of a config that are for `sagl fit`, or read here on their own."""
OF_MODEL = {"network", "classifier", "diffusion", "loss", "optimizer", "label_dropout", "blur_aware", "freeze"}
OF_MODEL |= {"max_nonfinite_batches", "seed"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a network comes from."""

    name: str | None
    """Of a released network, or of the embedded one."""
    checkpoint: Path | None
    """None: the released file of that name, fetched where it is not at hand."""
    network: UNetSettings | None
    """None: the file says."""
    diffusion: DiffusionSettings | None
    weights: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """A command line, checked as far as it can be without the network."""

    source: Source
    output: Path
    compare: bool
    views: tuple[str, ...]
    progress: Literal["auto", "bar", "lines", "off"]
    dry_run: bool
    run: RunSettings
    chain: SamplerSettings
    guidances: Mapping[str, GuidanceSettings]
    device: DeviceSettings

    @property
    def settings(self) -> dict[str, Any]:
        """All of the request that decides what an image is."""
        run = {name: value for name, value in asdict(self.run).items() if name not in ("num_samples", "batch_size")}
        return {
            "compare": self.compare,
            **run,
            **asdict(self.chain),
            **{name: asdict(guidance) for name, guidance in self.guidances.items()},
            "precision": self.device.precision,
            "weights": self.source.weights,
            **({"compile": True} if self.device.compile else {}),
        }

    @property
    def weight_precision(self) -> WeightPrecision:
        """The precision, once it has been chosen."""
        assert self.device.precision != "auto"
        return self.device.precision

    def views_of(self, num_samples: int) -> tuple[str, ...]:
        """The views to make: all but the strip up to 1,000 images, above that those that were named."""
        made = set(VIEWS[:3]) if num_samples <= ALL_VIEWS_UP_TO else set()
        return tuple(view for view in VIEWS if view in made | set(self.views))


def sample_parser() -> Parser:
    """The flags of `sagl sample`; their help is the fields' docstrings."""
    p = Parser("sample", "Draw images from a network, with self-attention guidance.")
    p.add_argument("--config", type=str, default=None, help="A .yaml file, or the name of a packaged one: lsun_cat.")
    p.add_argument("--model", type=str, default=None, help=f"A released network: {', '.join(UNET_NAMES)}.")
    p.add_argument("--checkpoint", type=str, default=None, help="A file: .safetensors, .ckpt or .pt.")
    p.add_argument("--weights", type=str, default=None, help="Of a .ckpt: ema (default), ema:DECAY or raw.")
    p.add_argument("--output", type=str, default="samples", help="Folder of the run.")
    p.add_argument("--compare", action="store_true", help="Add the unguided images at the same seeds, and the masks.")
    p.add_argument("--views", type=str, default="", help=f"Also make these of the shards: {','.join(VIEWS)}.")
    progress = Literal["auto", "bar", "lines", "off"]
    p.add_argument("--progress", type=progress, default="auto", help="auto: a bar on a terminal, else lines.")
    p.add_argument("--dry_run", action="store_true", help="Print cost, time and memory expected; write nothing.")
    p.add_settings(RunSettings)
    p.add_settings(SamplerSettings)
    for name, kind in GROUPS.items():
        p.add_settings(kind, name)
    return p


def parse(arguments: list[str]) -> Request:
    """A command line as a request.

    Raises:
        UserError: a flag, the config or the advice inside the weights is not to be understood.
    """
    p = sample_parser()
    first = p.parse(arguments)
    for name in ("config", "model", "checkpoint", "output"):
        require(first[name] != "", f"`{name}` must not be empty, got ''. Leave it out, or say which.")
    config = {} if first.config is None else read_config(first.config)
    model, sampling = model_part(config), sampling_part(config)
    require(
        "classifier" not in model,
        f"`config` must have a network that draws, and {first.config} has a classifier. Give that one's weights as "
        "--classifier.checkpoint, beside a network.",
    )
    checkpoint = first.checkpoint or sampling.get("checkpoint")
    weights = first.weights or sampling.get("weights") or "ema"
    source = find_source(first.model or model.get("network"), checkpoint, model.get("diffusion"), weights)
    advise(p, recommended_by(source))
    _as_defaults(p, sampling, f"`config` {first.config}")
    given = p.parse(arguments)
    return Request(
        source=source,
        output=Path(given.output),
        compare=given.compare,
        views=_views(given.views),
        progress=given.progress,
        dry_run=given.dry_run,
        run=from_namespace(RunSettings, given),
        chain=from_namespace(SamplerSettings, given),
        guidances={
            name: _with_embedded(from_namespace(entry.settings_class, given[name], f"{name}."), source)
            for name, entry in GUIDANCES.items()
        },
        device=from_namespace(DeviceSettings, given.trainer, "trainer."),
    )


def _with_embedded(guidance: GuidanceSettings, source: Source) -> GuidanceSettings:
    """Guide the embedded network by the embedded classifier if no other is named."""
    if not isinstance(guidance, ClassifierGuidance) or not guidance.scale or source.name != DEFAULT_MODEL:
        return guidance
    return replace(guidance, checkpoint=guidance.checkpoint or DEFAULT_CLASSIFIER)


# ------------------------------------------------------------------------------------------------------- source


def find_source(
    model: str | UNetSettings | None, checkpoint: str | None, diffusion: DiffusionSettings | None, weights: str
) -> Source:
    """A network by name, by settings or by file.

    Raises:
        UserError: no such name or file; settings without weights; weights that do not say whose they are.
    """
    path = None if checkpoint is None else Path(checkpoint)
    require(path is None or path.is_file(), f"`checkpoint` must be a file, and there is none at {path}.")
    require(path is None or os.access(path, os.R_OK), f"`checkpoint` must be a file that you may read, not {path}.")
    require(
        weights == "ema" or (path is not None and path.suffix == ".ckpt"),
        f"`weights` is for training checkpoints (.ckpt), got {weights} for another file. Leave it out.",
    )
    about = {} if path is None else read_metadata(path)
    if isinstance(model, UNetSettings) and path is None:
        raise UserError(
            "`model.network` says how the network is built, and no weights. Add --checkpoint FILE, "
            f"or leave out --config and give --model NAME: {', '.join(UNET_NAMES)}."
        )
    if model is None and path is not None and not about:
        model = _named_by_file(path)
    name = model if isinstance(model, str) else DEFAULT_MODEL if model is None and path is None else None
    if name == DEFAULT_MODEL:
        return Source(name=name, checkpoint=path or DEFAULT_CHECKPOINT, network=None, diffusion=None, weights=weights)
    network, process = get_unet_settings(name) if name else (model, None)
    assert not isinstance(network, str)
    if about and network is not None and path is not None:
        check_same_network(network, settings_from_metadata(about, path)[0], path)
        network = None  # the file says
    return Source(name=name, checkpoint=path, network=network, diffusion=diffusion or process, weights=weights)


def recommended_by(source: Source) -> dict[str, Any]:
    """Sampling settings that go with a network: those inside its file, or of the released network's config."""
    if source.checkpoint is not None and (inside := read_metadata(source.checkpoint).get("recommended")):
        return dict(inside)
    config = RELEASED[source.name].config if source.name in RELEASED else None
    return sampling_part(read_config(config)) if config else {}


def _named_by_file(path: Path) -> str | None:
    """The released network whose file is called so; None for training checkpoints, which carry their settings."""
    if path.suffix != ".pt":
        return None
    if (named := name_from_filename(path)) is None:
        raise UserError(
            f"`checkpoint` {path} does not say which network it is for. Add --model with one of "
            f"{', '.join(UNET_NAMES)}, or --config with a file whose model.network describes it."
        )
    return named


# ------------------------------------------------------------------------------------------------------- config


def read_config(name: str) -> dict[str, Any]:
    """A config by path, or by the name of a packaged one.

    Raises:
        UserError: there is none, or it is no mapping.
    """
    path = packaged_config(name)
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise UserError(f"`config` {path} is no YAML that can be read: {str(error).splitlines()[0]}.") from error
    if not isinstance(config, dict):
        raise UserError(f"`config` {path} must be a mapping of settings, got {config!r:.60}.")
    return config


def packaged_config(name: str) -> Path:
    """A config's path as it was given, or that of a packaged one by its name; a path goes first.

    Raises:
        UserError: there is neither.
    """
    packaged = sorted(path.stem for path in packaged_configs().glob("*.yaml"))
    path = Path(name) if Path(name).is_file() or name not in packaged else packaged_configs() / f"{name}.yaml"
    if not path.is_file():
        listed = ", ".join(packaged)
        raise UserError(f"`config` must be a .yaml file or one of {listed}, got {name}.{suggest(name, packaged)}")
    return path


def sampling_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that `sagl sample` reads, in the form of its flags.

    Raises:
        UserError: a key that neither `sample` nor `fit` knows.
    """
    for key in config:
        require(key in OF_SAMPLE | OF_FIT, f"a config has no setting {key!r}.{suggest(str(key), OF_SAMPLE | OF_FIT)}")
    part = {key: value for key, value in config.items() if key in OF_SAMPLE and not (key in GROUPS and value is None)}
    for group in ("trainer", "data", "model"):
        value = {} if config.get(group) is None else config[group]
        require(isinstance(value, dict), f"`{group}` in a config must be a mapping of settings, got {value!r:.60}.")
    part |= _device_part(config.get("trainer") or {})
    require(
        isinstance(part.get("compare", False), bool), f"`compare` must be true or false, got {part.get('compare')}."
    )
    for name in ("labels", "respacing"):
        if name in part:
            part[name] = _text(config[name])
    return part


def _device_part(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """What sampling reads of `trainer:`: where, and with which weights; a mixed precision is for training alone.

    Raises:
        UserError: a key that is nearly one of these.
    """
    names = field_names(DeviceSettings)
    for key in trainer:
        close = get_close_matches(str(key), names, n=1, cutoff=0.8)
        require(
            key in names or not close,
            f"there is no setting 'trainer.{key}'. Did you mean trainer.{close and close[0]}?",
        )
    read = {name: trainer[name] for name in names if trainer.get(name) is not None}
    if str(read.get("precision", "")).endswith("-mixed"):
        del read["precision"]
    if "devices" in read:
        read["devices"] = _text(read["devices"])
    return {"trainer": read} if read else {}


def model_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """`model:` of a config, each setting checked: network or classifier (a name or settings) and diffusion."""
    model = config.get("model") or {}
    require(isinstance(model, dict), f"`model` in a config must be a mapping, got {model!r:.60}.")
    for key in model:
        known = [f"model.{name}" for name in sorted(OF_MODEL)]
        require(key in OF_MODEL, f"there is no setting 'model.{key}'.{suggest(f'model.{key}', known)}")
    for name, kind in (("loss", LossSettings), ("optimizer", OptimizerSettings), ("blur_aware", BlurAwareSettings)):
        _group(kind, model.get(name) or {}, f"model.{name}")  # not read here, but a wrong one is refused
    part: dict[str, Any] = {}
    for name, described_by in (("network", UNetSettings), ("classifier", ClassifierSettings)):
        if (value := model.get(name)) is not None:
            part[name] = value if isinstance(value, str) else _group(described_by, value, f"model.{name}")
    if model.get("diffusion") is not None:
        part["diffusion"] = _group(DiffusionSettings, model["diffusion"], "model.diffusion")
    return part


def _group(kind: type, values: Any, where: str) -> Any:  # noqa: ANN401 (a mapping -> an instance of kind)
    require(isinstance(values, dict), f"`{where}` must be a mapping of settings, got {values!r:.60}.")
    p = Parser("sample", where)
    p.add_class_arguments(kind, where)
    nested = values
    for name in reversed(where.split(".")):
        nested = {name: nested}
    given = p.parse_object(nested)
    for name in where.split("."):
        given = given[name]
    return from_namespace(kind, given)


def _text(value: object) -> str:
    """A value of a text setting as a flag would have it: 250 -> "250", [0, 7] -> "0,7", nothing -> "null"."""
    return ",".join(map(str, value)) if isinstance(value, list) else "null" if value is None else str(value)


# ------------------------------------------------------------------------------------------------------- advice


def advise(p: Parser, recommended: Mapping[str, Any]) -> None:
    """Make recommended settings the parser's defaults.

    Raises:
        UserError: they are not settings of `sagl sample`.
    """
    try:
        _as_defaults(p, dict(recommended), "")
    except UserError as error:
        raise UserError(f"`recommended` must be settings of sagl sample, got {dict(recommended)}: {error}") from error


def _as_defaults(p: Parser, values: dict[str, Any], source: str) -> None:
    for group in GROUPS:
        require(
            isinstance(values.get(group, {}), dict),
            f"`{group}` must be a mapping of settings, got {values.get(group)!r}.",
        )
    try:
        given = p.parse_object(values)
        from_namespace(RunSettings, given), from_namespace(SamplerSettings, given)
        for group, kind in GROUPS.items():
            from_namespace(kind, given[group], f"{group}.")
    except UserError as error:
        raise UserError(f"{source}: {error}" if source else str(error)) from error
    p.set_defaults(values)


def _views(text: str) -> tuple[str, ...]:
    named = tuple(view.strip() for view in text.strip("[]").split(",") if view.strip())
    for view in named:
        require(view in VIEWS, f"`views` must be among {', '.join(VIEWS)}, got {view!r}.")
    return named
