"""Encoded pixels of a view: decoded like Pillow, and rejected if the header does not match."""

import io
import struct

import numpy as np
import pytest
from image_files import encoded, picture
from PIL import Image
from sklearn.datasets import load_sample_images

from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.errors import UserError
from scalekd_cache.views.pixels import decode_pixels, encode_pixels, jpeg_shape, webp_size

PHOTOGRAPH = Image.fromarray(load_sample_images().images[0]).crop((100, 50, 324, 274))


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4", "4:2:2"])
@pytest.mark.parametrize(("quality", "size"), [(90, 224), (75, 97), (100, 64), (90, 1)])
def test_jpeg_is_decoded_as_pillow_does(subsampling, quality, size):
    image = PHOTOGRAPH.resize((size, size))
    for options in ({}, {"progressive": True}, {"optimize": True, "exif": Image.Exif(), "icc_profile": b"x" * 300}):
        data = encoded(image, "JPEG", quality=quality, subsampling=subsampling, **options)
        found = decode_pixels(memoryview(data), size)
        assert np.array_equal(found, np.asarray(Image.open(io.BytesIO(data))))
        assert found.flags.c_contiguous


@pytest.mark.parametrize(("quality", "size"), [(90, 224), (75, 97), (100, 64), (1, 8)])
def test_webp_is_decoded_as_pillow_does(quality, size):
    image = PHOTOGRAPH.resize((size, size))
    data = encode_pixels(np.asarray(image), ViewConfig(size=size, pixel_format="webp", jpeg_quality=quality))
    assert webp_size(data) == (size, size)
    found = decode_pixels(memoryview(data), size)
    assert np.array_equal(found, np.asarray(Image.open(io.BytesIO(data))))
    assert found.flags.c_contiguous


@pytest.mark.parametrize("options", [{}, {"jpeg_quality": 75, "jpeg_subsampling": "4:4:4"}])
def test_optimized_jpeg_has_the_same_pixels_in_fewer_bytes(options):
    pixels = np.asarray(PHOTOGRAPH)
    plain, small = (
        encode_pixels(pixels, ViewConfig(pixel_format=kind, **options)) for kind in ("jpeg", "jpeg-optimized")
    )
    assert len(small) < 0.98 * len(plain)
    assert np.array_equal(decode_pixels(small, 224), decode_pixels(plain, 224))


def test_jpeg_and_png_files_are_those_of_earlier_releases():
    pixels = np.asarray(PHOTOGRAPH)
    assert encode_pixels(pixels, ViewConfig()) == encoded(PHOTOGRAPH, "JPEG", quality=90, subsampling="4:2:0")
    assert encode_pixels(pixels, ViewConfig(pixel_format="png")) == encoded(PHOTOGRAPH, "PNG", compress_level=3)


def test_what_is_written_is_read():
    pixels = np.asarray(PHOTOGRAPH)
    assert np.array_equal(decode_pixels(encode_pixels(pixels, ViewConfig(pixel_format="png")), 224), pixels)
    jpeg = encode_pixels(pixels, ViewConfig(jpeg_quality=100))
    assert np.abs(decode_pixels(jpeg, 224).astype(int) - pixels).mean() < 3


def test_fill_bytes_before_a_marker():
    data = encoded(PHOTOGRAPH, "JPEG")
    assert jpeg_shape(data[:2] + b"\xff\xff" + data[2:]) == jpeg_shape(data) == (224, 224, 3)


JPEG = encoded(PHOTOGRAPH, "JPEG", quality=90)
FRAME = JPEG.index(b"\xff\xc0")
LARGE_PICTURE = PHOTOGRAPH.resize((600, 600))
LARGE = encoded(LARGE_PICTURE, "JPEG")


def hidden(marker):
    """A large image after a marker without a length. A parser that reads the next two bytes (ff fe) as a length of
    65,534 skips the real header and finds a small one inside a comment."""
    comment = b"\xff\xfe" + struct.pack(">H", 65_000) + bytes(64_998)
    start = LARGE[:2] + bytes([0xFF, marker]) + comment
    inside = bytes(4 + 0xFFFE - len(start) - 4) + JPEG[FRAME : FRAME + 19] + bytes(40)
    data = start + b"\xff\xfe" + struct.pack(">H", len(inside) + 2) + inside + LARGE[2:]
    assert data[4 + 0xFFFE :].startswith(JPEG[FRAME : FRAME + 19])
    return data


WEBP = encoded(PHOTOGRAPH, "WEBP", quality=80)


OTHERS = {
    **{f"marker {marker:02x} without a length": hidden(marker) for marker in (0x00, 0x01, 0xD0, 0xD7, 0xD8)},
    "nothing": b"",
    "two bytes": JPEG[:2],
    "no frame": JPEG[: FRAME + 6],
    "no scan": JPEG[: FRAME + 40],
    "half a scan": JPEG[: len(JPEG) // 2],
    "no end": JPEG[:-2],
    "another size": encoded(PHOTOGRAPH.resize((225, 224)), "JPEG"),
    "another size, PNG": encoded(PHOTOGRAPH.resize((224, 225)), "PNG"),
    "a header of 65,500 x 65,500": JPEG[: FRAME + 5] + struct.pack(">HH", 65_500, 65_500) + JPEG[FRAME + 9 :],
    "gray": encoded(PHOTOGRAPH.convert("L"), "JPEG"),
    "four components": encoded(PHOTOGRAPH.convert("CMYK"), "JPEG"),
    "gray, PNG": encoded(PHOTOGRAPH.convert("L"), "PNG"),
    "a different format": encoded(PHOTOGRAPH, "TIFF"),
    "another size, WebP": encoded(PHOTOGRAPH.resize((225, 224)), "WEBP"),
    "lossless WebP": encoded(PHOTOGRAPH, "WEBP", lossless=True),
    "WebP with alpha": encoded(PHOTOGRAPH.convert("RGBA").rotate(9), "WEBP"),
    "animated WebP": encoded(PHOTOGRAPH, "WEBP", save_all=True, append_images=[PHOTOGRAPH.rotate(9)]),
    "half a WebP": WEBP[: len(WEBP) // 2],
    "no end, WebP": WEBP[:-2],
    "a WebP header alone": WEBP[:30],
    "a WebP header of 16,383 x 16,383": WEBP[:26] + struct.pack("<HH", 16_383, 16_383) + WEBP[30:],
    "two headers that differ": WEBP[:12] + encoded(LARGE_PICTURE, "WEBP")[12:],
    "a segment of length 0": JPEG[:4] + b"\0\0" + JPEG[6:],
    "noise": np.random.default_rng(0).bytes(20_000),
}


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_is_refused(name):
    with pytest.raises(UserError, match="cannot decode a view's pixels"):
        decode_pixels(OTHERS[name], 224)


def test_a_small_png_is_read():
    assert decode_pixels(encoded(picture(size=(5, 5))), 5).shape == (5, 5, 3)
