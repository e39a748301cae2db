"""Order: permutations, disjoint shares, independence of the number of ranks and of where a run resumes."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.data.source import open_source
from scalekd_cache.errors import UserError
from scalekd_cache.loader.order import (
    WINDOW,
    ClassCorrelation,
    Order,
    SparseEpoch,
    batch_limits,
    batches_that_fit,
    class_correlation,
    epoch_ids,
    fitting_batch,
    micro_batch_ids,
    micro_batches_of_rank,
    mixing_window,
    small_dataset_note,
    steps_per_epoch,
    suitable_batch,
)
from scalekd_cache.store.base import stores_features
from scalekd_cache.training.targets import samples_of_share

orders = st.builds(
    Order,
    num_samples=st.integers(1, 3000),
    block=st.integers(1, 300),
    window=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(orders, st.integers(0, 5))
def test_an_epoch_is_a_permutation(order: Order, epoch: int) -> None:
    assert sorted(epoch_ids(order, epoch, 0, order.num_samples)) == list(range(order.num_samples))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(orders, st.integers(0, 3), st.data())
def test_any_slice_is_that_slice_of_the_whole(order: Order, epoch: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, order.num_samples))
    stop = data.draw(st.integers(start, order.num_samples))
    whole = epoch_ids(order, epoch, 0, order.num_samples)
    np.testing.assert_array_equal(epoch_ids(order, epoch, start, stop), whole[start:stop])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(orders, st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 5))
def test_ranks_together_see_the_global_batch_once(order: Order, world_size: int, micro_batch: int) -> None:
    global_batch = 12 * micro_batch
    if order.num_samples < global_batch:
        return
    step = steps_per_epoch(order, global_batch) - 1
    seen = [
        micro_batch_ids(order, epoch=1, step=step, micro=m, global_batch=global_batch, micro_batch=micro_batch)
        for rank in range(world_size)
        for m in micro_batches_of_rank(global_batch, micro_batch, rank, world_size)
    ]
    whole = epoch_ids(order, 1, step * global_batch, (step + 1) * global_batch)
    assert sorted(np.concatenate(seen)) == sorted(whole)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(orders, st.integers(1, 12), st.integers(0, 3), st.data())
def test_a_resumed_run_sees_the_rest(order: Order, global_batch: int, epoch: int, data: st.DataObject) -> None:
    """The batches before and after an interruption, on other ranks, form the epoch of an uninterrupted run."""
    if order.num_samples < global_batch:
        return
    steps = steps_per_epoch(order, global_batch)
    stop = data.draw(st.integers(0, steps))
    possible = [count for count in range(1, global_batch + 1) if global_batch % count == 0]
    worlds = [data.draw(st.sampled_from(possible)) for _ in range(2)]

    def seen(steps_of: range, world_size: int) -> list[list[int]]:
        return [
            sorted(
                int(sample)
                for rank in range(world_size)
                for micro in micro_batches_of_rank(global_batch, 1, rank, world_size)
                for sample in micro_batch_ids(
                    order, epoch=epoch, step=step, micro=micro, global_batch=global_batch, micro_batch=1
                )
            )
            for step in steps_of
        ]

    parts = seen(range(stop), worlds[0]) + seen(range(stop, steps), worlds[1])
    whole = epoch_ids(order, epoch, 0, steps * global_batch).reshape(steps, global_batch)
    assert parts == np.sort(whole).tolist()
    assert len({sample for batch in parts for sample in batch}) == steps * global_batch


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.integers(2, 60), st.integers(1, 80))
def test_windows_of_class_sorted_samples_are_as_mixed_as_promised(classes: int, each: int, block: int) -> None:
    """At most a tenth more same-class pairs in a window than by chance, or the dataset is one window."""
    labels = np.repeat(np.arange(classes), each)
    found = class_correlation(labels)
    window = mixing_window(len(labels), block, found)
    if window * block >= len(labels):
        return
    blocks = -(-len(labels) // block)
    if window > WINDOW:  # if neighbors are unrelated, a short last window does no harm
        assert blocks % window in (0, *range(window - blocks // window, window)), "a short window at the end"
    same = (block - 1) / (window * block - 1)
    assert same * found.neighbors + (1 - same) * found.chance <= 1.1 * found.chance


def test_the_window_grows_with_likeness_alone() -> None:
    """ImageNet's numbers: shuffled, sorted by class, and sorted with nothing to gain (one class)."""
    labels = np.repeat(np.arange(1000), 1281)
    found = class_correlation(labels)
    assert found.neighbors > 0.97
    assert found.chance == pytest.approx(0.001, rel=1e-2)
    assert mixing_window(len(labels), 64, found) == 10_008  # half of the dataset's 20,016 blocks
    assert mixing_window(len(labels), 1, found) == WINDOW
    mixed = class_correlation(np.random.default_rng(0).permutation(labels))
    assert mixed.neighbors == pytest.approx(mixed.chance, rel=0.02)
    assert mixing_window(len(labels), 64, mixed) == WINDOW
    assert mixing_window(10**6, 64, class_correlation(np.zeros(1000, np.int64))) == WINDOW
    assert mixing_window(1, 64, ClassCorrelation(1.0, 1.0)) == WINDOW


