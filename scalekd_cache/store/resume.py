"""What a job finds in a cache that another job left: units that can stay, units that cannot.

In: a cache's folder. Out: which units need no work. Invariant: what stays verifies, and no decision looks at a clock.

How much is verified. Every unit: its sidecar (parsed; fingerprint, store, views and range as planned), the images
that it leaves out, and the length of every file; that finds whatever a kill, a full disk or a copy that stopped leaves
behind. The units committed last: the sha256 of every file as well. They are the ones that a disk may have lost after it
said they were safe (a power cut with a write cache that is not flushed leaves files of the right length full of zeros).
Damage to older units that keeps their lengths is not looked for here, because it would cost reading the whole cache at
every start: readers compare every record with its checksum, and `make verify DEEP=1` looks at every byte.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path

from scalekd_cache.errors import UserError
from scalekd_cache.store.durable_files import fact_of, temp_beside
from scalekd_cache.store.sidecar import UnitInfo, read_keys, read_unit, sizes_differ, unit_folder
from scalekd_cache.store.verify_unit import ExpectedUnit

RECHECKED_UNITS = 8
"""Units hashed at a start: with the default sizes (200 MB each) more than a disk's own cache holds, about a second."""

NAMED_KEYS = 5
"""Sample keys of a unit that an error lists; the rest is counted."""


def unit_committed(root: Path, unit: ExpectedUnit) -> UnitInfo | None:
    """The sidecar of a unit that is there: made for the same cache, and every file has the length it should have.

    Costs one small read and a stat a file. A unit whose files are short or gone counts as absent: writing it again
    replaces it.

    Raises:
        UserError: the unit has another fingerprint (teacher, recipe, codec or data) or other images or views, or its
            sidecar is damaged.
    """
    folder = unit_folder(root, unit.group, unit.range_id)
    if not (folder / "unit.json").exists():
        return None
    info, _ = read_unit(folder)
    if info.fingerprint != unit.fingerprint:
        raise UserError(
            "this cache was made from another teacher, view recipe, codec or data set",
            got=f"fingerprint {info.fingerprint}",
            expected=f"fingerprint {unit.fingerprint}, that of the present options",
            where=folder,
            fix="use the options the cache was made with, or another folder (CACHE=...)",
        )
    got, expected = _layout_of(info), (unit.backend, unit.views, unit.bounds)
    if got != expected:
        raise UserError(
            "a unit of this cache has another layout: two jobs with different options have written here",
            got="store {}, views {}, images {}".format(*got),
            expected="store {}, views {}, images {}".format(*expected),
            where=folder,
            fix="use the options the cache was made with, or another folder (CACHE=...); `make repair CACHE=...` makes "
            "the units again that are not those of its plan",
        )
    return None if sizes_differ(folder, info.files) else info


def _layout_of(info: UnitInfo) -> tuple[str, list[int], tuple[int, int]]:
    return info.backend, info.views, (info.start, info.stop)


