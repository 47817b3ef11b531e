import numpy as np
import pytest
import torch

from sagl.diffusion.noise import initial_noise, step_noise
from sagl.diffusion.predictor import Condition, make_predictor
from sagl.diffusion.schedule import make_schedule
from sagl.errors import UserError
from sagl.guidance.base import with_guidance
from sagl.models.memory import MemoryTracker
from sagl.samplers.ddim import ddim
from sagl.samplers.ddpm import ddpm
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import SelfAttentionGuidance
from sagl.shapes import AttentionSite
from tests.helpers import oracle
from tests.helpers.reference import relative_error, small_classifier, small_unet
from tests.helpers.tiny import calm_unet
from tests.helpers.toys import NOTHING, Recorder, forbidden_noise, guidances_of, toy_network
from tests.helpers.transformer import transformer

SCHEDULE = make_schedule(DiffusionSettings(), "6")
SHAPE = (3, 16, 16)


def images(batch=2):
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(0))


def sag(schedule=SCHEDULE, **settings):
    return guidances_of(schedule, sag={"scale": 0.5, "site": "output.1", "blur_sigma": 1.0, **settings})


def denoiser(network, guidances, schedule=SCHEDULE):
    return with_guidance(make_predictor(network, schedule, "learned_range"), guidances)


def run(denoise, sample=ddpm, schedule=SCHEDULE, condition=NOTHING, batch=2, **options):
    noise = step_noise(0, range(batch), SHAPE, torch.device("cpu"))
    with torch.inference_mode():
        return list(sample(denoise, initial_noise(0, range(batch), SHAPE), condition, schedule, noise, **options))


# ------------------------------------------------------------------------------------ against Algorithm 1


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
def test_a_guided_step_is_algorithm_1_written_out_with_whole_attention_maps(network, settings, step):
    net, x = small_unet(**network), images()
    schedule = make_schedule(DiffusionSettings(noise_schedule="cosine"), "ddim8")
    chosen = SelfAttentionGuidance(**{"scale": 0.5, "site": "output.1", "blur_sigma": 1.0, **settings})
    with torch.no_grad():
        got = denoiser(net, sag(schedule, **settings), schedule)(x, step, NOTHING)
    timesteps = schedule.timesteps[step].expand(2)

    def predict(x_t):
        out, maps = oracle.adm(net, x_t, timesteps)
        return out[:, :3], maps[chosen.site, chosen.heads]

    with torch.no_grad():
        eps, mask = oracle.sag_eps(
            predict,
            x.double(),
            oracle.Process("cosine", schedule.timesteps.tolist()).bar[step],
            scale=chosen.scale,
            threshold=chosen.threshold,
            blur_sigma=chosen.blur_sigma,
            kernel_size=chosen.kernel_size or 31,
            clip=chosen.clip_x0,
        )
        plain = predict(x.double())[0]
    assert torch.equal(got.terms["sag"].extras["mask"].double(), mask)
    assert 0.05 < float(mask.mean()) < 0.95
    assert relative_error(got.eps, eps) < 1e-5
    assert relative_error(got.terms["sag"].eps, eps - plain) < 1e-3


def test_mask_is_that_of_the_layers_own_heads_and_not_of_the_released_ones():
    masks = []
    for heads in ("layer", "sag_release"):
        denoise = denoiser(small_unet(num_head_channels=8), sag(heads=heads))
        with torch.no_grad():
            masks.append(denoise(images(), 4, NOTHING).terms["sag"].extras["mask"])
    assert not torch.equal(*masks)


def test_what_the_second_pass_sees_is_x_t_where_nothing_is_masked_and_nothing_clipped(unet):
    network, x = Recorder(unet), images()
    with torch.no_grad():
        denoise = denoiser(network, sag(threshold=1000.0, clip_x0=False))
        prediction = denoise(x, 4, NOTHING)
    first, second = (args[0] for args, _ in network.calls)
    assert torch.equal(first, x)
    torch.testing.assert_close(second, x, rtol=0, atol=1e-5)
    assert float(prediction.terms["sag"].eps.abs().max()) < 1e-4
    assert not prediction.terms["sag"].extras["mask"].any()


def test_off_the_mask_the_second_pass_sees_x_t_and_on_it_less_detail(unet):
    network, x = Recorder(unet), images()
    with torch.no_grad():
        prediction = denoiser(network, sag(clip_x0=False))(x, 4, NOTHING)
    mask = prediction.terms["sag"].extras["mask"].expand_as(x)
    difference = (network.calls[1][0][0] - x).abs()
    assert float(difference[~mask].max()) < 1e-5
    assert float(difference[mask].mean()) > 1e-3


