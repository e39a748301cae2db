"""The `webdataset` backend: a shard is a plain tar, `v0000.tar`, with a byte-offset index next to it.

In: records. Out: members <key>.json (label, view parameters, digest, flags), <key>.jpg, .webp or .png (baked pixels
only), <key>.features (features, second target, logits), in this order; any WebDataset reader can stream the tar.
Invariant: headers contain no time, owner or host, so equal records give equal bytes. The reader uses the index and
pread; it never extracts the tar or reads its headers.
"""

import functools
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalekd_cache.errors import counted
from scalekd_cache.store.base import (
    CRC,
    RUN_BYTES,
    Record,
    ShardId,
    ShardReader,
    ShardSummary,
    ShardWriter,
    check_parts,
    crc_input,
    damaged,
    damaged_record,
    keep_freed_memory,
    parse_target_json,
    pixels_suffix,
    target_json,
)
from scalekd_cache.store.checked_files import read_at
from scalekd_cache.store.durable_files import NewFile, write_new
from scalekd_cache.store.formats.tar_index import PLACES, ROW, load_index, pack_index
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.remote.remote_path import descriptor_of

BLOCK = 512
PADDING = [bytes(count) for count in range(BLOCK)]


class Writer(ShardWriter):
    """Writes members to the tar; keeps 40 bytes per record for the index."""

    def __init__(self, folder: Path, shard: ShardId) -> None:
        super().__init__(folder, shard)
        self._tar = NewFile(folder / f"v{shard.view:04d}.tar")
        self._rows: list[tuple[int, ...]] = []
        self._payload = {"pixels": 0, "features": 0, "target": 0}

    def append(self, record: Record) -> None:
        """Write a record's two or three members with one call."""
        target = target_json(record, places=True)
        payloads = (record.pixels, record.features, record.second, record.logits)
        pixels, features, second, logits = map(crc_input, payloads)
        pieces: list[Any] = []
        json_offset = add_member(pieces, self._tar.bytes, record.key + ".json", target)
        pixels_offset, end = 0, json_offset + len(target)
        if len(pixels):
            pixels_offset = add_member(pieces, end, record.key + pixels_suffix(pixels), pixels)
            end = pixels_offset + len(pixels)
        features_offset = add_member(pieces, end, record.key + ".features", features, second, logits)
        kept = len(features) + len(second)
        sizes = (len(target), len(pixels), kept + len(logits))
        places = (json_offset, pixels_offset, features_offset, *sizes)
        crc = functools.reduce(CRC, pieces[2:], crc_seed(record.key, PLACES.pack(*places)))  # from the JSON on
        pieces.append(PADDING[-sizes[2] % BLOCK])
        self._tar.write(*pieces)
        self._rows.append((*places, crc))
        self.crcs.append(crc)
        for kind, size in zip(self._payload, (len(pixels), kept, len(target) + len(logits)), strict=True):
            self._payload[kind] += size

    def finish(self) -> ShardSummary:
        """End the tar with two empty blocks, then write the index."""
        self._tar.write(bytes(2 * BLOCK))
        tar = self._tar.finish(sync=False)
        index = pack_index(np.array(self._rows, ROW), self.shard, tar.bytes)
        stem = f"v{self.shard.view:04d}"
        files = {f"{stem}.tar": tar, f"{stem}.idx": write_new(self.folder / f"{stem}.idx", index, sync=False)}
        return ShardSummary(files, self._payload)

    def abort(self) -> None:
        """Close the tar."""
        self._tar.abort()


