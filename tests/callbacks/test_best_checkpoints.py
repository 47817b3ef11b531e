import pytest
import torch
from lightning.pytorch import Callback

from sagl.callbacks.best_checkpoints import BestCheckpoints
from sagl.settings.training import PreviewSettings
from tests.helpers.tiny import QUIET, fit_line

pytestmark = QUIET

SETTINGS = {"num_metric_samples": 4, "keep_best": 2, "scales": (0.0, 0.5), "best_scale": 0.5}


class Distances(Callback):
    """Logs one after the other as validation does."""

    def __init__(self, distances):
        self.distances = iter(distances)

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/frechet_0.5", next(self.distances))
        pl_module.log("val/frechet_0", 0.0)


def fitted(folder, distances, **settings):
    best = BestCheckpoints(folder, PreviewSettings(**{**SETTINGS, **settings}))
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    fit_line(callbacks=[Distances(distances), best], max_steps=2 * len(distances), **options)
    return best


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_checkpoints_of_the_smallest_distances_are_kept_and_no_more(tmp_path):
    best = fitted(tmp_path, [5.0, 3.0, 4.0, 6.0])
    assert names(tmp_path) == ["best_00000004.ckpt", "best_00000006.ckpt"]
    assert best.best == [(3.0, "best_00000004.ckpt"), (4.0, "best_00000006.ckpt")]
    assert torch.load(tmp_path / "best_00000004.ckpt", weights_only=True)["global_step"] == 4


def test_a_resumed_run_goes_on_with_those_that_are_still_there(tmp_path):
    best = fitted(tmp_path, [5.0, 3.0, 4.0])
    (tmp_path / "best_00000006.ckpt").unlink()
    again = BestCheckpoints(tmp_path, PreviewSettings(**SETTINGS))
    again.load_state_dict(best.state_dict())
    assert again.best == [(3.0, "best_00000004.ckpt")]


def test_they_are_fewer_where_the_disk_budget_is_small_but_the_best_stays(tmp_path):
    fitted(tmp_path, [5.0, 3.0, 4.0], max_checkpoint_gb=1e-9)
    assert names(tmp_path) == ["best_00000004.ckpt"]


def test_a_budget_that_holds_all_drops_none(tmp_path):
    fitted(tmp_path, [5.0, 3.0, 4.0], keep_best=3)
    assert len(names(tmp_path)) == 3


@pytest.mark.parametrize("distance", [float("nan"), float("inf")])
def test_a_distance_that_is_no_number_is_not_one_of_the_best(tmp_path, distance):
    fitted(tmp_path, [distance, 3.0])
    assert names(tmp_path) == ["best_00000004.ckpt"]


def test_none_are_kept_where_none_are_asked_for(tmp_path):
    fitted(tmp_path, [3.0], keep_best=0)
    assert names(tmp_path) == []
