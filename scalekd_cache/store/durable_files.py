"""Files that are on disk when we say so: fsynced once, read back, hashed, published by rename.

In: bytes. Out: files with their length and sha256, which is taken from what the medium gives back after its crc32c was
compared with that of what was written. Invariant: nothing under its final name is ever half-written,
`read_back` compares with the medium, not with what the page cache still holds, and no decision looks at a clock.
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
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import google_crc32c
import numpy as np
from pydantic import Field

from scalekd_cache.errors import UserError
from scalekd_cache.store.checked_files import check_safetensors, is_there, open_file, unreadable
from scalekd_cache.store.path import StoredPath

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
PIECE_BYTES = 1 << 20
HAND_OVER_BYTES = 1 << 23
WAITING_BYTES = 1 << 20
"""What a file gathers before the operating system gets it: a call for every record costs a fifth of the rate."""
WAITING_PIECES = 512
"""So many pieces are not waited for; the system takes 1,024 in a call."""
NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""What `link` fails with where a file system has no hard links."""


TEMP_NAME = re.compile(r"\.tmp-.+-(?P<host>[0-9a-f]{8})-(?P<process>\d{1,9})-[0-9a-f]+(-damaged)?")


class Leftover(NamedTuple):
    """A temporary file or folder whose writer may be alive somewhere else."""

    path: Path
    age_s: float
    """Since its last change, by this machine's clock; never negative."""


class FileFact(NamedTuple):
    """What a file must be."""

    bytes: Annotated[int, Field(ge=0, lt=2**62)]
    sha256: Sha256


class Written(NamedTuple):
    """What was written to a file, to compare with what the medium gives back."""

    bytes: int
    crc32c: int


class NewFile:
    """A new file that keeps the length and crc32c of all that was written; nothing is copied on the way.

    At most `WAITING_BYTES` and a piece wait in memory, and whatever the pieces are views of.
    """

    def __init__(self, path: Path) -> None:
        self.bytes = 0
        self._crc = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        self._handed_over = 0
        self._waiting: list[Any] = []
        self._waiting_bytes = 0

    def write(self, *pieces: Any) -> None:
        """Append bytes or uint8 arrays, which must not change any more; they reach the file some at a time."""
        for piece in pieces:
            self._crc = google_crc32c.extend(self._crc, piece)
            self._waiting_bytes += len(piece)
        self.bytes += sum(map(len, pieces))
        self._waiting += pieces
        if self._waiting_bytes >= WAITING_BYTES or len(self._waiting) >= WAITING_PIECES:
            self._flush()

    def _flush(self) -> None:
        pieces, size = self._waiting, self._waiting_bytes
        self._waiting, self._waiting_bytes = [], 0
        if len(pieces) > 2 * WAITING_PIECES:
            pieces = [b"".join(pieces)]
        done = os.writev(self._descriptor, pieces)
        if done < size:
            left = memoryview(b"".join(pieces))[done:]
            while left:
                left = left[os.write(self._descriptor, left) :]
        if self.bytes - self._handed_over >= HAND_OVER_BYTES:
            self._hand_over()

    def finish(self, *, sync: bool = True) -> Written:
        """Write the rest, fsync, close. Without `sync` the disk only begins: the caller fsyncs the path."""
        if self._waiting:
            self._flush()
        if sync:
            fsync(self._descriptor)
        else:
            self._hand_over()
        self.abandon()
        return Written(self.bytes, self._crc)

    def abandon(self) -> None:
        """Close without caring whether the rest reaches the disk (it may be full)."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _hand_over(self) -> None:
        """Let the disk begin with what is there, so that the fsync at the end has little left to wait for."""
        if hasattr(os, "posix_fadvise"):  # "not needed" makes Linux start to write dirty pages, without waiting
            os.posix_fadvise(self._descriptor, self._handed_over, 0, os.POSIX_FADV_DONTNEED)
        self._handed_over = self.bytes


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


def write_new(path: Path, data: bytes, *, sync: bool = True) -> Written:
    """A small file in one go; `sync` as in `NewFile.finish`."""
    file = NewFile(path)
    try:
        file.write(data)
        return file.finish(sync=sync)
    finally:
        file.abandon()


def write_atomically(path: Path, data: bytes, *, create: bool = False) -> FileFact:
    """Replace `path` in one step: temp file beside it, fsync, rename, fsync of the folder.

    Args:
        path: the file.
        data: its bytes.
        create: never replace a file; of several processes that create it, one succeeds.

    Raises:
        UserError: no space, or no permission; the file that was there is as it was.
        FileExistsError: `create`, and the file exists.
    """
    temp = temp_beside(path)
    try:
        write_new(temp, data)
        if create:
            _publish_new(temp, path)
        else:
            temp.replace(path)
        fsync_path(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the temp file may never have been there
            temp.unlink()
        raise_explained(error, path.parent, len(data))
        raise
    return FileFact(len(data), hashlib.sha256(data).hexdigest())


def _publish_new(temp: Path, path: Path) -> None:
    """Give a file its final name unless that name is taken.

    A file system without hard links (FAT, some network mounts) has no such step: there the name is checked first, and
    two processes within the same millisecond can both succeed.
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


