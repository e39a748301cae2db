"""Durable writes: files are fsynced once, read back, hashed, and published by rename.

In: bytes. Out: files with their length and SHA-256. The bytes are read back from disk, and their CRC-32C is compared
with that of the written bytes before the SHA-256 is computed. Invariant: a file under its final name is never
half-written, `read_back` reads from the disk and not from the page cache, and no decision depends on a clock.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import google_crc32c
import numpy as np
from pydantic import Field

from scalekd_cache.errors import UserError, counted
from scalekd_cache.store.checked_files import Sha256, check_safetensors, is_there, open_file, unreadable
from scalekd_cache.store.path import StoredPath

PIECE_BYTES = 1 << 20
WRITEBACK_BYTES = 1 << 23
BUFFER_BYTES = 1 << 20
"""Number of bytes buffered per file before a write call; one call per record would cost a fifth of the throughput."""
BUFFER_PIECES = 512
"""Maximum number of buffered pieces; the kernel accepts 1,024 in one call."""
NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""Errors that `link` raises on a file system without hard links."""
TEMP_NAME = re.compile(r"\.tmp-(?P<name>.+)-(?P<host>[0-9a-f]{8})-(?P<process>\d{1,9})-[0-9a-f]+(-damaged)?")


class ForeignTempFile(NamedTuple):
    """A temporary file or folder from another host, where its writer may still be running."""

    path: Path
    age_s: float
    """Seconds since its last change, by this machine's clock; never negative."""


class FileHash(NamedTuple):
    """Length and hash of a file."""

    bytes: Annotated[int, Field(ge=0, lt=2**62)]
    sha256: Sha256


class Written(NamedTuple):
    """Length and CRC-32C of the bytes written to a file, to compare with what is read back."""

    bytes: int
    crc32c: int


class NewFile:
    """A new file that records the length and CRC-32C of everything written to it, without copying.

    It buffers at most `BUFFER_BYTES` plus one piece. A buffered piece that is a view keeps its underlying memory alive.
    """

    def __init__(self, path: Path) -> None:
        self.bytes = 0
        self._crc = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        self._submitted = 0
        self._buffer: list[Any] = []
        self._buffered_bytes = 0

    def write(self, *pieces: Any) -> None:
        """Append bytes or uint8 arrays, which must not change afterwards; they are buffered."""
        for piece in pieces:
            self._crc = google_crc32c.extend(self._crc, piece)
            self._buffered_bytes += len(piece)
        self.bytes += sum(map(len, pieces))
        self._buffer += pieces
        if self._buffered_bytes >= BUFFER_BYTES or len(self._buffer) >= BUFFER_PIECES:
            self._flush()

    def _flush(self) -> None:
        pieces, size = self._buffer, self._buffered_bytes
        self._buffer, self._buffered_bytes = [], 0
        if len(pieces) > 2 * BUFFER_PIECES:
            pieces = [b"".join(pieces)]
        done = os.writev(self._descriptor, pieces)
        if done < size:
            left = memoryview(b"".join(pieces))[done:]
            while left:
                left = left[os.write(self._descriptor, left) :]
        if self.bytes - self._submitted >= WRITEBACK_BYTES:
            self._start_writeback()

    def finish(self, *, sync: bool = True) -> Written:
        """Write remaining data, fsync and close. Without `sync`, only start writeback; the caller then fsyncs the
        path."""
        if self._buffer:
            self._flush()
        if sync:
            fsync(self._descriptor)
        else:
            self._start_writeback()
        self.abort()
        return Written(self.bytes, self._crc)

    def abort(self) -> None:
        """Close without writing remaining data (the disk may be full)."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _start_writeback(self) -> None:
        """Start writeback of the data written so far, so that the final fsync takes less time."""
        if hasattr(os, "posix_fadvise"):  # DONTNEED makes Linux start writing dirty pages without waiting
            os.posix_fadvise(self._descriptor, self._submitted, 0, os.POSIX_FADV_DONTNEED)
        self._submitted = self.bytes


def fsync(descriptor: int) -> None:
    """Wait until the data is on disk. All writers call fsync through this function."""
    os.fsync(descriptor)


def fsync_path(path: Path) -> None:
    """Fsync a closed file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fsync(descriptor)
    finally:
        os.close(descriptor)


def write_new(path: Path, data: bytes, *, sync: bool = True) -> Written:
    """Write a small file; `sync` as in `NewFile.finish`."""
    file = NewFile(path)
    try:
        file.write(data)
        return file.finish(sync=sync)
    finally:
        file.abort()


