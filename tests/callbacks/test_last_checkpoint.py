import signal
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from sagl.callbacks import last_checkpoint
from sagl.callbacks.ema import EMA
from sagl.callbacks.last_checkpoint import ResumableCheckpoint
from sagl.settings.training import CheckpointSettings
from tests.helpers.tiny import QUIET, fit_line

RESUMED = pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before"
)  # its loader is torch's own
pytestmark = [*QUIET, RESUMED]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a test moves it."""
    hand = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(last_checkpoint, "time", SimpleNamespace(monotonic=lambda: hand.seconds))
    return hand


class Ticks(Callback):
    """Every step takes so many seconds."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def on_train_batch_start(self, *_):
        self.clock.seconds += self.seconds


class Saved(ResumableCheckpoint):
    """Remembers the steps at which it saved."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = []

    def _save(self, trainer):
        super()._save(trainer)
        self.steps.append(trainer.global_step)


def saves(path, clock, *, seconds=0, steps=10, **options):
    """At which steps a run of so many saved."""
    callback = Saved(path, CheckpointSettings(**options))
    fit_line(callbacks=[callback, Ticks(clock, seconds)], max_steps=steps)
    return callback.steps


# ---------------------------------------------------------------------------------------------------------- when


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"save_every_steps": 4}, [4, 8, 10]),
        ({"save_every_steps": 5}, [5, 10]),
        ({"save_every_steps": 100}, [10]),
        ({"save_every_minutes": 2.5, "seconds": 60}, [3, 6, 9, 10]),
        ({"save_every_minutes": 5.0, "seconds": 60}, [5, 10]),
        ({"save_every_minutes": 5.0, "seconds": 1}, [10]),
        ({"save_every_steps": 4, "save_every_minutes": 3.0, "seconds": 60}, [3, 6, 9, 10]),
        ({"save_every_steps": 2, "save_every_minutes": 3.0, "seconds": 60}, [2, 4, 6, 8, 10]),
    ],
)
def test_it_saves_after_so_many_steps_or_minutes_since_the_last_time_and_once_at_the_end(
    options, want, tmp_path, clock
):
    assert saves(tmp_path / "last.ckpt", clock, **options) == want
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 10


def test_a_resumed_run_counts_from_the_step_it_goes_on_from(tmp_path, clock):
    saves(tmp_path / "last.ckpt", clock, steps=3)
    callback = Saved(tmp_path / "last.ckpt", CheckpointSettings(save_every_steps=4))
    fit_line(callbacks=[callback], max_steps=12, ckpt_path=tmp_path / "last.ckpt")
    assert callback.steps == [7, 11, 12]


def test_what_was_saved_on_the_way_goes_on_to_the_same_weights(tmp_path, clock):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 7:
                raise RuntimeError("power cut")

    callbacks = [ResumableCheckpoint(tmp_path / "last.ckpt", CheckpointSettings(save_every_steps=5)), Stop()]
    with pytest.raises(RuntimeError, match="power cut"):
        fit_line(callbacks=callbacks, max_steps=12)
    resumed, _ = fit_line(callbacks=[], max_steps=12, ckpt_path=tmp_path / "last.ckpt")
    whole, _ = fit_line(callbacks=[], max_steps=12)
    assert len(resumed.seen["train"]) == 7
    torch.testing.assert_close(resumed.weight, whole.weight)


# -------------------------------------------------------------------------------------------- whole or not at all


def test_a_save_that_fails_leaves_the_last_whole_file(tmp_path, clock, monkeypatch):
    path = tmp_path / "checkpoints" / "last.ckpt"

    class Breaks(ResumableCheckpoint):
        def _save(self, trainer):
            if trainer.global_step == 6:
                monkeypatch.setattr(trainer, "save_checkpoint", half)
            super()._save(trainer)

    def half(target):
        target.write_bytes(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        fit_line(callbacks=[Breaks(path, CheckpointSettings(save_every_steps=3))], max_steps=9)
    assert torch.load(path, weights_only=True)["global_step"] == 3


def test_nothing_but_the_file_is_left_in_the_folder(tmp_path, clock):
    saves(tmp_path / "checkpoints" / "last.ckpt", clock, save_every_steps=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


# ------------------------------------------------------------------------------------------------ before its time


class Ends(Callback):
    """Ends a run at a step: by an exception, or by asking its process to end."""

    def __init__(self, step, exception=None, *, in_validation=False):
        self.step, self.exception, self.in_validation = step, exception, in_validation

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
            signal.raise_signal(signal.SIGTERM)


def test_a_polite_end_is_saved_after_the_step_it_falls_into(tmp_path, clock):
    with pytest.raises(SystemExit):
        fit_line(callbacks=[ResumableCheckpoint(tmp_path / "last.ckpt"), Ends(3)], max_steps=9)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    whole, _ = fit_line(callbacks=[], max_steps=4)
    assert saved["global_step"] == 4
    assert torch.equal(saved["state_dict"]["weight"], whole.weight)


@pytest.mark.parametrize("exception", [RuntimeError("out of memory"), ValueError("not finite")])
def test_any_other_end_leaves_the_file_as_it_was(exception, tmp_path, clock):
    with pytest.raises(type(exception)):
        fit_line(
            callbacks=[
                ResumableCheckpoint(tmp_path / "last.ckpt", CheckpointSettings(save_every_steps=2)),
                Ends(3, exception),
            ],
            max_steps=9,
        )
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_polite_end_during_validation_saves_average_and_raw_weights_each_in_its_place(tmp_path, clock):
    validation = {"val_check_interval": 3, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    average = EMA(CheckpointSettings(ema_decay=0.5))
    with pytest.raises(SystemExit):
        fit_line(
            callbacks=[average, ResumableCheckpoint(tmp_path / "last.ckpt"), Ends(6, in_validation=True)],
            max_steps=9,
            **validation,
        )
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    whole, _ = fit_line(callbacks=[again := EMA(CheckpointSettings(ema_decay=0.5))], max_steps=6)
    assert saved["global_step"] == 6
    torch.testing.assert_close(saved["current_model_state"]["weight"], whole.weight.detach())
    torch.testing.assert_close(saved["state_dict"]["weight"], again._average_model.module.weight.detach())


def test_a_polite_end_waits_until_accumulated_gradients_have_been_stepped(tmp_path, clock):
    path, options = tmp_path / "last.ckpt", {"max_steps": 9, "accumulate_grad_batches": 3}
    with pytest.raises(SystemExit) as ended:
        fit_line(callbacks=[ResumableCheckpoint(path), Ends(4)], **options)
    assert ended.value.code in (None, 0)
    assert torch.load(path, weights_only=True)["global_step"] == 5
    resumed, _ = fit_line(callbacks=[], ckpt_path=path, **options)
    whole, _ = fit_line(callbacks=[], **options)
    assert torch.equal(resumed.weight, whole.weight)


def test_the_handler_of_before_is_back_after_a_run(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    fit_line(callbacks=[ResumableCheckpoint(tmp_path / "last.ckpt")], max_steps=2)
    assert signal.getsignal(signal.SIGTERM) == before


# ------------------------------------------------------------------------------------------------- where it stands

SIX_AN_EPOCH = {"limit_train_batches": 6, "accumulate_grad_batches": 2}


class Counts(Callback):
    """What Lightning counts at every batch: batches, steps, epochs; and where the validations are."""

    def __init__(self):
        self.seen, self.validations = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        loop = trainer.fit_loop
        logged = loop.epoch_loop._batches_that_stepped
        self.seen.append((batch_idx, loop.total_batch_idx, trainer.global_step, logged, trainer.current_epoch))

    def on_validation_start(self, trainer, *_):
        if not trainer.sanity_checking:
            self.validations.append(trainer.global_step)


def counted(path, stops, **options):
    """What was counted over runs to each of these steps in turn, each resumed from the one before."""
    counts = Counts()
    for k, stop in enumerate(stops):
        callbacks = [counts, ResumableCheckpoint(path, CheckpointSettings(save_every_steps=1))]
        fit_line(callbacks=callbacks, max_steps=stop, ckpt_path=path if k else None, **SIX_AN_EPOCH, **options)
    return counts


@pytest.mark.parametrize("stops", [[1, 12], [3, 12], [6, 9, 12], [3, 6, 7, 12]])
def test_a_resumed_run_counts_batches_steps_and_epochs_as_if_it_had_never_stopped(stops, tmp_path, clock):
    validation = {"val_check_interval": 3, "check_val_every_n_epoch": None}
    whole, cut = counted(tmp_path / "1.ckpt", [12], **validation), counted(tmp_path / "2.ckpt", stops, **validation)
    assert cut.seen == whole.seen
    assert [epoch for *_, epoch in whole.seen] == [k // 6 for k in range(24)]
    assert cut.validations == whole.validations == [1, 3, 4, 6, 7, 9, 10, 12]


def test_a_run_stopped_before_a_due_validation_validates_when_it_is_resumed(tmp_path, clock):
    validation = {"val_check_interval": 4, "check_val_every_n_epoch": None}
    path, first = tmp_path / "last.ckpt", Counts()
    cut = [
        first,
        ResumableCheckpoint(path, CheckpointSettings(save_every_steps=1)),
        Ends(4, MemoryError(), in_validation=True),
    ]
    with pytest.raises(MemoryError):
        fit_line(callbacks=cut, max_steps=12, **SIX_AN_EPOCH, **validation)
    assert torch.load(path, weights_only=True)["global_step"] == 3
    again = Counts()
    fit_line(callbacks=[again, ResumableCheckpoint(path)], max_steps=12, ckpt_path=path, **SIX_AN_EPOCH, **validation)
    assert again.validations == [4, 6, 8, 10, 12]


def test_what_a_killed_run_had_begun_to_write_is_cleared_away(tmp_path):
    (tmp_path / "best_00000001.ckpt.partial").write_bytes(b"half")
    fit_line(callbacks=[ResumableCheckpoint(tmp_path / "last.ckpt")], max_steps=2)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
