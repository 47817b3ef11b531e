"""Guidance terms, and how they combine with the base prediction.

A guidance method computes one term from x_t, the base prediction of the step and, where it needs one, a further
evaluation of the network under another condition. The terms are summed, so n methods that need a weaker prediction
cost 1 + n network evaluations, in any order.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from torch import Tensor

from sagl.diffusion.predictor import Condition, EpsNetwork, GuidanceTerm, NoisePredictor, Prediction
from sagl.diffusion.schedule import Schedule
from sagl.guidance.masks import LoadClassAttention, load_class_attention
from sagl.settings.diffusion import DiffusionSettings
from sagl.settings.guidance import GuidanceSettings
from sagl.settings.network import UNetSettings
from sagl.shapes import AttentionEdit, Image, Mask, Timestep

NoisyClassifier = Callable[[Image, Timestep], Tensor]
"""A classifier of noisy images: ((B, C, H, W), (B,) timesteps) -> logits (B, classes)."""


@dataclass(frozen=True, kw_only=True)
class GuidanceContext:
    """Objects that a guidance method may use besides its own settings."""

    network: EpsNetwork
    """The network that is guided."""
    network_settings: UNetSettings
    diffusion: DiffusionSettings
    schedule: Schedule
    """Steps of the sampler."""
    load_network: Callable[[str, str], EpsNetwork]
    """Load another network: (name or file, weights of a .ckpt), with the device and precision of `network`."""
    load_classifier: Callable[[str], NoisyClassifier]
    """Load a classifier of noisy images by name or file, with the device and precision of `network`."""
    load_attention: LoadClassAttention = load_class_attention
    """Load the class attention of a DINO transformer from a file."""
    load_head: Callable[[GuidanceSettings, bool], "Head"]
    """Load the direction head of a method: (its settings, whether it has a mask), with the device and precision of
    `network`."""
    share_of_evaluation: Callable[[str], float]
    """Share of the operations of an evaluation that starts at an output block."""


def identity(condition: Condition) -> Condition:
    """Return the condition unchanged."""
    return condition


def always(step: int) -> bool:
    """Return True for every step."""
    return True


Term = Callable[[NoisePredictor, Image, int, Condition, Prediction], GuidanceTerm]
"""(predict, x_t, step, condition, base prediction) -> the term to add to the base prediction."""

MaskOfStep = Callable[[Image, int, Condition, Prediction], Mask]
"""(x_t, step, condition, base prediction) -> the mask."""
Head = Callable[[Tensor, Sequence[Tensor], Timestep], Image]
"""A direction head: (images of `direction_head.head_inputs`, maps of `direction_head.head_maps`, timesteps) -> eps -
eps of the weak prediction."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """One guidance method, ready to use."""

    term: Term
    """The method's term; it must not remember anything between steps."""
    prepare_condition: Callable[[Condition], Condition] = identity
    """Function that requests from the base prediction what the term needs, such as attention at a site."""
    is_active: Callable[[int], bool] = always
    """Function (step) -> whether the step is guided; other steps cost nothing."""
    evaluates_term: Callable[[int], bool] = always
    """Function (step) -> whether a guided step evaluates the term; other guided steps cost nothing."""
    extra_nfe: float = 1
    """Network evaluations of a guided step besides the base prediction."""
    weak_network_settings: UNetSettings | None = None
    """Settings of the network that these evaluations are of; None: the network that is guided."""
    may_end: bool = False
    """True if the guidance may end early, so that a chain takes fewer evaluations than its guided steps stand for."""
    mask: MaskOfStep | None = None
    """Function that computes the mask of a step without a further evaluation; None for a method without masks."""
    start_chain: Callable[[], Term] | None = None
    """Function that returns the term of a new chain, in place of `term`, for a term that remembers earlier steps."""
    needs_labels: bool = False
    """True if the network of `weak_network_settings` needs a class label of every sample."""


def with_guidance(predict: NoisePredictor, guidances: Mapping[str, Guidance]) -> NoisePredictor:
    """Return the predictor that adds all guidance terms to every prediction; without guidances, `predict` itself.

    It serves one chain: a term that remembers earlier steps starts anew with every call of this function.
    """
    guidances = {name: replace(g, term=g.start_chain()) if g.start_chain else g for name, g in guidances.items()}

    def predict_guided(x_t: Image, step: int, condition: Condition) -> Prediction:
        """Add the terms of the active methods, all of the same base prediction, to its eps and score."""
        active = {name: guidance for name, guidance in guidances.items() if guidance.is_active(step)}
        base_condition = reduce(lambda c, guidance: guidance.prepare_condition(c), active.values(), condition)
        base_pred = predict(x_t, step, base_condition)
        bare_condition = replace(condition, attention_sites=(), features=False, block_inputs=())  # of the terms
        terms = {name: g.term(predict, x_t, step, bare_condition, base_pred) for name, g in active.items()}
        eps, score, nfe = base_pred.eps, base_pred.score, base_pred.nfe
        for term in terms.values():
            eps, score, nfe = eps + term.eps, score + term.score, nfe + term.nfe
        attention = {site: base_pred.attention[site] for site in condition.attention_sites}
        features = base_pred.features if condition.features else None
        inputs = {name: base_pred.block_inputs[name] for name in condition.block_inputs}
        requested = replace(base_pred, attention=attention, features=features, block_inputs=inputs)
        return replace(requested, eps=eps, score=score, nfe=nfe, terms=terms)

    return predict_guided if guidances else predict


def extrapolate(weak_pred: Prediction, base_pred: Prediction, scale: float) -> GuidanceTerm:
    """Eq. 11, 15, 17: eps' + (1 + s)(eps - eps') = eps + s (eps - eps'), so that s = 0 adds exactly nothing."""
    return GuidanceTerm(eps=scale * (base_pred.eps - weak_pred.eps), nfe=weak_pred.nfe)


def guide_by_condition(scale: float, weaken: Callable[[Image, int, Condition], Condition]) -> Guidance:
    """Return the guidance away from the prediction for the same x_t under the condition that `weaken` returns."""

    def term(
        predict: NoisePredictor, x_t: Image, step: int, condition: Condition, base_pred: Prediction
    ) -> GuidanceTerm:
        return extrapolate(predict(x_t, step, weaken(x_t, step, condition)), base_pred, scale)

    return Guidance(term=term)


def edit_attention(condition: Condition, sites: Iterable[str], edit: AttentionEdit) -> Condition:
    """Return the condition of an evaluation in which `edit` computes the attention of some blocks."""
    return replace(condition, attention_edits=(*condition.attention_edits, *((site, edit) for site in sites)))


def limit_to_interval(guidance: Guidance, interval: tuple[float, float], num_steps: int) -> Guidance:
    """Guide positions round(start · S) … round(end · S) - 1 of S sampling steps; position 0 is the noisiest step."""
    start, end = (round(fraction * num_steps) for fraction in interval)
    is_active = guidance.is_active
    return replace(guidance, is_active=lambda step: start <= num_steps - 1 - step < end and is_active(step))


def map_term(guidance: Guidance, wrap: Callable[[Term], Term]) -> Guidance:
    """Replace the term of every chain by `wrap(term)`, which may remember earlier steps."""
    start_chain = guidance.start_chain or (lambda: guidance.term)
    return replace(guidance, start_chain=lambda: wrap(start_chain()))
