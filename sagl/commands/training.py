"""Training, validation and test with Lightning's Trainer, from a parsed configuration."""

import logging
import warnings
from contextlib import nullcontext
from pathlib import Path

from jsonargparse import Namespace

from sagl.callbacks.checkpointing import ResumableCheckpoint
from sagl.configuration.parser import Parser, from_namespace
from sagl.errors import require
from sagl.models.transfer import load_initial_weights
from sagl.modules.classifier_module import ClassifierModule
from sagl.modules.diffusion_module import DiffusionModule
from sagl.modules.direction_head_module import DirectionHeadModule
from sagl.settings.training import CheckpointSettings
from sagl.training.setup import prepare_evaluation, prepare_fit
from sagl.training.trainer import report_slow_precision
from sagl.utils.distributed import exit_when_parent_dies, global_rank, lightning_errors
from sagl.utils.environment import disable_tf32, refuse_out_of_memory, set_threads
from sagl.utils.files import NO_SPACE, file_errors
from sagl.utils.run_lock import lock_folder
from sagl.utils.signals import Interrupted, on_stop_signal

IGNORED_MESSAGES = ("💡 Tip", "TPU available: False", "`weights_only` was not set")
"""Prefixes of messages of Lightning that are not shown, because users cannot act on them."""
MEMORY_HINT = ("data.batch_size", "`model.use_checkpoint` saves memory, too. ")


def run(command: str, parser: Parser, config: Namespace) -> None:
    """Run `fit`, `validate` or `test`.

    Raises:
        UserError: the settings are not valid; nothing has been written.
    """
    disable_tf32()
    set_threads()
    if global_rank() > 0:
        exit_when_parent_dies()
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # Lightning's own use of torch
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # of a resumed run
    for handler in logging.getLogger("lightning.pytorch").handlers:
        handler.addFilter(lambda record: not record.getMessage().startswith(IGNORED_MESSAGES))
    if command != "fit":
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with lightning_errors():
        if command == "fit":
            require(config.output is not None, "`output` must be a folder, got none.")
            writes = global_rank() == 0 and not config.trainer.fast_dev_run
            with lock_folder(Path(config.output)) if writes else nullcontext():
                fit(parser, config)
            return
        trainer, module, data, _ = prepare_evaluation(parser, config, command)
        assert not isinstance(module, DirectionHeadModule)
        _load_weights(module, config)
        report_slow_precision(trainer.precision, trainer.strategy.root_device)
        with refuse_out_of_memory(*MEMORY_HINT):
            (trainer.validate if command == "validate" else trainer.test)(module, data, verbose=False)


def fit(parser: Parser, config: Namespace) -> None:
    """Train. The caller holds the folder.

    Raises:
        UserError: the settings are not valid, or the disk is full.
        Interrupted: a stop signal ended the training after a save.
    """
    trainer, module, data, resume_from = prepare_fit(parser, config, from_namespace(CheckpointSettings, config))
    if resume_from is None and not isinstance(module, DirectionHeadModule):
        _load_weights(module, config)
    report_slow_precision(trainer.precision, trainer.strategy.root_device)
    savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ResumableCheckpoint)]
    with (
        file_errors(Path(config.output), numbers=NO_SPACE),  # of a logger
        refuse_out_of_memory(*MEMORY_HINT),
        on_stop_signal(savers[0].request_stop if savers else _end_without_save, repeat_seconds=1.0),
    ):
        trainer.fit(module, data, ckpt_path=resume_from, weights_only=True)


def _end_without_save(number: int) -> None:
    """Handle a stop signal of a training that writes no checkpoints.

    Raises:
        Interrupted: always.
    """
    raise Interrupted(number, "the training has ended, and nothing of it was saved", is_lost=True)


def _load_weights(module: DiffusionModule | ClassifierModule, config: Namespace) -> None:
    """Load the weights of `checkpoint` if it is given, and say on rank 0 if they are random or were adapted."""
    messages = ["The training starts from random weights, as there is no checkpoint."]
    if config.checkpoint:
        messages = load_initial_weights(module.network, module.diffusion_settings, config.checkpoint, config.weights)
    for message in messages if global_rank() == 0 else ():
        print(message)
