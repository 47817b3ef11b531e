import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sagl.data.transforms import CropResize, decode_image, resize_shorter_side, to_pixels
from tests.helpers.files import encode, ramp


def crop(image, seed=0, **options):
    """Return (C, H, W)."""
    transform = CropResize(**{"image_size": 8, "channels": 3, **options})
    return transform(to_pixels(image, transform.channels), np.random.default_rng(seed)).permute(2, 0, 1)


@pytest.mark.parametrize("size", [(8, 8), (8, 30), (100, 64), (33, 17), (15, 16), (8, 9), (5, 7)])
def test_an_image_of_any_size_becomes_a_square(size):
    square = crop(ramp(*size))
    assert (square.shape, square.dtype) == ((3, 8, 8), torch.uint8)


def test_a_square_of_the_right_size_is_not_changed():
    assert torch.equal(crop(ramp(8, 8)), to_pixels(ramp(8, 8)).permute(2, 0, 1))


def test_the_crop_is_central():
    assert crop(ramp(20, 8))[0, 0].tolist() == list(range(6, 14))
    assert crop(ramp(8, 20))[1, :, 0].tolist() == list(range(6, 14))


def test_large_images_are_halved_by_means_before_bicubic_interpolation():
    source = ramp(64, 40)
    halved = source.resize((32, 20), Image.Resampling.BOX).resize((16, 10), Image.Resampling.BOX)
    expected = halved.resize((13, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(resize_shorter_side(to_pixels(source), 8).numpy(), np.array(expected))


def test_nothing_is_random_by_default():
    assert all(torch.equal(crop(ramp(20, 30), seed), crop(ramp(20, 30))) for seed in range(20))


def test_about_half_of_the_seeds_flip_an_image():
    plain = crop(ramp(8, 8))
    images = [crop(ramp(8, 8), seed, random_flip=True) for seed in range(200)]
    flipped = [torch.equal(image, plain.flip(-1)) for image in images]
    assert all(f or torch.equal(image, plain) for f, image in zip(flipped, images, strict=True))
    assert 70 < sum(flipped) < 130


def test_random_crops_differ_by_seed_reach_the_edges_and_are_reproducible():
    images = [crop(ramp(8, 16), seed, random_crop=True) for seed in range(100)]
    assert len({image.numpy().tobytes() for image in images}) > 10
    assert min(int(image[1].min()) for image in images) == 0
    assert max(int(image[1].max()) for image in images) == 15
    assert all(torch.equal(crop(ramp(8, 16), seed, random_crop=True), image) for seed, image in enumerate(images))


def test_greyscale_equals_pillows():
    pixels = decode_image(encode(ramp(9, 8)), 1)
    assert torch.equal(pixels[:, :, 0], torch.from_numpy(np.array(ramp(9, 8).convert("L"))))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_images_of_other_modes_become_rgb(mode):
    assert decode_image(encode(Image.new(mode, (9, 12)), "TIFF"), 3).shape == (12, 9, 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF")])
def test_of_16_bits_the_upper_8_are_taken(mode, kind, channels):
    values = np.random.default_rng(0).integers(0, 1 << 16, (5, 7), dtype=np.uint16)
    image = Image.frombytes(mode, (7, 5), values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    pixels = decode_image(encode(image, kind), channels).numpy()
    assert np.array_equal(pixels, np.repeat((values >> 8)[..., None], channels, axis=2))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_with_32_bits_per_channel_are_refused(mode):
    with pytest.raises(ValueError, match="32 bits"):
        decode_image(encode(Image.new(mode, (9, 12)), "TIFF"), 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_upright(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(ramp(24, 16), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    for channels, mode in ((1, "L"), (3, "RGB")):
        expected = np.array(upright.convert(mode)).reshape(upright.height, upright.width, channels)
        assert np.array_equal(decode_image(data, channels).numpy(), expected)


@pytest.mark.parametrize("exif", [b"MM\0*garbage", b"II*\0\xff\xff\xff\xff", b"", bytes(40)])
def test_corrupt_exif_data_do_not_make_an_image_corrupt(exif):
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encode(ramp(24, 16), kind, exif=b"Exif\0\0" + exif)
        assert [decode_image(data, channels).shape for channels in (1, 3)] == [(16, 24, 1), (16, 24, 3)]


def test_palettes_with_transparency_keep_their_colours():
    image = ramp(24, 16).quantize(16)
    data = encode(image, transparency=bytes(range(0, 160, 10)))
    assert np.array_equal(decode_image(data, 3).numpy(), np.array(image.convert("RGB")))


def test_of_an_animation_the_first_frame_is_taken():
    data = encode(ramp(9, 8), "WEBP", save_all=True, append_images=[ramp(9, 8).rotate(180)], lossless=True)
    assert torch.equal(decode_image(data, 3), to_pixels(ramp(9, 8)))


def test_a_large_image_is_no_decompression_bomb():
    assert decode_image(encode(Image.new("1", (20000, 10000))), 1).shape == (10000, 20000, 1)


@pytest.mark.parametrize(("mode", "subsampling"), [("RGB", 0), ("RGB", 2), ("L", 0), ("CMYK", 0)])
def test_jpegs_have_the_pixels_that_pillow_reads(mode, subsampling):
    noise = np.random.default_rng(0).integers(0, 256, (37, 50, 4), dtype=np.uint8)
    image = Image.fromarray(noise[:, :, :3]).resize((90, 70)).convert(mode)
    data = encode(image, "JPEG", quality=80, subsampling=subsampling)
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_image(data, 3).numpy(), expected)


def test_without_torchvisions_decoder_pillow_reads_jpegs(monkeypatch):
    data = encode(ramp(90, 70), "JPEG")
    expected = decode_image(data, 3)
    monkeypatch.setattr("sagl.data.transforms._RGB", None)
    assert torch.equal(decode_image(data, 3), expected)


@pytest.mark.parametrize("fraction", [0.3, 0.95])
def test_a_truncated_jpeg_is_corrupt_and_not_filled_with_grey(fraction):
    data = encode(ramp(90, 70), "JPEG")
    with pytest.raises(OSError, match=r"(?i)truncated"):
        decode_image(data[: int(fraction * len(data))], 3)
