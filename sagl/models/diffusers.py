"""The ADM UNet as diffusers' `UNet2DModel`, and back: the same function under other names.

Configurations and state dicts are mapped as dictionaries, without diffusers itself. Three things differ. Where ADM
numbers all blocks of the way down and up, diffusers counts by level and hangs the resampling at a level's end.
Attention is three linear layers there, not one convolution of width 1. And a `UNet2DModel` has one width of head for
all its blocks, and a timestep embedding as wide as its first level, which not every ADM has.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sagl.errors import UserError, require
from sagl.models.checkpoints import Checkpoint, check_state_dict, meta_state_dict, save_tensors
from sagl.models.metadata import build_settings, require_recommended
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import UNetSettings
from sagl.utils.files import atomic_folder

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
"""The files of a folder, as `UNet2DModel` reads and writes them."""
OWN_KEY = "_sagl"
"""What a `UNet2DModel` has no key for; diffusers keeps keys that begin with _, without a word, also when it saves."""

FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (0,),
    "flip_sin_to_cos": (True,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (1,),
    "act_fn": ("silu", "swish"),
    "norm_num_groups": (32,),
    "norm_eps": (1e-5,),
    "add_attention": (True,),
    "class_embed_type": (None,),
}
"""Keys whose value ADM leaves no choice; diffusers' default is the first of those allowed."""
FREE: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "time_embedding_dim": None,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "attention_head_dim": 8,
    "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default",
    "num_class_embeds": None,
}
"""The other keys that matter, with diffusers' defaults: a configuration may leave them out."""
BLOCK_TYPES = {
    "down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"),
}
"""Of a level: resampled by a convolution, inside a residual block, or (with attention) as `…sample_type` says."""


