import pytest
import torch
from PIL import Image

from sagl.data.folder import FolderData, FolderImageSource
from sagl.errors import UserError
from tests.helpers.tiny import QUIET

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
    pictures = FolderImageSource(root)
    assert pictures.files == sorted(FILES)
    assert (len(pictures), pictures.num_classes, pictures.label(0)) == (5, None, -1)
    assert pictures.encoded(1) == (root / "cats" / "1.JPG").read_bytes()
    assert pictures.name(1) == str(root / "cats" / "1.JPG")


def test_sub_folders_are_classes_numbered_by_their_names(tmp_path):
    pictures = FolderImageSource(write_pictures(tmp_path / "mine"), "folders")
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
        FolderImageSource(root, labels)
    assert "\n" not in str(error.value)


def write_csv(path, labels, head="file,label"):
    path.write_text("\n".join([head, *(f"{file},{label}" for file, label in labels.items())]) + "\n")
    return str(path)


def test_labels_of_a_csv_are_classes_in_the_order_of_their_names(tmp_path):
    root = write_pictures(tmp_path / "mine")
    said = dict(zip(FILES, ["wolf", "10", "tom cat", "wolf", '"owl, white"'], strict=True))
    pictures = FolderImageSource(root, write_csv(tmp_path / "labels.csv", said, "\ufefffile,label"))
    assert pictures.classes == ["10", "owl, white", "tom cat", "wolf"]
    assert [pictures.label(i) for i in range(5)] == [1, 0, 2, 3, 3]


def test_numbers_of_a_csv_are_the_labels_themselves(tmp_path):
    root = write_pictures(tmp_path / "mine")
    pictures = FolderImageSource(
        root, write_csv(tmp_path / "labels.csv", dict(zip(FILES, (0, 7, 2, 2, 5), strict=True)))
    )
    assert [pictures.label(i) for i in range(5)] == [5, 7, 2, 2, 0]
    assert pictures.num_classes == 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"dogs/b.png": None, "dogs/a.bmp": None},
            r"2 of .*mine are not in .*labels.csv, the first of them dogs/a.bmp",
        ),
        ({"z.png": 1, "new/y.png": 1}, r"2 of .*labels.csv are not in .*mine, the first of them new/y.png"),
        ({"dogs/b.png": ""}, "1 of 5 lines"),
    ],
)
def test_a_csv_of_other_pictures_is_refused_with_the_first_and_the_count(changes, said, tmp_path):
    labels = {name: label for name, label in (dict.fromkeys(FILES, 0) | changes).items() if label is not None}
    root = write_pictures(tmp_path / "mine")
    with pytest.raises(UserError, match=said) as error:
        FolderImageSource(root, write_csv(tmp_path / "labels.csv", labels))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "can be read"),
        (b"", "header file,label"),
        (b"name,class\na.png,1\n", "header file,label"),
        (b"\xff\xfe\x00", "can be read"),
        (b"file,label\ndogs/b.png,1\ndogs/b.png,2\n", "1 of 2 lines"),
    ],
)
def test_a_csv_that_is_none_is_refused(content, said, tmp_path):
    if content is not None:
        (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(UserError, match=said):
        FolderImageSource(write_pictures(tmp_path / "mine"), str(tmp_path / "labels.csv"))


def test_another_kind_of_labels_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"must be folders, none or the name of a .csv file, got 'folder'"):
        FolderImageSource(write_pictures(tmp_path / "mine"), "folder")


def test_the_module_gives_labelled_batches(tmp_path):
    root = write_pictures(tmp_path / "mine")
    module = FolderData(root=str(root), labels="folders", batch_size=2, num_workers=0, num_validation=1, image_size=8)
    module.setup("fit")
    seen = list(module.train_dataloader()) + list(module.val_dataloader())
    assert [tuple(images.shape) for images, _ in seen] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    assert sorted(torch.cat([labels for _, labels in seen]).tolist()) == [0, 1, 1, 2, 2]