def test_its_own_clip_is_not_the_samplers(unet):
    found = {}
    for clip_x0 in (False, True):
        network = Recorder(unet)
        with torch.no_grad():
            denoiser(network, sag(threshold=1000.0, clip_x0=clip_x0))(images(), 5, NOTHING)
        found[clip_x0] = network.calls[1][0][0]
    assert float((found[True] - found[False]).abs().max()) > 0.01


def test_the_second_pass_has_the_same_step_and_labels(unet):
    network, labels = Recorder(unet), torch.tensor([1, 2])
    with torch.no_grad():
        denoiser(network, sag())(images(), 4, Condition(labels=labels))
    assert len(network.calls) == 2
    for args, _ in network.calls:
        assert args[1].tolist() == [int(SCHEDULE.timesteps[4])] * 2
        assert args[2] is labels


# --------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize("sample", [ddpm, ddim])
def test_zero_scale_changes_nothing_and_costs_nothing(unet, sample):
    network = Recorder(unet)
    bare = run(denoiser(network, {}), sample)
    passes = len(network.calls)
    off = run(denoiser(network, sag(scale=0.0)), sample)
    assert len(network.calls) == 2 * passes == 12
    assert all(kwargs["attention_sites"] == () for _, kwargs in network.calls)
    for (_, want, before), (_, got, after) in zip(bare, off, strict=True):
        assert torch.equal(got, want)
        assert torch.equal(after.eps, before.eps)
        assert after.nfe == before.nfe == 1


@pytest.mark.parametrize("sample", [ddpm, ddim])
def test_outside_the_interval_nothing_changes_and_no_attention_is_asked_for(unet, sample):
    network = Recorder(unet)
    bare = run(denoiser(unet, {}), sample)
    late = run(denoiser(network, sag(interval=(0.5, 1.0))), sample)
    assert [p.nfe for _, _, p in late] == [1, 1, 1, 2, 2, 2]
    assert [bool(kwargs["attention_sites"]) for _, kwargs in network.calls] == [False] * 3 + [True, False] * 3
    assert [torch.equal(a, b) for (_, a, _), (_, b, _) in zip(bare, late, strict=True)] == [True] * 3 + [False] * 3


def test_sag_and_classifier_guidance_cost_one_pass_more_in_either_order(unet):
    classifier = small_classifier()
    settings = {"sag": {"scale": 0.5, "site": "output.1"}, "classifier": {"scale": 1.5, "checkpoint": "c"}}
    both = guidances_of(SCHEDULE, classifier_network=classifier, **settings)
    condition = Condition(labels=torch.tensor([1, 4]))
    found = []
    for names in (("sag", "classifier"), ("classifier", "sag")):
        network = Recorder(unet)
        chain = run(denoiser(network, {name: both[name] for name in names}), condition=condition)
        assert len(network.calls) == 12
        found.append([x for _, x, _ in chain])
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_two_sags_at_two_sites_cost_three_passes_and_are_summed(unet):
    both, x = {"a": sag()["sag"], "b": sag(site="middle", scale=0.3)["sag"]}, images()
    network = Recorder(unet)
    with torch.no_grad():
        together = denoiser(network, both)(x, 4, NOTHING)
        plain = denoiser(unet, {})(x, 4, NOTHING).eps
        apart = [denoiser(unet, {name: g})(x, 4, NOTHING).eps - plain for name, g in both.items()]
    assert len(network.calls) == together.nfe == 3
    torch.testing.assert_close(together.eps, plain + sum(apart), rtol=0, atol=1e-5)


def test_a_negative_scale_moves_the_other_way(unet):
    with torch.no_grad():
        plus, minus = (denoiser(unet, sag(scale=s))(images(), 4, NOTHING).terms["sag"].eps for s in (0.1, -0.1))
    torch.testing.assert_close(plus, -minus)
    assert float(plus.abs().max()) > 1e-4


# ----------------------------------------------------------------------------- other networks, sizes, refusals


