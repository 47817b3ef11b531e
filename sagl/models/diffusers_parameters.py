"""Parameters of the ADM UNet under the names and in the layout of diffusers' `UNet2DModel`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sagl.errors import require
from sagl.settings.network import UNetSettings

TOP_LEVEL = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
"""ADM's names of layers outside of blocks, and diffusers' names."""
IN_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "norm": "group_norm",
    "qkv": "to_qkv",
    "proj_out": "to_out.0",
    "op": "conv",
    "conv": "conv",
}
"""ADM's names of layers in residual, attention and resampling blocks, and diffusers'; to_qkv stands for three."""


def _blocks(s: UNetSettings) -> Iterator[tuple[str, str]]:
    """Yield ADM's name of each block, and diffusers'; attention blocks also for levels without attention."""
    per_level = s.num_res_blocks + 1  # in the encoder the last one downsamples, the decoder has one more
    for level in range(len(s.widths)):
        for block in range(s.num_res_blocks):
            name = f"input_blocks.{level * per_level + block + 1}"
            yield f"{name}.0", f"down_blocks.{level}.resnets.{block}"
            yield f"{name}.1", f"down_blocks.{level}.attentions.{block}"
        yield f"input_blocks.{(level + 1) * per_level}.0", f"down_blocks.{level}.downsamplers.0"
    for index, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"middle_block.{index}", f"mid_block.{name}"
    for level, side in enumerate(reversed(s.resolutions)):
        has_attention = side in s.attention_resolutions
        for block in range(per_level):
            name = f"output_blocks.{level * per_level + block}"
            yield f"{name}.0", f"up_blocks.{level}.resnets.{block}"
            if has_attention:
                yield f"{name}.1", f"up_blocks.{level}.attentions.{block}"
        yield f"{name}.{1 + has_attention}", f"up_blocks.{level}.upsamplers.0"


def diffusers_names(s: UNetSettings, parameters: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return diffusers' names of each ADM parameter: one, or those of q, k and v."""
    layers = {f"{a}.{x}": f"{b}.{y}" for a, b in _blocks(s) for x, y in IN_BLOCK.items()} | TOP_LEVEL
    names = {}
    for name in parameters:
        layer, _, leaf = name.rpartition(".")
        parts = ("to_q", "to_k", "to_v") if layer.endswith(".qkv") else ("",)
        names[name] = tuple(f"{layers[layer].replace('to_qkv', part)}.{leaf}" for part in parts)
    return names


def rename_parameters(s: UNetSettings, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ADM's parameters under diffusers' names: q, k and v separate, convolutions of width 1 as matrices."""
    out: dict[str, Tensor] = {}
    for name, names in diffusers_names(s, state_dict).items():
        tensor = state_dict[name].squeeze(-1) if state_dict[name].dim() == 3 else state_dict[name]
        out |= zip(names, _split(s, tensor) if len(names) == 3 else [tensor], strict=True)
    return out


def _split(s: UNetSettings, rows: Tensor) -> list[Tensor]:
    """Split ADM's rows of q, k and v, in either order: (3·C, …) -> 3 of (C, …)."""
    if not s.use_new_attention_order:
        rows = _swap(rows, _num_heads(s, len(rows) // 3), 3)
    return [part.clone() for part in rows.chunk(3)]


def join_parts(s: UNetSettings, parts: Sequence[Tensor]) -> Tensor:
    """Return the only part, or the inverse of `_split`: 3 of (C, …) -> (3·C, …)."""
    if len(parts) == 1:
        return parts[0]
    rows = torch.cat(list(parts))
    return rows if s.use_new_attention_order else _swap(rows, 3, _num_heads(s, len(parts[0])))


def _num_heads(s: UNetSettings, width: int) -> int:
    return width // (head_width(s) or width)


def _swap(rows: Tensor, outer: int, inner: int) -> Tensor:
    """Reorder rows from (outer, inner, d) to (inner, outer, d): (outer·inner·d, …) -> the same shape."""
    return rows.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)


def head_width(s: UNetSettings) -> int | None:
    """Return the number of channels of all heads; None if each block has a single head."""
    if s.num_head_channels:
        return s.num_head_channels
    levels = {width for width, side in zip(s.widths, s.resolutions, strict=True) if side in s.attention_resolutions}
    heads = {(width, s.num_heads) for width in levels | {s.widths[-1]}}  # the middle block always has attention
    heads |= {(width, s.num_heads_upsample or s.num_heads) for width in levels}
    widths = {width // number for width, number in heads}
    if {number for _, number in heads} == {1}:
        return None
    require(
        len(widths) == 1,
        "`num_heads` must give heads of one width for UNet2DModel, which has one `attention_head_dim` for all blocks, "
        f"got num_heads={s.num_heads}, num_heads_upsample={s.num_heads_upsample}, which give heads of "
        f"{', '.join(map(str, sorted(widths)))} channels. Keep the network in sagl's format.",
    )
    return widths.pop()
