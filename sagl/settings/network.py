"""Settings of the ADM networks, under the names of guided-diffusion's flags."""

from dataclasses import dataclass
from typing import Literal

from sagl.errors import require, require_choices, require_finite, require_range
from sagl.settings.diffusion import MAX_TIMESTEPS

Pool = Literal["attention", "adaptive", "spatial", "spatial_v2"]

DEFAULT_CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}
"""ADM's multipliers by image size (Dhariwal & Nichol 2021, appendix I)."""
LARGEST = {"image_size": 4096, "in_channels": 1024, "num_channels": 16_384, "num_res_blocks": 64, "num_heads": 65_536}
MAX_LEVELS, MAX_WIDTH, MAX_DEPTH, MAX_CLASSES = 12, 65_536, 256, 10_000_000
"""Limits that no network comes near. Settings in a file may be damaged, and are checked before a network is built."""


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """Settings that the UNet and the encoder classifier share."""

    image_size: int
    """Side of the square images in pixels."""
    in_channels: int = 3
    """Channels of an image."""
    num_channels: int = 128
    """Base width of the network, which channel_mult multiplies."""
    num_res_blocks: int = 2
    """Residual blocks per level."""
    channel_mult: tuple[float, ...] = ()
    """Width of each level as a multiple of num_channels; if empty, ADM's multipliers for the image size."""
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    """Sides in pixels of the feature maps that have self-attention (not downsampling factors)."""
    num_heads: int = 4
    """Number of attention heads, used if num_head_channels is not set."""
    num_head_channels: int | None = None
    """Channels per attention head; takes precedence over num_heads."""
    use_new_attention_order: bool = False
    """Order of the qkv channels: q, k, v before heads (true) or heads before q, k, v (false). Not in the weights."""
    use_scale_shift_norm: bool = True
    """Condition on the timestep by scale and shift after normalisation (true) or by addition (false)."""
    resblock_updown: bool = False
    """Resample inside residual blocks (true) or by separate layers (false)."""
    dropout: float = 0.0
    """Dropout probability in the residual blocks."""
    use_checkpoint: bool = False
    """Activation checkpointing: less memory, about a third more time."""

    def __post_init__(self) -> None:
        """Fill in ADM's multipliers.

        Raises:
            UserError: the network cannot be built.
        """
        for name in ("channel_mult", "attention_resolutions"):  # JSON and YAML have lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        require_finite(self)
        for name, largest in LARGEST.items():
            require_range(name, getattr(self, name), 1, largest)
        require(0.0 <= self.dropout < 1.0, f"`dropout` must be in [0, 1), got {self.dropout}.")
        if not self.channel_mult:
            require(
                self.image_size in DEFAULT_CHANNEL_MULT,
                f"`channel_mult` has defaults for `image_size` {', '.join(map(str, DEFAULT_CHANNEL_MULT))} only, got "
                f"{self.image_size}. Set it, for example channel_mult: [1, 2, 2].",
            )
            object.__setattr__(self, "channel_mult", DEFAULT_CHANNEL_MULT[self.image_size])
        self._check_levels()
        self._check_heads()

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(int(mult * self.num_channels) for mult in self.channel_mult)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Side of the feature maps of each level in pixels, finest first."""
        return tuple(self.image_size >> level for level in range(len(self.channel_mult)))

    def num_heads_for(self, channels: int) -> int:
        """Return the number of attention heads of a block with so many channels."""
        return channels // self.num_head_channels if self.num_head_channels else self.num_heads

    def _check_levels(self) -> None:
        require(
            len(self.channel_mult) <= MAX_LEVELS and all(abs(mult) <= MAX_WIDTH for mult in self.channel_mult),
            f"`channel_mult` must be at most {MAX_LEVELS} numbers up to {MAX_WIDTH}, got {self.channel_mult!s:.60}.",
        )
        factor = 1 << (len(self.channel_mult) - 1)
        require(
            self.image_size % factor == 0,
            f"`image_size` must be divisible by {factor} for {len(self.channel_mult)} levels, got {self.image_size}.",
        )
        _require_widths("`num_channels` times each of `channel_mult`", self.widths)
        missing = [side for side in self.attention_resolutions if side not in self.resolutions]
        require(
            not missing,
            f"`attention_resolutions` must be among the sides of the feature maps {self.resolutions}, got {missing}. "
            "They are sides in pixels, not downsampling factors.",
        )

    def _check_heads(self) -> None:
        """Check that heads divide the channels of every block with attention, including the middle block."""
        levels = zip(self.widths, self.resolutions, strict=True)
        widths = {width for width, side in levels if side in self.attention_resolutions} | {self.widths[-1]}
        names = ("num_head_channels",) if self.num_head_channels is not None else ("num_heads", "num_heads_upsample")
        for name in names:
            value = getattr(self, name, None)
            if value is None:
                continue
            require(value >= 1, f"`{name}` must be at least 1, got {value}. Leave it out for the default.")
            for width in sorted(widths):
                require(width % value == 0, f"`{name}` must divide {width}, a width with attention, got {value}.")


@dataclass(frozen=True, kw_only=True)
class UNetSettings(EncoderSettings):
    """Settings of the ADM UNet."""

    learn_sigma: bool = True
    """Predict the variance too, in as many output channels again."""
    num_classes: int | None = None
    """Number of classes of a class-conditional network; null: unconditional."""
    null_label: bool = False
    """Add a label embedding for "no label", for label dropout and classifier-free guidance."""
    degraded_embedding: bool = False
    """Add an embedding, initially zero, that marks degraded inputs (blur-aware training)."""
    num_heads_upsample: int | None = None
    """Number of attention heads in the output blocks, if different; num_head_channels takes precedence."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.num_classes is not None or not self.null_label,
            "`null_label` needs a class-conditional network, got num_classes None. Set `num_classes`.",
        )
        if self.num_classes is not None:
            require_range("num_classes", self.num_classes, 1, MAX_CLASSES)

    @property
    def needs_labels(self) -> bool:
        """True if every image must have a class label."""
        return self.num_classes is not None and not self.null_label

    @property
    def sites(self) -> dict[str, int]:
        """Blocks with attention, in the order of the forward pass, with the side of their feature maps in pixels."""
        inputs = [0]  # the first convolution, and each downsampling below, has no attention
        for level, side in enumerate(self.resolutions):
            inputs += [0] * (level > 0) + [side] * self.num_res_blocks
        outputs = [side for side in reversed(self.resolutions) for _ in range(self.num_res_blocks + 1)]
        return (
            {f"input.{k}": side for k, side in enumerate(inputs) if side in self.attention_resolutions}
            | {"middle": self.resolutions[-1]}
            | {f"output.{k}": side for k, side in enumerate(outputs) if side in self.attention_resolutions}
        )

    @property
    def output_blocks(self) -> list[str]:
        """Names of the output blocks; as many input blocks carry their skip connections, in reverse order."""
        return [f"output.{k}" for k in range(len(self.resolutions) * (self.num_res_blocks + 1))]

    @property
    def coarse_blocks(self) -> list[str]:
        """Names of the last output block of each resolution below that of the image, the coarsest first."""
        blocks_per_level = self.num_res_blocks + 1
        return self.output_blocks[blocks_per_level - 1 : -blocks_per_level : blocks_per_level]

    @property
    def map_channels(self) -> tuple[int, ...]:
        """Channels of the inputs of `coarse_blocks` without skip connections, and of the last convolution."""
        return self.widths[::-1]

    def require_output_block(self, name: str, *, group: str) -> None:
        """Check that the weak evaluation can start at an output block, `reuse_before`.

        Raises:
            UserError: lists the output blocks.
        """
        require(
            name in self.output_blocks,
            f"`{group}reuse_before` must be an output block, {self.output_blocks[0]} … {self.output_blocks[-1]}, or "
            f"null, got {name!r}.",
        )

    def require_site(self, name: str, heads: str = "layer", *, group: str = "", start: str | None = None) -> None:
        """Check that a block has attention, and that its channels can be split as `heads` says.

        Args:
            name: input.k, middle or output.k.
            heads: layer or sag_release.
            group: prefix of the parameters in the message, such as "sag.".
            start: output block at which the evaluation starts, so that deeper blocks are not computed.

        Raises:
            UserError: lists the blocks that have attention, with their resolutions.
        """
        sites = self.sites
        listed = ", ".join(f"{site} ({side}x{side})" for site, side in sites.items())
        require(
            name in sites,
            f"`{group}site` must be a block with attention: {listed}; got {name!r}. "
            "Output blocks are numbered from the coarsest resolution up.",
        )
        if start is not None:
            first, (part, _, index) = self.output_blocks.index(start), name.partition(".")
            computed = {
                "input": range(len(self.output_blocks) - first),
                "output": range(first, len(self.output_blocks)),
            }
            require(
                part in computed and int(index) in computed[part],
                f"`{group}site` must be a block that an evaluation from {start} on computes, got {name}. Set "
                f"`{group}reuse_before` to a deeper block or null.",
            )
        width = dict(zip(self.resolutions, self.widths, strict=True))[sites[name]]
        require(
            heads == "layer" or width % self.num_heads == 0,
            f"`{group}heads` sag_release needs a `num_heads` that divides the width of {name}, {width}; "
            f"got {self.num_heads}. Use layer.",
        )

    def num_heads_at(self, site: str, heads: str = "layer") -> int:
        """Return the number of attention heads of a block with attention, whose channels are split as `heads` says."""
        if heads == "layer" and not self.num_head_channels and site.startswith("output"):
            return self.num_heads_upsample or self.num_heads
        width = dict(zip(self.resolutions, self.widths, strict=True))[self.sites[site]]
        return self.num_heads if heads == "sag_release" else self.num_heads_for(width)


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings(EncoderSettings):
    """Settings of the classifier of noisy images: ADM's encoder, followed by a pooling."""

    num_classes: int = 1000
    """Number of classes."""
    num_head_channels: int | None = 64
    """Channels per attention head; required by the attention pool."""
    pool: Pool = "attention"
    """Pooling of the feature maps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("num_classes", self.num_classes, 1, MAX_CLASSES)
        require_choices(self)
        require(
            self.pool != "attention" or self.num_head_channels is not None,
            "`num_head_channels` must be set for pool: attention, got None. Set it, for example to 64.",
        )


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """Shape of a direction head, and the network that it belongs to."""

    method: str
    """Guidance method whose direction is predicted."""
    in_channels: int
    """Channels of an image."""
    map_channels: tuple[int, ...]
    """Channels of the network's feature maps that the head reads, one per resolution, the coarsest first."""
    has_mask: bool
    """True if the method has a mask, which is then among the inputs."""
    num_timesteps: int
    """Timesteps of the diffusion process."""
    width: int
    """Channels of the hidden convolutions at full resolution."""
    depth: int
    """Number of hidden convolutions at full resolution."""
    coarse_width: int
    """Channels of the hidden convolution at each resolution below that of the image."""
    network_rms: tuple[float, ...]
    """Root mean square of each of the network's tensors, in the order of their names."""

    def __post_init__(self) -> None:
        for name in ("map_channels", "network_rms"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists
        for name in ("in_channels", "width", "coarse_width"):
            require_range(name, getattr(self, name), 1, MAX_WIDTH)
        require_range("number of map_channels", len(self.map_channels), 1, MAX_LEVELS)
        _require_widths("each of `map_channels`", self.map_channels)
        require_range("depth", self.depth, 1, MAX_DEPTH)
        require_range("num_timesteps", self.num_timesteps, 1, MAX_TIMESTEPS)

    @property
    def num_images(self) -> int:
        """Number of image inputs: x_t, x0_hat and high-pass; with a mask also the masked high-pass."""
        return 4 if self.has_mask else 3

    @property
    def image_channels(self) -> int:
        """Channels of the image inputs and of the mask, if there is one."""
        return self.num_images * self.in_channels + self.has_mask


def _require_widths(name: str, widths: tuple[int, ...]) -> None:
    """Check that the group normalisation can divide the channels."""
    require(
        all(0 < width <= MAX_WIDTH and width % 32 == 0 for width in widths),
        f"{name} must be a positive multiple of 32 (groups of the normalisation), at most {MAX_WIDTH}, got "
        f"{widths!s:.60}.",
    )


NetworkSettings = UNetSettings | ClassifierSettings | HeadSettings
"""Settings of any kind of network."""


SETTINGS_CLASSES: dict[str, type[NetworkSettings]] = {
    "network": UNetSettings,
    "classifier": ClassifierSettings,
    "direction_head": HeadSettings,
}
"""Settings classes by their key in the metadata of a weight file, which has one of them."""
