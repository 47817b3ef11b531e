"""The ADM UNet and its encoder classifier (Dhariwal & Nichol 2021), under OpenAI's parameter names.

Blocks are addressed as `input.k`, `middle` and `output.k`; output blocks count from the coarsest resolution up.
A network knows nothing of diffusion: it maps (x, timesteps, labels) to channels, and brings back the attention
that it was asked for.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sagl.errors import require
from sagl.models.attention import attention, attention_received, split_qkv, split_qkv_legacy
from sagl.models.channels import channel_affine, channel_moments
from sagl.models.winograd import Conv3x3
from sagl.settings.network import ClassifierSettings, EncoderSettings, UNetSettings
from sagl.shapes import AttentionSite, HeadLayout, Image, Labels, Timestep, TokenMap


class UNetOutput(NamedTuple):
    """What one pass brings back."""

    out: Tensor
    """(B, C or 2C, H, W) float32: eps, then the variance's channels where the network learns them."""
    attention: Mapping[AttentionSite, TokenMap]
    """Attention received at each site that was asked for, (B, head, H, W), mean 1."""


# ---------------------------------------------------------------------------------------------------- parts


def timestep_embedding(timesteps: Timestep, width: int) -> Tensor:
    """Cosines, then sines, of the timestep at geometric frequencies 1 … 1/10000: (B,) -> (B, width) float32."""
    half = width // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * exponents.exp()
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, width % 2))


class Norm(nn.GroupNorm):
    """Group normalisation in 32 groups, with the timestep's scale and shift folded into its own gain and offset."""

    def __init__(self, width: int) -> None:
        super().__init__(32, width)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """(B, C, …), (B, C), (B, C) -> the normalised x, times 1 + scale, plus shift."""
        fused = x.device.type != "cpu" or torch.compiler.is_compiling()  # which makes its own kernel
        return self._fused(x, scale, shift) if fused else self._composed(x, scale, shift)

    def _fused(self, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        """PyTorch's own. On a CPU its backward pass is slow, and its sums depend on the number of threads."""
        if scale is None or shift is None:
            return F.group_norm(x, 32, self.weight, self.bias, self.eps)
        if len(x) == 1:
            gain = 1 + scale[0]
            return F.group_norm(x, 32, self.weight * gain, self.bias * gain + shift[0], self.eps)
        return channel_affine(F.group_norm(x, 32, self.weight, self.bias, self.eps), 1 + scale, shift)

    def _composed(self, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        """Moments and one affine map, each with a backward pass of one multiply-add."""
        means, variances = (moment.unflatten(1, (32, -1)) for moment in channel_moments(x))
        mean = means.mean(dim=2)
        variance = variances.mean(dim=2) + means.var(dim=2, correction=0)
        share = self.num_channels // 32
        gain = (variance + self.eps).rsqrt().repeat_interleave(share, dim=1) * self.weight
        offset = self.bias - mean.repeat_interleave(share, dim=1) * gain
        if scale is not None and shift is not None:
            gain, offset = gain * (1 + scale), offset * (1 + scale) + shift
        return channel_affine(x, gain, offset)


class EvenLinear(nn.Linear):
    """A linear layer that computes whole eights of rows on a CPU: of others the sums' order depends on the threads."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) -> (B, C')."""
        over = -len(x) % 8 if x.device.type == "cpu" else 0
        return super().forward(F.pad(x, (0, 0, 0, over)))[: len(x)]


def silu(x: Tensor) -> Tensor:
    """Times its own sigmoid, in place of x where no gradient is wanted."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


Layer = TypeVar("Layer", bound=nn.Module)


def zero_module(layer: Layer) -> Layer:
    """The layer with its parameters at zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def zero_conv(width: int, out: int) -> Conv3x3:
    """A 3x3 convolution that begins at zero, so that its branch begins as nothing."""
    return zero_module(Conv3x3(width, out))


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2): a strided convolution, or the average of 2x2 pixels."""

    def __init__(self, width: int, *, learned: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1) if learned else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Half the side."""
        return self.op(x)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W): each pixel four times, with a convolution after it or not."""

    def __init__(self, width: int, *, learned: bool) -> None:
        super().__init__()
        self.conv = Conv3x3(width, width) if learned else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Twice the side."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class ResBlock(nn.Module):
    """Two convolutions beside a skip, told the timestep; may change width and, given `resample`, the side."""

    def __init__(self, s: EncoderSettings, width: int, out: int, resample: nn.Module | None = None) -> None:
        super().__init__()
        self.settings, self.resample = s, resample or nn.Identity()
        self.in_layers = nn.Sequential(Norm(width), nn.SiLU(), Conv3x3(width, out))
        self.emb_layers = nn.Sequential(nn.SiLU(), EvenLinear(4 * s.num_channels, out * (1 + s.use_scale_shift_norm)))
        self.out_layers = nn.Sequential(Norm(out), nn.SiLU(), nn.Dropout(s.dropout), zero_conv(out, out))
        self.skip_connection = nn.Identity() if width == out else Pointwise(width, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, C, H, W), (B, E) -> (B, C', H', W'); recomputed in the backward pass with `use_checkpoint`."""
        if self.settings.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        normalise, _, conv = self.in_layers
        h, told = conv(self.resample(silu(normalise(x)))), self.emb_layers(emb)
        normalise, _, drop, conv = self.out_layers
        if self.settings.use_scale_shift_norm:
            h = normalise(h, *told.chunk(2, dim=1))
        else:
            h = normalise(h + told[:, :, None, None].to(h.dtype))
        return conv(drop(silu(h))).add_(self.skip_connection(self.resample(x)))


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of a feature map, beside a skip (eq. 13, 14)."""

    def __init__(self, s: EncoderSettings, width: int, num_heads: int) -> None:
        super().__init__()
        self.settings, self.num_heads = s, num_heads
        self.split = split_qkv if s.use_new_attention_order else split_qkv_legacy
        self.norm = Norm(width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = zero_module(nn.Conv1d(width, width, 1))

    def forward(self, x: Tensor, asked: tuple[HeadLayout, ...] = ()) -> tuple[Tensor, list[TokenMap]]:
        """(B, C, H, W) -> the same shape, and the attention received for each head split asked for."""
        if self.settings.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, asked, use_reentrant=False)
        return self._forward(x, asked)

    def _forward(self, x: Tensor, asked: tuple[HeadLayout, ...]) -> tuple[Tensor, list[TokenMap]]:
        qkv = pointwise(self.qkv, self.norm(x)).flatten(2).mT
        attended = attention(*self.split(qkv, self.num_heads)).transpose(1, 2).flatten(2)
        out = pointwise(self.proj_out, attended.mT.unflatten(-1, x.shape[-2:]))
        return x + out, [self._received(qkv, heads, x.shape[-2:]) for heads in asked]

    def _received(self, qkv: Tensor, heads: HeadLayout, side: torch.Size) -> TokenMap:
        """As the layer splits its heads, or as the released SAG code does: `num_heads` of them, always legacy order."""
        released = heads == "sag_release"
        split, num_heads = (split_qkv_legacy, self.settings.num_heads) if released else (self.split, self.num_heads)
        query, key, _ = split(qkv, num_heads)
        return attention_received(query, key).unflatten(-1, side)


def at_least_float32(x: Tensor) -> Tensor:
    """What comes out of a network, for the process is never in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


