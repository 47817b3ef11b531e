import io
import json
import os
import pickle
import tarfile

import pytest
from webdataset import WebDataset

from sagl.data.webdataset import ShardData, ShardImageSource
from sagl.errors import UserError
from sagl.utils.files import sha256
from tests.data.test_image_data import FakeTrainer
from tests.helpers.files import contents, grey, read_all, write_members, write_shard, write_shards
from tests.helpers.networks import COLOUR


def data_module(folder, trainer=None, **options):
    settings = {"batch_size": 2, "num_validation": 4, "image_size": 8, "num_workers": 0, **options}
    module = ShardData(shards=str(folder), **settings)
    module.trainer = trainer
    module.prepare_data()
    module.setup("fit")
    return module


def values(batches):
    """Return the grey values of each batch."""
    return [[int(image.float().mean()) for image in images] for images, _ in batches]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_images_and_labels_are_those_that_webdataset_reads_in_the_same_order(tmp_path):
    shards = write_shards(tmp_path)
    source = ShardImageSource(shards)
    expected = [sample for shard in shards for sample in WebDataset(str(shard), shardshuffle=False)]
    assert read_all(source) == [(sample["png"], int(sample["cls"])) for sample in expected]
    assert (len(source), source.num_classes) == (22, 10)
    assert source.name(7) == f"000007.png in {shards[1]}"


def test_members_are_grouped_by_the_part_before_the_first_dot(tmp_path):
    long = "long/" + 30 * "name" + "/"
    shard = write_members(
        tmp_path / "a.tar",
        [
            ("v1.0/a.jpg", grey(1, "JPEG")),
            ("v1.0/b.cls", b"3\n"),
            ("v1.0/a.cls", b" 2 "),
            ("v1.0/b.seg.png", grey(9)),
            ("v1.0/b.JSON", b"{}"),
            ("v1.0/b.WebP", grey(2, "WEBP")),
            ("no_suffix", b"?"),
            ("c.txt", b"a key without an image"),
            (f"{long}d.bmp", grey(4, "BMP")),
            (f"{long}d.pyd", b"never unpickled"),
            (f"{long}d.cls", b"0"),
        ],
    )
    expected = [(grey(1, "JPEG"), 2), (grey(2, "WEBP"), 3), (grey(4, "BMP"), 0)]
    assert read_all(ShardImageSource([shard])) == expected


def test_members_of_every_form_are_read_once_or_counted(tmp_path, capsys):
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w", format=tarfile.PAX_FORMAT) as tar:

        def add(name, data=b"", **fields):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            for field, value in fields.items():
                setattr(header, field, value)
            tar.addfile(header, io.BytesIO(data))

        add("./", type=tarfile.DIRTYPE)
        add("x.png/", type=tarfile.DIRTYPE)
        add("./a.PNG", b"a", pax_headers={"comment": "…"})
        add("a.cls", b"4")
        add("/root/b c[1]*.jpg", b"b")
        add("/root/b c[1]*.cls", b"5")
        add(300 * "n" + "é.jpg", b"n")
        add(300 * "n" + "é.cls", b"6")
        add("hard.jpg", type=tarfile.LNKTYPE, linkname="./a.PNG")
        add("hard.cls", b"7")
        add("d/soft.jpg", type=tarfile.SYMTYPE, linkname="../a.PNG")
        add("d/soft.cls", b"8")
        complete = [(b"a", 4), (b"b", 5), (b"n", 6), (b"a", 7), (b"a", 8)]
        for name in ("a.seg.png", "._a.jpg", "__MACOSX/a.jpg", "d/.ipynb_checkpoints/a.jpg", "a.jpg", "./a.PNG"):
            add(name, b"a")
        add("broken.jpg", type=tarfile.SYMTYPE, linkname="nowhere")
    assert read_all(ShardImageSource([shard])) == complete
    message = capsys.readouterr().err
    for part in ("left out 7 of 12", "a.seg.png", str(shard)):
        assert part in message
    assert message.count("\n") == 1


def test_headers_are_read_once_and_nothing_is_written_beside_the_shards(tmp_path, cache):
    shards = write_shards(tmp_path / "shards")
    before = contents(tmp_path / "shards")
    ShardImageSource(shards)
    assert contents(tmp_path / "shards") == before
    indices = contents(cache)
    assert len(indices) == len(shards)
    assert len(ShardImageSource(shards)) == 22
    assert contents(cache) == indices
    write_shard(shards[0], [7])
    os.utime(shards[0], ns=(1, 1))
    assert len(ShardImageSource(shards)) == 18  # the first shard has changed


