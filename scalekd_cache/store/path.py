"""What readers need of a path, on disk or remote.

In: nothing. Out: a type that `pathlib.Path` and `remote.RemotePath` have in common.
Invariant: reading only; who writes takes a `Path`.
"""

from collections.abc import Sequence
from pathlib import PurePath
from typing import IO, Any, Literal, Protocol, Self


class Facts(Protocol):
    """What `stat` tells."""

    @property
    def st_size(self) -> int:
        """Length in bytes."""


class StoredPath(Protocol):
    """A file or folder of a cache."""

    @property
    def name(self) -> str:
        """Last part."""

    @property
    def parent(self) -> Self:
        """The folder it is in."""

    @property
    def parents(self) -> Sequence[Self]:
        """All folders it is in, the nearest first."""

    def __truediv__(self, name: str, /) -> Self:
        """A path inside."""

    def relative_to(self, root: Any, /) -> PurePath:
        """The path inside `root`."""

    def exists(self) -> bool:
        """Whether it is there."""

    def is_file(self) -> bool:
        """Whether it is a file."""

    def stat(self) -> Facts:
        """Facts of the file."""

    def read_bytes(self) -> bytes:
        """All of it."""

    def open(self, mode: Literal["rb"], buffering: Literal[0]) -> IO[bytes]:
        """To read bytes, without a buffer."""
