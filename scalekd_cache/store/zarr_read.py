"""Reads the sharded Zarr v3 arrays that `zarr.py` writes, without zarr-python.

In: an array's folder and what its owner knows about it (dtype, length). Out: bytes of rows.
Invariant: metadata is checked against what is expected before anything is allocated; a zstd frame must declare exactly
the size of a chunk before it is decoded; a missing chunk or file is an error (zarr-python 3.1 gives zeros for both).
"""

import json
import os
import struct
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from scalekd_cache.store.base import damaged
from scalekd_cache.store.files import read_json
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.remote import descriptor_of

MAX_CHUNK_BYTES = 1 << 26
MAX_SHARD_CHUNKS = 1 << 20
METADATA_BYTES = 1 << 20
ZSTD_MAGIC = 0xFD2FB528
ABSENT = 2**64 - 1
INDEX_CODECS = ["bytes", "crc32c"]


class ShardedArray:
    """An array split along its first axis only: shard files of chunks, each a zstd frame."""

    def __init__(self, folder: StoredPath, dtype: str, length: int) -> None:
        self.folder, self.dtype, self.length = folder, np.dtype(dtype).newbyteorder("<"), length
        meta, _ = read_json(folder / "zarr.json", "the metadata of a zarr array", METADATA_BYTES)
        try:
            self._accept(meta, dtype)
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise damaged("the metadata of a zarr array cannot be read", repr(error), "Zarr v3", folder) from error
        self._indexes: dict[int, NDArray[np.uint64]] = {}

    def _accept(self, meta: dict[str, Any], dtype: str) -> None:
        """Take the layout from the metadata; everything that is not as this project writes it is refused."""
        sharding = meta["codecs"][0]["configuration"]
        shape, shard, chunk = meta["shape"], meta["chunk_grid"]["configuration"]["chunk_shape"], sharding["chunk_shape"]
        numbers = [*shape, *shard, *chunk]
        found = {
            "zarr_format": meta["zarr_format"],
            "data_type": meta["data_type"],
            "first axis": shape[0],
            "axes": [len(shape), len(shard), len(chunk)],
            "chunk keys": meta["chunk_key_encoding"]["name"],
            "separator": meta["chunk_key_encoding"].get("configuration", {}).get("separator", "/"),
            "codecs": [codec["name"] for codec in meta["codecs"]],
            "inner codecs": [codec["name"] for codec in sharding["codecs"]],
            "index codecs": [codec["name"] for codec in sharding["index_codecs"]],
            "index location": sharding.get("index_location", "end"),
            "whole numbers": all(type(number) is int and 0 <= number < 2**62 for number in numbers),
        }
        expected = {
            "zarr_format": 3,
            "data_type": dtype,
            "first axis": self.length,
            "axes": [1] * 3,
            "chunk keys": "default",
            "separator": "/",
            "codecs": ["sharding_indexed"],
            "inner codecs": ["bytes", "zstd"],
            "index codecs": INDEX_CODECS,
            "index location": "end",
            "whole numbers": True,
        }
        if found != expected:
            wrong = [name for name in expected if found[name] != expected[name]]
            got, wanted = {name: found[name] for name in wrong}, {name: expected[name] for name in wrong}
            raise damaged("a zarr array is not laid out as expected", got, wanted, self.folder)
        self.chunk_rows, self.shard_rows = chunk[0], shard[0]
        self.row_bytes = self.dtype.itemsize
        self.chunk_bytes = self.chunk_rows * self.row_bytes
        whole = self.chunk_rows > 0 and self.shard_rows % self.chunk_rows == 0
        self.shard_chunks = self.shard_rows // self.chunk_rows if whole else 0
        if not (0 < self.shard_chunks <= MAX_SHARD_CHUNKS and 0 < self.chunk_bytes <= MAX_CHUNK_BYTES):
            raise damaged("chunks of a zarr array are out of range", {"chunk": chunk, "shard": shard, "shape": shape},
                          f"whole chunks of at most {MAX_CHUNK_BYTES} bytes", self.folder)  # fmt: skip

    def all(self) -> NDArray[Any]:
        """The whole of a one-dimensional array (only for those whose length is a number of records)."""
        return np.frombuffer(self.spans([(0, self.length)])[0], self.dtype)

    def spans(self, spans: list[tuple[int, int]]) -> list[memoryview]:
        """Rows start..stop of each span; a chunk is decoded once a call.

        Returns:
            Read-only views of one buffer, in which the chunks of a span are neighbours.
        """
        needed: set[int] = set()
        for start, stop in spans:
            if stop > start:
                needed.update(range(start // self.chunk_rows, (stop - 1) // self.chunk_rows + 1))
        buffer: Any = np.empty(len(needed) * self.chunk_bytes, np.uint8)
        places = {chunk: place for place, chunk in enumerate(sorted(needed))}
        by_shard: dict[int, list[int]] = {}
        for chunk in places:
            by_shard.setdefault(chunk // self.shard_chunks, []).append(chunk)
        for shard, chunks in by_shard.items():
            self._read_chunks(shard, chunks, buffer[places[chunks[0]] * self.chunk_bytes :])
        shown, cut = memoryview(buffer).toreadonly(), []
        for start, stop in spans:
            first = start // self.chunk_rows
            at = places.get(first, 0) * self.chunk_bytes + (start - first * self.chunk_rows) * self.row_bytes
            cut.append(shown[at : at + (stop - start) * self.row_bytes])
        return cut

    def _path(self, shard: int) -> StoredPath:
        """The file of a shard."""
        return self.folder / "c" / str(shard)

    def _read_chunks(self, shard: int, chunks: list[int], target: NDArray[np.uint8]) -> None:
        """Decode these chunks of one shard file to the front of `target`, one after another."""
        path = self._path(shard)
        try:
            descriptor = descriptor_of(path)
        except FileNotFoundError:
            raise damaged("a shard file is missing", "no file", "a zarr shard", path) from None
        try:
            if shard not in self._indexes:
                self._indexes[shard] = self._read_index(path, descriptor)
            index = self._indexes[shard]
            for place, chunk in enumerate(chunks):
                piece = target[place * self.chunk_bytes : (place + 1) * self.chunk_bytes]
                self._decode(path, descriptor, index[chunk % self.shard_chunks], piece)
        finally:
            os.close(descriptor)

    def _read_index(self, path: StoredPath, descriptor: int) -> NDArray[np.uint64]:
        """(chunks, 2) uint64: offset and length of every chunk, checked against the file's length."""
        size, index_bytes = os.fstat(descriptor).st_size, self.shard_chunks * 16 + 4
        if size < index_bytes:
            raise damaged("a shard file is too short for its index", size, f">= {index_bytes} bytes", path)
        data = os.pread(descriptor, index_bytes, size - index_bytes)
        if len(data) != index_bytes or google_crc32c.value(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
            raise damaged("the index of a zarr shard does not match its checksum", "other bytes", "crc32c", path)
        index = np.frombuffer(data, "<u8", self.shard_chunks * 2).reshape(-1, 2)
        offset, length = index[:, 0], index[:, 1]
        present = offset != ABSENT
        outside = (offset > size) | (length > size - np.minimum(offset, size))
        if (present & outside).any():
            raise damaged("the index of a zarr shard points outside the file", int(outside.argmax()), "inside", path)
        return index

    def _decode(self, path: StoredPath, descriptor: int, entry: NDArray[np.uint64], target: NDArray[np.uint8]) -> None:
        offset, length = int(entry[0]), int(entry[1])
        if offset == ABSENT:
            raise damaged("a chunk was never written", "an empty index entry", "a chunk", path)
        frame = os.pread(descriptor, length, offset)
        declared = zstd_content_size(frame)
        if declared != self.chunk_bytes:
            raise damaged("a zstd frame declares another size", declared, f"{self.chunk_bytes} bytes", path)
        try:
            zstd.decompress(frame, target)
        except RuntimeError as error:
            raise damaged("a chunk cannot be decompressed", error, "a zstd frame", path) from error


def zstd_content_size(frame: bytes) -> int | None:
    """The size that a zstd frame declares, None when it declares none or is not a frame (RFC 8878, 3.1.1.1)."""
    if len(frame) < 6 or struct.unpack_from("<I", frame)[0] != ZSTD_MAGIC:
        return None
    descriptor = frame[4]
    single_segment = bool(descriptor & 0x20)
    start = 5 + (not single_segment) + (0, 1, 2, 4)[descriptor & 3]
    flag = descriptor >> 6
    size = (1 if single_segment else 0, 2, 4, 8)[flag]
    if size == 0 or len(frame) < start + size:
        return None
    return int.from_bytes(frame[start : start + size], "little") + (256 if flag == 1 else 0)


def read_attributes(folder: StoredPath) -> dict[str, Any]:
    """The attributes of a zarr group."""
    meta, _ = read_json(folder / "zarr.json", "the metadata of a zarr group", METADATA_BYTES)
    attributes = meta.get("attributes")
    if meta.get("node_type") != "group" or not isinstance(attributes, dict):
        raise damaged("not a zarr group", json.dumps(meta)[:200], "a group with attributes", folder)
    return attributes
