import errno
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from sagl.callbacks import checkpointing
from sagl.callbacks.checkpointing import AtomicCheckpointIO, BestCheckpoints, ResumableCheckpoint, SaveConfig
from sagl.callbacks.ema import EMA
from sagl.data.dataloader import EpochDataset, Item, LoaderSettings, training_loader
from sagl.errors import UserError
from sagl.settings.training import CheckpointSettings, PreviewSettings
from sagl.utils.signals import STOP_SIGNALS, Interrupted, on_stop_signal
from tests.helpers.training import IGNORED_WARNINGS, Line, fit_line, line_data, trainer

pytestmark = [
    *IGNORED_WARNINGS,
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),  # its loader is torch's
]
VALIDATION = {"val_check_interval": 3, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}


@pytest.fixture
def clock(monkeypatch):
    """A clock that only tests advance."""
    fake = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(checkpointing, "time", SimpleNamespace(monotonic=lambda: fake.seconds))
    return fake


class SlowSteps(Callback):
    """Advances the clock at every step."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def on_train_batch_start(self, *_):
        self.clock.seconds += self.seconds


class Recorder(ResumableCheckpoint):
    """Remembers the steps at which it saved."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = []

    def _save(self, trainer):
        super()._save(trainer)
        self.steps.append(trainer.global_step)


class EndAt(Callback):
    """Ends a run at a step, by an exception or by a signal, in training or in validation."""

    def __init__(self, step, exception=None, *, in_validation=False, number=signal.SIGTERM):
        self.step, self.exception, self.in_validation, self.number = step, exception, in_validation, number

    def on_train_batch_start(self, trainer, *_):
        if not self.in_validation:
            self._end(trainer)

    def on_validation_batch_start(self, trainer, *_):
        if self.in_validation:
            self._end(trainer)

    def _end(self, trainer):
        if trainer.global_step == self.step:
            if self.exception:
                raise self.exception
            self.step = None  # once
            signal.raise_signal(self.number)


def last(path, **settings):
    return ResumableCheckpoint(path, CheckpointSettings(**settings))


def read(path):
    return torch.load(path, weights_only=True)


def fit_to_signal(callbacks, **options):
    """Fit until a signal ends the run; return its number."""
    (saver,) = (callback for callback in callbacks if isinstance(callback, ResumableCheckpoint))
    with pytest.raises(Interrupted) as end, on_stop_signal(saver.request_stop):
        fit_line(callbacks=callbacks, **options)
    return end.value.number


# -------------------------------------------------------------------------------------------- last.ckpt: when


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"save_every_steps": 4}, [4, 8, 10]),
        ({"save_every_steps": 5}, [5, 10]),
        ({"save_every_minutes": 2.5, "seconds": 60}, [3, 6, 9, 10]),
        ({"save_every_minutes": 5.0, "seconds": 1}, [10]),
        ({"save_every_steps": 4, "save_every_minutes": 3.0, "seconds": 60}, [3, 6, 9, 10]),
        ({"save_every_steps": 2, "save_every_minutes": 3.0, "seconds": 60}, [2, 4, 6, 8, 10]),
    ],
)
def test_it_is_saved_every_so_many_steps_or_minutes_and_once_at_the_end(options, steps, tmp_path, clock):
    slow = SlowSteps(clock, options.pop("seconds", 0))
    callback = Recorder(tmp_path / "checkpoints" / "last.ckpt", CheckpointSettings(**options))
    fit_line(callbacks=[callback, slow], max_steps=10)
    assert callback.steps == steps
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert read(callback.path)["global_step"] == 10


