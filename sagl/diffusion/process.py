"""The diffusion process: pure functions of tensors and alpha_bar (Ho et al. 2020; eq. 2 to 8 of the SAG paper).

A coefficient is float64, () or (B, 1, 1, 1); images keep their own dtype.
"""

from torch import Tensor

from sagl.shapes import AlphaBar, Image


def add_noise(x_0: Image, noise: Image, alpha_bar: AlphaBar) -> Image:
    """Eq. 2, 5: x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise."""
    return _like(alpha_bar.sqrt(), x_0) * x_0 + _like((1 - alpha_bar).sqrt(), x_0) * noise


def x0_hat_from_eps(x_t: Image, eps: Image, alpha_bar: AlphaBar) -> Image:
    """Eq. 8: the clean image that eps leaves of x_t. Not clipped."""
    return _like(alpha_bar.rsqrt(), x_t) * x_t - _like((1 / alpha_bar - 1).sqrt(), x_t) * eps


def eps_from_x0_hat(x_t: Image, x0_hat: Image, alpha_bar: AlphaBar) -> Image:
    """Eq. 8, solved for eps."""
    return (_like(alpha_bar.rsqrt(), x_t) * x_t - x0_hat) / _like((1 / alpha_bar - 1).sqrt(), x_t)


def posterior_mean(x_0: Image, x_t: Image, alpha_bar: AlphaBar, alpha_bar_prev: AlphaBar) -> Image:
    """Eq. 4: mean of q(x_{t-1} | x_t, x_0), a weighted sum of both (Ho et al. 2020, eq. 7)."""
    alpha = alpha_bar / alpha_bar_prev
    of_x_0 = (1 - alpha) * alpha_bar_prev.sqrt() / (1 - alpha_bar)
    of_x_t = (1 - alpha_bar_prev) * alpha.sqrt() / (1 - alpha_bar)
    return _like(of_x_0, x_t) * x_0 + _like(of_x_t, x_t) * x_t


def learned_log_variance(fraction: Image, log_posterior_variance: AlphaBar, log_beta: AlphaBar) -> Image:
    """Between the posterior's variance (-1) and beta (+1), in log space (Nichol & Dhariwal 2021, eq. 15)."""
    share = (fraction + 1) / 2
    return share * _like(log_beta, share) + (1 - share) * _like(log_posterior_variance, share)


def maybe_clip(x0_hat: Image, on: bool) -> Image:
    """The estimate within the range of images, [-1, 1], where that is wanted."""
    return x0_hat.clamp(-1, 1) if on else x0_hat


def _like(coefficient: Tensor, image: Image) -> Tensor:
    """A float64 coefficient in the image's dtype, so that a batch of them does not promote it."""
    return coefficient.to(image)
