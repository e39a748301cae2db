"""unit.json, a work unit's commit record (sidecar).

In: the facts about a unit whose shards are on disk. Out: a checked `UnitInfo`.
Invariant: sidecars returned by `read_unit` are consistent: counts add up, and file names stay inside the unit's folder.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, NotRequired, TypeVar

from pydantic import Field, FiniteFloat, PlainValidator, TypeAdapter
from typing_extensions import TypedDict

from scalekd_cache.errors import UserError, counted
from scalekd_cache.store.base import (
    BACKENDS,
    MAX_UNIT_SAMPLES,
    MAX_VIEWS,
    check_key,
    check_version,
    damaged,
    repair_fix,
)
from scalekd_cache.store.checked_files import checked, read_file, read_json
from scalekd_cache.store.durable_files import FileHash
from scalekd_cache.store.fidelity_summary import Summary
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.remote.remote_path import pin_files, size_of

WHAT = "a unit's sidecar"
UNIT_BYTES = 1 << 25
"""Maximum size of unit.json: enough for 65,536 skipped images with keys and reasons, or for 200,000 files."""
FILE_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}(/[A-Za-z0-9._-]{1,200}){0,4}")
Whole = Annotated[int, Field(ge=0, lt=2**40)]
P = TypeVar("P", bound=StoredPath)


class MetricSummary(TypedDict):
    """Summary of a metric over records."""

    mean: FiniteFloat
    p1: NotRequired[FiniteFloat]
    """1st percentile, for metrics where larger is better."""
    p99: NotRequired[FiniteFloat]
    """99th percentile, for metrics where smaller is better."""
    count: Whole


def _summaries(value: object) -> object:
    return TypeAdapter(dict[str, MetricSummary]).validate_python(value, strict=True, extra="forbid")


Fidelity = Annotated[Summary, PlainValidator(_summaries)]
"""Metric summaries, keyed by name; counts stay integers."""


@dataclass(frozen=True, kw_only=True)
class UnitInfo:
    """The fields of unit.json."""

    format: int
    fingerprint: str
    backend: str
    group: Whole
    range_id: Whole
    start: Whole
    """First image in the range, in the group's canonical order."""
    stop: Whole
    """One past the last image."""
    views: list[Whole]
    count: int
    """Number of records in each shard: stop - start - len(skipped)."""
    skipped: list[dict[str, str]]
    """{key, reason} for each image skipped because it could not be read."""
    files: dict[str, FileHash]
    """Length and SHA-256 of each file except unit.json."""
    payload_bytes: dict[str, Whole]
    """Number of bytes on disk for pixels, features and target, summed over all views."""
    fidelity: Fidelity
    versions: dict[str, str]


def unit_folder(root: P, group: int, range_id: int) -> P:
    """A unit's folder."""
    assert min(group, range_id) >= 0, (group, range_id)
    return root / "units" / f"g{group:03d}-r{range_id:05d}"


def sidecar_text(info: UnitInfo) -> str:
    """The JSON text of unit.json."""
    fields = {field.name: getattr(info, field.name) for field in dataclasses.fields(info)}
    fields["files"] = {name: fact._asdict() for name, fact in sorted(info.files.items())}
    return json.dumps(fields, indent=1, allow_nan=False) + "\n"


def read_unit(folder: StoredPath) -> tuple[UnitInfo, bytes]:
    """The checked unit.json and its bytes. Raises `UserError` if it is missing, damaged or has a different format
    version."""
    path = folder / "unit.json"
    fields, data = read_json(path, WHAT, UNIT_BYTES, fix="rerun `scalekd cache-teacher`, which resumes")
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
        "files": "keys.txt" in info.files and all(map(is_inside, info.files)),
        "name": path.parent.name.startswith(".tmp-")
        or path.parent == unit_folder(path.parents[2], info.group, info.range_id),
    }
    wrong = [name for name, right in checks.items() if not right]
    if wrong:
        raise damaged("invalid values in a sidecar", f"out of range: {', '.join(wrong)}", "valid values", path)


def is_inside(name: str) -> bool:
    """Whether writers could have created this file name: plain characters, no overlong part, and inside the folder."""
    return FILE_NAME.fullmatch(name) is not None and not {".", ".."} & set(name.split("/"))


def wrong_sizes(folder: StoredPath, files: Mapping[str, FileHash]) -> list[tuple[str, str]]:
    """(name, problem) for each file that is missing or has the wrong length."""
    wrong = []
    for name, fact in files.items():
        try:
            size = size_of(folder / name)
        except FileNotFoundError:
            wrong.append((name, f"missing, expected {counted(fact.bytes, 'byte')}"))
            continue
        except UserError as error:
            wrong.append((name, str(error)))
            continue
        if size not in (fact.bytes, None):
            wrong.append((name, f"{counted(size, 'byte')}, expected {fact.bytes}"))
    return wrong


def read_keys(folder: StoredPath, info: UnitInfo) -> list[str]:
    """Sample keys of a unit's records, in order. Raises `UserError` unless there are `count` valid keys."""
    path = folder / "keys.txt"
    expected = info.files["keys.txt"].bytes
    data = read_file(path, "a unit's key list", expected, fix=repair_fix(path))
    if len(data) != expected:
        raise damaged("a unit's list of keys has the wrong length", len(data), f"{expected} bytes", path)
    try:
        keys = data.decode("utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise damaged("cannot read a unit's key list", error, "UTF-8", path) from error
    if len(keys) != info.count:
        raise damaged("a unit has the wrong number of keys", len(keys), info.count, path)
    return [check_key(key, path) for key in keys]
