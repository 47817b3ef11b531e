"""Networks, files and data so small that a test can train on them and draw from them."""

import struct

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from sagl import cli
from sagl.models.adm import Classifier, UNet, UNetOutput
from sagl.models.checkpoints import NetworkWeights, write_checkpoint
from sagl.models.cpu_kernels import optimize_for_cpu
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import ClassifierSettings, UNetSettings
from tests.helpers.reference import draw_weights

GREY = {"image_size": 8, "in_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": (1,)}
GREY |= {"attention_resolutions": (8,), "num_classes": 3, "null_label": True}
"""One grey channel, 8x8, three classes and a null label; attention at input.1, middle, output.0 and output.1."""
GREY_CLASSIFIER = {name: GREY[name] for name in GREY if name != "null_label"} | {"num_head_channels": 32}
"""A classifier of its images."""
COLOUR = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2)}
COLOUR |= {"attention_resolutions": (16, 8), "num_classes": 5, "null_label": True}
"""Three channels, 16x16, five classes and a null label; the last attention at 8x8 is at output.1."""

QUIET = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`isinstance.treespec, LeafSpec.` is deprecated",  # Lightning's own walk over batches
        "The '(train|val)_dataloader' does not have many workers",  # on purpose: the data are in memory
    )
]
"""What Lightning says of itself, or advises without need, in any short fit."""


class CalmUNet(UNet):
    """Predicts eps near x_t, as a trained network does where x_t is noise; drawn weights alone amplify rounding."""

    def forward(self, x, timesteps, labels=None, **told):
        out, attention = super().forward(x, timesteps, labels, **told)
        near = torch.cat([x, torch.zeros_like(out[:, x.shape[1] :])], dim=1)
        return UNetOutput(near + 0.1 * out, attention)


def calm_unet(**changes):
    """A small colour network with drawn weights whose chains stay tame."""
    return optimize_for_cpu(draw_weights(CalmUNet(UNetSettings(**{**COLOUR, **changes})), 1)).requires_grad_(False)


def grey_unet(**changes):
    """A tiny grey network with drawn weights."""
    return optimize_for_cpu(draw_weights(UNet(UNetSettings(**{**GREY, **changes})), 1)).requires_grad_(False)


def network_file(*, recommended=None, diffusion=None, **changes):
    """A tiny grey network as a `NetworkWeights`."""
    network = grey_unet(**changes)
    return NetworkWeights(
        model_settings=network.settings,
        diffusion=diffusion or DiffusionSettings(),
        state_dict=network.state_dict(),
        recommended=recommended or {},
    )


def write_tiny(path, **options):
    """A tiny network as safetensors; returns the path."""
    write_checkpoint(network_file(**options), path)
    return path


def grey_classifier(**changes):
    """A tiny grey classifier with drawn weights."""
    settings = {**GREY_CLASSIFIER, **changes}
    settings |= {"attention_resolutions": (settings["image_size"],)}
    return optimize_for_cpu(draw_weights(Classifier(ClassifierSettings(**settings)), 1))


def write_tiny_classifier(path, *, diffusion=None, **changes):
    """A tiny classifier of noisy grey 8x8 images as safetensors; returns the path."""
    classifier = grey_classifier(**changes)
    process = diffusion or DiffusionSettings()
    write_checkpoint(
        NetworkWeights(model_settings=classifier.settings, diffusion=process, state_dict=classifier.state_dict()), path
    )
    return path


def write_training_checkpoint(path, **changes):
    """The part of a training checkpoint that holds the network: raw weights, and averages that are half of them."""
    module = {f"network.{name}": tensor for name, tensor in grey_unet(**changes).state_dict().items()}
    settings = {"network": {**GREY, **changes}, "diffusion": {"noise_schedule": "cosine"}}
    half = {name: tensor / 2 for name, tensor in module.items()}
    torch.save({"hyper_parameters": settings, "state_dict": half, "current_model_state": module}, path)
    return path


def count_calls(network):
    """A list that grows by one entry with every pass of the network."""
    calls = []
    network.register_forward_pre_hook(lambda _, args: calls.append(args))
    return calls


# ------------------------------------------------------------------------------------------- the command line


def exit_code(*arguments):
    """The code that the command ends with, returned or raised."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


def contents(folder):
    """Every file below a folder: its bytes, and when it was written."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------------ data


def read_png(path):
    """(H, W, 3) or (H, W) uint8."""
    with PILImage.open(path) as picture:
        return np.asarray(picture)


def write_idx(path, array):
    """An array of bytes in the format of MNIST's files."""
    head = struct.pack(">I", 0x800 + array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(head + array.tobytes())


def write_fashion_mnist(root, *, train=200, test=40):
    """Random images and labels where, and as, torchvision looks for Fashion-MNIST; returns the raw folder."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("t10k", test)):
        write_idx(raw / f"{split}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(raw / f"{split}-labels-idx1-ubyte", rng.integers(0, 10, count, dtype=np.uint8))
    return raw


def write_config(folder, config, *, batch_size=4):
    """A configuration of a training, with such data of its own beside it; returns its file."""
    write_fashion_mnist(folder)
    init = {"root": str(folder), "batch_size": batch_size, "num_validation": 8}
    data = {"class_path": "sagl.data.fashion_mnist.FashionMNISTData", "init_args": init}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**config, "data": data}))
    return folder / "tiny.yaml"


# ---------------------------------------------------------------------------------------------------- training


def trainer(*, callbacks=(), **options):
    """A trainer that leaves no traces; it validates where it is told when."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": any(isinstance(c, LightningCheckpoint) for c in callbacks)}
    quiet |= {} if "val_check_interval" in options else {"limit_val_batches": 0}
    return Trainer(accelerator="cpu", max_epochs=-1, callbacks=list(callbacks), **quiet, **options)


class Line(LightningModule):
    """Two weights that go somewhere else at every step; remembers what they were."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        self.seen = {"train": [], "validation": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(self.weight.detach().clone())
        return (self.weight * batch).square().sum() + self.weight.sum() * (self.global_step % 3 - 1)

    def validation_step(self, batch, batch_idx):
        self.seen["validation"].append(self.weight.detach().clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


def line_data(count=100):
    """Batches of one, the same for every step, so that where an epoch begins makes no difference."""
    return DataLoader(torch.ones(count, 2), batch_size=1)


def fit_line(*, callbacks, ckpt_path=None, **options):
    """Fit a `Line`; returns it and its trainer."""
    line, run = Line(), trainer(callbacks=callbacks, **options)
    run.fit(line, line_data(), line_data(4), ckpt_path=ckpt_path)
    return line, run
