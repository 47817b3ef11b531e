"""Self-attention (eq. 13, 14), and the attention that each token receives."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sagl.shapes import Heads

QUERIES_AT_ONCE = 256
"""Rows of an attention map that exist at one time while it is summed."""

PLAIN_TOKENS = 256
"""Up to so many tokens, attention on a CPU is plain matrix products."""


def split_after_heads(qkv: Tensor, num_heads: int) -> tuple[Heads, Heads, Heads]:
    """Channels ordered head, then q | k | v (ADM's legacy order): (B, L, 3·head·d) -> 3 of (B, head, L, d)."""
    query, key, value = qkv.unflatten(-1, (num_heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind(0)
    return query, key, value


def split_before_heads(qkv: Tensor, num_heads: int) -> tuple[Heads, Heads, Heads]:
    """Channels ordered q | k | v, then head (ADM's new order): (B, L, 3·head·d) -> 3 of (B, head, L, d)."""
    query, key, value = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def attention(query: Heads, key: Heads, value: Heads) -> Heads:
    """softmax(Q Kᵀ / √d) V, eq. 14: 3 of (B, head, L, d) -> (B, head, L, d).

    On a CPU, for few tokens, the fused kernel takes twice as long as plain products forward, and four times backward.
    """
    if query.device.type == "cpu" and query.shape[-2] <= PLAIN_TOKENS:
        return ((query * query.shape[-1] ** -0.5) @ key.mT).softmax(dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


def attention_received(query: Heads, key: Heads) -> Tensor:
    """Attention each token receives, head by head: (B, head, L, d), (B, head, L, d) -> (B, head, L) float32.

    softmax(Q Kᵀ / √d) of eq. 14, summed over the queries. The rows of a softmax sum to 1, so the mean over
    tokens is exactly 1: the natural threshold. Only `QUERIES_AT_ONCE` rows of the map exist at a time.
    """
    each = query.shape[-1] ** -0.25  # as ADM: q and k scaled by d^-1/4 each, safer in half precision than d^-1/2 after
    key = (key * each).mT
    received = torch.zeros(key.shape[:2] + key.shape[-1:], dtype=torch.float32, device=key.device)
    for chunk in query.split(QUERIES_AT_ONCE, dim=-2):
        received += ((chunk * each) @ key).float().softmax(dim=-1).sum(dim=-2)
    return received
