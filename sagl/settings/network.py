"""Settings of the ADM networks, in guided-diffusion's flag names, as tuples and numbers."""

from dataclasses import dataclass
from typing import Literal

from sagl.errors import require

Pool = Literal["attention", "adaptive", "spatial", "spatial_v2"]
POOLS: tuple[Pool, ...] = ("attention", "adaptive", "spatial", "spatial_v2")

DEFAULT_CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}
"""ADM's own multipliers, used where `channel_mult` is left out (Dhariwal & Nichol 2021, appendix I)."""


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """What the UNet and the encoder classifier have in common."""

    image_size: int
    """Side of the square images, in pixels."""
    in_channels: int = 3
    """Channels of an image; a UNet's eps has as many."""
    num_channels: int = 128
    """Width of the first level, which the multipliers scale."""
    num_res_blocks: int = 2
    """Residual blocks a level."""
    channel_mult: tuple[float, ...] = ()
    """Width of each level as a multiple of num_channels; empty: ADM's own for the image size."""
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    """Sides, in pixels, of the feature maps that have self-attention."""
    num_heads: int = 4
    """Attention heads, where num_head_channels is not given."""
    num_head_channels: int | None = None
    """Channels a head; decides the number of heads from the width."""
    use_new_attention_order: bool = False
    """Split q, k, v before the heads (True) or after (False); not readable from the weights."""
    use_scale_shift_norm: bool = True
    """The timestep scales and shifts the normalised features (True) or is added to them (False)."""
    resblock_updown: bool = False
    """Resample inside residual blocks (True) or by plain convolutions (False)."""
    dropout: float = 0.0
    """Dropout probability in the residual blocks."""
    use_checkpoint: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""

    def __post_init__(self) -> None:
        """Fill in ADM's multipliers and refuse what cannot be built."""
        _tuples(self)
        _numbers(self)
        if not self.channel_mult:
            sizes = ", ".join(map(str, DEFAULT_CHANNEL_MULT))
            require(
                self.image_size in DEFAULT_CHANNEL_MULT,
                f"`channel_mult` has a default for image_size {sizes} only, got image_size={self.image_size}. "
                "Give the multipliers, for example channel_mult: [1, 2, 2].",
            )
            object.__setattr__(self, "channel_mult", DEFAULT_CHANNEL_MULT[self.image_size])
        _geometry(self)
        _heads(self)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(int(mult * self.num_channels) for mult in self.channel_mult)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Side of each level's feature maps in pixels, finest first."""
        return tuple(self.image_size >> level for level in range(len(self.channel_mult)))

    def heads_of(self, width: int) -> int:
        """Number of attention heads in a block of `width` channels."""
        return width // self.num_head_channels if self.num_head_channels else self.num_heads


