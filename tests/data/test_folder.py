import os
import pickle
import pickletools
import re

import pytest
import torch

from sagl.data.folder import FolderData, FolderImageSource, number_classes
from sagl.errors import UserError
from tests.helpers.files import FOLDER_FILES, write_csv, write_folder
from tests.helpers.training import IGNORED_WARNINGS

pytestmark = IGNORED_WARNINGS


def test_images_are_found_at_any_depth_and_sorted_by_path(tmp_path):
    root = write_folder(tmp_path / "images")
    (root / "notes.txt").write_text("not an image")
    source = FolderImageSource(root)
    assert list(source.files) == sorted(FOLDER_FILES)
    assert (len(source), source.num_classes, source.label(0)) == (5, None, -1)
    assert source.read_bytes(1) == (root / "cats" / "1.JPG").read_bytes()
    assert source.name(1) == str(root / "cats" / "1.JPG")


def test_more_images_are_no_more_python_objects(tmp_path):
    """The reference counts of objects would copy the memory of the listing into every worker process."""

    def num_objects(count):
        root = write_folder(tmp_path / str(count), [f"{name}/{i}.png" for name in "ab" for i in range(count)])
        return len(list(pickletools.genops(pickle.dumps(FolderImageSource(root, "folders")))))

    assert num_objects(20) == num_objects(2)


def test_sub_folders_are_classes_numbered_by_their_names(tmp_path):
    source = FolderImageSource(write_folder(tmp_path / "images"), "folders")
    assert source.classes == ["birds", "cats", "dogs"]
    assert [source.label(i) for i in range(5)] == [0, 1, 1, 2, 2]


def test_linked_folders_are_classes_and_hidden_ones_are_not(tmp_path, capsys):
    root = write_folder(tmp_path / "images", ("dogs/a.png", "dogs/._a.png", ".ipynb_checkpoints/b.png", "birds/c.png"))
    write_folder(root, ("__MACOSX/dogs/a.png", "@eaDir/a.png"))
    (root / "cats").symlink_to(write_folder(tmp_path / "store", ("x.png", "y.png")))
    (root / "dogs" / "notes.txt").touch()
    source = FolderImageSource(root, "folders")
    assert source.classes == ["birds", "cats", "dogs"]
    assert list(source.files) == ["birds/c.png", "cats/x.png", "cats/y.png", "dogs/a.png"]
    (note,) = source.notes
    for part in ("1 files (1 .txt)", "4 hidden", ".ipynb_checkpoints"):
        assert part in note


@pytest.mark.parametrize(
    ("folders", "labels"),
    [
        (("0", "1", "10", "2"), [0, 1, 10, 2]),
        (("007", "008"), [7, 8]),
        (("1.0", "3.0"), [1, 3]),
        (("10", "9", "A"), [0, 1, 2]),
        (("3e8", "v1.5"), [0, 1]),
    ],
)
def test_folders_that_are_all_whole_numbers_are_used_as_labels(folders, labels, tmp_path):
    source = FolderImageSource(write_folder(tmp_path / "images", [f"{name}/a.png" for name in folders]), "folders")
    assert source.labels.tolist() == labels
    is_mixed = "A" in folders
    assert source.notes == (("Classes are numbered in the order of their names: 0 = 10, 1 = 9, 2 = A.",) * is_mixed)


@pytest.mark.parametrize("label", ["-1", "1.5", "nan", "NaN", "+2", "10000000000", "1 and 01"])
def test_labels_that_are_other_numbers_are_refused(label):
    names = [*label.split(" and "), "0", "cat" if "and" not in label else "7"]
    with pytest.raises(UserError, match=rf"`data.labels`.*{re.escape(label.split(' and ')[-1])}"):
        number_classes(names, "data.labels")


def test_a_class_folder_without_images_is_refused(tmp_path):
    root = write_folder(tmp_path / "images", ("cats/a.png", "dogs/b.png"))
    (root / "birds" / "deep").mkdir(parents=True)
    (root / "birds" / "deep" / "a.tif").touch()
    with pytest.raises(UserError, match=r"`data.root`.* birds"):
        FolderImageSource(root, "folders")
    assert FolderImageSource(root).notes == (f"{root}: left out 1 files (1 .tif).",)


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


def test_a_csv_may_have_any_order_of_columns_any_form_of_paths_and_bytes_of_any_encoding(tmp_path):
    name = os.fsdecode(b"caf\xe9 [1]*.png")
    root = write_folder(tmp_path / "images", ("a.png", "b/c.png", name))
    table = tmp_path / "labels.CSV"
    rows = ["label, extra, file", "3.0, x, ./b//c.png", f'"12",,{root}/a.png', f"0,,{name}", ""]
    table.write_bytes(os.fsencode("\r\n".join(rows)))
    source = FolderImageSource(root, str(table))
    assert dict(zip(source.files, source.labels, strict=True)) == {"a.png": 12, "b/c.png": 3, name: 0}


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
