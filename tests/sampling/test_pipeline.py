import threading
from dataclasses import replace
from functools import cache
from pkgutil import resolve_name

import pytest
import torch

from sagl.diffusion.noise import initial_noise, random_labels, step_noise
from sagl.diffusion.predictor import Condition, GuidanceTerm, Prediction, make_predictor
from sagl.errors import UserError
from sagl.guidance.base import with_guidance
from sagl.models import loading
from sagl.models.checkpoints import cast_weights
from sagl.models.flops import flops_per_evaluation
from sagl.sampling.pipeline import build_pipeline, make_labels, run_to_end, x0_predictions
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import (
    Autoguidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    SelfAttentionGuidance,
)
from sagl.settings.sampling import SAMPLERS, RunSettings, SamplerSettings, id_batches
from tests.helpers.networks import (
    count_calls,
    grey_unet,
    small_classifier,
    stable_unet,
    write_grey_classifier,
    write_grey_unet,
)

CHAINS = {
    "ddpm": SamplerSettings(sampler="ddpm", respacing="6"),
    "ddim": SamplerSettings(sampler="ddim", respacing="ddim8"),
    "ddim-eta": SamplerSettings(sampler="ddim", respacing="6", eta=0.7, clip_x0=False),
    "dpm++2m": SamplerSettings(sampler="dpm++2m", respacing="logsnr6"),
    "heun": SamplerSettings(sampler="heun", respacing="4"),
    "unipc": SamplerSettings(sampler="unipc", respacing="logsnr6"),
}
SAG = {"scale": 0.5, "site": "output.1", "blur_sigma": 1.0}
LABELS = torch.tensor([0, 3])
every_sampler = pytest.mark.parametrize("sampler", CHAINS)


def pipeline_of(sampler, *, network=None, classifier_scale=0.0, cfg_scale=0.0, diffusion=None, **sag):
    """A pipeline on the small colour network, with SAG unless its scale is 0."""
    return build_pipeline(
        network or stable_unet(),
        diffusion or DiffusionSettings(),
        CHAINS[sampler] if isinstance(sampler, str) else sampler,
        {
            "sag": SelfAttentionGuidance(**{**SAG, **sag}),
            "classifier": ClassifierGuidance(scale=classifier_scale, checkpoint="small"),
            "cfg": ClassifierFreeGuidance(scale=cfg_scale),
        },
        load_classifier=lambda name: small_classifier(),
    )


def sampled(pipeline, run, ids=(0, 1)):
    """The images of these ids, and the mask frequency."""
    with torch.inference_mode():
        return pipeline.sample(run.seed, list(ids), make_labels(run, list(ids), pipeline.network))


@cache
def steps_of(sample_id, run, sampler):
    """One sample of a run, step by step: its image and its mask."""
    pipeline = pipeline_of(sampler)
    (ids,) = (ids for ids in id_batches(run) if sample_id in ids)
    row = ids.index(sample_id)
    with torch.inference_mode():
        steps = list(pipeline.sample_progressive(run.seed, ids, make_labels(run, ids, pipeline.network)))
    return [(x[row], p.terms["sag"].extras["mask"][row]) for _, x, p in steps]


# ---------------------------------------------------------------------------------- one sample, whatever the run


@every_sampler
@pytest.mark.parametrize(
    "short", [RunSettings(num_samples=6, batch_size=4), RunSettings(num_samples=1, first_id=5, batch_size=4)]
)
def test_a_sample_has_the_same_bytes_in_every_run_of_one_batch_size(sampler, short):
    long = RunSettings(num_samples=8, batch_size=4)
    for (x, mask), (other, other_mask) in zip(steps_of(5, long, sampler), steps_of(5, short, sampler), strict=True):
        assert torch.equal(x, other)
        assert torch.equal(mask, other_mask)


