import csv
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from sagl.metrics.extractors import EXTRACTORS
from sagl.metrics.features import Features
from sagl.metrics.frechet import frechet_distance, statistics
from sagl.metrics.inception_score import inception_score, inception_score_in_chunks
from sagl.metrics.kid import kernel_distance
from sagl.metrics.precision_recall import precision_recall
from sagl.sampling.exports import write_images
from sagl.sampling.exports import write_npz as export_npz
from sagl.utils.files import sha256
from tests.helpers.sampled import write_run
from tests.helpers.tiny import exit_code, write_fashion_mnist

SEEN = []
OWN = f"{__name__}.make_own"


@pytest.fixture(autouse=True)
def tiny_extractor(monkeypatch, tmp_path):
    """Twelve features that cost nothing; a list of the images that were looked at, and a cache folder of the test's."""
    SEEN.clear()
    monkeypatch.setitem(EXTRACTORS, "effnet_lite0_64", lambda device: twelve)
    monkeypatch.setitem(EXTRACTORS, "other", lambda device: twelve)
    monkeypatch.setitem(EXTRACTORS, "inception", lambda device: whole)
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))


def twelve(images_uint8):
    """Means of the first channel over twelve rows of pixels."""
    SEEN.append(len(images_uint8))
    return images_uint8[:, 0].float().mean(dim=2)[:, 2:14]


def whole(images_uint8):
    """All three kinds of features."""
    pooled = twelve(images_uint8)
    return Features(pooled, images_uint8[:, 1].float().mean(dim=1)[:, :9], pooled[:, :5] / 30)


def drawn(count, seed, side=16):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def write_npz(path, count, seed, side=16):
    images = drawn(count, seed, side)
    np.savez(path, arr_0=images, arr_1=np.zeros(count, dtype=np.int64))
    return path, tensor(images)


def write_folder(path, images):
    path.mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image).save(path / f"{k:03d}.png")
    return path


@pytest.fixture
def pair(tmp_path):
    """A run of 40 images, a reference of 50."""
    (run, images), (reference, others) = write_npz(tmp_path / "a.npz", 40, 0), write_npz(tmp_path / "b.npz", 50, 1)
    return run, reference, images, others


def evaluated(capsys, *arguments):
    """What the command printed as JSON."""
    assert exit_code("evaluate", *arguments, "--format", "json", "--progress", "off") == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments, verb="evaluate"):
    """The one line that the command said."""
    assert exit_code(verb, *arguments, "--progress", "off") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def distance(a, b):
    return frechet_distance(statistics(twelve(a)), statistics(twelve(b)))


# ----------------------------------------------------------------------------------------------------- numbers


def test_every_number_comes_with_all_that_it_belongs_to(pair, capsys):
    run, reference, images, others = pair
    result = evaluated(capsys, run, "--reference", reference, "--kid_subsets", 5, "--kid_subset_size", 30)
    shares = precision_recall(twelve(images), twelve(others))
    kernel = kernel_distance(twelve(images), twelve(others), num_subsets=5, subset_size=30)
    assert result.pop("numbers") == {
        "fd": pytest.approx(distance(images, others), rel=1e-9),
        "precision": shares.precision,
        "recall": shares.recall,
        "kd": pytest.approx(kernel.mean),
    }
    assert result.pop("deviations") == {"kd": pytest.approx(kernel.deviation)}
    assert result.pop("seconds") >= 0
    assert result.pop("settings") == {
        "num_neighbors": 3,
        "max_features": 50,
        "kid_subsets": 5,
        "kid_subset_size": 30,
        "bootstrap": 0,
        "seed": 0,
    }
    assert result.pop("reference_digest") == sha256(reference)[:16]
    assert result == {
        "images": str(run),
        "num_samples": 40,
        "reference": str(reference),
        "num_reference": 50,
        "extractor": "effnet_lite0_64",
        "resize": "its own",
        "intervals": {},
        "notes": [],
    }


