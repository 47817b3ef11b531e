from collections import Counter
from functools import cache

import pytest
import torch

from sagl.diffusion.noise import initial_noise, step_noise
from sagl.diffusion.predictor import Condition, GuidanceTerm, Prediction, make_predictor
from sagl.errors import UserError
from sagl.guidance.base import with_guidance
from sagl.samplers.ddim import ddim
from sagl.samplers.ddpm import ddpm
from sagl.sampling.pipeline import build_pipeline, make_labels, run_to_end, x0_predictions
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import ClassifierFreeGuidance, ClassifierGuidance, SelfAttentionGuidance
from sagl.settings.sampling import RunSettings, SamplerSettings, micro_batches
from tests.helpers.reference import small_classifier
from tests.helpers.tiny import calm_unet, count_calls, grey_unet

CHAINS = [
    SamplerSettings(sampler="ddpm", respacing="6"),
    SamplerSettings(sampler="ddim", respacing="ddim8"),
    SamplerSettings(sampler="ddim", respacing="6", eta=0.7, clip_x0=False),
]
SAG = {"scale": 0.5, "site": "output.1", "blur_sigma": 1.0}
every_chain = pytest.mark.parametrize("chain", CHAINS, ids=["ddpm", "ddim", "ddim-eta"])


def recipe_of(chain, *, network=None, classifier_scale=0.0, cfg_scale=0.0, diffusion=None, **sag):
    """A recipe on the small colour network, with SAG unless its scale is 0."""
    return build_pipeline(
        network or calm_unet(),
        diffusion or DiffusionSettings(),
        chain,
        {
            "sag": SelfAttentionGuidance(**{**SAG, **sag}),
            "classifier": ClassifierGuidance(scale=classifier_scale, checkpoint="small"),
            "cfg": ClassifierFreeGuidance(scale=cfg_scale),
        },
        load_classifier=lambda name: small_classifier(),
    )


def images_of(recipe, run, ids=(0, 1)):
    """What a recipe makes of these ids, and the masked shares."""
    with torch.inference_mode():
        return run_to_end(recipe.sample_progressive(run.seed, list(ids), make_labels(run, list(ids), recipe.network)))


@cache
def steps_of(sample_id, run, chain):
    """One sample of a run, step by step: its image and its mask."""
    recipe = recipe_of(chain)
    (ids,) = (ids for ids in micro_batches(run) if sample_id in ids)
    row = ids.index(sample_id)
    with torch.inference_mode():
        chain = list(recipe.sample_progressive(run.seed, ids, make_labels(run, ids, recipe.network)))
    return [(x[row], p.terms["sag"].extras["mask"][row]) for _, x, p in chain]


# ---------------------------------------------------------------------------------- one sample, whatever the run


@every_chain
@pytest.mark.parametrize(
    "short", [RunSettings(num_samples=6, batch_size=4), RunSettings(num_samples=1, first_id=5, batch_size=4)]
)
def test_sample_5_of_a_run_of_8_is_the_same_bytes_in_another_run_at_the_same_batch_size(chain, short):
    long = RunSettings(num_samples=8, batch_size=4)
    for (x, mask), (other, other_mask) in zip(steps_of(5, long, chain), steps_of(5, short, chain), strict=True):
        assert torch.equal(x, other)
        assert torch.equal(mask, other_mask)


@every_chain
@pytest.mark.parametrize("batch_size", [1, 3, 6])
def test_sample_5_of_a_run_of_8_is_that_of_a_run_of_6_at_another_batch_size(chain, batch_size, record_property):
    """Within rounding, up to a step where a token flips over the threshold; flips are counted and named."""
    want = steps_of(5, RunSettings(num_samples=8, batch_size=4), chain)
    got = steps_of(5, RunSettings(num_samples=6, batch_size=batch_size), chain)
    assert 0.1 < float(want[0][1].float().mean()) < 0.9
    flips, largest = 0, 0.0
    for (x, mask), (other, other_mask) in zip(want, got, strict=True):
        flips += int((mask != other_mask)[:, ::2, ::2].sum())  # a token of 8x8 is two pixels wide
        if flips:
            break
        largest = max(largest, float((x - other).abs().max()))
    record_property("tokens flipped", flips)
    assert flips <= 1, f"{flips} mask tokens flipped in one step: more than rounding at the threshold explains"
    assert largest <= 1e-5, f"images differ by {largest:.1e}; mask tokens that flipped: {flips}"


