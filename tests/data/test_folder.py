import pytest
import torch

from sagl.data.folder import FolderData, FolderImageSource
from sagl.errors import UserError
from tests.helpers.files import FOLDER_FILES, write_csv, write_folder
from tests.helpers.training import IGNORED_WARNINGS

pytestmark = IGNORED_WARNINGS


def test_images_are_found_at_any_depth_and_sorted_by_path(tmp_path):
    root = write_folder(tmp_path / "images")
    (root / "notes.txt").write_text("not an image")
    source = FolderImageSource(root)
    assert source.files == sorted(FOLDER_FILES)
    assert (len(source), source.num_classes, source.label(0)) == (5, None, -1)
    assert source.read_bytes(1) == (root / "cats" / "1.JPG").read_bytes()
    assert source.name(1) == str(root / "cats" / "1.JPG")


def test_sub_folders_are_classes_numbered_by_their_names(tmp_path):
    source = FolderImageSource(write_folder(tmp_path / "images"), "folders")
    assert source.classes == ["birds", "cats", "dogs"]
    assert [source.label(i) for i in range(5)] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("files", "labels", "value"),
    [(("a.txt",), "none", "images"), (("dogs/a.png", "loose.png"), "folders", "loose.png"), ((), "none", "images")],
)
def test_a_folder_without_images_or_classes_is_refused(files, labels, value, tmp_path):
    for name in files:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    with pytest.raises(UserError, match=f"`data.root`.*{value}"):
        FolderImageSource(tmp_path / "images", labels)


def test_names_in_a_csv_are_classes_in_their_order(tmp_path):
    labels = dict(zip(FOLDER_FILES, ["wolf", "10", "tom cat", "wolf", '"owl, white"'], strict=True))
    table = write_csv(tmp_path / "labels.csv", labels, "\ufefffile,label")
    source = FolderImageSource(write_folder(tmp_path / "images"), table)
    assert source.classes == ["10", "owl, white", "tom cat", "wolf"]
    assert [source.label(i) for i in range(5)] == [1, 0, 2, 3, 3]


def test_numbers_in_a_csv_are_used_as_labels(tmp_path):
    table = write_csv(tmp_path / "labels.csv", dict(zip(FOLDER_FILES, (0, 7, 2, 2, 5), strict=True)))
    source = FolderImageSource(write_folder(tmp_path / "images"), table)
    assert [source.label(i) for i in range(5)] == [5, 7, 2, 2, 0]
    assert source.num_classes == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dogs/b.png": None, "dogs/a.bmp": None}, r"2 of .*images .*labels.csv.* dogs/a.bmp"),
        ({"z.png": 1, "new/y.png": 1}, r"2 of .*labels.csv .*images.* new/y.png"),
        ({"dogs/b.png": ""}, "1 of 5 lines"),
    ],
)
def test_a_csv_of_other_images_is_refused_with_their_number_and_the_first(changes, message, tmp_path):
    labels = {name: label for name, label in (dict.fromkeys(FOLDER_FILES, 0) | changes).items() if label is not None}
    root = write_folder(tmp_path / "images")
    with pytest.raises(UserError, match=f"`data.labels`.*{message}"):
        FolderImageSource(root, write_csv(tmp_path / "labels.csv", labels))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "labels.csv"),
        (b"", "file,label"),
        (b"name,class\na.png,1\n", "file,label"),
        (b"\xff\xfe\x00", "labels.csv"),
        (b"file,label\ndogs/b.png,1\ndogs/b.png,2\n", "1 of 2 lines"),
    ],
)
def test_a_file_that_is_not_a_table_of_labels_is_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(UserError, match=f"`data.labels`.*{message}"):
        FolderImageSource(write_folder(tmp_path / "images"), str(tmp_path / "labels.csv"))


def test_other_values_of_labels_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"`data.labels`.*folders, none .*csv.*'folder'"):
        FolderImageSource(write_folder(tmp_path / "images"), "folder")


def test_the_data_module_gives_labelled_batches(tmp_path):
    root = write_folder(tmp_path / "images")
    module = FolderData(root=str(root), labels="folders", batch_size=2, num_workers=0, num_validation=1, image_size=8)
    module.setup("fit")
    batches = list(module.train_dataloader()) + list(module.val_dataloader())
    assert [tuple(images.shape) for images, _ in batches] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == [0, 1, 1, 2, 2]
