"""unit.json, the commit record of a work unit.

In: what a writer knows when its shards are on disk. Out: a checked `UnitInfo`.
Invariant: a unit that reads is consistent in itself: counts add up, names stay inside the unit's folder.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

from scalekd_cache.errors import UserError
from scalekd_cache.store.base import BACKENDS, FORMAT_VERSION, MAX_UNIT_SAMPLES, check_key, damaged
from scalekd_cache.store.checked_files import read_file, read_json, unreadable
from scalekd_cache.store.files import FileFact
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.remote import pin_files, size_of

HEX64 = re.compile(r"[0-9a-f]{64}")
P = TypeVar("P", bound=StoredPath)


@dataclass(frozen=True, kw_only=True)
class UnitInfo:
    """What unit.json holds."""

    format: int
    fingerprint: str
    backend: str
    group: int
    range_id: int
    start: int
    """First image of the range, in the canonical order of the group."""
    stop: int
    """One past the last."""
    views: list[int]
    count: int
    """Records in each shard: stop - start - len(skipped)."""
    skipped: list[dict[str, str]]
    """{key, reason} of images that could not be read."""
    files: dict[str, FileFact]
    """Every file but unit.json: length and sha256."""
    payload_bytes: dict[str, int]
    """Bytes on disk of pixels, features and target, all views together."""
    fidelity: dict[str, Any]
    versions: dict[str, str]


def unit_folder(root: P, group: int, range_id: int) -> P:
    """Where a unit lies."""
    assert min(group, range_id) >= 0, (group, range_id)
    return root / "units" / f"g{group:03d}-r{range_id:05d}"


def info_text(info: UnitInfo) -> str:
    """The JSON text of unit.json."""
    fields = {field.name: getattr(info, field.name) for field in dataclasses.fields(info)}
    fields["files"] = {name: fact._asdict() for name, fact in sorted(info.files.items())}
    return json.dumps(fields, indent=1, allow_nan=False) + "\n"


def read_unit(folder: StoredPath) -> tuple[UnitInfo, bytes]:
    """unit.json, checked, and its bytes. UserError when missing, damaged, or of another format version."""
    path = folder / "unit.json"
    fields, data = read_json(path, "the sidecar of a unit")
    if fields.get("format") != FORMAT_VERSION:
        raise UserError(
            "this version does not read the unit's format",
            got=fields.get("format"),
            expected=FORMAT_VERSION,
            where=path,
            fix="use the version of scalekd-cache that wrote the cache",
        )
    check_fields(fields, UnitInfo, path)
    if not all(_is_fact(fact) for fact in fields["files"].values()):
        raise damaged("bad files in a sidecar", "not {bytes, sha256}", "{name: {bytes, sha256}}", path)
    info = UnitInfo(**{**fields, "files": {name: FileFact(**fact) for name, fact in fields["files"].items()}})
    _check_unit(info, path)
    pin_files(folder, info.files)
    return info, data


def _is_fact(fact: Any) -> bool:
    return (
        isinstance(fact, dict)
        and set(fact) == {"bytes", "sha256"}
        and type(fact["bytes"]) is int
        and 0 <= fact["bytes"] < 2**62
        and isinstance(fact["sha256"], str)
        and HEX64.fullmatch(fact["sha256"]) is not None
    )


def _check_unit(info: UnitInfo, path: StoredPath) -> None:
    numbers = [info.group, info.range_id, info.start, *info.views]
    skips = all(isinstance(row, dict) and {"key", "reason"} == set(row) for row in info.skipped)
    whole = all(type(number) is int and 0 <= number < 2**40 for number in numbers)
    payload = info.payload_bytes
    checks = {
        "backend": info.backend in BACKENDS,
        "group, range_id, start, views": whole,
        "views": whole and 0 < len(info.views) == len(set(info.views)) <= 10_000,
        "payload_bytes": payload.keys() == {"pixels", "features", "target"}
        and all(type(number) is int and number >= 0 for number in payload.values()),
        "range": 0 < info.stop - info.start <= MAX_UNIT_SAMPLES,
        "skipped": skips,
        "count": 0 <= info.count == info.stop - info.start - len(info.skipped),
        "files": "keys.txt" in info.files and all(_is_inside(name) for name in info.files),
        "name": path.parent.name.startswith(".tmp-")
        or path.parent == unit_folder(path.parents[2], info.group, info.range_id),
    }
    wrong = [name for name, right in checks.items() if not right]
    if wrong:
        raise damaged("bad values in a sidecar", f"{', '.join(wrong)} out of range", "what a writer wrote", path)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and str(path) == name and "\\" not in name


def check_fields(fields: Mapping[str, Any], kind: Any, path: StoredPath) -> None:
    """Refuse JSON whose names or types are not those of the dataclass `kind`; containers are up to the caller."""
    expected = {field.name: field.type for field in dataclasses.fields(kind)}
    missing, unknown = sorted(expected.keys() - fields.keys()), sorted(fields.keys() - expected.keys())
    if missing or unknown:
        raise damaged("wrong fields", f"missing {missing}, unknown {unknown}", sorted(expected), path)
    for name, annotation in expected.items():
        container: Any = getattr(annotation, "__origin__", annotation)
        if type(fields[name]) is not container:
            raise damaged(f"field {name} has the wrong type", type(fields[name]).__name__, container.__name__, path)


def sizes_differ(folder: StoredPath, files: Mapping[str, FileFact]) -> list[tuple[str, str]]:
    """Files that are missing or have another length: (name, what is wrong)."""
    wrong = []
    for name, fact in files.items():
        try:
            size = size_of(folder / name)
        except (FileNotFoundError, NotADirectoryError):
            wrong.append((name, f"missing, should have {fact.bytes} bytes"))
            continue
        except OSError as error:  # a link loop, no permission, a disk that fails
            wrong.append((name, f"cannot be read: {error.strerror}"))
            continue
        if size not in (fact.bytes, None):
            wrong.append((name, f"{size} bytes, should have {fact.bytes}"))
    return wrong


def read_keys(folder: StoredPath, info: UnitInfo) -> list[str]:
    """Keys of a unit's records, in order. UserError when there are not `count` good ones."""
    path = folder / "keys.txt"
    expected = info.files["keys.txt"].bytes
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise damaged("the keys of a unit are missing", "no file", f"{expected} bytes", path) from None
    except OSError as error:
        raise unreadable(error, path, "keys.txt") from error
    if found != expected:
        raise damaged("the keys of a unit have the wrong length", found, f"{expected} bytes", path)
    try:
        keys = read_file(path, "keys.txt", expected).decode("utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise damaged("the keys of a unit cannot be read", error, "UTF-8", path) from error
    if len(keys) != info.count:
        raise damaged("a unit has the wrong number of keys", len(keys), info.count, path)
    return [check_key(key, path) for key in keys]
