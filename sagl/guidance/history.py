"""Guidance by the history of the chain: earlier predictions as the weak one, without a further evaluation."""

from dataclasses import replace

import torch

from sagl.diffusion.predictor import Condition, GuidanceTerm, NoisePredictor, Prediction
from sagl.diffusion.process import eps_from_x0_hat, x0_hat_from_eps
from sagl.guidance.base import Guidance, GuidanceContext, Term, extrapolate
from sagl.settings.guidance import HistoryGuidance
from sagl.shapes import Image


def build_history(settings: HistoryGuidance, context: GuidanceContext) -> Guidance:
    """Guide away from an average of the base predictions of earlier steps: eps + s (eps - eps').

    The average m of predictions p starts with the first one, and m <- d m + (1 - d) p after every step.

    - d = 0 of eps: Self-Guidance with the output of the previous step (SG-prev; Li et al. 2024, arXiv 2412.05827).
    - d > 0 of eps: Momentum Guidance (Liao et al. 2026, arXiv 2602.20360, algorithm 1: s is alpha, d is beta). It
      averages the velocity of a flow, which is eps for the ODE of a diffusion model in the variable x_t / √ᾱ_t.
    - d > 0 of x0_hat: the average of HiGS (Sadat et al. 2025, arXiv 2509.22300: d is 1 - alpha), without its
      high-pass filter, projection and schedule of weights. x0_hat is clipped to [-1, 1]: at high noise it is eps times
      a large factor, and errors of the first steps would remain in the average.

    Steps outside of the interval are not remembered. The first step has no history, and no term.
    """

    def start_chain() -> Term:
        """Return a term with an empty history."""
        average: Image | None = None

        def term(
            _predict: NoisePredictor, x_t: Image, step: int, _condition: Condition, base_pred: Prediction
        ) -> GuidanceTerm:
            """Extrapolate from the average of earlier steps, then update it with this step's prediction."""
            nonlocal average
            alpha_bar, eps, previous = context.schedule.alpha_bar(step), base_pred.eps, average
            current = eps if settings.average == "eps" else x0_hat_from_eps(x_t, eps, alpha_bar, clip=True)
            average = current if previous is None else torch.lerp(previous, current, 1 - settings.decay)
            if previous is None:
                return GuidanceTerm()
            weak_eps = previous if settings.average == "eps" else eps_from_x0_hat(x_t, previous, alpha_bar)
            return extrapolate(replace(base_pred, eps=weak_eps, nfe=0.0), base_pred, settings.scale)

        return term

    return Guidance(term=start_chain(), start_chain=start_chain, extra_nfe=0)
