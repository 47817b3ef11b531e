import os
import shutil
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from sagl.errors import UserError
from sagl.evaluation.evaluate import write_statistics
from sagl.metrics.extractors import EXTRACTORS
from sagl.metrics.frechet import frechet_distance, statistics
from sagl.metrics.kid import kernel_distance
from sagl.metrics.precision_recall import precision_recall
from sagl.sampling.exports import write_images
from sagl.sampling.exports import write_npz as export_npz
from sagl.settings.evaluation import ExtractionSettings
from sagl.settings.sampling import DeviceSettings
from sagl.utils.files import sha256
from tests.helpers.extractors import (
    BATCH_SIZES,
    USER_EXTRACTOR,
    all_features,
    random_images,
    result_of,
    row_means,
    serve_files,
    to_tensor,
    use_fast_extractors,
    write_folder,
    write_npz,
    write_pair,
)
from tests.helpers.files import write_fashion_mnist
from tests.helpers.run_folders import write_run


@pytest.fixture(autouse=True)
def fast_extractors(tmp_path, monkeypatch):
    use_fast_extractors(monkeypatch, tmp_path / "cache")


@pytest.fixture
def pair(tmp_path):
    """Paths of 40 images and of 50, and the images."""
    return write_pair(tmp_path)


def distance(a, b):
    return frechet_distance(statistics(row_means(a)), statistics(row_means(b)))


# -------------------------------------------------------------------------------------------------- values


def test_a_result_has_the_values_and_all_that_they_depend_on(pair):
    run, reference, images, others = pair
    result = asdict(result_of(run, reference, kid_subsets=5, kid_subset_size=30))
    fractions = precision_recall(row_means(images), row_means(others))
    kernel = kernel_distance(row_means(images), row_means(others), num_subsets=5, subset_size=30)
    assert result.pop("values") == {
        "fd": pytest.approx(distance(images, others), rel=1e-9),
        "precision": fractions.precision,
        "recall": fractions.recall,
        "kd": pytest.approx(kernel.mean),
    }
    assert result.pop("stds") == {"kd": pytest.approx(kernel.std)}
    assert result.pop("seconds") >= 0
    settings = {"num_neighbors": 3, "max_features": 50, "kid_subsets": 5, "kid_subset_size": 30}
    assert result.pop("settings") == settings | {"bootstrap": 0, "seed": 0}
    assert result == {
        "images": str(run),
        "num_samples": 40,
        "ids": "",
        "reference": str(reference),
        "reference_digest": sha256(reference)[:16],
        "reference_crop_size": None,
        "num_reference": 50,
        "extractor": "effnet_lite0_64",
        "extractor_version": "",
        "resize": "its own",
        "intervals": {},
        "resamples": {},
        "notes": (),
    }


def test_num_samples_selects_the_first_images_of_the_run(pair):
    run, reference, images, others = pair
    result = result_of(run, reference, num_samples=20)
    assert (result.num_samples, result.num_reference) == (20, 50)
    assert result.values["fd"] == pytest.approx(distance(images[:20], others), rel=1e-9)


@pytest.mark.parametrize("num_samples", [1, 41])
def test_a_number_of_images_that_the_run_does_not_have_is_refused(num_samples, pair):
    with pytest.raises(UserError, match=f"`num_samples` .* 40 .*got {num_samples}"):
        result_of(*pair[:2], num_samples=num_samples)


# --------------------------------------------------------------------------------------------------- notes


def test_few_images_and_different_sizes_are_noted(tmp_path):
    run, _ = write_npz(tmp_path / "a.npz", 12, 0)
    reference, _ = write_npz(tmp_path / "b.npz", 50, 1, size=20)
    rank, size = result_of(run, reference).notes
    assert "12 images for 12" in rank
    assert "16×16" in size
    assert "20×20" in size


def test_an_unfinished_run_is_evaluated_with_a_note(tmp_path, pair):
    run = write_run(tmp_path / "run", image_size=16, num_samples=1000)
    assert "6 of 1000" in result_of(run, pair[1]).notes[0]
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"`images` .*run\.json"):
        result_of(run, pair[1])


