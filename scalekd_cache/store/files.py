"""Files that are on disk when we say so: hashed while written, fsynced once, read back, published by rename.

In: bytes. Out: files with their length and sha256. Invariant: nothing under its final name is ever half-written, and
`read_back` compares with the medium, not with what the page cache still holds.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from scalekd_cache.errors import UserError

PIECE_BYTES = 1 << 20


class FileFact(NamedTuple):
    """What a file must be."""

    bytes: int
    sha256: str


class HashingFile:
    """A new file that keeps the length and sha256 of all that was written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._hash = hashlib.sha256()
        self._file = path.open("xb", buffering=PIECE_BYTES)

    def write(self, data: bytes) -> None:
        """Append."""
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    def finish(self) -> FileFact:
        """Flush, fsync, close."""
        self._file.flush()
        fsync(self._file.fileno())
        self._file.close()
        return FileFact(self.bytes, self._hash.hexdigest())

    def abandon(self) -> None:
        """Close without caring whether the rest reaches the disk (it may be full)."""
        try:
            self._file.close()
        except OSError as error:
            if not is_disk_full(error):
                raise


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


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` in one step: temp file beside it, fsync, rename, fsync of the folder."""
    temp = path.with_name(f".tmp-{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        write_new(temp, data)
        temp.replace(path)
    except BaseException as error:
        temp.unlink(missing_ok=True)
        if is_disk_full(error):
            raise disk_full(path.parent, len(data)) from error
        raise
    fsync_path(path.parent)


def fact_of(path: Path, *, from_medium: bool = False) -> FileFact:
    """Length and sha256 of a file; `from_medium` asks the kernel to forget cached pages first (a clean file only)."""
    digest, total = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        if from_medium and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            total += len(piece)
    return FileFact(total, digest.hexdigest())


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


def read_json(path: Path, what: str, limit_bytes: int = 1 << 28) -> tuple[dict[str, Any], bytes]:
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


def disk_full(folder: Path, needed_bytes: int) -> UserError:
    """The error a full disk gives, after the temporary files are gone."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    return UserError(
        "the disk is full",
        got=f"{free:,} bytes free, now that the unfinished files are removed",
        expected=f"at least {needed_bytes:,} bytes free for this one",
        where=folder,
        fix="free space or use another disk (CACHE=...), then run again: what is committed stays",
    )


def host_tag() -> str:
    """8 hex characters that two processes share when one can see whether the other lives: host, boot, PID namespace."""
    facts = [socket.gethostname()]
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.exists() and namespace.exists():
        facts += [boot.read_text(), str(namespace.stat().st_ino)]
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=4).hexdigest()


def remove_stale(units: Path) -> None:
    """Remove temp folders whose process ran on this host and is gone; those of other hosts are left alone."""
    for path in units.glob(f".tmp-*-{host_tag()}-*"):
        pid = path.name.split(f"-{host_tag()}-", 1)[1].split("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
