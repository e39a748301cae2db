"""Looks for everything that can be wrong with one work unit.

In: the folder of a unit and what it must be. Out: problems, each with its file and, where it is known, its sample.
Invariant: the deep check reads every byte and every record of the unit, and never fails on what it finds there.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scalekd_cache.errors import UserError
from scalekd_cache.store.base import Record, ShardId, ShardReader, shard_reader
from scalekd_cache.store.durable_files import fact_of
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.remote.remote_path import size_of
from scalekd_cache.store.sidecar import UnitInfo, read_keys, read_unit, sizes_differ, unit_folder

BATCH_RECORDS = 64
MAX_NAMED = 20
"""Damaged samples of one shard that are named; the rest is counted."""


class Part(Enum):
    """What a problem belongs to, and so what mends it."""

    UNIT = "unit"
    """Make the unit again."""
    MANIFEST = "manifest"
    PLAN = "plan"
    TAIL = "tail"
    KEPT = "kept"
    """What was fitted or taken over once, for all units: restore the file from a copy of the cache, or try whether it
    comes out the same again."""
    MARK = "mark"
    """Which preset a codec was fitted for: it follows from the codec."""
    UNFINISHED = "unfinished"
    """Go on with stage 1."""
    PIXELS = "pixels"
    """Repair the cache whose pixels are shared."""
    UNKNOWN_FILE = "stranger"
    """Nothing of the cache's own: whoever put it there takes it away."""


class Problem(NamedTuple):
    """One finding."""

    where: str
    """File or folder, relative to the cache."""
    key: str | None
    """The sample, where it is known."""
    what: str
    part: Part
    unit: tuple[int, int] | None = None
    """(group, range) of the unit it lies in."""


class Finding(NamedTuple):
    """What is wrong with a record."""

    key: str | None
    """The sample; None for what concerns many of them."""
    what: str
    part: Part = Part.UNIT


CheckRecords = Callable[[list[Record], ShardId, list[int]], list[Finding]]
"""Looks into whole records: some of a shard, with their rows in it."""


class ExpectedUnit(NamedTuple):
    """What a unit must be."""

    group: int
    range_id: int
    fingerprint: str
    backend: str
    views: list[int]
    bounds: tuple[int, int] | None
    """First image of the range and one past the last, where the plan says so."""
    records: int | None = None
    """Records in each shard, where the manifest says so (an image that cannot be read is left out)."""
    sha256: str | None = None
    """Of unit.json, where the manifest says so."""

    @property
    def place(self) -> tuple[int, int]:
        """(group, range)."""
        return self.group, self.range_id


def unit_problems(
    root: StoredPath, unit: ExpectedUnit, *, deep: bool, check_records: CheckRecords | None = None
) -> Iterator[Problem]:
    """Check one unit.

    Args:
        root: the cache's folder or URL.
        unit: what it must be.
        deep: read every file and record too.
        check_records: looks into the records whose checksum is right.
    """
    folder = unit_folder(root, unit.group, unit.range_id)
    name = folder.relative_to(root).as_posix()

    def found(file: str, what: str, key: str | None = None, part: Part = Part.UNIT) -> Problem:
        return Problem(f"{name}/{file}", key, what, part, unit.place)

    try:
        info, data = read_unit(folder)
    except UserError as error:
        yield found("unit.json", str(error))
        return
    if unit.sha256 is not None and hashlib.sha256(data).hexdigest() != unit.sha256:
        yield found("unit.json", "sha256 differs from the manifest's")
    for field, got, wanted in _facts(info, unit):
        if got != wanted and wanted is not None:
            yield found("unit.json", f"{field} is {got}, should be {wanted}")
    wrong = sizes_differ(folder, info.files)
    yield from (found(file, what) for file, what in wrong)
    yield from (found(file, "not of this unit", part=Part.UNKNOWN_FILE) for file in _unknown_files(folder, info))
    if deep:
        short = {file for file, _ in wrong}
        for file, fact in info.files.items():
            if file not in short and (what := hash_problem(folder / file, fact.sha256, "sidecar")):
                yield found(file, what)
    try:
        keys = read_keys(folder, info)
    except UserError as error:
        yield found("keys.txt", str(error))
        return
    if deep:
        for view in info.views:
            for finding in _record_problems(folder, info, view, keys, check_records):
                yield found(f"v{view:04d}", finding.what, finding.key, finding.part)


def file_problem(path: StoredPath) -> str | None:
    """Why a file cannot be read, without reading it."""
    try:
        size_of(path)
    except FileNotFoundError:
        return "missing"
    except UserError as error:
        return str(error)
    return None


def hash_problem(path: StoredPath, sha256: str, pinned_by: str) -> str | None:
    """What is wrong with a file's bytes; those of a remote one are checked as they arrive."""
    try:
        return None if fact_of(path).sha256 == sha256 else f"sha256 differs from the {pinned_by}'s"
    except (UserError, OSError) as error:
        return str(error)


def _facts(info: UnitInfo, unit: ExpectedUnit) -> list[tuple[str, object, object]]:
    return [
        ("fingerprint", info.fingerprint, unit.fingerprint),
        ("backend", info.backend, unit.backend),
        ("views", info.views, unit.views),
        ("range", (info.start, info.stop), unit.bounds),
        ("count", info.count, unit.records),
    ]


def _unknown_files(folder: StoredPath, info: UnitInfo) -> Iterator[str]:
    """Files that the sidecar does not list, and folders that hold none that it does; a server has no lists."""
    if not isinstance(folder, Path):
        return
    files = {"unit.json", *info.files}
    folders = {parent.as_posix() for name in files for parent in Path(name).parents}
    for path in _inside(folder):
        name = path.relative_to(folder).as_posix()
        if name not in (folders if path.is_dir() and not path.is_symlink() else files):
            yield name


def _inside(folder: Path) -> list[Path]:
    """Everything in a folder; what cannot be listed is left out (its files are missing then)."""
    with contextlib.suppress(OSError):
        return sorted(folder.rglob("*"))
    return []


def _record_problems(
    folder: StoredPath, info: UnitInfo, view: int, keys: list[str], check_records: CheckRecords | None
) -> Iterator[Finding]:
    """What is wrong with the records of a shard."""
    try:
        reader = shard_reader(info.backend, folder, ShardId(info.group, info.range_id, view), keys)
    except (UserError, OSError) as error:
        yield Finding(None, str(error))
        return
    bad = dict.fromkeys(Part, 0)
    for start in range(0, info.count, BATCH_RECORDS):
        rows = np.arange(start, min(start + BATCH_RECORDS, info.count))
        for finding in _batch_problems(reader, rows, check_records):
            bad[finding.part] += 1
            if bad[finding.part] <= MAX_NAMED:
                yield finding
    for part, count in bad.items():
        if count > MAX_NAMED:
            yield Finding(None, f"{count - MAX_NAMED} more damaged samples", part)
    reader.close()


def _batch_problems(
    reader: ShardReader, rows: NDArray[np.int64], check_records: CheckRecords | None
) -> Iterator[Finding]:
    good: list[int] = rows.tolist()
    try:
        records = reader.read(rows)
    except (UserError, OSError):
        records, good = [], []
        for row in rows.tolist():  # find out which of them
            try:
                records += reader.read(np.array([row]))
                good.append(row)
            except (UserError, OSError) as error:
                yield Finding(reader.keys[row], str(error))
    if records and check_records is not None:
        yield from check_records(records, reader.shard, good)
