"""The `webdataset` backend: a shard is a plain tar, `v0000.tar`, with a byte-offset index beside it.

In: records. Out: members <key>.json, <key>.jpg or .png (baked pixels only), <key>.features, in this order; a tar that
any WebDataset reader streams. Invariant: headers hold no time, owner or host, so equal records give equal bytes.
We read by index and pread; the tar is never extracted and its headers are never trusted.
"""

import base64
import binascii
import json
import os
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scalekd_cache.store.base import Record, ShardId, ShardReader, ShardSummary, ShardWriter, damaged, record_crc
from scalekd_cache.store.files import HashingFile, write_new
from scalekd_cache.store.index import ROW, load_index, pack_index
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.remote import descriptor_of

BLOCK = 512
PNG_MAGIC = b"\x89PNG"


class Writer(ShardWriter):
    """Streams members to the tar; keeps 40 bytes a record for the index."""

    def __init__(self, folder: Path, shard: ShardId) -> None:
        super().__init__(folder, shard)
        self._tar = HashingFile(folder / f"v{shard.view:04d}.tar")
        self._rows: list[tuple[int, ...]] = []
        self._payload = {"pixels": 0, "features": 0, "target": 0}

    def append(self, record: Record) -> None:
        """Up to three members."""
        crc = record_crc(record)
        target = target_json(record).encode()
        json_offset = self._member(record.key + ".json", target)
        pixels_offset = 0
        if record.pixels:
            extension = ".png" if record.pixels.startswith(PNG_MAGIC) else ".jpg"
            pixels_offset = self._member(record.key + extension, record.pixels)
        features_offset = self._member(record.key + ".features", record.features)
        sizes = (len(target), len(record.pixels), len(record.features))
        self._rows.append((json_offset, pixels_offset, features_offset, *sizes, crc))
        self.crcs.append(crc)
        for kind, size in zip(("target", "pixels", "features"), sizes, strict=True):
            self._payload[kind] += size

    def _member(self, name: str, data: bytes) -> int:
        """Write header, data and padding; the offset of the data."""
        self._tar.write(member_header(name, len(data)))
        offset = self._tar.bytes
        self._tar.write(data)
        self._tar.write(bytes(-len(data) % BLOCK))
        return offset

    def finish(self) -> ShardSummary:
        """End the tar (two empty blocks), then the index."""
        self._tar.write(bytes(2 * BLOCK))
        tar = self._tar.finish()
        index = pack_index(np.array(self._rows, ROW), self.shard, tar.bytes)
        stem = f"v{self.shard.view:04d}"
        files = {f"{stem}.tar": tar, f"{stem}.idx": write_new(self.folder / f"{stem}.idx", index)}
        return ShardSummary(files, self._payload)

    def abandon(self) -> None:
        """Close the tar."""
        self._tar.abandon()


class Reader(ShardReader):
    """One pread a record: its members lie together."""

    def __init__(self, folder: StoredPath, shard: ShardId, keys: list[str]) -> None:
        super().__init__(folder, shard, keys)
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
        self._rows = load_index(folder / f"v{shard.view:04d}.idx", shard, len(keys), tar_bytes)
        self._crcs = np.ascontiguousarray(self._rows["crc32c"])
        self._spans = [row[:-1] for row in self._rows.tolist()]
        self._buffer = memoryview(b"")

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
        try:
            return [self._read_one(descriptor, row) for row in rows.tolist()]
        finally:
            if descriptor != self._kept:
                os.close(descriptor)

    def _read_one(self, descriptor: int, row: int) -> Record:
        json_at, pixels_at, features_at, json_bytes, pixels_bytes, features_bytes = self._spans[row]
        start = json_at
        stop = max(json_at + json_bytes, pixels_at + pixels_bytes, features_at + features_bytes)
        if len(self._buffer) < stop - start:
            self._buffer = memoryview(bytearray(stop - start))
        found = os.preadv(descriptor, [self._buffer[: stop - start]], start)
        if found != stop - start:
            raise damaged("a shard ends early", f"{found} bytes", stop - start, self.where, self.keys[row])
        pixels_at, features_at = max(pixels_at - start, 0), features_at - start
        target = bytes(self._buffer[:json_bytes])
        pixels = bytes(self._buffer[pixels_at : pixels_at + pixels_bytes])
        features = bytes(self._buffer[features_at : features_at + features_bytes])
        return self.checked(row, self._parse(row, target, pixels, features))

    def _parse(self, row: int, target: bytes, pixels: bytes, features: bytes) -> Record:
        """The JSON member, cut at its names, which canonical JSON has in this order (a JSON parser takes four times as
        long); whatever is cut wrongly does not match the checksum."""
        key, (head, _, view) = self.keys[row], target.partition(b',"view":')
        digest, _, rest = head.partition(b'","label":')
        label, _, logits = rest.partition(b',"logits":"')
        try:
            return Record(
                key,
                int(label),
                view[:-1].decode(),
                digest[len(b'{"digest":"') :].decode(),
                pixels,
                features,
                binascii.a2b_base64(logits[:-1], strict_mode=True),
            )
        except ValueError as error:
            raise damaged("a record's JSON cannot be read", repr(error), "what was written", self.where, key) from error

    def close(self) -> None:
        """Close the tar."""
        descriptor, self._kept = getattr(self, "_kept", -1), -1
        if descriptor >= 0:
            os.close(descriptor)


def target_json(record: Record) -> str:
    """The JSON member: label, view record, digest and logits share one, because a member costs at least 1 KiB.

    It is canonical because the view is, and because the names are in order.
    """
    logits = base64.b64encode(record.logits).decode()
    return f'{{"digest":{json.dumps(record.digest)},"label":{record.label},"logits":"{logits}","view":{record.view}}}'


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
