"""Views: samples them, applies them to an image, and converts them to and from JSON records.

In: the view recipe, a sample key with its image size, and a view number; or a stored view record.
Out: `View` records and (size, size, 3) uint8 pixels, encoded by `pixels.py`.
Invariant: a view is a pure function of (recipe, seed, key, number, image size), and its pixels are a pure function of
(view, image, recipe). There is no global state: rank, worker and order have no effect. All pixels are uint8.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scalekd_cache.config.base import require
from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.errors import UserError
from scalekd_cache.views.randaugment import (
    OPERATION_NAMES,
    RECORD_FIX,
    apply_operation,
    check_operation,
    resolve_argument,
)

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""(left, top, width, height) in pixels."""

NOISE_MEAN, NOISE_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Mean and standard deviation of the noise in erased pixels, per RGB channel: ImageNet's values, as in timm."""

_TRIES, _OPS_MAX, _APPLY_PROBABILITY = 10, 15, 0.5
# Layout of the uniform values from which a view is sampled; part of the cache format.
_CROP = slice(0, 4 * _TRIES)
_FLIP = _CROP.stop
_OPS = slice(_FLIP + 1, _FLIP + 1 + 4 * _OPS_MAX)
_ERASE = _OPS.stop
_BOX = slice(_ERASE + 1, _ERASE + 1 + 4 * _TRIES)
_NOISE = _BOX.stop  # the last value
_SEED_BITS = 53  # every JSON reader keeps this many bits exactly
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_FIELDS = ("number", "crop", "flip", "operations", "erase", "noise_seed")


