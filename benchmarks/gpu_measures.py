"""Sections of `gpu_check` that compute in their own process: kernels, steps, memory, training and compilation."""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_machine import SMALL, Machine, random_unet
from sagl.diffusion.losses import training_losses
from sagl.diffusion.noise import step_noise
from sagl.diffusion.schedule import make_schedule
from sagl.models.adm import UNet
from sagl.models.checkpoints import cast_weights
from sagl.models.cpu_kernels import optimize_for_cpu
from sagl.models.memory import estimate_memory
from sagl.models.normalization import _channel_norm, _norm_and_affine
from sagl.models.zoo import RELEASED
from sagl.modules.training_module import adamw
from sagl.sampling.pipeline import build_pipeline
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.network import UNetSettings
from sagl.settings.sampling import SamplerSettings, WeightPrecision
from sagl.settings.training import OptimizerSettings
from sagl.utils.environment import disable_tf32

SYNCHRONISATION = "called a synchronizing CUDA operation"
"""PyTorch's warning of a synchronisation. The first switch to the debug mode warns too, that it misses some of them."""


def build(machine: Machine, *, training: bool = False, **changes: Any) -> UNet:  # noqa: ANN401
    """Return the LSUN network, or a small one, with random weights: in 16 bits, or in float32 for training."""
    disable_tf32()
    lsun = RELEASED["lsun_cat"].settings
    assert isinstance(lsun, UNetSettings)
    with machine.device:
        network = random_unet(replace(SMALL if machine.small else lsun, dropout=0.0, **changes))
    optimize_for_cpu(network)
    if training:
        return network.train()
    precision: WeightPrecision = "bf16-true" if machine.has_fast_16_bits else "32-true"
    return cast_weights(network.eval().requires_grad_(False), precision, machine.device)


def inputs(machine: Machine, network: UNet, batch: int) -> tuple[Tensor, Tensor]:
    """Return noisy images and timesteps."""
    size = network.settings.image_size
    x = torch.randn(batch, 3, size, size, device=machine.device)
    return x, torch.randint(1000, (batch,), device=machine.device)


def seconds(machine: Machine, function: Callable[[], object], repeats: int = 3) -> float:
    """Return the time of a call after a first one."""
    function()
    machine.wait()
    start_time = time.perf_counter()
    for _ in range(repeats):
        function()
    machine.wait()
    return (time.perf_counter() - start_time) / repeats


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    actual, expected = actual.detach().cpu().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())


def kernels(machine: Machine) -> None:
    """Compare normalisation and a float32 convolution with float64, and time forward passes."""
    side = 32 if machine.small else 256
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x = (torch.randn(2, 64, side, side) + 3).to(machine.device, dtype).to(memory_format=torch.channels_last)
        weight, bias, scale, shift = torch.randn(64), torch.randn(64), torch.randn(2, 64) / 3, torch.randn(2, 64)
        reference = x.detach().cpu().double().requires_grad_()
        expected = _norm_and_affine(reference, weight.double(), bias.double(), scale.double(), shift.double(), 1e-5)
        weight, bias, scale, shift = (value.to(machine.device) for value in (weight, bias, scale, shift))
        actual = _channel_norm(x.requires_grad_(), weight, bias, scale, shift, 1e-5)
        weights = torch.randn_like(expected)
        (gradient,) = torch.autograd.grad((actual * weights.to(actual)).sum(), x)
        (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), reference)
        errors = relative_error(actual, expected), relative_error(gradient, expected_gradient)
        machine.check(max(errors) < limit, f"normalisation and its gradient in {dtype}", errors)
    disable_tf32()
    conv = torch.nn.Conv2d(64, 64, 3, padding=1).to(machine.device)
    x = torch.randn(4, 64, 64, 64, device=machine.device)
    with torch.no_grad():
        expected = torch.nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1).cpu()  # type: ignore[union-attr]
        machine.check(
            relative_error(conv(x), expected) < 1e-5,
            "a float32 convolution is not TF32",
            relative_error(conv(x), expected),
        )
    network = build(machine)
    for batch in (1, 2) if machine.small else (1, 8, 32):
        x, timesteps = inputs(machine, network, batch)
        with torch.inference_mode():
            time_ = seconds(machine, partial(network, x, timesteps))
        machine.report(f"forward pass of {batch}", f"{time_ * 1e3:.1f} ms, {time_ / batch * 1e3:.2f} ms an image")
    _profile(machine, network, x, timesteps)


