import numpy as np
import pytest

from sagl.data.npz import NpzImageSource
from sagl.data.webdataset_writer import plan_shards, write_shards
from sagl.errors import UserError
from sagl.utils.files import sha256
from tests.helpers.files import NPZ_IMAGES, NPZ_LABELS, contents, write_npz


def write(folder, images=NPZ_IMAGES, labels=NPZ_LABELS):
    source = NpzImageSource(write_npz(folder / "a.npz", images, labels))
    return write_shards(source, plan_shards(folder / "out", "a", len(source), 4), lambda count: None)


def test_complete_shards_are_kept_and_missing_ones_are_written_again(tmp_path):
    assert write(tmp_path) == 0
    digests = {path.name: sha256(path) for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "a-000001.tar").unlink()
    assert write(tmp_path) == 2
    assert {path.name: sha256(path) for path in (tmp_path / "out").iterdir()} == digests


@pytest.mark.parametrize("position", [600, 4096, -1])
def test_a_damaged_shard_is_refused_and_the_manifest_keeps_its_digest(position, tmp_path):
    write(tmp_path)
    shard = tmp_path / "out" / "a-000001.tar"
    data = bytearray(shard.read_bytes())
    data[position] ^= 1
    shard.write_bytes(data)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"`output` .*a-000001\.tar"):
        write(tmp_path)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("changed", ["image", "label"])
def test_a_shard_of_another_image_or_label_in_its_middle_is_refused(changed, tmp_path):
    write(tmp_path)
    images, labels = np.array(NPZ_IMAGES), np.array(NPZ_LABELS)
    (images if changed == "image" else labels)[5] ^= 1
    with pytest.raises(UserError, match=r"`output` .*a-000001\.tar"):
        write(tmp_path, images, labels)
