"""The machine that `gpu_check` checks: its commands, and how results are reported."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sagl.models.adm import UNet
from sagl.models.checkpoints import NetworkWeights, write_checkpoint
from sagl.sampling.run_folder import SAMPLES, decode_png, iter_samples
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import UNetSettings
from sagl.utils.environment import has_fast_bfloat16

NUM_IMAGES = 64
SMALL = UNetSettings(
    image_size=16,
    num_channels=32,
    num_res_blocks=1,
    channel_mult=(1, 2),
    num_head_channels=32,
    attention_resolutions=(16, 8),
)
"""The network of --small."""


def popen(arguments: tuple[object, ...]) -> "subprocess.Popen[bytes]":
    """Start a command of sagl without output."""
    command = [sys.executable, "-m", "sagl.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@dataclass(frozen=True)
class Machine:
    """What is checked, and how results are reported."""

    device: torch.device
    small: bool
    folder: Path
    lines: list[str] = field(default_factory=list)
    """Results that have been reported."""

    @property
    def is_gpu(self) -> bool:
        """Whether a GPU is checked."""
        return self.device.type == "cuda"

    @property
    def has_fast_16_bits(self) -> bool:
        """Whether 16 bits are fast enough to be checked: on GPUs, and on CPUs with bfloat16 instructions."""
        return self.is_gpu or has_fast_bfloat16()

    @property
    def num_processes(self) -> int:
        """Processes of checks with several: one per GPU, at most 8; 2 on a CPU."""
        return min(torch.cuda.device_count(), 8) if self.is_gpu else 2

    def check(self, passed: bool, name: str, details: object = "") -> None:
        """Report a result that is right or wrong."""
        self._print("PASS" if passed else "FAIL", name, details)

    def report(self, name: str, details: object) -> None:
        """Report a number."""
        self._print("INFO", name, details)

    def skip(self, name: str, reason: str) -> None:
        """Report what this machine cannot check."""
        self._print("SKIP", name, reason)

    def wait(self) -> None:
        """Wait for the GPU."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def _print(self, kind: str, name: str, details: object) -> None:
        self.lines.append(f"{kind} {name}{f': {details}' if str(details) else ''}")
        print(self.lines[-1], flush=True)

    def run(self, *arguments: object, limit: int = 300, **variables: str) -> "Result":
        """Run a command of sagl; variables are added to the environment."""
        command = [sys.executable, "-m", "sagl.cli", *map(str, arguments)]
        environment = os.environ | variables
        start_time = time.monotonic()
        try:
            process = subprocess.run(
                command, capture_output=True, text=True, timeout=limit, env=environment, check=False
            )
        except subprocess.TimeoutExpired:
            return Result(124, "", f"no end within {limit} s", limit)
        return Result(process.returncode, process.stdout, process.stderr, time.monotonic() - start_time)

    def sample(
        self, name: str, *flags: object, accelerator: str = "", devices: int = 1, limit: int = 300, **variables: str
    ) -> "Result":
        """Sample a few garments into a run folder."""
        size: tuple[object, ...] = (
            ("--num_samples", 4, "--batch_size", 2) if self.small else ("--num_samples", 8, "--batch_size", 4)
        )
        respacing = "ddim4" if self.small else "ddim10"
        trainer = ("--trainer.accelerator", accelerator or self.accelerator, "--trainer.devices", devices)
        sampler = ("--sampler", "ddim", "--respacing", respacing, "--exports", "images", "--progress", "off")
        images = ("--model", "fashion_mnist", *size, "--output", self.folder / name)  # it has a classifier, too
        return self.run("sample", *images, *sampler, *trainer, *flags, limit=limit, **variables)

    def fit(self, name: str, *flags: object) -> tuple[object, ...]:
        """Return the arguments of a short training on random images."""
        data = ("--data.root", write_images(self.folder), "--data.num_workers", 0 if self.small else 2)
        sizes = ("--data.batch_size", 8, "--data.num_validation", 8, "--trainer.val_check_interval", self.num_steps)
        preview = ("--preview.num_samples", 2, "--preview.batch_size", 4, "--preview.scales", "[0,0.3]")
        respacing = ("--preview.respacing", "ddim2" if self.small else "ddim5")
        trainer = ("--trainer.accelerator", self.accelerator, "--output", self.folder / name)
        network: tuple[object, ...] = ()  # that of the config
        if self.small:
            network = ("--checkpoint", write_small_network(self.folder), "--model.network", json.dumps(asdict(SMALL)))
        return ("fit", "--config", "my_images", *network, *trainer, *data, *sizes, *preview, *respacing, *flags)

    @property
    def accelerator(self) -> str:
        """Value of --trainer.accelerator."""
        return "gpu" if self.is_gpu else "cpu"

    @property
    def num_steps(self) -> int:
        """Optimiser steps of a short training."""
        return 2 if self.small else 20

    def images(self, name: str) -> np.ndarray:
        """Return the images of a run."""
        samples = iter_samples(self.folder / name)
        return np.stack([decode_png(sample.pngs[SAMPLES]) for sample in samples]).astype(int)


@dataclass(frozen=True)
class Result:
    """Result of a command."""

    code: int
    out: str
    err: str
    seconds: float

    def __str__(self) -> str:
        lines = [line for line in (self.err or self.out).strip().splitlines() if line.strip()]
        return f"{self.seconds:.0f} s, exit {self.code} {lines[-1][:200] if lines and self.code else ''}"


def random_unet(settings: UNetSettings) -> UNet:
    """Return a network with random weights, also where a new one has zeros and predicts zero."""
    torch.manual_seed(0)
    network = UNet(settings)
    for parameter in network.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.02)
    return network


def write_small_network(folder: Path) -> Path:
    """Return the file of the network of --small, which is written at the first call."""
    file = folder / "small.safetensors"
    if not file.exists():
        diffusion, weights = DiffusionSettings(noise_schedule="cosine"), random_unet(SMALL).state_dict()
        write_checkpoint(NetworkWeights(model_settings=SMALL, diffusion=diffusion, state_dict=weights), file)
    return file


def write_images(folder: Path) -> Path:
    """Return a folder of random images, which is made at the first call."""
    images = folder / "training_images"
    if not images.is_dir():
        images.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for k in range(NUM_IMAGES):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((48, 48)).save(images / f"{k}.png")
    return images
