"""Self-attention (eq. 13, 14), and the attention that each token receives."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sagl.shapes import Heads

MAX_MAP_ELEMENTS = {"cpu": 2**20}
"""Elements of the attention map that exist at a time during its summation on a CPU, where they fit into the caches."""
MAX_SAMPLE_MAP_ELEMENTS = 2**20
"""Elements of each sample's map that exist at a time elsewhere, so that the work does not depend on the batch size."""
MAX_UNFUSED_TOKENS_HALF = 1024
"""On CPUs in half precision, plain matrix products are used up to this many tokens."""
MAX_UNFUSED_TOKENS_TRAINING = 256
"""On CPUs with gradients, plain matrix products are used up to this many tokens."""


def split_qkv_legacy(qkv: Tensor, num_heads: int) -> tuple[Heads, Heads, Heads]:
    """Split channels ordered head, then q | k | v (ADM's legacy order): (B, L, 3·head·d) -> 3 x (B, head, L, d)."""
    query, key, value = qkv.unflatten(-1, (num_heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind(0)
    return query, key, value


def split_qkv(qkv: Tensor, num_heads: int) -> tuple[Heads, Heads, Heads]:
    """Split channels ordered q | k | v, then head (ADM's new order): (B, L, 3·head·d) -> 3 x (B, head, L, d)."""
    query, key, value = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def attention(query: Heads, key: Heads, value: Heads) -> Heads:
    """Compute softmax(Q Kᵀ / √d) V, eq. 14: 3 x (B, head, L, d) -> (B, head, L, d)."""
    if _prefer_unfused(query):
        return ((query * query.shape[-1] ** -0.5) @ key.mT).softmax(dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


def _prefer_unfused(query: Heads) -> bool:
    """Return whether the fused kernel is slower than plain matrix products.

    On CPUs it takes twice their time in half precision, forward and backward; in float32, 1.05 of their time with
    gradients and 0.7 without.
    """
    if query.device.type != "cpu":
        return False
    if query.element_size() < 4:
        return query.shape[-2] <= MAX_UNFUSED_TOKENS_HALF
    return torch.is_grad_enabled() and query.shape[-2] <= MAX_UNFUSED_TOKENS_TRAINING


def attention_received(query: Heads, key: Heads) -> Tensor:
    """Sum softmax(Q Kᵀ / √d) of eq. 14 over the queries: 2 x (B, head, L, d) -> (B, head, L) float32.

    The rows of a softmax sum to 1, so the mean over tokens is exactly 1: the natural threshold. Only a part of the map
    exists at a time.
    """
    scale = query.shape[-1] ** -0.25  # as ADM: on q and k each, which is safer in half precision than d^-1/2 afterwards
    samples, rows = _map_part(query)
    sums = []
    for q, k in zip(query.split(samples), key.split(samples), strict=True):
        scaled_k = (k * scale).mT
        maps = (((chunk * scale) @ scaled_k).float().softmax(dim=-1) for chunk in q.split(rows, dim=-2))
        sums.append(sum((part.sum(dim=-2) for part in maps), start=torch.zeros((), device=key.device)))
    return torch.cat(sums)


def _map_part(query: Heads) -> tuple[int, int]:
    """Return how many samples, and rows of each one's map, are summed at a time."""
    batch, heads, tokens, _ = query.shape
    if query.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = MAX_MAP_ELEMENTS["cpu"] // (heads * tokens)
        return max(1, rows // tokens), max(1, min(rows, tokens))
    return batch, max(1, min(MAX_SAMPLE_MAP_ELEMENTS // (heads * tokens), tokens))
