"""How large a global batch can be, and which one to suggest.

In: the sample order, micro-batch size, number of processes and feature shares. Out: steps per epoch, or an error or a
note that suggests a batch.
Invariant: a suggested batch can be used with the same other options.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from scalekd_cache.errors import UserError, counted, join_or
from scalekd_cache.loader.order import Order, steps_per_epoch

FEW_STEPS = 10
"""With fewer steps per epoch, a run prints a note."""
DROPPED_SHARE = 0.1
"""If an epoch drops more than this share of the images, a run prints a note."""
SMALL_BATCH = 20
"""Upper limit for the suggested global batch, unless a larger one still gives `FEW_STEPS` steps per epoch."""
MAX_DENOMINATOR = 1024
"""Largest denominator of a feature share, a fraction of a micro-batch."""


def smallest_micro_batch(shares: Iterable[float]) -> int:
    """A number of samples whose multiples all contain a whole number of samples, at least 2, for each feature share."""
    parts = [Fraction(share).limit_denominator(MAX_DENOMINATOR) for share in shares]
    return math.lcm(*(one.denominator * (2 if one.numerator == 1 < one.denominator else 1) for one in parts))


@dataclass(frozen=True)
class BatchLimits:
    """What limits the global batch."""

    order: Order
    """The sample order; only its numbers of samples and ranges and the share of samples with features are used."""
    micro_batch: int
    """Number of samples per micro-batch."""
    world_size: int = 1
    """Number of processes, which get equally many micro-batches."""
    unit: int = 1
    """Micro-batches are multiples of this many samples."""

    @classmethod
    def of_dataset(
        cls,
        images: int,
        micro_batch: int,
        world_size: int = 1,
        *,
        share: float | None = None,
        every: int = 1,
        ranges: int = 1,
    ) -> "BatchLimits":
        """The limits for a dataset whose cache has features for one in `every` samples of each of its ranges.

        `share` is the feature share (None: all samples with features).
        """
        order = Order(num_samples=images, block=1, window=1, seed=0, features_every=every, ranges=ranges)
        return cls(order, micro_batch, world_size, math.lcm(every, smallest_micro_batch([share or 1 / every])))

    def steps(self, batch: int) -> int:
        """Number of steps per epoch.

        Raises:
            UserError: the dataset is smaller than one global batch; the message suggests a batch, if there is one.
        """
        if steps := steps_per_epoch(self.order, batch):
            return steps
        raise self.too_large(batch)

    def too_large(self, batch: int) -> UserError:
        """The error for a dataset that is smaller than a global batch."""
        given, images = counted(batch, "image"), counted(self.order.num_samples, "image")
        wrong = f"the global batch ({given}) is larger than the dataset ({images})"
        if self.order.features_every > 1:
            shards = f"{counted(self.order.ranges, 'shard')}, with features for only one in {self.order.features_every}"
            wrong = f"the global batch ({given}) is too large for this dataset ({images} in {shards} samples)"
        if options := self.options():
            return UserError(wrong, fix=f"use a smaller batch, for example {options}")
        none = f"no batch suits so few images: micro-batches must be multiples of {self.unit}"
        return UserError(wrong, fix=f"{none}; cache more images, or store and use features for all views")

    def note(self, batch: int) -> str | None:
        """A note for runs whose epochs have few steps or drop many images; it suggests a batch, unless the cache is
        sparse. Error as in `steps`."""
        steps, images = self.steps(batch), self.order.num_samples
        if self._is_suitable(batch):
            return None
        note, dropped = f"{counted(steps, 'step')} per epoch", images - steps * batch
        if dropped:
            be = "is" if dropped == 1 else "are"
            note += f"; {dropped:,} of {counted(images, 'image')} {be} dropped in each epoch"
        better = None if self.order.features_every > 1 else self.fitting(batch)
        if better is not None and better != batch:
            note += f" (--batch {better} drops {images % better or 'none'})"
            steps = images // better
        return note + ("; with so few steps per epoch, increase --epochs" if steps < FEW_STEPS else "")

    def suitable(self, batch: int) -> int:
        """The given global batch, or a smaller one if its epochs would have few steps or drop many images."""
        return batch if self._is_suitable(batch) else self.fitting(batch) or batch

    def fitting(self, largest: int) -> int | None:
        """The global batch of at most `largest` that suits a small dataset: of the batches that give about `FEW_STEPS`
        to twice as many steps per epoch (or, with very few images, of `SMALL_BATCH` images or less), the largest that
        drops the fewest images; a smaller batch if none of them can be used, and None if no batch can."""
        images, micro = self.order.num_samples, self.micro_batch
        most = min(largest, images, max(SMALL_BATCH, images // FEW_STEPS))
        possible = [
            batch
            for batch in range(most, 0, -1)
            if (batch <= micro or batch % micro == 0)
            and max(1, batch // micro) % self.world_size == 0
            and min(batch, micro) % self.unit == 0
            and steps_per_epoch(self.order, batch)
        ]
        usual = [batch for batch in possible if batch > (most - 1) // 2]
        return min(usual or possible[:1], key=lambda batch: images % batch, default=None)

    def options(self) -> str:
        """The options that set a global batch for a small dataset, with micro-batches of at most this size; empty if no
        batch can be used."""
        images = self.order.num_samples
        if batch := self.fitting(images):
            return f"--batch {batch}"
        if self.unit > 1:  # smaller micro-batches may not be multiples
            alone = BatchLimits(self.order, self.micro_batch, unit=self.unit).fitting(images)
            return f"--batch {alone} --nproc 1" if alone and self.world_size > 1 else ""
        processes = min(self.world_size, images)  # smaller micro-batches, one for each process
        most = min(images, max(SMALL_BATCH, images // FEW_STEPS, 2 * processes))
        micro = max(1, min(self.micro_batch, most // processes))
        fewer = f" --nproc {processes}" if processes < self.world_size else ""
        return f"--batch {micro * processes} --train.micro_batch_size {micro}{fewer}"

    def _is_suitable(self, batch: int) -> bool:
        steps, images = steps_per_epoch(self.order, batch), self.order.num_samples
        return steps >= FEW_STEPS and images - steps * batch <= DROPPED_SHARE * images


def views_note(epochs: int, views: int) -> str | None:
    """A note for runs with fewer epochs than views, since each epoch reads one view of every image."""
    if epochs >= views:
        return None
    what = "epoch reads" if epochs == 1 else "epochs read"
    return f"{epochs} {what} {epochs} of the {views} views, one per epoch (--epochs {views} reads all)"


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
