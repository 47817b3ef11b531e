"""Explained variance of direction heads of several shapes and of low-rank adapters, trained on the same chains.

    python benchmarks/head_shapes.py --groups 4 --steps 300

All predict SAG's direction on the bundled network of emoji, for chains without labels. An adapter evaluates the last
two output blocks a second time, with a low-rank change of the weights of their convolutions and linear layers (LoRA, Hu
et al. 2021, arXiv 2106.09685), and a head reads the result in place of the network's last feature map. `parameters`
counts trained ones. `operations` are those of head and adapted blocks, as a share of a network evaluation.
"""

import argparse
import copy
import logging
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from sagl.models.adm import UNet
from sagl.models.direction_head import DirectionHead, Pairs
from sagl.models.flops import flops_per_evaluation
from sagl.models.loading import load
from sagl.modules.direction_head_module import DirectionHeadModule
from sagl.modules.training_module import seeded_init
from sagl.sampling.direction_pairs import DirectionPairs
from sagl.settings.direction_head import DirectionHeadOptions, HeadTrainingSettings
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.network import HeadSettings
from sagl.settings.training import OptimizerSettings
from sagl.shapes import Image, Timestep
from sagl.training.direction_head import build_head_module

ADAPTED_BLOCKS = 2
"""Last output blocks that an adapter changes."""


class LowRank(nn.Module):
    """Parametrisation of a weight W as W + B A; B starts at zero."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        columns = weight[0].numel()
        self.a = nn.Parameter(torch.randn(rank, columns) / math.sqrt(columns))
        self.b = nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).view_as(weight)


class AdaptedHead(DirectionHead):
    """A head whose only feature map is that of the network with adapted last blocks."""

    def __init__(self, settings: HeadSettings, network: UNet, rank: int) -> None:
        super().__init__(replace(settings, map_channels=settings.map_channels[-1:]))
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.first_block = network.settings.output_blocks[-ADAPTED_BLOCKS]
        for block in self.network.output_blocks[-ADAPTED_BLOCKS:]:
            for layer in list(block.modules()):
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))

    def forward(self, images: Tensor, maps: Sequence[Tensor], timesteps: Timestep) -> Image:
        """Predict the direction; the last of `maps` is the input of the first adapted block."""
        x_t, block_input = images[:, : self.settings.in_channels], maps[-1].to(images.dtype)
        output = self.network(x_t, timesteps, start=(self.first_block, block_input), features=True)
        return super().forward(images, [output.features], timesteps)


class LastMapHead(DirectionHead):
    """A head that reads the last feature map alone."""

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__(replace(settings, map_channels=settings.map_channels[-1:]))

    def forward(self, images: Tensor, maps: Sequence[Tensor], timesteps: Timestep) -> Image:
        """Predict the direction from the last of `maps`."""
        return super().forward(images, maps[-1:], timesteps)


class StoredPairs:
    """Pairs of one round, sampled once, as the source of every training."""

    def __init__(self, source: DirectionPairs) -> None:
        self._levels = source.levels()
        self.training, self.validation = source.training_round(0), source.validation_pairs()

    def __deepcopy__(self, _: dict[int, Any]) -> "StoredPairs":
        return self

    def to(self, device: torch.device) -> None:
        """Leave the pairs on the CPU."""

    def levels(self) -> Tensor:
        """Return the sizes of direction and inputs by timestep."""
        return self._levels

    def training_round(self, index: int, rank: int, world_size: int) -> Pairs:
        """Return the pairs of the only round."""
        return self.training

    def validation_pairs(self, rank: int, world_size: int) -> Pairs:
        """Return the held-out pairs."""
        return self.validation

    def with_block_inputs(self, network: UNet, block: str) -> "StoredPairs":
        """Return the same pairs with the input of an output block in place of the maps."""
        stored = copy.copy(self)
        stored.training = _with_block_input(self.training, network, block)
        stored.validation = _with_block_input(self.validation, network, block)
        return stored


@torch.no_grad()
def _with_block_input(pairs: Pairs, network: UNet, block: str) -> Pairs:
    inputs = []
    for rows in torch.arange(len(pairs.timesteps)).split(64):
        x_t = pairs.images[rows, : network.settings.in_channels]
        inputs.append(network(x_t, pairs.timesteps[rows], block_inputs=[block]).block_inputs[block].half())
    return pairs._replace(maps=(torch.cat(inputs),))


def fit(module: DirectionHeadModule, head: DirectionHead, stored: StoredPairs, num_steps: int) -> float:
    """Train a head in place of that of `module`; return its explained variance on the held-out chains."""
    module.network, module.source = head, stored
    trainer = Trainer(
        max_steps=num_steps,
        accelerator="cpu",
        gradient_clip_val=1.0,
        val_check_interval=num_steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    return float(trainer.callback_metrics["val/r2"])


def operations(head: DirectionHead, pairs: Pairs) -> int:
    """Count the operations of a head for one image: its own, and those of adapted blocks."""
    row = pairs.select(torch.tensor([0]))
    with torch.no_grad(), FlopCounterMode(display=False, depth=10) as counter:
        head(row.images, row.maps, row.timesteps)
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    recomputed = sum(count for name, count in counts.items() if re.search(r"network\.input_blocks\.\d+$", name))
    return counts["Global"] - recomputed  # a sampler with an adapter would keep the skip connections


def main() -> None:
    """Train every shape and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=4, help="groups of chains for training")
    parser.add_argument("--steps", type=int, default=300, help="steps of the optimiser")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    optimizer = OptimizerSettings(
        learning_rate=2e-3, betas=(0.9, 0.99), warmup_steps=50, decay_steps=args.steps - 50, decay="cosine"
    )
    options = DirectionHeadOptions(num_groups=args.groups, group_size=16, num_validation_groups=4, null_fraction=1.0)
    training = HeadTrainingSettings(direction_head=options, optimizer=optimizer, seed=args.seed)
    sag = SelfAttentionGuidance(**load("emoji").recommended["sag"])
    build_module = partial(build_head_module, training, {"sag": sag}, "emoji", "ema")
    source = build_module().source
    assert isinstance(source, DirectionPairs)
    stored, network, settings = StoredPairs(source), source.pipeline.network, build_module().network.settings
    two_convolutions = replace(settings, depth=2)
    block_input_pairs = stored.with_block_inputs(network, network.settings.output_blocks[-ADAPTED_BLOCKS])
    shapes = {
        "all maps, 1 convolution": (lambda: DirectionHead(settings), stored),
        "all maps, 2 convolutions": (lambda: DirectionHead(two_convolutions), stored),
        "last map, 2 convolutions": (lambda: LastMapHead(two_convolutions), stored),
        f"adapters of rank {args.rank}, 2 convolutions": (
            lambda: AdaptedHead(two_convolutions, network, args.rank),
            block_input_pairs,
        ),
    }
    print(
        f"{len(stored.training.timesteps)} steps of {options.group_size * args.groups} chains, "
        f"{len(stored.validation.timesteps)} of {options.group_size * options.num_validation_groups} held-out ones"
    )
    print("| shape | parameters | operations | R² |\n|---|---|---|---|", flush=True)
    for name, (build, pairs) in shapes.items():
        head = seeded_init(build, args.seed)
        share = operations(head, pairs.validation) / flops_per_evaluation(network.settings)
        count = sum(p.numel() for p in head.parameters() if p.requires_grad)
        print(f"| {name} | {count:,} | {share:.1%} | {fit(build_module(), head, pairs, args.steps):.3f} |", flush=True)


if __name__ == "__main__":
    main()
