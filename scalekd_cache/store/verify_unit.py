"""Verifies one work unit and reports every problem.

In: a unit's folder and its expected contents. Out: problems that name the file and, if known, the sample.
Invariant: the deep check reads every byte and record in the unit, and no kind of damage makes it raise an error.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scalekd_cache.errors import UserError, counted
from scalekd_cache.store.base import Record, ShardId, ShardReader, shard_reader
from scalekd_cache.store.checked_files import check_safetensors
from scalekd_cache.store.durable_files import hash_file
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.remote.remote_path import size_of
from scalekd_cache.store.sidecar import UnitInfo, read_keys, read_unit, unit_folder, wrong_sizes

BATCH_RECORDS = 64
MAX_NAMED = 20
"""Maximum number of damaged samples listed per shard; the rest are counted."""


class Part(Enum):
    """The damaged part of a cache, which determines how `repair` fixes it."""

    UNIT = "unit"
    """Rebuild the unit."""
    MANIFEST = "manifest"
    PLAN = "plan"
    TEACHER = "tail"
    """A file that holds part of the teacher or its outputs."""
    CODEC_STATE = "kept"
    """A file needed to decode all units (codec state, classifier): restore it from a copy of the cache, or refit it and
    compare its SHA-256."""
    CODEC_CHOICE = "mark"
    """The codec selection record: rewrite it from the codec."""
    UNFINISHED = "unfinished"
    """Resume stage 1."""
    PIXELS = "pixels"
    """Repair the cache whose pixels are shared."""
    UNKNOWN_FILE = "stranger"
    """A file that does not belong to the cache: the user removes it."""


class Problem(NamedTuple):
    """A problem in a cache."""

    where: str
    """File or folder, relative to the cache."""
    key: str | None
    """The sample key, if known."""
    what: str
    part: Part
    unit: tuple[int, int] | None = None
    """(group, range) of the affected unit."""


class RecordProblem(NamedTuple):
    """A problem in a record."""

    key: str | None
    """The sample key; None for a problem that affects multiple records."""
    what: str
    part: Part = Part.UNIT


CheckRecords = Callable[[list[Record], ShardId, list[int]], list[RecordProblem]]
"""Checks the contents of a shard's records in the given rows."""


class ExpectedUnit(NamedTuple):
    """The expected contents of a unit."""

    group: int
    range_id: int
    fingerprint: str
    backend: str
    views: list[int]
    bounds: tuple[int, int] | None
    """First image in the range and one past the last, from the plan."""
    records: int | None = None
    """Number of records in each shard, from the manifest (images that could not be read are skipped)."""
    sha256: str | None = None
    """SHA-256 of unit.json, from the manifest."""

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
        unit: the expected contents.
        deep: also read every file and record.
        check_records: checks the contents of the records whose checksums are correct.
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
            yield found("unit.json", f"{field} is {got}, expected {wanted}")
    wrong = wrong_sizes(folder, info.files)
    yield from (found(file, what) for file, what in wrong)
    yield from (
        found(file, "does not belong to this unit", part=Part.UNKNOWN_FILE) for file in _unknown_files(folder, info)
    )
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
    """Why a file cannot be opened, or how a .safetensors file's length contradicts its header; None if it is intact.

    Only that header is read, and no file is downloaded.
    """
    try:
        size_of(path)
        if isinstance(path, Path) and path.suffix == ".safetensors":
            check_safetensors(path)
    except FileNotFoundError:
        return "missing"
    except UserError as error:
        return str(error)
    return None


def hash_problem(path: StoredPath, sha256: str, pinned_by: str) -> str | None:
    """Why a file does not have this SHA-256; None if it does. Remote files are checked when downloaded."""
    try:
        return None if hash_file(path).sha256 == sha256 else f"sha256 differs from the {pinned_by}'s"
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
    """Files not listed in the sidecar, and folders without any listed file; remote folders cannot be listed."""
    if not isinstance(folder, Path):
        return
    files = {"unit.json", *info.files}
    folders = {parent.as_posix() for name in files for parent in Path(name).parents}
    for path in _inside(folder):
        name = path.relative_to(folder).as_posix()
        if name not in (folders if path.is_dir() and not path.is_symlink() else files):
            yield name


def _inside(folder: Path) -> list[Path]:
    """Everything in a folder; empty if the folder cannot be listed (its files are then reported as missing)."""
    with contextlib.suppress(OSError):
        return sorted(folder.rglob("*"))
    return []


def _record_problems(
    folder: StoredPath, info: UnitInfo, view: int, keys: list[str], check_records: CheckRecords | None
) -> Iterator[RecordProblem]:
    """The problems in a shard's records."""
    try:
        reader = shard_reader(info.backend, folder, ShardId(info.group, info.range_id, view), keys)
    except (UserError, OSError) as error:
        yield RecordProblem(None, str(error))
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
            yield RecordProblem(None, counted(count - MAX_NAMED, "more damaged sample"), part)
    reader.close()


def _batch_problems(
    reader: ShardReader, rows: NDArray[np.int64], check_records: CheckRecords | None
) -> Iterator[RecordProblem]:
    good: list[int] = rows.tolist()
    try:
        records = reader.read(rows)
    except (UserError, OSError):
        records, good = [], []
        for row in rows.tolist():  # find the damaged records
            try:
                records += reader.read(np.array([row]))
                good.append(row)
            except (UserError, OSError) as error:
                yield RecordProblem(reader.keys[row], str(error))
    if records and check_records is not None:
        yield from check_records(records, reader.shard, good)