def test_inception_gives_all_the_numbers_of_the_literature(pair, capsys):
    run, reference, images, others = pair
    found = evaluated(capsys, run, "--reference", reference, "--extractor", "inception")["numbers"]
    assert list(found) == ["fid", "sfid", "is", "is_all", "precision", "recall", "kid"]
    spatial = frechet_distance(*(statistics(whole(x).spatial) for x in (images, others)))
    assert found["fid"] == pytest.approx(distance(images, others), rel=1e-9)
    assert found["sfid"] == pytest.approx(spatial, rel=1e-9)
    assert found["is"] == pytest.approx(inception_score_in_chunks(whole(images).logits))
    assert found["is_all"] == pytest.approx(inception_score(whole(images).logits))


def test_images_are_nothing_away_from_themselves(pair, capsys):
    found = evaluated(capsys, pair[0], "--reference", pair[0])["numbers"]
    assert found["fd"] == pytest.approx(0, abs=1e-6)
    assert (found["precision"], found["recall"]) == (1, 1)


def test_the_images_looked_at_together_do_not_matter(pair, capsys):
    one, two = (evaluated(capsys, *pair[:1], "--reference", pair[1], "--batch_size", n)["numbers"] for n in (7, 100))
    assert one == pytest.approx(two, rel=1e-9)


def test_num_samples_takes_the_first_images_alone(pair, capsys):
    run, reference, images, others = pair
    result = evaluated(capsys, run, "--reference", reference, "--num_samples", 20)
    assert (result["num_samples"], result["num_reference"]) == (20, 50)
    assert result["numbers"]["fd"] == pytest.approx(distance(images[:20], others), rel=1e-9)


def test_an_interval_on_request(pair, capsys):
    result = evaluated(capsys, pair[0], "--reference", pair[1], "--bootstrap", 20)
    low, high = result["intervals"]["fd"]
    assert low < result["numbers"]["fd"] < high


def test_few_images_and_other_sizes_are_noted(tmp_path, capsys):
    run, _ = write_npz(tmp_path / "a.npz", 12, 0)
    reference, _ = write_npz(tmp_path / "b.npz", 50, 1, side=20)
    few, size = evaluated(capsys, run, "--reference", reference)["notes"]
    assert few.startswith("12 images for 12 features: the covariance has not full rank")
    assert size == "The images are 16×16, the reference's 20×20; the extractor resizes both: its own."


# ------------------------------------------------------------------------------------------------------ sources


def test_a_run_a_folder_an_npz_and_its_export_have_the_same_numbers(tmp_path, capsys):
    run = write_run(tmp_path / "run", ids=range(10), side=16)
    reference, _ = write_npz(tmp_path / "b.npz", 50, 1)
    write_images(run, tmp_path / "images")
    export_npz(run, tmp_path / "exported.npz", 10)
    sources = (run, tmp_path / "images", tmp_path / "exported.npz")
    found = [evaluated(capsys, name, "--reference", reference, "--batch_size", 3)["numbers"] for name in sources]
    assert found[0] == found[1] == found[2]
    first = evaluated(capsys, run, "--reference", reference, "--num_samples", 6)
    assert first["numbers"] != found[0]
    assert first["num_samples"] == 6


def test_a_run_folder_is_read_by_its_npz_where_its_shards_were_left_behind(tmp_path, pair, capsys):
    (tmp_path / "run").mkdir()
    write_npz(tmp_path / "run" / "samples_40x16x16x3.npz", 40, 0)
    assert evaluated(capsys, tmp_path / "run", "--reference", pair[1])["num_samples"] == 40


def test_pictures_are_cut_as_training_cuts_them(tmp_path, pair, capsys):
    wide = np.concatenate([drawn(8, 3, 16)] * 2, axis=2)
    folder = write_folder(tmp_path / "wide", wide)
    found = evaluated(capsys, folder, "--reference", pair[1], "--image_size", 16)
    assert found["numbers"]["fd"] == pytest.approx(distance(tensor(wide[:, :, 8:24]), pair[3]), rel=1e-9)
    assert found["settings"]["image_size"] == 16
    assert evaluated(capsys, pair[0], "--reference", folder)["num_reference"] == 8  # to the side of the run


