"""plan.json: a cache's plan, written before its first unit.

In: the facts that the manifest will hold, and the image ranges. Out: the file, or the plan read back and checked.
Invariant: the plan and the committed units of a view group are enough to read that group, without a manifest. The first
writer creates the plan. A later writer may only extend it: the extended plan begins with the same groups. A checksum
covers every byte.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalekd_cache.errors import UserError
from scalekd_cache.store.base import FORMAT_VERSION, MAX_UNIT_SAMPLES, check_version, damaged
from scalekd_cache.store.checked_files import checked_value, read_json
from scalekd_cache.store.durable_files import write_atomically
from scalekd_cache.store.locks import lock
from scalekd_cache.store.manifest import NAME as MANIFEST
from scalekd_cache.store.manifest import ManifestFacts, contradictions, plain_facts
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.sealed_json import sealed, unsealed
from scalekd_cache.store.verify_unit import ExpectedUnit

NAME = "plan.json"
WHAT = "the cache's plan"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A cache's units, before they are written."""

    facts: ManifestFacts
    ranges: list[list[int]]
    """[start, stop] of each image range, from 0 without gaps; every view group has the same ranges."""

    @property
    def num_views(self) -> int:
        """Number of views of each image in the finished cache."""
        return self.facts.num_views

    def units(self) -> list[ExpectedUnit]:
        """All units in the plan, in the order they are assigned."""
        facts = self.facts
        return [
            ExpectedUnit(group, range_id, facts.fingerprint, facts.backend, views, (start, stop))
            for group, views in enumerate(facts.groups)
            for range_id, (start, stop) in enumerate(self.ranges)
        ]


def check_output_folder(place: Path, option: str, *, may_be_cache: bool = False) -> None:
    """Raise `UserError` if this folder lies inside a cache, or contains images in train/. With `may_be_cache`, the
    folder itself may be a cache."""
    folder = Path(os.path.realpath(place))  # Path.resolve raises RuntimeError for a loop of links
    for parent in (*(() if may_be_cache else (folder,)), *folder.parents):
        if (parent / "units").is_dir() and any((parent / name).exists() for name in (NAME, MANIFEST)):
            where = "is a cache" if parent == folder else f"is inside the cache {parent}"
            raise UserError(f"{option} {place} {where}: choose a different folder")
    if (folder / "train").is_dir() and not any((folder / name).exists() for name in (NAME, MANIFEST)):
        raise UserError(f"{option} {place} is a dataset (it contains train/): choose a different folder")


@contextlib.contextmanager
def locked_plan(root: Path) -> Iterator[None]:
    """Hold an exclusive lock on the cache's folder, so that only one process reads and replaces the plan.

    On a file system without locks (some NFS and Lustre mounts), nothing is locked; `write_plan(create=True)` is safe
    there.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            lock(descriptor, root / NAME)
        yield
    finally:
        os.close(descriptor)


def write_plan(root: Path, plan: Plan, *, create: bool = False) -> None:
    """Write plan.json atomically. With `create`, raise `FileExistsError` if it exists."""
    fields: dict[str, Any] = {"format_version": FORMAT_VERSION}
    for name, value in plain_facts(plan.facts).items():
        fields |= {name: value, "ranges": plan.ranges} if name == "groups" else {name: value}
    write_atomically(root / NAME, sealed(fields), create=create)


def read_plan(root: StoredPath) -> Plan:
    """A cache's plan, checked.

    Raises:
        UserError: it is missing or damaged, has a different format version, or is inconsistent.
    """
    path = root / NAME
    fields, data = read_json(path, WHAT, fix="rerun `scalekd cache-teacher`, which resumes")
    check_version(fields, path)
    fields = unsealed(fields, data, path)
    ranges = checked_value(fields.pop("ranges", None), list[list[int]], f"{WHAT}, ranges,", path)
    del fields["format_version"]
    facts = checked_value(fields, ManifestFacts, WHAT, path)
    wrong = contradictions(facts, path) + ([] if _are_joined(ranges) else ["ranges"])
    if wrong:
        raise damaged("the cache's plan is inconsistent", "; ".join(wrong), "consistent values", path)
    return Plan(facts=facts, ranges=ranges)


def _are_joined(ranges: list[list[int]]) -> bool:
    """Whether the ranges are (start, stop) pairs that cover the images from 0 without gaps."""
    return len(ranges) > 0 and all(
        len(pair) == 2 and pair[0] == before and 0 < pair[1] - pair[0] <= MAX_UNIT_SAMPLES
        for pair, before in zip(ranges, [0, *(pair[-1] if pair else 0 for pair in ranges)], strict=False)
    )
