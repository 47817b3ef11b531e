import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sagl.errors import UserError
from sagl.evaluation.extraction import FeatureExtraction
from sagl.evaluation.image_sets import TensorImages
from sagl.metrics.features import Features
from sagl.settings.evaluation import ExtractionSettings
from sagl.utils.files import sha256
from tests.helpers.commands import environments, exit_code
from tests.helpers.processes import run_ranks

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 120
IMAGES = torch.randint(0, 256, (47, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def means(device):
    """Extractor with all three kinds of features, from means of rows and of columns."""

    def extract(images_uint8):
        x = images_uint8.float()
        pooled, spatial = x.mean(dim=(1, 3)), x[:, 0].mean(dim=1)
        return Features(pooled, spatial, pooled[:, :4] / 20)

    return extract


class ThreadRanks:
    """Ranks in threads of this process, with the interface of `sagl.utils.distributed.Ranks`."""

    device = torch.device("cpu")

    def __init__(self, rank, world_size, barrier, objects):
        self.rank, self.world_size, self.barrier, self.objects = rank, world_size, barrier, objects

    def gather(self, obj):
        self.objects[self.rank] = obj
        self.barrier.wait()
        gathered = list(self.objects) if self.rank == 0 else []
        self.barrier.wait()
        return gathered


def extract_in_threads(world_size, num_samples):
    """The results of all ranks."""
    barrier, objects, results = threading.Barrier(world_size), [None] * world_size, [None] * world_size
    settings = ExtractionSettings(batch_size=4, progress="off")

    def work(rank):
        ranks = ThreadRanks(rank, world_size, barrier, objects)
        extraction = FeatureExtraction(name="means", extract=means("cpu"), ranks=ranks, settings=settings)
        results[rank] = extraction.statistics(
            TensorImages(IMAGES), num_samples, max_features=30, title="images", keep_logits=True
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("num_samples", [47, 9])
def test_statistics_do_not_depend_on_the_number_of_ranks(world_size, num_samples):
    (expected,) = extract_in_threads(1, num_samples)
    result, *others = extract_in_threads(world_size, num_samples)
    assert others == [None] * (world_size - 1)
    for part in ("pooled", "spatial"):
        assert getattr(result, part).mean.equal(getattr(expected, part).mean)
        assert getattr(result, part).covariance.equal(getattr(expected, part).covariance)
    assert result.features.equal(expected.features)
    assert result.logits.equal(means("cpu")(IMAGES[:num_samples]).logits)


def test_an_extractor_of_the_user_has_the_version_of_its_code():
    extraction = FeatureExtraction.load(f"{__name__}.means", ExtractionSettings(), ThreadRanks(0, 1, None, []))
    assert extraction.version == sha256(Path(__file__))[:16]


def test_an_unknown_extractor_is_refused():
    with pytest.raises(UserError, match="`extractor`"):
        FeatureExtraction.load("no.such.function", ExtractionSettings(), ThreadRanks(0, 1, None, []))


# ---------------------------------------------------------------------------------------- processes over gloo


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An npz file of 47 images and a folder of 30."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    np.savez(folder / "run.npz", arr_0=IMAGES.permute(0, 2, 3, 1).numpy())
    (folder / "real").mkdir()
    for k in range(30):
        image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / "real" / f"{k:02d}.png")
    return folder


def result_in(output):
    """Return the result of a command that prints progress and no warning."""
    assert "47/47" in output
    assert "Traceback" not in output
    assert "Warning" not in output
    result = json.loads(output[output.index("{") : output.rindex("}") + 1])
    del result["seconds"]
    return result


@pytest.mark.slow
def test_processes_started_here_and_as_torchrun_does_compute_what_one_does(images, tmp_path, monkeypatch, capfd):
    command = ["evaluate", images / "run.npz", "--reference", images / "real", "--format", "json", "--batch_size", 4]
    command += ["--extractor", f"{__name__}.means", "--progress", "lines", "--trainer.accelerator", "cpu"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "1"))
    assert exit_code(*command) == 0
    expected = result_in("".join(capfd.readouterr()))
    assert set(expected["values"]) == {"fd", "sfd", "is", "is_all", "precision", "recall", "kd"}
    for name, flags, variables in (("2", ["--trainer.devices", 2], environments(1)), ("3", [], environments(3))):
        (tmp_path / name).mkdir()
        monkeypatch.setenv("SAGL_CACHE", str(tmp_path / name / "cache"))
        ranks = run_ranks([*command, *flags], tmp_path / name, variables, timeout=TIMEOUT_SECONDS)
        assert [code for code, _ in ranks] == [0] * len(variables), ranks
        assert result_in("".join(output for _, output in ranks)) == expected
