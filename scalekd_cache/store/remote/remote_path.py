"""A cache behind a URL: paths whose files are read from verified local copies.

In: a folder or a URL. Out: a `Path`, or a `RemotePath` with as much of its interface as readers use.
Invariant: but for the manifest, a file is fetched only when its sha256 is known: the manifest has those of the sidecars
and the tail, a sidecar those of its unit. What does not match never becomes a copy, so readers see right bytes or an
error.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from scalekd_cache.config.remote import RemoteConfig, copies_folder, copies_limit
from scalekd_cache.errors import UserError
from scalekd_cache.store.checked_files import JSON_BYTES, open_regular
from scalekd_cache.store.durable_files import fact_of
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.remote.local_copies import Copies
from scalekd_cache.store.remote.transfer import NotThereError, TransferError, download, is_url, remote_size, shown

UNPINNED_BYTES = JSON_BYTES
"""Longest manifest; its sha256 is not known beforehand, so it is fetched at every opening and never kept."""


class Pin(NamedTuple):
    """What a file must be."""

    sha256: str
    bytes: int | None
    """None: not known."""


class Facts(NamedTuple):
    """What `stat` tells."""

    st_size: int


class Remote:
    """A remote cache: its URL, the local copies, and what is known of its files."""

    def __init__(self, url: str, copies: Copies, config: RemoteConfig) -> None:
        self.url, self.copies, self.config = url.rstrip("/"), copies, config
        self.pins: dict[str, Pin] = {}
        self.renewed: set[str] | None = None
        """sha256 of files that a check of the server has fetched; None: copies made before will do as well."""


@dataclass(frozen=True)
class RemotePath:
    """A file or folder of a remote cache."""

    place: Remote
    inside: PurePosixPath

    @property
    def url(self) -> str:
        """Where it is."""
        return f"{self.place.url}/{self.inside}" if self.inside.parts else self.place.url

    def __str__(self) -> str:
        return shown(self.url)

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.place, self.inside / name)

    @property
    def name(self) -> str:
        """Last part."""
        return self.inside.name

    @property
    def parent(self) -> "RemotePath":
        """The folder it is in."""
        return RemotePath(self.place, self.inside.parent)

    @property
    def parents(self) -> list["RemotePath"]:
        """All folders it is in, from the nearest to the cache's own."""
        return [RemotePath(self.place, parent) for parent in self.inside.parents]

    def relative_to(self, root: Any) -> PurePosixPath:
        """The path inside `root`, a folder of the same cache."""
        return self.inside.relative_to(root.inside)

    def exists(self) -> bool:
        """Whether the server has it."""
        try:
            self.size()
        except NotThereError:
            return False
        return True

    def is_file(self) -> bool:
        """As `exists`: servers have files only."""
        return self.exists()

    def size(self) -> int | None:
        """Its length as the server gives it, without fetching; None when the server gives none."""
        return remote_size(self.url, self.place.config)

    def stat(self) -> "Facts":
        """Of the verified copy; of the manifest what the server tells."""
        if self._pin() is None:
            return Facts(self.size() or 0)
        with self.open() as file:
            return Facts(os.fstat(file.fileno()).st_size)

    def open(self, mode: str = "rb", buffering: int = -1) -> IO[bytes]:
        """The verified copy, for reading bytes."""
        assert mode == "rb", mode
        return os.fdopen(self.descriptor(), mode, buffering)

    def read_bytes(self) -> bytes:
        """All of a small file, hashed at every reading: sidecars, keys and indexes have no other check."""
        if self._pin() is None:
            return self._read_unpinned()
        for _ in range(2):
            with self.open() as file:
                data = file.read()
            if not self.discard_damaged(hashlib.sha256(data).hexdigest()):
                return data
        raise UserError(
            "a local copy differs from what has just arrived", where=self._copy(), fix="check this disk and memory"
        )

    def descriptor(self) -> int:
        """A descriptor of the verified copy, fetched when it is not there; the caller closes it."""
        pin = self._pin()
        if pin is None:
            raise FileNotFoundError(f"{self} is not part of the cache")
        renewed = self.place.renewed
        if renewed is not None and pin.sha256 not in renewed:
            self.place.copies.discard(pin.sha256)
            renewed.add(pin.sha256)
        return self.place.copies.open(pin.sha256, pin.bytes, self._fetch)

    def local(self) -> Path:
        """The verified copy's path, for libraries that want one; hashed again, since they check nothing."""
        with self.open("rb", 0) as file:
            self.discard_damaged(hashlib.file_digest(file, "sha256").hexdigest())  # type: ignore[arg-type]
        os.close(self.descriptor())
        return self._copy()

    def discard_damaged(self, sha256: str | None = None) -> bool:
        """Remove the copy when its sha256 (given, or computed here) is another one; whether it was removed."""
        pin = self._pin()
        if pin is None:
            return False
        if sha256 is None:
            try:
                sha256 = fact_of(self._copy()).sha256
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

        def check() -> None:
            found = fact_of(target)
            if pin.bytes is not None and found.bytes != pin.bytes:
                raise TransferError(f"{found.bytes:,} bytes arrived, {pin.bytes:,} should have")
            if found.sha256 != pin.sha256:
                raise TransferError(f"sha256 {found.sha256} arrived, {pin.sha256} should have")

        limit = self.place.copies.limit_bytes if pin.bytes is None else pin.bytes
        download(self.url, target, limit, self.place.config, check)

    def _read_unpinned(self) -> bytes:
        with tempfile.TemporaryDirectory(prefix="scalekd-cache-") as folder:
            target = Path(folder) / "file"
            download(self.url, target, UNPINNED_BYTES, self.place.config, None)
            return target.read_bytes()


