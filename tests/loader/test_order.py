"""Order: permutations, disjoint shares, independence of the number of ranks and of where a run resumes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.data.source import open_source
from scalekd_cache.loader.batch_size import micro_batches_of_rank
from scalekd_cache.loader.order import (
    WINDOW,
    ClassCorrelation,
    Order,
    SparseEpoch,
    class_correlation,
    epoch_ids,
    micro_batch_ids,
    mixing_window,
    steps_per_epoch,
)
from scalekd_cache.store.base import stores_features

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
