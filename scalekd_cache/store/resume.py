"""Resume: finds the committed units in a cache that can be reused, and drops damaged ones.

In: a cache's folder. Out: the units that need no work. Invariant: no decision depends on a clock.

The startup check covers every unit's sidecar (which must be readable and have the planned fingerprint, store, views and
range), its skipped images, and the length of every file. This detects the effects of a kill, a full disk or an
interrupted copy. For the most recently committed units, it also covers the SHA-256 of every file, because a power
failure with an unflushed write cache can leave files with the right length that are full of zeros. Older units are not
checked for other damage, because that would mean reading the whole cache at every start. Readers verify every record's
checksum, and `scalekd verify --deep` reads every byte.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path

from scalekd_cache.errors import UserError, counted
from scalekd_cache.store.durable_files import FileHash, hash_file, temp_path_for
from scalekd_cache.store.sidecar import UnitInfo, read_keys, read_unit, unit_folder, wrong_sizes
from scalekd_cache.store.verify_unit import ExpectedUnit

RECHECKED_UNITS = 8
"""Number of units hashed at startup. At the default size (200 MB each), they exceed a disk's write cache and take about
a second to hash."""

NAMED_KEYS = 5
"""Maximum number of a unit's sample keys listed in an error; the rest are counted."""


def committed_unit(root: Path, unit: ExpectedUnit) -> UnitInfo | None:
    """The sidecar of a committed unit whose files all have their full length; None otherwise.

    This costs one small read and one stat call per file. A unit with truncated or missing files counts as missing and
    is rewritten.

    Raises:
        UserError: the unit has a different fingerprint (teacher, recipe, codec or data) or different images or views,
            or its sidecar is damaged.
    """
    folder = unit_folder(root, unit.group, unit.range_id)
    if not (folder / "unit.json").exists():
        return None
    info, _ = read_unit(folder)
    if info.fingerprint != unit.fingerprint:
        raise UserError(
            "this cache was made with a different teacher, view recipe, codec or dataset",
            got=f"fingerprint {info.fingerprint}",
            expected=f"fingerprint {unit.fingerprint}, from the current options",
            where=folder,
            fix="use the options the cache was made with, or a different folder (--cache ...)",
        )
    got, expected = _layout_of(info), (unit.backend, unit.views, unit.bounds)
    if got != expected:
        raise UserError(
            "a unit in this cache has a different layout: two jobs with different options wrote to this cache",
            got="store {}, views {}, images {}".format(*got),
            expected="store {}, views {}, images {}".format(*expected),
            where=folder,
            fix="use the options the cache was made with, or a different folder (--cache ...); `scalekd repair` "
            "rebuilds the units that do not match the plan",
        )
    return None if wrong_sizes(folder, info.files) else info


def _layout_of(info: UnitInfo) -> tuple[str, list[int], tuple[int, int]]:
    return info.backend, info.views, (info.start, info.stop)


class CommittedUnits:
    """A cache's committed units. Each is checked once per job, when it is first used.

    Args:
        root: the cache's folder.
        units: the expected contents of each unit, in the order the units are assigned.
    """

    def __init__(self, root: Path, units: Iterable[ExpectedUnit]) -> None:
        self._root = root
        self._units = {unit.place: unit for unit in units}
        self._whole: dict[tuple[int, int], UnitInfo] = {}
        self._first: dict[str, str] | None = None

    def committed(self, group: int, range_id: int) -> bool:
        """Whether a unit is committed. Raises the same errors as `committed_unit`."""
        place = (group, range_id)
        if place not in self._whole:
            info = committed_unit(self._root, self._units[place])
            if info is not None:  # unused fields are dropped, because a cache may have 100,000 units
                files = {"keys.txt": info.files["keys.txt"]}
                self._whole[place] = dataclasses.replace(info, files=files, fidelity={}, versions={})
        return place in self._whole

    def skipped_images(self) -> dict[str, str] | None:
        """Sample keys skipped in the first view group, with the reasons; None until all units in the group are
        committed."""
        if self._first is None:
            places = [place for place in self._units if place[0] == 0]
            if all(self.committed(*place) for place in places):
                self._first = skipped_keys(self._whole[place] for place in places)
        return self._first

    def units_with(self, keys: Set[str]) -> list[tuple[int, int]]:
        """(group, range) of the units in the first view group that hold any of these sample keys."""
        first = [place for place in self._units if place[0] == 0 and self.committed(*place)]
        return [place for place in first if keys & {*read_keys(unit_folder(self._root, *place), self._whole[place])}]

    def drop_damaged(self) -> list[Path]:
        """Hash the last `RECHECKED_UNITS` committed units and remove damaged ones.

        Returns:
            The folders of the removed units, which will be rebuilt.
        """
        committed = [place for place in self._units if self.committed(*place)]
        damaged = []
        for place in committed[-RECHECKED_UNITS:]:
            folder = unit_folder(self._root, *place)
            if _bytes_differ(folder):
                self._drop(place, _bytes_differ)
                damaged.append(folder)
        return damaged

    def drop_mismatched_units(self) -> dict[Path, str]:
        """Once the first view group is complete, remove units that do not skip the same images (`mismatched_units`).

        Returns:
            The folders of the removed units, which will be rebuilt, with the problem found in each.
        """
        if self.skipped_images() is None:
            return {}
        there = [self._whole[place] for place in self._units if self.committed(*place)]
        dropped = {}
        for place, wrong in mismatched_units(self._root, there).items():
            self._drop(place, lambda _: True)
            dropped[unit_folder(self._root, *place)] = some_keys(wrong)
        return dropped

    def keys_hash(self, group: int, range_id: int) -> FileHash:
        """Hash of a committed unit's list of sample keys."""
        return self._whole[group, range_id].files["keys.txt"]

    def drop_unlike(self, group: int, range_id: int, keys: FileHash) -> bool:
        """Remove a committed unit unless it has this list of sample keys; return whether it was removed."""
        if self.keys_hash(group, range_id) == keys:
            return False
        self._drop((group, range_id), lambda _: True)
        return True

    def _drop(self, place: tuple[int, int], damaged: Callable[[Path], bool]) -> None:
        remove_damaged_unit(unit_folder(self._root, *place), damaged)
        del self._whole[place]
        self._first = None


