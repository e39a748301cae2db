"""unit.json, the commit record of a work unit.

In: what a writer knows when its shards are on disk. Out: a checked `UnitInfo`.
Invariant: a unit that reads is consistent in itself: counts add up, names stay inside the unit's folder.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, NotRequired, TypeVar

from pydantic import Field, FiniteFloat, PlainValidator, TypeAdapter
from typing_extensions import TypedDict

from scalekd_cache.errors import UserError
from scalekd_cache.store.base import BACKENDS, MAX_UNIT_SAMPLES, MAX_VIEWS, REPAIR, check_key, check_version, damaged
from scalekd_cache.store.checked_files import checked, read_file, read_json
from scalekd_cache.store.durable_files import FileFact
from scalekd_cache.store.fidelity_summary import Summary
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.remote.remote_path import pin_files, size_of

WHAT = "the sidecar of a unit"
UNIT_BYTES = 1 << 25
"""Longest unit.json: 65,536 images that were skipped, with keys and reasons, or 200,000 files."""
FILE_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}(/[A-Za-z0-9._-]{1,200}){0,4}")
Whole = Annotated[int, Field(ge=0, lt=2**40)]
P = TypeVar("P", bound=StoredPath)


class Figures(TypedDict):
    """A measure over records."""

    mean: FiniteFloat
    p1: NotRequired[FiniteFloat]
    """1st percentile, of measures that are best when large."""
    p99: NotRequired[FiniteFloat]
    count: Whole


def _figures(value: object) -> object:
    return TypeAdapter(dict[str, Figures]).validate_python(value, strict=True, extra="forbid")


Fidelity = Annotated[Summary, PlainValidator(_figures)]
"""Measures by name; counts stay whole numbers."""


@dataclass(frozen=True, kw_only=True)
class UnitInfo:
    """What unit.json holds."""

    format: int
    fingerprint: str
    backend: str
    group: Whole
    range_id: Whole
    start: Whole
    """First image of the range, in the canonical order of the group."""
    stop: Whole
    """One past the last."""
    views: list[Whole]
    count: int
    """Records in each shard: stop - start - len(skipped)."""
    skipped: list[dict[str, str]]
    """{key, reason} of images that could not be read."""
    files: dict[str, FileFact]
    """Every file but unit.json: length and sha256."""
    payload_bytes: dict[str, Whole]
    """Bytes on disk of pixels, features and target, all views together."""
    fidelity: Fidelity
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
    fields, data = read_json(path, WHAT, UNIT_BYTES, fix="run `make cache-teacher`: it continues")
    check_version(fields, path, "format")
    info = checked(data, UnitInfo, WHAT, path)
    _check_unit(info, path)
    pin_files(folder, info.files)
    return info, data


def _check_unit(info: UnitInfo, path: StoredPath) -> None:
    checks = {
        "backend": info.backend in BACKENDS,
        "views": 0 < len(info.views) == len(set(info.views)) <= MAX_VIEWS,
        "payload_bytes": info.payload_bytes.keys() == {"pixels", "features", "target"},
        "range": 0 < info.stop - info.start <= MAX_UNIT_SAMPLES,
        "skipped": all({"key", "reason"} == row.keys() for row in info.skipped),
        "count": 0 <= info.count == info.stop - info.start - len(info.skipped),
        "files": "keys.txt" in info.files and all(map(_is_inside, info.files)),
        "name": path.parent.name.startswith(".tmp-")
        or path.parent == unit_folder(path.parents[2], info.group, info.range_id),
    }
    wrong = [name for name, right in checks.items() if not right]
    if wrong:
        raise damaged("bad values in a sidecar", f"{', '.join(wrong)} out of range", "what a writer wrote", path)


def _is_inside(name: str) -> bool:
    """Whether a file's name is one that writers give: plain letters, no part too long for a disk, inside the folder."""
    return FILE_NAME.fullmatch(name) is not None and not {".", ".."} & set(name.split("/"))


def sizes_differ(folder: StoredPath, files: Mapping[str, FileFact]) -> list[tuple[str, str]]:
    """Files that are missing or have another length: (name, what is wrong)."""
    wrong = []
    for name, fact in files.items():
        try:
            size = size_of(folder / name)
        except FileNotFoundError:
            wrong.append((name, f"missing, should have {fact.bytes} bytes"))
            continue
        except UserError as error:
            wrong.append((name, str(error)))
            continue
        if size not in (fact.bytes, None):
            wrong.append((name, f"{size} bytes, should have {fact.bytes}"))
    return wrong


def read_keys(folder: StoredPath, info: UnitInfo) -> list[str]:
    """Keys of a unit's records, in order. UserError when there are not `count` good ones."""
    path = folder / "keys.txt"
    expected = info.files["keys.txt"].bytes
    data = read_file(path, "the keys of a unit", expected, fix=REPAIR)
    if len(data) != expected:
        raise damaged("the keys of a unit have the wrong length", len(data), f"{expected} bytes", path)
    try:
        keys = data.decode("utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise damaged("the keys of a unit cannot be read", error, "UTF-8", path) from error
    if len(keys) != info.count:
        raise damaged("a unit has the wrong number of keys", len(keys), info.count, path)
    return [check_key(key, path) for key in keys]
