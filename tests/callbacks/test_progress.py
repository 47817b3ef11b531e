import re

import pytest
from torch.utils.data import DataLoader, TensorDataset

from sagl.callbacks.progress import TrainingProgress
from sagl.callbacks.sag_sampling import SAGPreviews
from sagl.modules.diffusion_module import DiffusionModule
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.settings.network import UNetSettings
from sagl.settings.training import DiffusionTrainingSettings, PreviewSettings
from sagl.utils import progress
from sagl.utils.progress import ProgressReporter
from tests.helpers.networks import GREY, draw_weights
from tests.helpers.training import IGNORED_WARNINGS, IMAGES, LABELS, trainer

pytestmark = IGNORED_WARNINGS

LOADER = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)  # two batches


@pytest.fixture(autouse=True)
def every_line(monkeypatch):
    monkeypatch.setattr(progress, "LINE_INTERVAL_SECONDS", 0.0)


def build_module():
    module = DiffusionModule(DiffusionTrainingSettings(network=UNetSettings(**GREY)))
    draw_weights(module.network, 1).train()
    return module


def build_run(callback, **options):
    options = {"max_steps": 4, "val_check_interval": 2, "check_val_every_n_epoch": None, **options}
    return trainer(callbacks=[callback], **{"num_sanity_val_steps": 1, **options, "enable_progress_bar": True})


def printed_by_fit(capsys, callback=None, module=None, **options):
    build_run(callback or TrainingProgress(), **options).fit(module or build_module(), LOADER, LOADER)
    return capsys.readouterr().err.splitlines()


def lines_of(title, lines):
    return [line for line in lines if line.startswith(title)]


def test_a_log_has_the_steps_of_the_whole_training_and_the_loss(capsys):
    lines = lines_of("training: ", printed_by_fit(capsys))
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    assert all(re.search(r"steps, \d+\.\d+/s(, \d:\d\d:\d\d left)?, loss \d+\.\d{4}$", line) for line in lines)


def test_the_loss_is_the_logged_one(capsys):
    run, module = build_run(TrainingProgress(), max_steps=1), build_module()
    run.fit(module, LOADER, LOADER)
    line = lines_of("training: ", capsys.readouterr().err.splitlines())[-1]
    assert line.endswith(f"loss {float(run.callback_metrics['train/loss']):.4f}")


def test_accumulated_batches_count_as_one_step(capsys):
    lines = lines_of("training: ", printed_by_fit(capsys, max_steps=2, accumulate_grad_batches=2))
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]


def test_every_validation_has_a_line_with_its_means(capsys):
    lines = lines_of("validation", printed_by_fit(capsys))
    assert [line.split(":")[0] for line in lines] == ["validation at step 2", "validation at step 4"]
    assert all(re.search(r": loss [\d.e-]+, mse [\d.e-]+", line) for line in lines)
    assert not any("_q" in line for line in lines)


def test_a_resumed_training_begins_at_its_step_and_with_the_speed_of_now(capsys, tmp_path):
    run, module = build_run(TrainingProgress(), max_steps=2), build_module()
    run.fit(module, LOADER, LOADER)
    run.save_checkpoint(tmp_path / "last.ckpt")
    capsys.readouterr()
    reporter = []
    callback = TrainingProgress()
    callback._start = lambda new: reporter.append(new) or TrainingProgress._start(callback, new)
    build_run(callback).fit(build_module(), LOADER, LOADER, ckpt_path=tmp_path / "last.ckpt")
    lines = lines_of("training: ", capsys.readouterr().err.splitlines())
    assert [line.split()[1] for line in lines] == ["3/4", "4/4"]
    assert reporter[0]._completed_before == 2


def test_skipped_batches_are_counted(capsys):
    module, calls = build_module(), []
    log_if_finite = module._log_if_finite

    def second_is_not_finite(values):
        calls.append(values)
        return log_if_finite({name: value / (len(calls) != 2) for name, value in values.items()})

    module._log_if_finite = second_is_not_finite
    lines = lines_of("training: ", printed_by_fit(capsys, module=module))
    assert ["1 batches skipped" in line for line in lines] == [False, True, True, True]


@pytest.mark.parametrize(("method", "title"), [("validate", "validation"), ("test", "test")])
def test_validate_and_test_count_their_batches(method, title, capsys):
    module = build_module()
    getattr(build_run(TrainingProgress()), method)(module, LOADER, verbose=False)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"{title}: 1/2 batches", f"{title}: 2/2 batches"]


def test_other_ranks_print_nothing(capsys):
    callback = TrainingProgress()
    callback.disable()
    assert lines_of("training", printed_by_fit(capsys, callback)) == []


def test_the_bars_show_validations_and_previews_and_are_removed_at_the_end(monkeypatch):
    parts, stopped = [], []

    class Recorder(ProgressReporter):
        def update_part(self, *part):
            super().update_part(*part)
            parts.append(part)

        def __exit__(self, *error):
            super().__exit__(*error)
            stopped.append(self.title)

    monkeypatch.setattr("sagl.callbacks.progress.ProgressReporter", Recorder)
    sampler = {"sampler": "ddim", "respacing": "ddim2", "extractor": "inception"}
    settings = PreviewSettings(num_samples=4, num_metric_samples=0, scales=(0.0, 0.5), batch_size=3, **sampler)
    previews = SAGPreviews(None, settings, SelfAttentionGuidance(site="output.0", blur_sigma=1.0))
    monkeypatch.setattr(previews, "_log_grid", lambda run, pipelines: sample_all(previews, run, pipelines))
    options = {"max_steps": 2, "val_check_interval": 2, "num_sanity_val_steps": 1, "enable_progress_bar": True}
    trainer(callbacks=[previews, TrainingProgress()], **options).fit(build_module(), LOADER, LOADER)
    assert parts == [("validation", 1, 2), ("validation", 2, 2), *(("previews", count, 8) for count in (3, 4, 7, 8))]
    assert stopped[-1] == "training"


def sample_all(previews, run, pipelines):
    for pipeline in pipelines.values():
        for ids in previews._rank_batches(run, previews.settings.num_samples):
            previews._sample(run, pipeline, ids)


def test_an_error_removes_the_bars(monkeypatch):
    module, callback = build_module(), TrainingProgress()
    stopped = []
    callback._stop = lambda: stopped.append(1) or TrainingProgress._stop(callback)
    module.training_step = lambda *_: 1 // 0
    with pytest.raises(ZeroDivisionError):
        build_run(callback).fit(module, LOADER, LOADER)
    assert stopped == [1]
