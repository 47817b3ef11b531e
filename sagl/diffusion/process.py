"""The diffusion process as functions of tensors and alpha_bar (Ho et al. 2020; eq. 2 to 8 of the SAG paper).

Coefficients are float64, () on the CPU or (B, 1, 1, 1) on the device of the images; images keep their own dtype.
"""

from torch import Tensor

from sagl.shapes import AlphaBar, Image


def add_noise(x_0: Image, noise: Image, alpha_bar: AlphaBar) -> Image:
    """Eq. 2, 5: x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise."""
    return cast_like(alpha_bar.sqrt(), x_0) * x_0 + cast_like((1 - alpha_bar).sqrt(), x_0) * noise


def x0_hat_from_eps(x_t: Image, eps: Image, alpha_bar: AlphaBar, *, clip: bool = False) -> Image:
    """Eq. 8: x0_hat = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar); `clip` limits it to [-1, 1] as images are."""
    x0_hat = cast_like(alpha_bar.rsqrt(), x_t) * x_t - cast_like((1 / alpha_bar - 1).sqrt(), x_t) * eps
    return x0_hat.clamp(-1, 1) if clip else x0_hat


def eps_from_x0_hat(x_t: Image, x0_hat: Image, alpha_bar: AlphaBar) -> Image:
    """Eq. 8, solved for eps."""
    return (cast_like(alpha_bar.rsqrt(), x_t) * x_t - x0_hat) / cast_like((1 / alpha_bar - 1).sqrt(), x_t)


def posterior_mean(x_0: Image, x_t: Image, alpha_bar: AlphaBar, alpha_bar_prev: AlphaBar) -> Image:
    """Eq. 4: mean of q(x_{t-1} | x_t, x_0), a weighted sum of both (Ho et al. 2020, eq. 7)."""
    alpha = alpha_bar / alpha_bar_prev
    coef_x0 = (1 - alpha) * alpha_bar_prev.sqrt() / (1 - alpha_bar)
    coef_xt = (1 - alpha_bar_prev) * alpha.sqrt() / (1 - alpha_bar)
    return cast_like(coef_x0, x_t) * x_0 + cast_like(coef_xt, x_t) * x_t


def interpolate_log_variance(fraction: Image, log_posterior_variance: AlphaBar, log_beta: AlphaBar) -> Image:
    """Interpolate log variance from the posterior's (-1) to beta (+1) (Nichol & Dhariwal 2021, eq. 15)."""
    frac = (fraction + 1) / 2
    return frac * cast_like(log_beta, frac) + (1 - frac) * cast_like(log_posterior_variance, frac)


def cast_like(coefficient: Tensor, image: Image) -> Tensor:
    """Return a float64 coefficient in the image's dtype, because a batch of them would promote the image.

    A single coefficient stays on the CPU: as an argument of a kernel it needs no copy, for which a GPU would wait.
    """
    return coefficient.to(image.dtype) if coefficient.dim() == 0 else coefficient.to(image)
