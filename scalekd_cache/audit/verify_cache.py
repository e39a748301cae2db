"""Deep check of a cache: checks files (`store/verify.py`) and records, then re-runs the teacher on a random sample.

In: a cache's folder or URL; optionally, new locations of its dataset and its teacher's weights.
Out: a `VerifyResult`.
Invariant: a note reports each check skipped because the teacher, the images or the pixels are not available.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from scalekd_cache.audit import RERUN_VIEWS
from scalekd_cache.audit.records import RecordChecker
from scalekd_cache.audit.rerun_teacher import TeacherAgreement, check_targets
from scalekd_cache.caching.pixel_cache import PixelCache
from scalekd_cache.config.base import from_plain
from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.data.base import Source
from scalekd_cache.data.source import open_cache_source
from scalekd_cache.errors import UserError
from scalekd_cache.models.teacher import cache_teacher_config, load_cache_teacher
from scalekd_cache.models.weights import weights_available
from scalekd_cache.store.manifest import NAME as MANIFEST
from scalekd_cache.store.manifest import Manifest, ManifestFacts, read_manifest
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.plan import read_plan
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.remote.remote_path import RemotePath, open_place
from scalekd_cache.store.shared_pixels import open_shared_pixels, shared_pixels_path
from scalekd_cache.store.verify import CheckResult, Expected, check_cache, unit_name
from scalekd_cache.store.verify_unit import Part, Problem


class VerifyResult(NamedTuple):
    """The result of a deep check."""

    findings: CheckResult
    agreement: TeacherAgreement | None
    """How well the targets match the teacher's outputs; None if the teacher was not run (a note says why)."""


def verify_deep(
    place: Path | str,
    *,
    data: str | None = None,
    weights: str | None = None,
    pixels_from: str | None = None,
    records: int = RERUN_VIEWS,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyResult:
    """Check every byte and record, and re-run the teacher on a random sample if its weights are available.

    Args:
        place: the cache's folder or URL.
        data: current path of the dataset (None: as recorded in the cache); needed for replayed views only.
        weights: file with the teacher's weights (None: as recorded in the cache).
        pixels_from: folder or URL of the cache that holds the pixels (None: as recorded in the cache).
        records: number of views on which to re-run the teacher (0: none).
        seed: seed for the random sample.
        device: device for the teacher.
        progress: called with (units done, total units).

    Raises:
        UserError: `weights` or `pixels_from` does not exist or does not belong to this cache.
    """
    root = open_place(place)
    notes, problems = list[str](), list[Problem]()
    manifest = manifest_or_none(root)
    facts = manifest.facts if manifest else _plan_facts(root)
    source = None if facts is None else _source_for(facts, data, notes)
    pixels = None if facts is None else _pixels_for(root, facts, manifest, pixels_from, problems, notes)
    classes = None if facts is None else len(facts.class_names)

    def checker(expected: Expected) -> RecordChecker:
        return RecordChecker(expected.fields, root, classes, source, pixels)

    findings = check_cache(root, deep=True, make_checker=checker, progress=progress)
    findings.problems.extend(problems)
    findings.notes.extend(notes)
    lost = any(problem.part is Part.CODEC_STATE for problem in findings.problems)
    if manifest is None or records == 0 or findings.expected is None or lost:
        return VerifyResult(findings, None)
    agreement = _rerun_teacher(
        root, manifest, checker(findings.expected), weights, records, seed, device, findings.notes
    )
    if agreement is not None:
        findings.problems.extend(_problems(agreement, Cache(root, manifest)))
    return VerifyResult(findings, agreement)


def manifest_or_none(root: StoredPath) -> Manifest | None:
    """The manifest; None if it cannot be read (`check_cache` reports why)."""
    try:
        return read_manifest(root)
    except UserError:
        return None


def _plan_facts(root: StoredPath) -> ManifestFacts | None:
    try:
        return read_plan(root).facts
    except UserError:
        return None


def _source_for(facts: ManifestFacts, data: str | None, notes: list[str]) -> Source | None:
    """The images of a cache with replayed views; adds a note if they are not available."""
    if ViewConfig(**from_plain(facts.view_recipe)).pixels == "baked":
        return None
    try:
        return open_cache_source(facts.data, data, "train")
    except UserError as error:
        notes.append(f"pixels were not checked: the images of the replayed views are not available\n{error}")
        return None


def _pixels_for(
    root: Path | RemotePath,
    facts: ManifestFacts,
    manifest: Manifest | None,
    place: str | None,
    problems: list[Problem],
    notes: list[str],
) -> PixelCache | None:
    """The cache that holds the pixels; adds a note if it is missing, or a problem if it is a different cache."""
    if manifest is None:
        if facts.pixels_from:
            notes.append("shared pixels were not checked: the cache is not finished")
        return None
    try:
        pixels = open_shared_pixels(Cache(root, manifest), place, manifest.num_views)
    except UserError as error:
        if place is not None:
            raise
        found = shared_pixels_path(root, facts)
        if found is not None and (found / MANIFEST).exists():
            problems.append(Problem(MANIFEST, None, f"pixels_from: {error}", Part.PIXELS))
        else:
            notes.append(f"shared pixels were not checked\n{error}")
        return None
    return None if pixels is None else PixelCache(pixels)


def _rerun_teacher(
    root: Path | RemotePath,
    manifest: Manifest,
    checker: RecordChecker,
    weights: str | None,
    records: int,
    seed: int,
    device: torch.device | None,
    notes: list[str],
) -> TeacherAgreement | None:
    """Compare a random sample with the teacher; adds a note and returns None if the weights or pixels are missing."""
    config = cache_teacher_config(
        manifest.facts.teacher["config"], weights, manifest.facts.fingerprint_fields["precision"]
    )
    if not weights_available(config):
        notes.append(
            f"the teacher was not run: its weights ({config.weights or 'pretrained'}) are not available; "
            "set --teacher-weights to a .safetensors file"
        )
        return None
    if (checker.shares and checker.pixels is None) or (checker.source is None and checker.views.pixels != "baked"):
        return None  # a note reports why
    teacher = load_cache_teacher(manifest, config, device or torch.device("cpu"))
    return check_targets(Cache(root, manifest), teacher, checker, records, seed)


def _problems(agreement: TeacherAgreement, cache: Cache) -> list[Problem]:
    """One problem for each record that does not match the teacher, with the record's unit."""
    problems = []
    for view, position, key, what in agreement.wrong:
        row, _ = cache.locate(position, view)
        place = row.group, row.range_id
        problems.append(Problem(f"{unit_name(place)}/v{view:04d}", key, what, Part.UNIT, place))
    return problems