def test_saves_take_no_more_than_a_twentieth_of_the_time(tmp_path, clock, monkeypatch):
    """Saves of 6 s, at steps of 30 s: two minutes apart, not one."""
    save = Trainer.save_checkpoint

    def slow_save(*args, **kwargs):
        clock.seconds += 6
        save(*args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", slow_save)
    callback = Recorder(tmp_path / "checkpoints" / "last.ckpt", CheckpointSettings(save_every_minutes=1.0))
    fit_line(callbacks=[callback, SlowSteps(clock, 30)], max_steps=11)
    assert callback.steps == [2, 6, 10, 11]


def test_a_resumed_run_counts_from_the_step_that_it_continues_from(tmp_path, clock):
    path = tmp_path / "last.ckpt"
    fit_line(callbacks=[last(path)], max_steps=3)
    callback = Recorder(path, CheckpointSettings(save_every_steps=4))
    fit_line(callbacks=[callback], max_steps=12, ckpt_path=path)
    assert callback.steps == [7, 11, 12]


# --------------------------------------------------------------------------------- last.ckpt: whole or not at all


class DamageWeights(Callback):
    """Sets the weights to nan after a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.step:
            for parameter in module.parameters():
                parameter.data.fill_(torch.nan)


@pytest.mark.parametrize(("settings", "step"), [({"save_every_steps": 2}, 3), ({}, 5)], ids=["periodic", "at the end"])
def test_weights_that_are_not_finite_never_replace_a_checkpoint(settings, step, tmp_path):
    path = tmp_path / "last.ckpt"
    fit_line(callbacks=[last(path)], max_steps=2)
    content = path.read_bytes()
    with pytest.raises(UserError, match=r"weights finite.*after step.*resume from step 2"):
        fit_line(callbacks=[DamageWeights(step), last(path, **settings)], max_steps=5, ckpt_path=path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("exception", [RuntimeError("out of memory"), MemoryError()])
def test_a_run_that_fails_leaves_the_last_save_which_continues_to_the_same_weights(exception, tmp_path, clock):
    path = tmp_path / "last.ckpt"
    with pytest.raises(type(exception)):
        fit_line(callbacks=[last(path, save_every_steps=5), EndAt(7, exception)], max_steps=12)
    assert read(path)["global_step"] == 5
    resumed, _ = fit_line(callbacks=[], max_steps=12, ckpt_path=path)
    whole, _ = fit_line(callbacks=[], max_steps=12)
    assert len(resumed.history["train"]) == 7
    torch.testing.assert_close(resumed.weight, whole.weight)


@pytest.mark.parametrize("in_torch", [False, True])
def test_a_save_on_a_full_disk_is_refused_and_leaves_the_previous_file(in_torch, tmp_path, monkeypatch):
    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"step": 1}, path)

    def fill_disk(content, file):
        file.write(b"half")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            if in_torch:
                raise RuntimeError("unexpected pos 576 vs 534")  # noqa: B904 (torch does so)
            raise

    monkeypatch.setattr("torch.save", fill_disk)
    with pytest.raises(UserError, match=r"last\.ckpt cannot be written: No space left"):
        writer.save_checkpoint({"step": 2}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert read(path) == {"step": 1}


def test_a_checkpoint_is_written_beside_its_target_and_nowhere_else(tmp_path, monkeypatch):
    opened = []
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("opened"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    monkeypatch.setattr(Path, "open", lambda path, mode, open=Path.open: opened.append(path) or open(path, mode))
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "checkpoints" / "last.ckpt")
    assert {path.parent for path in opened} == {tmp_path / "checkpoints"}


def test_unfinished_files_of_a_killed_run_are_removed_and_no_others(tmp_path):
    for name in ("last.ckpt.7.partial", "best_00000001.ckpt.7.partial", "mine.partial"):
        (tmp_path / name).write_bytes(b"half")
    fit_line(callbacks=[last(tmp_path / "last.ckpt")], max_steps=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "mine.partial"]


def test_an_unfinished_configuration_or_preview_of_a_killed_run_is_removed_and_no_other_file(tmp_path):
    (tmp_path / "previews").mkdir()
    for name in ("config.yaml.7.partial", "previews/step_1.png.7.partial", "mine.7.partial"):
        (tmp_path / name).touch()
    fit_line(callbacks=[SaveConfig(tmp_path / "config.yaml", "a: 1")], max_steps=1)
    assert {path.name for path in tmp_path.rglob("*")} == {"config.yaml", "previews", "mine.7.partial"}


# -------------------------------------------------------------------------------------- last.ckpt: stop signals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_is_handled_after_the_step(number, tmp_path, clock):
    path = tmp_path / "last.ckpt"
    assert fit_to_signal([last(path), EndAt(3, number=number)], max_steps=9) == number
    whole, _ = fit_line(callbacks=[], max_steps=4)
    assert read(path)["global_step"] == 4
    assert torch.equal(read(path)["state_dict"]["weight"], whole.weight)


@pytest.mark.parametrize("hook", ["on_fit_start", "on_sanity_check_start", "on_train_start"])
def test_a_stop_signal_before_the_first_step_is_handled_after_it(hook, tmp_path, clock):
    early, path = Callback(), tmp_path / "last.ckpt"
    setattr(early, hook, lambda *_: signal.raise_signal(signal.SIGTERM))
    fit_to_signal([early, last(path)], max_steps=9, **VALIDATION | {"num_sanity_val_steps": 1})
    assert read(path)["global_step"] == 1


def test_a_stop_signal_while_the_last_save_is_written_does_not_end_a_complete_run(tmp_path, clock):
    saver = last(tmp_path / "last.ckpt")
    saver.on_save_checkpoint = lambda *_: signal.raise_signal(signal.SIGTERM)
    with on_stop_signal(saver.request_stop):
        fit_line(callbacks=[saver], max_steps=3)
    assert read(saver.path)["global_step"] == 3


def test_a_stop_signal_during_validation_saves_average_and_raw_weights_each_in_its_place(tmp_path, clock):
    path, settings = tmp_path / "last.ckpt", CheckpointSettings(ema_decay=0.5)
    fit_to_signal([EMA(settings), last(path), EndAt(6, in_validation=True)], max_steps=9, **VALIDATION)
    whole, _ = fit_line(callbacks=[ema := EMA(settings)], max_steps=6)
    assert read(path)["global_step"] == 6
    torch.testing.assert_close(read(path)["current_model_state"]["weight"], whole.weight.detach())
    torch.testing.assert_close(read(path)["state_dict"]["weight"], ema._average_model.module.weight.detach())


def test_a_stop_signal_waits_until_accumulated_gradients_have_been_applied(tmp_path, clock):
    path, options = tmp_path / "last.ckpt", {"max_steps": 9, "accumulate_grad_batches": 3}
    fit_to_signal([last(path), EndAt(4)], **options)
    assert read(path)["global_step"] == 5
    resumed, _ = fit_line(callbacks=[], ckpt_path=path, **options)
    whole, _ = fit_line(callbacks=[], **options)
    assert torch.equal(resumed.weight, whole.weight)


# ------------------------------------------------------------------------------------------- last.ckpt: progress

SIX_BATCHES = {"limit_train_batches": 6, "accumulate_grad_batches": 2}


class Counts(Callback):
    """Records Lightning's counters at every batch, and the steps of the validations."""

    def __init__(self):
        self.batches, self.validations = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        loop = trainer.fit_loop
        logged = loop.epoch_loop._batches_that_stepped
        self.batches.append((batch_idx, loop.total_batch_idx, trainer.global_step, logged, trainer.current_epoch))

    def on_validation_start(self, trainer, *_):
        if not trainer.sanity_checking:
            self.validations.append(trainer.global_step)


def count(path, stops):
    """Return what is counted over runs to each of these steps in turn, each resumed from the one before."""
    counts = Counts()
    for k, stop in enumerate(stops):
        callbacks = [counts, last(path, save_every_steps=1)]
        fit_line(callbacks=callbacks, max_steps=stop, ckpt_path=path if k else None, **SIX_BATCHES, **VALIDATION)
    return counts


@pytest.mark.parametrize("stops", [[1, 12], [6, 9, 12], [3, 6, 7, 12]])
def test_a_resumed_run_counts_batches_steps_and_epochs_as_one_that_was_never_stopped(stops, tmp_path, clock):
    whole, cut = count(tmp_path / "1.ckpt", [12]), count(tmp_path / "2.ckpt", stops)
    assert cut.batches == whole.batches
    assert [epoch for *_, epoch in whole.batches] == [k // 6 for k in range(24)]
    assert cut.validations == whole.validations == [1, 3, 4, 6, 7, 9, 10, 12]


def test_a_run_stopped_before_a_due_validation_validates_when_it_is_resumed(tmp_path, clock):
    options, path = {**SIX_BATCHES, **VALIDATION, "val_check_interval": 4, "max_steps": 12}, tmp_path / "last.ckpt"
    with pytest.raises(MemoryError):
        fit_line(callbacks=[last(path, save_every_steps=1), EndAt(4, MemoryError(), in_validation=True)], **options)
    assert read(path)["global_step"] == 3
    counts = Counts()
    fit_line(callbacks=[counts, last(path)], ckpt_path=path, **options)
    assert counts.validations == [4, 6, 8, 10, 12]


class Ones(EpochDataset):
    """Twenty-four images of two pixels."""

    image_shape = (1, 1, 2)

    def __len__(self):
        return 24

    def __getitem__(self, item):
        return Item(torch.ones(2, 1, 1, dtype=torch.uint8), 0)


class LineOnImages(Line):
    """A `Line` on batches of images."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch[0].float().mean(dim=0).flatten(), batch_idx)


def fit_images(path, batch_size, accumulated, max_steps, ckpt_path=None, **options):
    """Fit, and return (batch, step, epoch) at every batch."""
    counts, fake = Counts(), SimpleNamespace(global_rank=0, world_size=1, accumulate_grad_batches=accumulated)
    loader = training_loader(Ones(), LoaderSettings(batch_size=batch_size), 0, fake)
    callbacks = [counts, last(path, save_every_steps=1)]
    run = trainer(callbacks=callbacks, max_steps=max_steps, accumulate_grad_batches=accumulated, **options)
    run.fit(LineOnImages(), loader, line_data(1), ckpt_path=ckpt_path)
    return [(batch, step, epoch) for batch, _, step, _, epoch in counts.batches]


@pytest.mark.parametrize(("batch_size", "accumulated"), [(2, 4), (8, 1), (1, 8)])
def test_a_run_resumed_with_another_batch_size_makes_the_steps_of_the_same_images(batch_size, accumulated, tmp_path):
    """Three steps of 8 images are an epoch; the run is resumed after the first of them."""
    path = tmp_path / "last.ckpt"
    assert fit_images(path, 4, 2, 1) == [(0, 0, 0), (1, 0, 0)]
    resumed = fit_images(path, batch_size, accumulated, 4, ckpt_path=path)
    batches = [(step, batch) for step in range(3) for batch in range(step * accumulated, (step + 1) * accumulated)]
    expected = [(batch, step, 0) for step, batch in batches[accumulated:]]
    assert resumed == [*expected, *((batch, 3, 1) for batch in range(accumulated))]


@pytest.mark.parametrize(
    ("limit", "accumulated", "stops"),
    [(4, 1, (3, 4, 6, 11, 12, 13)), (0.5, 1, (6, 7)), (5, 1, (4, 11, 12, 13)), (5, 2, (4, 5, 6, 7)), (4, 3, (1, 2, 3))],
)
def test_a_run_of_limited_epochs_is_resumed_at_its_place_in_them(limit, accumulated, stops, tmp_path):
    """Twelve batches are an epoch of the loader, and Lightning ends its epoch with it: the third of 5 has 2 batches."""
    path, options = tmp_path / "last.ckpt", {"limit_train_batches": limit}
    whole = fit_images(path, 2, accumulated, 16, **options)
    for stop in stops:
        first = fit_images(path, 2, accumulated, stop, **options)
        assert first + fit_images(path, 2, accumulated, 16, ckpt_path=path, **options) == whole, stop


# ---------------------------------------------------------------------------------------------- best checkpoints


class Distances(Callback):
    """Logs one distance after the other as previews do."""

    def __init__(self, distances):
        self.distances = iter(distances)

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/frechet_0.5", next(self.distances))
        pl_module.log("val/frechet_0", 0.0)


def fit_best(folder, distances, ckpt_path=None, max_steps=None, **settings):
    """Fit with a validation every third step; return the names of the files."""
    defaults = {"num_metric_samples": 4, "keep_best": 2, "scales": (0.0, 0.5), "best_scale": 0.5}
    best = BestCheckpoints(folder / "best", PreviewSettings(**{**defaults, **settings}))
    callbacks = [Distances(distances), best, last(folder / "last.ckpt")]
    fit_line(callbacks=callbacks, max_steps=max_steps or 3 * len(distances), ckpt_path=ckpt_path, **VALIDATION)
    return sorted(path.name for path in (folder / "best").iterdir())


def test_the_checkpoints_with_the_smallest_distances_remain(tmp_path):
    assert fit_best(tmp_path, [5.0, 3.0, 4.0, 6.0]) == ["best_00000006.ckpt", "best_00000009.ckpt"]
    assert read(tmp_path / "best" / "best_00000006.ckpt")["global_step"] == 6


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_compares_with_those_that_it_has(tmp_path):
    fit_best(tmp_path, [5.0, 3.0, 4.0])
    files = fit_best(tmp_path, [3.5, 9.0], ckpt_path=tmp_path / "last.ckpt", max_steps=15)
    assert files == ["best_00000006.ckpt", "best_00000012.ckpt"]


def test_a_limit_on_disk_space_keeps_fewer_but_always_the_best(tmp_path):
    assert fit_best(tmp_path, [5.0, 3.0, 4.0], max_checkpoint_gb=1e-9) == ["best_00000006.ckpt"]


@pytest.mark.parametrize("distance", [float("nan"), float("inf")])
def test_a_distance_that_is_not_finite_is_never_among_the_best(tmp_path, distance):
    assert fit_best(tmp_path, [distance, 3.0]) == ["best_00000006.ckpt"]