@every_chain
def test_a_seed_and_an_id_give_an_image_of_their_own(chain):
    recipe = recipe_of(chain)
    images, _ = images_of(recipe, RunSettings(seed=0), ids=(0, 1))
    others, _ = images_of(recipe, RunSettings(seed=1), ids=(0, 1))
    drawn = [*images, *others]
    assert min(float((a - b).abs().max()) for i, a in enumerate(drawn) for b in drawn[:i]) > 0.1


@every_chain
def test_a_chain_is_its_sampler_over_the_guided_network(chain):
    network = calm_unet()
    recipe, labels = recipe_of(chain, network=network), torch.tensor([1, 4])
    shape = (3, 16, 16)
    denoise = with_guidance(make_predictor(network, recipe.schedule, "learned_range"), recipe.guidances)
    told = (denoise, initial_noise(7, [2, 3], shape), Condition(labels=labels), recipe.schedule)
    noise = step_noise(7, [2, 3], shape, torch.device("cpu"))
    if chain.sampler == "ddpm":
        want = list(ddpm(*told, noise, clip_x0=chain.clip_x0))
    else:
        want = list(ddim(*told, noise, clip_x0=chain.clip_x0, eta=chain.eta))
    for (step, x, _), (want_step, want_x, _) in zip(recipe.sample_progressive(7, [2, 3], labels), want, strict=True):
        assert step == want_step
        assert torch.equal(x, want_x)


# ----------------------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("batch_size", [1, 4, 5])
@pytest.mark.parametrize("first_id", [0, 3, 4, 11])
@pytest.mark.parametrize("num_samples", [1, 4, 9])
def test_micro_batches_are_always_whole_aligned_and_hold_every_sample_once(num_samples, first_id, batch_size):
    wanted = range(first_id, first_id + num_samples)
    batches = list(micro_batches(RunSettings(num_samples=num_samples, first_id=first_id, batch_size=batch_size)))
    assert all(ids == list(range(ids[0], ids[0] + batch_size)) for ids in batches)
    assert all(ids[0] % batch_size == 0 for ids in batches)
    assert all(set(ids) & set(wanted) for ids in batches)
    assert [i for ids in batches for i in ids if i in wanted] == list(wanted)


# ------------------------------------------------------------------------------------------------------ labels


def test_a_random_label_is_a_function_of_seed_and_id_alone():
    network, ids = grey_unet(), list(range(200))
    labels = make_labels(RunSettings(seed=3), ids, network).tolist()
    assert make_labels(RunSettings(seed=3, num_samples=7, batch_size=5), ids[50:60], network).tolist() == labels[50:60]
    assert make_labels(RunSettings(seed=3), ids[::-1], network).tolist() == labels[::-1]
    assert make_labels(RunSettings(seed=4), ids, network).tolist() != labels
    counts = Counter(labels)
    assert set(counts) == {0, 1, 2}
    assert min(counts.values()) > 200 / 3 * 0.7


def test_balanced_labels_are_the_classes_in_turn_by_id():
    assert make_labels(RunSettings(labels="balanced"), [5, 6, 7, 8], grey_unet()).tolist() == [2, 0, 1, 2]


@pytest.mark.parametrize(("labels", "want"), [("2", [2, 2, 2, 2]), ("0,2", [2, 0, 2, 0]), ("2, 0, 1", [1, 2, 0, 1])])
def test_listed_labels_are_taken_in_turn_by_id(labels, want):
    assert make_labels(RunSettings(labels=labels), [5, 6, 7, 8], grey_unet()).tolist() == want


