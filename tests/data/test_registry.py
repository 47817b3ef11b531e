import numpy as np
import pytest

from sagl.data.folder import FolderImageSource
from sagl.data.lsun import LSUNImageSource
from sagl.data.npz import NpzImageSource
from sagl.data.registry import open_image_source
from sagl.data.webdataset import ShardImageSource
from sagl.errors import UserError
from tests.helpers.files import write_folder, write_lsun, write_npz, write_shard, write_shards


def test_a_path_determines_the_kind_of_source(tmp_path):
    write_shards(tmp_path / "shards [1]")
    (tmp_path / "shards [1]" / "._cat-000000.tar").write_bytes(b"of macOS")
    paths = {
        write_folder(tmp_path / "images"): FolderImageSource,
        write_lsun(tmp_path / "cat"): LSUNImageSource,
        write_npz(tmp_path / "a.npz").rename(tmp_path / "A.NPZ"): NpzImageSource,
        tmp_path / "shards [1]": ShardImageSource,
        write_shard(tmp_path / "B.TAR", [1]): ShardImageSource,
    }
    assert [type(open_image_source(str(path))) for path in paths] == list(paths.values())


@pytest.mark.parametrize("beside", ["class/a.png", "a.jpg"])
def test_a_folder_of_both_shards_and_images_is_refused(beside, tmp_path):
    write_folder(tmp_path, (beside,))
    write_shard(tmp_path / "old.tar", [1])
    with pytest.raises(UserError, match=f"`source`.*old.tar.* {beside.split('/')[0]}"):
        open_image_source(str(tmp_path))
    assert len(open_image_source(f"{tmp_path}/*.tar")) == 1


@pytest.mark.parametrize("name", ["ref.pkl", "a.NPY", "images.zip", "a.tar.gz", "a.parquet"])
def test_files_of_other_formats_are_refused_with_the_way_out(name, tmp_path):
    np.zeros(4096, np.uint8).tofile(tmp_path / name)
    with pytest.raises(UserError, match=f"`reference`.*{name}") as error:
        open_image_source(str(tmp_path / name), argument="reference")
    assert "uncompressed tar" not in str(error.value)
