"""The ADM UNet and its classifier of noisy images (Dhariwal & Nichol 2021), with OpenAI's parameter names.

Blocks are addressed as `input.k`, `middle` and `output.k`; output blocks are numbered from the coarsest resolution up.
Feature maps are in channels_last. `cpu_kernels.optimize_for_cpu` replaces layers by faster equivalents on CPUs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sagl.errors import require
from sagl.models.attention import attention, attention_received, split_qkv, split_qkv_legacy
from sagl.models.layers import (
    AdaGroupNorm,
    Conv1x1,
    Downsample,
    LabelEmbedding,
    SiLU,
    Upsample,
    conv3x3,
    timestep_embedding,
    zero_module,
)
from sagl.settings.network import ClassifierSettings, EncoderSettings, UNetSettings
from sagl.shapes import AttentionEdit, AttentionSite, HeadLayout, Image, Labels, NetworkOutput, Timestep, TokenMap


class ResBlock(nn.Module):
    """Residual block conditioned on the timestep embedding; `resample` acts before the first convolution."""

    def __init__(self, s: EncoderSettings, channels: int, out_channels: int, resample: nn.Module | None = None) -> None:
        super().__init__()
        self.use_scale_shift_norm = s.use_scale_shift_norm
        self.resample = resample or nn.Identity()
        emb_channels = out_channels * (2 if s.use_scale_shift_norm else 1)
        self.in_layers = nn.Sequential(AdaGroupNorm(channels), SiLU(), conv3x3(channels, out_channels))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * s.num_channels, emb_channels))
        self.out_layers = nn.Sequential(
            AdaGroupNorm(out_channels), SiLU(), nn.Dropout(s.dropout), zero_module(conv3x3(out_channels, out_channels))
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, C, H, W), (B, E) -> (B, C', H', W')."""
        norm, activation, conv = self.in_layers
        h = conv(self.resample(activation(norm(x))))
        emb_out = self.emb_layers(emb)
        norm, activation, dropout, conv = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = norm(h, scale, shift)
        else:
            h = norm(h + emb_out[:, :, None, None].to(h.dtype))
        return conv(dropout(activation(h))).add_(self.skip_connection(self.resample(x)))


class AttentionBlock(nn.Module):
    """Residual self-attention over the pixels of a feature map (eq. 13, 14)."""

    def __init__(self, s: EncoderSettings, channels: int, num_heads: int) -> None:
        super().__init__()
        self.settings, self.num_heads = s, num_heads
        self.split = split_qkv if s.use_new_attention_order else split_qkv_legacy
        self.norm = AdaGroupNorm(channels)
        self.qkv = Conv1x1(channels, 3 * channels)
        self.proj_out = zero_module(Conv1x1(channels, channels))

    def forward(
        self, x: Tensor, head_layouts: Sequence[HeadLayout] = (), edit: AttentionEdit | None = None
    ) -> tuple[Tensor, list[TokenMap]]:
        """Return features of the shape of x, and the attention received under each of `head_layouts`.

        `edit` computes the heads in place of eq. 14.
        """
        size = x.shape[-2:]
        qkv = self.qkv(self.norm(x)).flatten(2).mT  # (B, L, 3C)
        q, k, v = self.split(qkv, self.num_heads)
        heads = attention(q, k, v) if edit is None else edit(q, k, v, (size[0], size[1]))
        h = heads.transpose(1, 2).flatten(2)
        out = x + self.proj_out(h.mT.unflatten(-1, size))
        return out, [self._attention_received(qkv, heads).unflatten(-1, size) for heads in head_layouts]

    def _attention_received(self, qkv: Tensor, heads: HeadLayout) -> Tensor:
        """(B, L, 3C) -> (B, head, L); "sag_release" always takes `num_heads` heads in the legacy channel order."""
        if heads == "sag_release":
            query, key, _ = split_qkv_legacy(qkv, self.settings.num_heads)
        else:
            query, key, _ = self.split(qkv, self.num_heads)
        return attention_received(query, key)


