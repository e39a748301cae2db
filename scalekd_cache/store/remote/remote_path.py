"""A cache at a URL: paths whose files are read from verified local copies.

In: a folder or a URL. Out: a `Path`, or a `RemotePath` with the part of the `Path` interface that readers use.
Invariant: except for the manifest, a file is downloaded only if its SHA-256 is known: the manifest lists the sidecars
and the tail, and each sidecar lists the files in its unit. A file that does not match never becomes a local copy, so
readers get verified bytes or an error.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from scalekd_cache.config.remote import RemoteConfig, copies_folder, copies_limit
from scalekd_cache.errors import UserError
from scalekd_cache.store.checked_files import JSON_BYTES, open_regular
from scalekd_cache.store.durable_files import hash_file
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.remote.local_copies import LocalCopies
from scalekd_cache.store.remote.url_transfer import (
    RemoteNotFoundError,
    TransferError,
    copy_file,
    download,
    is_url,
    remote_size,
    without_password,
)

COPY_AGAIN = "the cache that contains this file is damaged or incomplete: copy or publish it again"
UNPINNED_BYTES = JSON_BYTES
"""Maximum size of the manifest. Its SHA-256 is not known in advance, so it is downloaded each time the cache is opened
and not kept."""


class Pin(NamedTuple):
    """A file's expected SHA-256 and length."""

    sha256: str
    bytes: int | None
    """None if unknown."""


class FileStat(NamedTuple):
    """The fields of a stat result that readers use."""

    st_size: int


class RemoteCache:
    """A remote cache: its URL, the local copies, and the expected hashes of its files."""

    def __init__(self, url: str, copies: LocalCopies, config: RemoteConfig) -> None:
        self.url, self.copies, self.config = url.rstrip("/"), copies, config
        self.pins: dict[str, Pin] = {}
        self.renewed: set[str] | None = None
        """SHA-256 of the files that a check has downloaded again; if None, existing local copies are used."""


@dataclass(frozen=True)
class RemotePath:
    """A file or folder in a remote cache."""

    place: RemoteCache
    inside: PurePosixPath

    @property
    def url(self) -> str:
        """The URL."""
        return f"{self.place.url}/{self.inside}" if self.inside.parts else self.place.url

    def __str__(self) -> str:
        return without_password(self.url)

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.place, self.inside / name)

    @property
    def name(self) -> str:
        """Last part; for the root, that of its URL."""
        return self.inside.name or PurePosixPath(urlsplit(self.place.url).path).name

    @property
    def parent(self) -> "RemotePath":
        """The parent folder."""
        return RemotePath(self.place, self.inside.parent)

    @property
    def parents(self) -> list["RemotePath"]:
        """All parent folders, from the nearest to the cache's root."""
        return [RemotePath(self.place, parent) for parent in self.inside.parents]

    def relative_to(self, root: Any) -> PurePosixPath:
        """The path inside `root`, a folder in the same cache."""
        return self.inside.relative_to(root.inside)

    def exists(self) -> bool:
        """Whether the server has this file."""
        try:
            self.size()
        except RemoteNotFoundError:
            return False
        return True

    def is_file(self) -> bool:
        """Same as `exists`: servers have only files."""
        return self.exists()

    def size(self) -> int | None:
        """The length that the server reports, without downloading the file; None if the server reports none."""
        return remote_size(self.url, self.place.config)

    def stat(self) -> "FileStat":
        """Size of the verified copy; for the manifest, the size that the server reports."""
        if self._pin() is None:
            return FileStat(self.size() or 0)
        with self.open() as file:
            return FileStat(os.fstat(file.fileno()).st_size)

    def open(self, mode: str = "rb", buffering: int = -1) -> IO[bytes]:
        """Open the verified copy for reading bytes."""
        assert mode == "rb", mode
        return os.fdopen(self.descriptor(), mode, buffering)

    def read_bytes(self) -> bytes:
        """The contents of a small file. It is hashed on every read, because sidecars, keys and indexes have no other
        check."""
        if self._pin() is None:
            return self._read_unpinned()
        for _ in range(2):
            with self.open() as file:
                data = file.read()
            if not self.discard_damaged(hashlib.sha256(data).hexdigest()):
                return data
        raise UserError(
            "a local copy does not match the file that was just downloaded",
            where=self._copy(),
            fix="check this machine's disk and memory",
        )

    def descriptor(self) -> int:
        """A descriptor of the verified copy, downloaded if needed; the caller closes it."""
        pin = self._pin()
        if pin is None:
            raise FileNotFoundError(f"{self} is not part of the cache")
        renewed = self.place.renewed
        if renewed is not None and pin.sha256 not in renewed:
            self.place.copies.discard(pin.sha256)
            renewed.add(pin.sha256)
        return self.place.copies.open(pin.sha256, pin.bytes, self._fetch)

    def local(self) -> Path:
        """The path of the verified copy, for libraries that need a path. It is hashed again, because they verify
        nothing."""
        with self.open("rb", 0) as file:
            self.discard_damaged(hashlib.file_digest(file, "sha256").hexdigest())  # type: ignore[arg-type]
        os.close(self.descriptor())
        return self._copy()

    def discard_damaged(self, sha256: str | None = None) -> bool:
        """Remove the copy if its SHA-256 (given or computed here) is wrong; return whether it was removed."""
        pin = self._pin()
        if pin is None:
            return False
        if sha256 is None:
            try:
                sha256 = hash_file(self._copy()).sha256
            except FileNotFoundError:
                return False
        if sha256 == pin.sha256:
            return False
        self.place.copies.discard(pin.sha256)
        return True

    def _pin(self) -> Pin | None:
        return self.place.pins.get(str(self.inside))

    def _copy(self) -> Path:
        pin = self._pin()
        assert pin is not None, self.inside
        return self.place.copies.path(pin.sha256)

    def _fetch(self, target: Path) -> None:
        pin = self._pin()
        assert pin is not None, self.inside
        fetch(self, target, pin, self.place.copies.limit_bytes)

    def _read_unpinned(self) -> bytes:
        with tempfile.TemporaryDirectory(prefix="scalekd-cache-") as folder:
            target = Path(folder) / "file"
            download(self.url, target, UNPINNED_BYTES, self.place.config, None)
            return target.read_bytes()


