from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from sagl.callbacks import last_checkpoint
from sagl.callbacks.ema import WeightAverage
from sagl.callbacks.last_checkpoint import LastCheckpoint
from sagl.settings.training import SavingSettings
from tests.tiny import QUIET, fit_line

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


class Saved(LastCheckpoint):
    """Remembers the steps at which it saved."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = []

    def _save(self, trainer):
        before = self.path.stat().st_mtime_ns if self.path.exists() else None
        super()._save(trainer)
        if self.path.exists() and self.path.stat().st_mtime_ns != before:
            self.steps.append(trainer.global_step)


def saves(path, clock, *, seconds=0, steps=10, **options):
    """At which steps a run of so many saved."""
    callback = Saved(path, SavingSettings(**options))
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
    callback = Saved(tmp_path / "last.ckpt", SavingSettings(save_every_steps=4))
    fit_line(callbacks=[callback], max_steps=12, ckpt_path=tmp_path / "last.ckpt")
    assert callback.steps == [7, 11, 12]


def test_what_was_saved_on_the_way_goes_on_to_the_same_weights(tmp_path, clock):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 7:
                raise RuntimeError("power cut")

    callbacks = [LastCheckpoint(tmp_path / "last.ckpt", SavingSettings(save_every_steps=5)), Stop()]
    with pytest.raises(RuntimeError, match="power cut"):
        fit_line(callbacks=callbacks, max_steps=12)
    resumed, _ = fit_line(callbacks=[], max_steps=12, ckpt_path=tmp_path / "last.ckpt")
    whole, _ = fit_line(callbacks=[], max_steps=12)
    assert len(resumed.seen["train"]) == 7
    torch.testing.assert_close(resumed.weight, whole.weight)


# -------------------------------------------------------------------------------------------- whole or not at all


def test_a_save_that_fails_leaves_the_last_whole_file(tmp_path, clock, monkeypatch):
    path = tmp_path / "checkpoints" / "last.ckpt"

    class Breaks(LastCheckpoint):
        def _save(self, trainer):
            if trainer.global_step == 6:
                monkeypatch.setattr(trainer, "save_checkpoint", half)
            super()._save(trainer)

    def half(target):
        target.write_bytes(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        fit_line(callbacks=[Breaks(path, SavingSettings(save_every_steps=3))], max_steps=9)
    assert torch.load(path, weights_only=True)["global_step"] == 3


def test_nothing_but_the_file_is_left_in_the_folder(tmp_path, clock):
    saves(tmp_path / "checkpoints" / "last.ckpt", clock, save_every_steps=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


# ------------------------------------------------------------------------------------------------ before its time


class Ends(Callback):
    """Ends a run at a step: by an exception, or as Lightning does when it is asked to end."""

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
            trainer._signal_connector.received_sigterm = True


def test_a_polite_end_is_saved_after_the_step_it_falls_into(tmp_path, clock):
    with pytest.raises(SystemExit):
        fit_line(callbacks=[LastCheckpoint(tmp_path / "last.ckpt"), Ends(3)], max_steps=9)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    whole, _ = fit_line(callbacks=[], max_steps=4)
    assert saved["global_step"] == 4
    assert torch.equal(saved["state_dict"]["weight"], whole.weight)


@pytest.mark.parametrize("exception", [RuntimeError("out of memory"), ValueError("not finite")])
def test_any_other_end_leaves_the_file_as_it_was(exception, tmp_path, clock):
    with pytest.raises(type(exception)):
        fit_line(
            callbacks=[LastCheckpoint(tmp_path / "last.ckpt", SavingSettings(save_every_steps=2)), Ends(3, exception)],
            max_steps=9,
        )
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_polite_end_during_validation_saves_average_and_raw_weights_each_in_its_place(tmp_path, clock):
    validation = {"val_check_interval": 3, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    average = WeightAverage(SavingSettings(average_decay=0.5))
    with pytest.raises(SystemExit):
        fit_line(
            callbacks=[average, LastCheckpoint(tmp_path / "last.ckpt"), Ends(6, in_validation=True)],
            max_steps=9,
            **validation,
        )
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    whole, _ = fit_line(callbacks=[again := WeightAverage(SavingSettings(average_decay=0.5))], max_steps=6)
    assert saved["global_step"] == 6
    torch.testing.assert_close(saved["current_model_state"]["weight"], whole.weight.detach())
    torch.testing.assert_close(saved["state_dict"]["weight"], again._average_model.module.weight.detach())


# ----------------------------------------------------------------------------------------------------- refusals
