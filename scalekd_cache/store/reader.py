"""Reads a finished cache by position.

In: positions in a view's canonical order, and the view number. Out: the records, in the requested order.
Invariant: a returned record is exactly the one that was written (a CRC-32C covers all of it, including the key);
anything else raises an error that names the shard and sample.
"""

import bisect
import hashlib
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scalekd_cache.config.remote import RemoteConfig
from scalekd_cache.errors import UserError
from scalekd_cache.store.base import (
    NO_LABEL,
    Record,
    ShardId,
    ShardReader,
    damaged,
    shard_reader,
    stores_features,
    wrong_share,
)
from scalekd_cache.store.cache_folder import check_cache_path
from scalekd_cache.store.durable_files import FileHash
from scalekd_cache.store.manifest import Manifest, UnitRow, read_manifest
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.remote.remote_path import RemotePath, discard_damaged, open_place
from scalekd_cache.store.sidecar import UnitInfo, read_keys, read_unit, unit_folder, wrong_sizes

OPEN_SHARDS = 128
"""Maximum number of open shards; each holds a file descriptor and, for 512 records, an index of about 60 KB."""


class Cache:
    """Random access to records, for one thread. Its pickle is small; each worker process's copy opens its own files."""

    def __init__(self, root: Path | RemotePath, manifest: Manifest) -> None:
        self.root, self.manifest = root, manifest
        self._group_of = {view: group for group, views in enumerate(manifest.facts.groups) for view in views}
        self._units: list[list[UnitRow]] = [[] for _ in manifest.facts.groups]
        for row in manifest.units:
            self._units[row.group].append(row)
        self._starts = [[0, *accumulate(row.count for row in rows)] for rows in self._units]
        self._readers: OrderedDict[ShardId, ShardReader] = OrderedDict()

    @classmethod
    def open(cls, place: Path | str, remote: RemoteConfig | None = None) -> Self:
        """Open a cache from its folder or URL (file, http, https, s3, gs). Only the manifest is read.

        Args:
            place: the folder or URL.
            remote: options for reading a URL.

        Raises:
            UserError: there is no such cache (the message suggests similar ones); the manifest is missing or damaged,
                or cannot be fetched; or the URL scheme is not supported.
        """
        root = open_place(place, remote)
        if isinstance(root, Path):
            check_cache_path(str(root))
        return cls(root, read_manifest(root))

    def __len__(self) -> int:
        return self.manifest.num_samples

    @property
    def num_ranges(self) -> int:
        """Number of image ranges, which equals the number of units in a view group."""
        return len(self._units[0])

    def has_features(self, positions: NDArray[np.int64], view: int) -> NDArray[np.bool_]:
        """Which positions in a view have features, (n,) bool; all do unless the cache is sparse."""
        starts = np.asarray(self._starts[self._group_of[view]])
        rows = positions - starts[np.searchsorted(starts, positions, side="right") - 1]
        return stores_features(rows, view, self.manifest.facts.features_every)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": OrderedDict()}

    def __getitem__(self, place: tuple[str, int]) -> Record:
        """The record for a sample key and a view number: `cache[key, view]`.

        Looking up a key reads the units' keys.txt files; to read many records, use `read` with positions.

        Raises:
            UserError: there is no such sample or view; otherwise as for `read`.
        """
        key, view = place
        return self.read([self.position(key, view)], view)[0]

    def position(self, key: str, view: int) -> int:
        """The position of a sample in a view's canonical order.

        Raises:
            UserError: there is no such sample or view.
        """
        if view not in self._group_of:
            raise UserError("no such view", got=view, expected=self.manifest.view_range, where=self.root)
        group, some = self._group_of[view], ""
        for start, row in zip(self._starts[group], self._units[group], strict=False):
            keys = read_keys(*self._unit_info(row))
            if key in keys:
                return start + keys.index(key)
            some = f", such as {keys[0]}" if keys else some
        raise UserError("no such sample", got=key, expected=f"a key in units/*/keys.txt{some}", where=self.root)

    def read(self, ids: ArrayLike, view: int) -> list[Record]:
        """The records at these positions (integers from 0 to len(cache) - 1) in a view, in this order.

        Reading is fastest if one call reads adjacent positions.

        Raises:
            UserError: there is no such view; a shard is missing, truncated or belongs to a different cache; or a record
                fails its checksum.
        """
        positions: NDArray[np.int64] = np.asarray(ids, dtype=np.int64)
        if view not in self._group_of:
            raise UserError("no such view", got=view, expected=self.manifest.view_range, where=self.root)
        if positions.size == 0:
            return []
        assert positions.ndim == 1, positions.shape
        assert 0 <= positions.min() <= positions.max() < len(self), (positions, len(self))
        starts = self._starts[self._group_of[view]]
        by_unit: dict[int, list[int]] = {}
        for place, position in enumerate(positions.tolist()):
            by_unit.setdefault(self._unit_number(position, view), []).append(place)
        records: dict[int, Record] = {}
        for unit, places in by_unit.items():
            records.update(zip(places, self._read_unit(view, unit, positions[places] - starts[unit]), strict=True))
        return self.checked([records[place] for place in range(len(positions))], positions, view)

    def checked(self, records: list[Record], positions: NDArray[np.int64], view: int) -> list[Record]:
        """Check and return records read from these positions in a view.

        Raises:
            UserError: a label is out of range, or a record in a sparse cache has features but should not, or vice
                versa.
        """
        for record, position in zip(records, positions.tolist(), strict=True):
            self._check_label(record, position, view)
        if self.manifest.facts.features_every > 1:
            for record, position, there in zip(records, positions, self.has_features(positions, view), strict=True):
                if (what := wrong_share(record, bool(there))) is not None:
                    raise damaged(*what, f"{self.root}/{self.shard_at(position, view)}", record.key)
        return records

    def _check_label(self, record: Record, position: int, view: int) -> None:
        if record.label == NO_LABEL or 0 <= record.label < len(self.manifest.facts.class_names):
            return
        where, classes = f"{self.root}/{self.shard_at(position, view)}", len(self.manifest.facts.class_names)
        raise damaged(
            "a record's label is outside the class range",
            record.label,
            f"0 to {classes - 1}" if classes else "none: the dataset has no labels",
            where,
            record.key,
        )

    def locate(self, position: int, view: int) -> tuple[UnitRow, int]:
        """The unit that holds a position in a view, and the record's row in that unit's shard."""
        group, number = self._group_of[view], self._unit_number(position, view)
        return self._units[group][number], position - self._starts[group][number]

    def group_of(self, view: int) -> int:
        """The view's group. All views in a group have the same canonical order."""
        return self._group_of[view]

    def key_files(self, group: int) -> list[str]:
        """The SHA-256 of each unit's keys.txt in a group. Caches with equal values hold the same images in the same
        order."""
        return [self._unit_info(row)[1].files["keys.txt"].sha256 for row in self._units[group]]

    def keys(self, group: int) -> list[str]:
        """All sample keys in a group, in its canonical order."""
        return [key for row in self._units[group] for key in read_keys(*self._unit_info(row))]

    def _unit_info(self, row: UnitRow) -> tuple[StoredPath, UnitInfo]:
        """A unit's folder and its sidecar."""
        folder = unit_folder(self.root, row.group, row.range_id)
        return folder, read_unit(folder)[0]

    def positions(self, view: int, range_id: int) -> range:
        """The positions in a view whose records are in the unit for this range."""
        starts = self._starts[self._group_of[view]]
        return range(starts[range_id], starts[range_id + 1])

    def shard_at(self, position: int, view: int) -> str:
        """The path, inside the cache and without extension, of the shard that holds a position in a view."""
        unit, _ = self.locate(position, view)
        return f"{unit_folder(Path(), unit.group, unit.range_id).as_posix()}/v{view:04d}"

    def _unit_number(self, position: int, view: int) -> int:
        """Index, within the view's group, of the unit that holds a position."""
        return bisect.bisect_right(self._starts[self._group_of[view]], position) - 1

    def _read_unit(self, view: int, unit: int, rows: NDArray[np.int64]) -> list[Record]:
        """The records in these rows of a shard; a damaged local copy of a remote shard is downloaded again once."""
        try:
            return self._reader(view, unit).read(rows)
        except UserError:
            row = self._units[self._group_of[view]][unit]
            if not discard_damaged(unit_folder(self.root, row.group, row.range_id), f"v{view:04d}."):
                raise
            self._readers.clear()
            return self._reader(view, unit).read(rows)

    def _reader(self, view: int, unit: int) -> ShardReader:
        """The reader for a shard, opened and checked on first use. If too many are open, the least recently used one is
        closed."""
        row = self._units[self._group_of[view]][unit]
        shard = ShardId(row.group, row.range_id, view)
        if shard in self._readers:
            self._readers.move_to_end(shard)
            return self._readers[shard]
        reader = open_shard(self.root, self.manifest, row, view)
        self._readers[shard] = reader
        while len(self._readers) > OPEN_SHARDS:
            self._readers.popitem(last=False)  # its files are closed when the last reference is dropped
        return reader


