"""Looks for everything that can be wrong with a cache, and goes on after the first finding.

In: a cache's folder, finished or not, or its URL. Out: `Findings`, without problems for a cache that is whole.
Invariant: the fast check reads sidecars and lengths and lists folders; the deep one reads every byte (sha256 of every
file) and every record (crc32c), and names the samples of a shard that differs. Nothing on disk is changed.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from scalekd_cache.errors import UserError
from scalekd_cache.store.checked_files import checked_value, is_there, read_json
from scalekd_cache.store.manifest import NAME as MANIFEST
from scalekd_cache.store.manifest import STATE, TAIL, Manifest, kept_files, read_manifest
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.plan import NAME as PLAN
from scalekd_cache.store.plan import Plan, read_plan
from scalekd_cache.store.remote.remote_path import RemotePath, open_anew
from scalekd_cache.store.resume import mismatched_units
from scalekd_cache.store.sealed_json import unsealed
from scalekd_cache.store.sidecar import read_unit, unit_folder
from scalekd_cache.store.verify_unit import (
    MAX_NAMED,
    CheckRecords,
    ExpectedUnit,
    Part,
    Problem,
    file_problem,
    hash_problem,
    unit_problems,
)

UNITS = "units"
MARK = "codec.json"
"""What a codec was fitted for or chosen by; only writers read it (`calibration.py`)."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What codec.json holds."""

    preset: str
    teacher: str
    """Digest of its weights."""
    codec: dict[str, Any]
    chosen_from: list[dict[str, Any]]


def read_mark(root: StoredPath) -> Mark:
    """codec.json, checked. UserError when missing or damaged."""
    path, what = root / MARK, "the preset of the codec"
    return checked_value(unsealed(*read_json(path, what), path), Mark, what, path)


class Expected(NamedTuple):
    """What must be on disk, from the manifest and the plan."""

    fields: dict[str, Any]
    """Everything that the fingerprint is made of."""
    units: list[ExpectedUnit]
    tail_sha256: str
    """Of the tail's file; empty without a tail."""
    finished: bool
    """Whether there is a manifest: without one, units that are missing are only not made yet."""


class Findings(NamedTuple):
    """What a check has found."""

    problems: list[Problem]
    notes: list[str]
    """What is worth knowing and no damage."""
    units: int
    """Units that were looked at."""
    expected: Expected | None
    """What was expected; None when neither manifest nor plan can be read."""


def verify_cache(
    place: Path | str, deep: bool = False, progress: Callable[[int, int], None] | None = None
) -> list[Problem]:
    """The problems of a cache; see `check_cache`."""
    return check_cache(place, deep=deep, progress=progress).problems


