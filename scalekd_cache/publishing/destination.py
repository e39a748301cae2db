"""The interface of a destination that a cache is published to.

In: files with their expected length and sha256. Out: the same files at the destination.
Invariant: a file whose sha256 is not the expected one is never sent.
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
    """Expected length and sha256."""

    @property
    def unit(self) -> str:
        """Folder of the file's unit, relative to the destination; empty for files outside units."""
        parts = self.name.split("/")
        ends = [at for at, part in enumerate(parts) if UNIT_NAME.fullmatch(part)]
        return "/".join(parts[: ends[0] + 1]) if ends else ""


class Found(NamedTuple):
    """A file at the destination."""

    size: int
    """Bytes."""
    sha256: str | None = None
    """None if the destination does not report it."""
    git_sha1: str | None = None
    """Reported by the hub for small files."""

    def fits(self, fact: FileHash) -> bool:
        """Whether the file has this length and, if the destination reports a sha256, this sha256."""
        return self.size == fact.bytes and self.sha256 in (None, fact.sha256)

    def same_as(self, data: bytes) -> bool | None:
        """Whether the file has these bytes; None if the destination reports no hash."""
        if self.size != len(data):
            return False
        if self.sha256 is not None:
            return self.sha256 == hashlib.sha256(data).hexdigest()
        if self.git_sha1 is not None:
            git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
            return self.git_sha1 == git.hexdigest()
        return None


Parcel = Callable[[], AbstractContextManager[list[Sending]]]
"""Creates the files of a unit in the order in which they are sent. Temporary files are removed at the end."""


class Destination(Protocol):
    """A place."""

    @property
    def shown(self) -> str:
        """The destination as shown in messages and documents."""

    def locked(self) -> AbstractContextManager[None]:
        """Hold the place for one publication, where it has locks. UserError when another process holds it."""

    def listing(self) -> dict[str, Found]:
        """The existing files, by path relative to the destination."""

    def read(self, name: str) -> bytes | None:
        """All bytes of a small file (at most `JSON_BYTES`); None if it does not exist."""

    def send_units(self, parcels: Sequence[Parcel], done: Callable[[int], None]) -> None:
        """Send units. The last file of a unit arrives last, or all its files arrive together.

        Args:
            parcels: one per unit.
            done: called with the bytes of each unit sent.
        """

    def send(self, files: Sequence[Sending]) -> None:
        """Send files in this order, or all together. Existing files are replaced."""


def send_unit(place: Destination, parcel: Parcel, check_stop: Callable[[], None]) -> int:
    """Create and send one unit; returns its bytes. `check_stop` raises if another unit has failed."""
    check_stop()
    with parcel() as files:
        check_stop()
        place.send(files)
        return sum(file.fact.bytes for file in files)


def check_file(sending: Sending) -> None:
    """Raise `UserError` unless the local file has the expected length and sha256."""
    try:
        found = hash_file(sending.path)
    except FileNotFoundError:
        raise damaged("a file is missing", "no file", sending.fact.sha256, sending.path) from None
    if found != sending.fact:
        got, expected = (f"{fact.bytes:,} bytes, sha256 {fact.sha256}" for fact in (found, sending.fact))
        raise damaged("a file has changed since it was committed", got, expected, sending.path)
