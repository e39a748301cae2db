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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scalekd_cache.errors import UserError, counted, join_or

Ids = NDArray[np.int64]
FeatureMask = Callable[[Ids], NDArray[np.bool_]]
"""Maps positions in a view to a mask of the samples that have features."""
WINDOW = 64
"""Minimum number of blocks in a window, used if neighboring samples are unrelated."""
NEIGHBORS = 64
"""Samples closer than this count as neighbors."""
MAX_DENOMINATOR = 1024
"""Largest denominator of a feature share, a fraction of a micro-batch."""
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


def smallest_micro_batch(shares: Iterable[float]) -> int:
    """A number of samples whose multiples all contain a whole number of samples, at least 2, for each feature share."""
    parts = [Fraction(share).limit_denominator(MAX_DENOMINATOR) for share in shares]
    return math.lcm(*(one.denominator * (2 if one.numerator == 1 < one.denominator else 1) for one in parts))


def batch_limits(share: float | None, every: int, ranges: int) -> dict[str, int]:
    """The keywords of `fitting_batch` for a cache with features for one in `every` samples of each of its ranges.
    `share` is the feature share (None: all samples with features)."""
    return {"every": every, "ranges": ranges, "unit": math.lcm(every, smallest_micro_batch([share or 1 / every]))}


def steps_per_epoch(
    order: Order, global_batch_size: int, micro_batch_size: int | None = None, world_size: int = 1, unit: int = 1
) -> int:
    """Number of full global batches in an epoch. The last partial batch is dropped; each epoch drops different samples.
    In a sparse cache, a range may fall one sample short of its share of samples with (or without) features. The number
    of steps is based on the worst case, so it is the same in every epoch.

    Args:
        order: the sample order.
        global_batch_size: number of samples per optimizer step.
        micro_batch_size: number of samples per micro-batch, for the error (default: the global batch).
        world_size: number of processes, for the error.
        unit: micro-batches must be multiples of this (`smallest_micro_batch`), for the error.

    Raises:
        UserError: the dataset is smaller than one global batch; the message suggests a batch, if one can be used.
    """
    steps = _steps(order.num_samples, global_batch_size, order.features_every, order.ranges)
    if steps == 0:
        raise batch_too_large(
            order.num_samples,
            global_batch_size,
            micro_batch_size or global_batch_size,
            world_size,
            every=order.features_every,
            ranges=order.ranges,
            unit=unit,
        )
    return steps


