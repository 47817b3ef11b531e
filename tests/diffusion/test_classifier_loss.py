import math

import pytest
import torch

from sagl.diffusion.classifier_loss import classifier_loss
from sagl.diffusion.schedule import make_schedule
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers.predictors import Recorder

SCHEDULE = make_schedule(DiffusionSettings(noise_schedule="cosine"))
X_0 = torch.linspace(-1, 1, 4).view(4, 1, 1, 1).expand(4, 1, 2, 2)
TIMESTEPS, LABELS = torch.tensor([0, 300, 600, 999]), torch.tensor([0, 1, 2, 1])


def noise():
    return torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def loss_of(logits, labels=LABELS):
    return classifier_loss(lambda *_: torch.tensor(logits), X_0, labels, TIMESTEPS, noise(), SCHEDULE)


def test_the_classifier_gets_each_image_with_the_noise_of_its_timestep():
    classifier = Recorder(lambda *_: torch.zeros(4, 3))
    classifier_loss(classifier, X_0, LABELS, TIMESTEPS, noise(), SCHEDULE)
    (((x_t, timesteps), _),) = classifier.calls
    assert timesteps.tolist() == TIMESTEPS.tolist()
    for k, timestep in enumerate(TIMESTEPS.tolist()):
        alpha_bar = float(SCHEDULE.alphas_cumprod[timestep])
        expected = math.sqrt(alpha_bar) * X_0[k] + math.sqrt(1 - alpha_bar) * noise()[k]
        torch.testing.assert_close(x_t[k], expected)


def test_the_loss_is_the_negative_log_probability_of_the_true_class_and_of_no_other():
    logits = [[1.0, 2.0, 3.0], [0.5, 0.25, 0.0], [-1.0, 4.0, 2.0], [0.0, 0.0, 0.0]]
    expected = [
        math.log(sum(math.exp(z) for z in row)) - row[label] for row, label in zip(logits, LABELS.tolist(), strict=True)
    ]
    assert loss_of(logits).loss.tolist() == pytest.approx(expected, rel=1e-6)


def test_labels_are_not_smoothed():
    certain = torch.nn.functional.one_hot(LABELS, 3) * 100.0
    assert loss_of(certain.tolist()).loss.tolist() == [0.0] * 4


def test_accuracy_counts_the_classes_that_are_at_least_as_likely_as_the_true_one():
    result = loss_of([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 3.0, 2.0]])
    assert result.num_higher.tolist() == [0, 1, 2, 0]
    assert [result.accuracy(k).tolist() for k in (1, 2, 3)] == [[1, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]]


def test_equal_logits_are_no_correct_prediction():
    assert loss_of([[0.0] * 3] * 4).accuracy().tolist() == [0.0] * 4
