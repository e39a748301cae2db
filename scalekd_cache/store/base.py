"""The contract between a cache and its file formats: records, their checksum, shard writers and shard readers.

In: records for one view of a contiguous range of images. Out: one shard, in a backend's format.
Invariant: both backends store the same records, and each record has a CRC-32C over everything that a reader uses. A
reader returns exactly these records or raises an error; it never returns zeros or fewer records.
"""

import enum
import functools
import importlib
import re
import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from scalekd_cache.errors import UserError, counted, unknown_name
from scalekd_cache.store.checked_files import REPAIR, repair_command
from scalekd_cache.store.durable_files import Written
from scalekd_cache.store.path import StoredPath

FORMAT_VERSION = 2
MAX_UNIT_SAMPLES = 65_536
"""Maximum number of records in a shard; a file that claims more is rejected before any allocation."""
MAX_VIEWS = 10_000
MAX_RECORD_BYTES = 1 << 28
"""Maximum number of bytes per record; an index that claims more is rejected before any allocation."""
MAX_KEY_BYTES = 1024
RUN_BYTES = 1 << 20
"""Adjacent records are read in one call up to this size; larger reads do not fit in the CPU cache and were slower."""
CRC: Callable[[int, Any], int] = google_crc32c.extend
UINT32 = struct.Struct("<I").pack
INT64 = struct.Struct("<q").pack
NO_LABEL = -1
"""The label value of a record that has no label."""

BACKENDS = {"webdataset": "scalekd_cache.store.formats.webdataset", "zarr": "scalekd_cache.store.formats.zarr"}


Payload = bytes | memoryview
"""Bytes in a record. A reader returns read-only memoryviews into one buffer per call; the buffer lives as long as any
of its memoryviews. `np.frombuffer`, `b"".join` and `io.BytesIO` accept bytes and memoryviews; pickle and DataLoader's
collation need `bytes`.
"""


class Parts(enum.IntFlag):
    """The optional parts of a record, as flags. They are stored with the record; readers reject unknown flags."""

    LABEL = 1
    FEATURES = 2
    LOGITS = 4
    SECOND = 8


class Record(NamedTuple):
    """One view of one image, as stored. Every part except key, view and digest is optional."""

    key: str
    """Sample key: '/' allowed; no dots, no whitespace."""
    label: int
    """Class index; `NO_LABEL` if there is none."""
    view: str
    """View parameters as canonical JSON (sorted keys, no spaces; `canonical_json`), which is stored unchanged."""
    digest: str
    """16 hex characters: digest of the view's uint8 pixels."""
    pixels: Payload
    """The encoded view (JPEG, WebP or PNG); empty when views are replayed."""
    features: Payload
    """A feature codec row; empty if there is none."""
    logits: Payload
    """A logit codec record; empty if there is none."""
    second: Payload = b""
    """A `second_codec` row for a second feature target; empty if there is none."""

    @property
    def parts(self) -> Parts:
        """The parts that this record has."""
        there = (self.label != NO_LABEL, len(self.features), len(self.logits), len(self.second))
        return Parts(sum(part for part, is_there in zip(Parts, there, strict=True) if is_there))


