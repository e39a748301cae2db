"""plan.json: what a cache is going to be, written before its first unit.

In: the facts that a manifest will hold, and the layout. Out: the file, or the same facts read back and checked.
Invariant: with the plan and the committed units of a group alone, that group can be read: nothing waits for the
manifest. The first writer of a plan creates it, a later one never replaces it by another; a plan that is replaced by a
longer one begins with the same groups. Every byte is the one that was written.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scalekd_cache.store.base import FORMAT_VERSION, MAX_UNIT_SAMPLES, check_version, damaged
from scalekd_cache.store.checked_files import checked_value, read_json
from scalekd_cache.store.durable_files import write_atomically
from scalekd_cache.store.locks import lock
from scalekd_cache.store.manifest import ManifestFacts, contradictions
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.sealed_json import sealed, unsealed
from scalekd_cache.store.verify_unit import ExpectedUnit

NAME = "plan.json"
WHAT = "the cache's plan"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a writer set out to make."""

    facts: ManifestFacts
    """What the manifest will say beside what the units say; the ranges are the same in every group."""

    @property
    def num_views(self) -> int:
        """Views of every image, once the cache is finished."""
        return sum(len(views) for views in self.facts.groups)

    def units(self) -> list[ExpectedUnit]:
        """The units that there shall be, in the order they are handed out."""
        facts = self.facts
        return [
            ExpectedUnit(group, range_id, facts.fingerprint, facts.backend, views, (start, stop))
            for group, (views, ranges) in enumerate(zip(facts.groups, facts.ranges, strict=True))
            for range_id, (start, stop) in enumerate(ranges)
        ]


@contextlib.contextmanager
def changing_plan(root: Path) -> Iterator[None]:
    """Let one process at a time read and replace the plan of a cache, by a lock on the cache's folder.

    A file system without locks (some NFS and Lustre mounts) gives none; `create=True` of `write_plan` needs none.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            lock(descriptor, root / NAME)
        yield
    finally:
        os.close(descriptor)


def write_plan(root: Path, plan: Plan, *, create: bool = False) -> None:
    """Write plan.json in one step; `create`: FileExistsError when there is one."""
    facts = {field.name: getattr(plan.facts, field.name) for field in dataclasses.fields(plan.facts)}
    facts["ranges"] = plan.facts.ranges[0]
    write_atomically(root / NAME, sealed({"format_version": FORMAT_VERSION, **facts}), create=create)


def read_plan(root: StoredPath) -> Plan:
    """The plan of a cache, checked.

    Raises:
        UserError: there is none, it is damaged or of another format version, or its values do not agree.
    """
    path = root / NAME
    fields, data = read_json(path, WHAT, fix="run `make cache-teacher`: it continues")
    check_version(fields, path)
    fields = unsealed(fields, data, path)
    del fields["format_version"]
    facts = checked_value({**fields, "ranges": [fields.get("ranges")]}, ManifestFacts, WHAT, path)
    [ranges] = facts.ranges
    wrong = contradictions(facts, path) + ([] if _are_joined(ranges) else ["ranges"])
    if wrong:
        raise damaged("the cache's plan contradicts itself", "; ".join(wrong), "facts that agree", path)
    return Plan(facts=dataclasses.replace(facts, ranges=[ranges for _ in facts.groups]))


def _are_joined(ranges: list[list[int]]) -> bool:
    """Whether ranges are pairs of start and stop that follow each other from 0."""
    return len(ranges) > 0 and all(
        len(pair) == 2 and pair[0] == before and 0 < pair[1] - pair[0] <= MAX_UNIT_SAMPLES
        for pair, before in zip(ranges, [0, *(pair[-1] if pair else 0 for pair in ranges)], strict=False)
    )
