import pytest
import torch

from sagl.callbacks.ema import EMA, ExtraEMAs
from sagl.callbacks.last_checkpoint import ResumableCheckpoint
from sagl.settings.training import CheckpointSettings
from tests.helpers.tiny import QUIET, fit_line

RESUMED = pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before"
)  # its loader is torch's own
pytestmark = [*QUIET, RESUMED]


def derived(weights, decay):
    """The average after each of these weights, written down plainly: the first is taken whole."""
    average, averages = weights[0].clone(), [weights[0]]
    for n, weight in enumerate(weights[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * weight
        averages.append(average)
    return averages


def averaged(callback):
    return callback._average_model.module.weight.detach()


def fitted(callback, steps, **options):
    """A fitted line, and its weights after every step."""
    line, _ = fit_line(callbacks=[callback], max_steps=steps, **options)
    return line, [*line.seen["train"][1:], line.weight.detach().clone()]


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.5, 0.9999])
def test_the_average_is_its_plain_derivation(decay):
    callback = EMA(CheckpointSettings(ema_decay=decay))
    _, weights = fitted(callback, 30)
    torch.testing.assert_close(averaged(callback), derived(weights, decay)[-1], rtol=1e-5, atol=1e-6)


def test_a_young_average_forgets_faster_than_its_decay():
    callback = EMA(CheckpointSettings(ema_decay=0.9999))
    _, weights = fitted(callback, 20)
    lingering = 0.9999**19 * weights[0] + sum(1e-4 * 0.9999 ** (19 - n) * weights[n] for n in range(1, 20))
    last = weights[-1]
    assert float((averaged(callback) - last).norm()) < 0.7 * float((lingering - last).norm())


def test_the_average_counts_optimiser_steps_not_batches():
    callback = EMA(CheckpointSettings(ema_decay=0.5))
    line, _ = fit_line(callbacks=[callback], max_steps=4, accumulate_grad_batches=3)
    after = [*line.seen["train"][3::3], line.weight.detach()]
    torch.testing.assert_close(averaged(callback), derived(after, 0.5)[-1], rtol=1e-5, atol=1e-6)


def test_validation_sees_the_average_and_training_the_raw_weights():
    options = {"val_check_interval": 3, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    callback = EMA(CheckpointSettings(ema_decay=0.5))
    line, weights = fitted(callback, 9, **options)
    averages = derived(weights, 0.5)
    seen = line.seen["validation"]
    assert len(seen) == 3 * 4
    for k, weight in enumerate(seen):
        torch.testing.assert_close(weight, averages[3 * (k // 4) + 2], rtol=1e-5, atol=1e-6)
    without, _ = fit_line(callbacks=[], max_steps=9)
    assert all(torch.equal(a, b) for a, b in zip(line.seen["train"], without.seen["train"], strict=True))


def test_the_raw_weights_are_in_place_when_training_ends():
    line, _ = fitted(EMA(CheckpointSettings(ema_decay=0.9)), 5)
    without, _ = fit_line(callbacks=[], max_steps=5)
    assert torch.equal(line.weight, without.weight)


def test_a_checkpoint_holds_the_average_as_state_dict_and_the_raw_weights_beside_it(tmp_path):
    callback = EMA(CheckpointSettings(ema_decay=0.5))
    line, run = fit_line(callbacks=[callback, ResumableCheckpoint(tmp_path / "last.ckpt")], max_steps=6)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["weight"], averaged(callback))
    assert torch.equal(saved["current_model_state"]["weight"], line.weight)
    assert not torch.equal(averaged(callback), line.weight)
    assert run.global_step == 6


def test_a_resumed_average_goes_on_as_if_it_had_never_stopped(tmp_path):
    whole, first, second = (EMA(CheckpointSettings(ema_decay=0.5)) for _ in range(3))
    line, _ = fit_line(callbacks=[whole], max_steps=9)
    fit_line(callbacks=[first, ResumableCheckpoint(tmp_path / "last.ckpt")], max_steps=5)
    resumed, _ = fit_line(callbacks=[second], max_steps=9, ckpt_path=tmp_path / "last.ckpt")
    torch.testing.assert_close(resumed.weight, line.weight)
    torch.testing.assert_close(averaged(second), averaged(whole))


DECAYS = (0.25, 0.9)


def further():
    return ExtraEMAs(CheckpointSettings(extra_ema_decays=DECAYS))


def test_further_averages_are_what_the_average_would_be_with_their_decay(tmp_path):
    _, weights = fitted(further(), 12)
    saved_by(tmp_path, [further()], 12)
    held = torch.load(tmp_path / "last.ckpt", weights_only=True)["extra_emas"]
    assert held.keys() == {"0.25", "0.9"}
    for decay in DECAYS:
        expected = derived(weights, decay)[-1]
        torch.testing.assert_close(held[str(decay)]["weight"], expected, rtol=1e-5, atol=1e-6)


def saved_by(folder, callbacks, steps, **options):
    return fit_line(callbacks=[*callbacks, ResumableCheckpoint(folder / "last.ckpt")], max_steps=steps, **options)


def test_further_averages_count_steps_of_the_optimiser_and_go_on_after_a_resume(tmp_path):
    (tmp_path / "whole").mkdir()
    saved_by(tmp_path / "whole", [further()], 6, accumulate_grad_batches=2)
    saved_by(tmp_path, [further()], 4, accumulate_grad_batches=2)
    saved_by(tmp_path, [further()], 6, accumulate_grad_batches=2, ckpt_path=tmp_path / "last.ckpt")
    whole, resumed = (torch.load(f / "last.ckpt", weights_only=True) for f in (tmp_path / "whole", tmp_path))
    assert whole["num_extra_ema_updates"] == resumed["num_extra_ema_updates"] == 6
    for decay in DECAYS:
        a, b = (c["extra_emas"][str(decay)]["weight"] for c in (whole, resumed))
        torch.testing.assert_close(a, b)


def test_a_decay_that_is_new_at_a_resume_begins_from_the_weights(tmp_path):
    line, _ = saved_by(tmp_path, [], 4)
    saved_by(tmp_path, [further()], 5, ckpt_path=tmp_path / "last.ckpt")
    held = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(held["extra_emas"]["0.9"]["weight"], held["state_dict"]["weight"])
    assert not torch.equal(held["state_dict"]["weight"], line.weight)


def test_without_further_decays_a_checkpoint_has_nothing_of_them(tmp_path):
    saved_by(tmp_path, [ExtraEMAs(CheckpointSettings())], 2)
    assert "extra_emas" not in torch.load(tmp_path / "last.ckpt", weights_only=True)
