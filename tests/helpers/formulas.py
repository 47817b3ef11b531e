"""An independent implementation of the same mathematics in float64, to compare with."""

import math

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

# ------------------------------------------------------------------------------------- the process, in NumPy


def betas(kind, total):
    if kind == "linear":
        return np.linspace(0.1 / total, 20 / total, total)
    bar = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - bar[1:] / bar[:-1], 0.999)


class Process:
    """Tables of a respaced process, entry k for step k."""

    def __init__(self, kind, timesteps, total=1000):
        self.timesteps = np.array(timesteps)
        self.bar = np.cumprod(1 - betas(kind, total))[self.timesteps]
        self.bar_prev = np.append(1.0, self.bar[:-1])
        self.beta = 1 - self.bar / self.bar_prev
        self.posterior = self.beta * (1 - self.bar_prev) / (1 - self.bar)

    def log_variance(self, step, variance, fraction=0.0):
        low = np.log(self.posterior[max(step, 1)] if len(self.beta) > 1 else self.beta[0])
        high = np.log(self.beta[step])
        if variance == "fixed_large":
            return high if step else low
        frac = (fraction + 1) / 2 if variance == "learned_range" else 0.0
        return frac * high + (1 - frac) * low

    def x0_hat(self, x, eps, step):
        return (x - np.sqrt(1 - self.bar[step]) * eps) / np.sqrt(self.bar[step])

    def ddpm(self, x, eps, log_variance, step, noise, score=0.0, clip=False):
        """Ho et al., algorithm 2, line 4, for the eps that the clipped x0_hat stands for."""
        bar, beta = self.bar[step], self.beta[step]
        if clip:
            eps = (x - np.sqrt(bar) * np.clip(self.x0_hat(x, eps, step), -1, 1)) / np.sqrt(1 - bar)
        mean = (x - beta / np.sqrt(1 - bar) * eps) / np.sqrt(1 - beta)
        return mean + np.exp(log_variance) * score + (np.exp(log_variance / 2) * noise if step else 0)

    def ddim(self, x, eps, step, noise, score=0.0, clip=False, eta=0.0):
        """Song et al., eq. 12."""
        bar, bar_prev = self.bar[step], self.bar_prev[step]
        if clip:
            eps = (x - np.sqrt(bar) * np.clip(self.x0_hat(x, eps, step), -1, 1)) / np.sqrt(1 - bar)
        eps = eps - np.sqrt(1 - bar) * score
        variance = eta**2 * self.posterior[step]
        return (
            np.sqrt(bar_prev) * self.x0_hat(x, eps, step)
            + np.sqrt(1 - bar_prev - variance) * eps
            + np.sqrt(variance) * noise
        )

    def bound(self, x_0, x, eps, log_variance, step, clip=False):
        """One term of the bound for each sample, in bits per dimension."""
        x0_hat = self.x0_hat(x, eps, step)
        mean, true_mean = (self.posterior_mean(v, x, step) for v in (np.clip(x0_hat, -1, 1) if clip else x0_hat, x_0))
        if step:
            term = np.log(np.exp(log_variance) / self.posterior[step]) - 1
            term = (term + (self.posterior[step] + (true_mean - mean) ** 2) / np.exp(log_variance)) / 2
        else:
            term = -np.log(pixel_probability(x_0, mean, np.exp(log_variance / 2)))
        return (term * np.ones_like(x_0)).reshape(len(x_0), -1).mean(axis=1) / math.log(2)

    def posterior_mean(self, x_0, x, step):
        bar, bar_prev = self.bar[step], self.bar_prev[step]
        return (np.sqrt(bar_prev) * self.beta[step] * x_0 + np.sqrt(1 - self.beta[step]) * (1 - bar_prev) * x) / (
            1 - bar
        )


def pixel_probability(x, mean, deviation):
    """Probability of an 8-bit pixel under a Gaussian, with a tanh for the distribution function (Page 1977)."""

    def below(edge):
        z = (edge - mean) / deviation
        return (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) / 2

    upper = np.where(x > 0.999, 1.0, below(x + 1 / 255))
    return np.maximum(upper - np.where(x < -0.999, 0.0, below(x - 1 / 255)), 1e-12)


# ------------------------------------------------------------------------------- the network, from its weights


def split_heads(qkv, heads, order):
    """(B, 3C, L) -> for each head q, k, v of (B, d, L); "legacy" lays out head by head, "new" q, then k, then v."""
    width = qkv.shape[1] // 3
    d = width // heads
    starts = [(3 * d * h, d) if order == "legacy" else (d * h, width) for h in range(heads)]
    return [[qkv[:, start + i * apart :][:, :d] for i in range(3)] for start, apart in starts]


def attend(qkv, heads, order, edit=None):
    """Attention: its output (B, C, L) and its whole maps (B, head, L, L); `edit` computes the output of a head."""
    outs, maps = [], []
    for q, k, v in split_heads(qkv, heads, order):
        weights = torch.einsum("bdi,bdj->bij", q, k).div(math.sqrt(q.shape[1])).softmax(dim=2)
        outs.append(edit(q, k, v) if edit else torch.einsum("bij,bdj->bdi", weights, v))
        maps.append(weights)
    return torch.cat(outs, dim=1), torch.stack(maps, dim=1)


