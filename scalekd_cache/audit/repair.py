"""Makes the damaged parts of a cache again: exactly the bad units, the tail, the manifest, the plan.

In: a cache's folder, its data and its teacher; every other option is read from the cache. Out: `RepairResult`.
Invariant: a bad unit is put aside, never deleted, until the new one is committed; what is whole is not touched; without
the cache's own teacher, views, codec and data nothing is made.
"""

import contextlib
import dataclasses
import functools
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from scalekd_cache.audit.verify_cache import manifest_or_none, verify_deep
from scalekd_cache.caching.codec_selection import codec_options, write_mark
from scalekd_cache.caching.job import cache_teacher
from scalekd_cache.caching.job_plan import remove_stale_files
from scalekd_cache.config.base import from_plain
from scalekd_cache.config.stage1 import CacheTeacherConfig, StoreConfig, ViewConfig
from scalekd_cache.data.source import data_config
from scalekd_cache.distributed import Process, autocast_dtype
from scalekd_cache.errors import UserError
from scalekd_cache.models.teacher import cache_teacher_config
from scalekd_cache.models.weights import weights_available
from scalekd_cache.store.manifest import CLASSIFIER, STATE, ManifestFacts
from scalekd_cache.store.manifest import NAME as MANIFEST
from scalekd_cache.store.plan import NAME as PLAN
from scalekd_cache.store.plan import Plan, read_plan, write_plan
from scalekd_cache.store.shared_pixels import shared_place
from scalekd_cache.store.sidecar import read_unit, unit_folder
from scalekd_cache.store.verify import MARK, UNITS, Findings, bad_units, unit_name
from scalekd_cache.store.verify_unit import Part, Problem

ASIDE = ".aside-"
"""Beginning of the names of what was put aside; readers and writers ignore such names."""
FILES = (Part.MANIFEST, Part.TAIL, Part.KEPT)
"""What lies beside the units and is made by stage 1."""


class RepairResult(NamedTuple):
    """What a repair has done."""

    found: list[Problem]
    """Before."""
    units: list[tuple[int, int]]
    """(group, range) of the units that were made again."""
    left: list[Problem]
    """After: what a repair does not mend, such as files that are not the cache's."""