class TimestepEmbedSequential(nn.Sequential):
    """One numbered block: residual blocks receive the timestep embedding, attention blocks the requested layouts."""

    def __init__(self, name: str, layers: Sequence[nn.Module], *, use_checkpoint: bool) -> None:
        super().__init__(*layers)
        self.name, self.use_checkpoint = name, use_checkpoint

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        emb: Tensor,
        sites: Sequence[AttentionSite] = (),
        edits: Sequence[tuple[str, AttentionEdit]] = (),
    ) -> tuple[Tensor, dict[AttentionSite, TokenMap]]:
        """(B, C, H, W), (B, E) -> (B, C', H', W'), and the attention at those of `sites` that name this block.

        `edits` are functions that compute the heads of a block, with its name.
        """
        sites = [site for site in sites if site.name == self.name]
        maps: list[TokenMap] = []
        for layer in self:
            if isinstance(layer, ResBlock):
                x = self._call(layer, x, emb)
            elif isinstance(layer, AttentionBlock):
                x, maps = self._call(layer, x, [site.heads for site in sites], dict(edits).get(self.name))
            else:
                x = layer(x)
        return x, dict(zip(sites, maps, strict=True))

    def _call(self, layer: nn.Module, *args: Any) -> Any:  # noqa: ANN401 (whatever the layer returns)
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)