def test_a_class_sorted_folder_is_mixed_before_it_is_cached(tmp_path) -> None:
    """The canonical order of a folder is that of hashed keys, so neighbors share a class only by chance."""
    for split, each in (("train", 300), ("val", 1)):
        for label in range(10):
            folder = tmp_path / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(each):
                (folder / f"{number:05d}.jpg").write_bytes(b"not read here")
    source = open_source(DataConfig(source=str(tmp_path)), "train")
    labels = np.array([sample.label for sample in source.samples])
    found = class_correlation(labels)
    assert class_correlation(np.sort(labels)).neighbors > 0.9
    assert found.neighbors == pytest.approx(found.chance, abs=0.01)
    assert mixing_window(len(labels), 64, found) == WINDOW


def test_epochs_and_seeds_differ_and_repeat() -> None:
    order = Order(num_samples=1000, block=16, window=8, seed=3)
    first = epoch_ids(order, 0, 0, 1000)
    np.testing.assert_array_equal(first, epoch_ids(Order(num_samples=1000, block=16, window=8, seed=3), 0, 0, 1000))
    assert (first != epoch_ids(order, 1, 0, 1000)).mean() > 0.9
    assert (first != epoch_ids(Order(num_samples=1000, block=16, window=8, seed=4), 0, 0, 1000)).mean() > 0.9


def test_the_order_is_fixed_for_ever() -> None:
    """A run resumed with another version of this package must get the same samples."""
    order = Order(num_samples=23, block=4, window=2, seed=7)
    assert epoch_ids(order, 2, 0, 23).tolist() == [
        6,
        7,
        21,
        5,
        20,
        4,
        22,
        1,
        17,
        0,
        16,
        18,
        3,
        2,
        19,
        10,
        14,
        13,
        15,
        8,
        11,
        12,
        9,
    ]


def test_a_window_needs_memory_of_a_window_only() -> None:
    order = Order(num_samples=10**9, block=64, window=64, seed=0)
    ids = epoch_ids(order, 0, 5 * 10**8, 5 * 10**8 + 256)
    assert len(np.unique(ids)) == 256


def test_uneven_shares_are_refused_with_the_nearest_possible() -> None:
    with pytest.raises(
        UserError, match=r"8 micro-batches of 32(.|\n)*: set --batch 288 --train.micro_batch_size 32 or --nproc 2"
    ):
        micro_batches_of_rank(256, 32, 0, 3)
    with pytest.raises(UserError, match=r"set --train\.micro_batch_size 4 or --nproc 1"):
        micro_batches_of_rank(8, 8, 0, 2)
    assert len(micro_batches_of_rank(8, 4, 0, 2)) == len(micro_batches_of_rank(16, 8, 0, 2)) == 1
    with pytest.raises(UserError, match="larger than the dataset"):
        steps_per_epoch(Order(num_samples=10, block=8, window=3, seed=0), 11)


def sparse_order(num_samples, every, ranges, block=8, window=3):
    return Order(num_samples=num_samples, block=block, window=window, seed=3, features_every=every, ranges=ranges)