def _steps(num_samples: int, global_batch: int, every: int, ranges: int) -> int:
    if every == 1:
        return num_samples // global_batch
    lost, there = ranges * (every - 1), global_batch // every
    with_features = (num_samples - lost) // every // max(1, there)
    return max(0, min(with_features, (num_samples - (num_samples + lost) // every) // (global_batch - there)))


def batch_too_large(
    num_samples: int,
    global_batch_size: int,
    micro_batch_size: int,
    world_size: int = 1,
    *,
    every: int = 1,
    ranges: int = 1,
    unit: int = 1,
) -> UserError:
    """The error for a dataset that is smaller than a global batch. Keywords as in `fitting_batch`."""
    batch, images = counted(global_batch_size, "image"), counted(num_samples, "image")
    options = batches_that_fit(num_samples, micro_batch_size, world_size, every=every, ranges=ranges, unit=unit)
    if every == 1:
        wrong = f"the global batch ({batch}) is larger than the dataset ({images})"
    else:
        sparse = f"{images} in {counted(ranges, 'shard')}, with features for only one in {every} samples"
        wrong = f"the global batch ({batch}) is too large for this dataset ({sparse})"
    if options:
        return UserError(wrong, fix=f"use a smaller batch, for example {options}")
    none = f"no batch suits so few images: micro-batches must be multiples of {unit}"
    return UserError(wrong, fix=f"{none}; cache more images, or store and use features for all views")


FEW_STEPS = 10
"""With fewer steps per epoch, a run prints a note."""
DROPPED_SHARE = 0.1
"""If an epoch drops more than this share of the images, a run prints a note."""
SMALL_BATCH = 20
"""Upper limit for the suggested global batch, unless a larger one still gives `FEW_STEPS` steps per epoch."""


def small_dataset_note(
    order: Order, global_batch: int, micro_batch: int, world_size: int = 1, unit: int = 1
) -> str | None:
    """A note for runs whose epochs have few steps or drop many images; it suggests a batch, unless the cache is sparse.
    Arguments and error as in `steps_per_epoch`."""
    steps, images = steps_per_epoch(order, global_batch, micro_batch, world_size, unit), order.num_samples
    if _is_suitable(images, steps, steps * global_batch):
        return None
    note, dropped = f"{counted(steps, 'step')} per epoch", images - steps * global_batch
    if dropped:
        note += f"; {dropped:,} of {counted(images, 'image')} {'is' if dropped == 1 else 'are'} dropped in each epoch"
    sparse = order.features_every > 1
    better = None if sparse else fitting_batch(images, global_batch, micro_batch, world_size, unit=unit)
    if better is not None and better != global_batch:
        note += f" (--batch {better} drops {images % better or 'none'})"
        steps = images // better
    return note + ("; with so few steps per epoch, increase --epochs" if steps < FEW_STEPS else "")


def suitable_batch(
    images: int,
    global_batch: int,
    micro_batch: int,
    world_size: int = 1,
    *,
    every: int = 1,
    ranges: int = 1,
    unit: int = 1,
) -> int:
    """The given global batch, or a smaller one if its epochs would have few steps or drop many images. Keywords as in
    `fitting_batch`."""
    steps = _steps(images, global_batch, every, ranges)
    if _is_suitable(images, steps, steps * global_batch):
        return global_batch
    fitting = fitting_batch(images, global_batch, micro_batch, world_size, every=every, ranges=ranges, unit=unit)
    return fitting or global_batch


def fitting_batch(
    images: int,
    global_batch: int,
    micro_batch: int,
    world_size: int = 1,
    *,
    every: int = 1,
    ranges: int = 1,
    unit: int = 1,
) -> int | None:
    """The global batch of at most `global_batch` that suits a small dataset: of the batches that give about `FEW_STEPS`
    to twice as many steps per epoch (or, with very few images, of `SMALL_BATCH` images or less), the largest that drops
    the fewest images. It can be divided into micro-batches of at most `micro_batch` for this world size; None if no
    batch can.

    Args:
        images: number of samples in a view.
        global_batch: the largest possible global batch.
        micro_batch: number of samples per micro-batch.
        world_size: number of processes.
        every: one in this many samples has features.
        ranges: number of image ranges.
        unit: micro-batches must be multiples of this (`smallest_micro_batch`).
    """
    most = min(global_batch, images, max(SMALL_BATCH, images // FEW_STEPS))
    least = (most - 1) // 2 if unit == 1 else 0
    batches = (batch for batch in range(most, least, -1) if batch <= micro_batch or batch % micro_batch == 0)
    possible = [
        batch
        for batch in batches
        if max(1, batch // micro_batch) % world_size == 0
        and min(batch, micro_batch) % unit == 0
        and _steps(images, batch, every, ranges)
    ]
    possible = [batch for batch in possible if batch > (most - 1) // 2] or possible
    return min(possible, key=lambda batch: images % batch, default=None)


def _is_suitable(images: int, steps: int, used: int) -> bool:
    return steps >= FEW_STEPS and images - used <= DROPPED_SHARE * images


def views_note(epochs: int, views: int) -> str | None:
    """A note for runs with fewer epochs than views, since each epoch reads one view of every image."""
    if epochs >= views:
        return None
    what = "epoch reads" if epochs == 1 else "epochs read"
    return f"{epochs} {what} {epochs} of the {views} views, one per epoch (--epochs {views} reads all)"


def batches_that_fit(
    num_samples: int, micro_batch_size: int, world_size: int = 1, *, every: int = 1, ranges: int = 1, unit: int = 1
) -> str:
    """The options that set a global batch for a small dataset, with micro-batches of at most this size; empty if no
    batch is possible. Keywords as in `fitting_batch`."""
    known = {"every": every, "ranges": ranges, "unit": unit}
    if batch := fitting_batch(num_samples, num_samples, micro_batch_size, world_size, **known):
        return f"--batch {batch}"
    if unit > 1:  # smaller micro-batches may not be multiples
        batch = fitting_batch(num_samples, num_samples, micro_batch_size, **known)
        return f"--batch {batch} --nproc 1" if batch and world_size > 1 else ""
    processes = min(world_size, num_samples)  # smaller micro-batches, one for each process
    most = min(num_samples, max(SMALL_BATCH, num_samples // FEW_STEPS, 2 * processes))
    micro = max(1, min(micro_batch_size, most // processes))
    fewer = f" --nproc {processes}" if processes < world_size else ""
    return f"--batch {micro * processes} --train.micro_batch_size {micro}{fewer}"


def micro_batch_ids(order: Order, *, epoch: int, step: int, micro: int, global_batch: int, micro_batch: int) -> Ids:
    """Positions (micro_batch,) of micro-batch `micro` in the epoch's global batch `step`."""
    start = step * global_batch + micro * micro_batch
    return epoch_ids(order, epoch, start, start + micro_batch)


def usable_ranks(micro_batches: int, ranks: int) -> int:
    """The largest number of ranks, at most `ranks`, that get equally many of the micro-batches."""
    return next(n for n in range(min(ranks, micro_batches), 0, -1) if micro_batches % n == 0)


def micro_batches_of_rank(global_batch: int, micro_batch: int, rank: int, world_size: int) -> range:
    """The micro-batches in a global batch that a rank computes, by number, in order.

    BatchNorm statistics are computed per micro-batch, so its size is fixed, and ranks get whole micro-batches.

    Raises:
        UserError: the micro-batches cannot be divided evenly among the ranks; the message suggests valid values.
    """
    count = global_batch // micro_batch
    assert count * micro_batch == global_batch
    if count % world_size:
        share, step = global_batch // world_size, micro_batch * world_size
        smaller = next(n for n in range(min(micro_batch, max(share, 1)), 0, -1) if share % n == 0)
        near = f"--batch {max(round(global_batch / step), 1) * step} --train.micro_batch_size {micro_batch}"
        choices = [f"--train.micro_batch_size {smaller}" if global_batch % world_size == 0 else near]
        choices.append(f"--nproc {usable_ranks(count, world_size)}")
        raise UserError(
            f"a batch of {global_batch} is {counted(count, 'micro-batch')} of {micro_batch}, which cannot be divided "
            f"evenly among {counted(world_size, 'process')}",
            fix=f"set {join_or(choices)}",
        )
    return range(rank, count, world_size)
