"""A cache that is read while it grows, as far as its committed units say.

In: plan.json, and the units that are there. Out: a `Cache` whose later view groups are waited for.
Invariant: what is read is what the finished cache will hold at the same place: the first whole group fixes the number
of samples, a group is read only when all of its units are there, and every group holds the images of the first.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

from scalekd_cache.errors import UserError
from scalekd_cache.store import plan as plans
from scalekd_cache.store.manifest import NAME as MANIFEST
from scalekd_cache.store.manifest import Manifest, ManifestFacts, build_manifest, read_manifest
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.plan import Plan, read_plan
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.sidecar import unit_folder

POLL_S = 1.0
"""Seconds between two looks at the folder."""
SAY_S = 30.0
"""Seconds between two lines about a wait."""
RATE_UNITS = 16
"""Latest units that the writer's rate is taken from."""
Say = Callable[[str], None]


class GrowingCache(Cache):
    """A cache of the planned number of views, some of which are not there yet."""

    def __init__(self, root: Path, plan: Plan, timeout_s: float, say: Say) -> None:
        """Wait for the first group, which tells the number of samples.

        Args:
            root: the cache's folder.
            plan: what the cache is going to be.
            timeout_s: longest time without a new unit, in seconds.
            say: told what is being waited for.

        Raises:
            UserError: no unit came for `timeout_s`, or units do not belong together.
        """
        self._place, self._plan, self._timeout_s = root, plan, timeout_s
        self._groups_there = 0
        self._take_group(0, say)

    def wait_for(self, view: int, say: Say) -> None:
        """Return when all units of the view's group are there.

        Raises:
            UserError: no new unit for the time agreed, or the group does not hold the images of the first.
        """
        group = next(number for number, views in enumerate(self._plan.facts.groups) if view in views)
        if group >= self._groups_there:
            self._take_group(group, say)

    def _take_group(self, group: int, say: Say) -> None:
        root, facts = self._place, self._plan.facts
        for number in range(self._groups_there, group + 1):
            _wait_for_units(root, facts, number, self._timeout_s, say)
        manifest = _manifest_so_far(root, facts, group + 1)
        if self._groups_there and manifest.num_samples != len(self):
            raise UserError(
                "the first view group changed while it was read",
                got=f"{manifest.num_samples} images",
                expected=f"{len(self)} images",
                where=root,
                fix="start the run again in another folder (RUN=...)",
            )
        super().__init__(root, manifest)
        self._groups_there = group + 1


def read_cache_facts(root: StoredPath, follow: bool, timeout_s: float, say: Say) -> Manifest | ManifestFacts:
    """What a cache is: of a finished one from its manifest; of one that grows (`follow`) from its plan, waited for.

    Raises:
        UserError: not finished and not followed; no plan appeared for `timeout_s`; or a URL is to be followed.
    """
    if not follow:
        return read_manifest(root)
    if not isinstance(root, Path):
        raise UserError(
            "only a cache in a folder can be followed",
            got=root,
            expected="a folder",
            fix="leave FOLLOW out, or give a folder as CACHE=",
        )
    if (root / MANIFEST).exists() and not (root / plans.NAME).exists():
        return read_manifest(root)
    started, said = time.monotonic(), -SAY_S
    while not (root / plans.NAME).exists():
        waited = time.monotonic() - started
        if waited > timeout_s:
            raise UserError(
                "nobody has begun this cache",
                got=f"no {plans.NAME} for {_minutes(waited)}",
                where=root,
                fix="run make cache-teacher with this CACHE=",
            )
        if waited - said >= SAY_S:
            say(f"waiting for a writer to begin {root} (make cache-teacher), {_minutes(waited)} so far")
            said = waited
        time.sleep(POLL_S)
    return read_plan(root).facts


def follow_cache(root: StoredPath, timeout_s: float, say: Say) -> Cache:
    """A cache as its plan says it will be: the finished one, or one that grows, once its first group is there.

    Raises:
        UserError: nothing came for `timeout_s`, or what came does not belong together.
    """
    facts = read_cache_facts(root, True, timeout_s, say)
    assert isinstance(root, Path)
    if (root / MANIFEST).exists():
        manifest = read_manifest(root)
        if manifest.groups == facts.groups:
            return Cache(root, manifest)
    return GrowingCache(root, read_plan(root), timeout_s, say)


def _manifest_so_far(root: Path, facts: ManifestFacts, groups: int) -> Manifest:
    """A manifest that lists the units of the first groups and names all views of the plan."""
    manifest = read_manifest(root) if (root / MANIFEST).exists() else None
    if manifest is None or len(manifest.groups) < groups or manifest.fingerprint != facts.fingerprint:
        there = dataclasses.replace(facts, groups=facts.groups[:groups], ranges=facts.ranges[:groups])
        manifest = build_manifest(root, there)
    return dataclasses.replace(manifest, groups=facts.groups, num_views=sum(len(views) for views in facts.groups))


def _wait_for_units(root: Path, facts: ManifestFacts, group: int, timeout_s: float, say: Say) -> None:
    """Return when a group has all its units (a unit's folder has its final name only when it is whole)."""
    wanted = {unit_folder(root, group, number).name for number in range(len(facts.ranges[group]))}
    started = progress = time.monotonic()
    seen, said = -1, -SAY_S
    while True:
        names = _unit_names(root)
        missing = len(wanted - names)
        if not missing:
            return
        now = time.monotonic()
        if len(names) > seen:
            seen, progress = len(names), now
        views = facts.groups[group]
        there = f"views {views[0]} to {views[-1]} have {len(wanted) - missing} of {len(wanted)} units"
        if now - progress > timeout_s:
            raise UserError(
                "the cache has stopped growing",
                got=f"{there}; no new unit for {_minutes(now - progress)}",
                where=root,
                fix="run make cache-teacher again (it goes on), then this command (it goes on from its checkpoint); "
                "for a slow writer raise follow_timeout_minutes",
            )
        if now - started - said >= SAY_S:
            said = now - started
            say(f"waiting for {root}: {there}; {_minutes(said)} so far; {_rate(root, names, missing)}")
        time.sleep(POLL_S)


def _unit_names(root: Path) -> set[str]:
    """Folders of units, those in the making left out."""
    try:
        return {entry.name for entry in os.scandir(root / "units") if not entry.name.startswith(".")}
    except FileNotFoundError:
        return set()


def _rate(root: Path, names: set[str], missing: int) -> str:
    """How fast units came lately, and what that means."""
    times = sorted(mtime for name in names if (mtime := _mtime(root / "units" / name)) is not None)[-RATE_UNITS:]
    if len(times) < 2 or times[-1] <= times[0]:
        return "the writer's rate is not known yet"
    per_minute = 60 * (len(times) - 1) / (times[-1] - times[0])
    return f"the writer made {per_minute:.3g} units a minute lately, so about {missing / per_minute:.1f} min to go"


def _mtime(path: Path) -> float | None:
    """None for a unit that is being replaced."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"
