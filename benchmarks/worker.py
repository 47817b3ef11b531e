"""Worker process of speed.py: runs one side of a comparison, a unit of work for every line on stdin.

Its argument is a `Side` as JSON. Each line is answered by a line of JSON: `unit` by seconds, page faults and the peak
memory of the process in bytes; `live` by the largest number of bytes in tensors at one time, without the weights;
`profile` by the fraction of time of each operation. `save FILE` stores the result of the last unit.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sagl.models.adm import UNet
from sagl.models.checkpoints import cast_weights
from sagl.models.cpu_kernels import optimize_for_cpu
from sagl.models.zoo import get_unet_settings
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.network import UNetSettings
from sagl.settings.sampling import SamplerSettings, WeightPrecision
from sagl.utils.environment import disable_malloc_trim

NETWORKS: dict[str, UNetSettings] = {
    "lsun": get_unet_settings("lsun_cat")[0],
    "bundled": replace(
        get_unet_settings("fashion_mnist")[0], in_channels=3, num_heads=4
    ),  # the public code cannot guide grey images
    "adm64": replace(get_unet_settings("imagenet64")[0], dropout=0.0, num_classes=None),
}
SITES = {"lsun": 2, "bundled": 5}
"""Output block whose attention guides. The public code has a table of side lengths, which has that of this block."""
STEP = 120
"""Sampling step that is measured, in the middle of 250."""
SCALE, BLUR_SIGMA = 0.3, 3.0
PRECISIONS: dict[str, WeightPrecision] = {"float32": "32-true", "bfloat16": "bf16-true"}


@dataclass(frozen=True, kw_only=True)
class Side:
    """Work of one process."""

    code: str
    """Code: ours, adm (guided-diffusion) or sag (its fork)."""
    work: str
    """Unit of work: forward, unguided, guided or training."""
    network: str
    batch_size: int
    precision: str = "float32"
    folder: str | None = None
    """Checkout of the public code."""
    threads: int | None = None
    """Number of threads; None for torch's default."""


def random_weights(s: UNetSettings) -> dict[str, Tensor]:
    """Return random weights, equal for all sides, and small enough that features do not grow."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in UNet(s).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        fan_in = max(1, shape[1:].numel())
        weight = torch.randn(shape, generator=generator) * (0.5 / fan_in**0.5 if len(shape) > 1 else 0.02)
        state[name] = weight + 1 if name.endswith("weight") and len(shape) == 1 else weight
    return state


def make_unit(side: Side) -> Callable[[], Tensor]:
    """Return the unit of work as a function without arguments."""
    s = NETWORKS[side.network]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(side.batch_size, s.in_channels, s.image_size, s.image_size, generator=generator)
    labels = None if s.num_classes is None else torch.arange(side.batch_size) % s.num_classes
    build = {"training": _training, "forward": _forward}.get(side.work, _step)
    return build(side, s, x, labels)


def _network(side: Side, s: UNetSettings) -> UNet:
    with torch.device("meta"):
        network = UNet(s)
    network.load_state_dict(random_weights(s), assign=True)
    network.to(memory_format=torch.channels_last)
    return cast_weights(optimize_for_cpu(network), PRECISIONS[side.precision], torch.device("cpu"))


def _forward(side: Side, s: UNetSettings, x: Tensor, labels: Tensor | None) -> Callable[[], Tensor]:
    timesteps = torch.full((len(x),), 480.0)
    network = _network(side, s).eval().requires_grad_(False)

    def run() -> Tensor:
        with torch.inference_mode():
            return network(x, timesteps, labels).out

    return run


def _step(side: Side, s: UNetSettings, x: Tensor, labels: Tensor | None) -> Callable[[], Tensor]:
    """Return one step of ancestral sampling. Its noise is from torch's global generator, as in the public code."""
    depth = SITES[side.network]
    if side.code != "ours":
        from benchmarks import public

        public_step = public.sag_step(
            Path(str(side.folder)), s, random_weights(s), depth=depth, blur_sigma=BLUR_SIGMA, scale=SCALE
        )
        return lambda: _seeded(lambda: public_step(x, STEP, labels))
    from sagl.diffusion.predictor import Condition
    from sagl.samplers.ddpm import ddpm_step
    from sagl.sampling.pipeline import build_pipeline
    from sagl.settings.diffusion import DiffusionSettings

    scale = SCALE if side.work == "guided" else 0.0
    sag = SelfAttentionGuidance(
        scale=scale, site=f"output.{depth}", blur_sigma=BLUR_SIGMA, kernel_size=31, heads="sag_release"
    )
    network = _network(side, s).eval().requires_grad_(False)
    pipeline = build_pipeline(
        network, DiffusionSettings(), SamplerSettings(sampler="ddpm", respacing="250"), {"sag": sag}
    )
    predict, condition = pipeline.predictor, Condition(labels=labels)

    def run() -> Tensor:
        torch.rand(1)  # the public blur draws its sigma even where it is fixed
        with torch.inference_mode():
            prediction = predict(x, STEP, condition)
            return ddpm_step(x, prediction, pipeline.schedule, STEP, lambda _: torch.randn_like(x))

    return lambda: _seeded(run)