def _bytes_differ(folder: Path) -> bool:
    return any(hash_file(folder / name) != fact for name, fact in read_unit(folder)[0].files.items())


def has_wrong_sizes(folder: Path) -> bool:
    """Whether any file in this unit's folder, including the sidecar, is missing or has the wrong length."""
    return not (folder / "unit.json").exists() or bool(wrong_sizes(folder, read_unit(folder)[0].files))


def remove_damaged_unit(folder: Path, damaged: Callable[[Path], bool]) -> None:
    """Remove a damaged unit.

    It is renamed first, so that no reader sees a half-removed unit. Then it is checked again: if another process has
    replaced it with an intact unit in the meantime, that unit is renamed back.
    """
    temp = temp_path_for(folder)
    renamed = temp.with_name(f"{temp.name}-damaged")
    try:
        os.rename(folder, renamed)
    except FileNotFoundError:  # another process removed it first
        return
    intact = True  # stays True if the check fails, so nothing is removed unchecked
    try:
        intact = not damaged(renamed)
    finally:
        if intact:
            with contextlib.suppress(OSError):  # a third unit already exists
                os.rename(renamed, folder)
    shutil.rmtree(renamed, ignore_errors=True)


def skipped_keys(infos: Iterable[UnitInfo]) -> dict[str, str]:
    """Sample keys skipped in these units, with the reasons."""
    return {row["key"]: row["reason"] for info in infos for row in info.skipped}


def mismatched_units(root: Path, infos: Iterable[UnitInfo]) -> dict[tuple[int, int], dict[str, str]]:
    """Units in later groups that do not skip the same images as the first group, which is the reference.

    Args:
        root: the cache's folder.
        infos: the sidecars of committed units, including all of group 0.

    Returns:
        Sample keys and their problems for each such unit, keyed by (group, range).

    Raises:
        UserError: a unit's keys cannot be read.
    """
    groups: dict[int, list[UnitInfo]] = {}
    for info in infos:
        groups.setdefault(info.group, []).append(info)
    first, apart = skipped_keys(groups.pop(0, [])), dict[tuple[int, int], dict[str, str]]()
    for units in groups.values():
        here = skipped_keys(units)
        surplus, missing = here.keys() - first.keys(), first.keys() - here.keys()
        for info in units if surplus or missing else []:
            skipped = [row["key"] for row in info.skipped]
            wrong = {key: "skipped in this unit, but not in view group 0" for key in skipped if key in surplus}
            if missing:  # they may be in units not written yet
                keys = read_keys(unit_folder(root, info.group, info.range_id), info)
                wrong |= {key: "in this unit, but skipped in view group 0" for key in keys if key in missing}
            if wrong:
                apart[info.group, info.range_id] = wrong
    return apart


def some_keys(wrong: Mapping[str, str]) -> str:
    """The first few keys with their problems, on one line."""
    some = "; ".join(f"{key}: {what}" for key, what in list(wrong.items())[:NAMED_KEYS])
    return some + (f"; and {counted(len(wrong) - NAMED_KEYS, 'more image')}" if len(wrong) > NAMED_KEYS else "")
