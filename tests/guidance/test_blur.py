import pytest
import torch
from torchvision.transforms.functional import gaussian_blur as torchvision_blur

from sagl.guidance.sag import gaussian_blur, gaussian_kernel
from sagl.settings.guidance import effective_kernel_size


def images(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("kernel_size", [1, 3, 9, 31])
@pytest.mark.parametrize("blur_sigma", [0.3, 1.0, 3.0, 9.0])
@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (1, 1, 32, 20)])
def test_blur_is_torchvisions(kernel_size, blur_sigma, shape):
    x = images(*shape)
    want = torchvision_blur(x, [kernel_size] * 2, [blur_sigma] * 2)
    torch.testing.assert_close(gaussian_blur(x, kernel_size, blur_sigma), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.37, 1.0])
def test_a_constant_image_is_a_fixed_point(value):
    x = torch.full((2, 3, 16, 16), value)
    torch.testing.assert_close(gaussian_blur(x, 31, 3.0), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel_size", [1, 5, 31])
def test_the_kernel_is_symmetric_sums_to_one_and_is_the_normal_density(kernel_size):
    kernel = gaussian_kernel(kernel_size, 2.0)
    assert kernel.shape == (kernel_size,)
    torch.testing.assert_close(kernel, kernel.flip(0), rtol=0, atol=0)
    assert float(kernel.sum()) == pytest.approx(1)
    middle = kernel_size // 2
    density = torch.distributions.Normal(0, 2.0).log_prob(torch.arange(kernel_size) - middle).exp()
    torch.testing.assert_close((kernel / kernel[middle]).float(), density / density[middle], rtol=1e-5, atol=1e-6)


def test_a_kernel_of_one_pixel_changes_nothing():
    x = images(2, 3, 8, 8)
    assert torch.equal(gaussian_blur(x, 1, 3.0), x)


def test_blur_takes_variance_away_and_leaves_channels_and_samples_apart():
    x = images(2, 3, 16, 16)
    blurred = gaussian_blur(x, 9, 2.0)
    assert float(blurred.var()) < 0.2 * float(x.var())
    torch.testing.assert_close(blurred[1:, 2:], gaussian_blur(x[1:, 2:], 9, 2.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blur_keeps_shape_and_dtype_whatever_the_memory_format(dtype):
    x = images(2, 3, 16, 16, dtype=dtype)
    got = gaussian_blur(x.contiguous(memory_format=torch.channels_last), 9, 2.0)
    assert got.dtype == dtype
    torch.testing.assert_close(got, gaussian_blur(x, 9, 2.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [256, 16, 15, 8, 1])
def test_the_default_kernel_can_blur_images_of_every_size(side):
    x = images(1, 1, side, side)
    assert gaussian_blur(x, effective_kernel_size(None, side), 3.0).shape == x.shape
