"""Writes the one-dimensional, sharded Zarr v3 arrays of the `zarr` backend, chunk by chunk, without zarr-python.

In: an array's bytes, in pieces of any size. Out: `<name>/zarr.json` and the shard files `<name>/c/0`, ... A shard file
holds chunks (raw bytes with a CRC-32C, or a zstd frame with a checksum), followed by their index. Invariant: every
chunk is written, including all-zero chunks; equal input gives equal bytes; any Zarr v3 reader opens the arrays (the
tests use zarr-python).
"""

import functools
import json
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zstandard

from scalekd_cache.store.base import Payload, crc_input
from scalekd_cache.store.durable_files import NewFile, Written, write_new

BLOCK_BYTES = 1 << 16
"""Smaller chunks are written together in blocks of about this size."""
UINT32 = struct.Struct("<I").pack
ENTRY = struct.Struct("<QQ").pack
ABSENT = struct.pack("<QQ", 2**64 - 1, 2**64 - 1)
"""Index entry for a chunk beyond the end of the array."""


class ArrayWriter:
    """Writes one array by appending; buffers at most one chunk or one block of small chunks.

    Args:
        folder: the array's folder.
        dtype: the numpy name of the dtype, which is little-endian in the file.
        level: zstd level; each frame has a checksum. If None, chunks are stored uncompressed and followed by their
            CRC-32C, so that a reader can read any part of them.
        chunk_bytes: size of a chunk before compression.
        shard_bytes: size of a shard file before compression, which must be a multiple of `chunk_bytes`; an array that
            fits in one file has only as many chunks as it needs.
    """

    def __init__(self, folder: Path, dtype: str, level: int | None, chunk_bytes: int, shard_bytes: int) -> None:
        self._folder, self._dtype, self._level = folder, np.dtype(dtype), level
        assert chunk_bytes % self._dtype.itemsize == 0, (chunk_bytes, dtype)
        self._chunk_bytes, self._shard_chunks = chunk_bytes, shard_bytes // chunk_bytes
        chunks = min(BLOCK_BYTES, shard_bytes) // chunk_bytes if level is None else 1
        self._block_bytes = max(1, chunks) * chunk_bytes
        assert shard_bytes % self._block_bytes == 0, (shard_bytes, chunk_bytes)
        self._pending: list[Payload] = []
        self._missing_bytes = self._block_bytes
        self._bytes = 0
        self._file: NewFile | None = None
        self._index: list[bytes] = []
        self.files: dict[str, Written] = {}
        """Finished files, keyed by name relative to `folder`; after `finish`, this is every file."""
        folder.mkdir()

    def append(self, data: Payload) -> None:
        """Append bytes to the array."""
        self._bytes += len(data)
        while len(data) >= self._missing_bytes:
            left = memoryview(data)
            self._pending.append(left[: self._missing_bytes])
            data = left[self._missing_bytes :]
            self._write_block()
        if len(data):
            self._pending.append(data)
            self._missing_bytes -= len(data)

    def finish(self) -> None:
        """Write the last chunk, the last index and the metadata; the caller fsyncs the files."""
        assert self._bytes % self._dtype.itemsize == 0, (self._bytes, self._dtype)
        if self._pending:
            self._pending.append(bytes(self._missing_bytes % self._chunk_bytes))
            self._write_block()
        if not self.files:  # the whole array is in one file
            self._shard_chunks = max(1, len(self._index))
        if self._index:
            self._finish_file()
        text = json.dumps(self._metadata(), indent=2) + "\n"
        self.files["zarr.json"] = write_new(self._folder / "zarr.json", text.encode(), sync=False)

    def abort(self) -> None:
        """Close the open file."""
        if self._file is not None:
            self._file.abort()

    def _write_block(self) -> None:
        """Write pending data as whole chunks: one chunk without a copy, or many small chunks in one write."""
        pieces, self._pending, self._missing_bytes = self._pending, [], self._block_bytes
        if len(self._index) == self._shard_chunks:
            self._finish_file()
        if self._file is None:
            (self._folder / "c").mkdir(exist_ok=True)
            self._file = NewFile(self._folder / self._file_name())
        start, stored = self._file.bytes, self._chunk_bytes + 4
        if self._level is not None:
            frame = zstandard.ZstdCompressor(level=self._level, write_checksum=True).compress(b"".join(pieces))
            stored, out, count = len(frame), [frame], 1
        elif self._block_bytes == self._chunk_bytes:
            out, count = [crc_input(piece) for piece in pieces], 1
            out.append(UINT32(functools.reduce(google_crc32c.extend, out, 0)))
        else:
            data = b"".join(pieces)
            chunks = [data[at : at + self._chunk_bytes] for at in range(0, len(data), self._chunk_bytes)]
            out = [b"".join([part for chunk in chunks for part in (chunk, UINT32(google_crc32c.value(chunk)))])]
            count = len(chunks)
        self._file.write(*out)
        self._index += [ENTRY(start + place * stored, stored) for place in range(count)]

    def _finish_file(self) -> None:
        """End a shard file with its index: each chunk's offset and length, and a CRC-32C."""
        assert self._file is not None
        index = b"".join(self._index) + ABSENT * (self._shard_chunks - len(self._index))
        self._file.write(index, UINT32(google_crc32c.value(index)))
        self.files[self._file_name()] = self._file.finish(sync=False)
        self._file, self._index = None, []

    def _file_name(self) -> str:
        return f"c/{len(self.files)}"

    def _metadata(self) -> dict[str, Any]:
        """The array's zarr.json, as zarr-python 3.1 writes it for ZstdCodec(level, checksum=True) or Crc32cCodec()."""
        item = self._dtype.itemsize
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {
            "chunk_shape": [self._chunk_bytes // item],
            "codecs": [
                {"name": "bytes"} if item == 1 else little,
                {"name": "crc32c"}
                if self._level is None
                else {"name": "zstd", "configuration": {"level": self._level, "checksum": True}},
            ],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        shard = [self._chunk_bytes // item * self._shard_chunks]
        return {
            "shape": [self._bytes // item],
            "data_type": self._dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {},
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }


def write_group(folder: Path, attributes: dict[str, Any]) -> Written:
    """Write the zarr.json for a group with these attributes."""
    folder.mkdir()
    meta = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
    return write_new(folder / "zarr.json", (json.dumps(meta, indent=2) + "\n").encode(), sync=False)