def stores_features(rows: NDArray[np.int64], view: int, every: int) -> NDArray[np.bool_]:
    """Which rows of a shard have features, (n,) bool.

    Every block of `every` rows has one row with features, so a shard has an exact number of them. The row's position in
    the block moves by one from view to view, so `every` consecutive views in a group hold each image's features once.
    It also moves from block to block, so even if classes alternate in the dataset, every view has features for all
    classes.
    """
    selected: NDArray[np.bool_] = (rows + rows // every + view) % every == 0
    return selected


def wrong_share(record: Record, there: bool) -> tuple[str, str, str] | None:
    """The problem, got and expected, if a record lacks features that it should have according to `stores_features`
    (`there`), or has features that it should not have."""
    if (len(record.features) > 0) is there:
        return None
    got, expected = (
        ("none", "features")
        if there
        else (counted(len(record.features), "byte"), "none; they are stored for other views")
    )
    return "features are stored for the wrong views of an image (see stored_features)", got, expected


class ShardId(NamedTuple):
    """Identifies a shard; stored inside the shard, so that a misnamed shard is detected."""

    group: int
    range_id: int
    view: int


class ShardSummary(NamedTuple):
    """The files of a finished shard."""

    files: dict[str, Written]
    """The files, keyed by name relative to the unit's folder."""
    payload: dict[str, int]
    """Record bytes by kind: pixels, features and target (label, view, digest, logits); the rest is index."""


class ShardWriter(ABC):
    """Writes one shard, record by record, into an unpublished folder."""

    def __init__(self, folder: Path, shard: ShardId) -> None:
        self.folder, self.shard = folder, shard
        self.crcs: list[int] = []

    @abstractmethod
    def append(self, record: Record) -> None:
        """Add a record."""

    @abstractmethod
    def finish(self) -> ShardSummary:
        """Write remaining data and start writeback to disk; the caller fsyncs files and folders."""

    @abstractmethod
    def abort(self) -> None:
        """Close files without finishing; safe to call after `finish`."""


class ShardReader(ABC):
    """Reads records from one shard by row. Opening it reads only the index."""

    def __init__(self, folder: StoredPath, shard: ShardId, keys: list[str]) -> None:
        self.folder, self.shard, self.keys = folder, shard, keys

    @property
    @abstractmethod
    def crcs(self) -> NDArray[np.uint32]:
        """(n,) uint32: each record's CRC-32C, from the index."""

    @property
    @abstractmethod
    def where(self) -> StoredPath:
        """The shard, for error messages."""

    @abstractmethod
    def read(self, rows: NDArray[np.int64]) -> list[Record]:
        """The records in these rows, in this order, with verified checksums. A `UserError` names the shard and key."""

    @abstractmethod
    def read_without_pixels(self, rows: NDArray[np.int64]) -> list[Record]:
        """The records in these rows with empty pixels, from a shard without pixels. They are not verified, because the
        checksums cover the pixels."""

    @abstractmethod
    def target_bytes(self, record: Record) -> int:
        """Number of bytes that a record's label, view and digest occupy on disk."""

    def payload(self, rows: NDArray[np.int64]) -> dict[str, int]:
        """Payload bytes of these rows, as the writer counts them (`ShardSummary.payload`)."""
        records = self.read(rows)
        return {
            "pixels": sum(len(record.pixels) for record in records),
            "features": sum(len(record.features) + len(record.second) for record in records),
            "target": sum(self.target_bytes(record) + len(record.logits) for record in records),
        }

    def close(self) -> None:  # noqa: B027 - a reader without open files needs no code here
        """Close files."""

    def __del__(self, exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not exiting():  # modules that `close` uses are gone; the OS closes the files
            self.close()

    def check_crc(self, row: int, found: int) -> None:
        """Raise `UserError` unless a record's CRC-32C matches the one in the index."""
        stored = int(self.crcs[row])
        if found != stored:
            raise damaged(
                "the record does not match its checksum",
                f"crc32c {found:08x}",
                f"{stored:08x}",
                self.where,
                self.keys[row],
            )


def shard_writer(backend: str, folder: Path, shard: ShardId) -> ShardWriter:
    """The writer for a backend, whose module is imported here."""
    module = importlib.import_module(BACKENDS[check_backend(backend)])
    writer: ShardWriter = module.Writer(folder, shard)
    return writer


def shard_reader(backend: str, folder: StoredPath, shard: ShardId, keys: list[str]) -> ShardReader:
    """A backend's reader for a shard with these keys."""
    reader: ShardReader = importlib.import_module(BACKENDS[check_backend(backend)]).Reader(folder, shard, keys)
    return reader


def check_backend(backend: str) -> str:
    """Return the name; for an unknown backend, raise `UserError` with the closest names."""
    if backend not in BACKENDS:
        raise unknown_name("store", backend, BACKENDS, "--store, cache.backend, or backend in a manifest")
    return backend


def repair_fix(where: object) -> str:
    """How to repair damage here. The command names the cache if its folder can be derived from `where`."""
    return repair_command(where) or REPAIR


def damaged(what: str, got: object, expected: object, where: object, key: str | None = None) -> UserError:
    """The error for stored bytes that differ from what was written."""
    return UserError(
        f"damaged cache: {what}",
        got=got,
        expected=expected,
        where=where if key is None else f"{where}, sample {key!r}",
        fix=repair_fix(where),
    )


def damaged_record(error: ValueError, where: object, key: str) -> UserError:
    """The error for a record that `parse_target_json` or `check_parts` rejects."""
    what = "a record's JSON is invalid or does not match the record"
    return damaged(what, error, "valid JSON that matches the record", where, key)


def check_version(fields: Mapping[str, Any], path: StoredPath, name: str = "format_version") -> None:
    """Raise `UserError` if the file has a different format version, since its other fields may mean something else."""
    if fields.get(name) != FORMAT_VERSION:
        raise UserError(
            "this version of scalekd-cache does not support the cache's format version",
            got=repr(fields.get(name))[:100],
            expected=FORMAT_VERSION,
            where=path,
            fix="use the version of scalekd-cache that wrote the cache",
        )


class Target(NamedTuple):
    """The fields of a record's JSON."""

    digest: bytes
    view: bytes
    parts: Parts
    label: int
    features_bytes: int
    second_bytes: int


TARGET = re.compile(
    rb'\{"digest":"([^"]*)"(?:,"features_bytes":(\d{1,10}))?,"flags":(\d{1,10})(?:,"label":(-?\d{1,19}))?'
    rb'(?:,"second_bytes":(\d{1,10}))?,"view":(.*)\}',
    re.DOTALL,
)


def target_json(record: Record, *, places: bool) -> bytes:
    """A record's JSON in canonical form: the view is canonical JSON and the names are sorted.

    Args:
        record: the record.
        places: include the label and the length of the features (for a backend that does not store them elsewhere).
    """
    parts = record.parts
    text = f'{{"digest":"{record.digest}"'
    text += f',"features_bytes":{len(record.features)}' if places else ""
    text += f',"flags":{int(parts)}'
    text += f',"label":{record.label}' if places and Parts.LABEL in parts else ""
    text += f',"second_bytes":{len(record.second)}' if Parts.SECOND in parts else ""
    return f'{text},"view":{record.view}}}'.encode()


def parse_target_json(text: bytes, where: object) -> Target:
    """The inverse of `target_json`. Uses a regular expression, because a JSON parser takes four times as long.

    Raises:
        UserError: the record has unknown flags.
        ValueError: this is not a record's JSON.
    """
    match = TARGET.fullmatch(text)
    if match is None:
        raise ValueError(f"invalid record JSON: {text[:100]!r}")
    digest, features, flags, label, second, view = match.groups()
    if int(flags) > sum(Parts):
        raise UserError(
            "a record has parts that this version does not support",
            got=f"flags {int(flags)}",
            expected=f"at most {sum(Parts)}",
            where=where,
            fix="use the version of scalekd-cache that wrote the cache",
        )
    return Target(
        digest, view, Parts(int(flags)), NO_LABEL if label is None else int(label), int(features or 0), int(second or 0)
    )


def check_parts(record: Record, parts: Parts) -> Record:
    """Return the record; raise ValueError unless its parts match its flags."""
    if record.parts != parts:
        raise ValueError(f"the record has flags {int(parts)}, but its parts require flags {int(record.parts)}")
    return record


def record_crc(record: Record) -> int:
    """A record's CRC-32C (Castagnoli) over key, label (int64), view, digest, pixels, features, second and logits, each
    as its length (uint32, little-endian; 0 if absent) followed by its bytes. `second` is included only if present."""
    texts = record.key.encode(), record.view.encode(), record.digest.encode()
    rest = (record.pixels, record.features, record.second, record.logits)
    return fields_crc(*texts, record.label, *map(crc_input, rest))


def fields_crc(
    key: bytes, view: bytes, digest: bytes, label: int, pixels: Any, features: Any, second: Any, logits: Any
) -> int:
    """`record_crc` from separate fields: text is UTF-8, and the rest is bytes or uint8 arrays."""
    packed = b"" if label == NO_LABEL else INT64(label)
    head = b"".join(map(_with_length, (key, packed, view, digest))) + UINT32(len(pixels))
    crc = CRC(CRC(0, head), pixels)
    for data in (features, *([second] if len(second) else []), logits):
        crc = CRC(CRC(crc, UINT32(len(data))), data)
    return crc


def _with_length(data: bytes) -> bytes:
    return UINT32(len(data)) + data


def crc_input(data: Payload) -> Any:
    """The data in a form that google_crc32c, which rejects memoryviews, accepts without a copy."""
    return data if isinstance(data, bytes) else np.frombuffer(data, np.uint8)


def pixels_suffix(pixels: Payload) -> str:
    """The file name suffix for these encoded pixels."""
    start = bytes(pixels[:4])
    return ".png" if start == b"\x89PNG" else ".webp" if start == b"RIFF" else ".jpg"


@functools.cache
def keep_freed_memory() -> None:
    """Make malloc keep a batch's freed memory for the next batch: new pages cost four times as much as the read.

    glibc keeps up to twice the size of the largest block ever freed (at most 64 MiB; 128 KiB before the first one; see
    mallopt(3), M_MMAP_THRESHOLD). The block allocated here is never touched.
    """
    np.empty(31 << 20, np.uint8)


def check_key(key: str, where: object) -> str:
    """Return the key; raise `UserError` if it could point outside its folder or a tar reader would split it."""
    parts = key.split("/")
    plain = key.isprintable() and not any(character.isspace() for character in key)
    if not plain or "" in parts or "." in key or "\\" in key or not 0 < len(key.encode()) <= MAX_KEY_BYTES:
        raise UserError(
            "invalid sample key",
            got=repr(key[:200]),
            expected="names joined by '/', at most 1 KiB, without dots, spaces, control characters or backslashes",
            where=where,
            fix="rename the file that the key comes from",
        )
    return key