@dataclass(frozen=True, kw_only=True)
class View:
    """One augmented view with all its parameters; applying it needs no random numbers."""

    number: int
    crop: Box
    """Box in the source image that is resized to the view."""
    flip: bool
    """Whether the view is mirrored left to right."""
    operations: tuple[tuple[str, float], ...]
    """RandAugment operations in the order they are applied, with their arguments (units: `randaugment.py`)."""
    erase: Box | None
    """Box in the view that is overwritten with noise, or None."""
    noise_seed: int
    """Seed of that noise, 0 to 2^53 - 1."""

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values; `from_json` is the inverse."""
        return {
            "number": self.number,
            "crop": list(self.crop),
            "flip": self.flip,
            "operations": [[name, argument] for name, argument in self.operations],
            "erase": None if self.erase is None else list(self.erase),
            "noise_seed": self.noise_seed,
        }

    @staticmethod
    def from_json(record: object) -> "View":
        """Create a view from its parsed JSON record.

        Raises `UserError` for missing or unknown keys, wrong types, boxes with a negative or empty side, unknown
        operations, and out-of-range arguments (including NaN). `apply_view` checks whether boxes fit the image.
        """
        if not isinstance(record, dict) or set(record) != set(_FIELDS):
            got = sorted(map(str, record)) if isinstance(record, dict) else type(record).__name__
            raise UserError(
                "a view record has unexpected or missing keys", got=got, expected=sorted(_FIELDS), fix=RECORD_FIX
            )
        operations = record["operations"]
        pairs = isinstance(operations, list) and all(isinstance(op, list) and len(op) == 2 for op in operations)
        _check_field(pairs and len(operations) <= _OPS_MAX, record, "operations", "up to 15 (name, argument) pairs")
        _check_field(isinstance(record["flip"], bool), record, "flip", "true or false")
        return View(
            number=_whole(record, "number", 2**63),
            crop=_box(record, "crop"),
            flip=record["flip"],
            operations=tuple(check_operation(name, argument) for name, argument in operations),
            erase=None if record["erase"] is None else _box(record, "erase"),
            noise_seed=_whole(record, "noise_seed", 2**_SEED_BITS),
        )


def _check_field(ok: bool, record: dict[str, Any], name: str, expected: str) -> None:
    if not ok:
        got = repr(record[name])[:200]
        raise UserError(f"invalid field {name!r} in a view record", got=got, expected=expected, fix=RECORD_FIX)


def _whole(record: dict[str, Any], name: str, limit: int) -> int:
    value = record[name]
    _check_field(type(value) is int and 0 <= value < limit, record, name, f"a whole number from 0 to {limit - 1}")
    return int(value)


def _box(record: dict[str, Any], name: str) -> Box:
    box = record[name]
    ok = isinstance(box, list) and len(box) == 4 and all(type(side) is int and 0 <= side < 2**31 for side in box)
    _check_field(ok and min(box[2:]) > 0, record, name, "[left, top, width, height] >= 0, width and height > 0")
    return box[0], box[1], box[2], box[3]


def sample_view(config: ViewConfig, key: str, number: int, width: int, height: int) -> View:
    """Sample view `number` of image `key`, which is `width` x `height` pixels.

    A Philox generator keyed by a hash of (config.seed, key, number) yields 143 uniform values. Every augmentation has
    its own values, whether or not it is enabled, so disabling one does not change the others: 40 values for the crop
    (10 tries with area, ratio, left and top), 1 for the flip, 60 for RandAugment (15 operations with kind, whether to
    apply it, magnitude and sign), 1 for whether to erase, 40 for the erase box (10 tries, as for the crop) and 1 for
    the noise seed. Only the generator's raw output is used, because NumPy keeps it stable across versions.

    The crop follows torchvision's RandomResizedCrop; RandAugment and random erasing follow timm.
    """
    assert number >= 0, number
    assert min(width, height) > 0, (width, height)
    text = struct.pack("<QQ", config.seed, number) + key.encode()
    digest = hashlib.blake2b(text, digest_size=16, person=b"scalekd-view-1").digest()
    raw = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(_NOISE + 1)
    uniform: list[float] = ((raw >> np.uint64(11)) * 2.0**-53).tolist()  # 0 <= value < 1
    return View(
        number=number,
        crop=_sample_crop(config, uniform[_CROP], width, height),
        flip=uniform[_FLIP] < config.flip_probability,
        operations=_sample_operations(config, uniform[_OPS]),
        erase=_sample_erase(config, uniform[_BOX]) if uniform[_ERASE] < config.erase_probability else None,
        noise_seed=int(uniform[_NOISE] * 2**_SEED_BITS),
    )


def _between(uniform: float, bounds: tuple[float, float]) -> float:
    return bounds[0] + uniform * (bounds[1] - bounds[0])


def _log_between(uniform: float, bounds: tuple[float, float]) -> float:
    return math.exp(_between(uniform, (math.log(bounds[0]), math.log(bounds[1]))))


def _sample_crop(config: ViewConfig, uniform: Sequence[float], width: int, height: int) -> Box:
    """RandomResizedCrop's box: the first of ten tries that fits, or else the largest centered box with an allowed
    ratio."""
    for i in range(0, len(uniform), 4):
        area = width * height * _between(uniform[i], config.crop_scale)
        ratio = _log_between(uniform[i + 1], config.crop_ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(uniform[i + 2] * (width - w + 1)), int(uniform[i + 3] * (height - h + 1)), w, h
    low, high = config.crop_ratio
    w = min(width, max(1, round(height * high)))
    h = min(height, max(1, round(width / low)))
    return (width - w) // 2, (height - h) // 2, w, h


def _sample_operations(config: ViewConfig, uniform: Sequence[float]) -> tuple[tuple[str, float], ...]:
    operations = []
    for i in range(0, 4 * config.randaugment_ops, 4):
        kind, applied, normal, sign = uniform[i : i + 4]
        if applied >= _APPLY_PROBABILITY:
            continue
        name = OPERATION_NAMES[int(kind * len(OPERATION_NAMES))]
        deviation = NormalDist().inv_cdf(normal + 2.0**-54)  # half a step keeps it in the open interval (0, 1)
        magnitude = config.randaugment_magnitude + config.randaugment_magnitude_std * deviation
        operations.append((name, resolve_argument(name, magnitude, sign >= 0.5)))
    return tuple(operations)


def _sample_erase(config: ViewConfig, uniform: Sequence[float]) -> Box | None:
    """The box of timm's RandomErasing, strictly smaller than the view; None if none of ten tries fits."""
    size = config.size
    for i in range(0, len(uniform), 4):
        area = size * size * _between(uniform[i], config.erase_area)
        ratio = _log_between(uniform[i + 1], config.erase_ratio)
        w, h = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < w < size and 0 < h < size:
            return int(uniform[i + 2] * (size - w + 1)), int(uniform[i + 3] * (size - h + 1)), w, h
    return None


