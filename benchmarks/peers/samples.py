"""The samples that every format stores, like those of a cache with Swin-L features and 224 px views.

In: a number. Out: a `Sample`, a pure function of the number, so a writer in another process needs no copy.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.views.pixels import encode_pixels

CLASSES, SIZE = 1000, 224
FEATURES, CODES, LOGITS = 79_708, 75_264, 1_004
"""Bytes of an int8 record of 1536 x 7 x 7 features, the codes in it, bytes of a record of 1,000 logits."""


class Sample(NamedTuple):
    """One stored view. The three payloads are anything with the buffer protocol."""

    number: int
    label: int
    pixels: Any
    features: Any
    logits: Any


Passes = Callable[[], Iterator[Sample]]
"""An opened dataset: every call is one pass over all samples, in another random order."""


def make_sample(number: int) -> Sample:
    """A JPEG of a random crop of a photograph, features distributed like int8 codes, random logits."""
    rng = np.random.default_rng(number)
    picture = _photographs()[number % 2]
    side = int(rng.integers(SIZE // 2, picture.height))
    left, top = int(rng.integers(0, picture.width - side)), int(rng.integers(0, picture.height - side))
    crop = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    codes = (rng.standard_normal(CODES, dtype=np.float32) * 30).clip(-127, 127).astype(np.int8).tobytes()
    features = rng.bytes(FEATURES - CODES) + codes
    pixels = encode_pixels(np.asarray(crop), ViewConfig(size=SIZE))
    return Sample(number, number % CLASSES, pixels, features, rng.bytes(LOGITS))


def make_samples(count: int) -> list[Sample]:
    """The samples 0 to count - 1."""
    return [make_sample(number) for number in range(count)]


@functools.cache
def _photographs() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(picture) for picture in load_sample_images().images]
