"""A finished cache, read by position.

In: positions in a view's canonical order, and the view's number. Out: records, in the order asked for.
Invariant: a record that comes back is the one that was written (crc32c over all of it, key included); anything else is
an error that names shard and sample.
"""

import bisect
import hashlib
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scalekd_cache.config.remote import RemoteConfig
from scalekd_cache.errors import UserError
from scalekd_cache.store.base import NO_LABEL, Record, ShardId, ShardReader, damaged, shard_reader
from scalekd_cache.store.manifest import Manifest, UnitRow, read_manifest
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.remote.remote_path import RemotePath, discard_damaged, open_place
from scalekd_cache.store.sidecar import read_keys, read_unit, sizes_differ, unit_folder


def unit_of(manifest: Manifest, view: int, position: int) -> UnitRow:
    """The unit that holds a position of a view."""
    group = next(number for number, views in enumerate(manifest.groups) if view in views)
    for row in manifest.units:
        if row.group == group:
            if position < row.count:
                return row
            position -= row.count
    raise AssertionError(f"no position {position} in view {view}")


OPEN_SHARDS = 128
"""Shards whose index is kept; one file descriptor each, about 60 KB for 512 records."""


class Cache:
    """Random access to records, for one thread. Small to pickle; a copy in a worker process opens its own files."""

    def __init__(self, root: Path | RemotePath, manifest: Manifest) -> None:
        self.root, self.manifest = root, manifest
        self._group_of = {view: group for group, views in enumerate(manifest.groups) for view in views}
        self._units: list[list[UnitRow]] = [[] for _ in manifest.groups]
        for row in manifest.units:
            self._units[row.group].append(row)
        self._starts = [[0, *accumulate(row.count for row in rows)] for rows in self._units]
        self._readers: OrderedDict[ShardId, ShardReader] = OrderedDict()

    @classmethod
    def open(cls, place: Path | str, remote: RemoteConfig | None = None) -> Self:
        """A cache from its folder or URL (file, http, https, s3, gs): the cost is one read of the manifest.

        Args:
            place: the folder or URL.
            remote: how a URL is read.

        Raises:
            UserError: there is no manifest, it is damaged, cannot be fetched, or the URL is of another kind.
        """
        root = open_place(place, remote)
        return cls(root, read_manifest(root))

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": OrderedDict()}

    def __getitem__(self, place: tuple[str, int]) -> Record:
        """The record of a sample key and a view number: `cache[key, view]`. Finding a key reads keys.txt of the units;
        `read` takes positions and is the way to read many.

        Raises:
            UserError: no such sample or view; or as `read`.
        """
        key, view = place
        return self.read([self.position(key, view)], view)[0]

    def position(self, key: str, view: int) -> int:
        """Where a sample stands in a view's canonical order.

        Raises:
            UserError: no such sample, or no such view.
        """
        if view not in self._group_of:
            raise UserError("no such view", got=view, expected=f"0 to {self.manifest.num_views - 1}", where=self.root)
        group = self._group_of[view]
        for start, row in zip(self._starts[group], self._units[group], strict=False):
            folder = unit_folder(self.root, row.group, row.range_id)
            keys = read_keys(folder, read_unit(folder)[0])
            if key in keys:
                return start + keys.index(key)
        raise UserError("no such sample", got=key, expected="a line of units/*/keys.txt", where=self.root)

    def read(self, ids: ArrayLike, view: int) -> list[Record]:
        """Records at these positions (integers from 0 to len(cache) - 1) of a view, in this order.

        Cheapest where neighboring positions are asked for in one call (zarr decodes each chunk once a call).

        Raises:
            UserError: no such view; or a shard is missing, short, another one, or a record does not match its checksum.
        """
        positions: NDArray[np.int64] = np.asarray(ids, dtype=np.int64)
        if view not in self._group_of:
            raise UserError("no such view", got=view, expected=f"0 to {self.manifest.num_views - 1}", where=self.root)
        if positions.size == 0:
            return []
        assert positions.ndim == 1, positions.shape
        assert 0 <= positions.min() <= positions.max() < len(self), (positions, len(self))
        starts = self._starts[self._group_of[view]]
        by_unit: dict[int, list[int]] = {}
        for place, position in enumerate(positions.tolist()):
            by_unit.setdefault(bisect.bisect_right(starts, position) - 1, []).append(place)
        records: dict[int, Record] = {}
        for unit, places in by_unit.items():
            found = self._read_unit(view, unit, positions[places] - starts[unit])
            records.update(zip(places, found, strict=True))
        return [self._checked(records[place], positions[place], view) for place in range(len(positions))]

    def _checked(self, record: Record, position: int, view: int) -> Record:
        """The record itself; UserError for a label outside the classes, which no loss may see."""
        if record.label == NO_LABEL or 0 <= record.label < len(self.manifest.class_names):
            return record
        where = f"{self.root}/{self.shard_at(position, view)}"
        raise damaged(
            "the label of a record is outside the classes",
            record.label,
            f"0 to {len(self.manifest.class_names) - 1}",
            where,
            record.key,
        )

    def shard_at(self, position: int, view: int) -> str:
        """The shard that holds a position of a view, relative to the cache, without its ending."""
        group = self._group_of[view]
        row = self._units[group][bisect.bisect_right(self._starts[group], position) - 1]
        return f"units/{unit_folder(Path(), row.group, row.range_id).name}/v{view:04d}"

    def _read_unit(self, view: int, unit: int, rows: NDArray[np.int64]) -> list[Record]:
        """Rows of a shard; from a fresh local copy where the one at hand turns out to be damaged."""
        try:
            return self._reader(view, unit).read(rows)
        except UserError:
            row = self._units[self._group_of[view]][unit]
            if not discard_damaged(unit_folder(self.root, row.group, row.range_id), f"v{view:04d}."):
                raise
            self._readers.clear()
            return self._reader(view, unit).read(rows)

    def _reader(self, view: int, unit: int) -> ShardReader:
        """The reader of a shard, opened and checked on first use; the least recently used one makes room."""
        row = self._units[self._group_of[view]][unit]
        shard = ShardId(row.group, row.range_id, view)
        if shard in self._readers:
            self._readers.move_to_end(shard)
            return self._readers[shard]
        reader = open_shard(self.root, self.manifest, row, view)
        self._readers[shard] = reader
        while len(self._readers) > OPEN_SHARDS:
            self._readers.popitem(last=False)  # closes its files when the last user lets go
        return reader


def open_shard(root: StoredPath, manifest: Manifest, row: UnitRow, view: int) -> ShardReader:
    """A shard's reader, once its unit is the one in the manifest and its files have their lengths."""
    folder = unit_folder(root, row.group, row.range_id)
    info, data = read_unit(folder)
    digest = hashlib.sha256(data).hexdigest()
    got = (digest, info.fingerprint, info.count, info.backend, info.views)
    expected = (row.sha256, manifest.fingerprint, row.count, manifest.backend, manifest.groups[row.group])
    if got != expected:
        raise damaged(
            "a unit is not the one in the manifest (sha256 of unit.json, fingerprint, count, backend, views)",
            got,
            expected,
            folder / "unit.json",
        )
    files = {name: fact for name, fact in info.files.items() if name.startswith(f"v{view:04d}.")}
    wrong = sizes_differ(folder, files) if isinstance(folder, Path) else []  # remote files are checked on arrival
    if wrong or not files:
        name, what = wrong[0] if wrong else (f"v{view:04d}", "not in the unit's sidecar")
        raise damaged("a shard is short or gone", what, "the file that was committed", folder / name)
    return shard_reader(info.backend, folder, ShardId(row.group, row.range_id, view), read_keys(folder, info))