def test_the_null_label_is_no_label():
    assert make_labels(RunSettings(labels="null"), [0, 1], grey_unet()) is None


@pytest.mark.parametrize("labels", ["random", "null"])
def test_an_unconditional_network_has_no_labels(labels):
    assert make_labels(RunSettings(labels=labels), [0], grey_unet(num_classes=None, null_label=False)) is None


@pytest.mark.parametrize(
    ("labels", "network", "came"),
    [
        ("3", {}, "3"),
        ("0,7,1", {}, "7"),
        ("null", {"null_label": False}, "null"),
        ("1", {"num_classes": None, "null_label": False}, "'1'"),
        ("balanced", {"num_classes": None, "null_label": False}, "'balanced'"),
    ],
)
def test_labels_that_the_network_does_not_have_are_refused(labels, network, came):
    with pytest.raises(UserError) as error:
        make_labels(RunSettings(labels=labels), [0], grey_unet(**network))
    assert "`labels`" in str(error.value)
    assert came in str(error.value)


# ----------------------------------------------------------------------------------------------- scale and cost


@every_chain
def test_scale_0_leaves_guidance_out_and_gives_the_bytes_of_the_unguided_recipe(chain):
    network = calm_unet()
    off, on = recipe_of(chain, network=network, scale=0.0), recipe_of(chain, network=network)
    assert off.guidances == {}
    assert off.nfe == on.unguided.nfe == off.schedule.num_steps
    plain, share = images_of(off, RunSettings())
    unguided, _ = images_of(on.unguided, RunSettings())
    assert share is None
    assert torch.equal(plain, unguided)
    assert float((images_of(on, RunSettings())[0] - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("scale", [0.5, -0.1])
@pytest.mark.parametrize(
    ("interval", "guided_steps"), [((0, 1), 8), ((0.25, 0.75), 4), ((0.5, 1), 4), ((0, 0.125), 1), ((0.5, 0.5), 0)]
)
def test_nfe_is_the_number_of_network_calls_inside_and_outside_an_interval(interval, guided_steps, scale):
    network = calm_unet()
    calls = count_calls(network)
    recipe = recipe_of(CHAINS[1], network=network, interval=interval, scale=scale)
    paid, before = [], 0
    for _, _, prediction in recipe.sample_progressive(0, [0, 1], torch.tensor([0, 1])):
        assert len(calls) - before == prediction.nfe
        paid, before = [*paid, len(calls) - before], len(calls)
    start = round(interval[0] * 8)
    assert paid == [2 if start <= position < start + guided_steps else 1 for position in range(8)]
    assert recipe.nfe == sum(paid) == 8 + guided_steps


@every_chain
def test_an_interval_of_nothing_gives_the_unguided_bytes(chain):
    recipe = recipe_of(chain, interval=(0.5, 0.5))
    images, share = images_of(recipe, RunSettings())
    assert share is None
    assert torch.equal(images, images_of(recipe.unguided, RunSettings())[0])


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"site": "output.7"}, ("`site`", "output.1 (8x8)", "'output.7'")),
        ({"site": "input.0"}, ("`site`", "middle", "'input.0'")),
        ({"kernel_size": 33}, ("`sag.kernel_size`", "31", "33")),
        ({"chain": SamplerSettings(respacing="1001")}, ("`respacing`", "1000", "1001")),
        ({"chain": SamplerSettings(respacing="many")}, ("`respacing`", "'many'")),
        ({"network": {"learn_sigma": False}}, ("`variance`", "learn_sigma", "fixed_small")),
        ({"network": {"null_label": False}, "cfg_scale": 1.0}, ("`cfg.scale`", "null label")),
    ],
)
def test_prepare_refuses_what_does_not_fit_the_network_before_anything_runs(wrong, named):
    network = calm_unet(**wrong.pop("network", {}))
    calls = count_calls(network)
    with pytest.raises(UserError) as error:
        recipe_of(wrong.pop("chain", CHAINS[0]), network=network, **wrong)
    assert [part for part in named if part not in str(error.value)] == []
    assert calls == []


