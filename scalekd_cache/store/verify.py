"""Verifies a whole cache and reports every problem, not just the first one.

In: a cache's folder, finished or not, or its URL. Out: `CheckResult`; an intact cache has no problems.
Invariant: the fast check reads sidecars and file lengths and lists folders; the deep check reads every byte (SHA-256 of
every file) and every record (CRC-32C) and names the damaged samples. Nothing on disk is changed.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from scalekd_cache.errors import UserError, counted, shell_command
from scalekd_cache.store.cache_folder import PUBLICATION
from scalekd_cache.store.checked_files import checked_value, is_there, read_json
from scalekd_cache.store.manifest import CARD, HELD_OUT, STATE, TAIL, Manifest, codec_files, read_manifest
from scalekd_cache.store.manifest import NAME as MANIFEST
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.plan import NAME as PLAN
from scalekd_cache.store.plan import Plan, read_plan
from scalekd_cache.store.remote.remote_path import RemotePath, open_uncached
from scalekd_cache.store.resume import mismatched_units
from scalekd_cache.store.sealed_json import unsealed
from scalekd_cache.store.sidecar import UnitInfo, read_keys, read_unit, unit_folder
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
CODEC_FILE = "codec.json"
"""The codec's preset or target; only writers read it (`codec_selection.py`)."""


@dataclass(frozen=True, kw_only=True)
class CodecChoice:
    """The fields of codec.json."""

    preset: str
    teacher: str
    """Digest of the teacher weights."""
    codec: dict[str, Any]
    chosen_from: list[dict[str, Any]]


def read_codec_choice(root: StoredPath) -> CodecChoice:
    """The checked codec.json. Raises `UserError` if it is missing or damaged."""
    path, what = root / CODEC_FILE, "the codec selection record"
    return checked_value(unsealed(*read_json(path, what), path), CodecChoice, what, path)


class Expected(NamedTuple):
    """What should be on disk according to the manifest and the plan."""

    fields: dict[str, Any]
    """Everything that the fingerprint covers."""
    units: list[ExpectedUnit]
    teacher_files: dict[str, str]
    """The teacher's files (`ManifestFacts.teacher_files`) with their SHA-256."""
    finished: bool
    """Whether there is a manifest. Without one, missing units count as not written yet rather than damaged."""


class CheckResult(NamedTuple):
    """The result of a check."""

    problems: list[Problem]
    notes: list[str]
    """Notes that do not indicate damage."""
    units: int
    """Number of units that were checked."""
    expected: Expected | None
    """The expected contents; None if neither the manifest nor the plan can be read."""


def verify_cache(
    place: Path | str, deep: bool = False, progress: Callable[[int, int], None] | None = None
) -> list[Problem]:
    """The problems found in a cache; see `check_cache`."""
    return check_cache(place, deep=deep, progress=progress).problems