def test_a_data_set_is_looked_at_once_and_its_statistics_are_kept(tmp_path, capsys):
    write_fashion_mnist(tmp_path / "cache")
    run, _ = write_npz(tmp_path / "a.npz", 30, 0, side=32)
    first = evaluated(capsys, run)
    assert (first["reference"], first["num_reference"]) == ("fashion_mnist_test", 40)
    assert sum(SEEN) == 30 + 40
    SEEN.clear()
    second = evaluated(capsys, run)
    assert sum(SEEN) == 30
    assert second["numbers"] == first["numbers"]


def test_a_folder_s_statistics_are_kept_until_it_changes(tmp_path, pair, capsys):
    folder = write_folder(tmp_path / "pictures", drawn(20, 2))
    before = evaluated(capsys, pair[0], "--reference", folder)["numbers"]
    SEEN.clear()
    assert evaluated(capsys, pair[0], "--reference", folder)["numbers"] == before
    assert sum(SEEN) == 40
    Image.fromarray(drawn(1, 9)[0]).save(folder / "more.png")
    assert evaluated(capsys, pair[0], "--reference", folder)["num_reference"] == 21


def test_a_data_set_is_measured_like_a_run(tmp_path, capsys):
    write_fashion_mnist(tmp_path / "cache")
    result = evaluated(capsys, "fashion_mnist_train", "--num_samples", 150)
    assert (result["num_samples"], result["num_reference"]) == (150, 40)


# ---------------------------------------------------------------------------------------- files of statistics


def published(path, images, **changes):
    """As OpenAI writes them: statistics of all images, and some of the images."""
    features = whole(images)
    arrays = {"arr_0": images.permute(0, 2, 3, 1).numpy()[:30]}
    for end, part in (("", features.pooled), ("_s", features.spatial)):
        arrays |= {f"mu{end}": part.double().mean(dim=0).numpy(), f"sigma{end}": np.cov(part.double().numpy().T)}
    np.savez(path, **{name: value for name, value in (arrays | changes).items() if value is not None})
    return path


def test_a_published_file_gives_the_numbers_of_its_images(tmp_path, pair, capsys):
    run, reference, images, others = pair
    file = published(tmp_path / "VIRTUAL.npz", others)
    want = evaluated(capsys, run, "--reference", reference, "--extractor", "inception")["numbers"]
    found = evaluated(capsys, run, "--reference", file, "--extractor", "inception")
    for name in ("fid", "sfid", "is", "is_all"):
        assert found["numbers"][name] == pytest.approx(want[name], rel=1e-9)
    shares = precision_recall(twelve(images), twelve(others[:30]))
    assert (found["numbers"]["precision"], found["numbers"]["recall"]) == shares
    assert found["num_reference"] is None


def test_statistics_alone_give_the_distance_alone(tmp_path, pair, capsys):
    file = published(tmp_path / "edm.npz", pair[3], arr_0=None, mu_s=None, sigma_s=None)
    found = evaluated(capsys, pair[0], "--reference", file, "--extractor", "inception")["numbers"]
    assert list(found) == ["fid", "is", "is_all"]
    assert "`extractor` must be inception" in refused(
        capsys, pair[0], "--reference", file, "--extractor", "effnet_lite0_64"
    )
    assert "must hold images as arr_0, and" in refused(capsys, file, "--reference", pair[1])


def test_a_file_of_statistics_decides_the_extractor_where_none_is_given(tmp_path, pair, capsys):
    found = evaluated(capsys, pair[0], "--reference", published(tmp_path / "VIRTUAL.npz", pair[3]))
    assert (found["extractor"], "fid" in found["numbers"]) == ("inception", True)
    assert exit_code("statistics", pair[1], "--output", tmp_path / "own.npz", "--extractor", OWN) == 0
    capsys.readouterr()
    assert evaluated(capsys, pair[0], "--reference", tmp_path / "own.npz")["extractor"] == OWN
    assert evaluated(capsys, pair[0], "--reference", pair[1])["extractor"] == "effnet_lite0_64"


def test_images_of_a_published_file_that_are_none_are_refused(tmp_path, pair, capsys):
    file = published(tmp_path / "V.npz", pair[3], arr_0=np.zeros((30, 16, 16, 3)))
    assert "`reference` must hold uint8 images" in refused(capsys, pair[0], "--reference", file)


