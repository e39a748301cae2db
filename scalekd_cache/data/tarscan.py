"""Scans the headers of an untrusted tar.

In: a path. Out: the name, offset and size of every regular member.
Invariant: every member lies entirely inside the file; the tar ends with its end marker; links, devices and sparse
files are ignored; no allocation depends on a size from a header.
"""

import io
import tarfile
from collections import Counter
from typing import NamedTuple

from scalekd_cache.errors import UserError
from scalekd_cache.store.checked_files import check_regular

BLOCK = 512
MAX_HEADER_BYTES = 1 << 20
SCAN_ERRORS = (tarfile.TarError, ValueError, OverflowError, IndexError, KeyError, EOFError, RecursionError)


class TarMember(NamedTuple):
    """A regular file inside a tar: its data starts at `offset` and is `size` bytes long."""

    name: str
    offset: int
    size: int


class _HeaderFile(io.FileIO):
    """A file that rejects reads larger than any valid tar header before allocating memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return super().read(size)


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name as WebDataset does: (key, extension in lower case); None if it is not a sample."""
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or (stem.startswith("__") and stem.endswith("__")):
        return None
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def scan_tar(path: str, others: Counter[str]) -> list[TarMember]:
    """List all regular members in order; links and other members without data are counted in `others`.

    Raises:
        UserError: the file does not exist, is not an uncompressed tar, is truncated or damaged, or has data after the
            end marker.
    """
    members: list[TarMember] = []
    last = ""
    try:
        file_bytes = check_regular(path, "a shard")
        with _HeaderFile(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            position = -1
            for info in tar:
                if info.size < 0 or info.offset <= position or info.offset_data + info.size > file_bytes:
                    raise tarfile.ReadError(f"member {info.name} has {info.size} bytes at offset {info.offset_data}")
                position, last = info.offset, info.name
                if info.isreg() and not info.issparse():
                    members.append(TarMember(info.name, info.offset_data, info.size))
                elif not info.isdir():
                    others["links, sparse or special files"] += 1
            _check_end(file, tar.offset)
    except OSError as error:
        raise UserError(
            "cannot open a shard", got=error.strerror, where=path, fix="check the path and its permissions"
        ) from error
    except SCAN_ERRORS as error:
        key = (split_name(last) or (last, ""))[0]
        raise UserError(
            f"the shard is truncated or damaged; the last sample found is {key}"
            if last
            else "the shard is truncated or damaged, or is not an uncompressed tar",
            got=f"{error} (last complete header: {last})" if last else error,
            expected="an uncompressed tar with an end-of-archive marker",
            where=path,
            fix="copy the shard again, or rewrite it",
        ) from error
    return members


def _check_end(file: io.FileIO, position: int) -> None:
    """Check that the last member is followed by at least one block and only by zeros."""
    file.seek(position)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise tarfile.ReadError("the tar has no end-of-archive marker")
    while block:
        if any(block):
            raise tarfile.ReadError(f"a damaged header, or data after the end marker, near byte {file.tell()}")
        block = file.read(MAX_HEADER_BYTES)
