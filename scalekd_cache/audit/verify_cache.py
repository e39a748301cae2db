"""A whole check of a cache as one job: files and records, then what the teacher says of some of them.

In: a cache's folder or URL, and where its data and its teacher's weights lie now. Out: a `VerifyResult`.
Invariant: what cannot be looked at here (no teacher, no images, no pixels) is said, never counted as whole in silence.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from scalekd_cache.audit.records import RecordChecker
from scalekd_cache.audit.reinfer import TeacherAgreement, reinfer
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
from scalekd_cache.store.reader import Cache, unit_of
from scalekd_cache.store.remote.remote_path import RemotePath, open_place
from scalekd_cache.store.shared_pixels import pixels_of, shared_place
from scalekd_cache.store.verify import Expected, Findings, check_cache, unit_name
from scalekd_cache.store.verify_unit import Part, Problem


class VerifyResult(NamedTuple):
    """What a deep check has found."""

    findings: Findings
    agreement: TeacherAgreement | None
    """What the teacher said; None where it was not asked (a note says why)."""


def verify_deep(
    place: Path | str,
    *,
    data: str | None = None,
    weights: str | None = None,
    pixels_from: str | None = None,
    records: int = 16,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyResult:
    """Read every byte, decode every record, and ask the teacher about some of them when it is at hand.

    Args:
        place: the cache's folder or URL.
        data: where the data set lies now (None: where it was); needed for replayed views only.
        weights: the teacher's weights (None: where they were).
        pixels_from: folder or URL of the cache whose pixels are shared (None: where it was).
        records: views that the teacher is shown again (0: none).
        seed: of the choice of those.
        device: where the teacher runs.
        progress: called with (units done, units in all).

    Raises:
        UserError: `weights` or `pixels_from` are not there or not those of the cache.
    """
    root = open_place(place)
    notes, problems = list[str](), list[Problem]()
    manifest = manifest_or_none(root)
    facts = manifest or _planned(root)
    source = None if facts is None else _source_for(facts, data, notes)
    pixels = None if facts is None else _pixels_for(root, facts, pixels_from, problems, notes)
    classes = None if facts is None else len(facts.class_names)

    def checker(expected: Expected) -> RecordChecker:
        return RecordChecker(expected.fields, root, classes, source, pixels)

    findings = check_cache(root, deep=True, make_checker=checker, progress=progress)
    findings.problems.extend(problems)
    findings.notes.extend(notes)
    lost = any(problem.part is Part.KEPT for problem in findings.problems)
    if manifest is None or records == 0 or findings.expected is None or lost:
        return VerifyResult(findings, None)
    agreement = _ask_teacher(root, manifest, checker(findings.expected), weights, records, seed, device, findings.notes)
    if agreement is not None:
        findings.problems.extend(_problems(agreement, manifest))
    return VerifyResult(findings, agreement)


def manifest_or_none(root: StoredPath) -> Manifest | None:
    """The manifest, None when there is none that can be read (which `check_cache` reports)."""
    try:
        return read_manifest(root)
    except UserError:
        return None


def _planned(root: StoredPath) -> ManifestFacts | None:
    try:
        return read_plan(root).facts
    except UserError:
        return None


def _source_for(facts: Manifest | ManifestFacts, data: str | None, notes: list[str]) -> Source | None:
    """The images of a replayed cache; a note when they are not there."""
    if ViewConfig(**from_plain(facts.view_recipe)).pixels == "baked":
        return None
    try:
        return open_cache_source(facts.data, data, "train")
    except UserError as error:
        notes.append(f"pixels were not looked at: views are replayed from images that are not here\n{error}")
        return None


def _pixels_for(
    root: Path | RemotePath,
    facts: Manifest | ManifestFacts,
    place: str | None,
    problems: list[Problem],
    notes: list[str],
) -> PixelCache | None:
    """The cache whose pixels are shared: a note when it is not there, a problem when it is there and another one."""
    if isinstance(facts, ManifestFacts):
        if facts.pixels_from:
            notes.append("shared pixels were not looked at: the cache is not finished")
        return None
    try:
        pixels = pixels_of(Cache(root, facts), place, facts.num_views)
    except UserError as error:
        if place is not None:
            raise
        there = shared_place(root, facts)
        if there is not None and (there / MANIFEST).exists():
            problems.append(Problem(MANIFEST, None, f"pixels_from: {error}", Part.PIXELS))
        else:
            notes.append(f"shared pixels were not looked at\n{error}")
        return None
    return None if pixels is None else PixelCache(pixels)


def _ask_teacher(
    root: Path | RemotePath, manifest: Manifest, checker: RecordChecker, weights: str | None, records: int, seed: int,
    device: torch.device | None, notes: list[str],
) -> TeacherAgreement | None:  # fmt: skip
    config = cache_teacher_config(manifest.teacher["config"], weights, manifest.fingerprint_fields["precision"])
    if not weights_available(config):
        notes.append(
            f"the teacher was not asked: its weights ({config.weights or 'pretrained'}) are not at hand; "
            "give TEACHER_WEIGHTS=file.safetensors"
        )
        return None
    if (checker.shares and checker.pixels is None) or (checker.source is None and checker.views.pixels != "baked"):
        return None  # a note has said why
    teacher = load_cache_teacher(manifest, config, device or torch.device("cpu"))
    return reinfer(Cache(root, manifest), teacher, checker, records, seed)


def _problems(agreement: TeacherAgreement, manifest: Manifest) -> list[Problem]:
    """The records that are not the teacher's answer, with the unit that holds them."""
    problems = []
    for view, position, key, what in agreement.wrong:
        row = unit_of(manifest, view, position)
        place = row.group, row.range_id
        problems.append(Problem(f"{unit_name(place)}/v{view:04d}", key, what, Part.UNIT, place))
    return problems
