import math

import pytest
import torch
from torchvision.transforms.functional import gaussian_blur as torchvision_blur

from sagl.diffusion.noise import initial_noise, step_noise
from sagl.diffusion.predictor import Condition, make_predictor
from sagl.diffusion.process import x0_hat_from_eps
from sagl.diffusion.schedule import make_schedule
from sagl.errors import UserError
from sagl.guidance.base import with_guidance
from sagl.guidance.sag import degrade_input, gaussian_blur
from sagl.models.memory import MemoryTracker
from sagl.samplers.ddim import ddim
from sagl.samplers.ddpm import ddpm
from sagl.settings.diffusion import DiffusionSettings
from tests.helpers import formulas
from tests.helpers.networks import small_unet, stable_unet, toy_network, transformer
from tests.helpers.predictors import NO_CONDITION, Recorder, guidances_of
from tests.helpers.reference_values import generator, relative_error

SCHEDULE = make_schedule(DiffusionSettings(), "6")
SAG = {"scale": 0.5, "site": "output.1", "blur_sigma": 1.0}
SHAPE = (3, 16, 16)
BAR = torch.tensor(0.3, dtype=torch.float64)


def images(*shape):
    return torch.randn(*(shape or (2, *SHAPE)), generator=generator(0))


def sag_predictor(network, schedule=SCHEDULE, **settings):
    guidances = guidances_of(schedule, sag={**SAG, **settings})
    return with_guidance(make_predictor(network, schedule, "learned_range"), guidances)


def sampled(predict, sample, condition=NO_CONDITION):
    noise = step_noise(0, range(2), SHAPE, torch.device("cpu"))
    with torch.inference_mode():
        return list(sample(predict, initial_noise(0, range(2), SHAPE), condition, SCHEDULE, noise))


@pytest.mark.parametrize("kernel_size", [1, 3, 9, 31])
@pytest.mark.parametrize("blur_sigma", [0.3, 1.0, 3.0, 9.0])
@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (1, 1, 32, 20)])
def test_the_blur_equals_torchvisions(kernel_size, blur_sigma, shape):
    x = images(*shape)
    expected = torchvision_blur(x, [kernel_size] * 2, [blur_sigma] * 2)
    torch.testing.assert_close(gaussian_blur(x, kernel_size, blur_sigma), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_blur_keeps_the_dtype_in_any_memory_format(dtype):
    x = images().to(dtype)
    actual = gaussian_blur(x.contiguous(memory_format=torch.channels_last), 9, 2.0)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, gaussian_blur(x, 9, 2.0), rtol=0, atol=1e-6)


def test_the_blur_has_the_same_bits_under_autocast_and_a_constant_image_stays_the_same():
    x, constant = images(), torch.full((1, *SHAPE), 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        blurred, blurred_constant = (gaussian_blur(image, 9, 2.0) for image in (x, constant))
    assert torch.equal(blurred, gaussian_blur(x, 9, 2.0))
    torch.testing.assert_close(blurred_constant, constant, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"shape": "off_unsharp"}, {"shape": "high_pass", "max_norm": 0.1}], ids=str)
@pytest.mark.parametrize("method", ["sag", "blur"])
def test_autocast_does_not_change_the_arithmetic_outside_of_the_network(method, settings):
    base = SAG if method == "sag" else {"scale": 0.5, "blur_sigma": 1.0}
    predict = make_predictor(toy_network, SCHEDULE, "learned_range")  # has no operation in 16 bits under autocast
    guided = with_guidance(predict, guidances_of(SCHEDULE, **{method: {**base, **settings}}))
    with torch.autocast("cpu", torch.bfloat16):
        actual = guided(images(), 3, NO_CONDITION).eps
    assert torch.equal(actual, guided(images(), 3, NO_CONDITION).eps)


