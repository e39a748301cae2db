"""The `zarr` backend: a shard is a Zarr v3 group, `v0000.zarr`, with sharded arrays, readable by zarr-python alone.

In: records. Out: arrays labels, crc32c (n,), and features, pixels, target, logits as flat uint8, each with
<name>_offsets uint64 (n + 1). Invariant: equal records give equal bytes; a chunk that was not written
or a file that is gone is an error. zarr-python writes; `zarr_read.py` reads, because zarr-python gives zeros for both.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.codecs
from numpy.typing import NDArray

from scalekd_cache.store.base import Record, ShardId, ShardReader, ShardSummary, ShardWriter, damaged, record_crc
from scalekd_cache.store.files import FileFact, canonical_json, fact_of, fsync_path
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.zarr_read import ShardedArray, read_attributes

CHUNK_BYTES = 1 << 18
"""Bytes in a chunk of a flat array, the smallest thing that is decoded: about 16 views of 224 px, or 3 of features."""
SHARD_BYTES = 1 << 25
"""Bytes of a whole shard file before compression; the writer holds at most one for each array."""
FLAT = ("features", "pixels", "target", "logits")
KINDS = {"features": "features", "pixels": "pixels"}
"""Arrays that are counted under their own name; the others are `target`, offsets and checksums are index."""


class Appender:
    """A one-writer array that grows along its first axis, a whole shard file at a time."""

    def __init__(self, group: zarr.Group, name: str, dtype: str, chunk: int, shard: int) -> None:
        assert shard % chunk == 0, (shard, chunk)
        self._group, self._name, self._dtype = group, name, np.dtype(dtype)
        self._chunk, self._shard = chunk, shard
        self._row_bytes = self._dtype.itemsize
        self._pending = bytearray()
        self._array: Any = None
        self._written = 0

    def append(self, data: bytes) -> None:
        """Any number of whole rows."""
        self._pending += data
        while len(self._pending) >= self._shard * self._row_bytes:
            self._write(self._shard)

    def finish(self) -> None:
        """Write what is left; an array without rows keeps its metadata."""
        rows = len(self._pending) // self._row_bytes
        if self._array is None:  # all of it fits one shard file: no padding beyond the last chunk
            self._shard = max(1, -(-rows // self._chunk)) * self._chunk
        if rows or self._array is None:
            self._write(rows)

    def _write(self, rows: int) -> None:
        stop = self._written + rows
        if self._array is None:
            self._array = self._create(stop)
        elif rows:
            self._array.resize((stop,))
        taken = rows * self._row_bytes
        if rows:
            values = np.frombuffer(bytes(self._pending[:taken]), self._dtype)
            self._array[self._written : stop] = values
        del self._pending[:taken]
        self._written = stop

    def _create(self, rows: int) -> Any:
        return self._group.create_array(
            self._name,
            shape=(rows,),
            dtype=self._dtype,
            chunks=(self._chunk,),
            shards=(self._shard,),
            compressors=zarr.codecs.ZstdCodec(level=1, checksum=True),
            fill_value=0,
            config={"write_empty_chunks": True},  # not persisted; without it a chunk of zeros is not written at all
        )


class Writer(ShardWriter):
    """Holds at most one shard file of each array in memory."""

    def __init__(self, folder: Path, shard: ShardId) -> None:
        super().__init__(folder, shard)
        self._root = folder / f"v{shard.view:04d}.zarr"
        store = zarr.storage.LocalStore(self._root)
        self._group = zarr.create_group(store, attributes={"scalekd_cache": 1, **shard._asdict()})
        self._flat = {name: Appender(self._group, name, "|u1", CHUNK_BYTES, SHARD_BYTES) for name in FLAT}
        self._offsets: dict[str, list[int]] = {name: [0] for name in FLAT}
        self._labels: list[int] = []

    def append(self, record: Record) -> None:
        """To every array."""
        for name, data in zip(FLAT, (record.features, record.pixels, _target(record), record.logits), strict=True):
            self._flat[name].append(data)
            self._offsets[name].append(self._offsets[name][-1] + len(data))
        self._labels.append(record.label)
        self.crcs.append(record_crc(record))

    def finish(self) -> ShardSummary:
        """Write the rest, then fsync and hash what zarr-python has left on disk."""
        for name, appender in self._flat.items():
            appender.finish()
            self._small(f"{name}_offsets", np.array(self._offsets[name], "<u8"))
        self._small("labels", np.array(self._labels, "<i8"))
        self._small("crc32c", np.array(self.crcs, "<u4"))
        files: dict[str, FileFact] = {}
        payload = {"pixels": 0, "features": 0, "target": 0}
        for path in sorted(path for path in self._root.rglob("*") if path.is_file()):
            fsync_path(path)
            fact = files[path.relative_to(self.folder).as_posix()] = fact_of(path)
            array = path.relative_to(self._root).parts[0]
            if array in ("labels", *FLAT):
                payload[KINDS.get(array, "target")] += fact.bytes
        return ShardSummary(files, payload)

    def _small(self, name: str, values: NDArray[Any]) -> None:
        """An array in a single chunk."""
        rows = max(1, len(values))
        appender = Appender(self._group, name, values.dtype.str, rows, rows)
        appender.append(values.tobytes())
        appender.finish()

    def abandon(self) -> None:
        """Nothing is open between two writes."""


class Reader(ShardReader):
    """Each chunk is decoded once a call, however many of its records are asked for."""

    def __init__(self, folder: StoredPath, shard: ShardId, keys: list[str]) -> None:
        super().__init__(folder, shard, keys)
        attributes = read_attributes(self.where)
        expected = {"scalekd_cache": 1, **shard._asdict()}
        if attributes != expected:
            raise damaged("this is another shard", attributes, expected, self.where)
        count = len(keys)
        self._crcs = ShardedArray(self.where / "crc32c", "uint32", count).all()
        self._labels = ShardedArray(self.where / "labels", "int64", count).all()
        self._offsets: dict[str, NDArray[Any]] = {}
        self._flat: dict[str, ShardedArray] = {}
        for name in FLAT:
            offsets = ShardedArray(self.where / f"{name}_offsets", "uint64", count + 1).all()
            if offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any() or offsets[-1] >= 2**62:
                raise damaged(f"offsets of {name} do not ascend from 0", offsets[:4], "0 <= ...", self.where)
            self._offsets[name] = offsets.astype(np.int64)
            self._flat[name] = ShardedArray(self.where / name, "uint8", int(offsets[-1]))

    @property
    def crcs(self) -> NDArray[np.uint32]:
        """(n,) uint32."""
        return self._crcs

    @property
    def where(self) -> StoredPath:
        """The group's folder."""
        return self.folder / f"v{self.shard.view:04d}.zarr"

    def read(self, rows: NDArray[np.int64]) -> list[Record]:
        """Records of these rows, in this order."""
        flat = []
        for name in FLAT:
            bounds = np.stack((self._offsets[name][rows], self._offsets[name][rows + 1]), axis=1)
            flat.append(self._flat[name].spans([(start, stop) for start, stop in bounds.tolist()]))
        return [self.checked(row, self._record(row, *parts)) for row, *parts in zip(rows.tolist(), *flat, strict=True)]

    def _record(self, row: int, features: bytes, pixels: bytes, target: bytes, logits: bytes) -> Record:
        key, label = self.keys[row], int(self._labels[row])
        try:
            fields = json.loads(target)
            view, digest = canonical_json(fields["view"]), str(fields["digest"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise damaged("a record's JSON cannot be read", repr(error), "what was written", self.where, key) from error
        return Record(key, label, view, digest, pixels, features, logits)


def _target(record: Record) -> bytes:
    return canonical_json({"digest": record.digest, "view": json.loads(record.view)}).encode()