class Reader(ShardReader):
    """Reads the tar with one pread per record or per run of adjacent records.

    If `tar_bytes`, the length of the tar, is given, the tar itself is not opened, and only `from_members` can be used.
    """

    def __init__(self, folder: StoredPath, shard: ShardId, keys: list[str], tar_bytes: int | None = None) -> None:
        super().__init__(folder, shard, keys)
        keep_freed_memory()
        self._kept = -1
        if tar_bytes is None:
            try:
                descriptor = descriptor_of(self.where)
            except FileNotFoundError:
                raise damaged("a shard is missing", "no file", "a tar", self.where) from None
            tar_bytes = os.fstat(descriptor).st_size
            if isinstance(folder, Path):
                self._kept = descriptor
            else:  # an open local copy could not be evicted, so it is opened for each call
                os.close(descriptor)
        index = load_index(folder / f"v{shard.view:04d}.idx", shard, len(keys), tar_bytes)
        self._crcs = np.ascontiguousarray(index["crc32c"])
        self._rows: list[tuple[int, ...]] = index.tolist()
        raw = index.tobytes()
        starts = range(0, len(raw), ROW.itemsize)
        self._seeds = [crc_seed(key, raw[at : at + PLACES.size]) for key, at in zip(keys, starts, strict=True)]

    @property
    def crcs(self) -> NDArray[np.uint32]:
        """(n,) uint32."""
        return self._crcs

    @functools.cached_property  # used for every record; creating a path takes 3 µs
    def where(self) -> StoredPath:
        """The tar."""
        return self.folder / f"v{self.shard.view:04d}.tar"

    def read(self, rows: NDArray[np.int64]) -> list[Record]:
        """The records in these rows, in this order."""
        descriptor = self._kept if self._kept >= 0 else descriptor_of(self.where)
        records: list[Record] = []
        wanted, done = rows.tolist(), 0
        try:
            while done < len(wanted):
                first, done = done, done + 1
                start, end = self._extent(wanted[first])
                while done < len(wanted) and wanted[done] == wanted[done - 1] + 1:  # adjacent records are contiguous
                    _, further = self._extent(wanted[done])
                    if further - start > RUN_BYTES:
                        break
                    done, end = done + 1, further
                data = read_at(descriptor, end - start, start, self.where)  # one buffer for the whole call was slower
                if len(data) != end - start:
                    where = self.keys[wanted[first]]
                    raise damaged("a shard is truncated", counted(len(data), "byte"), end - start, self.where, where)
                records += self._cut(wanted[first:done], data, start)
        finally:
            if descriptor != self._kept:
                os.close(descriptor)
        return records

    def from_members(self, row: int, target: bytes, pixels: bytes, features: bytes) -> Record:
        """The record in a row, built from its members' data as returned by another tar reader.

        The checksum also covers the headers and the padding between the members; they are rebuilt from names and sizes.
        """
        key, start = self.keys[row], self._rows[row][0]
        pieces: list[Any] = [target]
        end = start + len(target)
        if pixels:
            end = add_member(pieces, end, key + pixels_suffix(pixels), pixels) + len(pixels)
        add_member(pieces, end, key + ".features", features)
        return self._cut([row], b"".join(pieces), start)[0]

    def _extent(self, row: int) -> tuple[int, int]:
        """Start and end of a record in the tar; its features come last (`load_index` checks the order)."""
        places = self._rows[row]
        return places[0], places[2] + places[5]

    def _cut(self, rows: list[int], data: bytes, start: int) -> list[Record]:
        """Adjacent records, sliced from the tar's bytes at `start`; large parts are not copied."""
        records, shown = [], memoryview(data)
        # google_crc32c rejects memoryviews; slicing all of a bytes object does not copy.
        buffer: Any = data if len(rows) == 1 else np.frombuffer(data, np.uint8)
        for row in rows:
            json_at, pixels_at, features_at, json_bytes, pixels_bytes, features_bytes, stored = self._rows[row]
            pixels_at = pixels_at - start if pixels_bytes else 0
            json_at, features_at, key = json_at - start, features_at - start, self.keys[row]
            end = features_at + features_bytes
            found = CRC(self._seeds[row], buffer[json_at:end])
            if found != stored:
                self.check_crc(row, found)
            end_of_json = json_at + json_bytes
            pixels = shown[pixels_at : pixels_at + pixels_bytes]
            records.append(self._record(key, data[json_at:end_of_json], pixels, shown[features_at:end]))
        return records

    def _record(self, key: str, text: bytes, pixels: memoryview, member: memoryview) -> Record:
        """A record from its JSON, its pixels and its features member."""
        try:
            target = parse_target_json(text, self.where)
            logits_at = target.features_bytes + target.second_bytes
            if logits_at > len(member):
                raise ValueError(f"{logits_at} bytes of features in a {len(member)}-byte member")
            record = Record(
                key,
                target.label,
                target.view.decode(),
                target.digest.decode(),
                pixels=pixels,
                features=member[: target.features_bytes],
                logits=member[logits_at:],
                second=member[target.features_bytes : logits_at],
            )
            return check_parts(record, target.parts)
        except ValueError as error:
            raise damaged_record(error, self.where, key) from error

    def read_without_pixels(self, rows: NDArray[np.int64]) -> list[Record]:
        """The records in these rows, in this order; the pixel bytes are not read."""
        descriptor = self._kept if self._kept >= 0 else descriptor_of(self.where)
        records = []
        try:
            for row in rows.tolist():
                json_at, _, features_at, json_bytes, _, features_bytes, _ = self._rows[row]
                text = read_at(descriptor, json_bytes, json_at, self.where)
                member = memoryview(read_at(descriptor, features_bytes, features_at, self.where))
                records.append(self._record(self.keys[row], text, memoryview(b""), member))
        finally:
            if descriptor != self._kept:
                os.close(descriptor)
        return records

    def target_bytes(self, record: Record) -> int:
        """Length of the record's JSON in bytes."""
        return len(target_json(record, places=True))

    def close(self) -> None:
        """Close the tar."""
        descriptor, self._kept = getattr(self, "_kept", -1), -1
        if descriptor >= 0:
            os.close(descriptor)


def add_member(pieces: list[Any], end: int, name: str, *data: Any) -> int:
    """Add padding after offset `end`, then a member's header and data; returns the offset of the data."""
    header = member_header(name, sum(map(len, data)))
    padding = PADDING[-end % BLOCK]
    pieces += (padding, header, *data)
    return end + len(padding) + len(header)


def crc_seed(key: str, places: bytes) -> int:
    """The start of a record's checksum: its key and the first 36 bytes of its index row.

    The checksum then covers the record's bytes in the tar. The row is included because the reader uses it to split
    these bytes.
    """
    return CRC(CRC(0, key.encode()), places)


def member_header(name: str, size: int) -> bytes:
    """A member's tar header; for plain names, this fills in a template from tarfile.

    tarfile takes 40 microseconds per header; this takes 2. A test compares the results.
    """
    if not name.isascii() or len(name) > 100 or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = size, 0o644, 0
        return info.tobuf(tarfile.PAX_FORMAT)
    name_field, size_field = name.encode().ljust(100, b"\0"), b"%011o\0" % size
    checksum = PLAIN_SUM + sum(name_field) + sum(size_field)
    return b"".join((name_field, PLAIN[100:124], size_field, PLAIN[136:148], b"%06o\0 " % checksum, PLAIN[156:]))


def _plain_header() -> bytes:
    info = tarfile.TarInfo("")
    info.mode, info.mtime = 0o644, 0
    return info.tobuf(tarfile.PAX_FORMAT)


PLAIN = _plain_header()
"""A header without name and size. The name is at offsets 0-100, the size at 124-136 and the checksum at 148-156."""
PLAIN_SUM = sum(PLAIN[100:124]) + sum(PLAIN[136:148]) + 8 * ord(" ") + sum(PLAIN[156:])
