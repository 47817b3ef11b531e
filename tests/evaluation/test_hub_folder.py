from sagl.evaluation.hub_folder import metrics, sampling_settings
from sagl.evaluation.results import EvaluationResult, save_result


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
