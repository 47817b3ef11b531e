"""Digests of the images of twelve sampling commands and of the weights of two short trainings.

    python benchmarks/digests.py digests.json
    python benchmarks/digests.py digests.json --against before.json

A change that must not alter any number leaves all digests as they are, on one processor and one set of libraries. Cases
that the file already holds are not run again. Each process uses one thread.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

DDIM, DDPM = ["--sampler", "ddim", "--respacing", "ddim10"], ["--sampler", "ddpm", "--respacing", "10"]
FLOAT32, BFLOAT16 = ["--trainer.precision", "32-true"], ["--trainer.precision", "bf16-true"]
UNGUIDED, OUTPUT_2 = ["--sag.scale", "0"], ["--sag.scale", "0.3", "--sag.site", "output.2"]
OUTPUT_5 = ["--sag.scale", "0.3", "--sag.site", "output.5"]
WHOLE = ["--sag.blur_sigma", "3", "--sag.interval", "[0,1]"]
SAMPLE = ["sample", "--model", "fashion_mnist", "--num_samples", "12", "--batch_size", "8", "--progress", "off"]
SAMPLE += ["--exports", ""]
SAMPLES = {
    "float32, DDIM, unguided": [*DDIM, *FLOAT32, *UNGUIDED],
    "bfloat16, DDPM, unguided": [*DDPM, *BFLOAT16, *UNGUIDED],
    "float32, DDIM, SAG at output.5": [*DDIM, *FLOAT32, *OUTPUT_5],
    "bfloat16, DDPM, SAG at output.2": [*DDPM, *BFLOAT16, *OUTPUT_2],
    "bfloat16, DDIM, SAG at middle in an interval": [
        *(*DDIM, *BFLOAT16, "--sag.scale", "0.5", "--sag.site", "middle", "--sag.interval", "0.2,0.9")
    ],
    "float32, DDPM, CFG": [*DDPM, *FLOAT32, *UNGUIDED, "--cfg.scale", "1.5"],
    "float32, DDIM, classifier": [*DDIM, *FLOAT32, *UNGUIDED, "--classifier.scale", "2"],
    "bfloat16, DDIM, SAG, CFG and classifier": [
        *(*DDIM, *BFLOAT16, "--sag.scale", "0.3", "--cfg.scale", "0.5", "--classifier.scale", "1")
    ],
    "float32, DDIM with eta, listed labels, compared": [
        *(*DDIM, *FLOAT32, "--eta", "0.5", "--compare", "--sag.scale", "0.2"),
        *("--labels", "0,7,9", "--seed", "3", "--first_id", "5"),
    ],
    "bfloat16, DDIM, SAG, two processes": [*DDIM, *BFLOAT16, "--sag.scale", "0.3", "--trainer.devices", "2"],
    "float32, DDPM, heads of the SAG release, x0_hat not clipped": [
        *(*DDPM, *FLOAT32, *OUTPUT_2, "--sag.heads", "sag_release", "--sag.clip_x0", "false")
    ],
}
FIT = ["--trainer.max_steps", "8", "--trainer.accelerator", "cpu", "--trainer.val_check_interval", "8"]
FIT += ["--data.num_validation", "64", "--data.batch_size", "8"]
DIFFUSION = ["fit", "--config", "fashion_mnist", *FIT, "--trainer.log_every_n_steps", "1", "--preview.num_samples", "0"]
DIFFUSION += ["--model.optimizer.warmup_steps", "2", "--model.network.dropout", "0.1"]
CLASSIFIER = ["fit", "--config", "fashion_mnist_classifier", *FIT]


def run(*arguments: str) -> None:
    """Run one command of sagl with one thread per process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "sagl.cli", *arguments], env=environment, check=True, capture_output=True)


def digest_of_shards(run_folder: Path) -> str:
    """Return the SHA-256 of all shards of a run."""
    digest = hashlib.sha256()
    for path in sorted((run_folder / "shards").glob("*.tar")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def digest_of_weights(run_folder: Path) -> str:
    """Return the SHA-256 of the EMA weights and the raw weights of a training."""
    checkpoint = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")
    digest = hashlib.sha256()
    for part in ("state_dict", "current_model_state"):
        for name, tensor in sorted(checkpoint.get(part, {}).items()):
            digest.update(name.encode() + tensor.float().numpy().tobytes())
    return digest.hexdigest()


def measure(digests: dict[str, str], output: Path, folder: Path) -> None:
    """Run the cases that `digests` lacks, and save after each of them."""

    def keep(name: str, digest: str) -> None:
        digests[name] = digest
        output.write_text(json.dumps(digests, indent=1))
        print(f"{digest[:16]}  {name}", flush=True)

    for k, (name, flags) in enumerate(SAMPLES.items()):
        if name not in digests:
            run(*SAMPLE, *flags, "--output", str(folder / str(k)))
            keep(name, digest_of_shards(folder / str(k)))
    if "fine-tuned checkpoint, SAG" not in digests:
        run(*DIFFUSION, "--output", str(folder / "fit"))
        keep("weights of a diffusion model", digest_of_weights(folder / "fit"))
        checkpoint = ["--checkpoint", str(folder / "fit" / "checkpoints" / "last.ckpt")]
        run(*SAMPLE, *DDIM, *FLOAT32, *OUTPUT_5, *WHOLE, *checkpoint, "--output", str(folder / "tuned"))
        keep("fine-tuned checkpoint, SAG", digest_of_shards(folder / "tuned"))
    if "weights of a classifier" not in digests:
        run(*CLASSIFIER, "--output", str(folder / "classifier"))
        keep("weights of a classifier", digest_of_weights(folder / "classifier"))


def main() -> None:
    """Measure, and compare with the digests of another commit on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file of the digests.")
    parser.add_argument("--against", type=Path, default=None, help="JSON file of another commit.")
    arguments = parser.parse_args()
    digests: dict[str, str] = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        measure(digests, arguments.output, Path(folder))
    if arguments.against:
        before = json.loads(arguments.against.read_text())
        different = [name for name, digest in digests.items() if before.get(name) != digest]
        sys.exit(f"different: {', '.join(different)}" if different else 0)


if __name__ == "__main__":
    main()