def test_the_result_of_a_run_has_the_ids_of_its_images(tmp_path, pair):
    run = write_run(tmp_path / "run", ids=range(20, 30), image_size=16)  # three shards
    gaps = write_run(tmp_path / "gaps", ids=[*range(4), *range(8, 12)], image_size=16)
    results = [result_of(run, pair[1]), result_of(run, pair[1], num_samples=5), result_of(gaps, pair[1])]
    results.append(result_of(gaps, pair[1], num_samples=4))
    assert [result.ids for result in results] == ["20-29", "20-24", "0-3, 8-11", "0-3"]


def test_cropping_of_a_reference_is_noted_from_the_cache_too(tmp_path, pair):
    folder = write_folder(tmp_path / "large", random_images(20, 3, size=24))
    for _ in range(2):
        (note,) = result_of(pair[0], folder).notes
        assert "24×24" in note
        assert "16×16" in note
    assert result_of(pair[0], write_folder(tmp_path / "same", random_images(20, 3))).notes == ()


# ---------------------------------------------------------------------------------------------- image sets


def test_a_run_its_images_and_its_npz_have_the_same_values(tmp_path, pair):
    run = write_run(tmp_path / "run", ids=range(10), image_size=16)
    write_images(run, tmp_path / "images")
    export_npz(run, tmp_path / "exported.npz", 10)
    sources = (run, tmp_path / "images", tmp_path / "exported.npz")
    values = [result_of(source, pair[1], batch_size=3).values for source in sources]
    assert values[0] == values[1] == values[2]
    assert result_of(run, pair[1], num_samples=6).values != values[0]


def test_images_are_cropped_as_for_training(tmp_path, pair):
    wide = np.concatenate([random_images(8, 3)] * 2, axis=2)
    folder = write_folder(tmp_path / "wide", wide)
    result = result_of(folder, pair[1], image_size=16)
    assert result.values["fd"] == pytest.approx(distance(to_tensor(wide[:, :, 8:24]), pair[3]), rel=1e-9)
    assert result.settings["image_size"] == 16
    assert result_of(pair[0], folder).num_reference == 8  # cropped to the size of the run


def test_images_of_two_sizes_have_different_conditions_against_a_folder_that_is_cropped_to_their_size(tmp_path, pair):
    folder = write_folder(tmp_path / "folder", random_images(20, 3, size=24))
    runs = [write_run(tmp_path / str(size), ids=range(8), image_size=size) for size in (16, 20)]
    for _ in range(2):  # the second results come from the cache
        first, second = (result_of(run, folder, bootstrap=20) for run in runs)
        assert (first.reference_crop_size, second.reference_crop_size) == (16, 20)
        assert first.reference_digest == second.reference_digest
        assert first.difference(second, "fd") is None
    first, second = (result_of(run, pair[1], bootstrap=20) for run in runs)  # an npz file stays as it is
    assert first.difference(second, "fd") is not None


def test_a_split_of_fashion_mnist_is_an_image_set(tmp_path):
    write_fashion_mnist(tmp_path / "cache")
    result = result_of("fashion_mnist_train", "fashion_mnist_test", num_samples=150)
    assert (result.num_samples, result.num_reference) == (150, 40)


def test_the_test_split_of_the_emoji_is_an_image_set_on_any_machine():
    result = result_of("emoji_test", "emoji_test", num_samples=20, kid_subsets=1)
    assert (result.num_samples, result.num_reference, result.reference_digest) == (20, 689, "")


