"""Agreement of the masks of SAG's two attention maps: the layer's own heads, and the heads of the released code.

    python benchmarks/attention_heads.py --model fashion_mnist --num_samples 64 --respacing ddim25
    python benchmarks/attention_heads.py --model imagenet256_uncond --num_samples 16 --accelerator gpu

The released SAG code rebuilds a layer's map with `num_heads` heads in the legacy channel order, whatever the layer does
(`--sag.heads sag_release`). Both maps are read from the same unguided evaluations of one DDIM chain, so that only the
split of the channels differs. For every site and third of the chain, over all samples and steps:

agreement      fraction of tokens that both masks treat alike
IoU            intersection over union of the masks
IoU by chance  the same of two independent masks of these areas
correlation    of the two maps over the tokens of an image, mean over images
areas          fraction of tokens above the threshold: layer, released
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from sagl.models.checkpoints import build_network, cast_weights
from sagl.models.loading import load
from sagl.sampling.pipeline import build_pipeline, make_labels
from sagl.settings.sampling import DeviceSettings, RunSettings, SamplerSettings, id_batches
from sagl.shapes import AttentionSite, HeadLayout, TokenMap
from sagl.utils.distributed import select_device

HEAD_LAYOUTS: tuple[HeadLayout, ...] = ("layer", "sag_release")
PARTS = ("noisy third", "middle third", "clean third")


def compare(layer: TokenMap, released: TokenMap, threshold: float) -> Tensor:
    """Return the sums over samples of the measures of one step: -> (6,), in the order of the table's rows.

    Args:
        layer: (B, head, H, W), attention received under the layer's heads.
        released: (B, head', H, W), the same under those of the released code.
        threshold: attention above which a token is masked.
    """
    a, b = (tokens.mean(dim=1).flatten(1).double() for tokens in (layer, released))
    mask_a, mask_b = a > threshold, b > threshold
    both, either = (mask_a & mask_b).sum(1), (mask_a | mask_b).sum(1)
    centred_a, centred_b = (x - x.mean(1, keepdim=True) for x in (a, b))
    norms = (centred_a.norm(dim=1) * centred_b.norm(dim=1)).clamp_min(1e-12)
    areas = mask_a.double().mean(1), mask_b.double().mean(1)
    expected_both = areas[0] * areas[1]
    rows = (
        (mask_a == mask_b).double().mean(1),
        both / either.clamp_min(1),
        expected_both / (areas[0] + areas[1] - expected_both).clamp_min(1e-12),
        (centred_a * centred_b).sum(1) / norms,
        *areas,
    )
    return torch.stack([row.double().cpu() for row in rows]).sum(1)


@torch.inference_mode()
def measure(a: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Return the measures by site and third of the chain."""
    file, device = load(a.model), select_device(DeviceSettings(accelerator=a.accelerator))
    network = cast_weights(build_network(file), a.precision, device)
    pipeline = build_pipeline(network, file.diffusion, SamplerSettings(sampler="ddim", respacing=a.respacing))
    sites, num_steps = a.sites or list(network.settings.sites), pipeline.schedule.num_steps
    requested = tuple(AttentionSite(site, heads) for site in sites for heads in HEAD_LAYOUTS)
    samples = RunSettings(num_samples=a.num_samples, batch_size=min(a.num_samples, a.batch_size), seed=a.seed)
    totals: dict[tuple[str, str], Tensor] = defaultdict(lambda: torch.zeros(6, dtype=torch.float64))
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for ids in id_batches(samples):
        labels = make_labels(samples, ids, network)
        chain = pipeline.sample_progressive(a.seed, ids, labels, requested)
        for step, _, prediction in chain:
            part = PARTS[3 * (num_steps - 1 - step) // num_steps]
            for site in sites:
                layer, released = (prediction.attention[AttentionSite(site, heads)] for heads in HEAD_LAYOUTS)
                totals[site, part] += compare(layer, released, a.threshold)
                counts[site, part] += len(ids)
    return {site: {part: (totals[site, part] / counts[site, part]).tolist() for part in PARTS} for site in sites}


def main() -> None:
    """Print the table, and write it as JSON if a file is given."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="fashion_mnist", help="name or file")
    p.add_argument("--num_samples", type=int, default=64)
    p.add_argument("--batch_size", type=int, default=32)
    p.add_argument("--respacing", default="ddim25")
    p.add_argument("--threshold", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--sites", nargs="*", help="blocks with attention; all by default")
    p.add_argument("--accelerator", default="auto", choices=["auto", "cpu", "gpu"])
    p.add_argument("--precision", default="32-true", choices=["32-true", "bf16-true", "16-true"])
    p.add_argument("--output", type=Path, help="JSON file")
    a = p.parse_args()
    measured = measure(a)
    for site, parts in measured.items():
        for part, row in parts.items():
            agreement, iou, chance, correlation, *areas = row
            print(
                f"{site:10} {part:13} agreement {agreement:.3f}  IoU {iou:.3f} (by chance "
                f"{chance:.3f})  correlation {correlation:+.3f}  areas {areas[0]:.3f}, {areas[1]:.3f}"
            )
    if a.output:
        a.output.write_text(json.dumps({"settings": {k: str(v) for k, v in vars(a).items()}, "measures": measured}))


if __name__ == "__main__":
    main()