def test_statistics_of_images_of_another_size_are_said(tmp_path, pair, capsys):
    large, file = write_npz(tmp_path / "large.npz", 50, 1, side=24)[0], tmp_path / "large_statistics.npz"
    assert exit_code("statistics", large, "--output", file) == 0
    capsys.readouterr()
    (note,) = evaluated(capsys, pair[0], "--reference", file)["notes"]
    assert note == "The images are 16×16, the reference's 24×24; the extractor resizes both: its own."


def test_pictures_that_are_cut_are_said_from_the_cache_too(tmp_path, pair, capsys):
    folder = write_folder(tmp_path / "large", drawn(20, 3, side=24))
    for _ in range(2):
        (note,) = evaluated(capsys, pair[0], "--reference", folder)["notes"]
        assert note == "large: Pictures, the first of them 24×24, are cut and resized to 16×16."
    same = write_folder(tmp_path / "same", drawn(20, 3))
    assert evaluated(capsys, pair[0], "--reference", same)["notes"] == []


def test_a_reference_whose_features_are_not_finite_is_refused_every_time_and_not_kept(
    tmp_path, pair, capsys, monkeypatch
):
    folder = write_folder(tmp_path / "pictures", drawn(20, 3))
    monkeypatch.setitem(EXTRACTORS, "effnet_lite0_64", lambda device: lambda images: twelve(images).log().div(0))
    for _ in range(2):
        assert "must give finite features" in refused(capsys, pair[0], "--reference", folder)
    output = tmp_path / "s.npz"
    assert "must give finite features" in refused(capsys, folder, "--output", output, verb="statistics")
    assert not output.exists()
    assert not list((tmp_path / "cache").rglob("*.npz"))


def test_a_reference_is_looked_at_again_by_an_extractor_of_ones_own(tmp_path, pair, capsys, monkeypatch):
    folder = write_folder(tmp_path / "pictures", drawn(20, 3))
    for extractor, again in (("effnet_lite0_64", 0), (OWN, 20)):
        evaluated(capsys, pair[0], "--reference", folder, "--extractor", extractor)
        SEEN.clear()
        evaluated(capsys, pair[0], "--reference", folder, "--extractor", extractor)
        assert sum(SEEN) == 40 + again


def make_own(device):
    return twelve


def test_a_cache_that_cannot_be_written_costs_no_numbers(tmp_path, pair, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "file"))
    folder = write_folder(tmp_path / "pictures", drawn(20, 3))
    assert exit_code("evaluate", pair[0], "--reference", folder, "--format", "json", "--progress", "off") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["num_reference"] == 20
    assert "`SAGL_CACHE`" in printed.err


def test_another_extractor_measures_from_a_published_file_s_images(tmp_path, pair, capsys):
    file = published(tmp_path / "V.npz", pair[3])
    found = evaluated(capsys, pair[0], "--reference", file, "--extractor", "effnet_lite0_64")
    assert found["num_reference"] == 30
    assert found["numbers"]["fd"] == pytest.approx(distance(pair[2], pair[3][:30]), rel=1e-9)
    assert "belong to inception: measured from its 30 images alone" in found["notes"][0]