NARROW = 8
"""Pixels of a row up to which a matrix product is the faster one on a CPU too."""


class Pointwise(nn.Conv2d):
    """A convolution of 1×1 pixels."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        return pointwise(self, x)


def pointwise(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of width 1 on a feature map in channels_last: (B, C, H, W) -> (B, C', H, W).

    A matrix product; but on a CPU PyTorch's convolution, which took half its time in float32 on an AMD processor. That
    goes row by row: over a whole map it may split its sums by threads, and their number would show in the last digits.
    """
    pixels, weight = x.permute(0, 2, 3, 1), conv.weight.flatten(1)
    if x.device.type != "cpu" or x.shape[-1] <= NARROW:
        return F.linear(pixels, weight, conv.bias).permute(0, 3, 1, 2)
    rows = pixels.flatten(0, 1)[:, None].permute(0, 3, 1, 2)  # (B·H, C, 1, W)
    out = F.conv2d(rows, weight[..., None, None], conv.bias)
    return out.permute(0, 2, 3, 1).unflatten(0, (len(x), -1))[:, :, 0].permute(0, 3, 1, 2)


def tokenwise(conv: nn.Conv1d, tokens: Tensor) -> Tensor:
    """A convolution of width 1 on tokens: (B, L, C) -> (B, L, C')."""
    return F.linear(tokens, conv.weight[..., 0], conv.bias)


class Stage(nn.ModuleList):
    """One numbered block: a convolution, or a residual block with attention and resampling as they come."""

    def __init__(self, name: str, layers: Sequence[nn.Module]) -> None:
        super().__init__(layers)
        self.name = name

    def forward(
        self, x: Tensor, emb: Tensor, sites: Sequence[AttentionSite] = ()
    ) -> tuple[Tensor, dict[AttentionSite, TokenMap]]:
        """(B, C, H, W), (B, E) -> (B, C', H', W'), and the attention at those of the sites that are here."""
        here = [site for site in sites if site.name == self.name]
        received: list[TokenMap] = []
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, AttentionBlock):
                x, received = layer(x, tuple(site.heads for site in here))
            else:
                x = layer(x)
        return x, dict(zip(here, received, strict=True))


