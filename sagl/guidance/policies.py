"""Policies that lower the price of a guidance method: which of its guided steps evaluate its term."""

from dataclasses import replace

from torch import Tensor

from sagl.diffusion.predictor import Condition, GuidanceTerm, NoisePredictor, Prediction
from sagl.diffusion.process import x0_hat_from_eps
from sagl.diffusion.schedule import Schedule
from sagl.guidance.base import Guidance, Term, map_term
from sagl.guidance.shaping import rms, x0_shift
from sagl.settings.guidance import GuidanceSettings
from sagl.shapes import Image


def renew_every(guidance: Guidance, every: int, num_steps: int) -> Guidance:
    """Evaluate the term in every k-th guided step, from the noisiest on; the steps between add the last one again.

    A sample whose guidance has ended gets no term in the steps between either.
    """
    guided = [step for step in reversed(range(num_steps)) if guidance.is_active(step)]
    renewed = set(guided[::every])

    def wrap(term: Term) -> Term:
        """Return the term that is evaluated in the renewed steps, and repeated in the others."""
        last: GuidanceTerm | None = None

        def reused_term(
            predict: NoisePredictor, x_t: Image, step: int, condition: Condition, base_pred: Prediction
        ) -> GuidanceTerm:
            nonlocal last
            if last is not None and step not in renewed:
                return replace(last if last.ended is None else zero_samples(last, last.ended), nfe=0.0)
            last = term(predict, x_t, step, condition, base_pred)
            return last

        return reused_term

    return replace(map_term(guidance, wrap), evaluates_term=lambda step: step in renewed)


def reuse_deep_blocks(guidance: Guidance, block: str, share: float) -> Guidance:
    """Start the weak evaluation at an output block, whose input is that of the base evaluation of the same step.

    Args:
        guidance: a method whose weak prediction is one of the network itself.
        block: the output block.
        share: share of an evaluation's operations that remains.
    """

    def wrap(term: Term) -> Term:
        """Return the term whose weak evaluation starts at the block."""

        def shallow_term(
            predict: NoisePredictor, x_t: Image, step: int, condition: Condition, base_pred: Prediction
        ) -> GuidanceTerm:
            def predict_shallow(x_t: Image, step: int, condition: Condition) -> Prediction:
                pred = predict(x_t, step, replace(condition, start=(block, base_pred.block_inputs[block])))
                return replace(pred, nfe=share * pred.nfe)

            return term(predict_shallow, x_t, step, condition, base_pred)

        return shallow_term

    def prepare_condition(condition: Condition) -> Condition:
        prepared = guidance.prepare_condition(condition)
        return replace(prepared, block_inputs=(*prepared.block_inputs, block))

    return replace(map_term(guidance, wrap), prepare_condition=prepare_condition, extra_nfe=share * guidance.extra_nfe)


def stop_when_close(guidance: Guidance, settings: GuidanceSettings, schedule: Schedule) -> Guidance:
    """End a sample's guidance after the first step with rms(x0_hat_weak - x0_hat) < stop_below · rms(x0_hat).

    When all samples of a batch have ended, steps cost nothing; until then, the whole batch is evaluated, so that the
    bytes of a sample do not depend on the others.
    """

    def wrap(term: Term) -> Term:
        """Return the term that is zero for the samples whose guidance has ended."""
        has_ended: Tensor | None = None
        last = GuidanceTerm()

        def ending_term(
            predict: NoisePredictor, x_t: Image, step: int, condition: Condition, base_pred: Prediction
        ) -> GuidanceTerm:
            """Return the term without the samples whose guidance has ended, and update which have."""
            nonlocal has_ended, last
            if has_ended is not None and bool(has_ended.all()):
                return replace(zero_samples(last, has_ended), ended=has_ended, nfe=0.0)
            last = term(predict, x_t, step, condition, base_pred)
            result = last if has_ended is None else zero_samples(last, has_ended)
            alpha_bar = schedule.alpha_bar(step)
            shift = x0_shift(last, alpha_bar)
            if isinstance(shift, Tensor):
                x0_hat = x0_hat_from_eps(x_t, base_pred.eps, alpha_bar, clip=True)
                is_close = rms(shift) < settings.stop_below * abs(settings.scale) * rms(x0_hat)
                has_ended = is_close if has_ended is None else has_ended | is_close
            return replace(result, ended=has_ended)

        return ending_term

    return replace(map_term(guidance, wrap), may_end=True)


def zero_samples(term: GuidanceTerm, samples: Tensor) -> GuidanceTerm:
    """Set eps, score and extras of some samples, (B, 1, 1, 1) bool, to 0: they are not guided."""

    def zero(value: Tensor | float) -> Tensor | float:
        return value.masked_fill(samples, 0) if isinstance(value, Tensor) else value

    extras = {name: value.masked_fill(samples, 0) for name, value in term.extras.items()}
    return replace(term, eps=zero(term.eps), score=zero(term.score), extras=extras, guided=~samples)
