"""What a job finds in a cache that another job left: units that can stay, units that cannot.

In: a cache's folder. Out: which units need no work. Invariant: what stays verifies, and no decision looks at a clock.

How much is verified. Every unit: its sidecar (parsed, fingerprint) and the length of every file; that finds whatever a
kill, a full disk or a copy that stopped leaves behind. The units committed last: the sha256 of every file as well. They
are the ones that a disk may have lost after it said they were safe (a power cut with a write cache that is not flushed
leaves files of the right length full of zeros). Damage to older units that keeps their lengths is not looked for here,
because it would cost reading the whole cache at every start: readers compare every record with its checksum, and
`make verify DEEP=1` looks at every byte.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from scalekd_cache.errors import UserError
from scalekd_cache.store.files import fact_of, temp_beside
from scalekd_cache.store.sidecar import read_unit, sizes_differ, unit_folder

RECHECKED_UNITS = 8
"""Units hashed at a start: with the default sizes (200 MB each) more than a disk's own cache holds, about a second."""


def unit_committed(root: Path, group: int, range_id: int, fingerprint: str) -> bool:
    """Whether a unit is there: its sidecar, its fingerprint, and every file with the length it should have.

    Costs one small read and a stat a file. A unit whose files are short or gone counts as absent: writing it again
    replaces it.

    Raises:
        UserError: the unit has another fingerprint (teacher, recipe, codec or data), or its sidecar is damaged.
    """
    folder = unit_folder(root, group, range_id)
    if not (folder / "unit.json").exists():
        return False
    info, _ = read_unit(folder)
    if info.fingerprint != fingerprint:
        raise UserError(
            "this cache was made from another teacher, view recipe, codec or data set",
            got=f"fingerprint {info.fingerprint}",
            expected=f"fingerprint {fingerprint}, that of the present options",
            where=folder,
            fix="use the options the cache was made with, or another folder (CACHE=...)",
        )
    return not sizes_differ(folder, info.files)


class Ledger:
    """The units that are in a cache, each looked at once: what was whole stays whole while a job runs."""

    def __init__(self, root: Path, fingerprint: str) -> None:
        self._root, self._fingerprint = root, fingerprint
        self._whole: set[tuple[int, int]] = set()

    def committed(self, group: int, range_id: int) -> bool:
        """Whether a unit needs no work. Raises as `unit_committed` does."""
        unit = (group, range_id)
        if unit not in self._whole and unit_committed(self._root, group, range_id, self._fingerprint):
            self._whole.add(unit)
        return unit in self._whole

    def drop_damaged(self, units: Sequence[tuple[int, int]]) -> list[Path]:
        """Hash the last `RECHECKED_UNITS` committed ones of `units` (in the order they are handed out).

        Returns:
            The folders of those that were damaged; they are gone now, and will be made again.
        """
        committed = [unit for unit in units if self.committed(*unit)]
        damaged = []
        for unit in committed[-RECHECKED_UNITS:]:
            folder = unit_folder(self._root, *unit)
            if _bytes_differ(folder):
                self._whole.discard(unit)
                put_aside(folder, _bytes_differ)
                damaged.append(folder)
        return damaged


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