@every_sampler
@pytest.mark.parametrize("batch_size", [1, 3, 6])
def test_a_sample_changes_by_rounding_at_another_batch_size(sampler, batch_size, record_property):
    """Up to a step in which a token flips over the threshold; flips are counted and named."""
    expected = steps_of(5, RunSettings(num_samples=8, batch_size=4), sampler)
    actual = steps_of(5, RunSettings(num_samples=6, batch_size=batch_size), sampler)
    assert 0.1 < float(expected[0][1].float().mean()) < 0.9
    num_flips, largest = 0, 0.0
    for (x, mask), (other, other_mask) in zip(expected, actual, strict=True):
        num_flips += int((mask != other_mask)[:, ::2, ::2].sum())  # a token of 8x8 is two pixels wide
        if num_flips:
            break
        largest = max(largest, float((x - other).abs().max()))
    record_property("tokens flipped", num_flips)
    assert num_flips <= 1, f"{num_flips} mask tokens flipped in one step: more than rounding at the threshold explains"
    assert largest <= 1e-5, f"images differ by {largest:.1e}; mask tokens that flipped: {num_flips}"


@every_sampler
def test_a_pipeline_is_its_sampler_over_the_guided_network(sampler):
    network, s, shape = stable_unet(), CHAINS[sampler], (3, 16, 16)
    pipeline = pipeline_of(sampler, network=network)
    predict = with_guidance(make_predictor(network, pipeline.schedule, "learned_range"), pipeline.guidances)
    noise = step_noise(7, [2, 3], shape, torch.device("cpu"))
    inputs = (predict, initial_noise(7, [2, 3], shape), Condition(labels=LABELS), pipeline.schedule, noise)
    sample, options = resolve_name(SAMPLERS[s.sampler]), {"eta": s.eta} if s.sampler == "ddim" else {}
    expected = sample(*inputs, clip_x0=s.clip_x0, **options)
    actual = pipeline.sample_progressive(7, [2, 3], LABELS)
    for (step, x, _), (expected_step, expected_x, _) in zip(actual, expected, strict=True):
        assert step == expected_step
        assert torch.equal(x, expected_x)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim-eta"])
def test_the_noise_of_a_step_is_drawn_while_the_network_computes_it(sampler, monkeypatch):
    """Draw and network wait for each other, so a step takes the longer of the two times and not their sum."""
    meeting = threading.Barrier(2, timeout=60)

    def slow_step_noise(*args):
        draw = step_noise(*args)

        def noise(step):
            meeting.wait()
            return draw(step)

        return noise

    pipeline = pipeline_of(sampler, scale=0.0)
    expected, _ = sampled(pipeline, RunSettings())

    def slow_network(_, args):
        if args[1][0] > 0:  # the last step adds no noise
            meeting.wait()

    pipeline.network.register_forward_pre_hook(slow_network)
    monkeypatch.setattr("sagl.sampling.pipeline.step_noise", slow_step_noise)
    assert torch.equal(sampled(pipeline, RunSettings())[0], expected)


def test_a_sampler_may_need_noise_in_any_order():
    pipeline, shape = pipeline_of("ddpm"), (3, 16, 16)
    expected, noise = (
        step_noise(7, [2, 3], shape, torch.device("cpu")),
        pipeline._step_noise(7, [2, 3], torch.device("cpu")),
    )
    for step in (2, 2, 3, 1, 4):
        assert torch.equal(noise(step), expected(step))


# ----------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("batch_size", [1, 4, 5])
@pytest.mark.parametrize("first_id", [0, 3, 4, 11])
@pytest.mark.parametrize("num_samples", [1, 4, 9])
def test_micro_batches_are_full_aligned_and_hold_every_sample_once(num_samples, first_id, batch_size):
    samples = range(first_id, first_id + num_samples)
    batches = list(id_batches(RunSettings(num_samples=num_samples, first_id=first_id, batch_size=batch_size)))
    assert all(ids == list(range(ids[0], ids[0] + batch_size)) for ids in batches)
    assert all(ids[0] % batch_size == 0 for ids in batches)
    assert all(set(ids) & set(samples) for ids in batches)
    assert [i for ids in batches for i in ids if i in samples] == list(samples)


# ------------------------------------------------------------------------------------------------------ labels


def test_a_random_label_is_that_of_its_seed_and_id():
    assert make_labels(RunSettings(seed=3), [7, 5], grey_unet()).tolist() == random_labels(3, [7, 5], 3)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [("2", [2, 2, 2, 2]), ("0,2", [2, 0, 2, 0]), ("2, 0, 1", [1, 2, 0, 1]), ("balanced", [2, 0, 1, 2])],
)
def test_listed_and_balanced_labels_are_taken_in_turn_by_id(labels, expected):
    assert make_labels(RunSettings(labels=labels), [5, 6, 7, 8], grey_unet()).tolist() == expected


