import pytest
import torch
from torchvision.transforms.functional import gaussian_blur as torchvision_blur

from sagl.diffusion.predictor import Condition, GuidanceTerm, Prediction, make_predictor
from sagl.diffusion.schedule import make_schedule
from sagl.guidance.base import Guidance, with_guidance
from sagl.guidance.shaping import shape_guidance
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import ClassifierFreeGuidance, SelfAttentionGuidance
from tests.helpers.networks import toy_network
from tests.helpers.predictors import NO_CONDITION, guidances_of
from tests.helpers.reference_values import generator

SCHEDULE, STEP = make_schedule(DiffusionSettings(), "10"), 6
BAR = float(SCHEDULE.alpha_bar(STEP))
X, EPS, D = torch.randn(3, 2, 3, 16, 16, generator=generator(0), dtype=torch.float64)
MASK = torch.rand(2, 1, 16, 16, generator=generator(1)) < 0.4
X0_HAT = ((X - (1 - BAR) ** 0.5 * EPS) / BAR**0.5).clamp(-1, 1)
UNSHARP = MASK * (X0_HAT - torchvision_blur(X0_HAT, [31, 31], [1.5, 1.5]))
LABELS = torch.tensor([0, 1])


def linear(x_t, step, condition):
    return Prediction(eps=EPS, log_variance=torch.tensor(0.0))


def shaped(term=None, scale=0.5, **settings):
    """The term of one step after its shape; by default one of eps D and SAG's mask."""
    term = term or GuidanceTerm(eps=D, extras={"mask": MASK}, nfe=1)
    guidance = Guidance(term=lambda *_: term)
    s = SelfAttentionGuidance(scale=scale, blur_sigma=1.5, **settings)
    guided = with_guidance(linear, {"sag": shape_guidance(guidance, s, SCHEDULE)})(X, STEP, NO_CONDITION)
    assert guided.nfe == 1 + term.nfe
    return guided.terms["sag"]


def projected(direction, onto):
    """The projection of each sample, with the samples as vectors."""
    d, v = direction.flatten(1), onto.flatten(1)
    v = v / v.norm(dim=1, keepdim=True)
    return ((d * v).sum(dim=1, keepdim=True) * v).view_as(direction)


def dots(a, b):
    return (a * b).flatten(1).sum(dim=1)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ("off_x0", projected(D, X0_HAT)),
        ("off_unsharp", projected(D, UNSHARP)),
        ("high_pass", torchvision_blur(D, [31, 31], [1.5, 1.5])),
    ],
)
def test_a_shape_gives_one_part_of_the_term_its_weight(shape, part, weight):
    actual = shaped(shape=shape, shape_weight=weight).eps
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, (D - part) + weight * part, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("shape", "other"), [("off_x0", X0_HAT), ("off_unsharp", UNSHARP)])
def test_what_is_projected_off_is_orthogonal_to_the_rest(shape, other):
    torch.testing.assert_close(dots(shaped(shape=shape).eps, other), torch.zeros(2).double(), rtol=0, atol=1e-8)


def test_without_a_mask_the_unsharp_mask_is_that_of_the_whole_image():
    whole = X0_HAT - torchvision_blur(X0_HAT, [31, 31], [2.0, 2.0])
    actual = shaped(GuidanceTerm(eps=D), shape="off_unsharp", shape_sigma=2.0).eps
    torch.testing.assert_close(actual, D - projected(D, whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [0.5, -2.0])
@pytest.mark.parametrize("max_norm", [0.1, 1.0, 100.0])
def test_the_norm_of_the_unscaled_difference_of_x0_hat_is_limited(scale, max_norm):
    d = D * torch.tensor([0.01, 3.0])[:, None, None, None]
    actual = shaped(GuidanceTerm(eps=scale * d), scale, max_norm=max_norm).eps
    norms = ((1 - BAR) / BAR) ** 0.5 * d.flatten(1).square().mean(dim=1).sqrt()
    expected = scale * d * (max_norm / norms).clamp(max=1)[:, None, None, None]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_a_score_is_shaped_as_the_eps_that_it_stands_for():
    root = (1 - BAR) ** 0.5
    options = {"shape": "off_x0", "max_norm": 0.3}
    by_score, by_eps = shaped(GuidanceTerm(score=D), **options), shaped(GuidanceTerm(eps=-root * D), **options)
    torch.testing.assert_close(-root * by_score.score, by_eps.eps)
    assert by_score.eps == 0


def test_the_limit_comes_before_the_projection_as_in_apg():
    limited = shaped(max_norm=0.3).eps
    torch.testing.assert_close(shaped(max_norm=0.3, shape="off_x0").eps, limited - projected(limited, X0_HAT))


def test_a_term_of_nothing_stays_so():
    term = shaped(GuidanceTerm(), shape="off_unsharp", max_norm=1.0)
    assert (term.eps, term.score) == (0.0, 0.0)


def test_the_shape_of_a_sample_does_not_depend_on_the_others():
    def eps(rows):
        guidances = guidances_of(SCHEDULE, cfg={"scale": 1.5, "shape": "off_x0", "max_norm": 0.05})
        predict = with_guidance(make_predictor(toy_network, SCHEDULE, "learned_range"), guidances)
        return predict(X[rows].float(), STEP, Condition(labels=LABELS[rows])).eps

    assert torch.equal(torch.cat([eps(slice(0, 1)), eps(slice(1, 2))]), eps(slice(0, 2)))


@pytest.mark.parametrize(
    "changes", [{"max_norm": 0.0}, {"max_norm": -1.0}, {"shape_sigma": 0.0}, {"shape": "off"}], ids=str
)
def test_impossible_shapes_are_refused(changes):
    with pytest.raises(ValueError, match=rf"`cfg\.{next(iter(changes))}`"):
        ClassifierFreeGuidance(**changes)