def test_classifier_guidance_without_a_classifier_is_refused():
    with pytest.raises(UserError, match=r"`classifier\.scale` needs a classifier"):
        build_pipeline(calm_unet(), DiffusionSettings(), CHAINS[0], {"classifier": ClassifierGuidance(scale=1.0)})


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_network_without_learned_variance_samples_with_a_fixed_one(variance):
    recipe = recipe_of(CHAINS[0], network=calm_unet(learn_sigma=False), diffusion=DiffusionSettings(variance=variance))
    images, _ = images_of(recipe, RunSettings())
    assert bool(images.isfinite().all())


# ------------------------------------------------------------------------------------------------------- masks


def prediction_with(mask):
    terms = {} if mask is None else {"sag": GuidanceTerm(extras={"mask": torch.tensor(mask).view(1, 1, 1, 3)})}
    return Prediction(eps=torch.zeros(1, 1, 1, 3), log_variance=torch.tensor(0.0), terms=terms)


def test_the_masked_share_counts_guided_steps_alone():
    masks = [None, [True, False, True], [True, False, False], None, [True, False, False], [True, False, True]]
    images, share = run_to_end(
        (5 - k, torch.full((1, 1, 1, 3), float(k)), prediction_with(m)) for k, m in enumerate(masks)
    )
    assert share.flatten().tolist() == [1.0, 0.0, 0.5]
    assert images.flatten().tolist() == [5.0, 5.0, 5.0]


def test_there_is_no_masked_share_where_nothing_was_masked():
    assert run_to_end(iter([(0, torch.zeros(1, 1, 1, 3), prediction_with(None))]))[1] is None


def test_the_masked_share_of_a_run_is_what_its_steps_say():
    recipe = recipe_of(CHAINS[1], interval=(0.25, 1))
    with torch.inference_mode():
        chain = list(recipe.sample_progressive(0, [0, 1], torch.tensor([0, 1])))
    masks = [p.terms["sag"].extras["mask"] for _, _, p in chain if p.terms]
    assert len(masks) == 6
    images, share = run_to_end(iter(chain))
    assert share.shape == (2, 1, 16, 16)
    torch.testing.assert_close(share, sum(mask.double() for mask in masks).float() / 6)
    assert 0.2 < float(share.mean()) < 0.8
    assert torch.equal(images, chain[-1][1])


# ----------------------------------------------------------------------------------- SAG and a classifier together


@every_chain
def test_sag_and_classifier_guidance_run_together_in_inference_mode_and_out_of_it(chain):
    network = calm_unet()
    calls = count_calls(network)
    both = recipe_of(chain, network=network, classifier_scale=3.0)
    labels = torch.tensor([0, 3])
    with torch.inference_mode():
        inside, share = run_to_end(both.sample_progressive(0, [0, 1], labels))
    assert len(calls) == both.nfe == 2 * both.schedule.num_steps
    outside, _ = run_to_end(both.sample_progressive(0, [0, 1], labels))
    assert share is not None
    assert bool(inside.isfinite().all())
    torch.testing.assert_close(inside, outside, rtol=0, atol=1e-5)
    alone = [recipe_of(chain, network=network), recipe_of(chain, network=network, classifier_scale=3.0, scale=0.0)]
    for recipe in alone:
        assert float((run_to_end(recipe.sample_progressive(0, [0, 1], labels))[0] - outside).abs().max()) > 1e-3


def test_classifier_guidance_costs_no_call_of_the_network():
    recipe = recipe_of(CHAINS[0], classifier_scale=3.0, scale=0.0)
    assert set(recipe.guidances) == {"classifier"}
    assert recipe.nfe == recipe.schedule.num_steps


# ------------------------------------------------------------------------------------------- several guidances


