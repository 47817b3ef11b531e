import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sagl.errors import UserError
from sagl.models.zoo import RELEASED
from sagl.modules.classifier_module import ClassifierModule
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.network import ClassifierSettings
from sagl.settings.training import ClassifierTrainingSettings, OptimizerSettings
from tests.helpers.networks import GREY_CLASSIFIER
from tests.helpers.training import (
    IGNORED_WARNINGS,
    IMAGES,
    LABELS,
    loss_of_step,
    record_steps,
    trainer,
    with_stub_trainer,
)

pytestmark = IGNORED_WARNINGS


def build(*, num_classes=3, **options):
    settings = ClassifierSettings(**{**GREY_CLASSIFIER, "num_classes": num_classes})
    return ClassifierModule(ClassifierTrainingSettings(classifier=settings, **options))


def test_the_loss_is_the_mean_negative_log_probability_of_the_labels_at_x_t():
    module = with_stub_trainer(build(diffusion=DiffusionSettings(noise_schedule="cosine")), batch=7)
    inputs = []
    module.network.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments))
    loss = module.training_step((IMAGES, LABELS), 0)
    loss.backward()
    x_0 = IMAGES / 127.5 - 1
    draw = module._sample_noise(x_0)
    times = (draw.timesteps + 1) / 1000
    alpha_bar = (torch.cos((times + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
    alpha_bar = alpha_bar[:, None, None, None]
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * draw.noise
    torch.testing.assert_close(inputs[0][0], x_t, rtol=1e-4, atol=1e-4)
    assert torch.equal(inputs[0][1], draw.timesteps)
    with torch.no_grad():
        log_p = module.network(x_t, draw.timesteps).softmax(dim=1).log()
    expected = -sum(float(log_p[k, label]) for k, label in enumerate(LABELS)) / len(LABELS)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    assert module.logged["train/loss"] == float(loss.detach())
    assert float(module.network.out[2].c_proj.weight.grad.abs().max()) > 0


def test_top_5_accuracy_is_logged_from_ten_classes_on():
    module = with_stub_trainer(build())
    loss_of_step(module)
    assert {"train/loss", "train/accuracy", "train/lr", "train/skipped_batches"} == module.logged.keys()
    ten = with_stub_trainer(build(num_classes=10))
    loss_of_step(ten)
    assert 0 <= ten.logged["train/accuracy"] <= ten.logged["train/accuracy_top_5"] <= 1


@pytest.mark.parametrize(
    ("labels", "names"), [(-torch.ones_like(LABELS), ["`data`"]), (LABELS + 1, ["num_classes", "3"])]
)
def test_images_without_a_class_of_the_classifier_are_refused(labels, names):
    with pytest.raises(UserError) as error:
        loss_of_step(with_stub_trainer(build()), labels=labels)
    assert all(name in str(error.value) for name in names)


def test_a_released_classifier_s_name_stands_for_its_settings_and_its_process():
    with torch.device("meta"):
        module = ClassifierModule(ClassifierTrainingSettings(classifier="imagenet64_classifier"))
    assert module.network.settings == RELEASED["imagenet64_classifier"].settings
    assert module.diffusion_settings.noise_schedule == "cosine"


def test_bright_and_dark_images_are_distinguished_after_a_few_dozen_steps():
    bright = torch.arange(64) % 2
    images = (bright * 255).to(torch.uint8)[:, None, None, None].expand(64, 1, 8, 8)
    cosine = DiffusionSettings(noise_schedule="cosine")  # whose x_t can be classified at nine timesteps in ten
    module = build(num_classes=2, diffusion=cosine, optimizer=OptimizerSettings(learning_rate=3e-3))
    loader, run = DataLoader(TensorDataset(images, bright), batch_size=32), trainer(max_steps=60, gradient_clip_val=1.0)
    steps = record_steps(module, run)
    run.fit(module, loader, loader)
    assert steps[0]["train/loss"] > 0.5
    loss, accuracy = (sum(step[f"train/{name}"] for step in steps[-10:]) / 10 for name in ("loss", "accuracy"))
    assert loss < 0.3
    assert accuracy > 0.85
