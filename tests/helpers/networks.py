"""Networks so small that a test can sample from them and train them, and files of their weights."""

import zlib
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from sagl.models.adm import Classifier, UNet
from sagl.models.checkpoints import NetworkWeights, write_checkpoint
from sagl.models.cpu_kernels import optimize_for_cpu
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import ClassifierSettings, UNetSettings
from sagl.shapes import AttentionSite, NetworkOutput

SEED = 1000  # as tests/assets/meta.json
GREY = {"image_size": 8, "in_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": (1,)}
GREY |= {"attention_resolutions": (8,), "num_classes": 3, "null_label": True}
"""One grey channel, 8x8, three classes and a null label; attention at input.1, middle, output.0 and output.1."""
GREY_CLASSIFIER = {name: GREY[name] for name in GREY if name != "null_label"} | {"num_head_channels": 32}
"""A classifier of its images."""
SMALL = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2)}
SMALL |= {"attention_resolutions": (16, 8)}
COLOUR = {**SMALL, "num_classes": 5, "null_label": True}
"""Three channels, 16x16, five classes and a null label; the last attention at 8x8 is at output.1."""


def draw_weights(network, offset):
    """Give a network the weights of the reference values: a function of each entry's name and shape."""

    def draw(name, shape):
        n = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ (SEED + offset)))
        if n.dim() > 1:
            return n / n[0].numel() ** 0.5
        return 1 + 0.2 * n if name.endswith("weight") else 0.1 * n

    network.load_state_dict({name: draw(name, p.shape) for name, p in network.state_dict().items()})
    return network.eval()


def small_unet(**changes):
    """Return a UNet with random weights; a new one predicts zero."""
    return draw_weights(UNet(UNetSettings(**{**SMALL, **changes})), 1)


def small_classifier(**changes):
    settings = {**SMALL, "attention_resolutions": (8,), "num_head_channels": 32, "num_classes": 5}
    return draw_weights(Classifier(ClassifierSettings(**{**settings, **changes})), 1)


class StableUNet(UNet):
    """Predicts eps near x_t, as a trained network does at high noise; random weights alone amplify rounding errors."""

    def forward(self, x, timesteps, labels=None, **options):
        output = super().forward(x, timesteps, labels, **options)
        near = torch.cat([x, torch.zeros_like(output.out[:, x.shape[1] :])], dim=1)
        return output._replace(out=near + 0.1 * output.out)


def stable_unet(**changes):
    """Return a small colour network with random weights whose chains stay bounded."""
    return optimize_for_cpu(draw_weights(StableUNet(UNetSettings(**{**COLOUR, **changes})), 1)).requires_grad_(False)


def grey_unet(**changes):
    """Return a tiny grey network with random weights."""
    return optimize_for_cpu(draw_weights(UNet(UNetSettings(**{**GREY, **changes})), 1)).requires_grad_(False)


def grey_weights(*, recommended=None, diffusion=None, **changes):
    """Return a tiny grey network as a `NetworkWeights`."""
    network = grey_unet(**changes)
    return NetworkWeights(
        model_settings=network.settings,
        diffusion=diffusion or DiffusionSettings(),
        state_dict=network.state_dict(),
        recommended=recommended or {},
    )


def write_grey_unet(path, **options):
    """Write a tiny grey network as safetensors; return the path."""
    write_checkpoint(grey_weights(**options), path)
    return path


def grey_classifier(**changes):
    """Return a tiny grey classifier with random weights."""
    settings = {**GREY_CLASSIFIER, **changes}
    settings |= {"attention_resolutions": (settings["image_size"],)}
    return optimize_for_cpu(draw_weights(Classifier(ClassifierSettings(**settings)), 1))


def write_grey_classifier(path, *, diffusion=None, **changes):
    """Write a tiny classifier of noisy grey 8x8 images as safetensors; return the path."""
    network, diffusion = grey_classifier(**changes), diffusion or DiffusionSettings()
    content = NetworkWeights(model_settings=network.settings, diffusion=diffusion, state_dict=network.state_dict())
    write_checkpoint(content, path)
    return path


def write_training_checkpoint(path, **changes):
    """Write the part of a training checkpoint that holds the network: raw weights, and averages of half the values."""
    module = {f"network.{name}": tensor for name, tensor in grey_unet(**changes).state_dict().items()}
    settings = {"network": {**GREY, **changes}, "diffusion": {"noise_schedule": "cosine"}}
    half = {name: tensor / 2 for name, tensor in module.items()}
    torch.save({"hyper_parameters": settings, "state_dict": half, "current_model_state": module}, path)
    return path


def count_calls(network):
    """Return a list that grows by one entry with every forward pass of the network."""
    calls = []
    network.register_forward_pre_hook(lambda _, args: calls.append(args))
    return calls


# -------------------------------------------------------------------------------------- networks without convolutions


def toy_network(x, timesteps, labels=None, *, attention_sites=()):
    """Eps and variance channels that depend on all inputs, in the dtype of x; attention follows the pixels."""
    t = timesteps.to(x.dtype)[:, None, None, None] / 1000
    label = 0 if labels is None else 0.1 * labels.to(x.dtype)[:, None, None, None]
    out = torch.cat([torch.tanh(0.7 * x + t + label), torch.sin(3 * x)], dim=1)
    attention = x.abs().mean(dim=1, keepdim=True)[:, :, ::2, ::2]
    attention = attention / attention.mean(dim=(2, 3), keepdim=True)
    return SimpleNamespace(out=out, attention=dict.fromkeys(attention_sites, attention))


def toy_model(x, timesteps):
    """The toy network's channels as a function of images and timesteps."""
    return toy_network(x, timesteps).out


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
        attention_received = {}
        for k, block in enumerate(self.blocks):
            tokens, weights = block(tokens)
            attention_received[AttentionSite(f"block.{k}")] = weights.sum(dim=-2).unflatten(-1, (self.grid, self.grid))
        out = F.pixel_shuffle(self.head(tokens).mT.unflatten(-1, (self.grid, self.grid)), PATCH)
        return NetworkOutput(out, {site: attention_received[site] for site in attention_sites})


def transformer():
    """One with weights of a fixed seed."""
    g = torch.Generator().manual_seed(0)
    net = PatchTransformer().requires_grad_(False).eval()
    for name, p in net.named_parameters():
        wide = p.dim() == 1 or name in ("position", "label.weight")
        p.copy_(torch.randn(p.shape, generator=g) * (1.0 if wide else p[0].numel() ** -0.5))
    return net
