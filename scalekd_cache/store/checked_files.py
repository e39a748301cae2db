"""Reads untrusted files: only regular files, no more bytes than expected, and JSON only if it matches a schema.

In: a path, and what the file should be. Out: a descriptor, bytes, JSON values or a dataclass with checked types.
Invariant: a FIFO or device never blocks, nothing is read or allocated beyond a limit known in advance, and every
problem is a `UserError` that names the file (even a missing file, except in `open_regular`).
"""

import functools
import json
import os
import re
import shlex
import stat
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar, cast

import pydantic_core
from pydantic import Field, TypeAdapter, ValidationError

from scalekd_cache.errors import UserError, counted
from scalekd_cache.store.path import StoredPath

T = TypeVar("T")
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""Schema type for a SHA-256 hex digest."""
JSON_BYTES = 1 << 26
"""Maximum size of a JSON file: enough for a manifest with about 600,000 units."""
JSON_VALUES = 1 << 22
"""Maximum number of values in a JSON file: each takes about 100 bytes of memory or more, however short its text is."""
PIECE_BYTES = 1 << 20
TENSOR_HEADER_BYTES = 100_000_000
"""Maximum size of a .safetensors header: the limit that the safetensors library sets."""
KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def open_regular(path: Path | str, what: str = "a file") -> int:
    """Open a regular file for reading and return its descriptor, which the caller closes.

    Args:
        path: the file, or a link to one.
        what: what the file should be, for the error.

    Raises:
        FileNotFoundError: the file or its folder does not exist.
        UserError: it is not a regular file or cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # does not wait for a FIFO's writer
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(str(path)) from error
    except (OSError, ValueError) as error:
        raise unreadable(error, path, what) from error
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise UserError(
            f"{what} is not a regular file",
            got=KINDS.get(kind, "a different kind of file"),
            where=path,
        )
    return descriptor


def open_file(path: StoredPath | str, what: str = "a file") -> IO[bytes]:
    """`open_regular` as an unbuffered file object; for a remote path, its verified local copy."""
    if isinstance(path, Path | str):
        return os.fdopen(open_regular(path, what), "rb", 0)
    return path.open("rb", 0)


def check_regular(path: Path | str, what: str = "a file") -> int:
    """The length of a readable regular file. Call this before a library opens the file by name.

    Raises:
        UserError: the file is missing, is not a regular file or cannot be opened.
    """
    try:
        descriptor = open_regular(path, what)
    except FileNotFoundError:
        raise UserError(f"{what} is missing", where=path) from None
    try:
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def is_hex(value: object, digits: int) -> bool:
    """Whether a value is a string of exactly this many lowercase hex digits."""
    return isinstance(value, str) and re.fullmatch(rf"[0-9a-f]{{{digits}}}", value) is not None


def check_safetensors(path: Path | str, what: str = "a tensor file") -> int:
    """The length of a .safetensors file, checked against its header without reading any tensor.

    Raises:
        UserError: as for `check_regular`; also if the header is damaged or implies a different length.
    """
    size = check_regular(path, what)
    descriptor = open_regular(path, what)
    try:
        header_bytes = int.from_bytes(read_at(descriptor, 8, 0, path), "little")
        if not 2 <= header_bytes <= min(TENSOR_HEADER_BYTES, size - 8):
            raise UserError(
                f"{what} is damaged",
                got="no safetensors header",
                expected="a .safetensors file (renaming a pickle is not enough)",
                where=path,
            )
        entries = parse_json(read_at(descriptor, header_bytes, 8, path), f"the header of {what}", path)
    finally:
        os.close(descriptor)
    try:
        ends = [int(entry["data_offsets"][1]) for name, entry in entries.items() if name != "__metadata__"]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{what} is damaged", got="a tensor without offsets", where=path) from error
    expected = 8 + header_bytes + max(ends, default=0)
    if size != expected:
        got, wanted = counted(size, "byte"), f"{expected:,} bytes, according to its header"
        raise UserError(f"{what} has the wrong length", got=got, expected=wanted, where=path)
    return size


def is_there(path: StoredPath) -> bool:
    """Whether something with this name exists, readable or not."""
    return os.path.lexists(path) if isinstance(path, Path) else path.exists()


def unreadable(error: OSError | ValueError, path: object, what: str = "a file") -> UserError:
    """The error for an existing file that cannot be opened or read because of a bad sector, missing permissions or a
    link loop."""
    got = (error.strerror if isinstance(error, OSError) else None) or error
    return UserError(f"cannot read {what}", got=got, where=path, fix="check the path, its permissions and the disk")


def read_at(descriptor: int, count: int, offset: int, where: object) -> bytes:
    """Like `os.pread`, which returns fewer bytes at the end of the file. Raises `UserError` on a read error."""
    try:
        return os.pread(descriptor, count, offset)
    except OSError as error:
        raise unreadable(error, where) from error


def read_file(path: StoredPath | str, what: str, limit_bytes: int, fix: str | None = None) -> bytes:
    """The contents of a file that is at most `limit_bytes` long.

    Args:
        path: the file; for a remote path, the verified local copy is read.
        what: what the file is, for the error.
        limit_bytes: maximum size.
        fix: what to do if the file is missing.

    Raises:
        UserError: the file is missing, is not a regular file, is too large or cannot be read.
    """
    try:
        if isinstance(path, Path | str):
            with open_file(path, what) as file:
                data = _read(file, path, what, limit_bytes)
        else:
            data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{what} is missing", where=path, fix=fix) from None
    if len(data) > limit_bytes:
        raise _too_large(what, f"at least {len(data):,} bytes", limit_bytes, path)
    return data


