import hashlib
import json
import random
import tarfile

import numpy as np
import pytest
import webdataset

from sagl.errors import UserError
from sagl.sampling import run_folder
from sagl.sampling.run_folder import (
    Sample,
    check_same_run,
    decode_png,
    encode_png,
    get_samples,
    iter_samples,
    list_shards,
    missing_batches,
    read_run_json,
    read_shard,
    remove_damaged,
    remove_superseded,
    shared_ids,
    write_run_json,
    write_shard,
)
from tests.helpers.errors import refused
from tests.helpers.files import contents

SETTINGS = {"seed": 3, "respacing": "25", "sag": {"scale": 0.5, "interval": (0.0, 1.0), "kernel_size": None}}


def image(i, *, channels=3):
    """Return random pixels that depend on the number."""
    return np.random.default_rng(i).integers(0, 256, (4, 6, channels), dtype=np.uint8)


def samples(first, last, rows=("samples",)):
    pngs = {i: {row: encode_png(image(10 * i + k)) for k, row in enumerate(rows)} for i in range(first, last + 1)}
    return [Sample(id=i, label=i % 3 - 1, seed=7, pngs=row) for i, row in pngs.items()]


def shard(folder, first, last):
    return write_shard(folder, samples(first, last))


def damage(path, position):
    """Change one byte; a negative `position` counts from the end."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def test_decoding_inverts_encoding_and_gray_images_get_three_channels():
    assert (decode_png(encode_png(image(1))) == image(1)).all()
    assert (decode_png(encode_png(image(1)[..., 0])) == image(1)[..., :1]).all()
    assert decode_png(encode_png(image(1)[..., 0])).shape == (4, 6, 3)


@pytest.mark.parametrize("rows", [("samples",), ("unguided", "samples", "masks")])
@pytest.mark.parametrize("first", [0, 999_999, 2**32 - 2])
def test_reading_inverts_writing_and_a_shard_is_named_by_its_ids(rows, first, tmp_path):
    written = samples(first, first + 1, rows)
    path = write_shard(tmp_path / "deep" / "run", written)
    assert path == tmp_path / "deep" / "run" / "shards" / f"{first:06d}-{first + 1:06d}.tar"
    assert read_shard(path) == written
    assert list(contents(tmp_path)) == [path]


def test_the_bytes_of_a_shard_do_not_depend_on_user_and_time(tmp_path, monkeypatch):
    one = shard(tmp_path / "a", 0, 2)
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setattr("os.getuid", lambda: 1234)
    assert shard(tmp_path / "b", 0, 2).read_bytes() == one.read_bytes()
    with tarfile.open(one) as tar:
        assert {(m.mtime, m.uid, m.uname, m.mode) for m in tar} == {(0, 0, "", 0o644)}


def test_the_last_member_has_length_and_sha256_of_the_others(tmp_path):
    with tarfile.open(shard(tmp_path, 0, 1)) as tar:
        *members, index = [(m.name, tar.extractfile(m).read()) for m in tar]
    assert [name for name, _ in members] == ["000000.png", "000000.json", "000001.png", "000001.json"]
    expected = {name: {"length": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in members}
    assert (index[0], json.loads(index[1])) == (run_folder.INDEX, expected)


def test_a_changed_byte_anywhere_in_the_file_is_detected(tmp_path):
    path = shard(tmp_path, 0, 1)
    data = path.read_bytes()
    for position in (*range(0, len(data), 61), -1):
        damage(path, position)
        with pytest.raises(UserError, match="is damaged"):
            read_shard(path)
        path.write_bytes(data)
    assert read_shard(path) == samples(0, 1)


@pytest.mark.parametrize("length", [0, 1, 511, 700, 2048, 4096, -512, -1])
def test_a_truncated_file_is_detected(length, tmp_path):
    path = shard(tmp_path, 0, 1)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="is damaged"):
        read_shard(path)


def test_a_shard_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.tarfile.TarFile, "addfile", full_disk)
    with pytest.raises(UserError, match=r"`output`.*No space left on device"):
        shard(tmp_path, 0, 1)
    assert contents(tmp_path) == {}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset does not close the file
def test_webdataset_reads_the_images_and_labels_of_a_shard(tmp_path):
    dataset = webdataset.WebDataset(str(shard(tmp_path, 0, 2)), shardshuffle=False).select(lambda s: "png" in s)
    read = list(dataset.decode("rgb8").to_tuple("png", "json"))
    assert [metadata["label"] for _, metadata in read] == [-1, 0, 1]
    assert all((pixels == image(10 * i)).all() for i, (pixels, _) in enumerate(read))


def test_samples_are_in_order_of_ids_and_as_many_as_requested(tmp_path):
    assert list(iter_samples(tmp_path)) == list(iter_samples(tmp_path / "absent", 3)) == []
    for first in (999_998, 1_000_002, 4, 0):
        shard(tmp_path, first, first + 3)
    (tmp_path / "shards" / "other-file.tar").write_text("not a shard")
    ids = [*range(8), *range(999_998, 1_000_006)]
    assert list(list_shards(tmp_path)) == [(k, k + 3) for k in (0, 4, 999_998, 1_000_002)]
    assert [sample.id for sample in iter_samples(tmp_path)] == ids
    for count in (0, 1, 4, 9, 99):
        assert [sample.id for sample in iter_samples(tmp_path, count)] == ids[:count]


def test_only_the_shards_that_are_needed_are_read(tmp_path):
    shard(tmp_path, 0, 1)
    damage(shard(tmp_path, 2, 3), 600)
    assert [sample.id for sample in iter_samples(tmp_path, 2)] == [0, 1]
    with pytest.raises(UserError, match="000002-000003"):
        list(iter_samples(tmp_path, 3))


def test_a_micro_batch_is_missing_until_an_intact_shard_contains_it(tmp_path):
    batches = [range(0, 4), range(4, 8), range(8, 10)]
    assert missing_batches(tmp_path, batches) == batches
    shard(tmp_path, 0, 1)  # of a shorter run
    shard(tmp_path, 8, 11)  # of a longer one
    damage(shard(tmp_path, 4, 7), 600)
    assert missing_batches(tmp_path, batches) == batches[:2]
    shard(tmp_path, 0, 3)
    path = shard(tmp_path, 4, 7)
    assert missing_batches(tmp_path, batches) == []
    assert [sample.id for sample in iter_samples(tmp_path, 4)] == [0, 1, 2, 3]  # of two shards that overlap
    shard(tmp_path, 5, 8).rename(path)  # other ids than in its name
    assert missing_batches(tmp_path, batches) == [batches[1]]


def test_superseded_shards_are_those_whose_ids_a_longer_one_contains(tmp_path):
    others = [shard(tmp_path, *ids) for ids in ((4, 7), (8, 9))]
    shard(tmp_path, 0, 1)
    shard(tmp_path, 1, 1)
    written = shard(tmp_path, 0, 3)
    remove_superseded(tmp_path)
    assert sorted(list_shards(tmp_path).values()) == [written, *others]


def test_a_damaged_shard_is_deleted_if_its_ids_are_missing(tmp_path):
    damaged, other, intact = shard(tmp_path, 0, 3), shard(tmp_path, 8, 11), shard(tmp_path, 4, 5)
    for path in (damaged, other):
        path.write_bytes(path.read_bytes()[:-1])
    remove_damaged(tmp_path, [[0, 1], [4, 5, 6]])
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == sorted([intact.name, other.name])


def test_metadata_are_read_as_written_and_empty_without_a_file(tmp_path):
    assert read_run_json(tmp_path) == read_run_json(tmp_path / "absent") == {}
    write_run_json(tmp_path / "new", {"settings": {"seed": 3}, "nfe": 8})
    assert read_run_json(tmp_path / "new") == {"settings": {"seed": 3}, "nfe": 8}
    assert [path.name for path in contents(tmp_path)] == ["run.json"]


def test_a_description_whose_values_were_changed_is_refused_except_for_its_exports(tmp_path):
    write_run_json(tmp_path, {"settings": {"seed": 3}, "nfe": 8, "exports": {"grid": 4}})
    text = (tmp_path / "run.json").read_text()
    (tmp_path / "run.json").write_text(text.replace('"grid": 4', '"grid": 5'))
    assert read_run_json(tmp_path)["exports"] == {"grid": 5}
    for old, new in (('"seed": 3', '"seed": 2'), ('"nfe": 8', '"nfe": 9')):
        (tmp_path / "run.json").write_text(text.replace(old, new))
        with pytest.raises(UserError, match=r"`output` .*run\.json"):
            read_run_json(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "3", '{"settings": 3}', '{"settings": {"seed": 3', "no json", "\udcff"]
)
def test_damaged_metadata_are_refused(text, tmp_path):
    (tmp_path / "run.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=r"`output`.*run\.json"):
        check_same_run(tmp_path, SETTINGS)


def test_a_new_folder_and_one_of_the_same_settings_are_accepted(tmp_path):
    check_same_run(tmp_path / "absent", SETTINGS)
    check_same_run(tmp_path, SETTINGS)
    (tmp_path / "run.json.77.partial").write_text("of a killed run")
    check_same_run(tmp_path, SETTINGS)
    write_run_json(tmp_path, {"settings": SETTINGS, "nfe": 8})
    for settings in (SETTINGS, json.loads(json.dumps(SETTINGS))):
        check_same_run(tmp_path, settings)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "seed 3, got 4"),
        ({"respacing": "50", "seed": 4}, "seed 3, got 4"),
        ({"sag": {**SETTINGS["sag"], "interval": (0.0, 0.5)}}, "sag.interval [0.0, 1.0], got [0.0, 0.5]"),
        ({"sag": {"scale": 0.5, "interval": (0.0, 1.0), "kernel_size": 5}}, "sag.kernel_size None, got 5"),
        ({"sag": {}}, "sag.scale 0.5, got None"),
        ({"eta": 0.0}, "eta None, got 0.0"),
    ],
)
def test_a_run_of_other_settings_is_refused_with_the_first_difference(changes, named, tmp_path):
    write_run_json(tmp_path, {"settings": SETTINGS})
    with refused("`output`", named):
        check_same_run(tmp_path, {**SETTINGS, **changes})


def test_settings_of_a_guidance_that_is_off_may_differ_or_be_missing(tmp_path):
    write_run_json(tmp_path, {"settings": SETTINGS | {"cfg": {"scale": 0.0}}})
    check_same_run(tmp_path, SETTINGS | {"pag": {"scale": 0.0, "site": "middle"}})
    with refused("`output`", "pag.scale None, got 2.0"):
        check_same_run(tmp_path, SETTINGS | {"pag": {"scale": 2.0, "site": "middle"}})


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("other")
    with pytest.raises(UserError, match=r"`output`.*thesis\.tex"):
        check_same_run(tmp_path, SETTINGS)


def test_shared_ids_are_the_first_that_all_runs_contain(tmp_path):
    for name, spans in {"a": [(0, 3), (4, 7), (12, 15)], "b": [(2, 5), (6, 13)], "c": [(0, 2), (5, 20)]}.items():
        for first, last in spans:
            write_shard(tmp_path / name, samples(first, last))
    folders = [tmp_path / name for name in "abc"]
    assert shared_ids(folders, 100) == [2, 5, 6, 7, 12, 13]
    assert shared_ids(folders, 3) == [2, 5, 6]
    assert shared_ids(folders[:1], 6) == [0, 1, 2, 3, 4, 5]
    assert shared_ids([*folders, tmp_path / "empty"], 3) == []


def test_samples_by_id_are_in_the_requested_order_and_read_no_other_shard(tmp_path):
    for first in (0, 4, 8):
        write_shard(tmp_path, samples(first, first + 3))
    (tmp_path / "shards" / "000004-000007.tar").write_bytes(b"damaged")
    assert get_samples(tmp_path, [9, 2, 0]) == [samples(i, i)[0] for i in (9, 2, 0)]
    with pytest.raises(UserError, match=r"000004-000007\.tar"):
        get_samples(tmp_path, [5])


def test_an_id_that_a_run_lacks_is_named(tmp_path):
    write_shard(tmp_path, samples(0, 3))
    with pytest.raises(UserError, match=r"`run`.*4"):
        get_samples(tmp_path, [3, 4])


def test_listed_shards_are_those_that_no_other_contains(tmp_path):
    (tmp_path / "shards").mkdir()
    rng = random.Random(0)
    spans = {(first, first + rng.randrange(12)) for first in rng.choices(range(200), k=120)}
    for first, last in spans:
        (tmp_path / "shards" / f"{first:06d}-{last:06d}.tar").touch()
    covered = {s for s in spans for o in spans if o != s and o[0] <= s[0] and s[1] <= o[1]}
    assert 0 < len(covered) < len(spans)
    assert list(list_shards(tmp_path)) == sorted(spans - covered)
