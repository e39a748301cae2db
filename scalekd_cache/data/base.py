"""Code shared by all image sources: sample keys, canonical order, and `ListedSource`.

In: keys, labels and a reader that returns the encoded bytes of a sample. Out: a `ListedSource`.
Invariant: keys are unique and contain neither dots nor whitespace. Their order depends only on the keys (or on the
order within tar and parquet files), not on the file system, the rank or the number of workers. Every label is an index
into the class names; without class names every label is `NO_LABEL`.
"""

import copy
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, overload
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt

from scalekd_cache.errors import UserError, counted, printable
from scalekd_cache.store.base import NO_LABEL
from scalekd_cache.store.checked_files import read_file

IntArray = npt.NDArray[np.int64]
Split = Literal["train", "val"]

MAX_KEY_BYTES = 1024
"""Maximum key length in bytes (`store/base.py`); longer keys are truncated and end in a hash of the full key."""
MAX_IMAGE_BYTES = 1 << 31
"""Maximum size of an image file in bytes."""
MAX_UNNAMED_CLASSES = 100_000
"""Without a list of class names, labels must be below this number or the number of images, whichever is larger."""
CANONICAL_ORDER = b"scalekd-cache canonical order"


class NoSplitError(UserError):
    """The dataset has no such split. A damaged or incomplete split raises a different `UserError`."""


class SampleRef(NamedTuple):
    """One image: its key (no dots, no whitespace, `/` allowed) and its class index or `NO_LABEL`."""

    key: str
    label: int


class Source(Protocol):
    """A set of encoded images in a fixed, canonical order; either all or none of them have labels."""

    @property
    def name(self) -> str:
        """The name or path that the user gave: demo, cifar10, imagenette or a path."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names, indexed by label; empty if no image in this split has a label.

        They are the same for train and val if train has labels; otherwise, val may have its own.
        """

    @property
    def samples(self) -> Sequence[SampleRef]:
        """All samples in canonical order."""

    @property
    def ignored(self) -> tuple[str, ...]:
        """One message for each kind of file or row that was ignored."""

    @property
    def held_out(self) -> int | None:
        """Number of images held out from an unlabeled dataset as its val split; 0 if it has its own val split."""

    def ranges(self, samples_per_shard: int) -> list[range]:
        """Split the canonical order into contiguous work units of at most `samples_per_shard` samples."""

    def order(self, group: int) -> IntArray:
        """The order of sample indices in which view group `group` is stored: a permutation, (N,) int64."""

    def read(self, index: int) -> bytes:
        """The encoded image file of sample `index`. Files are opened lazily, so this works in any process."""


class Reader(Protocol):
    """Returns the encoded bytes of sample `index`. Readers can be pickled and hold no open files."""

    def __call__(self, index: int) -> bytes:
        """Read one image file."""