def check_cache(
    place: Path | str | RemotePath,
    *,
    deep: bool = False,
    make_checker: Callable[[Expected], CheckRecords] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckResult:
    """Check a cache, finished or not.

    Args:
        place: the cache's folder or URL; for a URL, every file is downloaded again.
        deep: also read every file and record.
        make_checker: creates the function that checks the contents of records (`audit/records.py`), once the
            expected contents are known.
        progress: called with (units done, total units).
    """
    root = open_uncached(place)
    problems, notes = list[Problem](), list[str]()
    expected = _expected(root, problems, notes)
    if isinstance(root, Path):
        problems += _unknown_files(root, expected, notes)
    else:
        notes.append("a remote folder cannot be listed, so unknown files were not searched for")
    if expected is None:
        return CheckResult(problems, notes, 0, None)
    problems += _teacher_problems(root, expected.teacher_files, deep)
    kept = list(_kept_problems(root, expected, deep))
    lost = [problem.where for problem in kept if problem.part is Part.CODEC_STATE]
    if lost:
        notes.append(f"records were not decoded, because these files are missing or damaged: {', '.join(lost)}")
    problems += kept
    check_records = make_checker(expected) if make_checker is not None and deep and not lost else None
    there = [unit for unit in expected.units if _is_there(root, unit)]
    problems += _missing(expected, there, notes)
    for number, unit in enumerate(there):
        problems += unit_problems(root, unit, deep=deep, check_records=check_records)
        if progress is not None:
            progress(number + 1, len(there))
    if isinstance(root, Path):
        problems += _other_images(root, expected, bad_units(problems), deep)
    return CheckResult(problems, notes, len(there), expected)


def _other_images(root: Path, expected: Expected, bad: Sequence[tuple[int, int]], deep: bool) -> Iterator[Problem]:
    """Units in later view groups that do not hold or skip the same images as the first group, if that one is intact.
    Only a deep check compares keys."""
    places = [unit.place for unit in expected.units if unit.place not in bad and _is_there(root, unit)]
    if any(unit.group == 0 and unit.place not in places for unit in expected.units):
        return
    infos = [read_unit(unit_folder(root, *place))[0] for place in places]
    mismatched = mismatched_units(root, infos)
    for place, wrong in mismatched.items():
        for key, what in list(wrong.items())[:MAX_NAMED]:
            yield Problem(f"{unit_name(place)}/unit.json", key, f"the image is {what}", Part.UNIT, place)
    if deep and not mismatched:
        yield from _other_keys(root, infos)


def _other_keys(root: Path, infos: Sequence[UnitInfo]) -> Iterator[Problem]:
    """Keys that occur twice in their view group or are not in the first group; `infos` must be sorted."""
    images: set[str] = set()
    found: set[str] = set()
    group = 0
    for info in infos:
        if info.group != group:
            images, found, group = images or found, set(), info.group
        place, wrong = (info.group, info.range_id), dict[str, str]()
        for key in read_keys(unit_folder(root, *place), info):
            if key in found:
                wrong[key] = "in this view group twice"
            elif group > 0 and key not in images:
                wrong[key] = "not in view group 0"
            found.add(key)
        for key, what in list(wrong.items())[:MAX_NAMED]:
            yield Problem(f"{unit_name(place)}/keys.txt", key, f"the image is {what}", Part.UNIT, place)


def _is_there(root: StoredPath, unit: ExpectedUnit) -> bool:
    """Whether a unit's folder exists or, for a remote cache, whether the manifest lists the unit."""
    folder = unit_folder(root, unit.group, unit.range_id)
    return os.path.isdir(folder) if isinstance(folder, Path) else unit.sha256 is not None


def _missing(expected: Expected, there: Sequence[ExpectedUnit], notes: list[str]) -> Iterator[Problem]:
    """Missing units; a unit that only the plan lists does not count as damage."""
    places = {unit.place for unit in there}
    missing = [unit for unit in expected.units if unit.place not in places]
    for unit in missing:
        if unit.sha256 is not None:
            yield Problem(unit_name(unit.place), None, "the unit is missing", Part.UNIT, unit.place)
        elif not expected.finished:
            yield Problem(unit_name(unit.place), None, "not written yet", Part.UNFINISHED, unit.place)
    grown = [unit for unit in missing if unit.sha256 is None]
    if grown and expected.finished:
        notes.append(
            f"the plan lists {counted(len(grown), 'more unit')} that have not been written yet: rerun the "
            "`scalekd cache-teacher` command that adds them"
        )


def unit_name(place: tuple[int, int]) -> str:
    """The folder of unit (group, range), relative to the cache."""
    return unit_folder(Path(), *place).as_posix()


def _expected(root: StoredPath, problems: list[Problem], notes: list[str]) -> Expected | None:
    """Read the manifest and the plan. If there is a problem with one, it is recorded and the other is used."""
    manifest: Manifest | None = None
    plan: Plan | None = None
    try:
        manifest = read_manifest(root)
    except UserError as error:
        part = Part.MANIFEST if _exists(root / MANIFEST) else Part.UNFINISHED
        problems.append(Problem(MANIFEST, None, str(error), part))
    if manifest is not None and manifest.facts.teacher["spec"] != manifest.facts.fingerprint_fields["teacher"]:
        problems.append(
            Problem(MANIFEST, None, "the teacher differs from the one in fingerprint_fields", Part.MANIFEST)
        )
    try:
        plan = read_plan(root)
    except UserError as error:
        # readers do not need a plan, so a missing one is only a note, but a damaged one is a problem
        if _exists(root / PLAN) or manifest is None:
            problems.append(Problem(PLAN, None, str(error), Part.PLAN))
        elif isinstance(root, Path):
            repair = shell_command("repair", cache=root)
            notes.append(f"no plan.json: the cache is readable, and `{repair}` rewrites the plan")
    if manifest is not None and plan is not None and (what := _disagree(manifest, plan)):
        problems.append(Problem(PLAN, None, what, Part.PLAN))
        plan = None
    return expected_contents(manifest, plan)


def _exists(path: StoredPath) -> bool:
    """Whether a path exists; True if that cannot be determined."""
    try:
        return is_there(path)
    except UserError:
        return True


def _disagree(manifest: Manifest, plan: Plan) -> str | None:
    """How the plan contradicts the manifest, or None. The plan may have more groups."""
    facts = plan.facts
    if facts.fingerprint != manifest.facts.fingerprint:
        return f"fingerprint {facts.fingerprint} differs from the manifest's {manifest.facts.fingerprint}"
    if facts.groups[: len(manifest.facts.groups)] != manifest.facts.groups:
        return f"groups {facts.groups} do not start with the manifest's {manifest.facts.groups}"
    if len(manifest.units) != len(manifest.facts.groups) * len(plan.ranges):
        return f"the manifest's units do not match the plan's {counted(len(plan.ranges), 'range')}"
    return None


def expected_contents(manifest: Manifest | None, plan: Plan | None) -> Expected | None:
    """The expected contents: the units in the manifest, then those that only the plan lists."""
    units = {unit.place: unit for unit in plan.units()} if plan is not None else {}
    if manifest is not None:
        for row in manifest.units:
            planned = units.get(row[:2])
            units[row[:2]] = ExpectedUnit(
                row.group,
                row.range_id,
                manifest.facts.fingerprint,
                manifest.facts.backend,
                manifest.facts.groups[row.group],
                planned.bounds if planned else None,
                row.count,
                row.sha256,
            )
        in_turn = [units[place] for place in sorted(units)]
        return Expected(manifest.facts.fingerprint_fields, in_turn, manifest.facts.teacher_files, True)
    if plan is None:
        return None
    return Expected(plan.facts.fingerprint_fields, list(units.values()), plan.facts.teacher_files, False)


def _teacher_problems(root: StoredPath, expected: dict[str, str], deep: bool) -> Iterator[Problem]:
    for name, digest in expected.items():
        if (what := file_problem(root / name)) or (deep and (what := hash_problem(root / name, digest, "manifest"))):
            yield Problem(name, None, what, Part.TEACHER)


def _kept_problems(root: StoredPath, expected: Expected, deep: bool) -> Iterator[Problem]:
    for name, digest in codec_files(expected.fields).items():
        if (what := file_problem(root / name)) or (deep and (what := hash_problem(root / name, digest, "manifest"))):
            yield Problem(name, None, what, Part.CODEC_STATE)
    if isinstance(root, Path) and (STATE in codec_files(expected.fields) or is_there(root / CODEC_FILE)):
        try:
            if read_codec_choice(root).codec != expected.fields["codec"]:
                yield Problem(CODEC_FILE, None, "differs from the codec in the manifest", Part.CODEC_CHOICE)
        except UserError as error:
            yield Problem(CODEC_FILE, None, str(error), Part.CODEC_CHOICE)


def _unknown_files(root: Path, expected: Expected | None, notes: list[str]) -> Iterator[Problem]:
    """Files and folders that do not belong to the cache; temporary ones only get a note."""
    known = {MANIFEST, PLAN, UNITS, PUBLICATION, CARD}
    known |= {TAIL, HELD_OUT} if expected is None else expected.teacher_files.keys()
    kept = {} if expected is None else codec_files(expected.fields)
    known |= {*kept, CODEC_FILE}
    units = None if expected is None else {unit_folder(root, *unit.place).name for unit in expected.units}
    for folder, names in ((root, known), (root / UNITS, units)):
        for path in _listing(folder, notes):
            where = path.relative_to(root).as_posix()
            if path.name.startswith((".tmp-", ".aside-")):
                notes.append(f"{where}: a temporary or damaged unit; readers ignore it")
            elif names is not None and path.name not in names:
                yield Problem(
                    where, None, "does not belong to this cache and is not read: remove it", Part.UNKNOWN_FILE
                )


def _listing(folder: Path, notes: list[str]) -> list[Path]:
    """The sorted entries of a folder; adds a note if it cannot be listed."""
    try:
        return sorted(folder.iterdir()) if os.path.isdir(folder) else []
    except OSError as error:
        notes.append(f"cannot list {folder} ({error.strerror}): not searched for unknown files")
        return []


def bad_units(problems: Sequence[Problem]) -> list[tuple[int, int]]:
    """(group, range) of each unit that must be rebuilt."""
    return sorted({problem.unit for problem in problems if problem.part is Part.UNIT and problem.unit is not None})
