"""Conversion between the ADM UNet and diffusers' `UNet2DModel`: the same function under other names.

Configurations and state dicts are converted as dictionaries, without diffusers. ADM numbers all blocks of encoder and
decoder; diffusers counts per level, with the resampling at the end of a level. Attention is three linear layers in
diffusers, one convolution of width 1 in ADM. A `UNet2DModel` has one head width for all blocks, and a timestep
embedding as wide as its first level, which not every ADM network has.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sagl.errors import UserError, require
from sagl.models.checkpoints import NetworkWeights, meta_state_dict, save_tensors
from sagl.models.diffusers_parameters import diffusers_names, head_width, join_parts, rename_parameters
from sagl.models.metadata import require_recommended
from sagl.models.state_dicts import check_state_dict
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import UNetSettings
from sagl.utils.files import atomic_folder
from sagl.utils.json_values import from_json

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
"""Files of a folder that `UNet2DModel` reads and writes."""
SAGL_KEY = "_sagl"
"""Key of the settings that `UNet2DModel` does not have. diffusers keeps keys that begin with _, also when it saves."""

REQUIRED: dict[str, tuple[Any, ...]] = {
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
"""Keys with the only values that ADM supports; the first one is diffusers' default."""
DEFAULTS: dict[str, Any] = {
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
"""Other keys, with diffusers' defaults for configurations that leave them out."""
BLOCK_TYPES = {
    "down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"),
}
"""Types of a level: resampling by a convolution, by a residual block, or (with attention) by `…sample_type`."""


