"""Run folders as `sagl sample` writes them, with random images in place of a network's, and their summaries."""

import copy
import json

import numpy as np

from sagl.evaluation.results import RESULTS_FILE, EvaluationResult
from sagl.evaluation.runs import RunSummary
from sagl.sampling.run_folder import Sample, encode_png, write_run_json, write_shard

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


def random_png(number, image_size=8):
    """A PNG file that no other number has."""
    return encode_png(np.random.default_rng(number).integers(0, 256, (image_size, image_size, 3), dtype=np.uint8))


def write_run(folder, *, ids=range(6), image_size=8, first_image=0, sag=None, results=None, settings=None, **metadata):
    """Write a run of these ids in shards of four; return the folder."""
    all_settings = copy.deepcopy(SETTINGS) | (settings or {})
    all_settings["sag"] |= sag or {}
    defaults = {"settings": all_settings, "num_samples": len(ids), "batch_size": 4, "model": "fashion_mnist", "nfe": 10}
    write_run_json(folder, defaults | {"seconds": 2.0, "versions": {"torch": "2.14.1"}} | metadata)
    for start in range(0, len(ids), 4):
        samples = [
            Sample(id=i, label=-1, seed=0, pngs={"samples": random_png(first_image + i, image_size)})
            for i in ids[start : start + 4]
        ]
        write_shard(folder, samples)
    if results is not None:
        (folder / RESULTS_FILE).write_text(json.dumps({"results": results}))
    return folder


def json_result(values, **changes):
    """An entry of evaluation.json."""
    entry = {"images": "x", "num_samples": 20000, "reference": "fashion_mnist_test", "num_reference": 10000}
    entry |= {"extractor": "effnet_lite0_64", "resize": "bilinear to 64×64", "values": values, "intervals": {}}
    settings = {"num_neighbors": 3, "is_chunk": 5000, "kid_subsets": 100, "kid_subset_size": 1000}
    return entry | {"settings": settings, "seconds": 12.1} | changes


def result(values, **changes):
    """A result that is in no file."""
    defaults = {"num_samples": 20000, "reference": "test", "num_reference": 10000, "extractor": "effnet_lite0_64"}
    return EvaluationResult(values=values, **(defaults | changes))


def run(name="a", *, settings=None, results=(), **changes):
    """The summary of a run that is in no folder."""
    defaults = {"folder": f"runs/{name}", "model": "fashion_mnist", "num_images": 16, "num_requested": 16}
    defaults |= {"size": (8, 8), "nfe": 10, "flops": None, "seconds": 2.0} | changes
    return RunSummary(name=name, settings=settings or {}, results=tuple(results), **defaults)
