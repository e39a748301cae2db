"""The interface for publishing destinations.

In: files with expected lengths and SHA-256 hashes. Out: the same files at the destination.
Invariant: a file whose SHA-256 differs from the expected one is never sent.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

from scalekd_cache.store.base import damaged
from scalekd_cache.store.durable_files import FileHash, hash_file

KINDS = {"hf": "hf://datasets/USER/NAME", "s3": "s3://bucket/folder", "gs": "gs://bucket/folder"}
"""Supported URL schemes, each with an example."""
UNIT_NAME = re.compile(r"g\d{3,}-r\d{5,}")


class Sending(NamedTuple):
    """A file to publish."""

    name: str
    """Path relative to the destination."""
    path: Path
    """The local file."""
    fact: FileHash
    """Expected length and SHA-256."""

    @property
    def unit(self) -> str:
        """The file's unit folder, relative to the destination; empty for files outside units."""
        parts = self.name.split("/")
        ends = [at for at, part in enumerate(parts) if UNIT_NAME.fullmatch(part)]
        return "/".join(parts[: ends[0] + 1]) if ends else ""


class Found(NamedTuple):
    """A file at the destination."""

    size: int
    """Size in bytes."""
    sha256: str | None = None
    """None if the destination does not report it."""
    git_sha1: str | None = None
    """The Git hash, which the hub reports for small files."""

    def fits(self, fact: FileHash) -> bool:
        """Whether the file has this length and, if the destination reports a SHA-256, this SHA-256."""
        return self.size == fact.bytes and self.sha256 in (None, fact.sha256)

    def same_as(self, data: bytes) -> bool | None:
        """Whether the file has this content; None if the destination reports no hash."""
        if self.size != len(data):
            return False
        if self.sha256 is not None:
            return self.sha256 == hashlib.sha256(data).hexdigest()
        if self.git_sha1 is not None:
            git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
            return self.git_sha1 == git.hexdigest()
        return None


Parcel = Callable[[], AbstractContextManager[list[Sending]]]
"""Creates a unit's files in the order they are sent. Temporary files are removed at the end."""


class Destination(Protocol):
    """A place to which a cache can be published."""

    @property
    def shown(self) -> str:
        """The destination as shown in messages and documents."""

    def locked(self) -> AbstractContextManager[None]:
        """Lock the destination for one publication, if it supports locks. Raises `UserError` if another process holds
        the lock."""

    def listing(self) -> dict[str, Found]:
        """The existing files, keyed by path relative to the destination."""

    def read(self, name: str) -> bytes | None:
        """The contents of a small file (at most `JSON_BYTES`); None if it does not exist."""

    def send_units(self, parcels: Sequence[Parcel], done: Callable[[int], None]) -> None:
        """Send units. A unit's last file becomes visible last, or all its files become visible at once.

        Args:
            parcels: one per unit.
            done: called with the size in bytes of each unit sent.
        """

    def send(self, files: Sequence[Sending]) -> None:
        """Send files in this order, or all together. Existing files are replaced."""


def send_unit(place: Destination, parcel: Parcel, check_stop: Callable[[], None]) -> int:
    """Create and send one unit; return its size in bytes. `check_stop` raises if another unit has failed."""
    check_stop()
    with parcel() as files:
        check_stop()
        place.send(files)
        return sum(file.fact.bytes for file in files)


def check_file(sending: Sending) -> None:
    """Raise `UserError` unless the local file has the expected length and SHA-256."""
    try:
        found = hash_file(sending.path)
    except FileNotFoundError:
        raise damaged("a file is missing", "no file", sending.fact.sha256, sending.path) from None
    if found != sending.fact:
        got, expected = (f"{fact.bytes:,} bytes, sha256 {fact.sha256}" for fact in (found, sending.fact))
        raise damaged("a file has changed since it was committed", got, expected, sending.path)
