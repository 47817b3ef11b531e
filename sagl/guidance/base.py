"""What all guidances share: each adds one direction to the plain prediction, and the directions are summed.

A guidance is told the plain prediction of the step and may evaluate the network again; it changes the condition,
never the network. n guidances cost 1 + n passes, in any order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce

from sagl.diffusion.predictor import Condition, GuidanceTerm, NoisePredictor, Prediction
from sagl.shapes import Image


def _nothing(condition: Condition) -> Condition:
    return condition


def _always(step: int) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """One guidance."""

    direction: Callable[[NoisePredictor, Image, int, Condition, Prediction], GuidanceTerm]
    """(denoise, x_t, step, condition, plain prediction) -> what to add."""
    ask: Callable[[Condition], Condition] = _nothing
    """The condition of the plain pass, with what this guidance needs of it."""
    when: Callable[[int], bool] = _always
    """Whether a step is guided; a step that is not costs nothing."""
    passes: int = 1
    """Network evaluations that a guided step costs besides the plain one."""


def guided(denoise: NoisePredictor, guidances: Mapping[str, Guidance]) -> NoisePredictor:
    """The denoiser that adds the guidances' directions to every prediction; with none of them, `denoise` itself."""

    def call(x_t: Image, step: int, condition: Condition) -> Prediction:
        """One plain pass, and what each active guidance adds to it."""
        active = {name: g for name, g in guidances.items() if g.when(step)}
        asked = reduce(lambda c, g: g.ask(c), active.values(), condition)
        plain = denoise(x_t, step, asked)
        bare = replace(condition, attention_sites=())  # a second pass brings nothing back
        added = {name: g.direction(denoise, x_t, step, bare, plain) for name, g in active.items()}
        eps, score, nfe = plain.eps, plain.score, plain.nfe
        for d in added.values():
            eps, score, nfe = eps + d.eps, score + d.score, nfe + d.nfe
        attention = {site: plain.attention[site] for site in condition.attention_sites}
        return replace(plain, eps=eps, score=score, nfe=nfe, directions=added, attention=attention)

    return call if guidances else denoise


def extrapolate(weak: Prediction, plain: Prediction, scale: float) -> GuidanceTerm:
    """Eq. 11, 15, 17: eps' + (1 + s)(eps - eps') = eps + s (eps - eps'), so that s = 0 adds exactly nothing."""
    return GuidanceTerm(eps=scale * (plain.eps - weak.eps), nfe=weak.nfe)


def within(guidance: Guidance, interval: tuple[float, float], num_steps: int) -> Guidance:
    """The guidance at positions round(start · S) … round(end · S) - 1 of the chain, position 0 the noisiest."""
    start, end = (round(fraction * num_steps) for fraction in interval)
    inner = guidance.when
    return replace(guidance, when=lambda step: start <= num_steps - 1 - step < end and inner(step))
