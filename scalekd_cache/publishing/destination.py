"""The contract of a place that a cache is published at.

In: files with their expected length and sha256. Out: the same files at the place.
Invariant: a file that does not have its expected sha256 is never sent.
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
"""URL schemes of places, each with an example."""
UNIT_NAME = re.compile(r"g\d{3,}-r\d{5,}")


class Sending(NamedTuple):
    """A file to publish."""

    name: str
    """Its path in the place."""
    path: Path
    """The local file."""
    fact: FileHash
    """Its expected length and sha256."""

    @property
    def unit(self) -> str:
        """The folder of its unit, relative to the place; empty for a file outside of units."""
        parts = self.name.split("/")
        ends = [at for at, part in enumerate(parts) if UNIT_NAME.fullmatch(part)]
        return "/".join(parts[: ends[0] + 1]) if ends else ""


class Found(NamedTuple):
    """A file at the place."""

    size: int
    """Bytes."""
    sha256: str | None = None
    """None where the place does not report it."""
    git_sha1: str | None = None
    """Of a small file at the hub."""

    def fits(self, fact: FileHash) -> bool:
        """Whether the file has this length, and this sha256 as far as the place reports one."""
        return self.size == fact.bytes and self.sha256 in (None, fact.sha256)

    def same_as(self, data: bytes) -> bool | None:
        """Whether the file has these bytes; None when the place does not report a hash."""
        if self.size != len(data):
            return False
        if self.sha256 is not None:
            return self.sha256 == hashlib.sha256(data).hexdigest()
        if self.git_sha1 is not None:
            git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
            return self.git_sha1 == git.hexdigest()
        return None


Parcel = Callable[[], AbstractContextManager[list[Sending]]]
"""Makes the files of a unit, in the order in which they are sent; temporary ones are removed at the end."""


class Destination(Protocol):
    """A place."""

    @property
    def shown(self) -> str:
        """The place, for messages and documents."""

    def listing(self) -> dict[str, Found]:
        """The files there, by their path in the place."""

    def read(self, name: str) -> bytes | None:
        """All bytes of a small file (at most `JSON_BYTES`); None when there is none."""

    def send_units(self, parcels: Sequence[Parcel], done: Callable[[int], None]) -> None:
        """Send units. The last file of a unit arrives last, or all of them together.

        Args:
            parcels: one for each unit.
            done: called with the bytes of every unit sent.
        """

    def send(self, files: Sequence[Sending]) -> None:
        """Send files in this order, or all of them together; existing files are replaced."""


def send_unit(place: Destination, parcel: Parcel, check_stop: Callable[[], None]) -> int:
    """Make and send one unit; returns its bytes. `check_stop` raises when another unit has failed."""
    check_stop()
    with parcel() as files:
        check_stop()
        place.send(files)
        return sum(file.fact.bytes for file in files)


def check_file(sending: Sending) -> None:
    """`UserError` unless the local file has its expected length and sha256."""
    try:
        found = hash_file(sending.path)
    except FileNotFoundError:
        raise damaged("a file is missing", "no file", sending.fact.sha256, sending.path) from None
    if found != sending.fact:
        got, expected = (f"{fact.bytes:,} bytes, sha256 {fact.sha256}" for fact in (found, sending.fact))
        raise damaged("a file is not the one that was committed", got, expected, sending.path)
