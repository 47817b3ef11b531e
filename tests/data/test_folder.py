import pytest
import torch
from PIL import Image

from sagl.data.folder import FolderData, FolderPictures
from sagl.settings.errors import UserError
from tests.tiny import QUIET

pytestmark = QUIET

FILES = ("dogs/b.png", "cats/1.JPG", "cats/deep/2.webp", "dogs/a.bmp", "birds/x.jpeg")


def write_pictures(root, files=FILES):
    for value, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (40 * value,) * 3).save(root / name)
    return root


def test_pictures_are_found_at_any_depth_in_the_order_of_their_names(tmp_path):
    root = write_pictures(tmp_path / "mine")
    (root / "notes.txt").write_text("no picture")
    pictures = FolderPictures(root)
    assert pictures.files == sorted(FILES)
    assert (len(pictures), pictures.num_classes, pictures.label(0)) == (5, None, -1)
    assert pictures.encoded(1) == (root / "cats" / "1.JPG").read_bytes()
    assert pictures.name(1) == str(root / "cats" / "1.JPG")


def test_sub_folders_are_classes_numbered_by_their_names(tmp_path):
    pictures = FolderPictures(write_pictures(tmp_path / "mine"), "folders")
    assert pictures.classes == ["birds", "cats", "dogs"]
    assert [pictures.label(i) for i in range(5)] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("files", "labels", "said"),
    [
        (("a.txt",), "none", "must hold pictures"),
        (("dogs/a.png", "loose.png"), "folders", "itself holds loose.png"),
        (None, "none", "there is none at"),
    ],
)
def test_a_folder_that_cannot_be_meant_is_refused_in_one_line(files, labels, said, tmp_path):
    root = tmp_path / "mine"
    for name in files or ():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    with pytest.raises(UserError, match=said) as error:
        FolderPictures(root, labels)
    assert "\n" not in str(error.value)


def test_the_module_gives_labelled_batches(tmp_path):
    root = write_pictures(tmp_path / "mine")
    module = FolderData(root=str(root), labels="folders", batch_size=2, num_workers=0, num_validation=1, image_size=8)
    module.setup("fit")
    seen = list(module.train_dataloader()) + list(module.val_dataloader())
    assert [tuple(images.shape) for images, _ in seen] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    assert sorted(torch.cat([labels for _, labels in seen]).tolist()) == [0, 1, 1, 2, 2]
