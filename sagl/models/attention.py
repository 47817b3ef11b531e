"""Self-attention (eq. 13, 14), and the attention that each token receives."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sagl.shapes import Heads

MAP_ELEMENTS = {"cpu": 2**20}
"""Of an attention map that exist at one time while it is summed: on a CPU so many as its caches hold, else 2^24."""

PLAIN_TOKENS = 1024
"""Up to so many tokens, attention on a CPU in 16 bits is plain matrix products."""

PLAIN_TOKENS_TRAINED = 256
"""Up to so many, in more bits too, where a gradient will be taken."""


def split_qkv_legacy(qkv: Tensor, num_heads: int) -> tuple[Heads, Heads, Heads]:
    """Channels ordered head, then q | k | v (ADM's legacy order): (B, L, 3·head·d) -> 3 of (B, head, L, d)."""
    query, key, value = qkv.unflatten(-1, (num_heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind(0)
    return query, key, value


def split_qkv(qkv: Tensor, num_heads: int) -> tuple[Heads, Heads, Heads]:
    """Channels ordered q | k | v, then head (ADM's new order): (B, L, 3·head·d) -> 3 of (B, head, L, d)."""
    query, key, value = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def attention(query: Heads, key: Heads, value: Heads) -> Heads:
    """softmax(Q Kᵀ / √d) V, eq. 14: 3 of (B, head, L, d) -> (B, head, L, d)."""
    if _plain_pays(query):
        return ((query * query.shape[-1] ** -0.5) @ key.mT).softmax(dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


def _plain_pays(query: Heads) -> bool:
    """Whether the fused kernel is slower than plain products.

    It is on a CPU in 16 bits: it takes twice their time, forward and backward. In float32 it takes 1.05 of their time
    where a gradient is taken, and 0.7 forward alone.
    """
    if query.device.type != "cpu":
        return False
    if query.element_size() < 4:
        return query.shape[-2] <= PLAIN_TOKENS
    return torch.is_grad_enabled() and query.shape[-2] <= PLAIN_TOKENS_TRAINED


def attention_received(query: Heads, key: Heads) -> Tensor:
    """Attention each token receives, head by head: (B, head, L, d), (B, head, L, d) -> (B, head, L) float32.

    softmax(Q Kᵀ / √d) of eq. 14, summed over the queries. The rows of a softmax sum to 1, so the mean over
    tokens is exactly 1: the natural threshold. Only `MAP_ELEMENTS` of the map exist at a time.
    """
    _, heads, tokens, width = query.shape
    each = width**-0.25  # as ADM: q and k scaled by d^-1/4 each, safer in half precision than d^-1/2 after
    at_once = MAP_ELEMENTS.get(query.device.type, 2**24) // (heads * tokens)  # rows of the map, each of all heads
    samples, rows = max(1, at_once // tokens), max(1, min(at_once, tokens))
    sums = []
    for some, others in zip(query.split(samples), key.split(samples), strict=True):
        scaled = (others * each).mT
        parts = (((chunk * each) @ scaled).float().softmax(dim=-1).sum(dim=-2) for chunk in some.split(rows, dim=-2))
        sums.append(sum(parts, start=torch.zeros((), device=key.device)))
    return torch.cat(sums)
