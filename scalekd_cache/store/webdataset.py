"""The `webdataset` backend: a shard is a plain tar, `v0000.tar`, with a byte-offset index beside it.

In: records. Out: members <key>.json, <key>.jpg or .png (baked pixels only), <key>.features, in this order; a tar that
any WebDataset reader streams. Invariant: headers hold no time, owner or host, so equal records give equal bytes.
We read by index and pread; the tar is never extracted and its headers are never trusted.
"""

import base64
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalekd_cache.store.base import Record, ShardId, ShardReader, ShardSummary, ShardWriter, damaged, record_crc
from scalekd_cache.store.files import HashingFile, canonical_json, write_new
from scalekd_cache.store.index import ROW, load_index, pack_index

BLOCK = 512
PNG_MAGIC = b"\x89PNG"


class Writer(ShardWriter):
    """Streams members to the tar; keeps 40 bytes a record for the index."""

    def __init__(self, folder: Path, shard: ShardId, feature_bytes: int) -> None:
        super().__init__(folder, shard, feature_bytes)
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
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(data), 0o644, 0
        self._tar.write(info.tobuf(tarfile.PAX_FORMAT))
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

    def __init__(self, folder: Path, shard: ShardId, keys: list[str]) -> None:
        super().__init__(folder, shard, keys)
        self._descriptor = -1
        try:
            self._descriptor = os.open(self.where, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise damaged("a shard is missing", "no file", "a tar", self.where) from None
        tar_bytes = os.fstat(self._descriptor).st_size
        self._rows = load_index(folder / f"v{shard.view:04d}.idx", shard, len(keys), tar_bytes)
        self._crcs = np.ascontiguousarray(self._rows["crc32c"])

    @property
    def crcs(self) -> NDArray[np.uint32]:
        """(n,) uint32."""
        return self._crcs

    @property
    def where(self) -> Path:
        """The tar."""
        return self.folder / f"v{self.shard.view:04d}.tar"

    def read(self, rows: NDArray[np.int64]) -> list[Record]:
        """Records of these rows, in this order."""
        return [self._read_one(row) for row in rows.tolist()]

    def _read_one(self, row: int) -> Record:
        *offsets_and_sizes, _ = self._rows[row].item()
        spans = list(zip(offsets_and_sizes[:3], offsets_and_sizes[3:], strict=True))  # in the order of MEMBERS
        start = min((offset for offset, size in spans if size), default=0)
        stop = max(offset + size for offset, size in spans)
        data = os.pread(self._descriptor, stop - start, start)
        if len(data) != stop - start:
            raise damaged("a shard ends early", f"{len(data)} bytes", stop - start, self.where, self.keys[row])
        target, pixels, features = (data[at - start : at - start + size] if size else b"" for at, size in spans)
        return self.checked(row, self._parse(row, target, pixels, features))

    def _parse(self, row: int, target: bytes, pixels: bytes, features: bytes) -> Record:
        key = self.keys[row]
        try:
            fields: dict[str, Any] = json.loads(target)
            logits = base64.b64decode(fields["logits"], validate=True)
            view = canonical_json(fields["view"])
            return Record(key, int(fields["label"]), view, str(fields["digest"]), pixels, features, logits)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise damaged("a record's JSON cannot be read", repr(error), "what was written", self.where, key) from error

    def close(self) -> None:
        """Close the tar."""
        descriptor, self._descriptor = getattr(self, "_descriptor", -1), -1
        if descriptor >= 0:
            os.close(descriptor)


def target_json(record: Record) -> str:
    """The JSON member: label, view record, digest and logits share one, because a member costs at least 1 KiB."""
    logits = base64.b64encode(record.logits).decode()
    fields = {"digest": record.digest, "label": record.label, "logits": logits, "view": json.loads(record.view)}
    return canonical_json(fields)
