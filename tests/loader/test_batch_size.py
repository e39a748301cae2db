"""Batch sizes: division among ranks, steps per epoch, and suggestions that run."""

import re

import pytest

from scalekd_cache.errors import UserError
from scalekd_cache.loader.batch_size import BatchLimits, micro_batches_of_rank
from scalekd_cache.training.targets import samples_of_share


def test_uneven_shares_are_refused_with_the_nearest_possible() -> None:
    with pytest.raises(
        UserError, match=r"8 micro-batches of 32(.|\n)*: set --batch 288 --train.micro_batch_size 32 or --nproc 2"
    ):
        micro_batches_of_rank(256, 32, 0, 3)
    with pytest.raises(UserError, match=r"set --train\.micro_batch_size 4 or --nproc 1"):
        micro_batches_of_rank(8, 8, 0, 2)
    assert len(micro_batches_of_rank(8, 4, 0, 2)) == len(micro_batches_of_rank(16, 8, 0, 2)) == 1
    with pytest.raises(UserError, match="larger than the dataset"):
        BatchLimits.of_dataset(10, 11).steps(11)


def test_a_sparse_cache_too_small_for_a_batch():
    with pytest.raises(UserError, match=r"global batch \(32 images\) is too large") as caught:
        BatchLimits.of_dataset(64, 32, every=4, ranges=20).steps(32)
    assert "64 images in 20 shards, with features for only one in 4 samples" in str(caught.value)


@pytest.mark.parametrize(
    ("images", "batch", "micro", "note"),
    [
        (
            54,
            32,
            32,
            "1 step per epoch; 22 of 54 images are dropped in each epoch (--batch 18 drops none); with so few",
        ),
        (54, 18, 18, "3 steps per epoch; with so few steps per epoch, increase --epochs"),
        (200, 128, 128, "1 step per epoch; 72 of 200 images are dropped in each epoch (--batch 20 drops none)"),
        (1438, 256, 32, "5 steps per epoch; 158 of 1,438 images are dropped in each epoch (--batch 128 drops 30)"),
        (59, 58, 58, "1 step per epoch; 1 of 59 images is dropped in each epoch (--batch 19 drops 2); with so few"),
    ],
)
def test_a_batch_too_large_for_a_small_dataset(images, batch, micro, note):
    limits = BatchLimits.of_dataset(images, micro)
    found = limits.note(batch)
    assert found is not None
    assert found.startswith(note)
    better = limits.suitable(batch)
    assert better == batch or f"--batch {better} " in found


def test_no_note_for_suitable_batches():
    assert BatchLimits.of_dataset(1438, 32).note(32) is None
    assert BatchLimits.of_dataset(1438, 32).suitable(32) == 32
    assert BatchLimits.of_dataset(639, 58).note(58) is None  # 11 steps, 1 of 639


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_suggested_batches_can_be_divided(world_size):
    for images in range(1, 300):
        batch = BatchLimits.of_dataset(images, 4, world_size).fitting(64)
        if batch is None:
            assert world_size > 1
            continue
        assert 0 < batch <= images
        micro = min(4, batch)
        assert batch % micro == 0
        micro_batches_of_rank(batch, micro, 0, world_size)


@pytest.mark.parametrize(
    ("images", "micro", "world_size", "options"),
    [
        (54, 32, 1, {"batch": 18, "micro": 32, "nproc": 1}),
        (54, 32, 4, {"batch": 20, "micro": 5, "nproc": 4}),
        (10_000, 32, 64, {"batch": 960, "micro": 15, "nproc": 64}),
        (3, 32, 8, {"batch": 3, "micro": 1, "nproc": 3}),
    ],
)
def test_the_error_for_a_batch_larger_than_the_dataset_suggests_one_that_runs(images, micro, world_size, options):
    with pytest.raises(UserError, match="is larger than the dataset") as caught:
        BatchLimits.of_dataset(images, micro, world_size).steps(2 * images)
    found = {
        name: int(value)
        for name, value in re.findall(r"--(batch|train.micro_batch_size|nproc) (\d+)", str(caught.value))
    }
    suggested = {"micro": found.pop("train.micro_batch_size", micro), "nproc": found.pop("nproc", world_size), **found}
    assert suggested == options
    each = min(suggested["micro"], suggested["batch"])
    micro_batches_of_rank(suggested["batch"], each, 0, suggested["nproc"])
    assert BatchLimits.of_dataset(images, each, suggested["nproc"]).steps(suggested["batch"]) > 0


@pytest.mark.parametrize("share", [None, 0.25, 0.5, 1 / 3])
@pytest.mark.parametrize("every", [1, 2, 4])
def test_suggested_batches_suit_sparse_caches_and_feature_shares(every, share):
    suggested = 0
    if share is not None and share * every > 1:
        pytest.skip("more features than are stored")
    for images in range(8, 300, 3):
        limits = BatchLimits.of_dataset(images, 32, share=share, every=every, ranges=2)
        if not (options := limits.options()):
            continue
        batch = int(options.removeprefix("--batch "))
        suggested += 1
        samples_of_share(share, every, min(batch, 32), "cache")
        assert limits.steps(batch) >= 1
    assert suggested > 50


def test_a_cache_too_small_for_any_batch_suggests_none():
    with pytest.raises(UserError, match=r"no batch suits so few images: .* multiples of 8") as caught:
        BatchLimits.of_dataset(10, 32, every=4, ranges=2).steps(32)
    assert "--batch" not in str(caught.value)


def test_the_note_for_a_sparse_cache_suggests_no_batch():
    note = BatchLimits.of_dataset(64, 32, every=4, ranges=2).note(32)
    assert note is not None
    assert "--batch" not in note