def write_atomically(path: Path, data: bytes, *, create: bool = False) -> FileHash:
    """Replace `path` atomically: write a temporary file in the same folder, fsync it, rename it and fsync the folder.

    Args:
        path: the file.
        data: its bytes.
        create: never replace an existing file; if multiple processes try to create it, one succeeds.

    Raises:
        UserError: no space or no permission, or a device or FIFO has this name; an existing file is unchanged.
        FileExistsError: `create` is set and the file exists.
    """
    check_replaceable(path)
    temp = temp_path_for(path)
    try:
        write_new(temp, data)
        if create:
            _publish_new(temp, path)
        else:
            temp.replace(path)
        fsync_path(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the temporary file may not exist yet
            temp.unlink()
        raise_disk_error(error, path.parent, len(data))
        raise
    return FileHash(len(data), hashlib.sha256(data).hexdigest())


def check_replaceable(path: Path) -> None:
    """Raise `UserError` for a device such as /dev/null or /dev/stdout, which a rename would replace for every
    program."""
    try:
        kind = path.stat().st_mode
    except OSError:  # no such file, or a broken link
        return
    stream = path.is_symlink() and os.readlink(path).startswith("/proc/")
    if stream or stat.S_ISCHR(kind) or stat.S_ISBLK(kind):
        raise UserError("cannot write to a device: choose a file name", where=path)


def _publish_new(temp: Path, path: Path) -> None:
    """Give a file its final name unless that name is taken.

    Without hard links (FAT, some network mounts), this is not atomic: the name is checked first, so if two processes do
    this in the same millisecond, both can succeed.
    """
    try:
        os.link(temp, path)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        temp.replace(path)
        return
    temp.unlink()


def hash_file(path: StoredPath) -> FileHash:
    """Length and SHA-256 of a regular file. A .safetensors file must have the length implied by its header.

    Raises:
        FileNotFoundError: it does not exist.
        UserError: it cannot be read, or the length of a .safetensors file does not match its header.
    """
    if isinstance(path, Path) and path.suffix == ".safetensors" and is_there(path):
        check_safetensors(path)
    with open_file(path) as file:
        try:
            digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
        except OSError as error:
            raise unreadable(error, path) from error
        return FileHash(file.tell(), digest.hexdigest())


def has_sha256(path: Path, sha256: str) -> bool:
    """Whether this is a readable regular file with this SHA-256; False for a damaged one."""
    try:
        return path.is_file() and hash_file(path).sha256 == sha256
    except (FileNotFoundError, UserError):
        return False


def read_back(folder: Path, files: Mapping[str, Written]) -> dict[str, FileHash]:
    """Read every file back from disk after fsync, check its length and CRC-32C against what was written, and hash it.

    Raises:
        UserError: a file differs; the error names it.
    """
    facts: dict[str, FileHash] = {}
    buffer: Any = np.empty(PIECE_BYTES, np.uint8)
    for name, written in files.items():
        with (folder / name).open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):  # drop clean pages, so that the data is read from disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            size, crc, digest = 0, 0, hashlib.sha256()
            while (read := file.readinto(buffer)) > 0:
                piece = buffer[:read]
                size, crc = size + read, google_crc32c.extend(crc, piece)
                digest.update(piece)
        if (size, crc) != written:
            raise UserError(
                "a file read back from disk differs from what was written",
                got=f"{counted(size, 'byte')}, crc32c {crc:08x}",
                expected=f"{counted(written.bytes, 'byte')}, crc32c {written.crc32c:08x}",
                where=folder / name,
                fix="check this machine's disk and memory; nothing was committed",
            )
        facts[name] = FileHash(size, digest.hexdigest())
    return facts


def canonical_json(value: Any) -> str:
    """A value as canonical JSON: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def parent_folders(folder: Path, names: Iterable[str]) -> list[Path]:
    """The folders that hold the files `names`, deepest first and `folder` itself last."""
    inside = {parent for name in names for parent in (folder / name).parents if folder in parent.parents}
    return [*sorted(inside, key=lambda path: (-len(path.parts), str(path))), folder]


def error_number(error: BaseException) -> int | None:
    """An error's errno; errors from Rust libraries (safetensors) give it only in the message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that the disk is full or the quota is exhausted."""
    return error_number(error) in (errno.ENOSPC, errno.EDQUOT)


