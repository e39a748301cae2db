"""The folder that a pull writes to: checks its contents, locks it, and replaces old units with new ones.

In: a folder, and the facts for the requested cache. Out: a staging folder filled by one process, then a finished cache.
Invariant: a folder with other contents is rejected before anything changes. manifest.json is removed before a unit is
replaced and written once all units are in place, so a folder with a manifest always holds a complete cache.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from scalekd_cache.errors import UserError, shell_command
from scalekd_cache.publishing.first_views import first_groups
from scalekd_cache.store.durable_files import disk_errors, fsync_path, write_atomically
from scalekd_cache.store.locks import lock
from scalekd_cache.store.manifest import NAME as MANIFEST
from scalekd_cache.store.manifest import Manifest, ManifestFacts, build_manifest, read_manifest, write_manifest
from scalekd_cache.store.plan import NAME as PLAN
from scalekd_cache.store.plan import Plan, check_output_folder, read_plan, write_plan
from scalekd_cache.store.verify import check_cache
from scalekd_cache.store.verify_unit import Part

STAGING = ".tmp-pull"
"""Folder inside the cache for transferred files. Readers and `verify` ignore names that start with .tmp-."""
OLD = "old"
"""Subfolder of the staging folder for replaced units."""
FETCHED = (Part.UNIT, Part.TEACHER, Part.CODEC_STATE, Part.CODEC_CHOICE)
"""The parts of a cache that a pull fetches."""


def finished_cache(root: Path, published: Manifest, facts: ManifestFacts) -> Manifest | None:
    """The manifest of the cache in the folder, if it has all requested views and all its files at full length.

    Args:
        root: the folder.
        published: the manifest of the publication.
        facts: the facts for the requested cache, which has the first views of the published one.

    Raises:
        UserError: the folder holds anything but views from the published cache, or more views than requested of which
            files are missing.
    """
    check_output_folder(root, "--cache", may_be_cache=True)
    if not root.is_dir():
        if os.path.lexists(root):
            raise UserError("--cache is not a folder", where=root, fix="set --cache to a new folder")
        return None
    if not (root / MANIFEST).exists():
        _check_unfinished(root)
        return None
    pulling = (root / STAGING).exists()
    there = read_manifest(root)
    wrong = _difference(there, published)
    planned = read_plan(root).facts.groups if (root / PLAN).exists() else there.facts.groups
    # A pull that was interrupted in `install` may have written the plan and not yet the manifest.
    pulled = pulling and planned == first_groups(published.facts.groups, sum(map(len, planned)))
    if planned != there.facts.groups and not pulled:
        wrong = "a cache to which stage 1 is adding views"
    if wrong is not None:
        raise UserError(
            "the folder contains a cache that this pull cannot add views to",
            got=wrong,
            expected="an empty folder, or views from the published cache",
            where=root,
            fix="pull into a different folder (--cache ...)",
        )
    missing = _missing_file(root)
    if missing is not None and there.num_views > facts.num_views:
        raise UserError(
            "the folder contains a damaged cache with more views than this pull",
            got=missing,
            where=root,
            fix=f"pull all of its views (--views 0-{there.num_views - 1}) from a publication that has them, or run "
            f"`{shell_command('repair', cache=root)}`",
        )
    return there if missing is None and there.num_views >= facts.num_views else None


def _missing_file(root: Path) -> str | None:
    """A file of a finished cache that is missing or has the wrong length, and what is wrong with it."""
    problems = (problem for problem in check_cache(root).problems if problem.part in FETCHED)
    return next((f"{problem.where}: {problem.what}" for problem in problems), None)


def _check_unfinished(root: Path) -> None:
    """Raise `UserError` unless a folder without a manifest is empty or was left by an interrupted pull."""
    names = sorted(path.name for path in root.iterdir())
    if names and STAGING not in names:
        raise UserError(
            "the folder is not empty and does not contain an interrupted pull",
            got="an unfinished stage 1 cache" if PLAN in names else ", ".join(names[:3]),
            expected="a new or empty folder, or an interrupted pull of the published cache",
            where=root,
            fix="pull into a different folder (--cache ...)",
        )


def _difference(there: Manifest, published: Manifest) -> str | None:
    """Why a finished cache is neither the published one nor its first views."""
    if there.facts.fingerprint != published.facts.fingerprint:
        return f"fingerprint {there.facts.fingerprint[:16]}, published: {published.facts.fingerprint[:16]}"
    if there.facts.backend != published.facts.backend:
        return f"store {there.facts.backend}, published: {published.facts.backend}"
    mine, theirs = there.facts.groups, published.facts.groups
    for group, (views, wanted) in enumerate(zip(mine, theirs, strict=False)):
        last = group == len(mine) - 1
        if views != wanted[: len(views)] or (len(views) < len(wanted) and not last):
            return f"view groups {mine}, published: {theirs}"
        ours, others = ([row for row in one.units if row.group == group] for one in (there, published))
        if len(views) < len(wanted):
            ours, others = ([row._replace(sha256="") for row in rows] for rows in (ours, others))
        if ours != others:
            return f"same options, but different units in view group {group} (made or repaired by another job)"
    return None


@contextlib.contextmanager
def staging_folder(root: Path) -> Iterator[Path]:
    """The staging folder for a cache, locked for this process. If the process is killed, the kernel releases the lock.

    Raises:
        UserError: another process is pulling into the folder, or the folder is not writable.
    """
    staging = root / STAGING
    with disk_errors(root, 0):
        descriptor = _locked(staging)
    try:
        yield staging
    finally:
        os.close(descriptor)


def _locked(staging: Path) -> int:
    while True:
        staging.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:  # the previous lock holder has just removed it
            continue
        try:
            lock(descriptor, staging, wait=False)
            if os.path.samestat(os.fstat(descriptor), os.stat(staging)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                "another `scalekd pull` is writing to this folder",
                where=staging.parent,
                fix="wait until it finishes, or pull into a different folder (--cache ...)",
            ) from None
        except FileNotFoundError:
            pass
        os.close(descriptor)


def install(
    root: Path, facts: ManifestFacts, ranges: Sequence[Sequence[int]], whole: tuple[Manifest, bytes] | None
) -> Manifest:
    """Move everything from the staging folder into the cache, then write the plan and the manifest.

    Args:
        root: the cache's folder.
        facts: the facts for the cache.
        ranges: [start, stop] for every image range.
        whole: the published manifest and the bytes in its manifest.json, if all views are requested.
    """
    staging = root / STAGING
    with disk_errors(root, 0):
        for path in staging.iterdir():
            if path.is_file():
                path.replace(root / path.name)
        (root / "units").mkdir(exist_ok=True)
        (staging / OLD).mkdir(exist_ok=True)
        units = sorted((staging / "units").iterdir()) if (staging / "units").is_dir() else []
        if any((root / "units" / unit.name).exists() for unit in units):
            (root / MANIFEST).unlink(missing_ok=True)
            fsync_path(root)
        for unit in units:
            _exchange(unit, root / "units" / unit.name, staging / OLD / unit.name)
        fsync_path(root / "units")
    manifest = build_manifest(root, facts, ranges)
    write_plan(root, Plan(facts=facts, ranges=[list(pair) for pair in ranges]))
    if whole is None:
        write_manifest(root, manifest)
    elif manifest.units != whole[0].units:
        raise UserError("the pulled units do not match the manifest", where=root, fix="rerun")
    else:
        write_atomically(root / MANIFEST, whole[1])
    return read_manifest(root)


def undo_plan(root: Path, there: Manifest) -> None:
    """Replace the plan of an interrupted pull of more views by one of the cache that the folder has."""
    if (root / PLAN).exists() and (plan := read_plan(root)).facts.groups != there.facts.groups:
        write_plan(root, dataclasses.replace(plan, facts=there.facts))


def _exchange(new: Path, place: Path, old: Path) -> None:
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
    new.rename(place)
