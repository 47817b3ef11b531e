from types import SimpleNamespace

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from sagl.callbacks.checkpointing import ResumableCheckpoint
from sagl.callbacks.ema import EMA, ExtraEMAs, update_average
from sagl.settings.training import CheckpointSettings
from tests.helpers.training import IGNORED_WARNINGS, Line, fit_line

pytestmark = [
    *IGNORED_WARNINGS,
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),  # its loader is torch's
]
DECAYS = (0.25, 0.9)


def expected_averages(weights, decay):
    """Return the average after each of these weights by its definition; it starts as the first."""
    average, averages = weights[0].clone(), [weights[0]]
    for n, weight in enumerate(weights[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * weight
        averages.append(average)
    return averages


def average_of(callback):
    return callback._average_model.module.weight.detach()


def ema(decay):
    return EMA(CheckpointSettings(ema_decay=decay))


def extra():
    return ExtraEMAs(CheckpointSettings(extra_ema_decays=DECAYS))


def fit(callback, steps, **options):
    """Fit a line; return it and its weights after every step."""
    line, _ = fit_line(callbacks=[callback], max_steps=steps, **options)
    return line, [*line.history["train"][1:], line.weight.detach().clone()]


def save(path, callbacks, steps, **options):
    """Return the checkpoint at the end of a fit."""
    fit_line(callbacks=[*callbacks, ResumableCheckpoint(path)], max_steps=steps, **options)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.5, 0.9999])
def test_the_average_is_that_of_its_definition(decay):
    callback = ema(decay)
    _, weights = fit(callback, 30)
    torch.testing.assert_close(average_of(callback), expected_averages(weights, decay)[-1], rtol=1e-5, atol=1e-6)


def test_the_average_counts_optimiser_steps_and_not_batches():
    callback = ema(0.5)
    line, _ = fit(callback, 4, accumulate_grad_batches=3)
    weights = [*line.history["train"][3::3], line.weight.detach()]
    torch.testing.assert_close(average_of(callback), expected_averages(weights, 0.5)[-1], rtol=1e-5, atol=1e-6)


def test_validation_uses_the_average_and_training_the_raw_weights():
    options = {"val_check_interval": 3, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    line, weights = fit(ema(0.5), 9, **options)
    averages = expected_averages(weights, 0.5)
    assert len(line.history["validation"]) == 3 * 4
    for k, weight in enumerate(line.history["validation"]):
        torch.testing.assert_close(weight, averages[3 * (k // 4) + 2], rtol=1e-5, atol=1e-6)
    without, _ = fit_line(callbacks=[], max_steps=9)
    assert all(torch.equal(a, b) for a, b in zip(line.history["train"], without.history["train"], strict=True))
    assert torch.equal(line.weight, without.weight)


def test_averages_of_16_bit_weights_are_kept_in_float32(tmp_path):
    """In 16 bits, steps of 1e-4 of the difference are rounded to nothing."""
    options = {"precision": "bf16-true", "val_check_interval": 10, "check_val_every_n_epoch": None}
    saved = save(tmp_path / "last.ckpt", [ema(0.9999), extra()], 30, **options)
    assert {saved[name]["weight"].dtype for name in ("state_dict", "current_model_state")} == {
        torch.float32,
        torch.bfloat16,
    }
    assert saved["extra_emas"]["0.9"]["weight"].dtype == torch.float32
    update_average(averages := [torch.zeros(1)], [torch.ones(1, dtype=torch.bfloat16)], 0.9999, 10**6)
    torch.testing.assert_close(averages[0], torch.tensor([1e-4]))


def test_an_update_reads_nothing_from_the_device():
    """Reading the number of updates from a GPU would make every step wait. Tensors of "meta" cannot be read."""
    callback, run, line = ema(0.9999), SimpleNamespace(global_step=0), Line().to("meta")
    callback._average_model = AveragedModel(Line())
    callback.on_fit_start(run, line)
    for run.global_step in range(1, 4):
        callback.on_train_batch_end(run, line)
    assert all(parameter.is_meta for parameter in callback._average_model.parameters())
    assert int(callback._average_model.n_averaged) == 3


def test_an_update_needs_no_groups_of_equal_data_types(monkeypatch):
    """Before PyTorch 2.12 a group of two data types was refused."""
    monkeypatch.setattr("torch.optim.swa_utils.AveragedModel.update_parameters", None)
    callback = ema(0.9999)
    fit_line(callbacks=[callback], max_steps=3)
    assert int(callback._average_model.n_averaged) == 3


def test_a_checkpoint_holds_the_average_as_state_dict_and_the_raw_weights_beside_it(tmp_path):
    callback = ema(0.5)
    line, _ = fit_line(callbacks=[callback, ResumableCheckpoint(tmp_path / "last.ckpt")], max_steps=6)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["weight"], average_of(callback))
    assert torch.equal(saved["current_model_state"]["weight"], line.weight)
    assert not torch.equal(average_of(callback), line.weight)


def test_a_resumed_average_continues_as_if_it_had_never_stopped(tmp_path):
    whole, resumed, path = ema(0.5), ema(0.5), tmp_path / "last.ckpt"
    line, _ = fit_line(callbacks=[whole], max_steps=9)
    save(path, [ema(0.5)], 5)
    resumed_line, _ = fit_line(callbacks=[resumed], max_steps=9, ckpt_path=path)
    torch.testing.assert_close(resumed_line.weight, line.weight)
    torch.testing.assert_close(average_of(resumed), average_of(whole))


# ------------------------------------------------------------------------------------------------- further averages


def test_further_averages_are_what_the_average_would_be_with_their_decay(tmp_path):
    _, weights = fit(extra(), 12)
    averages = save(tmp_path / "last.ckpt", [extra()], 12)["extra_emas"]
    assert averages.keys() == {"0.25", "0.9"}
    for decay in DECAYS:
        expected = expected_averages(weights, decay)[-1]
        torch.testing.assert_close(averages[str(decay)]["weight"], expected, rtol=1e-5, atol=1e-6)


def test_further_averages_count_optimiser_steps_and_continue_after_a_resume(tmp_path):
    path, options = tmp_path / "last.ckpt", {"accumulate_grad_batches": 2}
    whole = save(tmp_path / "whole.ckpt", [extra()], 6, **options)
    save(path, [extra()], 4, **options)
    resumed = save(path, [extra()], 6, **options, ckpt_path=path)
    assert whole["num_extra_ema_updates"] == resumed["num_extra_ema_updates"] == 6
    for decay in DECAYS:
        a, b = (checkpoint["extra_emas"][str(decay)]["weight"] for checkpoint in (whole, resumed))
        torch.testing.assert_close(a, b)


def test_a_decay_that_is_new_at_a_resume_starts_from_the_weights(tmp_path):
    path = tmp_path / "last.ckpt"
    before = save(path, [], 4)
    saved = save(path, [extra()], 5, ckpt_path=path)
    assert torch.equal(saved["extra_emas"]["0.9"]["weight"], saved["state_dict"]["weight"])
    assert not torch.equal(saved["state_dict"]["weight"], before["state_dict"]["weight"])


def test_a_checkpoint_without_further_decays_has_no_further_averages(tmp_path):
    assert "extra_emas" not in save(tmp_path / "last.ckpt", [ExtraEMAs(CheckpointSettings())], 2)
