"""The path interface that readers use for local and remote caches.

In: nothing. Out: a protocol that `pathlib.Path` and `RemotePath` implement.
Invariant: read-only; writers take a `Path`.
"""

import os
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import IO, Any, Literal, Protocol, Self


class FileStat(Protocol):
    """The fields of a stat result that readers use."""

    @property
    def st_size(self) -> int:
        """Length in bytes."""


class StoredPath(Protocol):
    """A file or folder in a cache."""

    @property
    def name(self) -> str:
        """Last part."""

    @property
    def parent(self) -> Self:
        """The parent folder."""

    @property
    def parents(self) -> Sequence[Self]:
        """All parent folders, nearest first."""

    def __truediv__(self, name: str, /) -> Self:
        """A path inside this folder."""

    def relative_to(self, root: Any, /) -> PurePath:
        """The path inside `root`."""

    def exists(self) -> bool:
        """Whether it exists."""

    def is_file(self) -> bool:
        """Whether it is a file."""

    def stat(self) -> FileStat:
        """Size of the file."""

    def read_bytes(self) -> bytes:
        """The whole file."""

    def open(self, mode: Literal["rb"], buffering: Literal[0]) -> IO[bytes]:
        """Open for unbuffered reading."""


def absolute(path: StoredPath) -> StoredPath:
    """The path without `.`, `..` and links, so that it has a name. Remote paths are returned unchanged."""
    return Path(os.path.realpath(path)) if isinstance(path, Path) else path
