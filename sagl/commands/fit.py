"""`sagl fit`: its own flags and a help of two screens; Lightning is loaded for the training alone."""

from sagl.commands.parser import Parser
from sagl.settings.diffusion import LossSettings
from sagl.settings.training import CheckpointSettings, OptimizerSettings

REST = """groups with more flags than fit here; a --config holds them best:
  --model.network NAME        a released network's settings by name, or each: --model.network.num_channels 128 …
  --model.diffusion.…         noise_schedule, num_timesteps, variance
                              or, in its place, --model.classifier: a classifier of noised images
  --data CLASS                sagl.data.folder.FolderData, …webdataset.ShardData, …lsun.LSUNData, …npz.NpzData,
                              …fashion_mnist.FashionMNISTData
  --data.…                    root, batch_size, num_workers, …: sagl fit --data.help CLASS lists those of a class
  --trainer.…                 any of Lightning's Trainer: devices, max_steps, precision, accumulate_grad_batches, …
  --preview.…                 num_samples, scales, num_metric_samples, keep_best, …: grids and distances at every validation
  --sampler, --sag.scale, …   as of sagl sample: written into the checkpoints, which advise them to it

sagl fit --help_all shows every flag."""


def fit_parser() -> Parser:
    """The flags that are sagl's own, for help and completion."""
    p = Parser("fit", "Train a network. Everything is written into one folder, from which --resume goes on.", REST)
    p.add_argument("--config", type=str, default=None, help="A .yaml file, or the name of a packaged one: lsun_cat.")
    p.add_argument("--output", type=str, default=None, help="Folder for config, logs and checkpoints.")
    p.add_argument("--resume", action="store_true", help="Go on from OUTPUT/checkpoints/last.ckpt, if there.")
    p.add_argument("--checkpoint", type=str, default=None, help="Begin from these weights: a file, or a name.")
    p.add_settings(CheckpointSettings)
    p.add_argument("--model.label_dropout", type=float, default=0.0, help="Share of images with the null label.")
    p.add_argument("--model.seed", type=int, default=0, help="Of first weights, noise, timesteps, dropped labels.")
    p.add_settings(OptimizerSettings, "model.optimizer")
    p.add_settings(LossSettings, "model.loss")
    return p


def main(arguments: list[str]) -> None:
    """Train: `sagl fit --config FILE --output DIR [--resume]`.

    Raises:
        UserError, ArgumentError: the settings cannot be met; nothing has been written.
    """
    if {"--help", "-h"} & set(arguments):
        print(fit_parser().format_help())
        return
    from sagl.commands.training import run_lightning

    run_lightning("fit", ["--help" if argument == "--help_all" else argument for argument in arguments])