@pytest.mark.parametrize(
    ("labels", "network"),
    [("null", {}), *((labels, {"num_classes": None, "null_label": False}) for labels in ("random", "null"))],
)
def test_the_null_label_and_those_of_an_unconditional_network_are_none(labels, network):
    assert make_labels(RunSettings(labels=labels), [0], grey_unet(**network)) is None


# ----------------------------------------------------------------------------------------------- scale and cost


@every_sampler
def test_a_guidance_of_scale_0_or_an_empty_interval_gives_the_unguided_bytes(sampler):
    network = stable_unet()
    on = pipeline_of(sampler, network=network)
    unguided, guided = (sampled(pipeline, RunSettings())[0] for pipeline in (on.unguided, on))
    assert float((guided - unguided).abs().max()) > 1e-3
    for inactive in ({"scale": 0.0}, {"interval": (0.5, 0.5)}):
        off = pipeline_of(sampler, network=network, **inactive)
        assert off.nfe == on.unguided.nfe < on.nfe
        images, mask_frequency = sampled(off, RunSettings())
        assert mask_frequency is None
        assert torch.equal(images, unguided), inactive


@pytest.mark.parametrize(
    ("sampler", "settings", "nfe"),
    [
        ("ddim", {"scale": 0.0}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("ddim", {}, [2, 2, 2, 2, 2, 2, 2, 2]),
        ("ddim", {"scale": -0.1, "interval": (0.25, 0.75)}, [1, 1, 2, 2, 2, 2, 1, 1]),
        ("ddim", {"interval": (0, 0.125)}, [2, 1, 1, 1, 1, 1, 1, 1]),
        ("ddim", {"interval": (0.5, 0.5)}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("ddim", {"scale": 0.0, "cfg_scale": 1.0}, [2, 2, 2, 2, 2, 2, 2, 2]),
        ("ddim", {"scale": 0.0, "classifier_scale": 3.0}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("ddim", {"cfg_scale": -0.5}, [3, 3, 3, 3, 3, 3, 3, 3]),
        ("ddim", {"interval": (0.25, 0.5), "cfg_scale": 1.0}, [2, 2, 3, 3, 2, 2, 2, 2]),
        ("ddim", {"interval": (0.5, 1.0), "cfg_scale": 1.0, "classifier_scale": 2.0}, [2, 2, 2, 2, 3, 3, 3, 3]),
        ("ddim", {"renew_every": 4, "cfg_scale": 0.3}, [3, 2, 2, 2, 3, 2, 2, 2]),
        ("ddim", {"renew_every": 2, "interval": (0.25, 0.75)}, [1, 1, 2, 1, 2, 1, 1, 1]),
        ("ddim", {"renew_every": 3, "shape": "off_unsharp", "mask": "random"}, [2, 1, 1, 2, 1, 1, 2, 1]),
        ("ddim", {"stop_below": 1e-9, "max_norm": 0.1, "shape": "high_pass"}, [2, 2, 2, 2, 2, 2, 2, 2]),
        ("heun", {"scale": 0.0}, [2, 2, 2, 1]),
        ("heun", {}, [4, 4, 4, 2]),
        ("heun", {"interval": (0.5, 0.75)}, [2, 3, 3, 1]),  # a step's second evaluation is at the next step
        ("heun", {"renew_every": 2}, [3, 3, 3, 1]),
        ("heun", {"interval": (0.5, 0.75), "cfg_scale": 1.0}, [4, 5, 5, 2]),
    ],
)
def test_nfe_counts_every_call_of_the_network(sampler, settings, nfe):
    network = stable_unet()
    calls = count_calls(network)
    pipeline = pipeline_of(sampler, network=network, **settings)
    with torch.inference_mode():
        assert [p.nfe for _, _, p in pipeline.sample_progressive(0, [0, 1], LABELS)] == nfe
    assert pipeline.nfe == len(calls) == sum(nfe)
    assert pipeline.unguided.nfe == (7 if sampler == "heun" else 8)


@pytest.mark.parametrize(
    ("settings", "num_weak"),
    [
        ({}, 8),
        ({"scale": 0.0}, 0),
        ({"interval": (0.25, 0.75)}, 4),
        ({"renew_every": 3}, 3),
        ({"stop_below": 1e9}, 1),
        ({"stop_below": 1e9, "interval": (0.5, 0.5)}, 0),
        ({"direction_head": "auto"}, 0),
        ({"direction_head": "auto", "renew_every": 4}, 2),
        ({"cfg": {"interval": (0.0, 0.5)}}, 8),
        ({"cfg": {"reuse_before": "output.1"}, "renew_every": 3}, 3),
        ({"cfg": {"renew_every": 2}, "stop_below": 1e9}, 1),
        ({"cfg": {"stop_below": 1e9}}, 8),
        ({"sampler": "heun", "interval": (0.0, 0.5)}, 7),
    ],
    ids=str,
)
def test_flops_are_those_of_the_networks_that_were_evaluated(settings, num_weak, tmp_path, monkeypatch):
    """The weaker network is much smaller, and each of its evaluations counts as one."""
    monkeypatch.setattr("sagl.sampling.pipeline.load_head", lambda *_: lambda images, *_: 0.1 * images[:, :1])
    weak_file = write_grey_unet(tmp_path / "weak.safetensors")
    settings = {"sampler": "ddim", "scale": 0.5, **settings}
    guidances = {"cfg": ClassifierFreeGuidance(scale=0.5, **settings.pop("cfg"))} if "cfg" in settings else {}
    sampler = SamplerSettings(sampler=settings.pop("sampler"), respacing="8")
    guidances["autoguidance"] = Autoguidance(checkpoint=str(weak_file), **settings)
    pipeline = build_pipeline(grey_unet(num_channels=64), DiffusionSettings(), sampler, guidances)
    with torch.inference_mode():
        nfe = sum(p.nfe for _, _, p in pipeline.sample_progressive(0, [0], torch.tensor([1])))
    flops, weak_flops = (flops_per_evaluation(network.settings) for network in (pipeline.network, grey_unet()))
    expected = (nfe - num_weak) * flops + num_weak * weak_flops
    assert pipeline.cost(nfe) == {"nfe": nfe, "flops": pytest.approx(expected)}
    assert weak_flops < flops / 2


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "value"),
    [({"site": "output.7"}, "`sag.site` .*'output.7'"), ({"sampler": SamplerSettings(respacing="1001")}, "1001")],
)
def test_settings_that_do_not_fit_the_network_are_refused_before_it_is_evaluated(settings, value):
    network = stable_unet()
    calls = count_calls(network)
    with pytest.raises(UserError, match=value):
        pipeline_of(**{"sampler": "ddpm", "network": network, **settings})
    assert calls == []


def test_an_unknown_guidance_is_refused():
    with pytest.raises(UserError, match=r"`guidances`.*sag, .*cfg, classifier.*'abc'"):
        build_pipeline(stable_unet(), DiffusionSettings(), CHAINS["ddim"], {"abc": ClassifierFreeGuidance(scale=1.0)})


@every_sampler
def test_images_of_a_network_in_bfloat16_are_float32(sampler):
    network = cast_weights(stable_unet(), "bf16-true", torch.device("cpu"))
    chain = CHAINS[sampler]
    short = replace(chain, respacing="logsnr3" if chain.respacing.startswith("logsnr") else "3")
    images, _ = sampled(pipeline_of(short, network=network), RunSettings())
    assert images.dtype == torch.float32
    assert bool(images.isfinite().all())


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_network_without_learned_variance_samples_with_a_fixed_one(variance):
    diffusion = DiffusionSettings(variance=variance)
    pipeline = pipeline_of("ddpm", network=stable_unet(learn_sigma=False), diffusion=diffusion)
    assert bool(sampled(pipeline, RunSettings())[0].isfinite().all())


# ------------------------------------------------------------------------------------------------- classifiers


def test_a_classifier_is_loaded_by_file_and_compared_with_the_network(tmp_path):
    guidances = {"classifier": ClassifierGuidance(scale=1.0, checkpoint=str(tmp_path / "c.safetensors"))}
    arguments = (grey_unet(), DiffusionSettings(), CHAINS["ddim"], guidances)
    with pytest.raises(UserError, match=r"`classifier\.checkpoint`.*c\.safetensors"):
        build_pipeline(*arguments)
    write_grey_classifier(tmp_path / "c.safetensors")
    images, _ = build_pipeline(*arguments).sample(0, [0, 1], torch.tensor([0, 2]))
    assert float((images - build_pipeline(*arguments[:3]).sample(0, [0, 1], torch.tensor([0, 2]))[0]).abs().max()) > 0
    write_grey_classifier(tmp_path / "c.safetensors", num_classes=4)
    with pytest.raises(UserError, match=r"`classifier\.checkpoint`.*4 classes"):
        build_pipeline(*arguments)


@pytest.mark.parametrize(("name", "value"), [("imagenet256_classifier", "256x256"), ("lsun_cat", "lsun_cat")])
def test_a_classifier_whose_name_does_not_fit_is_refused_before_a_download(name, value, monkeypatch):
    monkeypatch.setattr(loading, "download", lambda *_, **__: pytest.fail("downloaded"))
    guidances = {"classifier": ClassifierGuidance(scale=1.0, checkpoint=name)}
    with pytest.raises(UserError, match=rf"`classifier\.checkpoint`.*{value}"):
        build_pipeline(grey_unet(), DiffusionSettings(), CHAINS["ddim"], guidances)


# ---------------------------------------------------------------------------------- masks and x0 predictions


def prediction_with(mask):
    terms = {} if mask is None else {"sag": GuidanceTerm(extras={"mask": torch.tensor(mask).view(1, 1, 1, 3)})}
    return Prediction(eps=torch.zeros(1, 1, 1, 3), log_variance=torch.tensor(0.0), terms=terms)


def test_the_mask_frequency_counts_guided_steps_alone():
    masks = [None, [True, False, True], [True, False, False], None, [True, False, False], [True, False, True]]
    images, frequency = run_to_end(
        (5 - k, torch.full((1, 1, 1, 3), float(k)), prediction_with(m)) for k, m in enumerate(masks)
    )
    assert frequency.flatten().tolist() == [1.0, 0.0, 0.5]
    assert images.flatten().tolist() == [5.0, 5.0, 5.0]


@every_sampler
def test_x0_predictions_are_x0_hat_of_every_step_clipped_with_its_mask(sampler):
    pipeline, ids = pipeline_of(sampler, cfg_scale=1.0, interval=(0.5, 1.0)), [2, 3]
    with torch.inference_mode():
        actual = list(x0_predictions(pipeline, 7, ids, LABELS))
        steps = list(pipeline.sample_progressive(7, ids, LABELS))
    x = initial_noise(7, ids, (3, 16, 16))
    for (step, x0_hat, mask), (expected_step, x_next, prediction) in zip(actual, steps, strict=True):
        alpha_bar = float(pipeline.schedule.alpha_bar(step))
        expected = (x - (1 - alpha_bar) ** 0.5 * prediction.eps) / alpha_bar**0.5
        assert step == expected_step
        torch.testing.assert_close(x0_hat, expected.clamp(-1, 1), rtol=1e-4, atol=1e-4)
        expected_mask = prediction.terms["sag"].extras["mask"] if "sag" in prediction.terms else None
        assert (mask is None) == (expected_mask is None) == (step >= pipeline.schedule.num_steps / 2)
        assert mask is None or torch.equal(mask, expected_mask)
        x = x_next
    if sampler not in ("ddpm", "ddim-eta"):  # deterministic, so that the last x0_hat is the image
        torch.testing.assert_close(actual[-1][1], steps[-1][1], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_network_is_two_whole_graphs_for_all_steps_and_batches():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    sampler, run = SamplerSettings(sampler="ddim", respacing="8"), RunSettings(num_samples=4, batch_size=2)
    expected = [sampled(pipeline_of(sampler, interval=(0.3, 0.8)), run, ids)[0] for ids in ((0, 1), (2, 3))]
    network = stable_unet()
    network.compile(dynamic=False, fullgraph=True, backend=backend)
    pipeline = pipeline_of(sampler, network=network, interval=(0.3, 0.8))
    try:
        actual = [sampled(pipeline, run, ids)[0] for ids in ((0, 1), (2, 3))]
    finally:
        torch.compiler.reset()
    assert len(graphs) == 2  # one without attention, one that returns it
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
