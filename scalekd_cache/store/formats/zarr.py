"""The `zarr` backend: a shard is a Zarr v3 group, `v0000.zarr`, with sharded arrays that plain zarr-python can read.

In: records. Out: the arrays labels and crc32c, (n,), and the flat uint8 arrays features (with the second target),
pixels, target and logits, each with an array <name>_offsets, (n + 1,) uint64. Invariant: equal records give equal
bytes; a missing chunk or file is an error. `zarr_read.py` is the reader, because zarr-python returns zeros for missing
chunks and files.
"""

from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scalekd_cache.store.base import (
    FORMAT_VERSION,
    MAX_RECORD_BYTES,
    NO_LABEL,
    Parts,
    Payload,
    Record,
    ShardId,
    ShardReader,
    ShardSummary,
    ShardWriter,
    check_parts,
    crc_input,
    damaged,
    damaged_record,
    fields_crc,
    keep_freed_memory,
    parse_target_json,
    record_crc,
    target_json,
)
from scalekd_cache.store.checked_files import read_json
from scalekd_cache.store.formats.zarr_read import ShardedArray, read_attributes
from scalekd_cache.store.formats.zarr_write import ArrayWriter, write_group
from scalekd_cache.store.path import StoredPath

CHUNK_BYTES = (1 << 8, 1 << 18)
"""Smallest and largest chunk size for a flat array; between them, a record's size is rounded up to the next power of
two. Chunks are stored uncompressed so that a record can be read without the rest of its chunk, because a batch's
samples are rarely adjacent in a shard (docs/LOG.md). On average, half a chunk per array is padding."""
SHARD_BYTES = 1 << 25
"""Maximum number of bytes in a shard file, excluding checksums."""
FLAT = ("features", "pixels", "target", "logits")


class Writer(ShardWriter):
    """Buffers at most one chunk or one block of small chunks per array, on top of the file buffers (`NewFile`)."""

    def __init__(self, folder: Path, shard: ShardId) -> None:
        super().__init__(folder, shard)
        self._root = folder / f"v{shard.view:04d}.zarr"
        self._group = write_group(self._root, {"scalekd_cache": FORMAT_VERSION, **shard._asdict()})
        self._arrays: dict[str, ArrayWriter] = {}
        self._offsets: dict[str, list[int]] = {name: [0] for name in FLAT}
        self._labels: list[int] = []

    def append(self, record: Record) -> None:
        """Append the record to every array."""
        features = b"".join((record.features, record.second)) if record.second else record.features
        fields = (features, record.pixels, target_json(record, places=False), record.logits)
        for name, data in zip(FLAT, fields, strict=True):
            if len(data):
                self._array(name, data).append(data)
            self._offsets[name].append(self._offsets[name][-1] + len(data))
        self._labels.append(0 if record.label == NO_LABEL else record.label)
        self.crcs.append(record_crc(record))

    def _array(self, name: str, first: Payload) -> ArrayWriter:
        """A flat array, whose chunk size is chosen to fit its first nonempty part."""
        if name not in self._arrays:
            chunk = min(max(1 << (len(first) - 1).bit_length(), CHUNK_BYTES[0]), CHUNK_BYTES[1])
            self._arrays[name] = ArrayWriter(self._root / name, "u1", None, chunk, SHARD_BYTES)
        return self._arrays[name]

    def finish(self) -> ShardSummary:
        """Write remaining data."""
        self._arrays = {name: self._array(name, b"") for name in FLAT}
        small = {f"{name}_offsets": np.array(self._offsets[name], "<u8") for name in FLAT}
        small |= {"labels": np.array(self._labels, "<i8"), "crc32c": np.array(self.crcs, "<u4")}
        for name, values in small.items():  # each array has a single chunk
            size = max(1, len(values)) * values.itemsize
            self._arrays[name] = ArrayWriter(self._root / name, values.dtype.name, 1, size, size)
            self._arrays[name].append(values.tobytes())
        files = {f"{self._root.name}/zarr.json": self._group}
        for name, array in self._arrays.items():
            array.finish()
            files |= {f"{self._root.name}/{name}/{file}": written for file, written in array.files.items()}
        sizes = {name: offsets[-1] for name, offsets in self._offsets.items()}
        target = sizes["target"] + sizes["logits"] + small["labels"].nbytes
        return ShardSummary(files, {"pixels": sizes["pixels"], "features": sizes["features"], "target": target})

    def abort(self) -> None:
        """Close the arrays."""
        for array in self._arrays.values():
            array.abort()


