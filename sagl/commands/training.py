"""LightningCLI: what `sagl fit`, `validate` and `test` do once their command line is more than a question."""

import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from sagl.callbacks.best_checkpoints import BestCheckpoints
from sagl.callbacks.ema import EMA, ExtraEMAs
from sagl.callbacks.last_checkpoint import ResumableCheckpoint
from sagl.callbacks.loss_table import LossTable
from sagl.callbacks.sag_sampling import SAGSampling
from sagl.commands.parser import UserErrorParser, field_names, parse_interval_arg
from sagl.commands.request import packaged_config, read_config
from sagl.errors import UserError, require
from sagl.guidance.registry import GUIDANCES
from sagl.models.checkpoints import load_training_checkpoint, read_state_dict
from sagl.models.loading import load
from sagl.models.transfer import load_pretrained_weights
from sagl.modules.classifier_module import ClassifierModule
from sagl.modules.diffusion_module import DiffusionModule
from sagl.modules.training_module import TrainingModule
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.sampling import SamplerSettings
from sagl.settings.training import CheckpointSettings, PreviewSettings
from sagl.utils.environment import disable_malloc_trim, set_threads

OF_DRAWING = {"preview", *field_names(SamplerSettings), *GUIDANCES}
"""Top-level settings that a classifier has no use for."""
UNASKED = ("💡 Tip", "TPU available: False", "`weights_only` was not set")
"""Beginnings of Lightning's lines that no user of ours can act on."""


class SaveConfig(SaveConfigCallback):
    """Writes the whole configuration to OUTPUT/config.yaml."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Once, on rank 0; a resumed run writes the configuration that it resumes with. Only training has a folder."""
        if stage != "fit":
            return
        path = Path(trainer.default_root_dir) / "config.yaml"
        partial = path.with_suffix(".partial")
        self.parser.save(self.config, partial, skip_none=False, overwrite=True, multifile=False)
        os.replace(partial, path)


class FitParser(UserErrorParser, LightningArgumentParser):
    """Lightning's parser, whose refusals are one line."""


