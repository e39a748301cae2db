"""The contract between a cache and its file formats: records, their checksum, shard writers and shard readers.

In: records of one view of a contiguous range of images. Out: one shard, in the format of a backend.
Invariant: both backends store the same records, each with a crc32c of all that a reader goes by, and a reader gives
back exactly those or raises: never zeros, never fewer.
"""

import functools
import importlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from scalekd_cache.errors import UserError, mistype
from scalekd_cache.store.files import Written
from scalekd_cache.store.path import StoredPath

FORMAT_VERSION = 1
MAX_UNIT_SAMPLES = 65_536
"""Most records in a shard; a file that claims more is refused before anything is allocated."""
MAX_KEY_BYTES = 1024
RUN_BYTES = 1 << 20
"""Neighbouring records are read at once up to this size; larger runs leave the processor's cache and were slower."""
CRC: Callable[[int, Any], int] = google_crc32c.extend
UINT32 = struct.Struct("<I").pack
LABEL = struct.Struct("<IqI").pack
"""Length and label, then the length of what follows."""

BACKENDS = {"webdataset": "scalekd_cache.store.webdataset", "zarr": "scalekd_cache.store.zarr"}


Payload = bytes | memoryview
"""Bytes of a record. A reader gives read-only memoryviews into the buffer of its call, which lives as long as one of
them does; `np.frombuffer`, `b"".join` and `io.BytesIO` take both. pickle and DataLoader's collation need `bytes`."""


class Record(NamedTuple):
    """One view of one image, as it is stored."""

    key: str
    """Sample key: '/' allowed; no dots, no whitespace."""
    label: int
    """Class index."""
    view: str
    """The view record, JSON text in canonical form (sorted keys, no spaces): `canonical_json`; stored as it is."""
    digest: str
    """16 hex characters: digest of the view's uint8 pixels."""
    pixels: Payload
    """The encoded view (JPEG or PNG); empty when views are replayed."""
    features: Payload
    """A row of the feature codec."""
    logits: Payload
    """A record of the logit codec."""


class ShardId(NamedTuple):
    """Which shard this is; written into it, so that a shard under another's name is recognised."""

    group: int
    range_id: int
    view: int


class ShardSummary(NamedTuple):
    """What a shard writer has made."""

    files: dict[str, Written]
    """Files by name relative to the unit's folder."""
    payload: dict[str, int]
    """Bytes of records: pixels, features and target (label, view, digest, logits); all else is index."""


class ShardWriter(ABC):
    """Writes one shard, record by record, into a folder that nobody reads yet."""

    def __init__(self, folder: Path, shard: ShardId) -> None:
        self.folder, self.shard = folder, shard
        self.crcs: list[int] = []

    @abstractmethod
    def append(self, record: Record) -> None:
        """Add a record."""

    @abstractmethod
    def finish(self) -> ShardSummary:
        """Write what is left and begin with its way to the medium; the fsync of files and folders is the caller's."""

    @abstractmethod
    def abandon(self) -> None:
        """Close files; called after `finish` too."""


class ShardReader(ABC):
    """Reads records of one shard by row. Opening costs the index, not the payloads."""

    def __init__(self, folder: StoredPath, shard: ShardId, keys: list[str]) -> None:
        self.folder, self.shard, self.keys = folder, shard, keys

    @property
    @abstractmethod
    def crcs(self) -> NDArray[np.uint32]:
        """(n,) crc32c of every record, as the index has them."""

    @property
    @abstractmethod
    def where(self) -> StoredPath:
        """The shard, for error messages."""

    @abstractmethod
    def read(self, rows: NDArray[np.int64]) -> list[Record]:
        """Records of these rows, in this order, every checksum compared. UserError names shard and key."""

    def close(self) -> None:  # noqa: B027 - nothing to close is a valid implementation
        """Give files back."""

    def __del__(self) -> None:
        self.close()

    def check_crc(self, row: int, found: int) -> None:
        """UserError unless the crc32c of a record that was read is the one in the index."""
        stored = int(self.crcs[row])
        if found != stored:
            raise damaged("a record does not match its checksum", f"crc32c {found:08x}", f"{stored:08x}", self.where,
                          self.keys[row])  # fmt: skip


def shard_writer(backend: str, folder: Path, shard: ShardId) -> ShardWriter:
    """The writer of a backend; its module is imported now (zarr takes half a second)."""
    module = importlib.import_module(BACKENDS[check_backend(backend)])
    writer: ShardWriter = module.Writer(folder, shard)
    return writer


def shard_reader(backend: str, folder: StoredPath, shard: ShardId, keys: list[str]) -> ShardReader:
    """The reader of a backend for a shard with these keys."""
    reader: ShardReader = importlib.import_module(BACKENDS[check_backend(backend)]).Reader(folder, shard, keys)
    return reader


def check_backend(backend: str) -> str:
    """The name itself; UserError with the nearest ones when there is no such backend."""
    if backend not in BACKENDS:
        raise mistype("store", backend, BACKENDS, "STORE=, cache.backend, or backend in a manifest")
    return backend


def damaged(what: str, got: object, expected: object, where: object, key: str | None = None) -> UserError:
    """The error of stored bytes that are not what was written."""
    return UserError(
        f"damaged cache: {what}",
        got=got,
        expected=expected,
        where=where if key is None else f"{where}, sample {key!r}",
        fix="run `make repair CACHE=...`: it makes what is damaged again (`make verify CACHE=... DEEP=1` lists it)",
    )


def record_crc(record: Record) -> int:
    """The crc32c (Castagnoli) of a record: every field as length uint32 little-endian, then bytes; label as int64."""
    texts = record.key.encode(), record.view.encode(), record.digest.encode()
    return fields_crc(*texts, record.label, *map(crc_input, (record.pixels, record.features, record.logits)))


def fields_crc(key: bytes, view: bytes, digest: bytes, label: int, pixels: Any, features: Any, logits: Any) -> int:
    """`record_crc` of fields as a reader has them: texts as UTF-8, the rest as bytes or uint8 arrays."""
    head = b"%b%b%b%b%b%b%b" % (UINT32(len(key)), key, LABEL(8, label, len(view)), view, UINT32(len(digest)), digest,
                                UINT32(len(pixels)))  # fmt: skip
    crc = CRC(CRC(0, head), pixels)
    crc = CRC(CRC(crc, UINT32(len(features))), features)
    return CRC(CRC(crc, UINT32(len(logits))), logits)


def crc_input(data: Payload) -> Any:
    """What google_crc32c takes without a copy: it refuses memoryviews."""
    return data if isinstance(data, bytes) else np.frombuffer(data, np.uint8)


@functools.cache
def keep_freed_memory() -> None:
    """Let malloc keep what a batch of records gives back, for the next one: new pages cost four times the read.

    glibc keeps at the top of its heap twice the largest block that was ever freed, up to 64 MiB, and 128 KiB before the
    first one (mallopt(3), M_MMAP_THRESHOLD). The block is not touched. A process that trains has freed one anyway.
    """
    np.empty(31 << 20, np.uint8)


def check_key(key: str, where: object) -> str:
    """The key itself; UserError for one that could leave its folder or be cut in two by a tar reader."""
    parts = key.split("/")
    plain = key.isprintable() and not any(character.isspace() for character in key)
    if not plain or "" in parts or "." in key or "\\" in key or not 0 < len(key.encode()) <= MAX_KEY_BYTES:
        raise UserError(
            "bad sample key",
            got=repr(key[:200]),
            expected="names joined by '/', without dots, spaces, control characters or backslashes, at most 1 KiB",
            where=where,
            fix="rename the file that the key comes from",
        )
    return key
