"""Order: permutations, disjoint shares, independence of ranks and of the point of resumption."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalekd_cache.errors import UserError
from scalekd_cache.order import Order, epoch_ids, micro_batch_ids, micro_batches_of_rank, steps_per_epoch

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
    step = steps_per_epoch(order.num_samples, global_batch) - 1
    seen = [
        micro_batch_ids(order, epoch=1, step=step, micro=m, global_batch=global_batch, micro_batch=micro_batch)
        for rank in range(world_size)
        for m in micro_batches_of_rank(global_batch, micro_batch, rank, world_size)
    ]
    whole = epoch_ids(order, 1, step * global_batch, (step + 1) * global_batch)
    assert sorted(np.concatenate(seen)) == sorted(whole)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    order = Order(num_samples=1000, block=16, window=8, seed=3)
    first = epoch_ids(order, 0, 0, 1000)
    np.testing.assert_array_equal(first, epoch_ids(Order(num_samples=1000, block=16, window=8, seed=3), 0, 0, 1000))
    assert (first != epoch_ids(order, 1, 0, 1000)).mean() > 0.9
    assert (first != epoch_ids(Order(num_samples=1000, block=16, window=8, seed=4), 0, 0, 1000)).mean() > 0.9


def test_the_order_is_fixed_for_ever() -> None:
    """Resuming a run with another version of this program must meet the same samples."""
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
    with pytest.raises(UserError, match="divides 8: 1, 2, 4"):
        micro_batches_of_rank(256, 32, 0, 3)
    with pytest.raises(UserError, match="larger than the data set"):
        steps_per_epoch(10, 11)
