import math

import pytest
import torch
from torch.nn import functional as F

from sagl.errors import UserError
from sagl.guidance.dino import MEAN, STD, class_attention, load_dino
from tests.helpers.reference_values import generator

WIDTH, PATCH, SIDE, LAYERS = 128, 4, 6, 2  # two heads of 64 channels, images of 24x24 pixels


def state_dict():
    """Random weights of a tiny transformer, under the names of the released files."""
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, SIDE**2 + 1, WIDTH), "norm": (WIDTH,)}
    shapes |= {"patch_embed.proj": (WIDTH, 3, PATCH, PATCH)}
    for k in range(LAYERS):
        sizes = {"norm1": (WIDTH,), "norm2": (WIDTH,), "attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        sizes |= {"mlp.fc1": (2 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 2 * WIDTH)}
        shapes |= {f"blocks.{k}.{name}": shape for name, shape in sizes.items()}
    g, weights = generator(0), {}
    for name, shape in shapes.items():
        if name in ("cls_token", "pos_embed"):
            weights[name] = torch.randn(shape, generator=g)
        else:
            fan_in = math.prod(shape[1:])
            weights[f"{name}.weight"] = torch.randn(shape, generator=g) * 2 / fan_in**0.5
            weights[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=g)
    return weights


def dino_file(folder):
    """Write the tiny transformer; return the path as text."""
    torch.save(state_dict(), folder / "dino.pth")
    return str(folder / "dino.pth")


def class_attention_by_hand(p, images):
    """The last layer's attention from the class token in float64, of images of the network's size."""
    p = {name: value.double() for name, value in p.items()}

    def linear(x, name):
        return x @ p[f"{name}.weight"].mT + p[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)

    x = ((images.double() + 1) / 2 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    patches = F.unfold(x, PATCH, stride=PATCH).mT @ p["patch_embed.proj.weight"].flatten(1).mT
    patches = patches + p["patch_embed.proj.bias"]
    tokens = torch.cat([p["cls_token"].expand(len(x), -1, -1), patches], dim=1) + p["pos_embed"]
    for k in range(LAYERS):
        qkv = linear(norm(tokens, f"blocks.{k}.norm1"), f"blocks.{k}.attn.qkv")
        q, key, v = qkv.unflatten(-1, (3, WIDTH // 64, 64)).permute(2, 0, 3, 1, 4)
        weights = (q @ key.mT / 8).softmax(dim=-1)
        tokens = tokens + linear((weights @ v).transpose(1, 2).flatten(2), f"blocks.{k}.attn.proj")
        hidden = F.gelu(linear(norm(tokens, f"blocks.{k}.norm2"), f"blocks.{k}.mlp.fc1"))
        tokens = tokens + linear(hidden, f"blocks.{k}.mlp.fc2")
    scores = weights.mean(dim=1)[:, 0, 1:].reshape(-1, 1, SIDE, SIDE)
    return scores / scores.mean(dim=(2, 3), keepdim=True)


def test_scores_are_the_class_tokens_attention_in_the_last_layer_with_mean_1(tmp_path):
    images = torch.rand(2, 3, SIDE * PATCH, SIDE * PATCH, generator=generator(1)) * 2 - 1
    actual, expected = (
        class_attention(load_dino(dino_file(tmp_path)), images),
        class_attention_by_hand(state_dict(), images),
    )
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    assert float(expected.std()) > 0.1


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 32, 20)])
def test_images_of_any_size_and_grey_ones_have_scores_on_the_networks_grid(shape, tmp_path):
    scores = class_attention(load_dino(dino_file(tmp_path)), torch.zeros(shape))
    assert scores.shape == (2, 1, SIDE, SIDE)
    torch.testing.assert_close(scores.mean(dim=(1, 2, 3)), torch.ones(2))


@pytest.mark.parametrize("content", [None, b"", b"text", {"weight": 1}, ["list"]])
def test_a_file_without_a_dino_transformer_is_refused(content, tmp_path):
    path = tmp_path / "other.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=r"`sag\.dino_checkpoint`.*other\.pth"):
        load_dino(str(path))
