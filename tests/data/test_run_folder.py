import json

import numpy as np
import pytest
import torch

from sagl.data import run_folder
from sagl.data.run_folder import is_complete, read_record, read_samples, write_run
from sagl.settings.errors import UserError
from tests.tiny import contents, read_png

SETTINGS = {"seed": 3, "respacing": "25", "sag": {"scale": 0.5, "interval": (0.0, 1.0), "kernel_size": None}}
IMAGES = torch.randint(0, 256, (3, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def written(folder, images=IMAGES, labels=(4, -1, 0)):
    return write_run(folder, images, list(labels), {"settings": SETTINGS, "nfe": 8})


def test_a_run_comes_back_as_it_was_written(tmp_path):
    npz = written(tmp_path / "deep" / "run")
    assert npz == tmp_path / "deep" / "run" / "samples_3x4x6x3.npz"
    with np.load(npz) as arrays:
        assert set(arrays) == {"arr_0", "arr_1"}
        assert arrays["arr_0"].dtype == np.uint8
        assert (arrays["arr_0"] == IMAGES.permute(0, 2, 3, 1).numpy()).all()
        assert arrays["arr_1"].dtype == np.int64
        assert arrays["arr_1"].tolist() == [4, -1, 0]
    assert torch.equal(read_samples(tmp_path / "deep" / "run"), IMAGES)
    assert torch.equal(read_samples(npz), IMAGES)
    assert read_record(tmp_path / "deep" / "run")["nfe"] == 8


def test_every_image_is_a_png_by_its_number(tmp_path):
    written(tmp_path)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [f"{i:06d}.png" for i in range(3)]
    for i in range(3):
        assert (read_png(tmp_path / "images" / f"{i:06d}.png") == IMAGES[i].permute(1, 2, 0).numpy()).all()


def test_grey_images_are_written_in_three_equal_channels(tmp_path):
    npz = written(tmp_path, IMAGES[:, :1])
    assert npz.name == "samples_3x4x6x3.npz"
    assert torch.equal(read_samples(npz), IMAGES[:, :1].expand(-1, 3, -1, -1))


def test_a_folder_is_complete_for_its_own_settings_alone(tmp_path):
    assert not is_complete(tmp_path, SETTINGS)
    written(tmp_path)
    assert is_complete(tmp_path, SETTINGS)
    assert is_complete(tmp_path, json.loads(json.dumps(SETTINGS)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "seed 3, got 4"),
        ({"respacing": "50", "seed": 4}, "seed 3, got 4"),
        ({"sag": {**SETTINGS["sag"], "interval": (0.0, 0.5)}}, "sag {"),
        ({"eta": 0.0}, "eta None, got 0.0"),
    ],
)
def test_a_run_of_other_settings_is_refused_by_the_first_that_differs(changes, named, tmp_path):
    written(tmp_path)
    with pytest.raises(UserError) as error:
        is_complete(tmp_path, {**SETTINGS, **changes})
    assert f"`output` {tmp_path} holds a run with {named}" in str(error.value)


def test_nothing_that_was_cut_short_is_taken_for_a_finished_run(tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(run_folder.np, "savez", full_disk)
    with pytest.raises(OSError, match="no space"):
        written(tmp_path)
    assert not is_complete(tmp_path, SETTINGS)
    assert list(tmp_path.glob("*.npz")) == []


def test_a_folder_holds_no_partial_files_when_it_is_done(tmp_path):
    written(tmp_path)
    assert [path for path in contents(tmp_path) if "partial" in path.name] == []


@pytest.mark.parametrize("text", ["", '{"settings": {"seed": 3', "not json"])
def test_a_damaged_record_is_refused_and_the_way_out_is_said(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"is damaged\. Delete it"):
        is_complete(tmp_path, SETTINGS)


def test_a_folder_without_a_record_has_an_empty_one(tmp_path):
    assert read_record(tmp_path) == read_record(tmp_path / "absent") == {}


@pytest.mark.parametrize("name", [".", "absent", "absent.npz"])
def test_a_place_without_images_is_refused(name, tmp_path):
    with pytest.raises(UserError, match="`run` must be an npz file or a folder that holds one"):
        read_samples(tmp_path / name)


def test_an_npz_without_images_is_refused(tmp_path):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match="`run`"):
        read_samples(tmp_path / "statistics.npz")