def apply_view(view: View, image: Pixels, config: ViewConfig) -> Pixels:
    """Crop, resize, flip, RandAugment and erase an (H, W, 3) uint8 image. Returns (size, size, 3) uint8.

    The image is cropped before it is resized (as in torchvision's resized_crop), so no pixel outside the crop has an
    effect. Erased pixels are filled with normal noise per pixel and channel (`NOISE_MEAN`, `NOISE_STD`), rounded and
    clipped. Raises `UserError` if the view does not fit the image or the recipe's size.
    """
    _assert_pixels(image)
    left, top, width, height = view.crop
    _check_inside(view.crop, (image.shape[1], image.shape[0]), "view's crop box lies outside the image")
    resample = _FILTERS[config.interpolation]
    picture = Image.fromarray(image[top : top + height, left : left + width])
    picture = picture.resize((config.size, config.size), resample)
    if view.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, argument in view.operations:
        picture = apply_operation(name, argument, picture, resample)
    pixels = np.array(picture)
    if view.erase is not None:
        left, top, width, height = view.erase
        _check_inside(view.erase, (config.size, config.size), "view's erase box lies outside the view")
        pixels[top : top + height, left : left + width] = _noise(view.noise_seed, width, height)
    return pixels


def _assert_pixels(image: Pixels) -> None:
    assert image.dtype == np.uint8, image.dtype
    assert image.shape[2:] == (3,), image.shape


def _check_inside(box: Box, sides: tuple[int, int], what: str) -> None:
    left, top, width, height = box
    if min(left, top) < 0 or min(width, height) < 1 or left + width > sides[0] or top + height > sides[1]:
        raise UserError(
            f"the {what}",
            got=f"left {left}, top {top}, width {width}, height {height}",
            expected=f"inside {sides[0]} x {sides[1]} pixels",
            fix="use the images and the view size that the cache was made with",
        )


@cache
def _noise_table() -> Pixels:
    """(3, 65536) uint8: each channel's rounded, clipped normal value at each 16-bit quantile, ascending."""
    rows = []
    for normal in map(NormalDist, NOISE_MEAN, NOISE_STD):
        ends = [math.ceil(65536 * normal.cdf(value + 0.5) - 0.5) for value in range(255)]
        rows.append(np.searchsorted(np.array(ends), np.arange(65536), side="right"))
    return np.stack(rows).astype(np.uint8)


def _noise(seed: int, width: int, height: int) -> Pixels:
    """(height, width, 3) uint8 noise. Each value is looked up in a table by 16 bits of raw Philox output, which is
    exact on any platform."""
    count = width * height * 3
    raw = np.random.Philox(key=seed).random_raw(-(-count // 4)).astype("<u8", copy=False)
    quantiles = raw.view("<u2")[:count].reshape(height, width, 3)
    return np.stack([row[quantiles[..., channel]] for channel, row in enumerate(_noise_table())], axis=2)


EVAL_CROP = 0.875
"""Fraction of the resized image's shorter side that the validation view shows."""
LONG = 8
"""Images whose longer side exceeds this multiple of the shorter side are not resized as a whole."""


def eval_resize(size: int, crop_share: float = EVAL_CROP) -> int:
    """Shorter side, in pixels, of the resized image from which a validation view of `size` is cropped; as in timm."""
    return math.floor(size / crop_share)


def eval_view(image: Pixels, size: int, crop_share: float = EVAL_CROP) -> Pixels:
    """The validation view of an (H, W, 3) uint8 image: the shorter side is resized to floor(size / crop_share) with the
    bicubic filter, and the central size x size pixels are cropped. Returns (size, size, 3) uint8. Smaller images are
    enlarged.
    The pixels equal those of timm's evaluation transform. If the longer side exceeds `LONG` times the shorter side,
    only the central part is resized, so that extreme aspect ratios cost no more; its pixels may differ from timm's by
    1.
    """
    _assert_pixels(image)
    require(0 < crop_share <= 1, "crop_share", crop_share, "above 0, at most 1")
    height, width = image.shape[:2]
    short = eval_resize(size, crop_share)
    scaled = [int(short * side / min(width, height)) for side in (width, height)]
    left, top = (round((side - size) / 2) for side in scaled)
    if max(scaled) <= LONG * short:
        resized = Image.fromarray(image).resize((scaled[0], scaled[1]), Image.Resampling.BICUBIC)
        return np.array(resized.crop((left, top, left + size, top + size)))
    x, y = width / scaled[0], height / scaled[1]  # source pixels per scaled pixel
    box = (left * x, top * y, min(width, (left + size) * x), min(height, (top + size) * y))
    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box))