@dataclass(frozen=True, kw_only=True)
class UNetSettings(EncoderSettings):
    """The ADM UNet."""

    learn_sigma: bool = True
    """The network also predicts the variance, in as many channels again."""
    num_classes: int | None = None
    """Classes of a class-conditional network; None: unconditional."""
    null_label: bool = False
    """The label embedding has one row more, for "no label" (label dropout, classifier-free guidance)."""
    degraded_embedding: bool = False
    """The network is told whether x_t was degraded (blur-aware training), by an embedding that is zero at the start."""
    num_heads_upsample: int | None = None
    """Heads of the output blocks, where they differ from num_heads; num_head_channels goes before."""

    def __post_init__(self) -> None:
        """Check what only a UNet has."""
        super().__post_init__()
        require(
            self.num_classes is not None or not self.null_label,
            "`null_label` needs a class-conditional network, got num_classes=None. Set num_classes.",
        )
        require(
            self.num_classes is None or self.num_classes >= 1,
            f"`num_classes` must be at least 1, got {self.num_classes}.",
        )

    @property
    def sites(self) -> dict[str, int]:
        """Blocks that have attention, with the side of their feature maps in pixels."""
        downs = [side for level, side in enumerate(self.resolutions) for side in self._level(side, level > 0)]
        ups = [side for side in reversed(self.resolutions) for side in [side] * (self.num_res_blocks + 1)]
        inputs = {f"input.{k}": side for k, side in enumerate([0, *downs]) if side in self.attention_resolutions}
        outputs = {f"output.{k}": side for k, side in enumerate(ups) if side in self.attention_resolutions}
        return {**inputs, "middle": self.resolutions[-1], **outputs}

    def require_site(self, name: str, heads: str = "layer") -> None:
        """Refuse a site that has no attention, or whose channels do not split as `heads` says.

        Raises:
            UserError: names the sites that have attention, with their resolutions.
        """
        sites = self.sites
        listed = ", ".join(f"{known} ({side}x{side})" for known, side in sites.items())
        require(
            name in sites,
            f"`site` must be a block with attention: {listed}; got {name!r}. "
            "Output blocks count from the coarsest resolution up.",
        )
        width = dict(zip(self.resolutions, self.widths, strict=True))[sites[name]]
        require(
            heads == "layer" or width % self.num_heads == 0,
            f"`heads` sag_release needs num_heads ({self.num_heads}) to divide {name}'s width {width}. Use layer.",
        )

    def _level(self, side: int, halved: bool) -> list[int]:
        """Sides of a level's input blocks; 0 for the halving, which never has attention."""
        return [0] * halved + [side] * self.num_res_blocks


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings(EncoderSettings):
    """The noisy-image classifier: ADM's encoder under one of four poolings."""

    num_classes: int = 1000
    """Number of logits."""
    num_head_channels: int | None = 64
    """Channels a head; the attention pool needs it."""
    pool: Pool = "attention"
    """How the feature maps become logits."""

    def __post_init__(self) -> None:
        """Check what only a classifier has."""
        super().__post_init__()
        require(self.num_classes >= 1, f"`num_classes` must be at least 1, got {self.num_classes}.")
        require(self.pool in POOLS, f"`pool` must be one of {', '.join(POOLS)}, got {self.pool!r}.")
        require(
            self.pool != "attention" or self.num_head_channels is not None,
            "`num_head_channels` is needed by pool: attention, got None. Give it, for example 64.",
        )


AnySettings = UNetSettings | ClassifierSettings
"""Of a network of either kind."""


def _tuples(s: EncoderSettings) -> None:
    """Lists become tuples: JSON and YAML have no others."""
    for name, value in vars(s).items():
        if isinstance(value, list):
            object.__setattr__(s, name, tuple(value))


def _numbers(s: EncoderSettings) -> None:
    """Sizes are positive, probabilities are probabilities."""
    for name in ("image_size", "in_channels", "num_channels", "num_res_blocks", "num_heads"):
        value = getattr(s, name)
        require(value >= 1, f"`{name}` must be at least 1, got {value}.")
    require(0.0 <= s.dropout < 1.0, f"`dropout` must be in [0, 1), got {s.dropout}.")


def _geometry(s: EncoderSettings) -> None:
    """Every level halves evenly, normalises in 32 groups, and attention is asked for where there is a level."""
    halvings = len(s.channel_mult) - 1
    require(
        s.image_size % (1 << halvings) == 0,
        f"`image_size` must be divisible by {1 << halvings} ({halvings} halvings in channel_mult), got {s.image_size}.",
    )
    require(
        all(width > 0 and width % 32 == 0 for width in s.widths),
        f"`num_channels` times each of `channel_mult` must be a multiple of 32 (group normalisation), got {s.widths}.",
    )
    absent = [side for side in s.attention_resolutions if side not in s.resolutions]
    require(
        not absent,
        f"`attention_resolutions` must be among the levels' sides {s.resolutions}, got {absent}. "
        "They are sides of feature maps in pixels, not downsampling factors.",
    )


def _heads(s: EncoderSettings) -> None:
    """Heads divide the width of every block that has attention; the middle always has it."""
    levels = zip(s.widths, s.resolutions, strict=True)
    attended = sorted({width for width, side in levels if side in s.attention_resolutions} | {s.widths[-1]})
    deciding = ("num_head_channels",) if s.num_head_channels is not None else ("num_heads", "num_heads_upsample")
    for name in deciding:
        value = getattr(s, name, None)
        if value is None:
            continue
        require(value >= 1, f"`{name}` must be at least 1 or left out, got {value}.")
        for width in attended:
            require(
                width % value == 0, f"`{name}` must divide the width {width} of a block with attention, got {value}."
            )