def _profile(machine: Machine, network: UNet, x: Tensor, timesteps: Tensor) -> None:
    """Report the operations that take most of a forward pass."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if machine.is_gpu else [])]
    with torch.inference_mode(), profile(activities=activities) as result:
        network(x, timesteps)
        machine.wait()
    key = "self_device_time_total" if machine.is_gpu else "self_cpu_time_total"
    events = sorted(result.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events) or 1
    for event in events[:12]:
        machine.report("  share of the time", f"{getattr(event, key) / total:6.1%} {event.count:5d} × {event.key[:90]}")


def steps(machine: Machine) -> None:
    """Time guided steps and count the synchronisations that PyTorch reports in them."""
    network = build(machine)
    site = "output.2" if "output.2" in network.settings.sites else "middle"
    batch = 2 if machine.small else 16
    for sampler, respacing in (("ddpm", "50"), ("ddim", "ddim25")):
        settings = SamplerSettings(sampler=sampler, respacing=respacing)
        guidances = {"sag": SelfAttentionGuidance(scale=0.1, site=site)}
        pipeline = build_pipeline(network, DiffusionSettings(), settings, guidances)
        with torch.inference_mode():
            trajectory = pipeline.sample_progressive(0, range(batch), None)
            time_ = seconds(machine, partial(next, trajectory), 1 if machine.small else 4)
            machine.report(f"a guided {sampler} step of {batch}", f"{time_ * 1e3:.0f} ms")
            _check_synchronisations(machine, f"a guided {sampler} step does not wait", partial(next, trajectory))
    draw = step_noise(0, range(batch), (3, network.settings.image_size, network.settings.image_size), machine.device)
    machine.report(f"noise of {batch} images", f"{seconds(machine, lambda: draw(3)) * 1e3:.1f} ms on the CPU")


def _check_synchronisations(machine: Machine, name: str, function: Callable[[], object]) -> None:
    if not machine.is_gpu:
        machine.skip(name, "needs a GPU")
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        function()
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{w.filename}:{w.lineno}" for w in caught if str(w.message) == SYNCHRONISATION]
    machine.check(not places, name, f"{len(places)} synchronisations {' '.join(places)}")


def memory(machine: Machine) -> None:
    """Compare the estimate of the automatic batch size with the memory in use, and a large batch with its quarters."""
    network = build(machine)
    _compare_estimate(machine, network)
    batch = 4 if machine.small else 64
    name = f"a batch of {batch}, with maps of 2^31 elements at 256x256, is its quarters"
    x, timesteps = inputs(machine, network, batch)
    try:
        with torch.inference_mode():
            whole = network(x, timesteps).out
            quarters = zip(x.chunk(4), timesteps.chunk(4), strict=True)
            error = relative_error(whole, torch.cat([network(part, t).out for part, t in quarters]).cpu())
        machine.check(error < 0.05, name, error)
    except torch.OutOfMemoryError:
        machine.skip(name, "it does not fit this GPU")


def _compare_estimate(machine: Machine, network: UNet) -> None:
    _, estimate = estimate_memory(network.settings, torch.bfloat16)
    if not machine.is_gpu:
        machine.skip("memory of a forward pass", "needs a GPU")
        return
    for batch in (1, 8, 32):
        x, timesteps = inputs(machine, network, batch)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.inference_mode():
            network(x, timesteps)
        used = (torch.cuda.max_memory_allocated() - before) / batch
        details = f"{used / 1e6:.0f} MB an image, estimated {estimate / 1e6:.0f} MB"
        machine.check(used < 1.15 * estimate, f"memory of a batch of {batch}", details)


def training(machine: Machine) -> None:
    """Train with and without activation checkpoints in growing batches; report time and memory."""
    for use_checkpoint in (False, True):
        network = build(machine, training=True, use_checkpoint=use_checkpoint)
        optimizer = adamw(network.parameters(), OptimizerSettings())
        for batch in (1, 2) if machine.small else (1, 4, 8):
            name = f"training with batch {batch}, use_checkpoint {use_checkpoint}"
            if machine.is_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                time_ = seconds(machine, partial(_training_step, machine, network, optimizer, batch), 2)
            except torch.OutOfMemoryError:
                machine.report(name, "does not fit")
                break
            peak = torch.cuda.max_memory_allocated() / 1e9 if machine.is_gpu else 0.0
            machine.report(name, f"{time_ * 1e3:.0f} ms, {batch / time_:.2f} images/s, peak {peak:.1f} GB")
            if machine.is_gpu and use_checkpoint and batch == 8:
                machine.check(
                    peak + 2.2 < 21.6, "batch 8 with use_checkpoint and an average fit 24 GB", f"{peak + 2.2:.1f}"
                )
    if not machine.is_gpu:
        machine.skip("memory of a training", "needs a GPU")


def _training_step(machine: Machine, network: UNet, optimizer: torch.optim.AdamW, batch: int) -> None:
    x, timesteps = inputs(machine, network, batch)
    with torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.has_fast_16_bits, cache_enabled=False):
        losses = training_losses(
            lambda x_t, t: network(x_t, t).out,
            x.clamp(-1, 1),
            timesteps,
            torch.randn_like(x),
            make_schedule(DiffusionSettings()),
            kind="hybrid",
            variance="learned_range",
        )
    losses.total.mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def compilation(machine: Machine) -> None:
    """Compare the compiled network with the eager one."""
    network, batch = build(machine), 2 if machine.small else 8
    x, timesteps = inputs(machine, network, batch)
    with torch.inference_mode():
        expected, eager = network(x, timesteps).out.clone().cpu(), seconds(machine, partial(network, x, timesteps))
        for mode in (None, "reduce-overhead") if machine.is_gpu else (None,):
            torch.compiler.reset()
            network.compile(dynamic=False, mode=mode, backend="inductor" if machine.is_gpu else "eager")
            start_time = time.perf_counter()
            network(x, timesteps)
            machine.wait()
            first = time.perf_counter() - start_time
            time_ = seconds(machine, partial(network, x, timesteps))
            error = relative_error(network(x, timesteps).out, expected)
            details = f"{time_ * 1e3:.1f} ms, eager {eager * 1e3:.1f} ms, first call {first:.0f} s, error {error:.3f}"
            machine.check(error < 0.1, f"compiled, mode {mode}", details)
    if machine.is_gpu:
        result = machine.sample("compiled", "--trainer.compile", "true", "--sag.scale", 0.3, limit=600)
        machine.check(result.code == 0, "sample --trainer.compile true", result)
    else:
        machine.skip("code that torch.compile generates", "needs a GPU; the graph was run eagerly")


SECTIONS: Mapping[str, Callable[[Machine], None]] = {
    "kernels": kernels,
    "steps": steps,
    "memory": memory,
    "training": training,
    "compilation": compilation,
}