class FitCLI(LightningCLI):
    """LightningCLI whose run folder, checkpoint and averages are decided in one place."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:  # noqa: ANN401 (Lightning's own)
        """Parsers that raise, so that a refusal is one line (see `sagl.cli`)."""
        return super().init_parser(**{**kwargs, "exit_on_error": False, "allow_abbrev": False})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The flags that are not the trainer's, the model's or the data's."""
        parser.add_argument("--output", type=str, default=None, help="Folder for config, logs and checkpoints.")
        parser.add_argument("--resume", action="store_true", help="Go on from OUTPUT/checkpoints/last.ckpt, if there.")
        parser.add_argument("--checkpoint", type=str, default=None, help="Begin from these weights: a file or a name.")
        parser.add_argument("--weights", type=str, default="ema", help="Of a .ckpt: ema, ema:DECAY or raw.")
        parser.add_class_arguments(CheckpointSettings, as_group=True)
        if not self.draws:
            return
        parser.add_class_arguments(PreviewSettings, "preview")
        parser.add_class_arguments(SamplerSettings, as_group=True)
        for group, entry in GUIDANCES.items():
            parser.add_class_arguments(entry.settings_class, group)

    def instantiate_classes(self) -> None:
        """Build all that is asked for.

        Raises:
            UserError: settings refuse their values, which the parser hides where a name could stand instead of them.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise

    @property
    def draws(self) -> bool:
        """Whether what is trained makes images, which are previewed and for which its checkpoints give advice."""
        return self.model_class is DiffusionModule

    @property
    def output(self) -> Path:
        """The run folder.

        Raises:
            UserError: none was given.
        """
        folder = self._get(self.config, "output")
        require(folder is not None, "`output` must be a folder, and none was given. Add --output DIR.")
        return Path(folder)

    @property
    def last_checkpoint(self) -> Path:
        """What a resume reads."""
        return self.output / "checkpoints" / "last.ckpt"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:  # noqa: ANN401 (Lightning's own)
        """A trainer that writes into the run folder only, and to validate and test nowhere.

        Raises:
            UserError: the folder holds a run, and --resume was not given; or its checkpoint cannot be read.
        """
        require(
            self._get(self.config, "ckpt_path") is None,
            "`ckpt_path` is not for sagl: --resume goes on from the run in --output, and --checkpoint reads a file.",
        )
        kwargs["use_distributed_sampler"] = False  # the data modules give every rank its share
        if self.subcommand != "fit":
            kwargs |= {"callbacks": [*([self._drawing()] if self.draws else []), LossTable()], "logger": False}
            logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
            return super().instantiate_trainer(**kwargs)
        self._require_new()
        kwargs |= {"default_root_dir": str(self.output), "callbacks": self._callbacks()}
        if SLURMEnvironment.detect() and self._get(self.config_init, "trainer.plugins") is None:
            kwargs["plugins"] = SLURMEnvironment(auto_requeue=False)  # --resume is exact, Lightning's own way is not
        if self._get(self.config_init, "trainer.logger") is None:
            kwargs["logger"] = TensorBoardLogger(self.output, name="logs", version="")
        return super().instantiate_trainer(**kwargs)

    def _require_new(self) -> None:
        """Refuse a folder that holds a run, unless it is to go on, and then one whose checkpoint is damaged.

        Raises:
            UserError: either.
        """
        resume = self._get(self.config, "resume")
        require(
            resume or not self.last_checkpoint.exists(),
            f"`output` must be a new folder, and {self.output} holds a run. Add --resume to go on, or choose another.",
        )
        if resume and self.last_checkpoint.exists():
            load_training_checkpoint(self.last_checkpoint)  # refused here, in one line, or it can be read

    def _sampling(self) -> dict[str, Any]:
        """The sampling settings of the config, as `sagl sample` advises them."""
        chain = {name: self._get(self.config, name) for name in field_names(SamplerSettings)}
        return chain | {group: self._group(group, entry.settings_class) for group, entry in GUIDANCES.items()}

    def _callbacks(self) -> list[Any]:
        s = CheckpointSettings(**{name: self._get(self.config, name) for name in field_names(CheckpointSettings)})
        kept = [EMA(s), ExtraEMAs(s), ResumableCheckpoint(self.last_checkpoint, s)]
        if not self.draws:
            return kept
        return [self._drawing(), BestCheckpoints(self.last_checkpoint.parent, self._previews), *kept]

    @property
    def _previews(self) -> PreviewSettings:
        return PreviewSettings(**self._group("preview", PreviewSettings))

    def _drawing(self) -> SAGSampling:
        """Previews; outside of training only their numbers, for nothing is written."""
        sag = SelfAttentionGuidance(**self._group("sag", SelfAttentionGuidance))
        if self.subcommand == "fit":
            return SAGSampling(self.output, self._previews, sag)
        return SAGSampling(Path(), replace(self._previews, num_samples=0), sag)

    def _group(self, group: str, kind: type) -> dict[str, Any]:
        """The settings of one group of the config."""
        return {name: self._get(self.config, f"{group}.{name}") for name in field_names(kind)}

    def before_fit(self) -> None:
        """Resume where there is something to resume; checkpoints say how their network is best sampled from."""
        self.model.hparams["ema_decay"] = self._get(self.config, "ema_decay")
        self.model.hparams["recommended"] = self._sampling() if self.draws else {}
        resumed = self._get(self.config, "resume") and self.last_checkpoint.exists()
        checkpoint = self._get(self.config, "checkpoint")
        if checkpoint and not resumed:
            self._start_from(checkpoint)
        self.config_init["fit"]["ckpt_path"] = str(self.last_checkpoint) if resumed else None
        self.config_init["fit"]["weights_only"] = True

    def before_validate(self) -> None:
        """The weights of --checkpoint.

        Raises:
            UserError: there are none, or of another shape.
        """
        checkpoint = self._get(self.config, "checkpoint")
        require(
            checkpoint is not None,
            "`checkpoint` must be weights to look at, and none were given. Add --checkpoint FILE_OR_NAME, or say "
            f"whose: sagl {self.subcommand} RUN.",
        )
        self.config_init[self.subcommand]["verbose"] = False  # the table is ours
        self._start_from(checkpoint)

    before_test = before_validate

    def _start_from(self, checkpoint: str) -> None:
        """Weights of a file, or of a released network by name, as the first weights.

        Raises:
            UserError: it cannot be read, or is of another shape.
        """
        path, weights = Path(checkpoint), self._get(self.config, "weights")
        named = path.suffix not in (".pt", ".ckpt", ".safetensors") and not path.is_file()
        state = load(checkpoint, weights).state_dict if named else read_state_dict(path, weights)
        if said := load_pretrained_weights(self.model.network, state):
            print(said)


def with_packaged(arguments: list[str]) -> list[str]:
    """The command line with names of packaged configs as their paths: --config lsun_cat."""
    named = [str(packaged_config(a)) if before == "--config" else a for before, a in pairwise(["", *arguments])]
    return parse_interval_arg(named)


def of_run(arguments: list[str]) -> list[str]:
    """A run's folder in first place as its configuration and its averaged weights; later flags win.

    Raises:
        UserError: it is no run.
    """
    if not arguments or arguments[0].startswith("-"):
        return arguments
    run = Path(arguments[0])
    config, checkpoint = run / "config.yaml", run / "checkpoints" / "last.ckpt"
    require(
        config.is_file() and checkpoint.is_file(),
        f"`run` must be a folder that sagl fit wrote, with config.yaml and checkpoints/last.ckpt, not {run}.",
    )
    return ["--config", str(config), "--checkpoint", str(checkpoint), "--weights", "ema", *arguments[1:]]


def module_for(arguments: list[str]) -> type[TrainingModule]:
    """What a command line trains: a classifier if it or a config sets model.classifier, else a network that draws.

    Raises:
        UserError: they set model.network too, or what only a network that draws has a use for.
    """
    said = sorted(_settings_named(arguments))
    of_model = {name.split(".")[1] for name in said if name.startswith("model.")}
    if "classifier" not in of_model:
        return DiffusionModule
    require("network" not in of_model, "`model` must have a network or a classifier, got both. Leave one out.")
    drawing = [name for name in said if name.split(".")[0] in OF_DRAWING]
    require(
        not drawing,
        f"`{drawing and drawing[0]}` is for networks that draw, and model.classifier does not. Leave it out.",
    )
    return ClassifierModule


def _settings_named(arguments: list[str]) -> Iterator[str]:
    """Settings by their flags, and of the configs those at the top and of the model: sag.scale; sag, model.network."""
    for before, argument in pairwise([*arguments, ""]):
        flag, equals, value = before.partition("=")
        if flag in ("--config", "-c") and (equals or argument):
            config = read_config(value if equals else argument)
            model = config.get("model")
            yield from map(str, config)
            yield from (f"model.{name}" for name in (model if isinstance(model, dict) else {}))
        elif flag.startswith("--"):
            yield flag.removeprefix("--")


def _told(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(UNASKED)


def run_lightning(verb: str, arguments: list[str]) -> None:
    """Run one of LightningCLI's verbs, fit, validate or test, on a command line of ours.

    Raises:
        UserError, ArgumentError: the settings cannot be met; nothing has been written.
    """
    disable_malloc_trim()
    set_threads()
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    # sys.argv must stay as it is, for the launcher of further processes runs it again
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # Lightning's own use of torch
    for handler in logging.getLogger("lightning.pytorch").handlers:
        handler.addFilter(_told)
    FitCLI(
        module_for(arguments),
        LightningDataModule,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        save_config_kwargs={"save_to_log_dir": False},
        auto_configure_optimizers=False,
        seed_everything_default=False,
        trainer_defaults={"enable_model_summary": False},
        parser_kwargs={"prog": "sagl"},
        parser_class=FitParser,
        args=[verb, *with_packaged(arguments)],
    )