class Ledger:
    """The units that are in a cache, each looked at once: what was whole stays whole while a job runs.

    Args:
        root: the cache's folder.
        units: what each unit must be, in the order they are handed out.
    """

    def __init__(self, root: Path, units: Iterable[ExpectedUnit]) -> None:
        self._root = root
        self._units = {unit.place: unit for unit in units}
        self._whole: dict[tuple[int, int], UnitInfo] = {}
        self._first: dict[str, str] | None = None

    def committed(self, group: int, range_id: int) -> bool:
        """Whether a unit needs no work. Raises as `unit_committed` does."""
        place = (group, range_id)
        if place not in self._whole:
            info = unit_committed(self._root, self._units[place])
            if info is not None:  # without what nobody asks for: a cache may have 100,000 units
                files = {"keys.txt": info.files["keys.txt"]}
                self._whole[place] = dataclasses.replace(info, files=files, fidelity={}, versions={})
        return place in self._whole

    def left_out(self) -> dict[str, str] | None:
        """Sample keys that the first view group leaves out, with the reasons; None until all its units are there."""
        if self._first is None:
            places = [place for place in self._units if place[0] == 0]
            if all(self.committed(*place) for place in places):
                self._first = left_out(self._whole[place] for place in places)
        return self._first

    def holding(self, keys: Set[str]) -> list[tuple[int, int]]:
        """(group, range) of the units of the first view group that hold some of these sample keys."""
        first = [place for place in self._units if place[0] == 0 and self.committed(*place)]
        return [place for place in first if keys & {*read_keys(unit_folder(self._root, *place), self._whole[place])}]

    def drop_damaged(self) -> list[Path]:
        """Hash the last `RECHECKED_UNITS` committed units.

        Returns:
            The folders of those that were damaged; they are gone now, and will be made again.
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
        """Remove units that leave out other images than the first view group (`mismatched_units`), once that is whole.

        Returns:
            The folders, with what was wrong; they are gone now, and will be made again.
        """
        if self.left_out() is None:
            return {}
        there = [self._whole[place] for place in self._units if self.committed(*place)]
        dropped = {}
        for place, wrong in mismatched_units(self._root, there).items():
            self._drop(place, lambda _: True)
            dropped[unit_folder(self._root, *place)] = some_keys(wrong)
        return dropped

    def _drop(self, place: tuple[int, int], damaged: Callable[[Path], bool]) -> None:
        put_aside(unit_folder(self._root, *place), damaged)
        del self._whole[place]
        self._first = None


def _bytes_differ(folder: Path) -> bool:
    return any(fact_of(folder / name) != fact for name, fact in read_unit(folder)[0].files.items())


def files_are_short(folder: Path) -> bool:
    """Whether a file of the unit in this folder is gone or has another length."""
    return bool(sizes_differ(folder, read_unit(folder)[0].files))


def put_aside(folder: Path, damaged: Callable[[Path], bool]) -> None:
    """Remove a damaged unit: renamed first, so that nobody meets half of it; then looked at once more, because another
    process may have put a whole one in its place in the meantime, and that one goes back."""
    temp = temp_beside(folder)
    aside = temp.with_name(f"{temp.name}-damaged")
    try:
        os.rename(folder, aside)
    except FileNotFoundError:  # another process was faster
        return
    if not damaged(aside):
        with contextlib.suppress(OSError):  # there is a third one already
            os.rename(aside, folder)
    shutil.rmtree(aside, ignore_errors=True)


def left_out(infos: Iterable[UnitInfo]) -> dict[str, str]:
    """Sample keys that these units skipped, with the reasons."""
    return {row["key"]: row["reason"] for info in infos for row in info.skipped}


def mismatched_units(root: Path, infos: Iterable[UnitInfo]) -> dict[tuple[int, int], dict[str, str]]:
    """Units of later groups that disagree with the first group.

    Args:
        root: the cache's folder.
        infos: the sidecars of committed units, among them all of group 0.

    Returns:
        For (group, range) of each such unit: its sample keys, each with what is wrong.

    Raises:
        UserError: the keys of a unit cannot be read.
    """
    groups: dict[int, list[UnitInfo]] = {}
    for info in infos:
        groups.setdefault(info.group, []).append(info)
    first, apart = left_out(groups.pop(0, [])), dict[tuple[int, int], dict[str, str]]()
    for units in groups.values():
        here = left_out(units)
        surplus, missing = here.keys() - first.keys(), first.keys() - here.keys()
        for info in units if surplus or missing else []:
            skipped = [row["key"] for row in info.skipped]
            wrong = {key: "left out here, but not in view group 0" for key in skipped if key in surplus}
            if missing:  # they may lie in units that are not made yet
                keys = read_keys(unit_folder(root, info.group, info.range_id), info)
                wrong |= {key: "in this unit, but left out of view group 0" for key in keys if key in missing}
            if wrong:
                apart[info.group, info.range_id] = wrong
    return apart


def some_keys(wrong: Mapping[str, str]) -> str:
    """Some of the keys with what is wrong, in one line."""
    some = "; ".join(f"{key}: {what}" for key, what in list(wrong.items())[:NAMED_KEYS])
    return some + (f"; and {len(wrong) - NAMED_KEYS} more images" if len(wrong) > NAMED_KEYS else "")
