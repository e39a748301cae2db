"""Loaders over the small cache, and comparison of two sequences of batches."""

import torch
from small_cache import SAMPLES, shared_cache

from scalekd_cache.loader.loader import Batch, CacheLoader
from scalekd_cache.loader.order import Order

GLOBAL, MICRO = 32, 16


ORDER = Order(num_samples=SAMPLES, block=8, window=3, seed=5)


def make_loader(cache=None, *, order=ORDER, epochs=2, **changes):
    sizes = {"global_batch": GLOBAL, "micro_batch": MICRO, **changes}
    return CacheLoader(cache or shared_cache(), order, epochs=epochs, **sizes)


def tensors_of(batch: Batch):
    return [batch.images, batch.labels, batch.ids, *(tensor for stored in batch.stored for tensor in stored)]


def assert_same(batch: Batch, other: Batch):
    assert batch.view == other.view
    pairs = zip(tensors_of(batch), tensors_of(other), strict=True)
    for mine, theirs in pairs:
        if mine is None or theirs is None:
            assert mine is theirs
            continue
        assert (mine.dtype, mine.stride()) == (theirs.dtype, theirs.stride())  # convolutions depend on the layout
        assert torch.equal(mine, theirs)


def assert_same_batches(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert_same(batch, other)