def open_place(place: Path | str | RemotePath, config: RemoteConfig | None = None) -> Path | RemotePath:
    """A cache's folder from what a user gives: chosen once, by the scheme of the URL.

    Raises:
        UserError: a URL of another scheme than file, http, https, s3 and gs.
    """
    if not isinstance(place, str):
        return place
    if not is_url(place):
        return Path(place)
    url = urlsplit(place)
    if url.scheme == "file":
        return Path(unquote(url.path))
    config = config or RemoteConfig()
    copies = Copies(copies_folder(config), copies_limit(config))
    return RemotePath(Remote(place, copies, config), PurePosixPath())


def open_anew(place: Path | str | RemotePath) -> Path | RemotePath:
    """As `open_place`, for a check of what is on the server: every file is fetched again, once."""
    root = open_place(place)
    if isinstance(root, RemotePath):
        root = RemotePath(Remote(root.place.url, root.place.copies, root.place.config), PurePosixPath())
        root.place.renewed = set()
    return root


def pin_files(folder: StoredPath, pins: Mapping[str, tuple[int | None, str]]) -> None:
    """Say what files of a remote folder must be: {name: (bytes, sha256)}. Without effect on a folder on disk."""
    if isinstance(folder, RemotePath):
        folder.place.pins.update(
            {str(folder.inside / name): Pin(sha256, size) for name, (size, sha256) in pins.items()}
        )


def discard_damaged(folder: StoredPath, start: str) -> bool:
    """Remove local copies of files of a remote folder that have changed since they arrived; whether there were any."""
    if not isinstance(folder, RemotePath):
        return False
    names = [name for name in folder.place.pins if name.startswith(f"{folder.inside}/{start}")]
    return sum(RemotePath(folder.place, PurePosixPath(name)).discard_damaged() for name in names) > 0


def descriptor_of(path: StoredPath) -> int:
    """A descriptor for reading. FileNotFoundError when a cache has no such file; UserError as `open_regular`."""
    return path.descriptor() if isinstance(path, RemotePath) else open_regular(str(path))


def size_of(path: StoredPath) -> int | None:
    """Length of a regular file where it is stored, without reading it; None when a server does not tell.

    Raises:
        FileNotFoundError: there is none.
        UserError: it cannot be opened, or is not a file.
    """
    if not isinstance(path, RemotePath):
        descriptor = open_regular(str(path))
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
    try:
        return path.size()
    except NotThereError as error:
        raise FileNotFoundError(str(path)) from error


def local_path(path: StoredPath) -> Path:
    """A file on this machine with the verified bytes."""
    return path.local() if isinstance(path, RemotePath) else Path(str(path))
