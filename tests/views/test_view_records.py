"""Stored views: the JSON record is strictly checked, encoded pixels are decoded safely."""

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.errors import UserError
from scalekd_cache.views import randaugment as augment
from scalekd_cache.views.pixels import decode_pixels, encode_pixels, pixel_digest
from scalekd_cache.views.view import View

quick = settings(max_examples=60, derandomize=True, deadline=None)


def photo(width=100, height=75, seed=0):
    """A smooth image with all values and some texture."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)


# Records


GOOD = View(
    number=0,
    crop=(0, 0, 32, 32),
    flip=False,
    operations=(("Rotate", -12.5), ("Invert", 0.0)),
    erase=(1, 2, 3, 4),
    noise_seed=7,
)


@pytest.mark.parametrize("change", [
    {"extra": 1}, {"number": -1}, {"number": 1.0}, {"number": True}, {"number": "1"}, {"flip": 1}, {"flip": None},
    {"crop": None}, {"crop": [0, 0, 1]}, {"crop": [0, 0, 0, 5]}, {"crop": [-1, 0, 5, 5]}, {"crop": [0, 0, 5.0, 5]},
    {"crop": [0, 0, True, 5]}, {"crop": [0, 0, 2**40, 5]}, {"crop": {"left": 0}}, {"erase": [0, 0, 5, -5]},
    {"erase": 0},
    {"operations": None}, {"operations": "Invert"}, {"operations": [["Invert"]]}, {"operations": [["Cutout", 0.0]]},
    {"operations": [[1, 0.0]]}, {"operations": [[["Invert"], 0.0]]}, {"operations": [["Rotate", float("nan")]]},
    {"operations": [["Rotate", float("inf")]]}, {"operations": [["Rotate", 30.1]]}, {"operations": [["Rotate", "3"]]},
    {"operations": [["Rotate", True]]}, {"operations": [["Rotate", None]]}, {"operations": [["Invert", 1.0]]},
    {"operations": [["Rotate", 10**400]]}, {"operations": [["PosterizeIncreasing", 1.5]]},
    {"operations": [["Invert", 0.0]] * 16}, {"noise_seed": -1}, {"noise_seed": 2**53}, {"noise_seed": 0.5},
])  # fmt: skip
def test_bad_records_are_refused(change):
    with pytest.raises(UserError, match="view record"):
        View.from_json(GOOD.to_json() | change)


@pytest.mark.parametrize("record", [None, [], "{}", {}, {"number": 0}, {1: 2}])
def test_records_of_another_shape_are_refused(record):
    with pytest.raises(UserError, match="unexpected or missing keys"):
        View.from_json(record)


boxes = st.tuples(*[st.integers(0, 10**6)] * 2, *[st.integers(1, 10**6)] * 2)
operations = st.sampled_from(augment.OPERATION_NAMES).flatmap(
    lambda name: st.tuples(
        st.just(name), st.builds(lambda m, s: augment.resolve_argument(name, m, s), st.floats(0, 10), st.booleans())
    )
)
any_view = st.builds(
    View,
    number=st.integers(0, 2**63 - 1),
    crop=boxes,
    flip=st.booleans(),
    operations=st.lists(operations, max_size=15).map(tuple),
    erase=st.none() | boxes,
    noise_seed=st.integers(0, 2**53 - 1),
)


@quick
@given(any_view)
def test_records_round_trip(view):
    text = json.dumps(view.to_json(), allow_nan=False)
    assert View.from_json(json.loads(text)) == view
    assert json.dumps(View.from_json(json.loads(text)).to_json()) == text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@quick
@given(st.sampled_from(sorted(GOOD.to_json())), json_values)
def test_any_value_in_a_record_is_taken_or_refused_cleanly(field, value):
    try:
        view = View.from_json(GOOD.to_json() | {field: value})
    except UserError:
        return
    assert View.from_json(view.to_json()) == view


# Encoded pixels


@pytest.mark.parametrize(("options", "limit"), [
    ({"pixel_format": "png"}, 0), ({"jpeg_quality": 95, "jpeg_subsampling": "4:4:4"}, 6), ({"jpeg_quality": 90}, 30),
    ({"pixel_format": "jpeg-optimized"}, 30), ({"pixel_format": "webp"}, 30),
])  # fmt: skip
@pytest.mark.parametrize("gray", [False, True])
def test_pixels_round_trip(options, limit, gray):
    config = ViewConfig(size=32, **options)
    pixels = photo(32, 32)
    pixels = np.repeat(pixels[..., :1], 3, axis=2) if gray else pixels
    data = encode_pixels(pixels, config)
    assert data == encode_pixels(pixels.copy(), config)
    decoded = decode_pixels(data, 32)
    assert (decoded.dtype, decoded.shape) == (np.uint8, (32, 32, 3))
    assert np.abs(decoded.astype(int) - pixels).mean() <= limit
    assert pixel_digest(decode_pixels(data, 32)) == pixel_digest(decoded)


def encode(image, format):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        encode(Image.new("RGB", (32, 31)), "PNG"),
        encode(Image.new("RGB", (64, 64)), "JPEG"),
        encode(Image.new("L", (32, 32)), "PNG"),
        encode(Image.new("RGB", (32, 32)), "BMP"),
        encode(Image.fromarray(photo(32, 32)), "JPEG")[:300],
        encode(Image.fromarray(photo(32, 32)), "PNG")[:300],
    ],
)
def test_other_or_damaged_pixels_are_refused(data):
    with pytest.raises(UserError, match="cannot decode"):
        decode_pixels(data, 32)


def test_a_giant_header_is_refused_before_decoding(monkeypatch):
    data = encode(Image.new("RGB", (40_000, 1)), "PNG")
    giant = data[:20] + (40_000).to_bytes(4, "big") + data[24:]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded before the check"))
    with pytest.raises(UserError):
        decode_pixels(giant, 32)


@quick
@given(st.sampled_from(["png", "jpeg", "webp"]), st.integers(0, 10**6), st.integers(1, 255), st.booleans())
def test_damaged_bytes_never_crash(pixel_format, position, change, cut):
    data = bytearray(encode_pixels(photo(32, 32), ViewConfig(size=32, pixel_format=pixel_format)))
    position %= len(data)
    data[position] ^= change
    try:
        decoded = decode_pixels(bytes(data[:position] if cut else data), 32)
    except UserError:
        return
    assert decoded.shape == (32, 32, 3)


def test_digest_sees_shape_and_values():
    pixels = photo(32, 32)
    assert len(pixel_digest(pixels)) == 16
    assert pixel_digest(pixels[:, ::-1]) == pixel_digest(pixels[:, ::-1].copy()) != pixel_digest(pixels)
    assert pixel_digest(pixels.reshape(64, 16, 3)) != pixel_digest(pixels)
