"""Views: sampling as a pure function, timm and torchvision as references, replay from JSON."""

import dataclasses
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.errors import UserError
from scalekd_cache.views import randaugment as augment
from scalekd_cache.views import view as views
from scalekd_cache.views.pixels import pixel_digest
from scalekd_cache.views.view import View, apply_view, eval_view, sample_view

PLAIN = ViewConfig(size=32)
FULL = ViewConfig(size=32, randaugment_ops=2, randaugment_magnitude=8.75, erase_probability=0.25, seed=5)
GOLDEN_VIEWS = [
    '{"number": 0, "crop": [22, 0, 75, 57], "flip": false, '
    '"operations": [["SolarizeIncreasing", 35.0], ["SharpnessIncreasing", 1.759816]], '
    '"erase": null, "noise_seed": 4226972916127517}',
    '{"number": 1, "crop": [39, 14, 42, 46], "flip": true, '
    '"operations": [["ContrastIncreasing", 0.220817]], "erase": null, "noise_seed": 7773770163670044}',
    '{"number": 3, "crop": [34, 14, 61, 57], "flip": false, '
    '"operations": [["SolarizeAdd", 102.0]], "erase": [21, 1, 6, 9], "noise_seed": 8638099399098980}',
]
quick = settings(max_examples=60, derandomize=True, deadline=None)


def photo(width=100, height=75, seed=0):
    """A smooth image with all values and some texture."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)


def gradient(size=32):
    y, x = np.mgrid[:size, :size]
    return np.stack([x * 8, y * 8, (x + y) * 4], axis=2).astype(np.uint8)


def draw(config, count, width=100, height=75):
    return [sample_view(config, f"class/{i}", i % 7, width, height) for i in range(count)]


def plain_view(image, **changes):
    fields = {"number": 0, "crop": (0, 0, image.shape[1], image.shape[0]), "flip": False, "operations": ()}
    return View(**fields | {"erase": None, "noise_seed": 0} | changes)


# Sampling


def test_sampling_ignores_order_and_global_state():
    forward = draw(FULL, 50)
    np.random.seed(1)
    random.seed(1)
    before = (np.random.get_state()[1].tolist(), random.getstate())
    backward = [sample_view(FULL, f"class/{i}", i % 7, 100, 75) for i in reversed(range(50))][::-1]
    assert forward == backward
    assert before == (np.random.get_state()[1].tolist(), random.getstate())


def test_sampling_is_the_same_in_another_process():
    code = (
        "import json; from scalekd_cache.config.stage1 import ViewConfig\n"
        "from scalekd_cache.views.view import sample_view\n"
        f"c = {FULL!r}\n"
        "print(json.dumps([sample_view(c, f'class/{i}', i % 7, 100, 75).to_json() for i in range(20)]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert [View.from_json(record) for record in json.loads(out)] == draw(FULL, 20)


def test_seed_key_and_number_all_matter():
    args = [(5, "a", 0), (6, "a", 0), (5, "b", 0), (5, "a", 1), (5, "a1", 0), (5, "", 0)]
    seeds = {
        sample_view(dataclasses.replace(FULL, seed=seed), key, number, 100, 75).noise_seed for seed, key, number in args
    }
    assert len(seeds) == len(args)


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({"flip_probability": 0.0}, {"flip"}),
        ({"randaugment_ops": 0}, {"operations"}),
        ({"erase_probability": 0.0}, {"erase"}),
        ({"crop_scale": (0.5, 0.5)}, {"crop"}),
        ({"crop_ratio": (9.0, 9.0)}, {"crop"}),
    ],
)
def test_one_stage_does_not_move_the_others(change, stages):
    moved = set()
    for full, part in zip(draw(FULL, 60), draw(dataclasses.replace(FULL, **change), 60), strict=True):
        moved |= {f.name for f in dataclasses.fields(View) if getattr(full, f.name) != getattr(part, f.name)}
    assert moved == stages


def test_more_operations_extend_the_list():
    for two, five in zip(draw(FULL, 60), draw(dataclasses.replace(FULL, randaugment_ops=5), 60), strict=True):
        assert five.operations[: len(two.operations)] == two.operations


def test_distributions():
    drawn = draw(dataclasses.replace(FULL, randaugment_magnitude=5.0, randaugment_magnitude_std=1.0), 3000)

    def near(hits, count, probability):
        assert abs(hits - count * probability) < 4.5 * math.sqrt(count * probability * (1 - probability))

    near(sum(view.flip for view in drawn), 3000, 0.5)
    near(sum(view.erase is not None for view in drawn), 3000, 0.25)
    operations = [operation for view in drawn for operation in view.operations]
    near(len(operations), 6000, 0.5)
    for name in augment.OPERATION_NAMES:
        near(sum(operation[0] == name for operation in operations), len(operations), 1 / 15)
    degrees = np.array([argument for name, argument in operations if name == "Rotate"])
    near(int((degrees < 0).sum()), len(degrees), 0.5)
    assert abs(np.abs(degrees).mean() - 15) < 1  # magnitude 5 of 10, 30 degrees at most
    assert abs(np.abs(degrees).std() - 3) < 0.7
    assert len({view.noise_seed for view in drawn}) == 3000


def test_crops_follow_torchvision():
    """Area and position of the crops, compared with torchvision's sampler over the same number of samples."""
    import torch
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(torch.empty(3, 75, 100), [0.08, 1.0], [3 / 4, 4 / 3])
                       for _ in range(3000)])[:, [1, 0, 3, 2]]  # fmt: skip
    ours = np.array([view.crop for view in draw(PLAIN, 3000)])
    for column in (
        lambda c: c[:, 2] * c[:, 3] / 7500,
        lambda c: c[:, 0] / 100,
        lambda c: c[:, 1] / 75,
        lambda c: np.log(c[:, 2] / c[:, 3]),
    ):
        a, b = column(ours), column(theirs)
        assert abs(a.mean() - b.mean()) < 4.5 * math.sqrt((a.var() + b.var()) / 3000)
        assert np.abs(np.quantile(a, [0.1, 0.5, 0.9]) - np.quantile(b, [0.1, 0.5, 0.9])).max() < 0.05
    fitting = draw(dataclasses.replace(PLAIN, crop_scale=(0.1, 0.5), crop_ratio=(1.0, 1.0)), 3000)  # the first try fits
    areas = np.array([view.crop[2] * view.crop[3] / 7500 for view in fitting])
    assert abs(areas.mean() - 0.3) < 4.5 * 0.4 / math.sqrt(12 * 3000) + 0.002


