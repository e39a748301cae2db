"""Every view group of a cache holds the same images: those of the first one.

In: sidecars of committed units. Out: the units that leave out other images than the first group, with the sample keys.
Invariant: the first group decides. An image that could not be decoded for it is left out of every later group, and a
unit of a later group that leaves out another image is not whole, whatever its checksums say.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from scalekd_cache.store.sidecar import UnitInfo, read_keys, unit_folder

NAMED = 5
"""Sample keys of a unit that are named; the rest is counted."""


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


def named(wrong: Mapping[str, str]) -> str:
    """Some of the keys with what is wrong, in one line."""
    some = "; ".join(f"{key}: {what}" for key, what in list(wrong.items())[:NAMED])
    return some + (f"; and {len(wrong) - NAMED} more images" if len(wrong) > NAMED else "")
