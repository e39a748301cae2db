"""Converts samples that `webdataset` reads from a cache's tars to records.

In: a cache, and a sample that `webdataset.WebDataset` read from one of its tars. Out: the record, its position and
view.
Invariant: a record is exactly the one that was written (its CRC-32C covers all of it), as `Cache.read` returns it. The
tars are not opened here. Because webdataset stops without an error at the end of a truncated tar, the length of each
tar in a local folder is checked.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from scalekd_cache.errors import UserError, counted
from scalekd_cache.store.base import Record, ShardId, damaged
from scalekd_cache.store.formats.webdataset import Reader
from scalekd_cache.store.reader import OPEN_SHARDS, Cache, shard_facts
from scalekd_cache.store.sidecar import read_keys

SHARD = re.compile(r"units/g(\d{3,9})-r(\d{5,9})/v(\d{4,9})\.tar")
PIXELS = ("jpg", "webp", "png")
AS_READ = "pass the decoder what webdataset reads: wds.WebDataset(urls).map(decoder), without .decode()"


class StreamedRecord(NamedTuple):
    """A record and its place in the cache."""

    record: Record
    position: int
    """Position in the view's canonical order."""
    view: int
    """View number."""


class _Shard(NamedTuple):
    reader: Reader
    rows: dict[str, int]
    """Row number of each key."""


class TarSamples:
    """Converts samples to records. Its pickle is small.

    Args:
        cache: the cache whose tars are read.

    Raises:
        UserError: the cache has no tars.
    """

    def __init__(self, cache: Cache) -> None:
        if cache.manifest.facts.backend != "webdataset":
            raise UserError(
                "webdataset cannot read this cache: it has no tars",
                got=f"store {cache.manifest.facts.backend}",
                expected="store webdataset",
                where=cache.root,
                fix="read records by position: decoder.read(positions, view)",
            )
        self.cache = cache
        self._shards: dict[ShardId, _Shard] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"cache": self.cache, "_shards": {}}

    def __call__(self, sample: Mapping[str, Any]) -> StreamedRecord:
        """The record for a sample as read by webdataset: `__key__`, `__url__` and the bytes of its members.

        Raises:
            UserError: the sample is not from one of this cache's tars, or the record fails its checksum.
        """
        members = [
            _member(sample, name) for name in ("json", next(filter(sample.__contains__, PIXELS), ""), "features")
        ]
        shard = _shard_id(sample)
        known = self._shards.get(shard) or self._open(shard)
        row = known.rows.get(sample["__key__"])
        if row is None:
            raise damaged(
                "a tar holds a sample that is not in keys.txt",
                sample["__key__"],
                "a key in keys.txt",
                sample["__url__"],
            )
        record = known.reader.from_members(row, *members)
        position = self.cache.positions(shard.view, shard.range_id)[row]
        self.cache.checked([record], np.array([position]), shard.view)
        return StreamedRecord(record, position, shard.view)

    def _open(self, shard: ShardId) -> _Shard:
        cache = self.cache
        unit = next((row for row in cache.manifest.units if (row.group, row.range_id) == shard[:2]), None)
        if unit is None or shard.view not in cache.manifest.facts.groups[shard.group]:
            raise UserError(
                "the tar does not belong to the cache",
                got="group {}, range {}, view {}".format(*shard),
                expected=f"views {cache.manifest.view_range}, {counted(cache.num_ranges, 'range')}",
                where=cache.root,
                fix="create the decoder with the cache that the tars belong to",
            )
        folder, info, files = shard_facts(cache.root, cache.manifest, unit, shard.view)
        keys = read_keys(folder, info)
        reader = Reader(folder, shard, keys, files[f"v{shard.view:04d}.tar"].bytes)
        if len(self._shards) >= OPEN_SHARDS:
            self._shards.clear()
        known = self._shards[shard] = _Shard(reader, {key: row for row, key in enumerate(keys)})
        return known


def _member(sample: Mapping[str, Any], name: str) -> bytes:
    """The bytes of a member; empty for the pixels if the cache stores none."""
    if not name:
        return b""
    data = sample.get(name)
    if not isinstance(data, bytes):
        raise UserError(
            "this sample was not read from a cache's tar with webdataset",
            got=f"{name}: {type(data).__name__}" if name in sample else f"fields {', '.join(map(str, sample))}",
            expected=f"{name}: the bytes of the member",
            where=sample.get("__url__"),
            fix=AS_READ,
        )
    return data


def _shard_id(sample: Mapping[str, Any]) -> ShardId:
    found = SHARD.findall(str(sample.get("__url__")))
    if not found or "__key__" not in sample:
        raise UserError(
            "cannot determine which shard of the cache a sample belongs to",
            got=f"__url__ {sample.get('__url__')}" + ("" if "__key__" in sample else ", no __key__"),
            expected="__url__ .../units/g000-r00000/v0000.tar (the tar's path in the cache) and __key__",
            fix=AS_READ,
        )
    group, range_id, view = map(int, found[-1])
    return ShardId(group, range_id, view)