@pytest.mark.parametrize("masked_fraction", [0.0, 0.4, 1.0])
def test_blending_before_the_noise_is_eq_16_which_blends_after_it(masked_fraction):
    x_t, eps = images(2, 2, *SHAPE).double()
    x0_hat = x0_hat_from_eps(x_t, eps, BAR)
    blurred = gaussian_blur(x0_hat, 9, 2.0)
    mask = torch.rand(2, 1, 16, 16, generator=generator(1)) < masked_fraction
    expected = (~mask) * x_t + mask * (math.sqrt(BAR) * blurred + math.sqrt(1 - BAR) * eps)
    torch.testing.assert_close(degrade_input(x0_hat, blurred, mask, eps, BAR), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("network", "settings"),
    [
        ({}, {}),
        ({}, {"scale": -0.1}),
        ({}, {"scale": 2.0, "clip_x0": False}),
        ({}, {"site": "input.1", "threshold": 1.2}),
        ({}, {"site": "middle", "threshold": 0.8, "blur_sigma": 3.0}),
        ({}, {"site": "output.3", "kernel_size": 5}),
        ({"use_new_attention_order": True, "num_heads": 8}, {"site": "output.0", "clip_x0": False}),
        ({"num_head_channels": 8}, {"heads": "sag_release"}),
        ({"num_head_channels": 16, "use_new_attention_order": True}, {"heads": "sag_release", "site": "middle"}),
        ({"num_heads_upsample": 1, "resblock_updown": True}, {"site": "output.2"}),
    ],
)
@pytest.mark.parametrize("step", [1, 4])
def test_a_guided_step_is_algorithm_1_with_whole_attention_maps(network, settings, step):
    net, x = small_unet(**network), images()
    schedule = make_schedule(DiffusionSettings(noise_schedule="cosine"), "ddim8")
    s = {"threshold": 1.0, "kernel_size": 31, "clip_x0": True, "heads": "layer", **SAG, **settings}
    with torch.no_grad():
        actual = sag_predictor(net, schedule, **settings)(x, step, NO_CONDITION)
    timesteps = schedule.timesteps[step].expand(2)

    def eps_and_maps(x_t):
        out, maps = formulas.adm(net, x_t, timesteps)
        return out[:, :3], maps[s["site"], s["heads"]]

    with torch.no_grad():
        eps, mask = formulas.sag_eps(
            eps_and_maps,
            x.double(),
            formulas.Process("cosine", schedule.timesteps.tolist()).bar[step],
            clip=s["clip_x0"],
            **{name: s[name] for name in ("scale", "threshold", "blur_sigma", "kernel_size")},
        )
        base_eps = eps_and_maps(x.double())[0]
    assert torch.equal(actual.terms["sag"].extras["mask"].double(), mask)
    assert 0.05 < float(mask.mean()) < 0.95
    assert relative_error(actual.eps, eps) < 1e-5
    assert relative_error(actual.terms["sag"].eps, eps - base_eps) < 1e-3


@pytest.mark.parametrize("sample", [ddpm, ddim])
@pytest.mark.parametrize("scale", [0.7, -0.1])
def test_a_patch_transformer_is_guided_by_algorithm_1_too(sample, scale):
    net = transformer()
    network, condition = Recorder(net), Condition(labels=torch.tensor([0, 3]))
    steps = sampled(sag_predictor(network, scale=scale, site="block.1"), sample, condition)
    assert len(network.calls) == 12
    x, bars = initial_noise(0, range(2), SHAPE), formulas.Process("linear", SCHEDULE.timesteps.tolist()).bar
    options = {"scale": scale, "threshold": 1.0, "blur_sigma": 1.0, "kernel_size": 31, "clip": True}
    for step, x_next, prediction in steps:
        timesteps = SCHEDULE.timesteps[step].expand(2)
        expected, mask = formulas.sag_eps(
            lambda x_t, t=timesteps: whole_maps(net, x_t, t, condition.labels), x, bars[step], **options
        )
        assert torch.equal(prediction.terms["sag"].extras["mask"].double(), mask)
        assert 0 < float(mask.mean()) < 1
        assert relative_error(prediction.eps, expected.float()) < 1e-4
        x = x_next


