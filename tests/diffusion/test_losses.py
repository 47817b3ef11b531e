import math

import numpy as np
import pytest
import torch

from sagl.diffusion.losses import (
    LossSecondMomentTimesteps,
    UniformTimesteps,
    bits_per_dim,
    discretized_log_likelihood,
    estimated_bits_per_dim,
    gaussian_kl,
    prior_bits,
    sample_vlb_timesteps,
    training_losses,
    van_der_corput_timesteps,
)
from sagl.diffusion.predictor import Condition, Prediction, make_predictor
from sagl.diffusion.process import add_noise
from sagl.diffusion.schedule import make_schedule
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers import oracle
from tests.helpers.reference import generator, network, schedule_of, values
from tests.helpers.toys import toy_network

LABELS = {"adm_a": None, "adm_b": torch.tensor([4, 500, 999])}
TIMESTEPS = torch.tensor([0, 250, 999])
CLOSE = {"rtol": 1e-4, "atol": 0}


def reference_draws():
    g = generator(77)
    return 2 * torch.rand(3, 3, 32, 32, generator=g) - 1, torch.randn(3, 3, 32, 32, generator=g)


def images(seed=0, dtype=torch.float64):
    return 2 * torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype) - 1


def predict(x, timesteps):
    return toy_network(x, timesteps).out


# ------------------------------------------------------------------------------------------ reference values


@pytest.mark.parametrize("name", LABELS)
def test_training_losses_are_the_references(name):
    x_0, noise = reference_draws()
    with torch.no_grad():
        got = training_losses(
            lambda x, t: network(name)(x, t, LABELS[name]).out,
            x_0,
            TIMESTEPS,
            noise,
            schedule_of(name),
            kind="hybrid",
            variance="learned_range",
        )
    for field, theirs in (("total", "loss"), ("mse", "mse"), ("vb", "vb")):
        torch.testing.assert_close(getattr(got, field), values("losses")[f"{name}.{theirs}"], **CLOSE)


@pytest.mark.parametrize("name", LABELS)
def test_bits_per_dim_are_the_references(name):
    x_0, _ = reference_draws()
    schedule, g = schedule_of(name, "20"), generator(78)
    denoise = make_predictor(network(name), schedule, "learned_range")
    noise = {step: torch.randn(3, 3, 32, 32, generator=g) for step in reversed(range(20))}
    got = bits_per_dim(denoise, x_0, schedule, noise.__getitem__, Condition(labels=LABELS[name]))
    want = {field: values("losses")[f"{name}.bpd.{field}"] for field in ("total", "vb", "prior")}
    torch.testing.assert_close(got.total, want["total"], **CLOSE)
    torch.testing.assert_close(got.prior, want["prior"], **CLOSE)
    # terms below 1e-4 are rounded at 1e-8 in the reference itself, which is float32 throughout
    torch.testing.assert_close(got.vb, want["vb"], rtol=1e-4, atol=1e-8)


# --------------------------------------------------------------------------------------------- other settings


@pytest.mark.parametrize("kind", ["hybrid", "simple", "vlb"])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
@pytest.mark.parametrize("process", [("linear", 1000), ("cosine", 400)])
def test_losses_of_other_settings_are_those_of_a_second_derivation(kind, variance, process):
    schedule = make_schedule(DiffusionSettings(noise_schedule=process[0], num_timesteps=process[1]))
    chain = oracle.Chain(process[0], range(process[1]), process[1])
    x_0, noise, steps = images(), torch.randn(3, 3, 6, 6, generator=generator(0)).double(), [0, 1, process[1] - 50]
    got = training_losses(predict, x_0, torch.tensor(steps), noise, schedule, kind=kind, variance=variance)
    learned = variance == "learned_range"  # as in ADM, the hybrid has no bound where there is no variance to learn
    scale = {"hybrid": process[1] / 1000 * learned, "simple": 0, "vlb": process[1]}[kind]
    for row, step in enumerate(steps):
        x = math.sqrt(chain.bar[step]) * x_0[row] + math.sqrt(1 - chain.bar[step]) * noise[row]
        eps, fraction = (part.numpy() for part in predict(x[None], torch.tensor([step])).chunk(2, dim=1))
        mse = float(((eps - noise[row].numpy()) ** 2).mean())
        log_variance = chain.log_variance(step, variance, fraction)
        vb = scale * float(chain.bound(x_0[row : row + 1].numpy(), x[None].numpy(), eps, log_variance, step)[0])
        assert float(got.mse[row]) == pytest.approx(mse, rel=1e-9)
        assert float(got.vb[row]) == pytest.approx(vb, rel=1e-6)
        assert float(got.total[row]) == pytest.approx(vb if kind == "vlb" else mse + vb, rel=1e-6)


