"""Error of every deterministic sampler on images whose score is known: pixels from a mixture of three Gaussians.

    python benchmarks/solver_error.py

Prints the mean absolute difference from the exact solution (UniPC on all timesteps), in a range of images of [-1, 1].
"""

import argparse
from pkgutil import resolve_name

import torch

from sagl.diffusion.predictor import Condition, NoisePredictor, Prediction
from sagl.diffusion.schedule import Schedule, make_schedule
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.sampling import SAMPLERS
from sagl.shapes import Image

MEANS, VARIANCES, WEIGHTS = torch.tensor([[-0.8, -0.1, 0.5], [0.01, 0.02, 0.005], [0.3, 0.3, 0.4]]).double()


def mixture_predictor(schedule: Schedule) -> NoisePredictor:
    """Return the exact predictor of eps for independent pixels from the mixture."""

    def predict(x_t: Image, step: int, _: Condition) -> Prediction:
        alpha_bar = schedule.alpha_bar(step)
        variances = alpha_bar * VARIANCES + 1 - alpha_bar
        differences = x_t[..., None] - alpha_bar.sqrt() * MEANS
        log_weights = WEIGHTS.log() - differences**2 / (2 * variances) - variances.log() / 2
        score = -(log_weights.softmax(dim=-1) * differences / variances).sum(dim=-1)
        return Prediction(eps=-(1 - alpha_bar).sqrt() * score, log_variance=torch.zeros(()))

    return predict


def images(sampler: str, schedule: Schedule, x: Image) -> tuple[Image, float]:
    """Return the images of a sampler, and its network evaluations."""
    noise = torch.zeros_like(x)
    steps = list(
        resolve_name(SAMPLERS[sampler])(mixture_predictor(schedule), x, Condition(), schedule, lambda step: noise)
    )
    return steps[-1][1], sum(prediction.nfe for _, _, prediction in steps)


def main() -> None:
    """Print a table with a row for each schedule and respacing."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--respacings", nargs="+", default=["10", "20", "50", "logsnr10", "logsnr20", "logsnr50"])
    p.add_argument("--num_pixels", type=int, default=1000)
    a = p.parse_args()
    samplers = [name for name in SAMPLERS if name != "ddpm"]
    x_T = torch.randn(1, 1, 1, a.num_pixels, generator=torch.Generator().manual_seed(0)).double()
    print("| schedule | respacing | " + " | ".join(samplers) + " |")
    print("|---" * (2 + len(samplers)) + "|")
    for kind in ("linear", "cosine"):
        settings = DiffusionSettings(noise_schedule=kind)
        exact, _ = images("unipc", make_schedule(settings), x_T)
        for respacing in a.respacings:
            schedule = make_schedule(settings, respacing)
            cells = []
            for sampler in samplers:
                x, nfe = images(sampler, schedule, x_T)
                cells.append(f"{float((x - exact).abs().mean()):.4f} ({nfe:g})")
            print(f"| {kind} | `{respacing}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
