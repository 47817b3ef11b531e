"""Run folders as `sagl sample` writes them, with random pictures in place of a network's, and pure runs beside them."""

import copy
import json

import numpy as np

from sagl.evaluation.comparison import Run
from sagl.evaluation.results import EVALUATIONS, Evaluation
from sagl.sampling.run_folder import Sample, png, write_run_json, write_shard

SETTINGS = {
    "seed": 0,
    "labels": "random",
    "sampler": "ddim",
    "respacing": "ddim10",
    "sag": {"scale": 0.0, "site": "output.5", "interval": [0.0, 1.0], "kernel_size": None},
    "cfg": {"scale": 0.0},
    "classifier": {"scale": 0.0, "checkpoint": None},
    "weights_sha256": "0123456789abcdef" * 4,
}


def picture(number, side=8):
    """A PNG file that no other number has."""
    return png(np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8))


def write_run(folder, *, ids=range(6), side=8, first_picture=0, sag=None, evaluations=None, settings=None, **record):
    """A run of these ids in shards of four; returns the folder."""
    asked = copy.deepcopy(SETTINGS) | (settings or {})
    asked["sag"] |= sag or {}
    about = {"settings": asked, "num_samples": len(ids), "batch_size": 4, "model": "fashion_mnist", "nfe": 10}
    write_run_json(folder, about | {"seconds": 2.0, "versions": {"torch": "2.14.1"}} | record)
    for start in range(0, len(ids), 4):
        samples = [
            Sample(id=i, label=-1, seed=0, pictures={"samples": picture(first_picture + i, side)})
            for i in ids[start : start + 4]
        ]
        write_shard(folder, samples)
    if evaluations is not None:
        (folder / EVALUATIONS).write_text(json.dumps({"evaluations": evaluations}))
    return folder


def entry(numbers, **changes):
    """One of evaluation.json's."""
    found = {"images": "x", "num_samples": 20000, "reference": "fashion_mnist_test", "num_reference": 10000}
    found |= {"extractor": "effnet_lite0_64", "resize": "bilinear to 64×64", "numbers": numbers, "intervals": {}}
    settings = {"num_neighbors": 3, "is_chunk": 5000, "kid_subsets": 100, "kid_subset_size": 1000}
    return found | {"settings": settings, "seconds": 12.1} | changes


def measured(numbers, **changes):
    """The same, read."""
    found = {"num_samples": 20000, "reference": "test", "num_reference": 10000, "extractor": "effnet_lite0_64"}
    return Evaluation(numbers=numbers, **(found | changes))


def run(name="a", *, settings=None, evaluations=(), **changes):
    """A run that is on no disk."""
    found = {"folder": f"runs/{name}", "model": "fashion_mnist", "num_images": 16, "num_asked": 16, "size": (8, 8)}
    found |= {"nfe": 10, "seconds": 2.0} | changes
    return Run(name=name, settings=settings or {}, evaluations=tuple(evaluations), **found)
