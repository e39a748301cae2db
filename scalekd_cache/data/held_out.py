"""Holds out images as the val split of an unlabeled dataset that has no val split.

In: a source that holds both splits. Out: one of them. Invariant: the splits are disjoint and together make up the whole
list. Which images are held out depends only on the keys, not on their order. Each split keeps the source's order.
"""

import dataclasses

import numpy as np

from scalekd_cache.data.base import IntArray, ListedSource, Reader, SampleList, Split, hash_order
from scalekd_cache.errors import UserError, counted
from scalekd_cache.store.base import NO_LABEL

SHARE = 20
"""One image in this many is held out."""
MAX_HELD_OUT = 5_000
"""Maximum number of held-out images, and of validation images for which the teacher's outputs are stored. This is
enough for nearest-neighbor evaluation with a thousand classes."""
HELD_OUT_ORDER = b"scalekd-cache held-out share"


class SelectedReader:
    """Reads the images at `indices`, (N,) int64, from the reader it wraps."""

    def __init__(self, reader: Reader, indices: IntArray) -> None:
        self._reader = reader
        self._indices = indices

    def __call__(self, index: int) -> bytes:
        """Bytes of image `indices[index]`."""
        return self._reader(int(self._indices[index]))


def divide(source: ListedSource, split: Split) -> ListedSource:
    """One split of an unlabeled source; a source whose `held_out` is known is returned unchanged.

    Raises:
        UserError: the source has fewer than two images.
    """
    if source.held_out is not None:
        return source
    total = len(source.samples)
    if total < 2:
        raise UserError(
            f"the dataset {source.name} has too few images for a training set and a held-out set",
            got=f"{counted(total, 'image')} without labels",
            expected="at least 2",
            fix="add images, or a val/ folder",
        )
    count = max(1, min(total // SHARE, MAX_HELD_OUT))
    order = hash_order((sample.key for sample in source.samples), HELD_OUT_ORDER)
    indices = np.sort(order[:count] if split == "val" else order[count:])
    starts = source.file_starts
    if starts is not None:  # all images in a tar or parquet file may be held out
        starts = np.unique(np.searchsorted(indices, starts))
        starts = starts[starts < len(indices)]
    return dataclasses.replace(
        source,
        samples=SampleList((source.samples[index].key for index in indices), np.full(len(indices), NO_LABEL)),
        reader=SelectedReader(source.reader, indices),
        file_starts=starts,
        held_out=count,
    )