def _too_large(what: str, got: str, limit_bytes: int, path: object) -> UserError:
    return UserError(f"{what} is too large", got=got, expected=f"at most {limit_bytes:,} bytes", where=path)


def _read(file: IO[bytes], path: object, what: str, limit_bytes: int) -> bytes:
    """Read a file, but no more than one byte past the limit."""
    pieces, left = [], limit_bytes + 1
    try:
        size = os.fstat(file.fileno()).st_size
        if size > limit_bytes:
            raise _too_large(what, f"{size:,} bytes", limit_bytes, path)
        while left > 0 and (piece := file.read(min(left, PIECE_BYTES))):
            pieces.append(piece)
            left -= len(piece)
    except OSError as error:
        raise unreadable(error, path, what) from error
    return b"".join(pieces)


REPAIR = "run `scalekd repair --cache ...` to rebuild damaged parts (`scalekd verify --cache ... --deep` lists them)"
"""How to repair a damaged cache."""


def repair_command(where: object) -> str | None:
    """`REPAIR` with the cache's folder; None if `where` is not inside a cache folder on this machine."""
    text = str(where)
    root = text.rpartition("/units/")[0] or str(Path(text).parent)
    if "://" in text or not any(os.path.lexists(f"{root}/{name}") for name in ("manifest.json", "plan.json")):
        return None
    return REPAIR.replace("...", shlex.quote(root))


def read_json(
    path: StoredPath | str, what: str, limit_bytes: int = JSON_BYTES, fix: str | None = None
) -> tuple[dict[str, Any], bytes]:
    """A JSON object and its bytes. Raises `UserError` as `read_file` does, or if the file is not a JSON object."""
    data = read_file(path, what, limit_bytes, fix)
    return parse_json(data, what, path), data


def parse_json(data: bytes, what: str, where: object) -> dict[str, Any]:
    """The JSON object in these bytes, without NaN or infinity. Raises `UserError` if they hold anything else."""
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > JSON_VALUES:
        raise UserError(f"{what} contains too many values", expected=f"at most {JSON_VALUES:,}", where=where)
    try:
        value = pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise UserError(f"{what} is not valid JSON", got=error, where=where, fix=repair_command(where)) from error
    if not isinstance(value, dict):
        got = type(value).__name__
        raise UserError(f"{what} is not a JSON object", got=got, where=where, fix=repair_command(where))
    return value


def read_checked(
    path: StoredPath | str, kind: type[T], what: str, limit_bytes: int = JSON_BYTES, fix: str | None = None
) -> T:
    """Read a JSON file as a dataclass, NamedTuple or TypedDict, checking the types of all nested values.

    Args:
        path: the file.
        kind: the class. Unknown fields, missing fields and values of the wrong type are errors. The only conversion is
            from JSON lists to tuples, where the class has tuples. Limits are written as `Annotated[int, Field(ge=0)]`;
            `Field(fail_fast=True)` on a long list stops at its first error.
        what: what the file is, for the error.
        limit_bytes: as in `read_file`.
        fix: as in `read_file`.

    Raises:
        UserError: as for `read_json`, or the file does not match the class; the error names the field.
    """
    fields, data = read_json(path, what, limit_bytes, fix)
    del fields
    return checked(data, kind, what, path)


def checked_value(value: object, kind: type[T], what: str, where: object) -> T:
    """Convert parsed JSON values to `kind`; see `read_checked`."""
    found = checked(json.dumps(value), kind, what, where)
    try:
        json.dumps(value, allow_nan=False)
    except ValueError as error:  # a number such as 1e999 where the class accepts any value
        raise UserError(f"{what} has invalid values", got=error, where=where) from None
    return found


def checked(data: bytes | str, kind: type[T], what: str, where: object) -> T:
    """Convert JSON text (without NaN) to `kind`; see `read_checked`."""
    try:
        value: T = _adapter(cast(Hashable, kind)).validate_json(data, strict=True, extra="forbid")
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False)
        fix = repair_command(where)
        raise UserError(f"{what} has invalid values", got=_named(wrong), where=where, fix=fix) from None
    except UserError as error:  # from a `__post_init__`
        raise UserError(f"{what} has invalid values", got=error, where=where) from None
    return value


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _named(wrong: Sequence[Any]) -> str:
    """The first few JSON fields that do not match, with their values."""
    named = []
    for one in wrong[:3]:
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in one["loc"]).lstrip(".")
        what = {"unexpected_keyword_argument": "unknown", "extra_forbidden": "unknown"}.get(one["type"], one["msg"])
        what = "missing" if one["type"].startswith("missing") else what[:1].lower() + what[1:]
        found = "" if what in ("unknown", "missing") else f", not {one['input']!r:.60}"
        named.append(f"{place or 'all'}: {what}{found}")
    more = len(wrong) - len(named)
    return "; ".join(named) + (f"; and {more} more" if more > 0 else "")