@pytest.mark.parametrize("clip_x0", [False, True])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
def test_bits_per_dim_of_other_settings_are_those_of_a_second_derivation(clip_x0, variance):
    schedule = make_schedule(DiffusionSettings(noise_schedule="cosine"), "ddim10")
    chain = oracle.Chain("cosine", schedule.timesteps.tolist())
    x_0 = images()
    noise = {step: torch.randn(3, 3, 6, 6, generator=generator(step)).double() for step in range(10)}
    denoise = make_predictor(toy_network, schedule, variance)
    got = bits_per_dim(denoise, x_0, schedule, noise.__getitem__, clip_x0=clip_x0)
    for column, step in enumerate(reversed(range(10))):
        x = math.sqrt(chain.bar[step]) * x_0 + math.sqrt(1 - chain.bar[step]) * noise[step]
        t = torch.full((3,), int(chain.timesteps[step]))
        eps, fraction = (part.numpy() for part in predict(x, t).chunk(2, dim=1))
        log_variance = chain.log_variance(step, variance, fraction)
        want = chain.bound(x_0.numpy(), x.numpy(), eps, log_variance, step, clip_x0)
        np.testing.assert_allclose(got.vb[:, column].numpy(), want, rtol=1e-6)
    torch.testing.assert_close(got.total, got.vb.sum(dim=1) + got.prior, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_prior_keeps_its_digits_where_it_is_almost_nothing(dtype, kind):
    schedule, x_0 = make_schedule(DiffusionSettings(noise_schedule=kind)), images()
    bar = float(schedule.alphas_cumprod[-1])
    want = 0.5 * (-math.log1p(-bar) - bar + bar * x_0**2).flatten(1).mean(dim=1) / math.log(2)
    torch.testing.assert_close(prior_bits(x_0.to(dtype), schedule).double(), want, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_of_gaussians_keeps_its_digits_where_they_almost_agree(dtype):
    mean, log_variance = torch.tensor([1e-4, 0.0, 0.3, -1.0]), torch.tensor([-6.0, -2.002, -3.0, 1.0])
    other = torch.tensor([-6.0, -2.0, -2.5, 0.0])
    d = log_variance.double() - other.double()
    want = 0.5 * (torch.expm1(d) - d + mean.double() ** 2 * torch.exp(-other.double()))
    got = gaussian_kl(mean.to(dtype), log_variance.to(dtype), torch.zeros(4, dtype=dtype), other.to(dtype))
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=0)


def test_the_true_noise_with_the_posteriors_variance_costs_nothing_but_the_first_step():
    schedule, x_0 = make_schedule(DiffusionSettings(), "10"), images()
    noise = torch.randn(3, 3, 6, 6, generator=generator(0)).double()

    def denoise(x_t, step, condition):
        return Prediction(eps=noise, log_variance=schedule.log_posterior_variance(step))

    got = bits_per_dim(denoise, x_0, schedule, lambda step: noise)
    assert float(got.vb[:, :-1].abs().max()) < 1e-9
    assert float(got.vb[:, -1].min()) > 0


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small"])
def test_the_estimates_of_all_timesteps_together_are_the_whole_bound(variance):
    schedule, x_0 = make_schedule(DiffusionSettings(num_timesteps=40)), images()
    noise = {step: torch.randn(3, 3, 6, 6, generator=generator(step)).double() for step in range(40)}
    want = bits_per_dim(make_predictor(toy_network, schedule, variance), x_0, schedule, noise.__getitem__)
    prior, one = prior_bits(x_0, schedule), torch.ones(3)
    terms = [
        estimated_bits_per_dim(predict, x_0, torch.full((3,), step), 5 * one, noise[step], schedule, variance=variance)
        - prior
        for step in range(40)
    ]
    torch.testing.assert_close(sum(terms) / 5 + prior, want.total, rtol=1e-6, atol=0)


def test_timesteps_of_the_estimate_are_drawn_as_their_weights_say():
    timesteps, weights = sample_vlb_timesteps(40_000, 20, generator(0))
    share = torch.bincount(timesteps, minlength=20) / len(timesteps)
    expected = torch.stack([1 / weights[timesteps == t][0] for t in range(20)])
    assert float(expected.sum()) == pytest.approx(1)
    torch.testing.assert_close(share, expected, rtol=0.1, atol=0)
    assert float(expected[0]) > 5 * float(expected[-1])


# ------------------------------------------------------------------------------------------------ gradients


def gradients(kind, part):
    """Of one part of the loss, with respect to the channels of eps and of the variance."""
    x_0, noise, steps = images(), torch.randn(3, 3, 6, 6, generator=generator(0)).double(), torch.tensor([0, 9, 800])
    schedule = make_schedule(DiffusionSettings())
    x_t = add_noise(x_0, noise, schedule.alpha_bar(steps))
    out = predict(x_t, steps).requires_grad_()
    losses = training_losses(lambda *_: out, x_0, steps, noise, schedule, kind=kind, variance="learned_range")
    grad = torch.autograd.grad(getattr(losses, part).sum(), out)[0]
    return grad[:, :3].flatten(1).abs().amax(dim=1), grad[:, 3:].flatten(1).abs().amax(dim=1)


def test_in_the_hybrid_the_bound_gives_no_gradient_to_eps():
    of_eps, of_variance = gradients("hybrid", "vb")
    assert float(of_eps.max()) == 0
    assert float(of_variance.min()) > 0


def test_in_the_hybrid_the_squared_error_gives_no_gradient_to_the_variance():
    of_eps, of_variance = gradients("hybrid", "mse")
    assert float(of_eps.min()) > 0
    assert float(of_variance.max()) == 0


def test_in_the_hybrid_both_parts_are_trained_together():
    of_eps, of_variance = gradients("hybrid", "total")
    assert float(of_eps.min()) > 0
    assert float(of_variance.min()) > 0


def test_the_bound_alone_trains_eps_and_the_variance():
    of_eps, of_variance = gradients("vlb", "total")
    assert float(of_eps.min()) > 0
    assert float(of_variance.min()) > 0


# ----------------------------------------------------------------------------------------- pixel likelihoods


@pytest.mark.parametrize("mean", [-1.3, -1.0, 0.002, 0.7, 1.0])
@pytest.mark.parametrize("log_scale", [-6.0, -3.0, 0.0, 2.0])
def test_probabilities_of_all_256_values_of_a_pixel_sum_to_one(mean, log_scale):
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_p = discretized_log_likelihood(x, torch.full_like(x, mean), torch.full_like(x, log_scale))
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-9)