def existing_folder(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that holds a path, which need not exist yet."""
    return shutil.disk_usage(existing_folder(path)).free


def check_writable(folder: Path, option: str, needed_bytes: int = 0) -> None:
    """Check, before long work, that a folder or its nearest existing parent is writable; leaves no files.

    Args:
        folder: the folder, which need not exist yet.
        option: the option that set it, for the error.
        needed_bytes: number of bytes that will be written.

    Raises:
        UserError: the folder is not writable or has no room for these bytes.
    """
    try:
        with tempfile.TemporaryFile(dir=existing_folder(folder)):
            pass
    except OSError as error:
        raise UserError(
            "cannot write to the folder", got=error.strerror or error, where=folder, fix=f"choose another {option}"
        ) from error
    free = free_bytes(folder)
    if needed_bytes > free:
        raise UserError(
            "not enough disk space",
            got=f"{free:,} bytes free",
            expected=f"at least {needed_bytes:,} bytes free",
            where=folder,
            fix=f"free up space, or choose another {option}",
        )


def raise_disk_error(error: BaseException, folder: Path, needed_bytes: int) -> None:
    """Raise a `UserError` for a full, read-only or failing disk; return for any other error.

    Args:
        error: the error; temporary files must already be removed.
        folder: the folder that was written to.
        needed_bytes: size of the file or unit being written (0: unknown).
    """
    if isinstance(error, UserError):
        return
    number = error_number(error)
    if is_disk_full(error):
        quota = number == errno.EDQUOT
        raise UserError(
            "the disk quota is exhausted" if quota else "the disk is full",
            got=None if quota else f"{free_bytes(folder):,} bytes free after removing unfinished files",
            expected=None if quota or not needed_bytes else f"at least {needed_bytes:,} bytes free",
            where=folder,
            fix="free up space or use another disk, then rerun: committed work is kept",
        ) from error
    what = {
        **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "cannot write to this path"),
        **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.ELOOP), "cannot create a file at this path"),
        **dict.fromkeys((errno.EIO, errno.ESTALE), "I/O error on the disk"),
    }.get(number or 0)
    if what is not None:
        taken = number in (errno.EISDIR, errno.ENOTDIR, errno.ELOOP)
        raise UserError(
            what,
            got=os.strerror(number or 0),
            where=_final_path(getattr(error, "filename2", None) or getattr(error, "filename", None) or folder),
            fix=(
                "use a different path" if taken else "fix the permissions, the mount or the disk, or use another folder"
            )
            + ", then rerun: committed work is kept",
        ) from error


def _final_path(path: object) -> Path:
    """The final path for a temporary path, which is the name that the user knows."""
    parts = Path(str(path)).parts
    for index, part in enumerate(parts):
        if name := TEMP_NAME.fullmatch(part):
            return Path(*parts[:index], name["name"])
    return Path(*parts)


@contextlib.contextmanager
def disk_errors(folder: Path, needed_bytes: int) -> Iterator[None]:
    """Turn disk errors in a block that writes to `folder` into a `UserError` (`raise_disk_error`)."""
    try:
        yield
    except Exception as error:
        raise_disk_error(error, folder, needed_bytes)
        if isinstance(error, OSError):
            got, where = error.strerror or error, _final_path(error.filename or folder)
            fix = "if another file or folder is at this path, move or delete it; otherwise, use a different path"
            if not where.parent.exists():
                got, fix = f"there is no folder {where.parent}", "create this folder, or use a different path"
            raise UserError("cannot write a file", got=got, where=where, fix=fix) from error
        raise


def temp_path_for(path: Path) -> Path:
    """A new temporary path in the folder of `path`: `.tmp-<name>-<host>-<process>-<random>`."""
    return path.with_name(f".tmp-{path.name}-{host_tag()}-{os.getpid()}-{secrets.token_hex(4)}")


@functools.cache
def host_tag() -> str:
    """Hash of host, boot and PID namespace (8 hex digits): equal for processes that can check each other's process
    IDs."""
    facts = [socket.gethostname()]
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.exists() and namespace.exists():
        facts += [boot.read_text(), str(namespace.stat().st_ino)]
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=4).hexdigest()


def remove_stale(folder: Path) -> list[ForeignTempFile]:
    """Scan `folder` once and remove temporary files and folders whose process ran on this host and has ended.

    Returns:
        Those from other hosts, or from this host before a reboot. They are kept because their process may still be
        running.
    """
    others = []
    for entry in _temporary(folder):
        name = TEMP_NAME.fullmatch(entry.name)
        if name is None or name["host"] != host_tag():
            others.append(ForeignTempFile(Path(entry.path), max(0.0, time.time() - entry.stat().st_mtime)))
        elif not _alive(int(name["process"])):
            _remove(Path(entry.path))
    return others


def _temporary(folder: Path) -> list["os.DirEntry[str]"]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        return [entry for entry in entries if entry.name.startswith(".tmp-")]
    return []


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):  # already removed, or a read-only cache
            path.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