def _seeded(run: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(0)
    return run()


def _training(side: Side, s: UNetSettings, x: Tensor, labels: Tensor | None) -> Callable[[], Tensor]:
    """Return one training step: forward, backward, AdamW and EMA."""
    x_0, timesteps = x.clamp(-1, 1), torch.linspace(0, 999, len(x)).long()
    if side.code != "ours":
        from benchmarks import public

        public_step = public.training_step(Path(str(side.folder)), s, random_weights(s), "cosine")
        return lambda: _seeded(lambda: torch.tensor(public_step(x_0, timesteps, labels)))
    return _our_training(side, s, x_0, timesteps, labels)


def _our_training(
    side: Side, s: UNetSettings, x_0: Tensor, timesteps: Tensor, labels: Tensor | None
) -> Callable[[], Tensor]:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from sagl.diffusion.losses import training_losses
    from sagl.diffusion.schedule import make_schedule
    from sagl.modules.training_module import adamw
    from sagl.settings.diffusion import DiffusionSettings
    from sagl.settings.training import OptimizerSettings

    network: nn.Module = _network(replace(side, precision="float32"), s)
    schedule = make_schedule(DiffusionSettings(noise_schedule="cosine"))
    optimizer = adamw(network.parameters(), OptimizerSettings())
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9999))

    def run() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=side.precision == "bfloat16"):
            losses = training_losses(
                lambda x, t: network(x, t, labels).out,
                x_0,
                timesteps,
                torch.randn_like(x_0),
                schedule,
                kind="hybrid",
                variance="learned_range",
            )
            loss = losses.total.mean()
        loss.backward()
        optimizer.step()
        average.update_parameters(network)
        return loss.detach()

    return lambda: _seeded(run)


def measure(unit: Callable[[], Tensor]) -> tuple[dict[str, Any], Tensor]:
    """Run one unit; return its cost and its result."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    result = unit()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    faults, peak = after.ru_minflt - before.ru_minflt, after.ru_maxrss * 1024
    return {"seconds": seconds, "faults": faults, "peak_bytes": peak}, result


def live_bytes(unit: Callable[[], Tensor]) -> dict[str, Any]:
    """Return the largest number of bytes that one unit has in new tensors at one time."""
    from sagl.models.memory import MemoryTracker

    with MemoryTracker() as live:
        unit()
    return {"live_bytes": live.peak}


def profile_unit(unit: Callable[[], Tensor]) -> dict[str, Any]:
    """Return the operations that take the largest fractions of the time of one unit."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        unit()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key: event.self_cpu_time_total / total for event in events[:9]}


def main() -> None:
    """Answer lines until stdin ends."""
    side = Side(**json.loads(sys.argv[1]))
    if side.threads:
        torch.set_num_threads(side.threads)
    if side.code == "ours":
        disable_malloc_trim()
    unit = make_unit(side)
    result = unit()
    print("ready", flush=True)
    for line in sys.stdin:
        command, _, file = line.strip().partition(" ")
        answer: dict[str, Any] = {}
        if command == "save":
            torch.save(result, file)
        elif command == "live":
            answer = live_bytes(unit)
        elif command == "profile":
            answer = profile_unit(unit)
        else:
            answer, result = measure(unit)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
