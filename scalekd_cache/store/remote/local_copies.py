"""Local copies of remote files, by sha256, in a folder of bounded size that all processes of a machine share.

In: a sha256 and a way to fetch. Out: a descriptor of a file with these bytes.
Invariant: a file under its sha256 was complete and right when it was put there; files and files on their way together
never take more than the limit; one process fetches while others wait for it; what a killed one leaves is removed.
On a file system without locks each process fetches for itself, and the limit holds for what is complete.

    folder/ab/abcd...          a copy; its time of modification is that of its last use
    folder/incoming/abcd....lock   held (flock) by the process that fetches; its length is the room it has reserved
    folder/incoming/abcd....data   what has arrived so far
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
from scalekd_cache.store.durable_files import fsync, is_disk_full, remove_stale, temp_beside
from scalekd_cache.store.locks import lock, open_lock

WAIT_S = 0.1
"""Seconds between two looks for room that other processes have reserved."""


class Stored(NamedTuple):
    """A file in the folder of copies."""

    used_ns: int
    bytes: int
    path: Path


class Copies:
    """The folder. Holds two values, no open file: a copy of it in another process is as good."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes

    def open(self, sha256: str, size: int | None, fetch: Callable[[Path], None]) -> int:
        """A descriptor of the copy, which the caller closes; `fetch` writes and checks the file when there is none.

        Raises:
            UserError: no room, the folder cannot be written, or what `fetch` raises.
        """
        descriptor = self._existing(sha256, size)
        if descriptor is not None:
            return descriptor
        try:
            (self.folder / "incoming").mkdir(parents=True, exist_ok=True)
            self.path(sha256).parent.mkdir(exist_ok=True)
            return self._bring(sha256, size, fetch)
        except OSError as error:
            what = "the disk of the local copies is full" if is_disk_full(error) else "local copies cannot be written"
            fix = f"free space, lower ${LIMIT_VARIABLE} (remote.limit_bytes), or set ${FOLDER_VARIABLE} (remote.folder)"
            raise UserError(what, got=error, where=self.folder, fix=fix) from error

    def path(self, sha256: str) -> Path:
        """Where the copy is, if it is there."""
        return self.folder / sha256[:2] / sha256

    def discard(self, sha256: str) -> None:
        """Remove a copy that turned out to be damaged."""
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
        except OSError:  # another user's copy: it is read all the same, and its owner's use decides when it goes
            return descriptor
        return descriptor

    def _bring(self, sha256: str, size: int | None, fetch: Callable[[Path], None]) -> int:
        data = self.folder / "incoming" / f"{sha256}.data"
        with self._turn(sha256) as (reservation, alone):
            if not alone:  # other processes may be fetching it too
                remove_stale(data.parent)
                data = temp_beside(data)
            descriptor = self._existing(sha256, size)
            if descriptor is not None:  # another process was faster
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
    def _turn(self, sha256: str) -> Iterator[tuple[IO[bytes], bool]]:
        """Wait until no other process fetches this file; the kernel ends a killed process's turn.

        Yields:
            The locked file, and whether the file system has locks: without them nobody waits.
        """
        path = self.folder / "incoming" / f"{sha256}.lock"
        while True:
            file = open_lock(path)
            alone = lock(file, path)
            if not alone or _is_same_file(path, file):
                break
            file.close()  # its last holder has removed it in the meantime
        try:
            yield file, alone
        finally:
            path.unlink(missing_ok=True)
            file.close()

    def _reserve(self, reservation: IO[bytes], size: int) -> None:
        """Make room for `size` bytes and count them as taken."""
        if size > self.limit_bytes:
            raise UserError(
                "a file is larger than all local copies may be",
                got=f"{size:,} bytes",
                expected=f"at most {self.limit_bytes:,} bytes",
                where=self.folder,
                fix=f"raise ${LIMIT_VARIABLE} (remote.limit_bytes)",
            )
        while True:
            with open_lock(self.folder / ".lock") as file:
                lock(file, self.folder / ".lock")
                if self._evict(self.limit_bytes - size):
                    reservation.truncate(size)
                    return
            time.sleep(WAIT_S)  # others have reserved the rest: they will be done, or be killed

    def _evict(self, budget_bytes: int) -> bool:
        """Remove the least recently used copies until the rest and all reservations fit; False when they cannot."""
        found = sorted(one for part in self.folder.glob("[0-9a-f][0-9a-f]") for one in _stored(part))
        taken = sum(one.bytes for one in found) + self._reserved_bytes()
        for one in found:
            if taken <= budget_bytes:
                break
            one.path.unlink(missing_ok=True)
            taken -= one.bytes
        return taken <= budget_bytes

    def _reserved_bytes(self) -> int:
        """Room that living processes have reserved; what killed ones left is removed."""
        total = 0
        for one in _stored(self.folder / "incoming"):
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


def _stored(folder: Path) -> list[Stored]:
    """Files of a folder; those that vanish while we look are left out."""
    found = []
    for path in folder.iterdir():
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        found.append(Stored(stat.st_mtime_ns, stat.st_size, path))
    return found


def _is_same_file(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