def test_erase_boxes_follow_timm(monkeypatch):
    """With the same uniform numbers, timm's sampler gives boxes of the same size."""
    uniform = np.random.default_rng(0).random((200, 40)).tolist()
    import torch

    for row in uniform:
        box = views._sample_erase(FULL, row)
        numbers = iter([x for i in range(0, 40, 4) for x in row[i : i + 2]])
        monkeypatch.setattr(random, "uniform", lambda a, b, numbers=numbers: a + (b - a) * next(numbers))
        monkeypatch.setattr(random, "randint", lambda a, b: a)
        image = torch.full((3, 32, 32), 50.0)
        RandomErasing(1.0, 0.02, 1 / 3, 0.3, mode="pixel", device="cpu")(image)
        erased = (image != 50).any(0)
        assert box is not None
        assert (int(erased[0].sum()), int(erased[:, 0].sum())) == box[2:]


@quick
@given(st.integers(1, 3000), st.integers(1, 3000), st.text(max_size=20), st.integers(0, 10**6), st.booleans())
def test_boxes_are_always_inside(width, height, key, number, full):
    view = sample_view(FULL if full else PLAIN, key, number, width, height)
    left, top, w, h = view.crop
    assert min(left, top) >= 0
    assert min(w, h) > 0
    assert left + w <= width
    assert top + h <= height
    if view.erase:
        left, top, w, h = view.erase
        assert min(left, top) >= 0
        assert 0 < left + w <= 32
        assert 0 < top + h <= 32
    assert View.from_json(json.loads(json.dumps(view.to_json()))) == view


@pytest.mark.parametrize(("width", "height", "crop"), [
    (1, 1000, (0, 499, 1, 1)), (1000, 1, (499, 0, 1, 1)), (10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10)),
])  # fmt: skip
def test_fallback_crop_is_centered(width, height, crop):
    whole = dataclasses.replace(PLAIN, crop_scale=(1.0, 1.0))
    assert sample_view(whole, "a", 0, width, height).crop == crop


def test_golden_records():
    records = [json.dumps(sample_view(FULL, "golden/key", number, 100, 75).to_json()) for number in (0, 1, 3)]
    assert records == GOLDEN_VIEWS


# Pixels


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop", [(0, 0, 100, 75), (13, 7, 41, 50), (99, 74, 1, 1), (3, 3, 32, 32)])
def test_crop_resize_flip_equal_torchvision(interpolation, crop):
    config = ViewConfig(size=32, interpolation=interpolation)
    image = photo()
    view = plain_view(image, crop=crop, flip=True)
    left, top, width, height = crop
    expected = tvf.hflip(
        tvf.resized_crop(Image.fromarray(image), top, left, height, width, [32, 32], InterpolationMode(interpolation))
    )
    pixels = apply_view(view, image, config)
    np.testing.assert_array_equal(pixels, np.asarray(expected))
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable


