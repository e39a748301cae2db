"""The sample order, defined only in this module.

In: (num_samples, block, window, seed) and an epoch, step and rank. Out: positions in a view's canonical order.
Invariant: functions are pure. The global batch at a step does not depend on ranks, workers or resuming.

An epoch is a block shuffle: blocks of `block` adjacent samples are permuted, then the samples in every `window`
consecutive blocks are permuted together. Reads stay contiguous (one read per block), and a sample can end up anywhere.
No array as large as the dataset is allocated: memory is O(num_samples / block + block * window).
A sparse cache stores features for one in `features_every` samples in a view. Each epoch then consists of two streams in
the order above: samples with features and samples without. Every micro-batch takes a fixed number from each stream,
with the samples with features first.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
FeatureMask = Callable[[Ids], NDArray[np.bool_]]
"""Maps positions in a view to a mask of the samples that have features."""
WINDOW = 64
"""Minimum number of blocks in a window, used if neighboring samples are unrelated."""
NEIGHBORS = 64
"""Samples closer than this count as neighbors."""
EXCESS = 0.1
"""Maximum excess over chance of the probability that two samples in a window have the same class."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """The sample order for a training run over views with `num_samples` samples each."""

    num_samples: int
    """Number of samples in one view."""
    block: int
    """Number of neighboring samples that stay together in one window."""
    window: int
    """Number of blocks whose samples are shuffled together."""
    seed: int
    features_every: int = 1
    """One in this many samples in a view has features (1: every sample)."""
    ranges: int = 1
    """Number of image ranges. Samples with features are counted separately in each range."""


class ClassCorrelation(NamedTuple):
    """How often neighboring samples have the same class."""

    neighbors: float
    """Share of neighboring pairs with the same class."""
    chance: float
    """The same share for random pairs."""


def class_correlation(labels: Ids) -> ClassCorrelation:
    """Class correlation between neighbors in the canonical order; labels are (N,) int64.

    Each distance is weighted by the number of pairs at that distance in a block of `NEIGHBORS` samples.
    """
    count = len(labels)
    if count < 2:
        return ClassCorrelation(1.0, 1.0)
    sizes = np.bincount(labels).astype(np.float64)
    chance = float((sizes * (sizes - 1)).sum() / (count * (count - 1.0)))
    distances = range(1, min(NEIGHBORS, count))
    weights = [NEIGHBORS - distance for distance in distances]
    same = [float(np.mean(labels[distance:] == labels[:-distance])) for distance in distances]
    return ClassCorrelation(float(np.average(same, weights=weights)), chance)


def mixing_window(num_samples: int, block: int, found: ClassCorrelation) -> int:
    """The number of blocks per window (at least `WINDOW`) for which the probability that two samples in a window have
    the same class is at most `EXCESS` above chance.
    In a window of w blocks with b samples each, two samples come from the same block with probability (b - 1) /
    (w b - 1); a fraction `found.neighbors` of such pairs are of the same class. All windows have the same size, because
    a short last window would be shuffled less well. If no such size is large enough, the whole dataset is one window.
    """
    if found.chance == 0:
        return WINDOW
    excess = max(0.0, found.neighbors - found.chance) / found.chance
    needed = math.ceil((1 + (block - 1) * excess / EXCESS) / block)
    if needed <= WINDOW:
        return WINDOW
    blocks = -(-num_samples // block)
    return max(WINDOW, -(-blocks // max(1, blocks // needed)))


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@lru_cache(maxsize=2)
def _block_order(order: Order, epoch: int) -> tuple[Ids, Ids]:
    """Block numbers in the epoch's order, and the blocks' start positions, followed by the end position of the last
    block."""
    num_blocks = -(-order.num_samples // order.block)
    blocks = _generator(order.seed, epoch).permutation(num_blocks).astype(np.int64)
    sizes = np.minimum(order.block, order.num_samples - blocks * order.block)
    return blocks, np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])


@lru_cache(maxsize=4)
def _window_ids(order: Order, epoch: int, window: int) -> Ids:
    """The shuffled positions in one window of blocks."""
    blocks, _ = _block_order(order, epoch)
    members = blocks[window * order.window : (window + 1) * order.window]
    parts = [np.arange(b * order.block, min((b + 1) * order.block, order.num_samples), dtype=np.int64) for b in members]
    ids: Ids = _generator(order.seed, epoch, window).permutation(np.concatenate(parts))
    return ids


def epoch_ids(order: Order, epoch: int, start: int, stop: int) -> Ids:
    """Entries [start, stop) of the epoch's permutation of range(num_samples), as int64."""
    assert 0 <= start <= stop <= order.num_samples
    _, begins = _block_order(order, epoch)
    return _joined(begins[:: order.window], lambda window: _window_ids(order, epoch, window), start, stop)