# ------------------------------------------------------------------------------------------------- networks


class Encoder(nn.Module):
    """The way down and the middle, which UNet and classifier share."""

    def __init__(self, s: EncoderSettings) -> None:
        super().__init__()
        self.num_channels = s.num_channels
        self.time_embed: nn.Sequential = nn.Sequential(
            EvenLinear(s.num_channels, 4 * s.num_channels),
            nn.SiLU(),
            EvenLinear(4 * s.num_channels, 4 * s.num_channels),
        )
        self.input_blocks = _numbered("input", _input_layers(s))
        width = s.widths[-1]
        middle = [ResBlock(s, width, width), AttentionBlock(s, width, s.heads_of(width)), ResBlock(s, width, width)]
        self.middle_block = Stage("middle", middle)

    def embed(self, timesteps: Timestep) -> Tensor:
        """What the blocks are told of the timestep: (B,) -> (B, 4·num_channels)."""
        embedding = timestep_embedding(timesteps, self.num_channels)
        return self.time_embed(embedding.to(next(self.time_embed.parameters()).dtype))

    def first_features(self, x: Image, emb: Tensor) -> Tensor:
        """Behind the first convolution, whose weights may be finer than the rest's: (B, C, H, W) -> (B, C', H, W)."""
        first, rest = (next(part.parameters()).dtype for part in (self.input_blocks, self.time_embed))
        h, _ = self.input_blocks[0](x.to(first, memory_format=torch.channels_last), emb)
        return h if first == rest else h.to(rest)  # under autocast the features' dtype is not the weights'


class UNet(Encoder):
    """The ADM UNet. Its parameters carry OpenAI's names; `UNetSettings` are guided-diffusion's flags."""

    def __init__(self, settings: UNetSettings) -> None:
        super().__init__(settings)
        self.settings = settings
        if settings.num_classes is not None:
            self.label_emb = nn.Embedding(settings.num_classes + settings.null_label, 4 * settings.num_channels)
        if settings.degraded_embedding:
            self.degraded_emb = nn.Parameter(torch.zeros(4 * settings.num_channels))
        self.output_blocks = _numbered("output", _output_layers(settings))
        width = settings.widths[0]
        out_channels = settings.in_channels * (1 + settings.learn_sigma)
        self.out = nn.Sequential(Norm(width), nn.SiLU(), zero_conv(width, out_channels))
        self.to(memory_format=torch.channels_last)

    def forward(
        self,
        x: Image,
        timesteps: Timestep,
        labels: Labels | None = None,
        *,
        attention_sites: Sequence[AttentionSite] = (),
        degraded: Tensor | None = None,
    ) -> UNetOutput:
        """One pass.

        Args:
            x: (B, C, H, W), noised images.
            timesteps: (B,), 0…999 of the original process, whatever the respacing.
            labels: (B,) class indices; None is the null label. An unconditional network does not read them.
            attention_sites: where to bring attention back from.
            degraded: (B,) bool, which of x were degraded; a network without the embedding does not read it.

        Raises:
            UserError: a site without attention; no labels, and no null label either.
        """
        for site in attention_sites:
            self.settings.require_site(*site)
        emb = self._add_label(self.embed(timesteps), labels)
        if degraded is not None and self.settings.degraded_embedding:
            emb = emb + degraded[:, None] * self.degraded_emb
        received: dict[AttentionSite, TokenMap] = {}
        h = self.first_features(x, emb)
        skips = [h]
        for stage in self.input_blocks[1:]:
            h, maps = stage(h, emb, attention_sites)
            received |= maps
            skips.append(h)
        h, maps = self.middle_block(h, emb, attention_sites)
        received |= maps
        for stage in self.output_blocks:
            h, maps = stage(torch.cat([h, skips.pop()], dim=1), emb, attention_sites)
            received |= maps
        normalise, _, conv = self.out
        return UNetOutput(at_least_float32(conv(silu(normalise(h)))), received)

    def _add_label(self, emb: Tensor, labels: Labels | None) -> Tensor:
        """The timestep's embedding plus the label's, or the null label's where there is none."""
        s = self.settings
        if s.num_classes is None:
            return emb
        if labels is None:
            require(s.null_label, "`labels` must be given: this class-conditional network has no null label.")
            labels = torch.full(emb.shape[:1], s.num_classes, device=emb.device)
        return emb + self.label_emb(labels)