def test_a_pixel_is_likeliest_at_the_mean_and_by_the_normal_density_times_the_width():
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_p = discretized_log_likelihood(x, x[100].expand(256), torch.full_like(x, -2.0))
    assert int(log_p.argmax()) == 100
    density = -0.5 * ((x - x[100]) / math.exp(-2)) ** 2 + 2 - 0.5 * math.log(2 * math.pi) + math.log(2 / 255)
    torch.testing.assert_close(log_p[60:140], density[60:140], rtol=0, atol=0.05)


# ----------------------------------------------------------------------------------------- timestep samplers


def full(losses_by_timestep, history=4):
    """A sampler whose every timestep has seen its losses."""
    sampler = LossSecondMomentTimesteps(num_timesteps=len(losses_by_timestep), history=history)
    for t, losses in enumerate(losses_by_timestep):
        sampler.update(torch.full((len(losses),), t), torch.tensor(losses))
    return sampler


def test_uniform_timesteps_reach_both_ends_with_weight_one():
    timesteps, weights = UniformTimesteps(num_timesteps=5).sample(500, torch.Generator().manual_seed(0))
    assert sorted(set(timesteps.tolist())) == [0, 1, 2, 3, 4]
    assert timesteps.dtype == torch.int64
    assert weights.tolist() == [1.0] * 500