def check_cache(
    place: Path | str | RemotePath,
    *,
    deep: bool = False,
    make_checker: Callable[[Expected], CheckRecords] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Findings:
    """Check a cache, or as much of one as there is.

    Args:
        place: the cache's folder or URL; of a URL every file is fetched anew.
        deep: read every file and record too.
        make_checker: makes the function that looks into records (`audit/records.py`), once it is known what to expect.
        progress: called with (units done, units in all).
    """
    root = open_anew(place)
    problems, notes = list[Problem](), list[str]()
    expected = _expected(root, problems, notes)
    if isinstance(root, Path):
        problems += _unknown_files(root, expected, notes)
    else:
        notes.append("a server has no list of its files: only those of the cache were looked at")
    if expected is None:
        return Findings(problems, notes, 0, None)
    problems += _tail_problems(root, expected.tail_sha256, deep)
    kept = list(_kept_problems(root, expected, deep))
    lost = [problem.where for problem in kept if problem.part is Part.KEPT]
    if lost:
        notes.append(f"records are not decoded: {', '.join(lost)} cannot be used")
    problems += kept
    check_records = make_checker(expected) if make_checker is not None and deep and not lost else None
    there = [unit for unit in expected.units if _is_there(root, unit)]
    problems += _missing(expected, there, notes)
    for number, unit in enumerate(there):
        problems += unit_problems(root, unit, deep=deep, check_records=check_records)
        if progress is not None:
            progress(number + 1, len(there))
    if isinstance(root, Path):
        problems += _other_images(root, expected, bad_units(problems))
    return Findings(problems, notes, len(there), expected)


def _other_images(root: Path, expected: Expected, bad: Sequence[tuple[int, int]]) -> Iterator[Problem]:
    """Units of later view groups that leave out other images than the first one; it must be whole to be compared."""
    places = [unit.place for unit in expected.units if unit.place not in bad and _is_there(root, unit)]
    if any(unit.group == 0 and unit.place not in places for unit in expected.units):
        return
    infos = [read_unit(unit_folder(root, *place))[0] for place in places]
    for place, wrong in mismatched_units(root, infos).items():
        for key, what in list(wrong.items())[:MAX_NAMED]:
            yield Problem(f"{unit_name(place)}/unit.json", key, f"the image is {what}", Part.UNIT, place)


def _is_there(root: StoredPath, unit: ExpectedUnit) -> bool:
    """Whether a unit has its folder; on a server, whether the manifest has it."""
    folder = unit_folder(root, unit.group, unit.range_id)
    return os.path.isdir(folder) if isinstance(folder, Path) else unit.sha256 is not None


def _missing(expected: Expected, there: Sequence[ExpectedUnit], notes: list[str]) -> Iterator[Problem]:
    """Units that should be there; those that only the plan has are no damage."""
    places = {unit.place for unit in there}
    missing = [unit for unit in expected.units if unit.place not in places]
    for unit in missing:
        if unit.sha256 is not None:
            yield Problem(unit_name(unit.place), None, "the unit is missing", Part.UNIT, unit.place)
        elif not expected.finished:
            yield Problem(unit_name(unit.place), None, "not made yet", Part.UNFINISHED, unit.place)
    grown = [unit for unit in missing if unit.sha256 is None]
    if grown and expected.finished:
        notes.append(f"the plan has {len(grown)} more units that are not made yet (`make cache-teacher` makes them)")


def unit_name(place: tuple[int, int]) -> str:
    """The folder of unit (group, range), relative to the cache."""
    return unit_folder(Path(), *place).as_posix()


def _expected(root: StoredPath, problems: list[Problem], notes: list[str]) -> Expected | None:
    """Read manifest and plan; what is wrong with them is a problem, and the other one helps out."""
    manifest: Manifest | None = None
    plan: Plan | None = None
    try:
        manifest = read_manifest(root)
    except UserError as error:
        part = Part.MANIFEST if _exists(root / MANIFEST) else Part.UNFINISHED
        problems.append(Problem(MANIFEST, None, str(error), part))
    if manifest is not None and manifest.teacher["spec"] != manifest.fingerprint_fields["teacher"]:
        problems.append(Problem(MANIFEST, None, "teacher is not that of fingerprint_fields", Part.MANIFEST))
    try:
        plan = read_plan(root)
    except UserError as error:
        # a reader needs no plan: a cache without one is whole, a damaged one is still a finding
        if _exists(root / PLAN) or manifest is None:
            problems.append(Problem(PLAN, None, str(error), Part.PLAN))
        elif isinstance(root, Path):
            notes.append("no plan.json: the cache can be read, and `make repair` writes it again")
    if manifest is not None and plan is not None and (what := _disagree(manifest, plan)):
        problems.append(Problem(PLAN, None, what, Part.PLAN))
        plan = None
    return expected_of(manifest, plan)


def _exists(path: StoredPath) -> bool:
    """Whether something is there; what cannot be asked for counts as there."""
    try:
        return is_there(path)
    except UserError:
        return True


def _disagree(manifest: Manifest, plan: Plan) -> str | None:
    """What of the plan is not the manifest's; a plan may have more groups."""
    facts = plan.facts
    if facts.fingerprint != manifest.fingerprint:
        return f"fingerprint {facts.fingerprint} is not the manifest's, {manifest.fingerprint}"
    if facts.groups[: len(manifest.groups)] != manifest.groups:
        return f"groups {facts.groups} do not begin with the manifest's, {manifest.groups}"
    if len(manifest.units) != len(manifest.groups) * len(facts.ranges[0]):
        return f"{len(facts.ranges[0])} ranges are not the manifest's"
    return None


def expected_of(manifest: Manifest | None, plan: Plan | None) -> Expected | None:
    """The units of the manifest, then those that only the plan has."""
    units = {unit.place: unit for unit in plan.units()} if plan is not None else {}
    if manifest is not None:
        for row in manifest.units:
            planned = units.get(row[:2])
            units[row[:2]] = ExpectedUnit(
                row.group,
                row.range_id,
                manifest.fingerprint,
                manifest.backend,
                manifest.groups[row.group],
                planned.bounds if planned else None,
                row.count,
                row.sha256,
            )
        in_turn = [units[place] for place in sorted(units)]
        return Expected(manifest.fingerprint_fields, in_turn, manifest.tail_sha256, True)
    if plan is None:
        return None
    return Expected(plan.facts.fingerprint_fields, list(units.values()), plan.facts.tail_sha256, False)


def _tail_problems(root: StoredPath, expected: str, deep: bool) -> Iterator[Problem]:
    path = root / TAIL
    if not expected:
        return
    if (what := file_problem(path)) or (deep and (what := hash_problem(path, expected, "manifest"))):
        yield Problem(path.name, None, what, Part.TAIL)


def _kept_problems(root: StoredPath, expected: Expected, deep: bool) -> Iterator[Problem]:
    for name, digest in kept_files(expected.fields).items():
        if (what := file_problem(root / name)) or (deep and (what := hash_problem(root / name, digest, "manifest"))):
            yield Problem(name, None, what, Part.KEPT)
    if isinstance(root, Path) and (STATE in kept_files(expected.fields) or is_there(root / MARK)):
        try:
            if read_mark(root).codec != expected.fields["codec"]:
                yield Problem(MARK, None, "not the manifest's codec", Part.MARK)
        except UserError as error:
            yield Problem(MARK, None, str(error), Part.MARK)


def _unknown_files(root: Path, expected: Expected | None, notes: list[str]) -> Iterator[Problem]:
    """Files and folders that no writer of this cache has made; unfinished work is only noted."""
    known = {MANIFEST, PLAN, UNITS}
    if expected is None or expected.tail_sha256 != "":
        known.add(TAIL)
    kept = {} if expected is None else kept_files(expected.fields)
    known |= {*kept, MARK}
    units = None if expected is None else {unit_folder(root, *unit.place).name for unit in expected.units}
    for folder, names in ((root, known), (root / UNITS, units)):
        for path in _listing(folder, notes):
            where = path.relative_to(root).as_posix()
            if path.name.startswith((".tmp-", ".aside-")):
                notes.append(f"{where}: unfinished or damaged work; readers ignore it")
            elif names is not None and path.name not in names:
                yield Problem(where, None, "not of this cache: nobody reads it; remove it", Part.UNKNOWN_FILE)


def _listing(folder: Path, notes: list[str]) -> list[Path]:
    """What lies in a folder, in order; a note when it cannot be listed."""
    try:
        return sorted(folder.iterdir()) if os.path.isdir(folder) else []
    except OSError as error:
        notes.append(f"{folder} cannot be listed ({error.strerror}): strange files in it were not looked for")
        return []


def bad_units(problems: Sequence[Problem]) -> list[tuple[int, int]]:
    """(group, range) of the units that have to be made again."""
    return sorted({problem.unit for problem in problems if problem.part is Part.UNIT and problem.unit is not None})
