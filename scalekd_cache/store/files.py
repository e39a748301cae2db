"""Files that are on disk when we say so: hashed while written, fsynced once, read back, published by rename.

In: bytes. Out: files with their length and sha256. Invariant: nothing under its final name is ever half-written,
`read_back` compares with the medium, not with what the page cache still holds, and no decision looks at a clock.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from scalekd_cache.errors import UserError
from scalekd_cache.store.path import StoredPath

PIECE_BYTES = 1 << 21


class FileFact(NamedTuple):
    """What a file must be."""

    bytes: int
    sha256: str


class HashingFile:
    """A new file that keeps the length and sha256 of all that was written.

    A thread writes and hashes one piece while the next one is gathered.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._hash = hashlib.sha256()
        self._pending = bytearray()
        self._file = path.open("xb", buffering=0)
        self._thread = ThreadPoolExecutor(1)  # starts with the first whole piece
        self._writing: Future[None] | None = None

    def write(self, data: bytes) -> None:
        """Append."""
        self._pending += data
        self.bytes += len(data)
        if len(self._pending) >= PIECE_BYTES:
            self._wait()
            self._writing = self._thread.submit(self._take, self._pending)
            self._pending = bytearray()

    def finish(self) -> FileFact:
        """Write the rest, fsync, close."""
        self._wait()
        self._take(self._pending)
        fsync(self._file.fileno())
        self._file.close()
        self._thread.shutdown()
        return FileFact(self.bytes, self._hash.hexdigest())

    def abandon(self) -> None:
        """Close without caring whether the rest reaches the disk (it may be full)."""
        self._thread.shutdown(cancel_futures=True)
        self._file.close()

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _take(self, piece: bytearray) -> None:
        left = memoryview(piece)
        while left:
            left = left[self._file.write(left) :]
        self._hash.update(piece)


def fsync(descriptor: int) -> None:
    """Wait until the medium has it. The one place all writers go through."""
    os.fsync(descriptor)


def fsync_path(path: Path) -> None:
    """Fsync a closed file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fsync(descriptor)
    finally:
        os.close(descriptor)


def write_new(path: Path, data: bytes) -> FileFact:
    """A small file in one go."""
    file = HashingFile(path)
    try:
        file.write(data)
        return file.finish()
    finally:
        file.abandon()


def write_atomically(path: Path, data: bytes) -> FileFact:
    """Replace `path` in one step: temp file beside it, fsync, rename, fsync of the folder.

    Raises:
        UserError: no space, or no permission; the file that was there is as it was.
    """
    temp = temp_beside(path)
    try:
        fact = write_new(temp, data)
        temp.replace(path)
        fsync_path(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the temp file may never have been there
            temp.unlink()
        raise_explained(error, path.parent, len(data))
        raise
    return fact


def fact_of(path: StoredPath, *, from_medium: bool = False) -> FileFact:
    """Length and sha256 of a file; `from_medium` asks the kernel to forget cached pages first (a clean file only)."""
    with path.open("rb", buffering=0) as file:
        if from_medium and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
        return FileFact(file.tell(), digest.hexdigest())


def read_back(folder: Path, files: dict[str, FileFact]) -> None:
    """Read every file again after its fsync and compare with what was written; UserError names the one that differs."""
    for name, written in files.items():
        found = fact_of(folder / name, from_medium=True)
        if found != written:
            raise UserError(
                "a file read back from disk differs from what was written",
                got=f"{found.bytes} bytes, sha256 {found.sha256}",
                expected=f"{written.bytes} bytes, sha256 {written.sha256}",
                where=folder / name,
                fix="check the disk and memory of this machine; nothing was committed",
            )


def read_json(path: StoredPath, what: str, limit_bytes: int = 1 << 28) -> tuple[dict[str, Any], bytes]:
    """A JSON object and its bytes. UserError when missing, larger than `limit_bytes`, or not a JSON object."""
    try:
        size = path.stat().st_size
        if size > limit_bytes:
            raise UserError(f"{what} is too large", got=f"{size} bytes", expected=f"<= {limit_bytes}", where=path)
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{what} is missing", where=path, fix="run `make cache-teacher`: it continues") from None
    try:
        value = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not JSON", got=error, where=path, fix="run `make verify` on the cache") from error
    if not isinstance(value, dict):
        raise UserError(f"{what} is not a JSON object", got=type(value).__name__, where=path)
    return value, data


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def folders_of(folder: Path, names: Iterable[str]) -> list[Path]:
    """The folders that hold the files `names`, deepest first, `folder` itself last."""
    inside = {parent for name in names for parent in (folder / name).parents if folder in parent.parents}
    return [*sorted(inside, key=lambda path: (-len(path.parts), str(path))), folder]


def is_disk_full(error: BaseException) -> bool:
    """No space, or no quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def raise_explained(error: BaseException, folder: Path, needed_bytes: int) -> None:
    """Raise the user's error for what a disk can do to a writer; return for anything else.

    Args:
        error: what happened; the temporary files are gone by now.
        folder: where was written.
        needed_bytes: what the file or unit in hand takes.
    """
    if not isinstance(error, OSError):
        return
    if is_disk_full(error):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        raise UserError(
            "the disk is full",
            got=f"{shutil.disk_usage(existing).free:,} bytes free, now that the unfinished files are removed",
            expected=f"at least {needed_bytes:,} bytes free for this one",
            where=folder,
            fix="free space or use another disk (CACHE=...), then run again: what is committed stays",
        ) from error
    what = {
        **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "the cache's folder cannot be written"),
        **dict.fromkeys((errno.EIO, errno.ESTALE), "the disk of the cache fails"),
    }.get(error.errno or 0)
    if what is not None:
        raise UserError(
            what,
            got=error.strerror,
            where=error.filename or folder,
            fix="mend permissions, mount or disk, or use another folder (CACHE=...), then run again: what is "
            "committed stays",
        ) from error


def temp_beside(path: Path) -> Path:
    """A new name beside `path` that says who writes it: `.tmp-<name>-<host>-<process>-<random>`."""
    return path.with_name(f".tmp-{path.name}-{host_tag()}-{os.getpid()}-{secrets.token_hex(4)}")


@functools.cache
def host_tag() -> str:
    """8 hex characters that two processes share when one can see whether the other lives: host, boot, PID namespace."""
    facts = [socket.gethostname()]
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.exists() and namespace.exists():
        facts += [boot.read_text(), str(namespace.stat().st_ino)]
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=4).hexdigest()
