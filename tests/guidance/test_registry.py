"""Laws of all guidance methods of the registry."""

from dataclasses import replace
from itertools import combinations, permutations
from types import SimpleNamespace

import pytest
import torch

from sagl.diffusion.noise import SampleKeys
from sagl.diffusion.predictor import Condition, make_predictor
from sagl.diffusion.schedule import make_schedule
from sagl.errors import UserError
from sagl.guidance.base import with_guidance
from sagl.guidance.registry import GUIDANCES
from sagl.models.checkpoints import cast_weights
from sagl.sampling.pipeline import build_pipeline
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.sampling import SamplerSettings
from tests.helpers.networks import grey_classifier, stable_unet, toy_network, write_grey_unet
from tests.helpers.predictors import guidances_of

SCHEDULE = make_schedule(DiffusionSettings(), "5")
SETTINGS = {
    "sag": {"site": "middle"},
    "classifier": {"checkpoint": "classifier"},
    "autoguidance": {"checkpoint": "weak"},
}
"""What methods need besides a scale."""
FREE = {"classifier", "history", "eps_scaling"}
"""Methods that evaluate no network."""


class Toy:
    """The toy network, with the settings of a UNet, and options that make a difference."""

    settings = stable_unet().settings

    def __init__(self):
        self.calls = 0

    def __call__(self, x, timesteps, labels=None, *, attention_sites=(), attention_edits=(), timestep_noise=None):
        self.calls += 1
        output = toy_network(x, timesteps, labels, attention_sites=attention_sites)
        noise = 0 if timestep_noise is None else timestep_noise.mean(dim=1)[:, None, None, None]
        edits = sum(len(site) for site, _ in attention_edits)
        return SimpleNamespace(out=output.out + 0.1 * noise + 0.1 * edits, attention=output.attention)


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([1, 4])
CONDITION = Condition(labels=LABELS, samples=SampleKeys(3, (0, 1)))


def toy_guidances(network, weak_network):
    """All methods on the toy network."""

    def classifier(x, timesteps):
        return x.mean(dim=(2, 3)) @ torch.ones(3, 5, dtype=x.dtype) * torch.arange(5)

    settings = {name: {"scale": 0.5, **SETTINGS.get(name, {})} for name in GUIDANCES}
    networks = {"network": network, "weak_network": weak_network, "classifier_network": classifier}
    return guidances_of(SCHEDULE, **networks, **settings)


@pytest.mark.parametrize("count", [2, 3])
def test_any_sum_of_methods_costs_one_evaluation_and_those_of_its_terms_in_any_order(count):
    network, weak_network = Toy(), Toy()
    guidances, predict = toy_guidances(network, weak_network), make_predictor(network, SCHEDULE, "learned_range")
    base = predict(X, 2, CONDITION)

    def guided(names):
        network.calls = weak_network.calls = 0
        predict_guided = with_guidance(predict, {name: guidances[name] for name in names})
        predict_guided(X.flip(0), 3, CONDITION)  # gives the history a step
        prediction = predict_guided(X, 2, CONDITION)
        assert network.calls + weak_network.calls == 2 * prediction.nfe == 2 * (1 + len({*names} - FREE))
        return prediction

    alone = {name: guided([name]).terms[name] for name in GUIDANCES}
    for names in combinations(GUIDANCES, count):
        eps = base.eps + sum(alone[name].eps for name in names)
        for order in permutations(names) if names[0] in ("sag", "pag") and count == 3 else (names, names[::-1]):
            prediction = guided(order)
            torch.testing.assert_close(prediction.eps, eps, rtol=0, atol=1e-9)
            torch.testing.assert_close(prediction.score + 0 * X, sum(alone[name].score for name in names) + 0 * X)


def pipeline(scale, tmp_path, precision="32-true", names=GUIDANCES):
    """All methods on a small network."""
    network = cast_weights(stable_unet(), precision, torch.device("cpu"))
    settings = SETTINGS | {"autoguidance": {"checkpoint": str(tmp_path / "weak.safetensors")}}
    guidances = {name: GUIDANCES[name].settings_class(scale=scale, **settings.get(name, {})) for name in names}
    if not (tmp_path / "weak.safetensors").exists():
        write_grey_unet(tmp_path / "weak.safetensors", **vars(replace(network.settings)))

    def load_classifier(_):
        return cast_weights(
            grey_classifier(in_channels=3, image_size=16, num_classes=5), precision, torch.device("cpu")
        )

    return build_pipeline(
        network, DiffusionSettings(), SamplerSettings(respacing="2"), guidances, load_classifier=load_classifier
    )


def test_all_methods_at_scale_0_give_the_unguided_bytes_and_cost_nothing(tmp_path):
    off = pipeline(0.0, tmp_path)
    assert off.nfe == 2
    assert not off.guidances
    assert torch.equal(off.sample(1, (4, 7), LABELS)[0], pipeline(0.0, tmp_path, names=()).sample(1, (4, 7), LABELS)[0])


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_sum_of_all_methods_runs_in_float32_around_the_network(precision, tmp_path):
    images, _ = pipeline(0.05, tmp_path, precision).sample(1, (4, 7), LABELS)
    assert images.dtype == torch.float32
    assert bool(images.isfinite().all())


@pytest.mark.parametrize("name", GUIDANCES)
def test_an_image_does_not_depend_on_the_other_images_of_its_batch(name, tmp_path):
    one = pipeline(0.5, tmp_path, names=[name])
    first, second = (one.sample(1, ids, LABELS)[0] for ids in ((4, 7), (9, 7)))
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize(("name", "settings"), [("blur", "sag"), ("tpg", "pag"), ("sag", "pag")])
def test_settings_of_another_method_are_refused(name, settings):
    given = GUIDANCES[settings].settings_class(scale=1.0)
    with pytest.raises(UserError, match=rf"{GUIDANCES[name].settings_class.__name__} .*{name}.*{type(given).__name__}"):
        build_pipeline(stable_unet(), DiffusionSettings(), SamplerSettings(respacing="2"), {name: given})