def adm(network, x, timesteps, labels=None, edits=None, emb_noise=0.0):
    """A UNet's output in float64, computed from its state dict, and the whole attention maps by (site, heads).

    `edits` has functions by site, (q, k, v) of one head, (B, d, L) each -> (B, d, L), in place of attention;
    `emb_noise` is added to the timestep embedding in units of its standard deviation.
    """
    s, p = network.settings, {name: value.double() for name, value in network.state_dict().items()}
    maps = {}

    def normed(x, name):
        return F.group_norm(x, 32, p[f"{name}.weight"], p[f"{name}.bias"])

    def conv(x, name, stride=1):
        weight = p[f"{name}.weight"]
        return F.conv2d(x, weight, p[f"{name}.bias"], stride=stride, padding=weight.shape[-1] // 2)

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def doubled(x):
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    def residual(x, name, resample):
        h = conv(resample(F.silu(normed(x, f"{name}.in_layers.0"))), f"{name}.in_layers.2")
        emb_out = linear(F.silu(emb), f"{name}.emb_layers.1")[:, :, None, None]
        if s.use_scale_shift_norm:
            scale, shift = emb_out[:, : h.shape[1]], emb_out[:, h.shape[1] :]
            h = normed(h, f"{name}.out_layers.0") * (1 + scale) + shift
        else:
            h = normed(h + emb_out, f"{name}.out_layers.0")
        x = resample(x)
        x = conv(x, f"{name}.skip_connection") if f"{name}.skip_connection.weight" in p else x
        return x + conv(F.silu(h), f"{name}.out_layers.3")

    def attention(x, name, site, heads):
        qkv = F.conv1d(normed(x, f"{name}.norm").flatten(2), p[f"{name}.qkv.weight"], p[f"{name}.qkv.bias"])
        order = "new" if s.use_new_attention_order else "legacy"
        out, maps[site, "layer"] = attend(qkv, heads, order, (edits or {}).get(site))
        maps[site, "sag_release"] = attend(qkv, s.num_heads, "legacy")[1]
        out = F.conv1d(out, p[f"{name}.proj_out.weight"], p[f"{name}.proj_out.bias"])
        return x + out.reshape(x.shape)

    def stage(x, block, site, heads, halves=False):
        num_residual = 0
        for j in range(4):
            name = f"{block}.{j}"
            if f"{name}.qkv.weight" in p:
                x = attention(x, name, site, heads or x.shape[1] // s.num_head_channels)
            elif f"{name}.in_layers.0.weight" in p:
                grows = num_residual and block.startswith("output")  # a second residual block on the way up resamples
                x = residual(x, name, doubled if grows else (lambda x: F.avg_pool2d(x, 2)) if halves else lambda x: x)
                num_residual += 1
            elif f"{name}.op.weight" in p:
                x = conv(x, f"{name}.op", stride=2)
            elif f"{name}.conv.weight" in p:
                x = conv(doubled(x), f"{name}.conv")
            elif f"{name}.weight" in p:
                x = conv(x, name)
        return x

    half = s.num_channels // 2
    angles = timesteps.double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    emb = linear(torch.cat([angles.cos(), angles.sin()], dim=1), "time_embed.0")
    emb = linear(F.silu(emb), "time_embed.2")
    emb = emb + emb_noise * torch.from_numpy(np.std(emb.detach().numpy(), axis=1, ddof=1, keepdims=True))
    emb = emb if labels is None else emb + p["label_emb.weight"][labels]

    down = None if s.num_head_channels else s.num_heads
    up = down and (s.num_heads_upsample or s.num_heads)
    x, skips = x.double(), []
    for k in range(len(network.input_blocks)):
        halves = s.resblock_updown and k > 0 and k % (s.num_res_blocks + 1) == 0
        x = stage(x, f"input_blocks.{k}", f"input.{k}", down, halves)
        skips.append(x)
    x = stage(x, "middle_block", "middle", down)
    for k in range(len(network.output_blocks)):
        x = stage(torch.cat([x, skips.pop()], dim=1), f"output_blocks.{k}", f"output.{k}", up)
    return conv(F.silu(normed(x, "out.0")), "out.2"), maps


# --------------------------------------------------------------------------------------------- Algorithm 1


def sag_eps(predict, x, bar, *, scale, threshold, blur_sigma, kernel_size, clip):
    """Guided eps and mask; `predict(x)` gives eps and the whole map (B, head, L, L) of a square grid of tokens."""
    eps, maps = predict(x)
    side = math.isqrt(maps.shape[-1])
    attention_received = maps.mean(dim=1).sum(dim=1).reshape(-1, 1, side, side)
    mask = F.interpolate((attention_received > threshold).double(), size=x.shape[-2:], mode="nearest")
    x0_hat = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
    x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat
    blurred = gaussian_blur(x0_hat, [kernel_size] * 2, [blur_sigma] * 2)
    x_degraded = math.sqrt(bar) * ((1 - mask) * x0_hat + mask * blurred) + math.sqrt(1 - bar) * eps
    eps_degraded = predict(x_degraded)[0]
    return eps_degraded + (1 + scale) * (eps - eps_degraded), mask