def test_timesteps_are_uniform_until_every_history_is_full():
    sampler = full([[9.0] * 4, [1.0] * 4, [5.0] * 3])
    assert sampler.probabilities().tolist() == pytest.approx([1 / 3] * 3)
    _, weights = sampler.sample(10, torch.Generator().manual_seed(0))
    assert weights.tolist() == pytest.approx([1.0] * 10)
    sampler.update(torch.tensor([2]), torch.tensor([5.0]))
    assert sampler.probabilities().tolist() != pytest.approx([1 / 3] * 3)


def test_full_histories_are_followed_by_their_root_mean_square():
    sampler = full([[3.0] * 4, [1.0, 7.0, 1.0, 7.0], [2.0] * 4])
    roots = np.array([3.0, 5.0, 2.0])
    want = 0.999 * roots / roots.sum() + 0.001 / 3
    np.testing.assert_allclose(sampler.probabilities().numpy(), want, rtol=1e-12)


def test_the_oldest_loss_is_forgotten_first():
    sampler = full([[1.0, 2.0, 3.0, 4.0], [1.0] * 4])
    sampler.update(torch.tensor([0, 0]), torch.tensor([5.0, 6.0]))
    assert sampler.losses[0].tolist() == [3.0, 4.0, 5.0, 6.0]
    assert sampler.losses[1].tolist() == [1.0] * 4


def test_drawn_timesteps_follow_the_probabilities_and_weights_keep_the_mean_unbiased():
    sampler = full([[k + 1.0] * 4 for k in range(8)])
    p, count = sampler.probabilities(), 20000
    timesteps, weights = sampler.sample(count, torch.Generator().manual_seed(0))
    torch.testing.assert_close(weights.double(), 1 / (8 * p[timesteps]), rtol=1e-6, atol=0)
    shares = torch.bincount(timesteps, minlength=8) / count
    assert float((shares - p).abs().max()) < 5 / count**0.5
    of_timestep = torch.linspace(0, 1, 8)
    assert float((weights * of_timestep[timesteps]).mean()) == pytest.approx(0.5, abs=0.02)


def test_no_timestep_is_ever_given_up():
    sampler = full([[0.0] * 4, [1.0] * 4])
    assert float(sampler.probabilities().min()) == pytest.approx(0.0005)


@pytest.mark.parametrize("sampler", [UniformTimesteps(num_timesteps=50), full([[1.0, 2.0]] * 50, history=2)])
def test_timesteps_are_drawn_from_the_generator_alone(sampler):
    first, again = (sampler.sample(20, torch.Generator().manual_seed(1))[0] for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("count", [1, 2, 8, 64, 512])
def test_the_timesteps_of_the_first_ids_are_evenly_spread(count):
    timesteps = van_der_corput_timesteps(range(count), 1024)
    assert sorted(timesteps.tolist()) == [k * 1024 // count for k in range(count)]
    assert van_der_corput_timesteps([5, 3], 1000).tolist() == [
        van_der_corput_timesteps([k], 1000).item() for k in (5, 3)
    ]
