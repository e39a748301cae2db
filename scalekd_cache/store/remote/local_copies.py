"""Local copies of remote files, named by SHA-256, in a size-limited folder shared by all processes on a machine.

In: a SHA-256 and a function that downloads the file. Out: a descriptor of a file with this SHA-256.
Invariant: a file is renamed to its SHA-256 only after it is complete and verified; complete and incoming files together
never exceed the limit; one process downloads a file while others wait; files from killed processes are removed. On a
file system without locks, each process downloads separately, and the limit applies only to complete files.

    folder/ab/abcd...              a copy; its modification time is when it was last used
    folder/incoming/abcd....lock   held (flock) by the downloading process; its length is the reserved size
    folder/incoming/abcd....data   the bytes downloaded so far
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from scalekd_cache.config.remote import FOLDER_VARIABLE, LIMIT_VARIABLE
from scalekd_cache.errors import UserError
from scalekd_cache.store.checked_files import open_regular
from scalekd_cache.store.durable_files import fsync, is_disk_full, remove_stale, temp_path_for
from scalekd_cache.store.locks import lock, open_lock

WAIT_S = 0.1
"""Seconds between checks for free space while other processes hold the rest."""


class CopyFile(NamedTuple):
    """A file in the folder of local copies."""

    used_ns: int
    bytes: int
    path: Path


class LocalCopies:
    """The folder of local copies. It holds no open files, so forked and spawned processes can use it."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes

    def open(self, sha256: str, size: int | None, fetch: Callable[[Path], None]) -> int:
        """A descriptor of the copy, which the caller closes; `fetch` downloads and verifies a missing file.

        Raises:
            UserError: there is no space, the folder is not writable, or `fetch` raised an error.
        """
        descriptor = self._existing(sha256, size)
        if descriptor is not None:
            return descriptor
        try:
            (self.folder / "incoming").mkdir(parents=True, exist_ok=True)
            self.path(sha256).parent.mkdir(exist_ok=True)
            return self._download(sha256, size, fetch)
        except OSError as error:
            what = (
                "the disk that holds the local copies is full" if is_disk_full(error) else "cannot write local copies"
            )
            fix = f"free up space, lower ${LIMIT_VARIABLE} (remote.limit_bytes), "
            fix += f"or set ${FOLDER_VARIABLE} (remote.folder)"
            raise UserError(what, got=error, where=self.folder, fix=fix) from error

    def path(self, sha256: str) -> Path:
        """The path of the copy, whether or not it exists."""
        return self.folder / sha256[:2] / sha256

    def discard(self, sha256: str) -> None:
        """Remove a damaged copy."""
        self.path(sha256).unlink(missing_ok=True)

    def _existing(self, sha256: str, size: int | None) -> int | None:
        try:
            descriptor = open_regular(self.path(sha256), "a local copy")
        except FileNotFoundError:
            return None
        if size is not None and os.fstat(descriptor).st_size != size:
            os.close(descriptor)
            self.discard(sha256)
            return None
        try:
            os.utime(descriptor)
        except OSError:  # another user's copy: readable, but only its owner can update its last-used time
            return descriptor
        return descriptor

    def _download(self, sha256: str, size: int | None, fetch: Callable[[Path], None]) -> int:
        data = self.folder / "incoming" / f"{sha256}.data"
        with self._download_lock(sha256) as (reservation, alone):
            if not alone:  # without locks, other processes may be downloading it too
                remove_stale(data.parent)
                data = temp_path_for(data)
            descriptor = self._existing(sha256, size)
            if descriptor is not None:  # another process has downloaded it
                return descriptor
            try:
                if size is not None:
                    self._reserve(reservation, size)
                fetch(data)
                descriptor = open_regular(data, "a local copy")
                fsync(descriptor)
                if size is None:
                    self._reserve(reservation, os.fstat(descriptor).st_size)
                data.replace(self.path(sha256))
                return descriptor
            finally:
                data.unlink(missing_ok=True)

    @contextmanager
    def _download_lock(self, sha256: str) -> Iterator[tuple[IO[bytes], bool]]:
        """Hold the lock for downloading this file; if the process is killed, the kernel releases the lock.

        Yields:
            The locked file, and whether the file system has locks (without locks, no process waits).
        """
        path = self.folder / "incoming" / f"{sha256}.lock"
        while True:
            file = open_lock(path)
            alone = lock(file, path)
            if not alone or _is_same_file(path, file):
                break
            file.close()  # the previous holder removed it in the meantime
        try:
            yield file, alone
        finally:
            path.unlink(missing_ok=True)
            file.close()

    def _reserve(self, reservation: IO[bytes], size: int) -> None:
        """Make room for `size` bytes and reserve it."""
        if size > self.limit_bytes:
            raise UserError(
                "this file alone is larger than the size limit for local copies",
                got=f"{size:,} bytes",
                expected=f"at most {self.limit_bytes:,} bytes",
                where=self.folder,
                fix=f"increase ${LIMIT_VARIABLE} (remote.limit_bytes)",
            )
        while True:
            with open_lock(self.folder / ".lock") as file:
                lock(file, self.folder / ".lock")
                if self._evict(self.limit_bytes - size):
                    reservation.truncate(size)
                    return
            time.sleep(WAIT_S)  # other processes have reserved the rest: wait until they finish or are killed

    def _evict(self, budget_bytes: int) -> bool:
        """Remove the least recently used copies until the rest plus all reservations fit; False if they cannot fit."""
        found = sorted(one for part in self.folder.glob("[0-9a-f][0-9a-f]") for one in _files_in(part))
        taken = sum(one.bytes for one in found) + self._reserved_bytes()
        for one in found:
            if taken <= budget_bytes:
                break
            one.path.unlink(missing_ok=True)
            taken -= one.bytes
        return taken <= budget_bytes

    def _reserved_bytes(self) -> int:
        """Number of bytes reserved by running processes; files from killed processes are removed."""
        total = 0
        for one in _files_in(self.folder / "incoming"):
            if one.path.suffix != ".lock":
                continue
            try:
                with open_lock(one.path, make=False) as file:
                    if lock(file, one.path, wait=False, shared=True) and _is_same_file(one.path, file):
                        one.path.with_suffix(".data").unlink(missing_ok=True)
                        one.path.unlink()
            except BlockingIOError:
                total += one.bytes
            except FileNotFoundError:
                continue
        return total


def _files_in(folder: Path) -> list[CopyFile]:
    """The files in a folder; files removed during the scan are ignored."""
    found = []
    for path in folder.iterdir():
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        found.append(CopyFile(stat.st_mtime_ns, stat.st_size, path))
    return found


def _is_same_file(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