class PackedStrings:
    """Many strings in one block of bytes, which is cheap to pickle and shared by forked workers without copying."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogateescape") for text in strings]
        self._data = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._data[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")


class SampleList(Sequence[SampleRef]):
    """Samples stored as a packed block of keys and an array of labels, (N,) int64."""

    def __init__(self, keys: Iterable[str], labels: Sequence[int] | IntArray) -> None:
        self._keys = PackedStrings(keys)
        self._labels = np.asarray(labels, dtype=np.int64)
        assert self._labels.shape == (len(self._keys),), (self._labels.shape, len(self._keys))

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> IntArray:
        """(N,) int64, the labels of all samples."""
        return self._labels

    def with_labels(self, labels: IntArray) -> "SampleList":
        """The same keys with different labels, (N,) int64."""
        assert labels.shape == self._labels.shape, (labels.shape, self._labels.shape)
        other = copy.copy(self)
        other._labels = labels
        return other

    @overload
    def __getitem__(self, index: int) -> SampleRef: ...
    @overload
    def __getitem__(self, index: slice) -> list[SampleRef]: ...
    def __getitem__(self, index: int | slice) -> SampleRef | list[SampleRef]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        return SampleRef(self._keys[position], int(self._labels[position]))

    def __iter__(self) -> Iterator[SampleRef]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True, kw_only=True, eq=False)
class ListedSource:
    """The only implementation of `Source`: a list of samples and a reader for their bytes.

    `file_starts`, (files,) int64, holds the index of the first sample in each tar or parquet file for sources that are
    read in file order; it is None for sources whose canonical order is a hash of the keys. `held_out` is None while the
    list holds both splits of an unlabeled dataset without a val split (`held_out.py`).
    """

    name: str
    class_names: tuple[str, ...]
    samples: SampleList
    reader: Reader
    file_starts: IntArray | None = None
    ignored: tuple[str, ...] = ()
    held_out: int | None = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ignored", tuple(map(printable, self.ignored)))
        check_labels(self.samples.labels, len(self.class_names), f"the dataset {self.name}", self.name)

    def ranges(self, samples_per_shard: int) -> list[range]:
        """Contiguous ranges of at most `samples_per_shard` samples that never span two tar or parquet files."""
        assert samples_per_shard > 0, samples_per_shard
        starts = [0] if self.file_starts is None else self.file_starts.tolist()
        return [
            range(first, min(first + samples_per_shard, stop))
            for start, stop in zip(starts, [*starts[1:], len(self.samples)])
            for first in range(start, stop, samples_per_shard)
        ]

    def order(self, group: int) -> IntArray:
        """(N,) int64: identity for group 0 and for file-order sources; otherwise, sorted by a hash of (group, key)."""
        assert group >= 0, group
        if group == 0 or self.file_starts is not None:
            return np.arange(len(self.samples), dtype=np.int64)
        return hash_order((sample.key for sample in self.samples), b"scalekd-cache view group %d" % group)

    def read(self, index: int) -> bytes:
        """Encoded bytes of sample `index`. Raises `IndexError` outside 0..N-1 and `UserError` if the file changed or is
        missing."""
        if not 0 <= index < len(self.samples):
            raise IndexError(f"sample {index} of {len(self.samples)}")
        return self.reader(index)

    def first(self, count: int | None) -> "ListedSource":
        """The first `count` samples in canonical order (None: all)."""
        if count is None or count >= len(self.samples):
            return self
        starts = None if self.file_starts is None else self.file_starts[self.file_starts < count]
        samples = self.samples[:count]
        cut = SampleList((sample.key for sample in samples), [sample.label for sample in samples])
        return replace(self, samples=cut, file_starts=starts)


def encode_key(path: str, limit: int = MAX_KEY_BYTES) -> str:
    """Convert a relative path without its extension to a sample key: `/` stays; dots and special characters become %XX.

    A leading double underscore is encoded too: WebDataset readers skip members with names like `__meta__`.
    A key longer than `limit` bytes is truncated and ends in a hash of the full key.
    """
    parts = [quote(os.fsencode(part), safe="").replace(".", "%2E") for part in path.split("/") if part not in ("", ".")]
    key = "/".join("%5F" + part[1:] if part.startswith("__") else part for part in parts)
    if len(key) <= limit:  # keys are ASCII
        return key
    ending = "-" + hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    return re.sub("%.?$", "", key[: limit - len(ending)]) + ending


def key_text(key: str) -> str:
    """A sample key as text for people: the path that it encodes."""
    return unquote(key, errors="replace")


def hash_order(keys: Iterable[str], purpose: bytes) -> IntArray:
    """(N,) int64, the permutation that sorts `keys` by their BLAKE2b hashes, keyed with `purpose` (at most 64
    bytes)."""
    hashes = [
        int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8, key=purpose).digest(), "little") for key in keys
    ]
    return np.argsort(np.array(hashes, dtype=np.uint64), kind="stable").astype(np.int64)


def canonical_order(keys: Sequence[str]) -> IntArray:
    """(N,) int64, indices of `keys` sorted by a hash; the order of `keys` has no effect."""
    by_name = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    return by_name[hash_order((keys[index] for index in by_name), CANONICAL_ORDER)]


def sample_indices(total: int, count: int, *, seed: int | None = None) -> list[int]:
    """Indices of a subset of `total` items, in ascending order.

    Args:
        total: number of items.
        count: number of items to select; if there are fewer, all are selected.
        seed: seed for a random sample. None selects evenly spaced items.
    """
    count = min(count, total)
    if seed is None:
        return [number * total // count for number in range(count)]
    chosen: list[int] = np.random.default_rng(seed).choice(total, size=count, replace=False).tolist()
    return sorted(chosen)


def read_listed_file(path: str, key: str) -> bytes:
    """Contents of a regular file that was found when the source was listed."""
    what = f"image {key}, which was listed when the dataset was opened,"
    return read_file(path, what, MAX_IMAGE_BYTES, "restore the file, then rerun")


def missing_folder_error(what: str, folder: str | Path, expected: str, fix: str) -> UserError:
    """The error for a missing folder; it lists what the parent folder contains."""
    parent = Path(folder).parent
    names = sorted(entry.name for entry in parent.iterdir())[:8] if parent.is_dir() else []
    got = (
        f"{parent} contains {', '.join(names) or 'nothing'}" if parent.is_dir() else f"{parent} is not a folder either"
    )
    return UserError(what, got=got, expected=expected, where=folder, fix=fix)


def numbered_classes(labels: IntArray, where: object) -> tuple[str, ...]:
    """Class names "0".."max" for a dataset without a list of names.

    Raises:
        UserError: a label is too large to be a class index (for example, an ID).
    """
    highest, most = int(labels.max(initial=-1)), max(MAX_UNNAMED_CLASSES, len(labels)) - 1
    if highest > most:
        raise UserError(
            "a label is larger than the maximum class index",
            got=f"label {highest} at position {int(labels.argmax())} of {counted(len(labels), 'image')}",
            expected=f"0 to {most} without a list of class names",
            where=where,
            fix="number the classes from 0 (does the label column contain IDs?), or add a list of class names",
        )
    return tuple(str(label) for label in range(highest + 1))


def check_labels(labels: IntArray, num_classes: int, describe: str, where: object) -> None:
    """Raise `UserError` for the first label outside 0..num_classes-1. Without classes, no image may have a label."""
    missing = labels == NO_LABEL
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if not num_classes and missing.any():
        if missing.all():
            return
        first = int(missing.argmax())
        raise UserError(
            f"{describe} has both labeled and unlabeled images",
            got=f"{missing.sum():,} of {counted(len(labels), 'image')} unlabeled; the first is at position {first}",
            expected="labels for all images or for none",
            where=where,
            fix="add the missing labels, or remove these images",
        )
    if len(wrong):
        raise UserError(
            f"{describe} has a label outside the class list",
            got=f"label {labels[wrong[0]]} at position {wrong[0]} ({counted(len(wrong), 'such label')})",
            expected=f"0 to {num_classes - 1}, the classes of the training set"
            if num_classes
            else "at least one class",
            where=where,
            fix="correct the labels or the list of class names; remove unlabeled images",
        )