class Encoder(nn.Module):
    """Timestep embedding, input blocks and middle block, shared by UNet and classifier."""

    def __init__(self, s: EncoderSettings) -> None:
        super().__init__()
        self.num_channels = s.num_channels
        self.time_embed = nn.Sequential(
            nn.Linear(s.num_channels, 4 * s.num_channels), nn.SiLU(), nn.Linear(4 * s.num_channels, 4 * s.num_channels)
        )
        self.input_blocks = _named_blocks("input", s, _input_layers(s))
        channels = s.widths[-1]
        middle = [
            ResBlock(s, channels, channels),
            AttentionBlock(s, channels, s.num_heads_for(channels)),
            ResBlock(s, channels, channels),
        ]
        self.middle_block = TimestepEmbedSequential("middle", middle, use_checkpoint=s.use_checkpoint)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights; the first convolution may have a wider one (see `checkpoints.cast_weights`)."""
        return next(self.time_embed.parameters()).dtype

    def embed(self, timesteps: Timestep) -> Tensor:
        """(B,) -> (B, 4·num_channels)."""
        return self.time_embed(timestep_embedding(timesteps, self.num_channels).to(self.dtype))

    def first_features(self, x: Image, emb: Tensor) -> Tensor:
        """Apply the first convolution in the data type of its own weights: (B, C, H, W) -> (B, C', H, W)."""
        dtype = next(self.input_blocks[0].parameters()).dtype
        h, _ = self.input_blocks[0](x.to(dtype, memory_format=torch.channels_last), emb)
        return h if dtype == self.dtype else h.to(self.dtype)  # autocast features keep a dtype that no weight has


class UNet(Encoder):
    """The ADM UNet. Its settings are guided-diffusion's flags, its parameters have OpenAI's names."""

    def __init__(self, settings: UNetSettings) -> None:
        super().__init__(settings)
        self.settings = settings
        emb_channels, channels = 4 * settings.num_channels, settings.widths[0]
        if settings.num_classes is not None:
            self.label_emb = LabelEmbedding(settings.num_classes + settings.null_label, emb_channels)
        if settings.degraded_embedding:
            self.degraded_emb = nn.Parameter(torch.zeros(emb_channels))
        self.output_blocks = _named_blocks("output", settings, _output_layers(settings))
        out_channels = settings.in_channels * (2 if settings.learn_sigma else 1)
        self.out = nn.Sequential(AdaGroupNorm(channels), SiLU(), zero_module(conv3x3(channels, out_channels)))
        self.to(memory_format=torch.channels_last)

    def forward(
        self,
        x: Image,
        timesteps: Timestep,
        labels: Labels | None = None,
        *,
        attention_sites: Sequence[AttentionSite] = (),
        attention_edits: Sequence[tuple[str, AttentionEdit]] = (),
        timestep_noise: Tensor | None = None,
        degraded: Tensor | None = None,
        features: bool = False,
        block_inputs: Sequence[str] = (),
        start: tuple[str, Tensor] | None = None,
    ) -> NetworkOutput:
        """Predict eps, and the variance if it is learned.

        Args:
            x: (B, C, H, W), noisy images.
            timesteps: (B,), 0…999 of the original process, whatever the respacing.
            labels: (B,) class indices; None is the null label. An unconditional network ignores them.
            attention_sites: sites whose attention is returned.
            attention_edits: names of blocks with functions that compute their heads in place of eq. 14.
            timestep_noise: (B, E), added to the timestep embedding in units of its standard deviation.
            degraded: (B,) bool, which samples of x were degraded; ignored without `degraded_embedding`.
            features: whether the input of the last convolution is returned.
            block_inputs: names of output blocks whose input is returned.
            start: name of an output block, and its input as `block_inputs` returned it in another evaluation. Blocks
                that only this input depends on are not computed (DeepCache, Ma et al. 2023, arXiv 2312.00858).

        Raises:
            UserError: a site has no attention or is not computed; or labels are missing, and there is no null label.
        """
        for site in (*attention_sites, *((name,) for name, _ in attention_edits)):
            self.settings.require_site(*site, start=start and start[0])
        emb = self._embed_condition(timesteps, labels, timestep_noise, degraded)
        h = self.first_features(x, emb)
        skips = [h]
        attention_maps: dict[AttentionSite, TokenMap] = {}
        inputs: dict[str, Tensor] = {}
        first = 0 if start is None else self.settings.output_blocks.index(start[0])
        for block in self.input_blocks[1 : len(self.output_blocks) - first]:
            h, maps = block(h, emb, attention_sites, attention_edits)
            attention_maps |= maps
            skips.append(h)
        if start is None:
            h, maps = self.middle_block(h, emb, attention_sites, attention_edits)
            attention_maps |= maps
        else:
            h = start[1]
        for block, name in zip(self.output_blocks[first:], self.settings.output_blocks[first:], strict=True):
            if name in block_inputs:
                inputs[name] = h
            h, maps = block(torch.cat([h, skips.pop()], dim=1), emb, attention_sites, attention_edits)
            attention_maps |= maps
        norm, activation, conv = self.out
        h = activation(norm(h))
        return NetworkOutput(at_least_float32(conv(h)), attention_maps, h if features else None, inputs)

    def _embed_condition(
        self, timesteps: Timestep, labels: Labels | None, timestep_noise: Tensor | None, degraded: Tensor | None
    ) -> Tensor:
        """Return the embedding of timestep, label and degradation, (B, 4·num_channels); arguments as of `forward`."""
        s, emb = self.settings, self.embed(timesteps)
        if timestep_noise is not None:
            emb = emb + emb.std(dim=1, keepdim=True) * timestep_noise.to(emb.dtype)
        if s.num_classes is not None:
            if labels is None:
                require(not s.needs_labels, "`labels` must be given: this class-conditional network has no null label.")
                labels = torch.full(emb.shape[:1], s.num_classes, device=emb.device)
            emb = emb + self.label_emb(labels)
        if degraded is not None and s.degraded_embedding:
            emb = emb + degraded[:, None] * self.degraded_emb
        return emb


class Classifier(Encoder):
    """ADM's classifier of noisy images: the encoder, followed by one of four poolings."""

    def __init__(self, settings: ClassifierSettings) -> None:
        super().__init__(settings)
        self.settings = settings
        self.out = _pool(settings)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Image, timesteps: Timestep) -> Tensor:
        """Return logits, float32 or wider: (B, C, H, W), (B,) -> (B, num_classes)."""
        emb = self.embed(timesteps)
        h = self.first_features(x, emb)
        features = [h]
        for block in (*self.input_blocks[1:], self.middle_block):
            h, _ = block(h, emb)
            features.append(h)
        if self.settings.pool.startswith("spatial"):
            h = torch.cat([f.mean(dim=(2, 3)) for f in features], dim=1)
        return at_least_float32(self.out(h))


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision to float32; leave float32 and float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _named_blocks(prefix: str, s: EncoderSettings, blocks: Iterator[list[nn.Module]]) -> nn.ModuleList:
    return nn.ModuleList(
        TimestepEmbedSequential(f"{prefix}.{k}", layers, use_checkpoint=s.use_checkpoint)
        for k, layers in enumerate(blocks)
    )


