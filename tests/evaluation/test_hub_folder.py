import pytest

from sagl.evaluation.hub_folder import metrics, sampling_settings, write_hub_folder
from sagl.evaluation.results import EvaluationResult, save_result
from sagl.models import loading
from sagl.utils.files import sha256
from tests.helpers.errors import refused
from tests.helpers.networks import write_grey_unet
from tests.helpers.run_folders import write_run


def test_the_card_has_the_metrics_of_an_evaluated_run_without_paths(tmp_path):
    result = EvaluationResult(
        extractor="effnet_lite0_64",
        reference="/home/someone/flowers_test",
        num_samples=1000,
        values={"fd": 12.346},
        intervals={"fd": (11.0, 13.0)},
    )
    save_result(tmp_path, result)
    (row,) = metrics(tmp_path)
    assert row["value"] == "12.35 (11.00 … 13.00)"
    assert row["of"] == "1,000 images, flowers_test, effnet_lite0_64"


def test_the_card_shows_no_paths_of_the_machine():
    settings = {"sag": {"scale": 0.5, "direction_head": "/home/me/head.safetensors", "dino_checkpoint": "/home/me/d"}}
    assert sampling_settings({"settings": settings | {"pag": 3}}) == {"sag.scale": 0.5}


@pytest.mark.parametrize("name", [None, "released"])
def test_weights_that_have_changed_since_the_run_was_sampled_are_refused(name, tmp_path, monkeypatch):
    file = write_grey_unet(tmp_path / "net.safetensors")
    monkeypatch.setattr(loading, "download_pretrained", lambda _: file)
    monkeypatch.setattr("sagl.evaluation.hub_folder.read_network", lambda *_: loading.load(file))
    settings, run = {"weights_sha256": sha256(file)}, tmp_path / "run"
    write_run(run, settings=settings, model=None, checkpoint=name or str(file))
    write_hub_folder(tmp_path / "first", str(run), "me/net", licence="mit")
    assert (tmp_path / "first" / "model.safetensors").is_file()
    write_grey_unet(file, num_res_blocks=2)
    with refused("`run`", file, settings["weights_sha256"][:12], sha256(file)[:12]):
        write_hub_folder(tmp_path / "second", str(run), "me/net", licence="mit")
    assert not (tmp_path / "second").exists()
    write_hub_folder(tmp_path / "third", str(file), "me/net", licence="mit")