@pytest.mark.parametrize("kind", ["npz file", "bitmaps", "run", "statistics"])
def test_references_of_one_name_and_size_have_the_digest_of_their_content(kind, tmp_path, pair, monkeypatch):
    def write(seed):
        if kind == "run":
            return write_run(tmp_path / "ref", image_size=16, first_image=seed)
        if kind == "bitmaps":
            folder = write_folder(tmp_path / "ref", random_images(6, seed), suffix=".bmp")
            for path in folder.iterdir():
                os.utime(path, (0, 0))
            return folder
        path, _ = write_npz(tmp_path / ("images.npz" if kind == "statistics" else "ref.npz"), 30, seed)
        if kind == "statistics":
            path = write_own(path, tmp_path / "ref.npz")
        return path

    digests = []
    for seed in (1, 2, 1):
        reference = write(seed)
        digests += [result_of(pair[0], reference).reference_digest for _ in range(2)]  # the second may be cached
        shutil.rmtree(reference) if reference.is_dir() else reference.unlink()
    first, second = digests[0], digests[2]
    assert first != second
    assert digests == [first, first, second, second, first, first]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("one.npz", "`reference` .* at least 2 .* 1"),
        ("empty", "`reference`"),
        ("keys.npz", "`reference` .*arr_0"),
        ("broken", r"001\.png"),
    ],
)
def test_references_without_usable_images_are_refused(reference, message, pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_npz(tmp_path / "one.npz", 1, 1)
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "keys.npz", images=np.zeros((4, 8, 8, 3), dtype=np.uint8))
    write_folder(tmp_path / "broken", random_images(3, 0))
    (tmp_path / "broken" / "001.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=message):
        result_of(pair[0], reference)


def test_images_of_several_sizes_need_an_image_size(tmp_path, pair):
    folder = write_folder(tmp_path / "sizes", random_images(3, 0))
    Image.fromarray(random_images(1, 0, 24)[0]).save(folder / "zz.png")
    with pytest.raises(UserError, match=r"`image_size` .*zz\.png"):
        result_of(folder, pair[1])
    assert result_of(folder, pair[1], image_size=16).num_samples == 4


@pytest.mark.parametrize("batch_size", [1, 3])
def test_images_of_several_sizes_need_an_image_size_in_whatever_batches_they_are_read(batch_size, tmp_path, pair):
    folder = write_folder(tmp_path / "sizes", [*random_images(3, 0), *random_images(3, 1, 24)])
    np.savez(tmp_path / "wide.npz", arr_0=np.concatenate([random_images(8, 3)] * 2, axis=2))
    for images, reference in (
        (folder, pair[1]),
        (tmp_path / "wide.npz", folder),
    ):  # those of wide images are not cropped
        with pytest.raises(UserError, match=r"`image_size` .*003\.png"):
            result_of(images, reference, batch_size=batch_size)


def test_up_to_one_percent_of_the_images_may_be_unreadable_and_they_are_counted_and_named(tmp_path, pair, capsys):
    images = random_images(200, 3)
    folder = write_folder(tmp_path / "images", images)
    (folder / "000.png").write_bytes(b"")
    (folder / "123.png").write_bytes(b"no image")
    readable = to_tensor(np.delete(images, (0, 123), axis=0))
    expected = distance(pair[2], readable)
    for batch_size in (1, 100):
        result = result_of(pair[0], folder, batch_size=batch_size)
        assert result.values["fd"] == pytest.approx(expected, rel=1e-9)
        assert result.num_reference == 198
        assert "2 of 200" in result.notes[0]
        assert ("000.png" in capsys.readouterr().err) == (batch_size == 1)  # the second result comes from the cache
    assert result_of(folder, pair[1]).num_samples == 198
    (folder / "150.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"3 of 200 .*150\.png"):
        result_of(pair[0], folder)


def test_entries_of_a_folder_that_are_left_out_are_noted(tmp_path, pair):
    folder = write_folder(tmp_path / "images", random_images(20, 3))
    (folder / "a.gif").touch()
    assert ".gif" in result_of(pair[0], folder).notes[0]
    assert ".gif" in result_of(folder, pair[1]).notes[0]


def test_images_behind_a_link_that_change_are_measured_again(tmp_path, pair):
    (tmp_path / "data").mkdir()
    store = write_folder(tmp_path / "store", random_images(20, 3))
    (tmp_path / "data" / "link").symlink_to(store)
    before = result_of(pair[0], tmp_path / "data")
    Image.fromarray(random_images(1, 9)[0]).save(store / "000.png")
    after = result_of(pair[0], tmp_path / "data")
    assert (before.num_reference, after.num_reference) == (20, 20)
    assert before.values["fd"] != after.values["fd"]


def test_files_at_http_addresses_are_downloaded_once(tmp_path, pair, monkeypatch):
    addresses = serve_files(monkeypatch, tmp_path)
    expected = result_of(*pair[:2])
    result = result_of("http://host/a.npz", "https://host/path/b.npz")
    assert (result.values, result.reference_digest) == (expected.values, expected.reference_digest)
    assert (result.images, result.reference) == ("http://host/a.npz", "https://host/path/b.npz")
    assert addresses == ["http://host/a.npz", "https://host/path/b.npz"]
    (tmp_path / "page.npz").write_text("<html>")
    with pytest.raises(UserError, match="npz"):
        result_of(pair[0], "https://host/page.npz")


# --------------------------------------------------------------------------------------------------- cache


def test_statistics_of_a_folder_are_cached_until_it_changes(tmp_path, pair):
    folder = write_folder(tmp_path / "images", random_images(20, 2))
    before = result_of(pair[0], folder).values
    BATCH_SIZES.clear()
    assert result_of(pair[0], folder).values == before
    assert sum(BATCH_SIZES) == 40
    Image.fromarray(random_images(1, 9)[0]).save(folder / "more.png")
    assert result_of(pair[0], folder).num_reference == 21


def test_features_of_a_user_s_extractor_and_those_that_are_not_finite_are_not_cached(tmp_path, pair, monkeypatch):
    folder = write_folder(tmp_path / "images", random_images(20, 3))
    result_of(pair[0], folder, extractor=USER_EXTRACTOR)
    monkeypatch.setitem(EXTRACTORS, "effnet_lite0_64", lambda device: lambda images: row_means(images).log().div(0))
    with pytest.raises(UserError, match=r"`reference` .*finite"):
        result_of(pair[0], folder)
    assert not list((tmp_path / "cache").rglob("*.npz"))


def test_cached_statistics_are_those_of_the_extractor_s_weights(tmp_path, pair, monkeypatch):
    folder, values = write_folder(tmp_path / "images", random_images(20, 3)), {}

    class Scaled:
        def __init__(self, scale, version):
            self.scale, self.version = scale, version

        def __call__(self, images_uint8):
            return self.scale * row_means(images_uint8)

    for scale, version in ((1, ""), (2, "a"), (1, "")):
        monkeypatch.setitem(EXTRACTORS, "effnet_lite0_64", lambda device, s=scale, v=version: Scaled(s, v))
        values[version] = result_of(pair[0], folder).values["fd"]
    assert values["a"] == pytest.approx(4 * values[""], rel=1e-6)
    names = [path.name.partition("-effnet")[2] for path in (tmp_path / "cache").rglob("*.npz")]
    assert sorted(names) == ["_lite0_64-16px-10000.npz", "_lite0_64-a-16px-10000.npz"]


def test_a_cache_that_is_not_writable_is_no_error(tmp_path, pair, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "file"))
    assert result_of(pair[0], write_folder(tmp_path / "images", random_images(20, 3))).num_reference == 20
    assert "`SAGL_CACHE`" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- statistics files


def write_published(path, images, **changes):
    """Write a file like OpenAI's: statistics of all images, and some of the images."""
    features = all_features(images)
    arrays = {"arr_0": images.permute(0, 2, 3, 1).numpy()[:30]}
    for suffix, part in (("", features.pooled), ("_s", features.spatial)):
        arrays |= {f"mu{suffix}": part.double().mean(dim=0).numpy(), f"sigma{suffix}": np.cov(part.double().numpy().T)}
    np.savez(path, **{name: value for name, value in (arrays | changes).items() if value is not None})
    return path


def write_own(source, path, **options):
    """Write a statistics file of sagl."""
    extraction = ExtractionSettings(extractor=options.pop("extractor", None), progress="off")
    devices = DeviceSettings(accelerator="cpu", devices="1")
    write_statistics(str(source), path, extraction=extraction, devices=devices, **options)
    return path


def test_a_published_file_has_the_values_of_its_images(tmp_path, pair):
    run, reference, images, others = pair
    expected = result_of(run, reference, extractor="inception").values
    result = result_of(run, write_published(tmp_path / "VIRTUAL.npz", others))
    assert result.extractor == "inception"
    for name in ("fid", "sfid", "is", "is_all"):
        assert result.values[name] == pytest.approx(expected[name], rel=1e-9)
    fractions = precision_recall(row_means(images), row_means(others[:30]))
    assert (result.values["precision"], result.values["recall"]) == fractions
    assert result.num_reference is None


def test_a_file_without_images_has_only_the_distance(tmp_path, pair):
    file = write_published(tmp_path / "edm.npz", pair[3], arr_0=None, mu_s=None, sigma_s=None)
    assert list(result_of(pair[0], file).values) == ["fid", "is", "is_all"]
    with pytest.raises(UserError, match=r"`extractor` .*inception.*effnet_lite0_64"):
        result_of(pair[0], file, extractor="effnet_lite0_64")
    with pytest.raises(UserError, match=r"`images` .*arr_0"):
        result_of(file, pair[1])


def test_another_extractor_uses_only_the_images_of_a_published_file(tmp_path, pair):
    result = result_of(pair[0], write_published(tmp_path / "V.npz", pair[3]), extractor="effnet_lite0_64")
    assert result.num_reference == 30
    assert result.values["fd"] == pytest.approx(distance(pair[2], pair[3][:30]), rel=1e-9)
    assert "inception" in result.notes[0]
    assert "30 images" in result.notes[0]


def test_a_statistics_file_of_sagl_has_the_values_of_its_images(tmp_path, pair):
    run, reference, *_ = pair
    expected = result_of(run, reference, extractor="inception")
    file = write_own(reference, tmp_path / "own.npz", extractor="inception")
    BATCH_SIZES.clear()
    assert result_of(run, file).values == pytest.approx(expected.values)
    assert sum(BATCH_SIZES) == 40
    smaller = write_own(reference, tmp_path / "smaller.npz", num_samples=20, max_features=5)
    result = result_of(run, smaller)
    assert (result.num_reference, result.settings["max_features"]) == (20, 5)


def test_a_statistics_file_determines_the_extractor_and_the_image_size(tmp_path, pair):
    large, _ = write_npz(tmp_path / "large.npz", 50, 1, size=24)
    result = result_of(pair[0], write_own(large, tmp_path / "s.npz", extractor="inception"))
    assert result.extractor == "inception"
    assert "24×24" in result.notes[0]


@pytest.mark.parametrize("extractor", ["inception", USER_EXTRACTOR])
def test_a_statistics_file_of_another_version_of_the_extractor_is_refused(extractor, tmp_path, pair, monkeypatch):
    def use_version(version):
        def extract(images):
            return all_features(images)

        extract.version = version
        monkeypatch.setitem(EXTRACTORS, "inception", lambda device: extract)
        monkeypatch.setattr("tests.helpers.extractors.user_extractor", lambda device: extract)

    use_version("a")
    file = write_own(pair[1], tmp_path / "own.npz", extractor=extractor)
    expected = result_of(pair[0], file, extractor=extractor)
    assert expected.extractor_version.startswith("a")
    use_version("b")
    with pytest.raises(UserError, match=r"`reference` .*own\.npz.*'a.*'b.*sagl statistics"):
        result_of(pair[0], file, extractor=extractor)
    with np.load(file) as arrays:
        kept = {name: arrays[name] for name in arrays.files if name != "extractor_version"}
    np.savez(tmp_path / "earlier.npz", **kept)  # a file of a version that did not store it
    result = result_of(pair[0], tmp_path / "earlier.npz", extractor=extractor)
    assert result.values == expected.values
    assert result.extractor_version.startswith("b")


def test_code_that_a_statistics_file_names_is_not_imported(tmp_path, pair, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "innocent.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w'); make = print")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    np.savez(tmp_path / "r.npz", mu=np.zeros(2), sigma=np.eye(2), extractor=np.array("innocent.make"))
    with pytest.raises(UserError, match=r"`extractor` .*r\.npz.*innocent\.make"):
        result_of(pair[0], tmp_path / "r.npz")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(("name", "value"), [("num_samples", 51), ("max_features", 1), ("extractor", "nonsense")])
def test_statistics_with_wrong_arguments_are_refused(name, value, pair, tmp_path):
    with pytest.raises(UserError, match=f"`{name}` .*{value}"):
        write_own(pair[1], tmp_path / "c.npz", **{name: value})
    assert not list(tmp_path.glob("c.npz*"))