def _resample(s: EncoderSettings, channels: int, kind: type[Downsample] | type[Upsample]) -> nn.Module:
    if s.resblock_updown:
        return ResBlock(s, channels, channels, kind(channels, use_conv=False))
    return kind(channels, use_conv=True)


def _attention(s: EncoderSettings, channels: int, resolution: int, num_heads: int) -> list[nn.Module]:
    return [AttentionBlock(s, channels, num_heads)] if resolution in s.attention_resolutions else []


def _input_layers(s: EncoderSettings) -> Iterator[list[nn.Module]]:
    """Yield the first convolution; then, for every level, a downsampling (except for the first) and its blocks."""
    channels = s.widths[0]
    yield [conv3x3(s.in_channels, channels)]
    for level, (width, resolution) in enumerate(zip(s.widths, s.resolutions, strict=True)):
        if level:
            yield [_resample(s, channels, Downsample)]
        for _ in range(s.num_res_blocks):
            yield [ResBlock(s, channels, width), *_attention(s, width, resolution, s.num_heads_for(width))]
            channels = width


def _skip_channels(s: EncoderSettings) -> list[int]:
    """Return the channels after each input block, which the skip connections carry to the output blocks."""
    levels = ([width] * (s.num_res_blocks + 1) for width in s.widths)  # blocks, and the next level's downsampling
    return [s.widths[0], *(width for level in levels for width in level)][:-1]


def _output_layers(s: UNetSettings) -> Iterator[list[nn.Module]]:
    """Yield, for every level from the coarsest on, one block more than the input has; the last one upsamples."""
    skips, channels = _skip_channels(s), s.widths[-1]
    for level in reversed(range(len(s.widths))):
        width, resolution = s.widths[level], s.resolutions[level]
        heads = s.num_heads_for(width) if s.num_head_channels else s.num_heads_upsample or s.num_heads
        for block in range(s.num_res_blocks + 1):
            layers = [ResBlock(s, channels + skips.pop(), width), *_attention(s, width, resolution, heads)]
            if level and block == s.num_res_blocks:
                layers.append(_resample(s, width, Upsample))
            yield layers
            channels = width


class AttentionPool(nn.Module):
    """Attention from the mean token to all tokens with learned positions, as in CLIP: (B, C, H, W) -> (B, classes)."""

    def __init__(self, s: ClassifierSettings) -> None:
        super().__init__()
        channels, num_tokens = s.widths[-1], s.resolutions[-1] ** 2
        self.positional_embedding = nn.Parameter(torch.randn(channels, num_tokens + 1) / channels**0.5)
        self.qkv_proj = Conv1x1(channels, 3 * channels)
        self.c_proj = Conv1x1(channels, s.num_classes)
        self.num_heads = s.num_heads_for(channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + self.positional_embedding.mT
        qkv = split_qkv(self.qkv_proj(tokens.mT).mT, self.num_heads)
        h = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        return self.c_proj(h[:, :1].mT)[..., 0]


def _pool(s: ClassifierSettings) -> nn.Sequential:
    """Return the layers from feature maps (attention, adaptive) or their means (spatial, spatial_v2) to logits."""
    channels, num_means = s.widths[-1], sum(_skip_channels(s)) + s.widths[-1]
    if s.pool == "attention":
        return nn.Sequential(AdaGroupNorm(channels), nn.SiLU(), AttentionPool(s))
    if s.pool == "adaptive":
        conv = zero_module(nn.Conv2d(channels, s.num_classes, 1))
        return nn.Sequential(AdaGroupNorm(channels), nn.SiLU(), nn.AdaptiveAvgPool2d((1, 1)), conv, nn.Flatten())
    hidden = [nn.ReLU()] if s.pool == "spatial" else [AdaGroupNorm(2048), nn.SiLU()]
    return nn.Sequential(nn.Linear(num_means, 2048), *hidden, nn.Linear(2048, s.num_classes))