class Reader(ShardReader):
    """Reads only the requested records' bytes and verifies each record's checksum."""

    def __init__(self, folder: StoredPath, shard: ShardId, keys: list[str]) -> None:
        super().__init__(folder, shard, keys)
        keep_freed_memory()
        attributes = read_attributes(self.where)
        expected = {"scalekd_cache": FORMAT_VERSION, **shard._asdict()}
        if attributes != expected:
            raise damaged("the attributes of a shard are those of a different shard", attributes, expected, self.where)
        count = len(keys)
        self._crcs = ShardedArray(self.where / "crc32c", "uint32", count).all()
        self._labels: list[int] = ShardedArray(self.where / "labels", "int64", count).all().tolist()
        self._offsets: dict[str, list[int]] = {}
        self._flat: dict[str, ShardedArray] = {}
        for name in FLAT:
            offsets = ShardedArray(self.where / f"{name}_offsets", "uint64", count + 1).all()
            if offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any() or offsets[-1] >= 2**62:
                raise damaged(
                    f"the {name} offsets are not ascending from 0", offsets[:4], "0 <= a <= b <= ...", self.where
                )
            if count and np.diff(offsets).max() > MAX_RECORD_BYTES:
                largest = f"{int(np.diff(offsets).max()):,} bytes"
                raise damaged(f"{name} in a record are too large", largest, f"at most {MAX_RECORD_BYTES:,}", self.where)
            self._offsets[name] = offsets.tolist()
            self._flat[name] = ShardedArray(self.where / name, "uint8", int(offsets[-1]), plain=True)

    @property
    def crcs(self) -> NDArray[np.uint32]:
        """(n,) uint32."""
        return self._crcs

    @cached_property  # used for every record; creating a path takes 3 µs
    def where(self) -> StoredPath:
        """The group's folder."""
        return self.folder / f"v{self.shard.view:04d}.zarr"

    def read(self, rows: NDArray[np.int64]) -> list[Record]:
        """The records in these rows, in this order."""
        wanted = rows.tolist()
        flat = []
        for name in FLAT:
            offsets = self._offsets[name]
            flat.append(self._flat[name].spans([(offsets[row], offsets[row + 1]) for row in wanted]))
        return [self._record(row, *parts) for row, *parts in zip(wanted, *flat, strict=True)]

    def target_bytes(self, record: Record) -> int:
        """Number of bytes in the record's JSON and in its row in `labels`."""
        return len(target_json(record, places=False)) + np.dtype("<i8").itemsize

    def read_without_pixels(self, rows: NDArray[np.int64]) -> list[Record]:
        """The records in these rows, in this order."""
        wanted, flat = rows.tolist(), []
        for name in FLAT:
            offsets = self._offsets[name]
            spans = [(offsets[row], offsets[row + 1]) for row in wanted]
            flat.append([b""] * len(wanted) if name == "pixels" else self._flat[name].spans(spans))
        return [self._record(row, *parts, verify=False) for row, *parts in zip(wanted, *flat, strict=True)]

    def _record(
        self, row: int, features: Payload, pixels: Payload, target: Payload, logits: Payload, *, verify: bool = True
    ) -> Record:
        key = self.keys[row]
        try:
            fields = parse_target_json(bytes(target), self.where)
            cut = len(features) - fields.second_bytes
            label = self._labels[row] if Parts.LABEL in fields.parts else NO_LABEL
            if cut < 0 or (label == NO_LABEL and self._labels[row] != 0):
                raise ValueError("length or label does not match the record's JSON")
            features, second = features[:cut], features[cut:]
            payloads = map(crc_input, (pixels, features, second, logits))
            if verify:
                self.check_crc(row, fields_crc(key.encode(), fields.view, fields.digest, label, *payloads))
            record = Record(key, label, fields.view.decode(), fields.digest.decode(), pixels, features, logits, second)
            return check_parts(record, fields.parts)
        except ValueError as error:
            raise damaged_record(error, self.where, key) from error


def padding(unit: Path) -> tuple[int, float]:
    """Bytes of padding in the last chunks of a unit's flat arrays, and the expected value: half a chunk per array.

    Every shard has this overhead, however few records it holds. For tar units, the result is (0, 0).
    """
    zeros, chunks = 0, 0
    for name in FLAT:
        for path in unit.glob(f"v*.zarr/{name}/zarr.json"):
            meta, _ = read_json(path, "the metadata of a zarr array")
            [chunk] = meta["codecs"][0]["configuration"]["chunk_shape"]
            zeros += -meta["shape"][0] % chunk
            chunks += chunk
    return zeros, chunks / 2