def open_place(place: Path | str | RemotePath, config: RemoteConfig | None = None) -> Path | RemotePath:
    """The path of a cache, from its folder or URL.

    Raises:
        UserError: the URL scheme is not file, http, https, s3 or gs.
    """
    if not isinstance(place, str):
        return place
    if not is_url(place):
        return Path(place)
    url = urlsplit(place)
    if url.scheme == "file":
        return Path(unquote(url.path))
    config = config or RemoteConfig()
    copies = LocalCopies(copies_folder(config), copies_limit(config))
    return RemotePath(RemoteCache(place, copies, config), PurePosixPath())


def open_uncached(place: Path | str | RemotePath) -> Path | RemotePath:
    """Like `open_place`, but downloads every file again once, to check the server's files."""
    root = open_place(place)
    if isinstance(root, RemotePath):
        root = RemotePath(RemoteCache(root.place.url, root.place.copies, root.place.config), PurePosixPath())
        root.place.renewed = set()
    return root


def fetch(
    path: Path | RemotePath, target: Path, pin: Pin, limit_bytes: int, received: Callable[[int], None] | None = None
) -> None:
    """Write a cache file to `target`, which is replaced, and check that its length and SHA-256 are as expected.

    Args:
        path: the file.
        target: where the file is written.
        pin: its expected SHA-256 and length.
        limit_bytes: maximum size if the length is unknown.
        received: called with the number of bytes in each piece; an exception ends the transfer.

    Raises:
        UserError: the file cannot be read, or it does not match `pin`.
    """

    def check() -> None:
        found = hash_file(target)
        if pin.bytes is not None and found.bytes != pin.bytes:
            raise TransferError(f"received {found.bytes:,} bytes, expected {pin.bytes:,}")
        if found.sha256 != pin.sha256:
            raise TransferError(f"received sha256 {found.sha256}, expected {pin.sha256}")

    limit = limit_bytes if pin.bytes is None else pin.bytes
    if isinstance(path, RemotePath):
        download(path.url, target, limit, path.place.config, check, received)
        return
    try:
        copy_file(path, target, limit, received)
        check()
    except FileNotFoundError as error:
        raise UserError("a cache file is missing", where=path, fix=COPY_AGAIN) from error
    except TransferError as error:
        raise UserError("a file does not match the cache's manifest", got=error, where=path, fix=COPY_AGAIN) from error


def pin_files(folder: StoredPath, pins: Mapping[str, tuple[int | None, str]]) -> None:
    """Set the expected {name: (bytes, sha256)} of files in a remote folder. Has no effect on a local folder."""
    if isinstance(folder, RemotePath):
        folder.place.pins.update(
            {str(folder.inside / name): Pin(sha256, size) for name, (size, sha256) in pins.items()}
        )


def discard_damaged(folder: StoredPath, start: str) -> bool:
    """Remove damaged local copies of files in a remote folder; return whether there were any."""
    if not isinstance(folder, RemotePath):
        return False
    names = [name for name in folder.place.pins if name.startswith(f"{folder.inside}/{start}")]
    return sum(RemotePath(folder.place, PurePosixPath(name)).discard_damaged() for name in names) > 0


def descriptor_of(path: StoredPath) -> int:
    """Open a file for reading and return its descriptor. Raises `FileNotFoundError` if the cache has no such file, and
    `UserError` as `open_regular` does."""
    return path.descriptor() if isinstance(path, RemotePath) else open_regular(str(path))


def size_of(path: StoredPath) -> int | None:
    """Length of a local or remote regular file, without reading it; None if the server does not report it.

    Raises:
        FileNotFoundError: it does not exist.
        UserError: it cannot be opened or is not a regular file.
    """
    if not isinstance(path, RemotePath):
        descriptor = open_regular(str(path))
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
    try:
        return path.size()
    except RemoteNotFoundError as error:
        raise FileNotFoundError(str(path)) from error


def local_path(path: StoredPath) -> Path:
    """The path of a local file with the verified bytes."""
    return path.local() if isinstance(path, RemotePath) else Path(str(path))
