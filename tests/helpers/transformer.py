"""A transformer over patches, of some twenty thousand parameters, that a `NoisePredictor` can be made of."""

import torch
from torch import nn
from torch.nn import functional as F

from sagl.models.adm import UNetOutput
from sagl.shapes import AttentionSite

WIDTH, HEADS, PATCH, CHANNELS = 32, 4, 2, 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, tokens):
        """(B, L, C) -> (B, L, C), and the whole attention map (B, head, L, L)."""
        query, key, value = self.qkv(self.norms[0](tokens)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = (3 * query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
        tokens = tokens + self.out((weights @ value).transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norms[1](tokens)), weights


class PatchTransformer(nn.Module):
    """(B, 3, 16, 16) -> (B, 6, 16, 16); its sites are called block.0 and block.1."""

    def __init__(self, num_classes=4, side=16):
        super().__init__()
        self.grid = side // PATCH
        self.patches = nn.Conv2d(CHANNELS, WIDTH, PATCH, stride=PATCH)
        self.position = nn.Parameter(torch.zeros(self.grid**2, WIDTH))
        self.time = nn.Linear(1, WIDTH)
        self.label = nn.Embedding(num_classes, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 2 * CHANNELS * PATCH**2)

    def forward(self, x, timesteps, labels=None, *, attention_sites=()):
        emb = self.time(timesteps[:, None].to(x.dtype) / 1000)
        emb = emb if labels is None else emb + self.label(labels)
        tokens = self.patches(x).flatten(2).mT + self.position + emb[:, None]
        received = {}
        for k, block in enumerate(self.blocks):
            tokens, weights = block(tokens)
            received[AttentionSite(f"block.{k}")] = weights.sum(dim=-2).unflatten(-1, (self.grid, self.grid))
        out = F.pixel_shuffle(self.head(tokens).mT.unflatten(-1, (self.grid, self.grid)), PATCH)
        return UNetOutput(out, {site: received[site] for site in attention_sites})


def transformer():
    """One with weights of a fixed seed."""
    g = torch.Generator().manual_seed(0)
    net = PatchTransformer().requires_grad_(False).eval()
    for name, p in net.named_parameters():
        wide = p.dim() == 1 or name in ("position", "label.weight")
        p.copy_(torch.randn(p.shape, generator=g) * (1.0 if wide else p[0].numel() ** -0.5))
    return net