@pytest.mark.parametrize(
    ("guidances", "paid"),
    [
        ({"scale": 0.0}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"scale": 0.0, "cfg_scale": 1.0}, [2, 2, 2, 2, 2, 2, 2, 2]),
        ({"cfg_scale": -0.5}, [3, 3, 3, 3, 3, 3, 3, 3]),
        ({"interval": (0.25, 0.5), "cfg_scale": 1.0}, [2, 2, 3, 3, 2, 2, 2, 2]),
        ({"interval": (0.5, 1.0), "cfg_scale": 1.0, "classifier_scale": 2.0}, [2, 2, 2, 2, 3, 3, 3, 3]),
    ],
)
def test_nfe_counts_every_call_of_the_network_by_every_guidance(guidances, paid):
    network = calm_unet()
    calls = count_calls(network)
    recipe = recipe_of(CHAINS[1], network=network, **guidances)
    with torch.inference_mode():
        assert [p.nfe for _, _, p in recipe.sample_progressive(0, [0, 1], torch.tensor([0, 1]))] == paid
    assert recipe.nfe == len(calls) == sum(paid)
    assert recipe.unguided.nfe == 8


# --------------------------------------------------------------------------------------------------- estimates


@every_chain
def test_estimates_are_x0_hat_of_every_step_clipped_with_the_mask_of_the_step(chain):
    recipe = recipe_of(chain, cfg_scale=1.0, interval=(0.5, 1.0))
    ids, labels = [2, 3], torch.tensor([1, 4])
    with torch.inference_mode():
        got = list(x0_predictions(recipe, 7, ids, labels))
        steps = list(recipe.sample_progressive(7, ids, labels))
    x = initial_noise(7, ids, (3, 16, 16))
    for (step, x0_hat, mask), (want_step, after, prediction) in zip(got, steps, strict=True):
        alpha_bar = float(recipe.schedule.alpha_bar(step))
        want = (x - (1 - alpha_bar) ** 0.5 * prediction.eps) / alpha_bar**0.5
        assert step == want_step
        torch.testing.assert_close(x0_hat, want.clamp(-1, 1), rtol=1e-4, atol=1e-4)
        noted = prediction.terms["sag"].extras["mask"] if "sag" in prediction.terms else None
        assert (mask is None) == (noted is None) == (step >= recipe.schedule.num_steps / 2)
        assert mask is None or torch.equal(mask, noted)
        x = after


def test_the_last_estimate_of_a_deterministic_chain_is_its_image():
    recipe = recipe_of(CHAINS[1])
    with torch.inference_mode():
        *_, (step, x0_hat, _) = x0_predictions(recipe, 0, [0, 1], torch.tensor([0, 1]))
    images, _ = run_to_end(recipe.sample_progressive(0, [0, 1], torch.tensor([0, 1])))
    assert step == 0
    torch.testing.assert_close(x0_hat, images, rtol=0, atol=1e-5)


def test_the_estimates_of_a_recipe_without_guidance_mask_nothing():
    recipe = recipe_of(CHAINS[0]).unguided
    with torch.inference_mode():
        assert [mask for _, _, mask in x0_predictions(recipe, 0, [0], torch.tensor([0]))] == [None] * 6


def test_a_compiled_network_is_two_whole_graphs_whatever_the_step_and_the_batch():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    chain, run = SamplerSettings(sampler="ddim", respacing="8"), RunSettings(num_samples=4, batch_size=2)
    want = [images_of(recipe_of(chain, interval=(0.3, 0.8)), run, ids)[0] for ids in ((0, 1), (2, 3))]
    network = calm_unet()
    network.compile(dynamic=False, fullgraph=True, backend=backend)
    recipe = recipe_of(chain, network=network, interval=(0.3, 0.8))
    try:
        got = [images_of(recipe, run, ids)[0] for ids in ((0, 1), (2, 3))]
    finally:
        torch.compiler.reset()
    assert len(graphs) == 2  # a plain pass, and one that brings attention back
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
