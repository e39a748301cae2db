"""Repairs a cache: regenerates the damaged units, tail, manifest and plan, and nothing else.

In: a cache folder, its dataset and its teacher; all other options are read from the cache.
Out: a `RepairResult`.
Invariant: a damaged unit is moved aside and deleted only after the new one is committed. Intact files do not change. A
repair needs the teacher, views, codec and data that the cache was made with.
"""

import contextlib
import dataclasses
import functools
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from scalekd_cache.audit import RERUN_VIEWS
from scalekd_cache.audit.verify_cache import manifest_or_none, verify_deep
from scalekd_cache.caching.codec_selection import write_codec_choice
from scalekd_cache.caching.configure import stage1_config
from scalekd_cache.caching.job import cache_teacher, remove_stale_files
from scalekd_cache.config.stage1 import CacheTeacherConfig
from scalekd_cache.devices import autocast_dtype
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError, shell_command
from scalekd_cache.models.weights import weights_available
from scalekd_cache.store.manifest import CLASSIFIER, STATE
from scalekd_cache.store.manifest import NAME as MANIFEST
from scalekd_cache.store.plan import NAME as PLAN
from scalekd_cache.store.plan import Plan, read_plan, write_plan
from scalekd_cache.store.remote.url_transfer import without_password
from scalekd_cache.store.sidecar import read_unit, unit_folder
from scalekd_cache.store.verify import CODEC_FILE, UNITS, CheckResult, bad_units, unit_name
from scalekd_cache.store.verify_unit import Part, Problem

ASIDE = ".aside-"
"""Name prefix for files and folders that were moved aside; readers and writers ignore them."""
FILES = (Part.MANIFEST, Part.TEACHER, Part.CODEC_STATE)
"""Files that stage 1 writes next to the units."""


class RepairResult(NamedTuple):
    """The result of a repair."""

    found: list[Problem]
    """Problems before the repair."""
    units: list[tuple[int, int]]
    """(group, range) of the regenerated units."""
    left: list[Problem]
    """Problems that remain after the repair, such as unknown files, which a repair does not touch."""


