"""Looks for everything that can be wrong with a cache on disk, and goes on after the first finding.

In: a cache's folder. Out: a list of problems, empty for a cache that is whole.
Invariant: the fast check reads sidecars and lengths; the deep one reads every byte (sha256 of every file) and every
record (crc32c), and names the samples of a shard that differs.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scalekd_cache.errors import UserError
from scalekd_cache.store.base import ShardReader
from scalekd_cache.store.files import fact_of
from scalekd_cache.store.manifest import Manifest, UnitRow, read_manifest
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.reader import open_shard
from scalekd_cache.store.remote import open_anew
from scalekd_cache.store.sidecar import UnitInfo, read_keys, read_unit, sizes_differ, unit_folder

BATCH_RECORDS = 64
MAX_NAMED = 20
"""Damaged samples of one shard that are named; the rest is counted."""


class Problem(NamedTuple):
    """One finding."""

    where: str
    """File or folder, relative to the cache."""
    key: str | None
    """The sample, where it is known."""
    what: str


def verify_cache(
    place: Path | str, deep: bool = False, progress: Callable[[int, int], None] | None = None
) -> list[Problem]:
    """Check a cache.

    Args:
        place: the cache's folder or URL.
        deep: read every file and record too.
        progress: called with (units done, units in all).
    """
    root = open_anew(place)
    try:
        manifest = read_manifest(root)
    except UserError as error:
        return [Problem("manifest.json", None, str(error))]
    problems = list(_tail_problems(root, manifest, deep))
    for number, row in enumerate(manifest.units):
        problems += _unit_problems(root, manifest, row, deep)
        if progress is not None:
            progress(number + 1, len(manifest.units))
    return problems


def _tail_problems(root: StoredPath, manifest: Manifest, deep: bool) -> Iterator[Problem]:
    path = root / "tail.safetensors"
    if not manifest.tail_sha256:
        return
    if not path.is_file():
        yield Problem(path.name, None, "missing")
    elif deep and (what := _hash_problem(path, manifest.tail_sha256, "manifest")):
        yield Problem(path.name, None, what)


def _hash_problem(path: StoredPath, sha256: str, pinned_by: str) -> str | None:
    """What is wrong with a file's bytes; those of a remote one are checked as they arrive."""
    try:
        return None if fact_of(path).sha256 == sha256 else f"sha256 differs from the {pinned_by}'s"
    except UserError as error:
        return str(error)


def _unit_problems(root: StoredPath, manifest: Manifest, row: UnitRow, deep: bool) -> Iterator[Problem]:
    folder = unit_folder(root, row.group, row.range_id)
    name = folder.relative_to(root).as_posix()
    try:
        info, data = read_unit(folder)
        read_keys(folder, info)
    except UserError as error:
        yield Problem(f"{name}/unit.json", None, str(error))
        return
    if hashlib.sha256(data).hexdigest() != row.sha256:
        yield Problem(f"{name}/unit.json", None, "sha256 differs from the manifest's")
    if info.fingerprint != manifest.fingerprint:
        yield Problem(f"{name}/unit.json", None, f"fingerprint {info.fingerprint} is not {manifest.fingerprint}")
    wrong = sizes_differ(folder, info.files)
    yield from (Problem(f"{name}/{file}", None, what) for file, what in wrong)
    if deep:
        short = {file for file, _ in wrong}
        for file, fact in info.files.items():
            if file not in short and (what := _hash_problem(folder / file, fact.sha256, "sidecar")):
                yield Problem(f"{name}/{file}", None, what)
        for view in info.views:
            yield from _record_problems(root, manifest, row, view, info)


def _record_problems(
    root: StoredPath, manifest: Manifest, row: UnitRow, view: int, info: UnitInfo
) -> Iterator[Problem]:
    where = f"{unit_folder(root, row.group, row.range_id).relative_to(root).as_posix()}/v{view:04d}"
    try:
        reader = open_shard(root, manifest, row, view)
    except UserError as error:
        yield Problem(where, None, str(error))
        return
    bad = 0
    for start in range(0, info.count, BATCH_RECORDS):
        rows = np.arange(start, min(start + BATCH_RECORDS, info.count))
        if _reading_error(reader, rows) is None:
            continue
        for one in rows.tolist():  # find out which of them
            found = _reading_error(reader, np.array([one]))
            bad += found is not None
            if found is not None and bad <= MAX_NAMED:
                yield Problem(where, reader.keys[one], found)
    if bad > MAX_NAMED:
        yield Problem(where, None, f"{bad - MAX_NAMED} more damaged samples")
    reader.close()


def _reading_error(reader: ShardReader, rows: NDArray[np.int64]) -> str | None:
    try:
        reader.read(rows)
    except UserError as error:
        return str(error)
    return None
