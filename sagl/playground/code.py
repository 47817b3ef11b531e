"""The Python lines that make a row of the page."""

from dataclasses import MISSING, fields

from sagl.models.sources import resolve_network
from sagl.sampling.run import SamplingRun
from sagl.utils.distributed import select_device

TEMPLATE = """\
from pathlib import Path

import torch
{imports}
from sagl.models.checkpoints import cast_weights
from sagl.sampling.pipeline import make_labels
from sagl.settings.sampling import RunSettings, id_batches
from sagl.utils.images import save_png, to_rgb, to_uint8
{setup}
checkpoint = {load}
network = cast_weights(build_network(checkpoint), {precision!r}, torch.device({device!r})){compile}
sampler = {sampler}
guidances = {guidances}
pipeline = build_pipeline(network, checkpoint.diffusion, sampler, guidances{checkpoint})
samples = {samples}
run_ids = range(samples.first_id, samples.first_id + samples.num_samples)
for ids in id_batches(samples):  # whole batches: an image may differ in its last bits in a smaller one
    labels = make_labels(samples, ids, network)
    with torch.inference_mode():
        images, mask_frequency = pipeline.sample(samples.seed, ids, labels)
    for sample_id, image in zip(ids, to_rgb(to_uint8(images)).cpu(), strict=True):
        if sample_id in run_ids:
            save_png(image, Path(f"{{sample_id:06d}}.png"))
"""


def python_text(run: SamplingRun) -> str:
    """Return a program that writes the images of a run as PNG files named by their ids."""
    config, source, device = run.config, run.config.source, select_device(run.config.devices).type
    guidances = {name: guidance for name, guidance in config.guidances.items() if guidance.scale}
    has_heads = any(guidance.direction_head for guidance in guidances.values())
    classes = [type(guidance).__name__ for guidance in guidances.values()]
    imports = ["from sagl import SamplerSettings, build_network, build_pipeline, load"]
    imports += [f"from sagl.settings.guidance import {', '.join(sorted(classes))}"] if classes else []
    load = f"load({str(run.checkpoint)!r}, {source.weights!r})"
    if source.model is not None and source == resolve_network(source.model, None):
        load = f"load({source.model!r})"
    elif source.network is not None:
        imports[0] = imports[0].removesuffix(", load")
        imports += ["from sagl.models.checkpoints import read_checkpoint"]
        imports += [
            "from sagl.settings.diffusion import DiffusionSettings",
            "from sagl.settings.network import UNetSettings",
        ]
        settings = f"{source.network!r}, {source.diffusion!r}"
        load = f"read_checkpoint(Path({str(run.checkpoint)!r}), {source.weights!r}, {settings})"
    setup = ""
    if device == "cuda":
        setup = "from sagl.utils.environment import disable_tf32, use_deterministic_algorithms\n\n"
        setup += "disable_tf32()\nuse_deterministic_algorithms()"
    return TEMPLATE.format(
        imports="\n".join(imports),
        setup=setup,
        load=load,
        precision=config.devices.precision,
        device=device,
        compile="\nnetwork.compile(dynamic=False)" if config.devices.compile else "",
        sampler=constructor(config.sampler),
        guidances="{" + ", ".join(f"{name!r}: {constructor(guidance)}" for name, guidance in guidances.items()) + "}",
        samples=constructor(config.samples),
        checkpoint=f", checkpoint=Path({str(run.checkpoint)!r})" if has_heads else "",
    )


def constructor(settings: object) -> str:
    """Return the call that builds settings, with the fields that differ from their defaults."""
    cls = type(settings)
    values = {
        item.name: getattr(settings, item.name)
        for item in fields(cls)  # type: ignore[arg-type]
        if item.default is MISSING or getattr(settings, item.name) != item.default
    }
    return f"{cls.__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"
