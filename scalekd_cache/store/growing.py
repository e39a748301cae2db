"""Reads a cache while stage 1 is still writing it.

In: plan.json, and the committed units. Out: a `Cache` that waits for later view groups.
Invariant: every record read is the one that the finished cache will have at that position. The first complete group
determines the number of samples, a group is read only when all its units are committed, and all groups hold the same
images.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

from scalekd_cache.errors import UserError, counted
from scalekd_cache.progress import duration_text
from scalekd_cache.store import plan as plans
from scalekd_cache.store.checked_files import is_there
from scalekd_cache.store.manifest import NAME as MANIFEST
from scalekd_cache.store.manifest import Manifest, ManifestFacts, build_manifest, read_manifest
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.plan import Plan, read_plan
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.sidecar import unit_folder

POLL_S = 1.0
"""Seconds between scans of the folder."""
REPORT_S = 30.0
"""Seconds between progress lines while waiting."""
RATE_UNITS = 16
"""Number of most recent units used to estimate the writer's rate."""
Report = Callable[[str], None]
"""Called to print one progress line."""


class GrowingCache(Cache):
    """A cache with the planned number of views, some of which may not be written yet."""

    def __init__(self, root: Path, plan: Plan, timeout_s: float, report: Report) -> None:
        """Wait for the first group, which determines the number of samples.

        Args:
            root: the cache's folder.
            plan: the cache's plan.
            timeout_s: maximum number of seconds without a new unit.
            report: called to print progress while waiting.

        Raises:
            UserError: no new unit appeared for `timeout_s`, or the units do not belong to one cache.
        """
        self._place, self._plan, self._timeout_s = root, plan, timeout_s
        self._complete_groups = 0
        self._load_group(0, report)

    def wait_for(self, view: int, report: Report) -> None:
        """Wait until all units of the view's group are committed.

        Raises:
            UserError: no new unit appeared for `timeout_s`, or the group does not hold the same images as the first.
        """
        group = next(number for number, views in enumerate(self._plan.facts.groups) if view in views)
        if group >= self._complete_groups:
            self._load_group(group, report)

    def _load_group(self, group: int, report: Report) -> None:
        root = self._place
        for number in range(self._complete_groups, group + 1):
            _wait_for_units(root, self._plan, number, self._timeout_s, report)
        manifest = _manifest_so_far(root, self._plan, group + 1)
        if self._complete_groups and manifest.num_samples != len(self):
            raise UserError(
                "the first view group changed while the run was reading it",
                got=counted(manifest.num_samples, "image"),
                expected=counted(len(self), "image"),
                where=root,
                fix="start a new run in a different folder (--run ...)",
            )
        super().__init__(root, manifest)
        self._complete_groups = group + 1


def read_cache_facts(root: StoredPath, follow: bool, timeout_s: float, report: Report) -> ManifestFacts:
    """The facts about a cache, from its manifest if it is finished or, with `follow`, from its plan once that exists.

    Raises:
        UserError: the cache is not finished and `follow` is not set, there is no plan after `timeout_s`, or `follow` is
            set for a URL.
    """
    if not follow:
        return read_manifest(root).facts
    if not isinstance(root, Path):
        raise UserError(
            "--follow needs a cache in a local folder",
            got=root,
            expected="a folder",
            fix="remove --follow, or set --cache to a folder",
        )
    if is_there(root / MANIFEST) and not is_there(root / plans.NAME):
        return read_manifest(root).facts
    started, reported_s = time.monotonic(), -REPORT_S
    while not is_there(root / plans.NAME):
        waited = time.monotonic() - started
        if waited > timeout_s:
            raise UserError(
                "no writer has started this cache yet",
                got=f"no {plans.NAME} after {duration_text(waited)}",
                where=root,
                fix="run `scalekd cache-teacher` with this --cache",
            )
        if waited - reported_s >= REPORT_S:
            report(f"waiting for `scalekd cache-teacher` to start writing {root}, {duration_text(waited)} so far")
            reported_s = waited
        time.sleep(POLL_S)
    return read_plan(root).facts


def open_growing_cache(root: StoredPath, timeout_s: float, report: Report) -> Cache:
    """Open a cache with all planned views. If it is still being written, wait until its first group is complete.

    Raises:
        UserError: no plan or unit appeared for `timeout_s`, or the units do not belong to one cache.
    """
    facts = read_cache_facts(root, True, timeout_s, report)
    assert isinstance(root, Path)
    if is_there(root / MANIFEST):
        manifest = read_manifest(root)
        if manifest.facts.groups == facts.groups:
            return Cache(root, manifest)
    return GrowingCache(root, read_plan(root), timeout_s, report)


def _manifest_so_far(root: Path, plan: Plan, groups: int) -> Manifest:
    """A manifest with the units of the first `groups` groups and all views in the plan."""
    facts = plan.facts
    manifest = read_manifest(root) if is_there(root / MANIFEST) else None
    if manifest is None or len(manifest.facts.groups) < groups or manifest.facts.fingerprint != facts.fingerprint:
        manifest = build_manifest(root, dataclasses.replace(facts, groups=facts.groups[:groups]), plan.ranges)
    planned = dataclasses.replace(manifest.facts, groups=facts.groups)
    units = [row for row in manifest.units if row.group < groups]  # a newer plan may have added groups
    return dataclasses.replace(manifest, facts=planned, num_views=facts.num_views, units=units)


def _wait_for_units(root: Path, plan: Plan, group: int, timeout_s: float, report: Report) -> None:
    """Wait until a group has all its units (a unit folder gets its final name once it is complete)."""
    wanted = {unit_folder(root, group, number).name for number in range(len(plan.ranges))}
    started = progress = time.monotonic()
    seen, reported_s = -1, -REPORT_S
    while True:
        names = _unit_names(root)
        missing = len(wanted - names)
        if not missing:
            return
        now = time.monotonic()
        if len(names) > seen:
            seen, progress = len(names), now
        views = plan.facts.groups[group]
        named = f"views {views[0]} to {views[-1]} have" if len(views) > 1 else f"view {views[0]} has"
        there = f"{named} {len(wanted) - missing} of {counted(len(wanted), 'unit')}"
        if now - progress > timeout_s:
            raise UserError(
                "no new units: stage 1 has stopped, or a unit takes longer than the timeout",
                got=f"{there}; no new unit for {duration_text(now - progress)}",
                where=root,
                fix="rerun `scalekd cache-teacher`, then this command; both resume. If the writer is still running but "
                "slow, increase follow_timeout_minutes",
            )
        if now - started - reported_s >= REPORT_S:
            reported_s = now - started
            report(f"waiting for {root}: {there}; {duration_text(reported_s)} so far; {_rate(root, names, missing)}")
        time.sleep(POLL_S)


def _unit_names(root: Path) -> set[str]:
    """Names of the unit folders, except temporary ones."""
    try:
        return {entry.name for entry in os.scandir(root / "units") if not entry.name.startswith(".")}
    except FileNotFoundError:
        return set()


def _rate(root: Path, names: set[str], missing: int) -> str:
    """The writer's recent rate and the remaining time, as text."""
    times = sorted(mtime for name in names if (mtime := _mtime(root / "units" / name)) is not None)[-RATE_UNITS:]
    if len(times) < 2 or times[-1] <= times[0]:
        return "the writer's rate is not known yet"
    per_minute = 60 * (len(times) - 1) / (times[-1] - times[0])
    return f"the writer commits {per_minute:.3g} units/min, about {duration_text(60 * missing / per_minute)} left"


def _mtime(path: Path) -> float | None:
    """Modification time; None for a unit that is being replaced."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None