class Classifier(Encoder):
    """ADM's classifier of noisy images: the encoder under one of four poolings."""

    def __init__(self, settings: ClassifierSettings) -> None:
        super().__init__(settings)
        self.settings = settings
        self.out = _pool(settings)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Image, timesteps: Timestep) -> Tensor:
        """Logits: (B, C, H, W), (B,) -> (B, num_classes) float32, or float64 as the weights."""
        emb = self.embed(timesteps)
        h = self.first_features(x, emb)
        features = [h]
        for stage in (*self.input_blocks[1:], self.middle_block):
            h, _ = stage(h, emb)
            features.append(h)
        if self.settings.pool.startswith("spatial"):
            h = torch.cat([f.mean(dim=(2, 3)) for f in features], dim=1)
        return at_least_float32(self.out(h))


# ----------------------------------------------------------------------------------- layouts and poolings

Layers = list[nn.Module]
"""One block to be."""


def _numbered(prefix: str, blocks: Iterator[Layers]) -> nn.ModuleList:
    return nn.ModuleList(Stage(f"{prefix}.{k}", layers) for k, layers in enumerate(blocks))


def _resample(s: EncoderSettings, width: int, kind: type[Downsample] | type[Upsample]) -> nn.Module:
    """The end of a level: a residual block that resamples, or a plain convolution."""
    return ResBlock(s, width, width, kind(width, learned=False)) if s.resblock_updown else kind(width, learned=True)


def _attention(s: EncoderSettings, width: int, side: int, num_heads: int) -> list[nn.Module]:
    """Self-attention, where the settings ask for it at this side."""
    return [AttentionBlock(s, width, num_heads)] if side in s.attention_resolutions else []


def _input_layers(s: EncoderSettings) -> Iterator[Layers]:
    """The way down: a convolution, then for every level its blocks and, but for the last, a halving."""
    width = s.widths[0]
    yield [Conv3x3(s.in_channels, width)]
    for level, (out, side) in enumerate(zip(s.widths, s.resolutions, strict=True)):
        if level:
            yield [_resample(s, width, Downsample)]
        for _ in range(s.num_res_blocks):
            yield [ResBlock(s, width, out), *_attention(s, out, side, s.heads_of(out))]
            width = out


def _skip_widths(s: EncoderSettings) -> list[int]:
    """Channels after each input block: what the way down leaves for the way up."""
    levels = ([width] * (s.num_res_blocks + 1) for width in s.widths)  # each level's last one halves
    return [s.widths[0], *(width for level in levels for width in level)][:-1]


def _output_layers(s: UNetSettings) -> Iterator[Layers]:
    """The way up: for every level, coarsest first, one block more than on the way down, then a doubling."""
    skips, width = _skip_widths(s), s.widths[-1]
    for level in reversed(range(len(s.widths))):
        out, side = s.widths[level], s.resolutions[level]
        heads = s.heads_of(out) if s.num_head_channels else s.num_heads_upsample or s.num_heads
        for block in range(s.num_res_blocks + 1):
            layers = [ResBlock(s, width + skips.pop(), out), *_attention(s, out, side, heads)]
            if level and block == s.num_res_blocks:
                layers.append(_resample(s, out, Upsample))
            yield layers
            width = out


class AttentionPool(nn.Module):
    """Attention from the mean token to all, with learned positions, as in CLIP: (B, C, H, W) -> (B, classes)."""

    def __init__(self, s: ClassifierSettings) -> None:
        super().__init__()
        width, tokens = s.widths[-1], s.resolutions[-1] ** 2
        self.positional_embedding = nn.Parameter(torch.randn(width, tokens + 1) / width**0.5)
        self.qkv_proj = nn.Conv1d(width, 3 * width, 1)
        self.c_proj = nn.Conv1d(width, s.num_classes, 1)
        self.num_heads = s.heads_of(width)

    def forward(self, x: Tensor) -> Tensor:
        """The mean token's answer."""
        tokens = x.flatten(2).mT
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + self.positional_embedding.mT
        qkv = split_qkv(tokenwise(self.qkv_proj, tokens), self.num_heads)
        attended = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        return tokenwise(self.c_proj, attended[:, :1])[:, 0]


def _pool(s: ClassifierSettings) -> nn.Module:
    """From feature maps (attention, adaptive) or their means (spatial, spatial_v2) to logits."""
    width, means = s.widths[-1], sum(_skip_widths(s)) + s.widths[-1]
    if s.pool == "attention":
        return nn.Sequential(Norm(width), nn.SiLU(), AttentionPool(s))
    if s.pool == "adaptive":
        conv = zero_module(nn.Conv2d(width, s.num_classes, 1))
        return nn.Sequential(Norm(width), nn.SiLU(), nn.AdaptiveAvgPool2d((1, 1)), conv, nn.Flatten())
    hidden = [nn.ReLU()] if s.pool == "spatial" else [Norm(2048), nn.SiLU()]
    return nn.Sequential(nn.Linear(means, 2048), *hidden, nn.Linear(2048, s.num_classes))
