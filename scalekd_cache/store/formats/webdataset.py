"""The `webdataset` backend: a shard is a plain tar, `v0000.tar`, with a byte-offset index beside it.

In: records. Out: members <key>.json (label, view record, digest, flags), <key>.jpg or .png (baked pixels only),
<key>.features (features, second target, logits), in this order; a tar that any WebDataset reader streams. Invariant:
headers hold no time, owner or host, so equal records give equal bytes.
We read by index and pread; the tar is never extracted and its headers are never trusted.
"""

import functools
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    cut_target,
    damaged,
    keep_freed_memory,
    target_json,
)
from scalekd_cache.store.checked_files import read_at
from scalekd_cache.store.durable_files import NewFile, write_new
from scalekd_cache.store.formats.tar_index import PLACES, ROW, load_index, pack_index
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.remote.remote_path import descriptor_of

BLOCK = 512
PNG_MAGIC = b"\x89PNG"
PADDING = [bytes(count) for count in range(BLOCK)]


class Writer(ShardWriter):
    """Streams members to the tar; keeps 40 bytes a record for the index."""

    def __init__(self, folder: Path, shard: ShardId) -> None:
        super().__init__(folder, shard)
        self._tar = NewFile(folder / f"v{shard.view:04d}.tar")
        self._rows: list[tuple[int, ...]] = []
        self._payload = {"pixels": 0, "features": 0, "target": 0}

    def append(self, record: Record) -> None:
        """Two or three members, in one write."""
        target = target_json(record, places=True)
        payloads = (record.pixels, record.features, record.second, record.logits)
        pixels, features, second, logits = map(crc_input, payloads)
        pieces: list[Any] = []
        json_offset = self._member(pieces, self._tar.bytes, record.key + ".json", target)
        pixels_offset, end = 0, json_offset + len(target)
        if len(pixels):
            extension = ".png" if bytes(pixels[:4]) == PNG_MAGIC else ".jpg"
            pixels_offset = self._member(pieces, end, record.key + extension, pixels)
            end = pixels_offset + len(pixels)
        features_offset = self._member(pieces, end, record.key + ".features", features, second, logits)
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

    def _member(self, pieces: list[Any], end: int, name: str, *data: Any) -> int:
        """Add the padding of what ends at `end`, header and data; the offset of the data."""
        header = member_header(name, sum(map(len, data)))
        padding = PADDING[-end % BLOCK]
        pieces += (padding, header, *data)
        return end + len(padding) + len(header)

    def finish(self) -> ShardSummary:
        """End the tar (two empty blocks), then the index."""
        self._tar.write(bytes(2 * BLOCK))
        tar = self._tar.finish(sync=False)
        index = pack_index(np.array(self._rows, ROW), self.shard, tar.bytes)
        stem = f"v{self.shard.view:04d}"
        files = {f"{stem}.tar": tar, f"{stem}.idx": write_new(self.folder / f"{stem}.idx", index, sync=False)}
        return ShardSummary(files, self._payload)

    def abandon(self) -> None:
        """Close the tar."""
        self._tar.abandon()


class Reader(ShardReader):
    """One pread a record, or a run of neighbors: their members lie together."""

    def __init__(self, folder: StoredPath, shard: ShardId, keys: list[str]) -> None:
        super().__init__(folder, shard, keys)
        keep_freed_memory()
        self._kept = -1
        try:
            descriptor = descriptor_of(self.where)
        except FileNotFoundError:
            raise damaged("a shard is missing", "no file", "a tar", self.where) from None
        tar_bytes = os.fstat(descriptor).st_size
        if isinstance(folder, Path):
            self._kept = descriptor
        else:  # an open copy could not make room for others: it is opened for each call
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

    @property
    def where(self) -> StoredPath:
        """The tar."""
        return self.folder / f"v{self.shard.view:04d}.tar"

    def read(self, rows: NDArray[np.int64]) -> list[Record]:
        """Records of these rows, in this order."""
        descriptor = self._kept if self._kept >= 0 else descriptor_of(self.where)
        records: list[Record] = []
        wanted, done = rows.tolist(), 0
        try:
            while done < len(wanted):
                begun, done = done, done + 1
                start, end = self._stretch(wanted[begun])
                while done < len(wanted) and wanted[done] == wanted[done - 1] + 1:  # neighbors lie together
                    _, further = self._stretch(wanted[done])
                    if further - start > RUN_BYTES:
                        break
                    done, end = done + 1, further
                data = read_at(descriptor, end - start, start, self.where)  # one buffer for a call of many was slower
                if len(data) != end - start:
                    where = self.keys[wanted[begun]]
                    raise damaged("a shard ends early", f"{len(data)} bytes", end - start, self.where, where)
                records += self._cut(wanted[begun:done], data, start)
        finally:
            if descriptor != self._kept:
                os.close(descriptor)
        return records

    def _stretch(self, row: int) -> tuple[int, int]:
        """Where a record begins and ends in the tar: its features are last (the index was checked for that)."""
        places = self._rows[row]
        return places[0], places[2] + places[5]

    def _cut(self, rows: list[int], data: bytes, start: int) -> list[Record]:
        """Records that follow each other in the tar's bytes from `start`; what is large is not copied."""
        records, shown = [], memoryview(data)
        # crc32c takes no memoryviews; a whole slice of bytes is no copy.
        buffer: Any = data if len(rows) == 1 else np.frombuffer(data, np.uint8)
        for row in rows:
            json_at, pixels_at, features_at, json_bytes, pixels_bytes, features_bytes, stored = self._rows[row]
            pixels_at = pixels_at - start if pixels_bytes else 0
            json_at, features_at, key = json_at - start, features_at - start, self.keys[row]
            end = features_at + features_bytes
            found = CRC(self._seeds[row], buffer[json_at:end])
            if found != stored:
                self.check_crc(row, found)
            try:
                target = cut_target(data[json_at : json_at + json_bytes], self.where)
                second_at = features_at + target.features_bytes
                logits_at = second_at + target.second_bytes
                if logits_at > end:
                    raise ValueError(f"{logits_at - features_at} bytes of features in a member of {features_bytes}")
                record = Record(
                    key,
                    target.label,
                    target.view.decode(),
                    target.digest.decode(),
                    pixels=shown[pixels_at : pixels_at + pixels_bytes],
                    features=shown[features_at:second_at],
                    logits=shown[logits_at:end],
                    second=shown[second_at:logits_at],
                )
                records.append(check_parts(record, target.parts))
            except ValueError as error:
                raise damaged(
                    "a record's JSON cannot be read", repr(error), "what was written", self.where, key
                ) from error
        return records

    def close(self) -> None:
        """Close the tar."""
        descriptor, self._kept = getattr(self, "_kept", -1), -1
        if descriptor >= 0:
            os.close(descriptor)


def crc_seed(key: str, places: bytes) -> int:
    """The beginning of a record's checksum: its key and the first 36 bytes of its index row.

    Its stretch of the tar follows. The row says what is what in it, so nothing that a reader goes by is left out.
    """
    return CRC(CRC(0, key.encode()), places)


def member_header(name: str, size: int) -> bytes:
    """What precedes a member's data: tarfile's own header, filled in by hand where the name needs no extension.

    tarfile takes 40 microseconds for one, this 2; a test compares them.
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
"""A header without name and size: offsets 0-100 name, 124-136 size, 148-156 checksum."""
PLAIN_SUM = sum(PLAIN[100:124]) + sum(PLAIN[136:148]) + 8 * ord(" ") + sum(PLAIN[156:])