def to_diffusers(settings: UNetSettings, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An ADM as `UNet2DModel`: the contents of config.json, and the state dict, which shares memory where it can.

    Raises:
        UserError: a `UNet2DModel` cannot express the settings; names or shapes do not fit them.
    """
    config = _config(settings)
    check_state_dict(meta_state_dict(settings), state)
    return config | {OWN_KEY: {"network": asdict(settings)}}, _renamed(settings, state)


def from_diffusers(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[UNetSettings, dict[str, Tensor]]:
    """A `UNet2DModel` as ADM, from the contents of config.json and the state dict, which shares memory where it can.

    Attention comes in the new order (q | k | v, then head) unless sagl noted another one. Keys that `UNet2DModel`
    does not know are passed over, as diffusers does: its average of weights leaves some there.

    Raises:
        UserError: ADM cannot express the configuration, or parameters do not fit it.
    """
    settings = _noted(config, _settings(config))
    ours = meta_state_dict(settings)
    way_out = " If an older diffusers wrote it, load and save it with a current one."
    check_state_dict(_renamed(settings, ours), state, way_out)
    names = _names(settings, ours)
    found = {name: _joined(settings, [state[part] for part in theirs]) for name, theirs in names.items()}
    return settings, {name: tensor.reshape(ours[name].shape) for name, tensor in found.items()}


def write_diffusers(file: Checkpoint, folder: Path) -> None:
    """Write the folder that `UNet2DModel.from_pretrained` loads, whole or not at all.

    Args:
        file: the network; what diffusers has no key for is noted in config.json, so that nothing is lost.
        folder: a new or an empty one.

    Raises:
        UserError: the folder is in use or cannot be written, or a `UNet2DModel` cannot express the network.
    """
    if not isinstance(file.model_settings, UNetSettings):
        raise UserError("`checkpoint` must be a network that draws to go to diffusers, and this one is a classifier.")
    config, state = to_diffusers(file.model_settings, file.state_dict)
    config[OWN_KEY] |= {"diffusion": asdict(file.diffusion), "recommended": dict(file.recommended)}
    with atomic_folder(folder.resolve(), "target") as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_tensors(state, partial / WEIGHTS, {"format": "pt"})


def read_diffusers(folder: Path, diffusion: DiffusionSettings | None = None) -> Checkpoint:
    """A folder that `UNet2DModel.save_pretrained` wrote, or `write_diffusers`.

    Args:
        folder: with configuration and weights.
        diffusion: of the process, where sagl did not note it; left out, the linear one, with the variance that the
            channels tell of.

    Raises:
        UserError: a file is missing or damaged, or ADM cannot express the network.
    """
    for name in (CONFIG, WEIGHTS):
        require(
            (folder / name).is_file(),
            f"`checkpoint` must be a folder with {CONFIG} and {WEIGHTS}, and {folder} has no {name}. "
            "UNet2DModel.save_pretrained(folder, max_shard_size='100GB') writes both.",
        )
    try:
        config, state = dict(json.loads((folder / CONFIG).read_text())), load_file(folder / WEIGHTS)
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        raise UserError(f"`checkpoint` must be a folder with whole files, and one in {folder} is damaged.") from error
    network, state = from_diffusers(config, state)
    noted = config.get(OWN_KEY, {})
    require_recommended(noted, folder / CONFIG)
    told = DiffusionSettings(variance="learned_range" if network.learn_sigma else "fixed_small")
    try:
        diffusion = build_settings(DiffusionSettings, noted.get("diffusion", asdict(diffusion or told)))
    except (TypeError, AttributeError) as error:
        raise _unreadable(error) from error
    return Checkpoint(
        model_settings=network, diffusion=diffusion, state_dict=state, recommended=noted.get("recommended") or {}
    )


# -------------------------------------------------------------------------------------------- configurations


def _config(s: UNetSettings) -> dict[str, Any]:
    """The settings in the keys of `UNet2DModel`."""
    require(
        s.widths[0] == s.num_channels,
        "`channel_mult` must begin with 1 for a UNet2DModel, whose timestep embedding is as wide as its first level, "
        f"got {s.channel_mult}. Keep the network in sagl's own format.",
    )
    attended = [side in s.attention_resolutions for side in s.resolutions]
    down, up = ([types[2 if here else s.resblock_updown] for here in attended] for types in BLOCK_TYPES.values())
    resample = "resnet" if s.resblock_updown else "conv"
    return {
        "_class_name": "UNet2DModel",
        **{name: allowed[0] for name, allowed in FIXED.items()},
        "sample_size": s.image_size,
        "in_channels": s.in_channels,
        "out_channels": s.in_channels * (1 + s.learn_sigma),
        "down_block_types": down,
        "up_block_types": up[::-1],
        "block_out_channels": list(s.widths),
        "layers_per_block": s.num_res_blocks,
        "downsample_type": resample,
        "upsample_type": resample,
        "dropout": s.dropout,
        "attention_head_dim": _head_width(s),
        "attn_norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift" if s.use_scale_shift_norm else "default",
        "num_class_embeds": None if s.num_classes is None else s.num_classes + s.null_label,
    }


def _head_width(s: UNetSettings) -> int | None:
    """Channels of every head of the network; None: each block is one head, as wide as it is."""
    if s.num_head_channels:
        return s.num_head_channels
    attended = {width for width, side in zip(s.widths, s.resolutions, strict=True) if side in s.attention_resolutions}
    heads = {(width, s.num_heads) for width in attended | {s.widths[-1]}}  # the middle always has attention
    heads |= {(width, s.num_heads_upsample or s.num_heads) for width in attended}
    widths = {width // number for width, number in heads}
    if {number for _, number in heads} == {1}:
        return None
    require(
        len(widths) == 1,
        "`num_heads` must give heads of one width for a UNet2DModel, whose `attention_head_dim` goes for all blocks, "
        f"got num_heads={s.num_heads}, num_heads_upsample={s.num_heads_upsample}, which give heads of "
        f"{', '.join(map(str, sorted(widths)))} channels. Keep the network in sagl's own format.",
    )
    return widths.pop()


def _settings(config: Mapping[str, Any]) -> UNetSettings:
    """What the keys of `UNet2DModel` tell, as ADM's settings, whatever the values are.

    Raises:
        UserError: ADM cannot express them, or no `UNet2DModel` has them.
    """
    try:
        return _expressed({name: allowed[0] for name, allowed in FIXED.items()} | FREE | dict(config))
    except UserError:
        raise
    except (TypeError, LookupError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"`config` must be that of a UNet2DModel, and has values of another kind: {error}.") from error


def _expressed(c: Mapping[str, Any]) -> UNetSettings:
    """A whole configuration as ADM's settings."""
    _require_expressible(c)
    widths, side = c["block_out_channels"], _side(c["sample_size"])
    attended = [name == "AttnDownBlock2D" for name in c["down_block_types"]]
    head_width = c["attention_head_dim"]
    settings = {
        "image_size": side,
        "in_channels": c["in_channels"],
        "num_channels": widths[0],
        "num_res_blocks": c["layers_per_block"],
        "channel_mult": tuple(_multiple(width, widths[0]) for width in widths),
        "attention_resolutions": tuple(side >> level for level, here in enumerate(attended) if here),
        "num_heads": 4 if head_width else 1,  # no width of head: one head of all channels
        "num_head_channels": head_width,
        "use_new_attention_order": True,
        "use_scale_shift_norm": c["resnet_time_scale_shift"] == "scale_shift",
        "resblock_updown": _resampling(c) == {"resnet"},
        "dropout": c["dropout"],
        "learn_sigma": c["out_channels"] == 2 * c["in_channels"],
        "num_classes": c["num_class_embeds"],
    }
    try:
        return build_settings(UNetSettings, settings)
    except UserError as error:
        raise UserError(
            f"`config` must be one that ADM can express, and as ADM's settings it is none: {error}"
        ) from error


def _require_expressible(c: Mapping[str, Any]) -> None:
    """Refuse a value that ADM has no setting for."""
    scaled = c["resnet_time_scale_shift"] == "scale_shift"
    width, channels = c["block_out_channels"][0], c["in_channels"]
    allowed = FIXED | {
        "_class_name": ("UNet2DModel",),
        "out_channels": (channels, 2 * channels),
        "time_embedding_dim": (None, 4 * width),
        "downsample_type": ("conv", "resnet"),
        "upsample_type": ("conv", "resnet"),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "attn_norm_num_groups": (32,) if scaled else (None, 32),  # None with scale_shift: a middle without its norm
    }
    if _resampling(c) == {"resnet"}:
        del allowed["downsample_padding"]  # of the convolutions that are not there
    for name, values in allowed.items():
        got = c.get(name, values[0])
        require(got in values, _inexpressible(name, " or ".join(map(repr, values)), got))
    for name, known in BLOCK_TYPES.items():
        require(set(c[name]) <= set(known), _inexpressible(name, f"made of {', '.join(known)}", list(c[name])))
        same = len(c[name]) == len(c["block_out_channels"])
        require(same, _inexpressible(name, f"{len(c['block_out_channels'])} blocks", list(c[name])))
    down, up = ([name.startswith("Attn") for name in c[key]] for key in BLOCK_TYPES)
    require(down == up[::-1], _inexpressible("up_block_types", "as down_block_types in attention", c["up_block_types"]))
    alike = len(kinds := _resampling(c)) == 1
    require(
        alike, _inexpressible("down_block_types", "as up_block_types, and all levels, in resampling", sorted(kinds))
    )


def _inexpressible(name: str, allowed: str, got: object) -> str:
    return f"`{name}` of a UNet2DModel must be {allowed} for ADM to express it, got {got!r}."


def _resampling(c: Mapping[str, Any]) -> set[str]:
    """How levels are resampled, by a convolution (conv) or in a residual block (resnet): one word where they agree."""
    kinds = {
        c[own] if name.startswith("Attn") else "resnet" if name.startswith("Resnet") else "conv"
        for own, key in zip(("downsample_type", "upsample_type"), BLOCK_TYPES, strict=True)
        for name in c[key][:-1]  # the last block of either way resamples nothing
    }
    return kinds or {c["downsample_type"]}


def _side(sample_size: int | Sequence[int] | None) -> int:
    """Of square images: a number, or the same one twice."""
    sides = {sample_size} if isinstance(sample_size, int) else set(sample_size or ())
    require(len(sides) == 1, _inexpressible("sample_size", "the side of square images", sample_size))
    return sides.pop()


def _multiple(width: int, base: int) -> float:
    """A channel multiplier that gives just this width, whatever the division rounds to."""
    if width % base == 0:
        return width // base
    return width / base if int(width / base * base) == width else math.nextafter(width / base, math.inf)


def _noted(config: Mapping[str, Any], told: UNetSettings) -> UNetSettings:
    """The settings that sagl noted, which say more than the keys of `UNet2DModel`, or else those."""
    if OWN_KEY not in config:
        return told
    try:
        noted = build_settings(UNetSettings, config[OWN_KEY]["network"])
    except (KeyError, TypeError, AttributeError) as error:
        raise _unreadable(error) from error
    ours, theirs = _config(noted), _config(told)
    different = [name for name in theirs if ours[name] != theirs[name]]
    name = (*different, OWN_KEY)[0]
    require(
        not different,
        f"`{name}` of the configuration must be what sagl noted in {OWN_KEY}, {ours.get(name)!r}, "
        f"got {theirs.get(name)!r}. Delete {OWN_KEY} to go by the other keys.",
    )
    return noted


def _unreadable(error: Exception) -> UserError:
    return UserError(
        f"`{OWN_KEY}` of the configuration must be what sagl notes there, and is not ({error}). "
        "Delete it to go by the other keys."
    )


# ------------------------------------------------------------------------------------------------ parameters

TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
"""ADM's layers outside of blocks, and diffusers'."""
INSIDE = {
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
"""ADM's layers in a residual block, an attention block, a halving, a doubling; to_qkv stands for three."""


def _blocks(s: UNetSettings) -> Iterator[tuple[str, str]]:
    """ADM's name of each block, and diffusers'; of attention also where a level has none."""
    per_level = s.num_res_blocks + 1  # on the way down the last one halves, on the way up there is one more
    for level in range(len(s.widths)):
        for block in range(s.num_res_blocks):
            stage = f"input_blocks.{level * per_level + block + 1}"
            yield f"{stage}.0", f"down_blocks.{level}.resnets.{block}"
            yield f"{stage}.1", f"down_blocks.{level}.attentions.{block}"
        yield f"input_blocks.{(level + 1) * per_level}.0", f"down_blocks.{level}.downsamplers.0"
    for ours, theirs in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"middle_block.{ours}", f"mid_block.{theirs}"
    for level, side in enumerate(reversed(s.resolutions)):
        attended = side in s.attention_resolutions
        for block in range(per_level):
            stage = f"output_blocks.{level * per_level + block}"
            yield f"{stage}.0", f"up_blocks.{level}.resnets.{block}"
            if attended:
                yield f"{stage}.1", f"up_blocks.{level}.attentions.{block}"
        yield f"{stage}.{1 + attended}", f"up_blocks.{level}.upsamplers.0"


def _names(s: UNetSettings, parameters: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """ADM's name of each parameter, and diffusers': one, or those of q, k and v."""
    layers = {f"{a}.{x}": f"{b}.{y}" for a, b in _blocks(s) for x, y in INSIDE.items()} | TOP
    names = {}
    for name in parameters:
        layer, _, leaf = name.rpartition(".")
        kinds = ("to_q", "to_k", "to_v") if layer.endswith(".qkv") else ("",)
        names[name] = tuple(f"{layers[layer].replace('to_qkv', kind)}.{leaf}" for kind in kinds)
    return names


def _renamed(s: UNetSettings, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ADM's parameters under diffusers' names, q, k and v apart, convolutions of width 1 as matrices."""
    out: dict[str, Tensor] = {}
    for name, theirs in _names(s, state).items():
        tensor = state[name].squeeze(-1) if state[name].dim() == 3 else state[name]
        out |= zip(theirs, _split(s, tensor) if len(theirs) == 3 else [tensor], strict=True)
    return out


def _split(s: UNetSettings, rows: Tensor) -> list[Tensor]:
    """ADM's rows of q, k and v, in either order, one by one: (3·C, …) -> 3 of (C, …)."""
    if not s.use_new_attention_order:
        rows = _swapped(rows, _num_heads(s, len(rows) // 3), 3)
    return [part.clone() for part in rows.chunk(3)]


def _joined(s: UNetSettings, parts: Sequence[Tensor]) -> Tensor:
    """The parameter, or the inverse of `_split`: 3 of (C, …) -> (3·C, …)."""
    if len(parts) == 1:
        return parts[0]
    rows = torch.cat(list(parts))
    return rows if s.use_new_attention_order else _swapped(rows, 3, _num_heads(s, len(parts[0])))


def _num_heads(s: UNetSettings, width: int) -> int:
    return width // (_head_width(s) or width)


def _swapped(rows: Tensor, outer: int, inner: int) -> Tensor:
    """Rows that lie by outer, then inner, lie by inner, then outer: (outer·inner·d, …) -> the same shape."""
    return rows.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)
