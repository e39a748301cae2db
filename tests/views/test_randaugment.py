"""RandAugment: arguments and pixels are compared with timm's own functions."""

import random

import numpy as np
import pytest
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN
from timm.data import auto_augment as timm_augment

from scalekd_cache.errors import UserError
from scalekd_cache.views import randaugment as augment


def photo(width=100, height=75, seed=0):
    """A smooth image with all values and some texture."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", augment.OPERATION_NAMES)
@pytest.mark.parametrize("filter_name", ["bilinear", "bicubic"])
def test_operation_equals_timm(name, filter_name, monkeypatch):
    """Same argument for the same magnitude and sign, and the same pixels for the same argument."""
    resample = Image.Resampling[filter_name.upper()]
    image = Image.fromarray(photo(50, 40))
    for magnitude in (0.0, 2.5, 5.03, 8.75, 10.0, 11.0):
        for negative in (False, True):
            argument = augment.resolve_argument(name, magnitude, negative)
            assert augment.check_operation(name, argument) == (name, argument)
            monkeypatch.setattr(random, "random", lambda negative=negative: 0.9 if negative else 0.1)
            to_argument = timm_augment.LEVEL_TO_ARG[name]
            theirs = to_argument(min(magnitude, 10.0), {}) if to_argument else ()
            assert argument == pytest.approx(theirs[0] if theirs else 0.0, abs=1e-6)
            arguments = (type(theirs[0])(argument),) if theirs else ()
            if name == "PosterizeIncreasing" and argument == 0:  # timm crashes here with Pillow >= 13; black before
                assert not np.asarray(augment.apply_operation(name, argument, image, resample)).any()
                continue
            expected = timm_augment.NAME_TO_OP[name](image, *arguments, fillcolor=augment.FILL, resample=resample)
            ours = augment.apply_operation(name, argument, image, resample)
            assert ours.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


def test_fill_is_the_mean_of_imagenet():
    assert tuple(round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN) == augment.FILL


def test_operations_are_timms_increasing_set():
    assert list(augment.OPERATION_NAMES) == timm_augment._RAND_INCREASING_TRANSFORMS


def test_a_mistyped_operation_names_the_nearest():
    with pytest.raises(UserError, match="SolarizeAdd"):
        augment.check_operation("SolarizedAdd", 3.0)
