import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from webdataset import TarWriter, WebDataset

from sagl.data.image_data import Cut, Pictures
from sagl.data.webdataset import ShardData, ShardImageSource
from sagl.errors import UserError
from sagl.settings.network import UNetSettings
from tests.data.test_image_data import OfNetwork
from tests.helpers.tiny import COLOUR, QUIET, contents

pytestmark = QUIET

MODULE = {"batch_size": 2, "num_validation": 4, "image_size": 8, "num_workers": 0}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SAGL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def encoded(value, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (9, 8), (value, value, value)).save(file, kind)
    return file.getvalue()


def write_shard(path, values, labels=True, ending="png"):
    """Pictures of one grey value each, as WebDataset writes them; the label is the last digit of the value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, TarWriter(file, encoder=False) as tar:
        for value in values:
            label = {"cls": str(value % 10).encode()} if labels else {}
            tar.write({"__key__": f"{value:06d}", ending: encoded(value), **label})
    return path


def write_shards(folder, count=22, size=5, **options):
    """A few shards of `size` pictures, the last one shorter."""
    starts = range(0, count, size)
    return [
        write_shard(folder / f"cat-{n:06d}.tar", range(first, min(count, first + size)), **options)
        for n, first in enumerate(starts)
    ]


def write_members(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            head = tarfile.TarInfo(name)
            head.size = len(data)
            tar.addfile(head, io.BytesIO(data))
    return path


def module(folder, trainer=None, **options):
    data = ShardData(shards=str(folder), **{**MODULE, **options})
    data.trainer = trainer
    data.prepare_data()
    data.setup("fit")
    return data


def seen(batches):
    """Grey values of each batch."""
    return [[int(image.float().mean()) for image in images] for images, _ in batches]


# ------------------------------------------------------------------------------------------------------ reading


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_pictures_and_labels_are_those_that_webdataset_reads_in_the_same_order(tmp_path):
    shards = write_shards(tmp_path)
    pictures = ShardImageSource(shards)
    theirs = [sample for shard in shards for sample in WebDataset(str(shard), shardshuffle=False)]
    assert [pictures.encoded(i) for i in range(22)] == [sample["png"] for sample in theirs]
    assert [pictures.label(i) for i in range(22)] == [int(sample["cls"]) for sample in theirs]
    assert (len(pictures), pictures.num_classes) == (22, 10)
    assert pictures.name(7) == f"000007.png in {shards[1]}"


def test_members_are_grouped_by_what_comes_before_the_first_dot(tmp_path):
    long = "long/" + 30 * "name" + "/"
    shard = write_members(
        tmp_path / "a.tar",
        [
            ("v1.0/a.jpg", encoded(1, "JPEG")),
            ("v1.0/b.cls", b"3\n"),
            ("v1.0/a.cls", b" 2 "),
            ("v1.0/b.seg.png", encoded(9)),
            ("v1.0/b.JSON", b"{}"),
            ("v1.0/b.WebP", encoded(2, "WEBP")),
            ("no_ending", b"?"),
            ("c.txt", b"a key without a picture"),
            (f"{long}d.bmp", encoded(4, "BMP")),
            (f"{long}d.pyd", b"never unpickled"),
            (f"{long}d.cls", b"0"),
        ],
    )
    pictures = ShardImageSource([shard])
    assert [pictures.encoded(i) for i in range(3)] == [encoded(1, "JPEG"), encoded(2, "WEBP"), encoded(4, "BMP")]
    assert [pictures.label(i) for i in range(3)] == [2, 3, 0]


def test_headers_are_read_once_and_nothing_is_written_beside_the_shards(tmp_path, cache):
    shards = write_shards(tmp_path / "shards")
    before = contents(tmp_path / "shards")
    ShardImageSource(shards)
    assert contents(tmp_path / "shards") == before
    kept = contents(cache)
    assert len(kept) == len(shards)
    assert len(ShardImageSource(shards)) == 22
    assert contents(cache) == kept
    write_shard(shards[0], [7])
    os.utime(shards[0], ns=(1, 1))
    assert len(ShardImageSource(shards)) == 18  # another file of the same name


def test_an_empty_shard_does_no_harm(tmp_path):
    assert len(ShardImageSource([write_shard(tmp_path / "a.tar", []), write_shard(tmp_path / "b.tar", [3, 4])])) == 2


# --------------------------------------------------------------------------------------------------- damaged ones


@pytest.mark.parametrize("ending", ["png", "bmp"])  # the label comes behind, or before
def test_of_a_shard_that_is_cut_anywhere_the_whole_pictures_are_used_and_it_is_said_once(ending, tmp_path, capsys):
    whole = write_shard(tmp_path / "whole.tar", range(4), ending=ending).read_bytes()
    reference = ShardImageSource([tmp_path / "whole.tar"])
    assert capsys.readouterr().err == ""
    counts = set()
    for cut in range(4100, 4 * 4096, 512 - 7):
        shard = tmp_path / f"{cut}.tar"
        shard.write_bytes(whole[:cut])
        pictures = ShardImageSource([shard])
        assert [pictures.encoded(i) for i in range(len(pictures))] == [
            reference.encoded(i) for i in range(len(pictures))
        ]
        assert [pictures.label(i) for i in range(len(pictures))] == list(range(len(pictures)))
        counts.add(len(pictures))
        said = capsys.readouterr().err
        assert f"{shard} is damaged: it ends too soon. Its {len(pictures)} whole pictures are used." in said
        ShardImageSource([shard])
        assert capsys.readouterr().err == ""
    assert {1, 2, 3} <= counts


def test_what_follows_a_header_that_is_none_is_left_out(tmp_path, capsys):
    shard = write_shard(tmp_path / "a.tar", range(4), labels=False)
    whole = bytearray(shard.read_bytes())
    whole[4096:4608] = b"x" * 512
    shard.write_bytes(whole)
    assert len(ShardImageSource([shard])) == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.txt", b"?")], r"must hold pictures \(.bmp, .jpeg, .jpg, .png, .webp\)"),
        ([("a.png", b"?"), ("a.cls", b"cat")], "a.cls in .*a.tar holds 'cat'"),
        ([("a.png", b"?"), ("a.cls", b"-1")], "holds '-1'"),
        ([("a.png", b"?"), ("a.cls", b"9" * 30)], "holds '9999"),
        ([("a.png", b"?"), ("a.cls", b"1"), ("b.png", b"?")], r"1 of 2 have none, the first of them b.png in .*a.tar"),
    ],
)
def test_members_that_cannot_be_meant_are_refused_in_one_line(members, said, tmp_path):
    with pytest.raises(UserError, match=said) as error:
        ShardImageSource([write_members(tmp_path / "a.tar", members)])
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------ training


def test_another_process_gets_no_open_file(tmp_path):
    pictures = ShardImageSource(write_shards(tmp_path))
    pictures.encoded(0)
    assert pickle.loads(pickle.dumps(pictures)).encoded(21) == pictures.encoded(21)


def test_spawned_workers_read_shards(tmp_path):
    images = Pictures(ShardImageSource(write_shards(tmp_path)), np.arange(22), Cut(side=8, channels=3))
    loader = DataLoader(images, 4, num_workers=2, multiprocessing_context="spawn")
    read = torch.cat([batch[0] for batch in loader])
    assert torch.equal(read, torch.stack([images[i][0] for i in range(22)]))


@pytest.mark.parametrize("done", [1, 5, 9, 11])
def test_training_goes_on_in_the_middle_of_an_epoch(done, tmp_path):
    write_shards(tmp_path / "shards")
    alone, first, second = (module(tmp_path / "shards").train_dataloader() for _ in range(3))
    whole = seen(batch for _ in range(2) for batch in alone)
    endless = (batch for _ in range(2) for batch in first)
    assert seen(next(endless) for _ in range(done)) == whole[:done]
    second.load_state_dict(first.state_dict())
    assert seen(batch for _ in range(2) for batch in second)[: len(whole) - done] == whole[done:]


def test_two_ranks_share_every_picture_though_the_shards_are_odd(tmp_path):
    write_shards(tmp_path / "shards")
    ranks = [OfNetwork(UNetSettings(**{**COLOUR, "num_classes": 10})) for _ in range(2)]
    for number, rank in enumerate(ranks):
        rank.global_rank, rank.world_size = number, 2
    modules = [module(tmp_path / "shards", rank, batch_size=1) for rank in ranks]
    trained = [seen(data.train_dataloader()) for data in modules]
    validated = [seen(data.val_dataloader()) for data in modules]
    assert [len(rank) for rank in trained] == [9, 9]
    assert sorted(value for rank in (*trained, *validated) for (value,) in rank) == list(range(22))


def test_the_label_goes_with_the_picture(tmp_path):
    write_shards(tmp_path / "shards")
    for images, labels in module(tmp_path / "shards").train_dataloader():
        assert [int(image.float().mean()) % 10 for image in images] == labels.tolist()