def fact_of(path: StoredPath) -> FileFact:
    """Length and sha256 of a regular file; of tensors once the length is that of their header, so that it is bounded.

    Raises:
        FileNotFoundError: there is none.
        UserError: it cannot be read, or the header and the length of a .safetensors file differ.
    """
    if isinstance(path, Path) and path.suffix == ".safetensors" and is_there(path):
        check_safetensors(path)
    with open_file(path) as file:
        try:
            digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
        except OSError as error:
            raise unreadable(error, path) from error
        return FileFact(file.tell(), digest.hexdigest())


def read_back(folder: Path, files: Mapping[str, Written]) -> dict[str, FileFact]:
    """Read every file from the medium after its fsync: sha256, once length and crc32c are those of what was written.

    Raises:
        UserError: names the file that differs.
    """
    facts: dict[str, FileFact] = {}
    buffer: Any = np.empty(PIECE_BYTES, np.uint8)
    for name, written in files.items():
        with (folder / name).open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):  # clean pages are forgotten, so the disk is asked
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            size, crc, digest = 0, 0, hashlib.sha256()
            while (read := file.readinto(buffer)) > 0:
                piece = buffer[:read]
                size, crc = size + read, google_crc32c.extend(crc, piece)
                digest.update(piece)
        if (size, crc) != written:
            raise UserError(
                "a file read back from disk differs from what was written",
                got=f"{size} bytes, crc32c {crc:08x}",
                expected=f"{written.bytes} bytes, crc32c {written.crc32c:08x}",
                where=folder / name,
                fix="check the disk and memory of this machine; nothing was committed",
            )
        facts[name] = FileFact(size, digest.hexdigest())
    return facts


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def folders_of(folder: Path, names: Iterable[str]) -> list[Path]:
    """The folders that hold the files `names`, deepest first, `folder` itself last."""
    inside = {parent for name in names for parent in (folder / name).parents if folder in parent.parents}
    return [*sorted(inside, key=lambda path: (-len(path.parts), str(path))), folder]


def error_number(error: BaseException) -> int | None:
    """The operating system's error number; libraries written in Rust (safetensors) name it in their text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def is_disk_full(error: BaseException) -> bool:
    """No space, or no quota."""
    return error_number(error) in (errno.ENOSPC, errno.EDQUOT)


def existing_folder(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of a path, which need not exist yet."""
    return shutil.disk_usage(existing_folder(path)).free


def raise_explained(error: BaseException, folder: Path, needed_bytes: int) -> None:
    """Raise the user's error for what a disk can do to a writer; return for anything else.

    Args:
        error: what happened; the temporary files are gone by now.
        folder: where was written.
        needed_bytes: what the file or unit in hand takes.
    """
    if isinstance(error, UserError):
        return
    number = error_number(error)
    if is_disk_full(error):
        raise UserError(
            "the disk is full",
            got=f"{free_bytes(folder):,} bytes free, now that the unfinished files are removed",
            expected=f"at least {needed_bytes:,} bytes free for this one",
            where=folder,
            fix="free space or use another disk, then run again: what is committed stays",
        ) from error
    what = {
        **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "the folder cannot be written"),
        **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.ELOOP), "something else is in the place of a file"),
        **dict.fromkeys((errno.EIO, errno.ESTALE), "the disk fails"),
    }.get(number or 0)
    if what is not None:
        raise UserError(
            what,
            got=os.strerror(number or 0),
            where=getattr(error, "filename2", None) or getattr(error, "filename", None) or folder,
            fix="correct permissions, mount or disk, or use another folder, then run again: what is committed stays",
        ) from error


@contextlib.contextmanager
def explained(folder: Path, needed_bytes: int) -> Iterator[None]:
    """Around writing in `folder`: what a disk can do to it becomes the user's error (`raise_explained`)."""
    try:
        yield
    except Exception as error:
        raise_explained(error, folder, needed_bytes)
        if isinstance(error, OSError):
            got, where = error.strerror or error, error.filename or folder
            raise UserError("a file cannot be written", got=got, where=where, fix="move what is there away") from error
        raise


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


def remove_stale(folder: Path) -> list[Leftover]:
    """Remove temporary files and folders in `folder` whose process ran on this host and is gone. One scan.

    Returns:
        Those of other hosts, or of this one before it was started again: whether they are dead cannot be seen from
        here. They are left alone.
    """
    others = []
    for entry in _temporary(folder):
        name = TEMP_NAME.fullmatch(entry.name)
        if name is None or name["host"] != host_tag():
            others.append(Leftover(Path(entry.path), max(0.0, time.time() - entry.stat().st_mtime)))
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
        with contextlib.suppress(OSError):  # gone already, or a cache that may only be read
            path.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