def whole_maps(net, x_t, timesteps, labels):
    """The transformer's eps, and the whole attention map of its last block."""
    maps = []
    handle = net.blocks[1].register_forward_hook(lambda _, __, out: maps.append(out[1]))
    out = net(x_t.float(), timesteps, labels).out
    handle.remove()
    return out[:, :3].double(), maps[0].double()


def test_the_second_evaluation_has_the_same_step_and_labels(unet):
    network, labels = Recorder(unet), torch.tensor([1, 2])
    with torch.no_grad():
        sag_predictor(network)(images(), 4, Condition(labels=labels))
    assert len(network.calls) == 2
    for args, _ in network.calls:
        assert args[1].tolist() == [int(SCHEDULE.timesteps[4])] * 2
        assert args[2] is labels


@pytest.mark.parametrize("sample", [ddpm, ddim])
def test_outside_the_interval_nothing_changes_and_no_attention_is_requested(unet, sample):
    network = Recorder(unet)
    unguided = sampled(sag_predictor(unet, scale=0.0), sample)
    late = sampled(sag_predictor(network, interval=(0.5, 1.0)), sample)
    assert [p.nfe for _, _, p in late] == [1, 1, 1, 2, 2, 2]
    assert [bool(kwargs["attention_sites"]) for _, kwargs in network.calls] == [False] * 3 + [True, False] * 3
    equal = [torch.equal(a, b) for (_, a, _), (_, b, _) in zip(unguided, late, strict=True)]
    assert equal == [True] * 3 + [False] * 3


def test_the_second_evaluation_adds_three_images_and_the_tokens_to_the_memory():
    network, x_t = stable_unet(learn_sigma=True), images(4, *SHAPE)
    condition = Condition(labels=torch.zeros(4, dtype=torch.long))

    def peak(scale):
        with torch.inference_mode(), MemoryTracker() as tracker:
            sag_predictor(network, scale=scale)(x_t, 3, condition)
        return tracker.peak

    tokens_and_mask = 4 * (4 * 16 * 16 + 16 * 16)
    image = x_t.numel() * 4
    assert 0 < peak(0.5) - peak(0.0) <= 3 * image + tokens_and_mask  # eps, log variance, x_t_degraded


@pytest.mark.parametrize(("embedding", "flags"), [(True, [None, [True, True]]), (False, [None, None])])
def test_a_network_with_an_embedding_for_degraded_images_gets_the_flag(embedding, flags):
    network = stable_unet(degraded_embedding=embedding)
    actual = []
    network.register_forward_pre_hook(lambda _, args, kwargs: actual.append(kwargs.get("degraded")), with_kwargs=True)
    with torch.inference_mode():
        sag_predictor(network)(images(), 3, Condition(labels=torch.zeros(2, dtype=torch.long)))
    assert [None if flag is None else flag.tolist() for flag in actual] == flags


def test_images_may_have_any_shape():
    prediction = sag_predictor(toy_network, site="anywhere")(images(2, 3, 16, 24), 3, NO_CONDITION)
    assert prediction.terms["sag"].extras["mask"].shape == (2, 1, 16, 24)
    assert torch.isfinite(prediction.eps).all()


def test_images_smaller_than_the_papers_kernel_are_blurred_by_the_largest_that_fits():
    x = images(2, 3, 8, 8)
    default, given = (sag_predictor(toy_network, kernel_size=size)(x, 3, NO_CONDITION).eps for size in (None, 15))
    assert torch.equal(default, given)
    with pytest.raises(UserError, match=r"`sag\.kernel_size`.*15.*17"):
        sag_predictor(toy_network, kernel_size=17)(x, 3, NO_CONDITION)


def test_a_sample_is_guided_by_its_own_attention_alone(unet):
    predict, x = sag_predictor(unet), images()
    with torch.no_grad():
        together, alone = predict(x, 4, NO_CONDITION), predict(x[1:], 4, NO_CONDITION)
    torch.testing.assert_close(together.eps[1:], alone.eps, rtol=0, atol=1e-5)
