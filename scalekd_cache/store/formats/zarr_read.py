"""Reads the sharded Zarr v3 arrays that `zarr.py` writes, without zarr-python.

In: an array's folder and its expected dtype and length. Out: bytes of rows.
Invariant: metadata is checked before anything is allocated; a zstd frame is decoded only if it declares exactly the
size of a chunk; a missing chunk or file is an error (zarr-python 3.1 returns zeros for both). In uncompressed chunks
(flat arrays), only the requested bytes are read; the records' own checksums cover them.
"""

import json
import os
import struct
from typing import Any

import google_crc32c
import numpy as np
import zstandard
from numpy.typing import NDArray

from scalekd_cache.errors import counted
from scalekd_cache.store.base import RUN_BYTES, damaged
from scalekd_cache.store.checked_files import read_at, read_json
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.remote.remote_path import descriptor_of

MAX_CHUNK_BYTES = 1 << 26
MAX_SHARD_CHUNKS = 1 << 20
METADATA_BYTES = 1 << 20
ZSTD_MAGIC = 0xFD2FB528
ABSENT = 2**64 - 1
INDEX_CODECS = ["bytes", "crc32c"]


class ShardedArray:
    """An array split along its first axis into shard files, which consist of chunks.

    Args:
        folder: the array's folder.
        dtype: the numpy name of the dtype.
        length: number of rows.
        plain: whether chunks are uncompressed and followed by their CRC-32C; otherwise, each chunk is a zstd frame.
    """

    def __init__(self, folder: StoredPath, dtype: str, length: int, *, plain: bool = False) -> None:
        self.folder, self.dtype, self.length = folder, np.dtype(dtype).newbyteorder("<"), length
        self.plain = plain
        meta, _ = read_json(folder / "zarr.json", "the metadata of a zarr array", METADATA_BYTES)
        try:
            self._read_layout(meta, dtype)
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise damaged("cannot read the metadata of a zarr array", repr(error), "Zarr v3", folder) from error
        self._indexes: dict[int, NDArray[np.uint64]] = {}

    def _read_layout(self, meta: dict[str, Any], dtype: str) -> None:
        """Read the layout from the metadata; layouts that this project does not write are rejected."""
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
            "inner codecs": ["bytes", "crc32c" if self.plain else "zstd"],
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
            raise damaged(
                "chunks of a zarr array are out of range",
                {"chunk": chunk, "shard": shard, "shape": shape},
                f"whole chunks of at most {MAX_CHUNK_BYTES} bytes",
                self.folder,
            )

    def all(self) -> NDArray[Any]:
        """The whole array (only for arrays whose length is a number of records)."""
        return np.frombuffer(self.spans([(0, self.length)])[0], self.dtype)

    def spans(self, spans: list[tuple[int, int]]) -> list[memoryview]:
        """Rows start..stop of each span, read-only; each zstd frame is decoded once per call."""
        return self._plain_spans(spans) if self.plain else self._decoded_spans(spans)

    def _plain_spans(self, spans: list[tuple[int, int]]) -> list[memoryview]:
        """`spans` for uncompressed chunks; adjacent spans are read in one call, up to `RUN_BYTES`."""
        files: dict[int, tuple[int, StoredPath]] = {}
        cut: list[memoryview] = []
        row, done = self.row_bytes, 0
        try:
            while done < len(spans):
                index, (start, end), done = done, spans[done], done + 1
                while done < len(spans) and spans[done][0] == end and (spans[done][1] - start) * row <= RUN_BYTES:
                    done, end = done + 1, spans[done][1]
                data = self._plain_span(start * row, end * row, files)
                cut += [data[(first - start) * row : (last - start) * row] for first, last in spans[index:done]]
        finally:
            for descriptor, _ in files.values():
                os.close(descriptor)
        return cut

    def _plain_span(self, at: int, end: int, files: dict[int, tuple[int, StoredPath]]) -> memoryview:
        """Bytes `at` to `end` of the array: one read per file, with the chunks' checksums removed.

        `files` holds the files opened in this call; creating a path per span would take as long as reading it.
        """
        pieces: list[bytes | memoryview] = []
        while at < end:
            shard, first = divmod(at, self.shard_chunks * self.chunk_bytes)
            last = min(end - at + first, self.shard_chunks * self.chunk_bytes)
            if shard not in files:
                files[shard] = self._open(shard), self._path(shard)
            descriptor, path = files[shard]
            start, stop = self._in_file(first), self._in_file(last - 1) + 1
            data = read_at(descriptor, stop - start, start, path)
            if len(data) != stop - start:
                raise damaged("a shard file is truncated", counted(len(data), "byte"), stop - start, path)
            if stop - start == last - first:
                pieces.append(data)
            else:
                shown, size = memoryview(data), self.chunk_bytes - first % self.chunk_bytes
                pieces.append(shown[:size])
                pieces += [
                    shown[cut : cut + self.chunk_bytes] for cut in range(size + 4, stop - start, self.chunk_bytes + 4)
                ]
            at += last - first
        return memoryview(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def _in_file(self, at: int) -> int:
        """Offset of a shard's byte `at` in the file; each chunk is followed by a CRC-32C."""
        return at + 4 * int(at // self.chunk_bytes)

    def _check_plain(self, index: NDArray[np.uint64], shard: int) -> None:
        """Check that a flat array's chunks are contiguous and start at the first byte of the file."""
        left = self.length * self.row_bytes - shard * self.shard_chunks * self.chunk_bytes
        there = index[: -(-min(left, self.shard_chunks * self.chunk_bytes) // self.chunk_bytes)]
        size = self.chunk_bytes + 4
        expected = np.stack(
            [np.arange(len(there), dtype=np.uint64) * np.uint64(size), np.full(len(there), size, np.uint64)], 1
        )
        if (there[:, 0] == ABSENT).any():
            raise damaged(
                "a chunk is missing", "an empty index entry", "offset and length of the chunk", self._path(shard)
            )
        if (there != expected).any():
            raise damaged(
                "chunks of a flat array are not in order",
                "other offsets",
                f"contiguous, {size} bytes each",
                self._path(shard),
            )

    def _decoded_spans(self, spans: list[tuple[int, int]]) -> list[memoryview]:
        """`spans` for zstd frames: views into one buffer, in which the chunks of each span are adjacent."""
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
        """Path of a shard file."""
        return self.folder / "c" / str(shard)

    def _read_chunks(self, shard: int, chunks: list[int], target: NDArray[np.uint8]) -> None:
        """Decode these chunks from one shard file into `target`, one after another."""
        descriptor = self._open(shard)
        try:
            index = self._indexes[shard]
            for place, chunk in enumerate(chunks):
                piece = target[place * self.chunk_bytes : (place + 1) * self.chunk_bytes]
                self._decode(shard, descriptor, index[chunk % self.shard_chunks], piece)
        finally:
            os.close(descriptor)

    def _open(self, shard: int) -> int:
        """A shard file's descriptor; its index is read when the file is first opened."""
        path = self._path(shard)
        try:
            descriptor = descriptor_of(path)
        except FileNotFoundError:
            raise damaged("a shard file is missing", "no file", "a zarr shard", path) from None
        try:
            if shard not in self._indexes:
                index = self._read_index(path, descriptor)
                if self.plain:
                    self._check_plain(index, shard)
                self._indexes[shard] = index
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _read_index(self, path: StoredPath, descriptor: int) -> NDArray[np.uint64]:
        """(chunks, 2) uint64: the offset and length of each chunk, checked against the file's length."""
        size, index_bytes = os.fstat(descriptor).st_size, self.shard_chunks * 16 + 4
        if size < index_bytes:
            raise damaged("a shard file is too short for its index", size, f">= {index_bytes} bytes", path)
        data = read_at(descriptor, index_bytes, size - index_bytes, path)
        if len(data) != index_bytes or google_crc32c.value(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
            raise damaged(
                "the index of a zarr shard does not match its checksum",
                "a different CRC-32C",
                "the stored CRC-32C",
                path,
            )
        index = np.frombuffer(data, "<u8", self.shard_chunks * 2).reshape(-1, 2)
        offset, length = index[:, 0], index[:, 1]
        present = offset != ABSENT
        outside = (offset > size) | (length > size - np.minimum(offset, size))
        if (present & outside).any():
            raise damaged(
                "the index of a zarr shard points outside the file",
                f"chunk {int(outside.argmax())}",
                f"offsets below {size}",
                path,
            )
        return index

    def _decode(self, shard: int, descriptor: int, entry: NDArray[np.uint64], target: NDArray[np.uint8]) -> None:
        path, offset, length = self._path(shard), int(entry[0]), int(entry[1])
        if offset == ABSENT:
            raise damaged("a chunk is missing", "an empty index entry", "offset and length of the chunk", path)
        frame = read_at(descriptor, length, offset, path)
        declared = zstd_content_size(frame)
        if declared != self.chunk_bytes:
            raise damaged(
                "the header of a zstd frame has the wrong content size", declared, f"{self.chunk_bytes} bytes", path
            )
        try:
            data = zstandard.ZstdDecompressor().decompress(frame)
        except zstandard.ZstdError as error:
            raise damaged("cannot decompress a chunk", error, "a zstd frame", path) from error
        target[:] = np.frombuffer(data, np.uint8)  # the decoder fails unless the length matches the declared one


def zstd_content_size(frame: bytes) -> int | None:
    """The size that a zstd frame declares; None if it declares none or is not a frame (RFC 8878, 3.1.1.1)."""
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
