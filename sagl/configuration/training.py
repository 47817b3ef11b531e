"""Command lines of `sagl fit`, `sagl validate` and `sagl test`: parser, and preparation of the arguments."""

import re
from argparse import SUPPRESS
from itertools import pairwise
from typing import Literal

from sagl.configuration.parser import Parser
from sagl.guidance.registry import GUIDANCES
from sagl.settings.direction_head import HeadTrainingSettings
from sagl.settings.sampling import SamplerSettings
from sagl.settings.training import (
    CheckpointSettings,
    ClassifierTrainingSettings,
    DiffusionTrainingSettings,
    PreviewSettings,
    TrainingSettings,
)
from sagl.utils.config_files import packaged_config, read_config

DESCRIPTIONS = {
    "fit": "Train a diffusion model, classifier or direction head. All goes into one folder; --resume continues there.",
    "validate": "Print the loss by range of timesteps, and bits/dim, on validation images. Nothing is written.",
    "test": "Print the loss by range of timesteps, and bits/dim, on test images. Nothing is written.",
}
EPILOGS = {
    "fit": f"""further groups of options, which are best set in a --config:
  --data CLASS                sagl.data.folder.FolderData, …webdataset.ShardData, …lsun.LSUNData, …npz.NpzData,
                              …fashion_mnist.FashionMNISTData, …emoji.EmojiData
  --data.…                    root, batch_size, num_workers, …: sagl fit --data.help CLASS lists those of a class
  --trainer.…                 arguments of Lightning's Trainer: devices, max_steps, precision, …
  --preview.…                 num_samples, scales, num_metric_samples, keep_best, …: grids and metrics at validation
  --model.blur_aware.…        training on degraded images
  --model.classifier …        settings of a classifier, in place of --model.network
  --sampler, --respacing, …   as in sagl sample; stored in checkpoints as recommended settings
  --METHOD.scale, …           METHOD: {", ".join(GUIDANCES)}

sagl fit --help_all shows every option.""",
    "validate": """RUN sets the config and the EMA weights. Flags and a further --config replace settings of the run.
All options of sagl fit are accepted too: --data.root, --data.num_validation, --preview.num_metric_samples, …""",
}
EPILOGS["test"] = EPILOGS["validate"]
SHORT_HELP = {
    "fit": (
        "config",
        "output",
        "resume",
        "checkpoint",
        "weights",
        "global_batch_size",
        *CheckpointSettings.__dataclass_fields__,
        "model.",
    ),
    "validate": ("config", "run", "checkpoint", "weights"),
    "test": ("config", "run", "checkpoint", "weights"),
}
"""Prefixes of the options that --help shows."""


Kind = Literal["network", "classifier", "direction_head"]
"""Kind of network that a training trains: the key below `model` that holds its settings."""
TRAINING_SETTINGS: dict[Kind, type[TrainingSettings]] = {
    "network": DiffusionTrainingSettings,
    "classifier": ClassifierTrainingSettings,
    "direction_head": HeadTrainingSettings,
}


def training_parser(command: str, *, kind: Kind = "network", full: bool = False) -> Parser:
    """Build the parser of `fit`, `validate` or `test`.

    Args:
        command: the subcommand.
        kind: what is trained.
        full: add `data` and `trainer`, for which Lightning is imported, and show all options in the help.
    """
    p = Parser(command, DESCRIPTIONS[command], EPILOGS[command])
    if command != "fit":
        p.add_argument("run", type=str, nargs="?", help="Folder of a run of sagl fit.")
    p.add_argument("--config", action="config", help="YAML file, or name of a packaged one, such as lsun_cat.")
    output = f"Folder for config, logs and checkpoints.{' (required)' if command == 'fit' else ''}"
    p.add_argument("--output", type=str, default=None, help=output)
    p.add_argument("--resume", action="store_true", help="Continue from OUTPUT/checkpoints/last.ckpt if it exists.")
    p.add_argument(
        "--checkpoint", type=str, default=None, help="Weights to start from or to evaluate: a file or a name."
    )
    p.add_argument("--weights", type=str, default="ema", help="Weights of a .ckpt to read: ema, ema:DECAY or raw.")
    global_batch = "Images per optimiser step of all processes, by accumulation."
    p.add_argument("--global_batch_size", type=int | None, default=None, metavar="N", help=global_batch)
    p.add_settings(CheckpointSettings)
    p.add_settings(TRAINING_SETTINGS[kind], "model")
    if kind == "network":
        p.add_settings(PreviewSettings, "preview")
        p.add_settings(SamplerSettings)
    if kind != "classifier":
        for name, entry in GUIDANCES.items():
            p.add_settings(entry.settings_class, name)
    if full:
        from lightning.pytorch import LightningDataModule, Trainer

        if kind != "direction_head":  # it learns from chains of its network
            p.add_subclass_arguments(LightningDataModule, "data", required=True, fail_untyped=False)
        p.add_class_arguments(Trainer, "trainer", instantiate=False, fail_untyped=False)
        p.set_defaults({"trainer.enable_model_summary": False})
        return p
    for action in p._actions:
        if not action.dest.startswith(("help", *SHORT_HELP[command])) or action.dest.startswith("model.blur_aware"):
            action.help = SUPPRESS
        if action.dest in ("model.optimizer", "model.loss") or action.dest.endswith(".help"):  # files; help of a class
            action.help = SUPPRESS
    return p


def put_configs_first(arguments: list[str]) -> list[str]:
    """Move the configs to the front, so that flags replace their settings, and replace packaged names by paths.

    Raises:
        UserError: there is no such config.
    """
    configs: list[str] = []
    others: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        flag, equals, value = argument.partition("=")
        if flag != "--config":
            others.append(argument)
            continue
        name = value if equals else next(remaining, None)
        if name is None:
            others.append(flag)  # the parser says that it needs a value
        else:
            configs += [flag, str(packaged_config(name))]
    return [*configs, *others]


def rename_network_flags(arguments: list[str]) -> list[str]:
    """Rename --model.network.use_checkpoint, which a named network does not have, to --model.use_checkpoint."""
    return [re.sub(r"^--model\.(network|classifier)\.use_checkpoint\b", "--model.use_checkpoint", a) for a in arguments]


def training_kind(arguments: list[str]) -> Kind:
    """Return what a command line, or one of its configs, describes below `model`.

    Raises:
        UserError: a config cannot be read.
    """
    configs = [read_config(argument) for before, argument in pairwise(["", *arguments]) if before == "--config"]
    models = [config.get("model") for config in configs]
    for kind in TRAINING_SETTINGS:
        if kind != "network" and (
            any(argument.startswith(f"--model.{kind}") for argument in arguments)
            or any(isinstance(model, dict) and kind in model for model in models)
        ):
            return kind
    return "network"