def test_stages_are_applied_in_order():
    image = photo(32, 32)
    view = plain_view(image, flip=True, operations=(("Invert", 0.0), ("TranslateXRel", 0.25)), erase=(1, 2, 10, 20))
    pixels = apply_view(view, image, PLAIN)
    step = Image.fromarray(255 - image[:, ::-1])
    step = np.array(augment.apply_operation("TranslateXRel", 0.25, step, Image.Resampling.BICUBIC))
    step[2:22, 1:11] = pixels[2:22, 1:11]
    np.testing.assert_array_equal(pixels, step)
    reverse = dataclasses.replace(view, operations=view.operations[::-1])
    assert (apply_view(reverse, image, PLAIN) != pixels).any()  # gray is added before or after the inversion


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"flip": True},
        {"crop": (5, 6, 50, 40)},
        {"erase": (3, 4, 9, 11), "noise_seed": 2**53 - 1},
        *({"operations": ((name, augment.resolve_argument(name, 7.3, True)),)} for name in augment.OPERATION_NAMES),
    ],
)
def test_replay_through_json_equals_the_original(change):
    image = photo()
    kept = image.copy()
    view = plain_view(image, **change)
    replayed = View.from_json(json.loads(json.dumps(view.to_json())))
    assert replayed == view
    first = apply_view(view, image, PLAIN)
    assert pixel_digest(apply_view(replayed, image, PLAIN)) == pixel_digest(first)
    np.testing.assert_array_equal(image, kept)


def test_drawn_views_replay():
    image = photo()
    for view in draw(FULL, 40):
        first = apply_view(view, image, FULL)
        assert first.shape == (32, 32, 3)
        replayed = View.from_json(json.loads(json.dumps(view.to_json())))
        np.testing.assert_array_equal(apply_view(replayed, image, FULL), first)


def test_noise_has_the_promised_distribution():
    noise = views._noise(3, 200, 200)
    mean, std = 255 * np.array(IMAGENET_DEFAULT_MEAN), 255 * np.array(IMAGENET_DEFAULT_STD)
    exact = np.clip(np.rint(np.random.default_rng(0).normal(mean, std, (10**6, 3))), 0, 255)
    assert noise.shape == (200, 200, 3)
    assert np.abs(noise.mean((0, 1)) - exact.mean(0)).max() < 1
    assert np.abs(noise.std((0, 1)) - exact.std(0)).max() < 1
    assert np.abs((noise == 0).mean((0, 1)) - (exact == 0).mean(0)).max() < 0.005
    assert (noise.min(), noise.max()) == (0, 255)
    channels = noise.reshape(-1, 3).astype(float)
    assert np.abs(np.corrcoef(channels.T) - np.eye(3)).max() < 0.03  # per pixel and per channel
    assert (views._noise(4, 200, 200) != noise).mean() > 0.9


def test_golden_pixels_that_no_library_filter_touches():
    image = gradient()
    operations = (("PosterizeIncreasing", 3.0), ("SolarizeAdd", 60.0), ("SolarizeIncreasing", 200.0), ("Invert", 0.0))
    view = plain_view(image, flip=True, operations=operations, erase=(4, 5, 16, 12), noise_seed=12345)
    assert pixel_digest(apply_view(view, image, PLAIN)) == "5c78394df07e6588"


@pytest.mark.parametrize("shape", [(1, 1), (1, 1000), (1000, 1), (2, 3), (3, 500)])
def test_extreme_images(shape):
    image = photo(*shape[::-1])
    for number in range(5):
        view = sample_view(FULL, "thin", number, shape[1], shape[0])
        assert apply_view(view, image, FULL).shape == (32, 32, 3)
    assert eval_view(image, 32).shape == (32, 32, 3)


def test_a_view_that_does_not_fit_is_refused():
    image = photo(20, 10)
    for crop in [(0, 0, 21, 10), (1, 1, 20, 9), (0, 10, 1, 1)]:
        with pytest.raises(UserError, match="outside the image"):
            apply_view(plain_view(image, crop=crop), image, PLAIN)
    with pytest.raises(UserError, match="outside the view"):
        apply_view(plain_view(image, erase=(30, 0, 3, 1)), image, PLAIN)


@pytest.mark.parametrize("shape", [(75, 100), (100, 75), (20, 20), (64, 300), (11, 17), (11, 170)])
def test_eval_view_equals_resize_and_center_crop(shape):
    image = photo(*shape[::-1])
    expected = tvf.center_crop(tvf.resize(Image.fromarray(image), 36, InterpolationMode.BICUBIC), [32, 32])
    pixels = eval_view(image, 32, crop_share=0.875)
    difference = np.abs(pixels.astype(int) - np.asarray(expected).astype(int)).max()
    assert difference <= (1 if max(shape) > views.LONG * min(shape) else 0)
    with pytest.raises(UserError, match="crop_share"):
        eval_view(image, 32, crop_share=0.0)