@pytest.mark.parametrize("sample", [ddpm, ddim])
@pytest.mark.parametrize("scale", [0.7, -0.1])
def test_a_patch_transformer_is_guided_through_the_same_seam(sample, scale):
    net = transformer()
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(20000, rel=0.2)
    network, condition = Recorder(net), Condition(labels=torch.tensor([0, 3]))
    guidances = sag(scale=scale, site="block.1")
    chain = run(denoiser(network, guidances), sample, condition=condition)
    assert len(network.calls) == 12
    x = initial_noise(0, range(2), SHAPE)
    chains_bar = oracle.Process("linear", SCHEDULE.timesteps.tolist()).bar
    for step, after, prediction in chain:
        timesteps = SCHEDULE.timesteps[step].expand(2)
        want, mask = oracle.sag_eps(
            lambda x_t, t=timesteps: whole_maps(net, x_t, t, condition.labels),
            x,
            chains_bar[step],
            scale=scale,
            threshold=1.0,
            blur_sigma=1.0,
            kernel_size=31,
            clip=True,
        )
        assert torch.equal(prediction.terms["sag"].extras["mask"].double(), mask)
        assert 0 < float(mask.mean()) < 1
        assert relative_error(prediction.eps, want.float()) < 1e-4
        x = after


def whole_maps(net, x_t, timesteps, labels):
    """The transformer's eps, and the whole attention map of its last block."""
    seen = []
    handle = net.blocks[1].register_forward_hook(lambda _, __, out: seen.append(out[1]))
    out = net(x_t.float(), timesteps, labels).out
    handle.remove()
    return out[:, :3].double(), seen[0].double()


def test_attention_and_mask_may_be_of_any_shape_of_image():
    x = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    prediction = denoiser(toy_network, sag(site="anywhere"))(x, 3, NOTHING)
    assert prediction.terms["sag"].extras["mask"].shape == (2, 1, 16, 24)
    assert torch.isfinite(prediction.eps).all()


def test_images_smaller_than_the_papers_kernel_are_blurred_by_the_largest_that_fits():
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    default, named = (denoiser(toy_network, sag(kernel_size=size))(x, 3, NOTHING).eps for size in (None, 15))
    assert torch.equal(default, named)
    with pytest.raises(UserError, match=r"`sag.kernel_size` must be at most 15"):
        denoiser(toy_network, sag(kernel_size=17))(x, 3, NOTHING)


def test_a_site_that_the_network_has_not_is_refused_with_those_it_has(unet):
    with pytest.raises(UserError, match=r"middle \(8x8\).*'output.7'"):
        denoiser(unet, sag(site="output.7"))(images(), 4, NOTHING)


def test_a_sample_is_guided_by_its_own_attention_alone(unet):
    denoise, x = denoiser(unet, sag()), images()
    with torch.no_grad():
        together, alone = denoise(x, 4, NOTHING), denoise(x[1:], 4, NOTHING)
    torch.testing.assert_close(together.eps[1:], alone.eps, rtol=0, atol=1e-5)


def test_ddim_with_sag_draws_no_noise(unet):
    with torch.no_grad():
        list(ddim(denoiser(unet, sag()), images(), NOTHING, SCHEDULE, forbidden_noise))


def test_the_mask_is_brought_back_for_every_guided_step(unet):
    chain = run(denoiser(unet, sag(interval=(0.0, 0.5))))
    shares = [float(p.terms["sag"].extras["mask"].float().mean()) for _, _, p in chain if p.terms]
    assert len(shares) == 3
    assert np.all((np.array(shares) > 0) & (np.array(shares) < 1))


def test_attention_asked_for_from_outside_is_the_plain_passes(unet):
    site = AttentionSite("output.1")
    condition = Condition(attention_sites=(site,))
    with torch.no_grad():
        got = denoiser(unet, sag())(images(), 4, condition).attention
        want = denoiser(unet, {})(images(), 4, condition).attention
    assert list(got) == [site]
    assert torch.equal(got[site], want[site])


def test_the_second_pass_adds_three_images_and_the_tokens_to_the_memory():
    network, x_t = calm_unet(learn_sigma=True), images(4)
    condition = Condition(labels=torch.zeros(4, dtype=torch.long))

    def peak(guidances):
        with torch.inference_mode(), MemoryTracker() as live:
            denoiser(network, guidances)(x_t, 3, condition)
        return live.peak

    tokens_and_mask = 4 * (4 * 16 * 16 + 16 * 16)
    image = x_t.numel() * 4
    added = peak(sag()) - peak({})
    assert 0 < added <= 3 * image + tokens_and_mask  # eps, log variance, x_t_degraded


def test_the_second_pass_tells_a_network_that_can_be_told_that_x_t_was_degraded():
    told = []
    for can in (True, False):
        network = calm_unet(degraded_embedding=can)
        network.register_forward_pre_hook(lambda _, args, kwargs: told.append(kwargs.get("degraded")), with_kwargs=True)
        with torch.inference_mode():
            denoiser(network, sag())(images(), 3, Condition(labels=torch.zeros(2, dtype=torch.long)))
    assert [None if flag is None else flag.tolist() for flag in told] == [None, [True, True], None, None]
