"""Difference between the predictions for x_t and for the degraded x_t in every sampling step.

    python benchmarks/guidance_gap.py plain.safetensors blur_aware.safetensors --site output.5 --blur_sigma 1.5

Prints the root mean square of eps - eps_degraded over pixels and samples, one row per step, one column per network.
The scale is so small that the samples are those without guidance.
"""

import argparse
from pathlib import Path

import torch

from sagl.models.checkpoints import build_network, read_checkpoint
from sagl.models.zoo import BUNDLED
from sagl.sampling.pipeline import build_pipeline, make_labels
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.sampling import RunSettings, SamplerSettings
from sagl.utils.environment import disable_malloc_trim

SCALE = 1e-6


@torch.inference_mode()
def gaps(
    checkpoint: Path, sampler: SamplerSettings, sag: SelfAttentionGuidance, samples: RunSettings
) -> dict[int, float]:
    """Return the root mean square of eps - eps_degraded by timestep, the noisiest first."""
    file = read_checkpoint(checkpoint)
    network = build_network(file)
    pipeline, ids = (
        build_pipeline(network, file.diffusion, sampler, {"sag": sag}),
        range(samples.first_id, samples.first_id + samples.num_samples),
    )
    result = {}
    for step, _, prediction in pipeline.sample_progressive(samples.seed, ids, make_labels(samples, ids, network)):
        eps = torch.as_tensor(prediction.terms["sag"].eps) / SCALE
        result[int(pipeline.schedule.timesteps[step])] = float(eps.square().mean().sqrt())
    return result


def main() -> None:
    """Parse the arguments and print the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoints", type=Path, nargs="*", default=[BUNDLED["fashion_mnist"]])
    p.add_argument("--num_samples", type=int, default=100)
    p.add_argument("--first_id", type=int, default=0)
    p.add_argument("--respacing", default="ddim25")
    p.add_argument("--site", default="output.5")
    p.add_argument("--blur_sigma", type=float, default=1.5)
    a = p.parse_args()
    disable_malloc_trim()
    sampler = SamplerSettings(sampler="ddim", respacing=a.respacing)
    sag = SelfAttentionGuidance(scale=SCALE, site=a.site, blur_sigma=a.blur_sigma)
    samples = RunSettings(num_samples=a.num_samples, first_id=a.first_id, batch_size=a.num_samples, labels="balanced")
    columns = [gaps(path, sampler, sag, samples) for path in a.checkpoints]
    print("| timestep | " + " | ".join(path.stem for path in a.checkpoints) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for timestep in columns[0]:
        print(f"| {timestep} | " + " | ".join(f"{column[timestep]:.4f}" for column in columns) + " |")


if __name__ == "__main__":
    main()
