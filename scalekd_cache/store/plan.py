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
from typing import Any

from scalekd_cache.store.base import BACKENDS, FORMAT_VERSION, MAX_UNIT_SAMPLES, damaged
from scalekd_cache.store.checked_files import read_json
from scalekd_cache.store.files import write_atomically
from scalekd_cache.store.locks import lock
from scalekd_cache.store.manifest import ManifestFacts, names_pixels
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.sealed import check_version, sealed, unsealed
from scalekd_cache.store.sidecar import HEX64
from scalekd_cache.store.verify_unit import ExpectedUnit

NAME = "plan.json"


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
    fields, data = read_json(path, "the cache's plan")
    check_version(fields, path)
    fields = unsealed(fields, data, path)
    expected = {field.name: field.type for field in dataclasses.fields(ManifestFacts)}
    wrong = sorted(fields.keys() ^ {*expected, "format_version"})
    if not wrong:
        types: dict[str, Any] = {name: getattr(kind, "__origin__", kind) for name, kind in expected.items()}
        wrong = [name for name, kind in types.items() if type(fields[name]) is not kind]
    wrong = wrong or [name for name, right in _checks(fields).items() if not right]
    if wrong:
        got = f"wrong, missing or unknown: {', '.join(wrong)}"
        raise damaged("the cache's plan is damaged", got, "the fields of docs/FORMAT.md", path)
    facts = {name: fields[name] for name in expected}
    facts["ranges"] = [fields["ranges"] for _ in fields["groups"]]
    return Plan(facts=ManifestFacts(**facts))


def _checks(fields: dict[str, Any]) -> dict[str, bool]:
    """Every agreement within a plan."""
    groups, ranges = fields["groups"], fields["ranges"]
    pairs = all(isinstance(pair, list) and [type(end) for end in pair] == [int, int] for pair in ranges)
    joined = pairs and all(
        start == before and 0 < stop - start <= MAX_UNIT_SAMPLES
        for (start, stop), before in zip(ranges, [0, *(stop for _, stop in ranges)], strict=False)
    )
    views = [view for group in groups if isinstance(group, list) for view in group]
    return {
        "samples_per_shard": 0 < fields["samples_per_shard"] <= MAX_UNIT_SAMPLES,
        "fingerprint": HEX64.fullmatch(fields["fingerprint"]) is not None,
        "backend": fields["backend"] in BACKENDS,
        "pixels_from": names_pixels(fields["pixels_from"]),
        "groups": 0 < len(groups) <= len(views) <= 10_000
        and all(type(view) is int for view in views)
        and views == list(range(len(views)))
        and all(groups),
        "ranges": joined and len(ranges) > 0,
    }