def repair_cache(
    root: Path,
    process: Process,
    *,
    data: str | None = None,
    weights: str | None = None,
    pixels_from: str | None = None,
    records: int = RERUN_VIEWS,
    seed: int = 0,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> RepairResult:
    """Run the deep check and regenerate what is damaged.

    Args:
        root: the cache folder.
        process: this process; a repair runs in one process.
        data: current path of the dataset (None: as recorded in the cache).
        weights: file with the teacher's weights (None: as recorded in the cache).
        pixels_from: folder of the cache that holds the pixels (None: as recorded in the cache).
        records: number of views on which the check re-runs the teacher (0: none).
        seed: seed for the random sample of these views.
        workers: number of worker processes that generate views.
        progress: called with (units done, total units) during the check.

    Raises:
        UserError: the options cannot be read from the cache, or the teacher or data differ from the recorded ones. The
            cache is left unchanged.
    """
    if pixels_from is not None and "://" in pixels_from:
        raise UserError(
            "a repair needs a local copy of the shared pixels",
            got=f"--pixels-from {without_password(pixels_from)}",
            fix="download that cache with `scalekd pull`, then set --pixels-from to its folder",
        )
    remove_stale_files(root, process)
    check = functools.partial(verify_deep, root, data=data, weights=weights, pixels_from=pixels_from)
    found = check(records=records, seed=seed, device=process.device, progress=progress).findings
    problems = found.problems
    parts = {problem.part for problem in problems}
    if found.expected is None:
        raise _options_unreadable(root, problems)
    if Part.PLAN in parts or not (root / PLAN).exists():
        _rebuild_plan(root, found)
    units, facts = bad_units(problems), read_plan(root).facts
    if Part.CODEC_CHOICE in parts:
        write_codec_choice(root, facts.fingerprint_fields)
    if parts & {Part.UNIT, Part.TEACHER, Part.CODEC_STATE, Part.MANIFEST, Part.UNFINISHED}:
        config = stage1_config(facts, root, data=data, weights=weights, pixels_from=pixels_from, workers=workers)
        config = _at_precision(facts.fingerprint_fields["precision"], config, process)
        _require_inputs(config, root)
        files = [problem.where for problem in problems if problem.part in FILES]
        files += [CODEC_FILE] if STATE in files else []  # otherwise, stage 1 keeps the old codec state
        files += [MANIFEST] if CLASSIFIER in files else []  # otherwise, stage 1 considers the cache finished
        with _moved_aside(root, [*dict.fromkeys(files), *(unit_name(unit) for unit in units)]):
            cache_teacher(config, process)
    for aside, successor in _set_aside(root):
        _restore_unknown_files(aside, successor)
    left = check(records=0).findings.problems if problems else []
    _remove_set_aside(root, left)
    return RepairResult(problems, units, left)


def _at_precision(stored: str, config: CacheTeacherConfig, process: Process) -> CacheTeacherConfig:
    """The options with the cache's precision, if "auto" is another one on this machine."""
    if str(autocast_dtype(config.teacher.precision, process.device)).removeprefix("torch.") == stored:
        return config
    teacher = dataclasses.replace(config.teacher, precision=stored)  # type: ignore[arg-type]  # from a checked plan
    return dataclasses.replace(config, teacher=teacher)


def _require_inputs(config: CacheTeacherConfig, root: Path) -> None:
    """Check that the teacher and the pixels are available before anything is moved."""
    teacher = config.teacher
    if not weights_available(teacher):
        fetch = shell_command("fetch", teacher=teacher.name)
        raise UserError(
            "the teacher's weights are not available",
            got=teacher.weights or "timm's pretrained weights, which must be downloaded",
            where=root,
            fix="set --teacher-weights to the .safetensors file that the cache was made with"
            if teacher.weights
            else f"run `{fetch}`, then set --teacher-weights to the file that it writes",
        )
    pixels = config.cache.pixels_from
    if pixels is not None and not (Path(pixels) / MANIFEST).exists():
        raise UserError(
            "the cache that stores the shared pixels is missing",
            got=f"no manifest in {pixels}",
            where=root,
            fix="restore that cache, or set --pixels-from to its path",
        )


def _options_unreadable(root: Path, problems: list[Problem]) -> UserError:
    if not (root / UNITS).is_dir():
        return UserError("this is not a cache", where=root, fix="check the path (--cache ...)")
    return UserError(
        "neither manifest.json nor plan.json can be read, so the cache's options are unknown",
        got="; ".join(
            problem.what.splitlines()[0] for problem in problems if problem.part in (Part.PLAN, Part.MANIFEST)
        ),
        where=root,
        fix="delete both files and rerun `scalekd cache-teacher` with the original options (others are rejected). It "
        "reuses the existing units. Then run `scalekd verify --cache ... --deep`",
    )


def _rebuild_plan(root: Path, found: CheckResult) -> None:
    """Write plan.json from the manifest and the ranges in the sidecars of any complete group."""
    manifest = manifest_or_none(root)
    if manifest is None:
        raise _options_unreadable(root, found.problems)
    for group in range(len(manifest.facts.groups)):
        ranges = []
        for row in manifest.units:
            if row.group == group:
                try:
                    info, _ = read_unit(unit_folder(root, row.group, row.range_id))
                except UserError:
                    break
                ranges.append([info.start, info.stop])
        else:
            write_plan(root, Plan(facts=manifest.facts, ranges=ranges))
            return
    raise UserError(
        "plan.json cannot be rebuilt: every view group has a unit without a readable sidecar (unit.json)",
        where=root / PLAN,
        fix="delete plan.json and the damaged units, then run `scalekd cache-teacher` with the original options",
    )


@contextlib.contextmanager
def _moved_aside(root: Path, names: list[str]) -> Iterator[None]:
    """Move damaged files and units aside; after an error, move back everything that was not regenerated.

    A newly fitted codec is deleted after an error, because it may differ from the one in the fingerprint.
    """
    moved: list[tuple[Path, Path]] = []
    try:
        for name in names:
            path = root / name
            if path.exists():
                aside = path.with_name(f"{ASIDE}{path.name}-{secrets.token_hex(4)}")
                path.rename(aside)
                moved.append((aside, path))
        yield
    except BaseException:
        for name in {STATE, CODEC_FILE} & set(names):
            (root / name).unlink(missing_ok=True)
        for aside, path in moved:
            if not path.exists():
                aside.rename(path)
        raise


def _set_aside(root: Path) -> list[tuple[Path, Path]]:
    """(path moved aside, path of its replacement) pairs from this repair and from killed repairs."""
    found = [*root.glob(f"{ASIDE}*"), *(root / UNITS).glob(f"{ASIDE}*")]
    pairs = [(aside, aside.with_name(aside.name.removeprefix(ASIDE).rpartition("-")[0])) for aside in found]
    return [(aside, successor) for aside, successor in pairs if successor.exists()]


def _unknown_files(aside: Path, successor: Path) -> list[Path]:
    """Files in a moved unit that its replacement lacks, which therefore do not belong to the cache."""
    files = [path.relative_to(aside) for path in sorted(aside.rglob("*")) if path.is_symlink() or path.is_file()]
    return [name for name in files if not (successor / name).exists()]


def _restore_unknown_files(aside: Path, successor: Path) -> None:
    """Move unknown files back so that they are reported; files that cannot be moved stay aside."""
    for name in _unknown_files(aside, successor):
        with contextlib.suppress(FileExistsError, NotADirectoryError):
            (successor / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).rename(successor / name)


def _remove_set_aside(root: Path, left: list[Problem]) -> None:
    """Delete each file or folder that was moved aside and whose replacement is intact."""
    bad = {unit_name(problem.unit) for problem in left if problem.part is Part.UNIT and problem.unit is not None}
    bad |= {problem.where for problem in left if problem.part in FILES}
    for aside, successor in _set_aside(root):
        if successor.relative_to(root).as_posix() not in bad and not _unknown_files(aside, successor):
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