def _joined(begins: Ids, ids_of: Callable[[int], Ids], start: int, stop: int) -> Ids:
    """Entries [start, stop) of the concatenated window ids; window w starts at entry begins[w]."""
    parts = []
    at = start
    while at < stop:
        window = int(np.searchsorted(begins, at, side="right")) - 1
        offset = at - int(begins[window])
        part = ids_of(window)[offset : offset + stop - at]
        assert len(part), (start, stop, begins[-1])
        parts.append(part)
        at += len(part)
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


class SparseEpoch:
    """One epoch over a sparse cache: the samples with features and those without, each ordered as in `epoch_ids`."""

    def __init__(self, order: Order, epoch: int, mask: FeatureMask) -> None:
        self.order, self.epoch, self._mask = order, epoch, mask
        _, begins = _block_order(order, epoch)
        sizes = np.diff([*begins[: -1 : order.window].tolist(), order.num_samples])
        there = np.array([mask(_window_ids(order, epoch, window)).sum() for window in range(len(sizes))], np.int64)
        self._begins = {wanted: self._starts(there if wanted else sizes - there) for wanted in (True, False)}
        self._chosen = lru_cache(maxsize=4)(self._of_window)

    @staticmethod
    def _starts(counts: Ids) -> Ids:
        starts: Ids = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        return starts

    def ids(self, start: int, stop: int, *, features: bool) -> Ids:
        """Entries [start, stop) among the samples with features, or among those without."""
        return _joined(self._begins[features], lambda window: self._chosen(window, features), start, stop)

    def _of_window(self, window: int, features: bool) -> Ids:
        """The shuffled positions in a window that have features, or those that do not."""
        ids = _window_ids(self.order, self.epoch, window)
        chosen: Ids = ids[self._mask(ids) == features]
        return chosen

    def micro_batch_ids(self, *, step: int, micro: int, global_batch: int, micro_batch: int) -> Ids:
        """Positions (micro_batch,) of a micro-batch, as in `micro_batch_ids`; samples with features come first."""
        number = step * (global_batch // micro_batch) + micro
        parts = []
        for features, count in zip((True, False), featured(self.order, micro_batch), strict=True):
            parts.append(self.ids(number * count, (number + 1) * count, features=features))
        return np.concatenate(parts)


def featured(order: Order, count: int) -> tuple[int, int]:
    """How many samples in a batch of `count` are read with features, and how many without."""
    there = count // order.features_every
    return there, count - there


def steps_per_epoch(order: Order, global_batch: int) -> int:
    """Number of full global batches in an epoch; 0 if the dataset is too small. The last partial batch is dropped; each
    epoch drops different samples.

    In a sparse cache, a range may fall one sample short of its share of samples with (or without) features. The number
    of steps is based on the worst case, so it is the same in every epoch.
    """
    images, every = order.num_samples, order.features_every
    if every == 1:
        return images // global_batch
    lost, (there, rest) = order.ranges * (every - 1), featured(order, global_batch)
    return max(0, min((images - lost) // every // max(1, there), (images - (images + lost) // every) // rest))


def micro_batch_ids(order: Order, *, epoch: int, step: int, micro: int, global_batch: int, micro_batch: int) -> Ids:
    """Positions (micro_batch,) of micro-batch `micro` in the epoch's global batch `step`."""
    start = step * global_batch + micro * micro_batch
    return epoch_ids(order, epoch, start, start + micro_batch)