def to_diffusers(settings: UNetSettings, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert an ADM network: return the contents of config.json and the state dict, which shares memory if possible.

    Raises:
        UserError: `UNet2DModel` cannot express the settings, or names or shapes do not match them.
    """
    config = _config_from_settings(settings)
    check_state_dict(meta_state_dict(settings), state_dict)
    return config | {SAGL_KEY: {"network": asdict(settings)}}, rename_parameters(settings, state_dict)


def from_diffusers(
    config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[UNetSettings, dict[str, Tensor]]:
    """Convert a `UNet2DModel`: return ADM's settings and the state dict, which shares memory if possible.

    Attention has the new order (q | k | v, then heads) unless sagl stored another one. Keys that `UNet2DModel` does not
    know are ignored, as in diffusers, whose EMA adds some.

    Args:
        config: Contents of config.json.
        state_dict: State dict of the `UNet2DModel`.

    Raises:
        UserError: ADM cannot express the configuration, or parameters do not match it.
    """
    settings = _stored_settings(config, _settings_from_config(config))
    expected = meta_state_dict(settings)
    hint = " If an old version of diffusers wrote it, load and save it with a current one."
    check_state_dict(rename_parameters(settings, expected), state_dict, hint)
    result = {}
    for name, names in diffusers_names(settings, expected).items():
        result[name] = join_parts(settings, [state_dict[part] for part in names]).reshape(expected[name].shape)
    return settings, result


def write_diffusers(file: NetworkWeights, folder: Path) -> None:
    """Write a folder for `UNet2DModel.from_pretrained`, completely or not at all.

    Settings without a key in diffusers go to `SAGL_KEY` of config.json, so that nothing is lost.

    Raises:
        UserError: The folder is not empty or cannot be written, or `UNet2DModel` cannot express the network.
    """
    if not isinstance(file.model_settings, UNetSettings):
        raise UserError(
            "`checkpoint` must be a diffusion model to be converted to diffusers, but it is a classifier or a head."
        )
    config, state_dict = to_diffusers(file.model_settings, file.state_dict)
    config[SAGL_KEY] |= {"diffusion": asdict(file.diffusion), "recommended": dict(file.recommended)}
    with atomic_folder(folder.resolve(), "target") as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_tensors(state_dict, partial / WEIGHTS, {"format": "pt"})


def read_diffusers(folder: Path, diffusion: DiffusionSettings | None = None) -> NetworkWeights:
    """Read a folder written by `UNet2DModel.save_pretrained` or `write_diffusers`.

    Args:
        folder: Folder with configuration and weights.
        diffusion: Diffusion settings for a folder without sagl's own; by default the linear schedule, with learned
            variance if the network predicts one.

    Raises:
        UserError: A file is missing or damaged, or ADM cannot express the network.
    """
    for name in (CONFIG, WEIGHTS):
        require(
            (folder / name).is_file(),
            f"`checkpoint` must be a folder with {CONFIG} and {WEIGHTS}, but {folder} has no {name}. "
            "UNet2DModel.save_pretrained(folder, max_shard_size='100GB') writes both.",
        )
    try:
        config, state_dict = dict(json.loads((folder / CONFIG).read_text())), load_file(folder / WEIGHTS)
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        raise UserError(f"`checkpoint` must be a folder of complete files, but one in {folder} is damaged.") from error
    model_settings, state_dict = from_diffusers(config, state_dict)
    stored = config.get(SAGL_KEY, {})
    require_recommended(stored, folder / CONFIG)
    default = DiffusionSettings(variance="learned_range" if model_settings.learn_sigma else "fixed_small")
    try:
        diffusion = from_json(DiffusionSettings, stored.get("diffusion", asdict(diffusion or default)))
    except (TypeError, AttributeError) as error:
        raise _unreadable(error) from error
    return NetworkWeights(
        model_settings=model_settings,
        diffusion=diffusion,
        state_dict=state_dict,
        recommended=stored.get("recommended") or {},
    )


# -------------------------------------------------------------------------------------------- configurations


def _config_from_settings(s: UNetSettings) -> dict[str, Any]:
    """Return the configuration of `UNet2DModel`."""
    require(
        s.widths[0] == s.num_channels,
        "`channel_mult` must begin with 1 for UNet2DModel, whose timestep embedding is as wide as its first level, "
        f"got {s.channel_mult}. Keep the network in sagl's format.",
    )
    has_attention = [side in s.attention_resolutions for side in s.resolutions]
    down, up = ([types[2 if att else s.resblock_updown] for att in has_attention] for types in BLOCK_TYPES.values())
    resample = "resnet" if s.resblock_updown else "conv"
    return {
        "_class_name": "UNet2DModel",
        **{name: values[0] for name, values in REQUIRED.items()},
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
        "attention_head_dim": head_width(s),
        "attn_norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift" if s.use_scale_shift_norm else "default",
        "num_class_embeds": None if s.num_classes is None else s.num_classes + s.null_label,
    }


def _settings_from_config(config: Mapping[str, Any]) -> UNetSettings:
    """Return ADM's settings for any configuration of `UNet2DModel`.

    Raises:
        UserError: ADM cannot express them, or they are not those of a `UNet2DModel`.
    """
    try:
        return _convert_config({name: values[0] for name, values in REQUIRED.items()} | DEFAULTS | dict(config))
    except UserError:
        raise
    except (TypeError, LookupError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"`config` must be that of a UNet2DModel, but has a value of another type: {error}.") from error


def _convert_config(c: Mapping[str, Any]) -> UNetSettings:
    """Convert a complete configuration."""
    resampling = _check_config(c)
    widths, side = c["block_out_channels"], _side(c["sample_size"])
    has_attention = [name == "AttnDownBlock2D" for name in c["down_block_types"]]
    settings = {
        "image_size": side,
        "in_channels": c["in_channels"],
        "num_channels": widths[0],
        "num_res_blocks": c["layers_per_block"],
        "channel_mult": tuple(_multiplier(width, widths[0]) for width in widths),
        "attention_resolutions": tuple(side >> level for level, attention in enumerate(has_attention) if attention),
        "num_heads": 4 if c["attention_head_dim"] else 1,  # without a head width, one head of all channels
        "num_head_channels": c["attention_head_dim"],
        "use_new_attention_order": True,
        "use_scale_shift_norm": c["resnet_time_scale_shift"] == "scale_shift",
        "resblock_updown": resampling == "resnet",
        "dropout": c["dropout"],
        "learn_sigma": c["out_channels"] == 2 * c["in_channels"],
        "num_classes": c["num_class_embeds"],
    }
    try:
        return from_json(UNetSettings, settings)
    except UserError as error:
        raise UserError(f"`config` must be one that ADM can express, but as settings of ADM: {error}") from error


def _check_config(c: Mapping[str, Any]) -> str:
    """Refuse values that ADM has no settings for; return how levels are resampled, conv or resnet."""
    # How each level is resampled; the last block of encoder and decoder resamples nothing.
    resampling = {
        c[key] if name.startswith("Attn") else "resnet" if name.startswith("Resnet") else "conv"
        for key, blocks in zip(("downsample_type", "upsample_type"), BLOCK_TYPES, strict=True)
        for name in c[blocks][:-1]
    } or {c["downsample_type"]}
    scale_shift = c["resnet_time_scale_shift"] == "scale_shift"
    width, channels = c["block_out_channels"][0], c["in_channels"]
    allowed = REQUIRED | {
        "_class_name": ("UNet2DModel",),
        "out_channels": (channels, 2 * channels),
        "time_embedding_dim": (None, 4 * width),
        "downsample_type": ("conv", "resnet"),
        "upsample_type": ("conv", "resnet"),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "attn_norm_num_groups": (32,) if scale_shift else (None, 32),  # None and scale_shift: a middle without norm
    }
    if resampling == {"resnet"}:
        del allowed["downsample_padding"]  # of convolutions
    for name, values in allowed.items():
        value = c.get(name, values[0])
        _require(value in values, name, " or ".join(map(repr, values)), value)
    for name, types in BLOCK_TYPES.items():
        _require(set(c[name]) <= set(types), name, f"made of {', '.join(types)}", c[name])
        _require(len(c[name]) == len(c["block_out_channels"]), name, f"{len(c['block_out_channels'])} blocks", c[name])
    down, up = ([name.startswith("Attn") for name in c[key]] for key in BLOCK_TYPES)
    _require(down == up[::-1], "up_block_types", "like down_block_types in attention", c["up_block_types"])
    _require(len(resampling) == 1, "down_block_types", "like up_block_types in resampling", sorted(resampling))
    return resampling.pop()


def _require(condition: bool, name: str, allowed: str, value: object) -> None:
    require(condition, f"`{name}` of a UNet2DModel must be {allowed} for ADM to express it, got {value!r}.")


def _side(sample_size: int | Sequence[int] | None) -> int:
    """Return the side of square images from a number, or the same number twice."""
    sides = {sample_size} if isinstance(sample_size, int) else set(sample_size or ())
    _require(len(sides) == 1, "sample_size", "the side of square images", sample_size)
    return sides.pop()


def _multiplier(width: int, base: int) -> float:
    """Return a multiplier m with int(m * base) == width, however the division is rounded."""
    if width % base == 0:
        return width // base
    return width / base if int(width / base * base) == width else math.nextafter(width / base, math.inf)


def _stored_settings(config: Mapping[str, Any], converted: UNetSettings) -> UNetSettings:
    """Return the settings that sagl stored, which contain more than the keys of `UNet2DModel`, or else `converted`."""
    if SAGL_KEY not in config:
        return converted
    try:
        stored = from_json(UNetSettings, config[SAGL_KEY]["network"])
    except (KeyError, TypeError, AttributeError) as error:
        raise _unreadable(error) from error
    expected, actual = _config_from_settings(stored), _config_from_settings(converted)
    for name, value in actual.items():
        require(
            expected[name] == value,
            f"`{name}` of the configuration must agree with {SAGL_KEY}, {expected[name]!r}, got {value!r}. "
            f"Delete {SAGL_KEY} to use the other keys.",
        )
    return stored


def _unreadable(error: Exception) -> UserError:
    return UserError(
        f"`{SAGL_KEY}` of the configuration must be as sagl wrote it, but is not ({error}). "
        "Delete it to use the other keys."
    )