def test_a_shard_may_be_empty(tmp_path):
    assert len(ShardImageSource([write_shard(tmp_path / "a.tar", []), write_shard(tmp_path / "b.tar", [3, 4])])) == 2


@pytest.mark.parametrize("suffix", ["png", "bmp"])  # the label comes after or before the image
def test_the_complete_images_of_a_truncated_shard_are_used_with_one_warning(suffix, tmp_path, capsys):
    data = write_shard(tmp_path / "complete.tar", range(4), suffix=suffix).read_bytes()
    expected = read_all(ShardImageSource([tmp_path / "complete.tar"]))
    assert capsys.readouterr().err == ""
    counts = set()
    for length in range(4100, 4 * 4096, 512 - 7):
        shard = tmp_path / f"{length}.tar"
        shard.write_bytes(data[:length])
        images = read_all(ShardImageSource([shard]))
        assert images == expected[: len(images)]
        counts.add(len(images))
        warning = capsys.readouterr().err
        assert str(shard) in warning
        assert f" {len(images)} " in warning
        ShardImageSource([shard])
        assert capsys.readouterr().err == ""
    assert {1, 2, 3} <= counts


def test_members_after_a_corrupt_header_are_left_out(tmp_path, capsys):
    shard = write_shard(tmp_path / "a.tar", range(4), labels=False)
    data = bytearray(shard.read_bytes())
    data[4096:4608] = b"x" * 512
    shard.write_bytes(data)
    assert len(ShardImageSource([shard])) == 2
    assert str(shard) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.txt", b"?")], r"\.bmp, .jpeg, .jpg, .png, .webp"),
        ([("a.png", b"?"), ("a.cls", b"cat")], "a.cls.*a.tar.*'cat'"),
        ([("a.png", b"?"), ("a.cls", b"-1")], "'-1'"),
        ([("a.png", b"?"), ("a.cls", b"9" * 30)], "'9999"),
        ([("a.png", b"?"), ("a.cls", b"1"), ("b.png", b"?")], r" 1 of 2.* b.png in .*a.tar"),
    ],
)
def test_shards_without_images_or_with_invalid_labels_are_refused(members, message, tmp_path):
    with pytest.raises(UserError, match=f"`data.shards`.*{message}"):
        ShardImageSource([write_members(tmp_path / "a.tar", members)])


def test_a_source_can_be_pickled_while_it_is_in_use(tmp_path):
    source = ShardImageSource(write_shards(tmp_path))
    source.read_bytes(0)
    assert read_all(pickle.loads(pickle.dumps(source))) == read_all(source)


def test_an_image_of_a_shard_that_has_disappeared_has_a_name(tmp_path):
    shards = write_shards(tmp_path)
    source = ShardImageSource(shards)
    shards[1].unlink()
    assert source.name(7) == f"image 7 in {shards[1]}"


def test_two_ranks_share_the_images_of_an_odd_number_of_shards(tmp_path):
    write_shards(tmp_path / "shards")
    trainers = [FakeTrainer({**COLOUR, "num_classes": 10}, rank, world_size=2) for rank in range(2)]
    modules = [data_module(tmp_path / "shards", trainer, batch_size=1, image_size=None) for trainer in trainers]
    trained = [values(module.train_dataloader()) for module in modules]
    validated = [values(module.val_dataloader()) for module in modules]
    assert [len(rank) for rank in trained] == [9, 9]
    assert sorted(value for rank in (*trained, *validated) for (value,) in rank) == list(range(22))


def test_labels_stay_with_their_images(tmp_path):
    write_shards(tmp_path / "shards")
    for images, labels in data_module(tmp_path / "shards").train_dataloader():
        assert [int(image.float().mean()) % 10 for image in images] == labels.tolist()


def test_a_shard_that_differs_from_its_sha256_in_shards_json_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))
    (shard,) = write_shards(tmp_path, count=4)
    (tmp_path / "shards.json").write_text(json.dumps({shard.name: {"images": 4, "sha256": sha256(shard)}}))
    assert len(ShardImageSource([shard])) == 4
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"`data\.shards` .*{shard.name}"):
        ShardImageSource([shard])
    (tmp_path / "shards.json").write_text('["of another program"]')
    assert len(ShardImageSource([shard])) == 4
