"""Decomposition of the direction of self-attention guidance into an unsharp mask of x0_hat and a rest.

    python benchmarks/sag_direction.py --model fashion_mnist --num_samples 64 --output direction

In every sampling step, d = eps(x_t) - eps(x_t_degraded) is split into a k u and a rest, where
u = m · (x0_hat - blur(x0_hat)) and k = √(alpha_bar / (1 - alpha_bar)), so that a k u changes x0_hat by -a u. The script
prints a, the explained part of the energy of d, the change of x0_hat at scale 1 as a part of x0_hat (root mean squares;
compare `stop_below`), and the energy of d by frequency; it writes OUTPUT.json and OUTPUT.png.
The chains are those without guidance. The plot needs matplotlib: pip install 'sagl[plots]'.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sagl.diffusion.noise import initial_noise
from sagl.diffusion.process import x0_hat_from_eps
from sagl.guidance.sag import gaussian_blur
from sagl.guidance.shaping import project
from sagl.models.checkpoints import build_network
from sagl.models.loading import load
from sagl.sampling.pipeline import SamplingPipeline, build_pipeline, make_labels
from sagl.settings.guidance import SelfAttentionGuidance, effective_kernel_size
from sagl.settings.sampling import RunSettings, SamplerSettings, id_batches
from sagl.shapes import Image
from sagl.utils.environment import disable_malloc_trim

SCALE = 1e-6
"""So small that the samples are those without guidance."""
BANDS = 4
"""Bands of equal width from frequency 0 to the Nyquist frequency along an axis."""
Sums = dict[str, Tensor]
"""Sums over samples of one step: products of d and u, and energies by band."""


def directions(pipeline: SamplingPipeline, seed: int, ids: list[int], labels: Tensor | None) -> Iterator[Any]:
    """Yield (step, d, u) of every step, the noisiest first: d and u are (B, C, H, W)."""
    s = pipeline.network.settings
    x = initial_noise(seed, ids, (s.in_channels, s.image_size, s.image_size))
    for step, x_next, prediction in pipeline.sample_progressive(seed, ids, labels):
        term, alpha_bar = prediction.terms["sag"], pipeline.schedule.alpha_bar(step)
        x0_hat = x0_hat_from_eps(x, prediction.eps, alpha_bar, clip=True)
        yield step, torch.as_tensor(term.eps) / SCALE, (x0_hat, term.extras["mask"])
        x = x_next


def band_energies(images: Image) -> Tensor:
    """Return the energy of images in bands of radial frequency: (B, C, H, W) -> (BANDS,); corners are in the last."""
    spectrum = torch.fft.fft2(images.double(), norm="ortho").abs().square().sum(dim=(0, 1))
    radius = sum(
        torch.fft.fftfreq(n).abs().view(shape).square()
        for n, shape in zip(spectrum.shape, ((-1, 1), (1, -1)), strict=True)
    )
    band = (radius.sqrt() / 0.5 * BANDS).long().clamp(max=BANDS - 1)
    return torch.zeros(BANDS, dtype=torch.float64).index_add(0, band.flatten(), spectrum.flatten())


@torch.inference_mode()
def measure(pipeline: SamplingPipeline, samples: RunSettings, blur_sigma: float) -> dict[int, Sums]:
    """Sum products and energies over all samples, by step."""
    sums: dict[int, Sums] = defaultdict(lambda: defaultdict(lambda: torch.zeros(())))
    for ids in id_batches(samples):
        labels = make_labels(samples, ids, pipeline.network)
        for step, d, (x0_hat, mask) in directions(pipeline, samples.seed, ids, labels):
            kernel_size = effective_kernel_size(None, min(x0_hat.shape[-2:]))
            u = mask * (x0_hat - gaussian_blur(x0_hat, kernel_size, blur_sigma))
            part = project(d, u)
            values = {"du": (d * u).sum(), "uu": u.square().sum(), "mask": mask.float().mean()}
            values["x0_hat"] = x0_hat.square().sum()
            values |= {"direction": band_energies(d), "unsharp": band_energies(part), "rest": band_energies(d - part)}
            for name, value in values.items():
                sums[step][name] = sums[step][name] + value.double()
    return sums


def row(pipeline: SamplingPipeline, step: int, sums: Sums, num_batches: int) -> dict[str, Any]:
    """Return the numbers of one step."""
    alpha_bar = float(pipeline.schedule.alpha_bar(step))
    k = math.sqrt(alpha_bar / (1 - alpha_bar))
    energies = {name: sums[name] for name in ("direction", "unsharp", "rest")}
    total = energies["direction"].sum()
    return {
        "timestep": int(pipeline.schedule.timesteps[step]),
        "a": float(sums["du"] / sums["uu"] / k),
        "explained_by_a": float(sums["du"] ** 2 / sums["uu"] / total),
        "explained_per_sample": float(energies["unsharp"].sum() / total),
        "change": float((total / sums["x0_hat"]).sqrt()) / k,
        "mask": float(sums["mask"]) / num_batches,
        **{f"{name}_bands": (energy / total).tolist() for name, energy in energies.items()},
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot a(t) and the explained energy, and the energy of both parts by band for three steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, *others = figure.subplots(1, 4, width_ratios=[1.8, 1, 1, 1])
    timesteps = [r["timestep"] for r in rows]
    left.plot(timesteps, [r["a"] for r in rows], "o-", label="a(t)")
    left.plot(timesteps, [r["explained_per_sample"] for r in rows], "s--", label="explained fraction of |d|²")
    left.set(
        xlabel="timestep (noise on the right)",
        ylabel="a(t); explained fraction of |d|²",
        ylim=(0, 1.35),
        title="SAG's direction as an unsharp mask",
    )
    left.legend(loc="upper left")
    shown = (rows[0], rows[len(rows) // 2], rows[-2])
    top = 1.05 * max(sum(parts) for r in shown for parts in zip(r["unsharp_bands"], r["rest_bands"], strict=True))
    for axes, r in zip(others, shown, strict=True):
        axes.bar(range(BANDS), r["unsharp_bands"], label="unsharp mask")
        axes.bar(range(BANDS), r["rest_bands"], bottom=r["unsharp_bands"], label="rest")
        names = [f"{b / BANDS:g}–{(b + 1) / BANDS:g}" for b in range(BANDS)]
        axes.set_xticks(range(BANDS), names, rotation=60)
        axes.set(title=f"timestep {r['timestep']}", xlabel="frequency / Nyquist", ylim=(0, top))
    others[0].set_ylabel("part of the energy of the direction")
    figure.legend(*others[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parse the arguments, measure, print the table, and write the files."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="fashion_mnist", help="name of a network, or a weight file")
    p.add_argument("--num_samples", type=int, default=64)
    p.add_argument("--first_id", type=int, default=0)
    p.add_argument("--batch_size", type=int, default=32)
    p.add_argument("--respacing", default="ddim25")
    p.add_argument("--site", default="output.5")
    p.add_argument("--blur_sigma", type=float, default=1.5)
    p.add_argument("--output", type=Path, default=Path("sag_direction"), help="path of the files without their suffix")
    a = p.parse_args()
    disable_malloc_trim()
    weights = load(a.model)
    network = build_network(weights)
    labels = "random" if network.settings.num_classes is None else "balanced"
    samples = RunSettings(num_samples=a.num_samples, first_id=a.first_id, batch_size=a.batch_size, labels=labels)
    sampler = SamplerSettings(sampler="ddim", respacing=a.respacing)
    sag = SelfAttentionGuidance(scale=SCALE, site=a.site, blur_sigma=a.blur_sigma)
    pipeline = build_pipeline(network, weights.diffusion, sampler, {"sag": sag})
    sums, num_batches = measure(pipeline, samples, a.blur_sigma), len(list(id_batches(samples)))
    rows = [row(pipeline, step, sums[step], num_batches) for step in sorted(sums, reverse=True)]
    print("| timestep | a | explained, one a | explained, per sample | change | masked | unsharp mask by band | rest |")
    print("|---" * 8 + "|")
    for r in rows:
        bands = (" ".join(f"{value:.2f}" for value in r[f"{name}_bands"]) for name in ("unsharp", "rest"))
        numbers = (r[name] for name in ("a", "explained_by_a", "explained_per_sample", "change", "mask"))
        print(f"| {r['timestep']} | " + " | ".join(f"{n:.3f}" for n in numbers) + f" | {' | '.join(bands)} |")
    settings = {name: str(value) for name, value in vars(a).items() if name != "output"}
    a.output.with_suffix(".json").write_text(json.dumps({"settings": settings, "steps": rows}, indent=1) + "\n")
    plot(rows, a.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