def repair_cache(
    root: Path,
    process: Process,
    *,
    data: str | None = None,
    weights: str | None = None,
    pixels_from: str | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> RepairResult:
    """Check a cache deeply and make what is damaged again.

    Args:
        root: the cache's folder.
        process: this process; a repair has no peers.
        data: where the data set lies now (None: where it was).
        weights: the teacher's weights (None: where they were).
        pixels_from: where the cache lies whose pixels are shared (None: where it was).
        workers: processes that draw views.
        progress: of the check.

    Raises:
        UserError: the options cannot be read from the cache, or the teacher or data are not those it was made from.
            The cache is then as it was.
    """
    remove_stale_files(root, process)
    check = functools.partial(verify_deep, root, data=data, weights=weights, pixels_from=pixels_from)
    found = check(device=process.device, progress=progress).findings
    problems = found.problems
    parts = {problem.part for problem in problems}
    if found.expected is None:
        raise _no_options(root, problems)
    if Part.PLAN in parts or not (root / PLAN).exists():
        _write_plan_again(root, found)
    units, facts = bad_units(problems), read_plan(root).facts
    if Part.MARK in parts:
        write_mark(root, facts.fingerprint_fields)
    if parts & {Part.UNIT, Part.TAIL, Part.KEPT, Part.MANIFEST, Part.UNFINISHED}:
        config = stage1_config(
            facts, root, process, data=data, weights=weights, pixels_from=pixels_from, workers=workers
        )
        _check_at_hand(config, root)
        files = [problem.where for problem in problems if problem.part in FILES]
        files += [MARK] if STATE in files else []  # without it stage 1 fits the codec again
        files += [MANIFEST] if CLASSIFIER in files else []  # without it stage 1 begins once more
        with _put_aside(root, [*dict.fromkeys(files), *(unit_name(unit) for unit in units)]):
            cache_teacher(config, process)
    for aside, successor in _asides(root):
        _restore_unknown_files(aside, successor)
    left = check(records=0).findings.problems if problems else []
    _remove_asides(root, left)
    return RepairResult(problems, units, left)


def stage1_config(
    facts: ManifestFacts,
    root: Path,
    process: Process,
    *,
    data: str | None = None,
    weights: str | None = None,
    pixels_from: str | None = None,
    workers: int = 0,
) -> CacheTeacherConfig:
    """The options of stage 1 that a cache was made with, from its plan; data, weights and pixels where they lie now."""
    fields, teacher = facts.fingerprint_fields, facts.teacher["config"]
    precision = teacher["precision"]
    if str(autocast_dtype(precision, process.device)).removeprefix("torch.") != fields["precision"]:
        precision = fields["precision"]  # "auto" means something else on this machine than where the cache was made
    if facts.pixels_from and pixels_from is None:
        pixels_from = str(shared_place(root, facts))
    return CacheTeacherConfig(
        recipe=facts.recipe,
        data=data_config(facts.data, data),
        views=ViewConfig(**from_plain(fields["views"])),
        teacher=cache_teacher_config(teacher, weights, precision),
        cache=StoreConfig(
            path=str(root),
            backend=facts.backend,  # type: ignore[arg-type]  # one of the two, or the plan is not read
            **_codec_options(fields, root),
            num_views=sum(len(group) for group in facts.groups),
            views_per_group=max(len(group) for group in facts.groups),
            samples_per_shard=facts.samples_per_shard,
            pixels_from=pixels_from,
        ),
        workers=workers,
    )


def _codec_options(fields: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """The options that name a cache's codecs; a fitted one's preset stands beside its state."""
    logits = fields["logit_codec"]
    kept = {
        "logits-top-k": {"logits": "top_k", "top_k": logits.get("k")},
        "logits-recomputed": {"logits": "recomputed"},
    }
    options: dict[str, Any] = {"codec": fields["codec"]["id"], **kept.get(logits["id"], {})}
    if "state_sha256" in fields["codec"]:
        options |= codec_options(root)
    return options


def _check_at_hand(config: CacheTeacherConfig, root: Path) -> None:
    """Before anything is put aside: the teacher and the pixels are there."""
    if not weights_available(config.teacher):
        raise UserError(
            "the teacher's weights are not at hand",
            got=config.teacher.weights or "timm's pretrained weights, which would have to be fetched",
            where=root,
            fix="give TEACHER_WEIGHTS=file.safetensors, the file the cache was made with",
        )
    pixels = config.cache.pixels_from
    if pixels is not None and not (Path(pixels) / MANIFEST).exists():
        raise UserError(
            "the cache whose pixels are shared is not there",
            got=f"no manifest in {pixels}",
            where=root,
            fix="bring it there, or say where it is with PIXELS_FROM=",
        )


def _no_options(root: Path, problems: list[Problem]) -> UserError:
    if not (root / UNITS).is_dir():
        return UserError("this is not a cache", where=root, fix="check the path (CACHE=...)")
    return UserError(
        "neither manifest.json nor plan.json can be read, so the options the cache was made with are not known",
        got="; ".join(
            problem.what.splitlines()[0] for problem in problems if problem.part in (Part.PLAN, Part.MANIFEST)
        ),
        where=root,
        fix="delete both files and run `make cache-teacher` with the options of the first time: it keeps the units "
        "that have the same fingerprint and refuses others; then run `make verify CACHE=... DEEP=1`",
    )


def _write_plan_again(root: Path, found: Findings) -> None:
    """plan.json from the manifest and the ranges in the sidecars of any one group that is there in full."""
    manifest = manifest_or_none(root)
    if manifest is None:
        raise _no_options(root, found.problems)
    for group in range(len(manifest.groups)):
        ranges = []
        for row in manifest.units:
            if row.group == group:
                try:
                    info, _ = read_unit(unit_folder(root, row.group, row.range_id))
                except UserError:
                    break
                ranges.append([info.start, info.stop])
        else:
            names = [field.name for field in dataclasses.fields(ManifestFacts) if field.name != "ranges"]
            known = {name: getattr(manifest, name) for name in names}
            write_plan(root, Plan(facts=ManifestFacts(**known, ranges=[ranges for _ in manifest.groups])))
            return
    raise UserError(
        "plan.json is damaged, and no group of views has all its sidecars to write it again",
        where=root / PLAN,
        fix="delete plan.json and the damaged units, then run `make cache-teacher` with the options of the first time",
    )


@contextlib.contextmanager
def _put_aside(root: Path, names: list[str]) -> Iterator[None]:
    """Rename what is bad; on an error everything that was not made again gets its name back.

    A codec that was fitted again before the error is another one (it is in the fingerprint): that one goes.
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
        for name in {STATE, MARK} & set(names):
            (root / name).unlink(missing_ok=True)
        for aside, path in moved:
            if not path.exists():
                aside.rename(path)
        raise


def _asides(root: Path) -> list[tuple[Path, Path]]:
    """What was put aside, by this repair or one that was killed, with what has taken its place."""
    found = [*root.glob(f"{ASIDE}*"), *(root / UNITS).glob(f"{ASIDE}*")]
    pairs = [(aside, aside.with_name(aside.name.removeprefix(ASIDE).rpartition("-")[0])) for aside in found]
    return [(aside, successor) for aside, successor in pairs if successor.exists()]


def _unknown_files(aside: Path, successor: Path) -> list[Path]:
    """Files in a unit that was put aside which have no namesake in the new one: they are not the cache's."""
    files = [path.relative_to(aside) for path in sorted(aside.rglob("*")) if path.is_symlink() or path.is_file()]
    return [name for name in files if not (successor / name).exists()]


def _restore_unknown_files(aside: Path, successor: Path) -> None:
    """Bring them to where they were, to be reported; what cannot be brought stays aside."""
    for name in _unknown_files(aside, successor):
        with contextlib.suppress(FileExistsError, NotADirectoryError):
            (successor / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).rename(successor / name)


def _remove_asides(root: Path, left: list[Problem]) -> None:
    """Delete what was put aside where its successor is whole."""
    bad = {unit_name(problem.unit) for problem in left if problem.part is Part.UNIT and problem.unit is not None}
    bad |= {problem.where for problem in left if problem.part in FILES}
    for aside, successor in _asides(root):
        if successor.relative_to(root).as_posix() not in bad and not _unknown_files(aside, successor):
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