class ShardFacts(NamedTuple):
    """A committed shard."""

    folder: StoredPath
    """The shard's unit folder."""
    unit: UnitInfo
    files: dict[str, FileHash]
    """The shard's files, keyed by name relative to the unit's folder."""


def open_shard(root: StoredPath, manifest: Manifest, row: UnitRow, view: int) -> ShardReader:
    """The reader for a shard, after the checks in `shard_facts`."""
    folder, unit, _ = shard_facts(root, manifest, row, view)
    return shard_reader(unit.backend, folder, ShardId(row.group, row.range_id, view), read_keys(folder, unit))


def shard_facts(root: StoredPath, manifest: Manifest, row: UnitRow, view: int) -> ShardFacts:
    """Return the facts about a shard after checking that its unit matches the manifest and no file is truncated."""
    folder = unit_folder(root, row.group, row.range_id)
    info = read_listed_unit(root, manifest, row)
    files = {name: fact for name, fact in info.files.items() if name.startswith(f"v{view:04d}.")}
    wrong = wrong_sizes(folder, files) if isinstance(folder, Path) else []  # remote: checked when downloaded
    if wrong or not files:
        name, what = wrong[0] if wrong else (f"v{view:04d}", "not in the unit's sidecar")
        raise damaged("a shard is truncated or missing", what, "the complete file", folder / name)
    return ShardFacts(folder, info, files)


def read_listed_unit(root: StoredPath, manifest: Manifest, row: UnitRow) -> UnitInfo:
    """A unit's sidecar. Raises `UserError` unless it is the one in the manifest."""
    folder = unit_folder(root, row.group, row.range_id)
    info, data = read_unit(folder)
    digest = hashlib.sha256(data).hexdigest()
    got = (digest, info.fingerprint, info.count, info.backend, info.views)
    expected = (
        row.sha256,
        manifest.facts.fingerprint,
        row.count,
        manifest.facts.backend,
        manifest.facts.groups[row.group],
    )
    if got != expected:
        raise damaged(
            "a unit does not match the manifest (sha256 of unit.json, fingerprint, record count, backend, views)",
            got,
            expected,
            folder / "unit.json",
        )
    return info
