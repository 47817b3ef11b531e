"""Adapters of the public code that sagl is compared with: guided-diffusion, and its fork with self-attention guidance.

Both are imported from checkouts, whose folders are arguments.
"""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sagl.settings.network import UNetSettings


def import_from(folder: Path) -> Any:
    """Import `guided_diffusion` from a checkout. Both packages have this name: a process can import only one."""
    for name in ("mpi4py", "blobfile"):  # imported by its distributed training loop, and not needed here
        module = types.ModuleType(name)
        module.MPI = None  # type: ignore[attr-defined]
        sys.modules.setdefault(name, module)
    sys.path.insert(0, str(folder))
    from guided_diffusion import gaussian_diffusion, nn, respace, script_util, unet

    return types.SimpleNamespace(
        diffusion=gaussian_diffusion, nn=nn, respace=respace, script_util=script_util, unet=unet
    )


def build_network(public: Any, s: UNetSettings, **more: Any) -> Any:
    """Build the public UNet with sagl's settings; its attention resolutions are downsampling factors."""
    return public.unet.UNetModel(
        image_size=s.image_size,
        in_channels=s.in_channels,
        model_channels=s.num_channels,
        out_channels=s.in_channels * (1 + s.learn_sigma),
        num_res_blocks=s.num_res_blocks,
        attention_resolutions=tuple(s.image_size // side for side in s.attention_resolutions),
        dropout=s.dropout,
        channel_mult=tuple(width / s.num_channels for width in s.widths),
        num_classes=None if s.num_classes is None else s.num_classes + s.null_label,
        num_heads=s.num_heads,
        num_head_channels=s.num_head_channels or -1,
        use_scale_shift_norm=s.use_scale_shift_norm,
        resblock_updown=s.resblock_updown,
        use_new_attention_order=s.use_new_attention_order,
        **more,
    )


def build_process(public: Any, schedule: str, respacing: str, **more: Any) -> Any:
    """Build the public diffusion process with a learned variance and respacing."""
    d = public.diffusion
    return public.respace.SpacedDiffusion(
        use_timesteps=public.respace.space_timesteps(1000, respacing),
        betas=d.get_named_beta_schedule(schedule, 1000),
        model_mean_type=d.ModelMeanType.EPSILON,
        model_var_type=d.ModelVarType.LEARNED_RANGE,
        loss_type=d.LossType.MSE,
        rescale_timesteps=False,
        **more,
    )


def sag_step(
    folder: Path, s: UNetSettings, state: dict[str, Tensor], *, depth: int, blur_sigma: float, scale: float
) -> Callable[[Tensor, int, Tensor | None], Tensor]:
    """Return a sampling step (x_t, step, labels) -> x_{t-1}, guided at output block `depth`."""
    public = import_from(folder)
    network = build_network(public, s, sel_attn_block="output", sel_attn_depth=depth).eval()
    network.load_state_dict(state)
    more = {"sel_attn_block": "output", "sel_attn_depth": depth, "num_heads": s.num_heads}
    process = build_process(public, "linear", "250", **more)
    guidance = {"guide_scale": 1 + scale, "guide_start": 250, "blur_sigma": blur_sigma}

    def step(x: Tensor, position: int, labels: Tensor | None) -> Tensor:
        kwargs = {} if labels is None else {"y": labels}
        timesteps = torch.full((len(x),), position)
        with torch.no_grad():
            out = process.p_sample(network, x, timesteps, model_kwargs=kwargs, guidance_kwargs=guidance)
        result: Tensor = out["sample"]
        return result

    return step


def training_step(
    folder: Path, s: UNetSettings, state: dict[str, Tensor], schedule: str
) -> Callable[[Tensor, Tensor, Tensor | None], float]:
    """Return a training step (x_0, timesteps, labels) -> loss, with AdamW and EMA as in its training loop."""
    public = import_from(folder)
    network = build_network(public, s)
    network.load_state_dict(state)
    process = build_process(public, schedule, "1000")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0)
    averages = [parameter.detach().clone() for parameter in network.parameters()]

    def step(x_0: Tensor, timesteps: Tensor, labels: Tensor | None) -> float:
        optimizer.zero_grad()
        kwargs = {} if labels is None else {"y": labels}
        loss = process.training_losses(network, x_0, timesteps, model_kwargs=kwargs)["loss"].mean()
        loss.backward()
        optimizer.step()
        public.nn.update_ema(averages, network.parameters(), rate=0.9999)
        return float(loss.detach())

    return step
