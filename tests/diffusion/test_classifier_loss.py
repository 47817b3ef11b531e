import math

import pytest
import torch

from sagl.diffusion.classifier_loss import ClassifierLoss, classifier_loss
from sagl.diffusion.schedule import make_schedule
from sagl.settings.diffusion import DiffusionSettings

SCHEDULE = make_schedule(DiffusionSettings(noise_schedule="cosine"))
X_0 = torch.linspace(-1, 1, 4).view(4, 1, 1, 1).expand(4, 1, 2, 2)
TIMESTEPS, LABELS = torch.tensor([0, 300, 600, 999]), torch.tensor([0, 1, 2, 1])


def noise():
    return torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def seen_of(logits, labels=LABELS):
    return classifier_loss(lambda *_: torch.tensor(logits), X_0, labels, TIMESTEPS, noise(), SCHEDULE)


def test_the_classifier_is_shown_each_image_noised_to_its_own_timestep():
    told = []
    classifier_loss(
        lambda *arguments: told.append(arguments) or torch.zeros(4, 3), X_0, LABELS, TIMESTEPS, noise(), SCHEDULE
    )
    ((x_t, timesteps),) = told
    assert timesteps.tolist() == TIMESTEPS.tolist()
    for k, timestep in enumerate(TIMESTEPS.tolist()):
        alpha_bar = float(SCHEDULE.alphas_cumprod[timestep])
        want = math.sqrt(alpha_bar) * X_0[k] + math.sqrt(1 - alpha_bar) * noise()[k]
        torch.testing.assert_close(x_t[k], want)


def test_the_loss_is_the_negative_log_probability_of_the_true_class_and_of_no_other():
    logits = [[1.0, 2.0, 3.0], [0.5, 0.25, 0.0], [-1.0, 4.0, 2.0], [0.0, 0.0, 0.0]]
    want = [
        math.log(sum(math.exp(z) for z in row)) - row[label] for row, label in zip(logits, LABELS.tolist(), strict=True)
    ]
    assert seen_of(logits).loss.tolist() == pytest.approx(want, rel=1e-6)


def test_labels_are_not_smoothed_so_a_certain_right_answer_loses_nothing():
    certain = torch.nn.functional.one_hot(LABELS, 3) * 100.0
    assert seen_of(certain.tolist()).loss.tolist() == [0.0] * 4


def test_the_rank_counts_the_classes_before_the_true_one():
    seen = seen_of([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 3.0, 2.0]])
    assert seen.rank.tolist() == [0, 1, 2, 0]
    assert seen.accuracy().tolist() == [1, 0, 0, 1]
    assert seen.accuracy(2).tolist() == [1, 1, 0, 1]


def test_a_classifier_that_holds_all_classes_alike_is_right_about_none():
    assert seen_of([[0.0] * 3] * 4).accuracy().tolist() == [0.0] * 4


def test_accuracy_is_a_share_that_grows_with_the_answers_that_are_taken():
    seen = ClassifierLoss(loss=torch.zeros(6), rank=torch.arange(6))
    assert [float(seen.accuracy(most).mean()) for most in (1, 3, 6)] == pytest.approx([1 / 6, 1 / 2, 1])
