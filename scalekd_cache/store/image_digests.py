"""images.txt: digests of the image files a unit was made from, and a check that all units used the same files.

In: digests of image files, keyed by sample key. Out: images.txt, where line i belongs to line i of keys.txt, or an
error that names changed images. Invariant: all views of an image in a cache come from the same file. Units whose views
come from a different cache and units from earlier versions have no images.txt and are not compared.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scalekd_cache.errors import UserError, counted
from scalekd_cache.store.base import repair_fix
from scalekd_cache.store.checked_files import is_hex, read_file
from scalekd_cache.store.sidecar import UnitInfo, read_keys, read_unit, unit_folder

NAME = "images.txt"
LINE_BYTES = 17
"""16 hex characters and a newline."""
FIX = (
    "restore the old image files, or delete the folders of the units made from them; then rerun "
    "`scalekd cache-teacher`, which rebuilds missing units. For a different dataset, use a different --cache"
)


class Change(NamedTuple):
    """An image whose file has changed since a unit was made."""

    key: str
    unit: str
    """The older unit."""


class ImageFiles:
    """Digests of the image files that a set of units was made from."""

    def __init__(self, root: Path, units: Iterable[tuple[int, int]]) -> None:
        """Read images.txt for each of these units, (group, range), if the unit and the file exist."""
        self.root, self._units = root, list(units)
        keys, digests, numbers = [], [], []
        for number, (group, range_id) in enumerate(self._units):
            folder = unit_folder(root, group, range_id)
            if (folder / "unit.json").exists():
                info = read_unit(folder)[0]
                images = read_images(folder, info)
                keys += [_number(key) for key in read_keys(folder, info)] if images else []
                digests += [int(image, 16) for image in images]
                numbers += [number] * len(images)
        order = np.argsort(np.array(keys, np.uint64))
        self._keys, self._digests = np.array(keys, np.uint64)[order], np.array(digests, np.uint64)[order]
        self._numbers = np.array(numbers, np.int32)[order]

    def change(self, key: str, digest: str) -> Change | None:
        """The change, if any unit was made from a different file for this image."""
        number = _number(key)
        at = int(np.searchsorted(self._keys, np.uint64(number)))
        if at == len(self._keys) or int(self._keys[at]) != number or int(self._digests[at]) == int(digest, 16):
            return None
        return Change(key, unit_folder(Path(), *self._units[self._numbers[at]]).as_posix())

    def check(self, key: str, digest: str) -> None:
        """Raise `UserError` if an image file has changed since an earlier view group was made from it."""
        change = self.change(key, digest)
        if change is not None:
            raise UserError(
                "an image has changed since earlier views of it were cached",
                got=f"{key} differs from the file that {change.unit} was made from",
                where=self.root,
                fix=FIX,
            )


def images_text(digests: Iterable[str]) -> bytes:
    """The contents of images.txt."""
    return "".join(f"{digest}\n" for digest in digests).encode()


def read_images(folder: Path, info: UnitInfo) -> list[str]:
    """Digests of the image files of a unit's records, in order; empty if the unit has no images.txt."""
    if NAME not in info.files:
        return []
    size = info.count * LINE_BYTES
    data = read_file(folder / NAME, "a unit's image file list", size)
    lines = data.decode("ascii", "replace").split("\n")[:-1]
    if len(data) != size or not all(is_hex(line, LINE_BYTES - 1) for line in lines):
        what = "a unit's image file list is damaged"
        raise UserError(what, where=folder / NAME, fix=repair_fix(folder / NAME))
    return lines


def check_images(root: Path, groups: list[list[UnitInfo]]) -> None:
    """Check that every view group was made from the same image files as the first group.

    Raises:
        UserError: an image changed; the error names the first changed image and its units.
    """
    if len(groups) < 2:
        return
    first = ImageFiles(root, [(info.group, info.range_id) for info in groups[0]])
    changes: list[tuple[Change, str]] = []
    for info in (info for group in groups[1:] for info in group):
        folder = unit_folder(root, info.group, info.range_id)
        images = read_images(folder, info)
        for key, digest in zip(read_keys(folder, info) if images else [], images, strict=True):
            change = first.change(key, digest)
            changes += [] if change is None else [(change, folder.relative_to(root).as_posix())]
    if changes:
        units = sorted({unit for change, unit in changes} | {change.unit for change, unit in changes})
        change, unit = changes[0]
        raise UserError(
            "images changed while the cache was being made: not all view groups come from the same files",
            got=f"{counted(len(changes), 'image')}; the first is {change.key}, in {change.unit} and in {unit}",
            expected="the same image files for all views",
            where=f"{root}, units {', '.join(units[:10])}" + (f" and {len(units) - 10} more" if units[10:] else ""),
            fix=FIX,
        )


def _number(key: str) -> int:
    """A 64-bit hash of a key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
