import math

import pytest
import torch

from sagl.diffusion.losses import mask_vlb, training_losses
from sagl.diffusion.process import add_noise
from sagl.diffusion.schedule import make_schedule
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers import formulas
from tests.helpers.networks import toy_model
from tests.helpers.predictors import pixels, standard_normal
from tests.helpers.reference_values import REFERENCE_LABELS, loss_inputs, network, schedule_of, values

TIMESTEPS = torch.tensor([0, 250, 999])


@pytest.mark.parametrize("name", REFERENCE_LABELS)
def test_training_losses_equal_the_reference_values(name):
    x_0, noise = loss_inputs()
    with torch.no_grad():
        actual = training_losses(
            lambda x, t: network(name)(x, t, REFERENCE_LABELS[name]).out,
            x_0,
            TIMESTEPS,
            noise,
            schedule_of(name),
            kind="hybrid",
            variance="learned_range",
        )
    for field, reference in (("total", "loss"), ("mse", "mse"), ("vlb", "vb")):
        torch.testing.assert_close(getattr(actual, field), values("losses")[f"{name}.{reference}"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["hybrid", "simple", "vlb"])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
@pytest.mark.parametrize(("noise_schedule", "total"), [("linear", 1000), ("cosine", 400)])
def test_losses_are_those_of_an_independent_implementation(kind, variance, noise_schedule, total):
    schedule = make_schedule(DiffusionSettings(noise_schedule=noise_schedule, num_timesteps=total))
    process = formulas.Process(noise_schedule, range(total), total)
    x_0, noise, steps = pixels(), standard_normal(), [0, 1, total - 50]
    actual = training_losses(toy_model, x_0, torch.tensor(steps), noise, schedule, kind=kind, variance=variance)
    learned = variance == "learned_range"  # as in ADM, the hybrid has no bound without a variance to learn
    scale = {"hybrid": total / 1000 * learned, "simple": 0, "vlb": total}[kind]
    for row, step in enumerate(steps):
        x = math.sqrt(process.bar[step]) * x_0[row] + math.sqrt(1 - process.bar[step]) * noise[row]
        eps, fraction = (part.numpy() for part in toy_model(x[None], torch.tensor([step])).chunk(2, dim=1))
        mse = float(((eps - noise[row].numpy()) ** 2).mean())
        log_variance = process.log_variance(step, variance, fraction)
        vlb = scale * float(process.bound(x_0[row : row + 1].numpy(), x[None].numpy(), eps, log_variance, step)[0])
        assert float(actual.mse[row]) == pytest.approx(mse, rel=1e-9)
        assert float(actual.vlb[row]) == pytest.approx(vlb, rel=1e-6)
        assert float(actual.total[row]) == pytest.approx(vlb if kind == "vlb" else mse + vlb, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "part", "trains_eps", "trains_variance"),
    [
        ("hybrid", "vlb", False, True),
        ("hybrid", "mse", True, False),
        ("hybrid", "total", True, True),
        ("vlb", "total", True, True),
    ],
)
def test_in_the_hybrid_the_bound_trains_the_variance_alone(kind, part, trains_eps, trains_variance):
    x_0, noise, steps = pixels(), standard_normal(), torch.tensor([0, 9, 800])
    schedule = make_schedule(DiffusionSettings())
    out = toy_model(add_noise(x_0, noise, schedule.alpha_bar(steps)), steps).requires_grad_()
    losses = training_losses(lambda *_: out, x_0, steps, noise, schedule, kind=kind, variance="learned_range")
    largest = torch.autograd.grad(getattr(losses, part).sum(), out)[0].unflatten(1, (2, 3)).abs().amax(dim=(2, 3, 4))
    assert ((largest > 0) == torch.tensor([trains_eps, trains_variance])).all()


def test_the_bound_of_masked_samples_is_zero_and_their_mse_unchanged():
    x_0, noise, schedule = pixels(), standard_normal(), make_schedule(DiffusionSettings())
    options = {"kind": "hybrid", "variance": "learned_range"}
    losses = training_losses(toy_model, x_0, torch.tensor([3, 400, 900]), noise, schedule, **options)
    masked = mask_vlb(losses, torch.tensor([True, False, True]))
    assert masked.vlb.tolist() == [0, float(losses.vlb[1]), 0]
    torch.testing.assert_close(masked.total, losses.mse + masked.vlb)
    assert torch.equal(masked.mse, losses.mse)