@pytest.mark.parametrize(("num_samples", "every", "shard"), [(96, 4, 32), (1000, 4, 128), (777, 2, 100), (640, 8, 64)])
def test_micro_batches_of_a_sparse_cache(num_samples, every, shard):
    """Each has its share of samples with features first, no sample is repeated, and every step of every view exists."""
    ranges, global_batch, micro_batch = -(-num_samples // shard), 32, 16
    order = sparse_order(num_samples, every, ranges)
    steps = steps_per_epoch(order, global_batch)
    assert steps >= (num_samples - 2 * ranges * every) // global_batch
    for epoch in range(every):

        def mask(positions, view=epoch):
            return stores_features(positions % shard, view, every)

        found = SparseEpoch(order, epoch, mask)
        seen = [
            found.micro_batch_ids(step=step, micro=micro, global_batch=global_batch, micro_batch=micro_batch)
            for step in range(steps)
            for micro in range(global_batch // micro_batch)
        ]
        for ids in seen:
            there = micro_batch // every
            assert mask(ids).tolist() == [True] * there + [False] * (micro_batch - there)
        everything = np.concatenate(seen)
        assert len(np.unique(everything)) == len(everything)
        assert everything.min() >= 0
        assert everything.max() < num_samples


def test_every_image_has_features_equally_often():
    rows = np.arange(70)
    for every in (2, 4, 8):
        counts = sum(stores_features(rows, view, every).astype(int) for view in range(10, 10 + every))
        assert counts.tolist() == [1] * len(rows)
        for view in range(every):
            quota = int(stores_features(rows, view, every).sum())
            assert len(rows) // every <= quota <= -(-len(rows) // every)


def test_a_sparse_cache_too_small_for_a_batch():
    with pytest.raises(UserError, match=r"global batch \(32 images\) is too large") as caught:
        steps_per_epoch(sparse_order(64, 4, 20), 32)
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
    found = small_dataset_note(Order(num_samples=images, block=8, window=3, seed=0), batch, micro)
    assert found is not None
    assert found.startswith(note)
    better = suitable_batch(images, batch, micro)
    assert better == batch or f"--batch {better} " in found


def test_no_note_for_suitable_batches():
    assert small_dataset_note(Order(num_samples=1438, block=8, window=3, seed=0), 32, 32) is None
    assert suitable_batch(1438, 32, 32) == 32
    dropped = small_dataset_note(Order(num_samples=639, block=8, window=3, seed=0), 58, 58)  # 11 steps, 1 of 639
    assert dropped is None


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_suggested_batches_can_be_divided(world_size):
    for images in range(1, 300):
        batch = fitting_batch(images, 64, 4, world_size)
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
    order = Order(num_samples=images, block=8, window=3, seed=0)
    with pytest.raises(UserError, match="is larger than the dataset") as caught:
        steps_per_epoch(order, 2 * images, micro, world_size)
    found = {
        name: int(value)
        for name, value in re.findall(r"--(batch|train.micro_batch_size|nproc) (\d+)", str(caught.value))
    }
    suggested = {"micro": found.pop("train.micro_batch_size", micro), "nproc": found.pop("nproc", world_size), **found}
    assert suggested == options
    each = min(suggested["micro"], suggested["batch"])
    micro_batches_of_rank(suggested["batch"], each, 0, suggested["nproc"])
    assert steps_per_epoch(order, suggested["batch"], each, suggested["nproc"]) > 0


@pytest.mark.parametrize("share", [None, 0.25, 0.5, 1 / 3])
@pytest.mark.parametrize("every", [1, 2, 4])
def test_suggested_batches_suit_sparse_caches_and_feature_shares(every, share):
    suggested = 0
    if share is not None and share * every > 1:
        pytest.skip("more features than are stored")
    for images in range(8, 300, 3):
        limits = batch_limits(share, every, ranges=2)
        options = batches_that_fit(images, 32, **limits)
        if not options:
            continue
        batch = int(options.removeprefix("--batch "))
        suggested += 1
        samples_of_share(share, every, min(batch, 32), "cache")
        order = Order(num_samples=images, block=8, window=3, seed=0, features_every=every, ranges=2)
        assert steps_per_epoch(order, batch) >= 1
    assert suggested > 50


def test_a_cache_too_small_for_any_batch_suggests_none():
    with pytest.raises(
        UserError, match=r"no batch suits so few images: micro-batches must be multiples of 8"
    ) as caught:
        steps_per_epoch(sparse_order(10, 4, 2), 32, 32, unit=8)
    assert "--batch" not in str(caught.value)


def test_the_note_for_a_sparse_cache_suggests_no_batch():
    note = small_dataset_note(sparse_order(64, 4, 2), 32, 32)
    assert note is not None
    assert "--batch" not in note
