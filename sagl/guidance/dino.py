"""Class attention of a DINO vision transformer (Caron et al. 2021), for the comparison of masks."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import VisionTransformer

from sagl.errors import UserError
from sagl.shapes import Image, TokenMap

HEAD_CHANNELS = 64
"""Channels per attention head of all released DINO transformers."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's pixels, with which DINO was trained."""
RENAMES = {
    r"^cls_token": "class_token",
    r"^pos_embed": "encoder.pos_embedding",
    r"^patch_embed\.proj": "conv_proj",
    r"^norm\.": "encoder.ln.",
    r"^blocks\.": "encoder.layers.encoder_layer_",
    r"\.norm(\d)": r".ln_\1",
    r"\.attn\.qkv\.": ".self_attention.in_proj_",
    r"\.attn\.proj": ".self_attention.out_proj",
    r"\.mlp\.fc1": ".mlp.0",
    r"\.mlp\.fc2": ".mlp.3",
}
"""Patterns of parameter names of the released files -> names in torchvision."""


def load_dino(path: str) -> VisionTransformer:
    """Load a DINO transformer from a released file (dino_deitsmall8_pretrain.pth …), in float32 on the CPU.

    Raises:
        UserError: the file does not exist or is not a DINO transformer.
    """
    try:
        return build_dino(torch.load(Path(path), map_location="cpu", weights_only=True))
    except Exception as error:  # a file of another kind fails anywhere in the unpickler, or has other names
        reason = " ".join(str(error).split())
        raise UserError(f"`sag.dino_checkpoint` must be a file of DINO weights, got {path}: {reason:.200}") from error


def build_dino(state_dict: Mapping[str, Tensor]) -> VisionTransformer:
    """Build the transformer whose sizes follow from its weights, under the names of the released files."""
    hidden, _, patch, _ = state_dict["patch_embed.proj.weight"].shape
    network = VisionTransformer(
        image_size=patch * math.isqrt(state_dict["pos_embed"].shape[1] - 1),
        patch_size=patch,
        num_layers=len({name.split(".")[1] for name in state_dict if name.startswith("blocks.")}),
        num_heads=max(1, hidden // HEAD_CHANNELS),
        hidden_dim=hidden,
        mlp_dim=len(state_dict["blocks.0.mlp.fc1.weight"]),
    )
    network.heads = nn.Identity()
    network.load_state_dict({_rename(name): value for name, value in state_dict.items()})
    return network.requires_grad_(False).eval()


def _rename(name: str) -> str:
    for pattern, replacement in RENAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def class_attention(network: VisionTransformer, images: Image) -> TokenMap:
    """Return the last layer's attention from the class token to the patches, averaged over heads.

    Args:
        network: a transformer of `load_dino`.
        images: (B, 1 or 3, H, W) in [-1, 1] of any size; they are resized to that of the network.

    Returns:
        (B, 1, H', W') float32 with mean 1.
    """
    size, network = network.image_size, network.to(images.device)
    rgb = F.interpolate(images.float().expand(-1, 3, -1, -1), (size, size), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(value, device=images.device)[:, None, None] for value in (MEAN, STD))
    patches = network.conv_proj(((rgb + 1) / 2 - mean) / std).flatten(2).mT
    tokens = torch.cat([network.class_token.expand(len(patches), -1, -1), patches], dim=1)
    tokens = network.encoder.layers[:-1](tokens + network.encoder.pos_embedding)
    last = network.encoder.layers[-1]
    tokens = last.ln_1(tokens)
    _, weights = last.self_attention(tokens, tokens, tokens, need_weights=True)  # averaged over heads: (B, L, L)
    side = size // network.patch_size
    scores = weights[:, 0, 1:].unflatten(-1, (1, side, side))
    return scores / scores.mean(dim=(-2, -1), keepdim=True)