def test_sagl_statistics_writes_what_gives_the_same_numbers(tmp_path, pair, capsys):
    run, reference, *_ = pair
    file = tmp_path / "statistics.npz"
    make = ("statistics", reference, "--output", file, "--extractor", "inception", "--progress", "off")
    assert exit_code(*make) == 0
    assert f"inception of 50 images. Measure from it: sagl evaluate RUN --reference {file}" in capsys.readouterr().out
    want = evaluated(capsys, run, "--reference", reference, "--extractor", "inception")["numbers"]
    SEEN.clear()
    assert evaluated(capsys, run, "--reference", file, "--extractor", "inception")["numbers"] == pytest.approx(want)
    assert sum(SEEN) == 40
    before = file.read_bytes()
    assert "is there" in refused(capsys, *make[1:4], verb="statistics")
    assert file.read_bytes() == before
    assert exit_code(*make, "--overwrite", "--num_samples", 20, "--max_features", 5) == 0
    capsys.readouterr()
    assert evaluated(capsys, run, "--reference", file, "--extractor", "inception")["num_reference"] == 20
    assert "`extractor` must be inception" in refused(
        capsys, run, "--reference", file, "--extractor", "effnet_lite0_64"
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--output", "a.txt"), "`output` must end in .npz"),
        (("--output", "c.npz", "--max_features", 1), "`max_features`"),
        (("--output", "c.npz", "--num_samples", 51), "`num_samples` must be 2 … 50"),
        (("--output", "c.npz", "--extractor", "nonsense"), "`extractor`"),
        (("--output", "c.npz", "--trainer.devices", "0"), "`trainer.devices`"),
    ],
)
def test_statistics_that_cannot_be_made_are_refused(arguments, named, pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert named in refused(capsys, pair[1], *arguments, verb="statistics")
    assert not list(tmp_path.glob("c.npz*"))


# ------------------------------------------------------------------------------------------------------- output


def test_a_run_keeps_its_numbers_one_entry_a_kind_of_measurement(tmp_path, pair, capsys):
    run = write_run(tmp_path / "run", side=16)
    for subsets in (5, 6, 5):
        evaluated(capsys, run, "--reference", pair[1], "--kid_subsets", subsets)
    kept = json.loads((run / "evaluation.json").read_text())["evaluations"]
    assert [entry["settings"]["kid_subsets"] for entry in kept] == [6, 5]
    again = evaluated(capsys, run, "--reference", pair[1], "--kid_subsets", 5)
    assert kept[1]["numbers"] == again["numbers"]
    (run / "evaluation.json").write_text("{")
    SEEN.clear()
    assert "evaluation.json is damaged" in refused(capsys, run, "--reference", pair[1])
    assert SEEN == []  # refused before the work
    assert (run / "evaluation.json").read_text() == "{"


def test_references_of_one_name_are_told_apart(tmp_path, pair, capsys, monkeypatch):
    run = write_run(tmp_path / "run", side=16)
    for name, seed in (("x", 1), ("y", 2)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        write_npz(tmp_path / name / "ref.npz", 30, seed)
        evaluated(capsys, run, "--reference", "ref.npz")
    kept = json.loads((run / "evaluation.json").read_text())["evaluations"]
    assert [entry["reference"] for entry in kept] == ["ref.npz", "ref.npz"]
    assert len({entry["reference_digest"] for entry in kept}) == 2


def test_a_run_that_is_not_finished_is_measured_and_said_to_be(tmp_path, pair, capsys):
    run = write_run(tmp_path / "run", side=16, num_samples=1000)
    (note,) = evaluated(capsys, run, "--reference", pair[1])["notes"][:1]
    assert re.fullmatch(r"The run holds \d+ of 1000 images so far\.", note)
    (run / "run.json").write_text("{")
    assert "`run` must hold a whole run.json" in refused(capsys, run, "--reference", pair[1])


def test_a_file_that_is_there_is_left_alone_and_found_before_the_work(tmp_path, pair, capsys):
    mine = tmp_path / "mine.json"
    mine.write_text("precious")
    arguments = (pair[0], "--reference", pair[1], "--output", mine)
    assert "Choose another name, or --overwrite" in refused(capsys, *arguments)
    (tmp_path / "folder.json").mkdir()
    assert "must be a file" in refused(capsys, *arguments[:-1], tmp_path / "folder.json")
    assert "must be a folder" in refused(capsys, *arguments[:-1], mine / "under.json")
    assert (mine.read_text(), SEEN) == ("precious", [])
    assert evaluated(capsys, *arguments, "--overwrite") == json.loads(mine.read_text())


def test_a_table_for_people_json_and_csv_for_programs(tmp_path, pair, capsys):
    run, reference = pair[:2]
    arguments = ("evaluate", run, "--reference", reference, "--progress", "off")
    assert exit_code(*arguments, "--output", tmp_path / "deep" / "n.json") == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("Fréchet distance", "precision", "recall", "± ", "40 images", "50 images"))
    written = json.loads((tmp_path / "deep" / "n.json").read_text())
    assert f"{written['numbers']['fd']:.2f}" in shown
    assert exit_code(*arguments, "--format", "csv", "--output", tmp_path / "n.csv") == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "n.csv").read_text() == printed
    rows = {row["metric"]: row for row in csv.DictReader(io.StringIO(printed))}
    assert float(rows["fd"]["value"]) == written["numbers"]["fd"]
    assert (rows["kd"]["extractor"], rows["kd"]["num_reference"]) == ("effnet_lite0_64", "50")
    assert "kid_subset_size 40; " in rows["kd"]["settings"]
    assert "kid_subset_size 40 · " in shown.replace("\n", "")
    assert "`output` must end in .json or .csv" in refused(capsys, run, "--output", "n.txt")


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("wanted", [0, 1, 41, -3])
def test_a_count_that_the_run_does_not_have_or_that_has_no_spread_is_refused(wanted, pair, capsys):
    said = refused(capsys, pair[0], "--reference", pair[1], "--num_samples", wanted)
    assert f"`num_samples` must be 2 … 40 for {pair[0]}, got {wanted}" in said


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--reference", "one.npz"), "`reference` must hold at least 2 images"),
        (("--reference", "absent"), "`reference` must be one of"),
        (("--reference", "empty"), "`reference`"),
        (("--reference", "floats.npz"), "`reference` must hold uint8 images"),
        (("--reference", "flat.npz"), "`reference` must hold uint8 images"),
        (("--reference", "keys.npz"), "`reference` must hold images as arr_0"),
        (("--reference", "cut.npz"), "`reference` must be a whole npz file"),
        (("--reference", "sizes"), "`image_size` must be given"),
        (("--reference", "broken"), "cannot be read"),
        (("--num_neighbors", "0"), "`num_neighbors`"),
        (("--num_neighbors", "40"), "`num_neighbors` must be below the number of features"),
        (("--bootstrap", "3"), "`bootstrap`"),
        (("--batch_size", "0"), "`batch_size`"),
        (("--image_size", "0"), "`image_size`"),
        (("--extractor", "nonsense"), "`extractor` must be one of"),
        (("--trainer.devices", "many"), "`trainer.devices`"),
        (("--trainer.num_nodes", "2"), "`trainer.num_nodes`"),
        (("--trainer.accelerator", "gpu"), "`trainer.accelerator`"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments, named, pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write_npz(tmp_path / "one.npz", 1, 1)
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((4, 8, 8, 3)))
    np.savez(tmp_path / "flat.npz", arr_0=np.zeros((4, 8), dtype=np.uint8))
    np.savez(tmp_path / "keys.npz", images=np.zeros((4, 8, 8, 3), dtype=np.uint8))
    (tmp_path / "cut.npz").write_bytes(pair[0].read_bytes()[:5000])
    Image.fromarray(drawn(1, 0, 24)[0]).save(write_folder(tmp_path / "sizes", drawn(3, 0)) / "zz.png")
    write_folder(tmp_path / "broken", drawn(3, 0))
    (tmp_path / "broken" / "001.png").write_bytes(b"no picture")
    rest = () if "--reference" in arguments else ("--reference", pair[1])
    run = ("sizes", "--reference", pair[1]) if "sizes" in arguments else (pair[0], *rest, *arguments)
    assert named in refused(capsys, *run)  # as a reference, pictures of many sizes are cut to the run's side


def test_a_damaged_shard_is_refused_and_left_alone(tmp_path, pair, capsys):
    run = write_run(tmp_path / "run", side=16)
    shard = next((run / "shards").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    assert f"{shard} is damaged. The command of its run makes it again." in refused(capsys, run, "--reference", pair[1])
    assert shard.read_bytes() == data
    assert not (run / "evaluation.json").exists()


def test_features_that_are_not_finite_are_refused(pair, monkeypatch, capsys):
    monkeypatch.setitem(EXTRACTORS, "effnet_lite0_64", lambda device: lambda images: twelve(images).log().div(0))
    assert "must give finite features" in refused(capsys, pair[0], "--reference", pair[1])
