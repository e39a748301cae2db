"""Plans a cache: its fingerprint, view groups and work units.

In: a `CacheTeacherConfig`, images and a teacher. Out: a `Job`, and plan.json in the cache folder.
Invariant: view groups can be added to an existing plan, but nothing else can change. A different teacher, view recipe,
codec, dataset or layout raises an error that lists the differing fields.
"""

import contextlib
import dataclasses
import hashlib
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from scalekd_cache.caching.codec_selection import check_codec_files
from scalekd_cache.caching.make_units import Stage, plan_units, unit_ranges
from scalekd_cache.caching.pixel_cache import PixelCache, PixelFacts
from scalekd_cache.caching.plan_check import check_plan, check_teacher_given
from scalekd_cache.caching.sample_views import Unit
from scalekd_cache.codec import recomputed
from scalekd_cache.codec.base import FeatureCodec
from scalekd_cache.codec.logits import DenseLogits, LogitCodec
from scalekd_cache.codec.pooled import pooled_codec
from scalekd_cache.codec.recomputed import RecomputedLogits
from scalekd_cache.codec.top_k import TopKLogits
from scalekd_cache.config.base import fingerprint, to_plain
from scalekd_cache.config.recipes import kept_options, local_options
from scalekd_cache.config.stage1 import CacheTeacherConfig, StoreConfig
from scalekd_cache.data.base import Source
from scalekd_cache.data.source import data_facts
from scalekd_cache.devices import autocast_dtype, recorded_versions
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError, counted
from scalekd_cache.loader.order import class_correlation
from scalekd_cache.models.tail import tail_bytes
from scalekd_cache.models.teacher import Teacher, split_tail
from scalekd_cache.store import plan as plans
from scalekd_cache.store.durable_files import has_sha256, write_atomically
from scalekd_cache.store.manifest import (
    CLASSIFIER,
    FEATURES_EVERY,
    HELD_OUT,
    TAIL,
    Manifest,
    ManifestFacts,
    TeacherFacts,
    build_manifest,
    codec_files,
    read_manifest,
    write_manifest,
)
from scalekd_cache.store.manifest import NAME as MANIFEST
from scalekd_cache.store.plan import Plan, read_plan, write_plan
from scalekd_cache.store.resume import CommittedUnits
from scalekd_cache.store.shared_pixels import pixel_reference
from scalekd_cache.store.sidecar import unit_folder

LAYOUT = ("backend", "samples_per_shard", "fingerprint", "fingerprint_fields")
"""Plan fields that must be the same for every job that writes to the cache."""


class Job(NamedTuple):
    """The inputs to a stage-1 job."""

    stage: Stage
    plan: Plan
    """Facts about the cache known before the first unit is made. They are written to the manifest."""
    units: list[Unit]
    ledger: CommittedUnits
    """The units already in the cache."""
    shared: PixelFacts | None = None
    """The cache that stores the pixels; None if it is this one."""
    held_out: bytes | None = None
    """The contents of heldout.safetensors, if not written yet."""
    first: CommittedUnits | None = None
    """With multiple teachers, the units of the completed first cache, which determine the images in this cache."""


def make_plan(
    config: CacheTeacherConfig,
    process: Process,
    source: Source | PixelCache,
    teacher: Teacher,
    codec: FeatureCodec,
    shared: PixelFacts | None = None,
) -> Job:
    """Plan the work units and everything that determines the cached bytes, or extend an existing plan (`join_plan`).

    Args:
        config: all options of stage 1.
        process: this process.
        source: the images, or the cache that stores their views.
        teacher: the teacher.
        codec: codec for the features.
        shared: the cache that stores the pixels (None: this one, or the source).
    """
    shared = source.shared if isinstance(source, PixelCache) else shared
    logit_codec = make_logit_codec(config.cache, teacher, exact=codec.id == "float32")
    second = pooled_codec(codec.id, teacher.spec.pooled)
    facts = _plan_facts(config, process, source, teacher, (codec, logit_codec, second), shared)
    ranges = shared.ranges if shared else unit_ranges(source, facts.samples_per_shard)
    built = (config, process, source, teacher, codec, logit_codec, second, facts.fingerprint)
    stage = make_stage(*built, shares_pixels=shared is not None)
    plan = Plan(facts=facts, ranges=[[positions.start, positions.stop] for positions in ranges])
    return join_plan(_job(stage, plan, shared), config.cache)


def _plan_facts(
    config: CacheTeacherConfig,
    process: Process,
    source: Source | PixelCache,
    teacher: Teacher,
    codecs: tuple[FeatureCodec, LogitCodec, FeatureCodec | None],
    shared: PixelFacts | None,
) -> ManifestFacts:
    """The facts of a new cache. `codecs` are for features, logits and a second feature target."""
    codec, logit_codec, second = codecs
    second_config = {} if second is None else second.get_config()
    fields = {
        **_known_fields(config, process, source, shared),
        "teacher": teacher.spec.to_json(),
        "codec": codec.get_config(),
        "logit_codec": logit_codec.get_config(),
        **({"second_codec": second_config} if second_config else {}),
    }
    return ManifestFacts(
        **_layout(config, shared),
        fingerprint=fingerprint(fields),
        fingerprint_fields=fields,
        recipe=config.recipe,
        distill=_training_options(config, process, shared),
        groups=_groups([], config.cache, shared),
        class_names=list(source.class_names),
        teacher={"spec": fields["teacher"], "config": to_plain(config.teacher), "top1": None},
        tail_sha256="",
        view_recipe=fields["views"],
        codec=fields["codec"],
        logit_codec=fields["logit_codec"],
        second_codec=second_config,
        data={**to_plain(config.data), **fields["data"], "class_likeness": _class_likeness(source, shared)},
        pixels_from=pixel_reference(Path(config.cache.path), shared.root, shared.facts) if shared else {},
        versions=recorded_versions(process.device),
    )


def make_stage(
    config: CacheTeacherConfig,
    process: Process,
    source: Source | PixelCache,
    teacher: Teacher,
    codec: FeatureCodec,
    logit_codec: LogitCodec,
    second_codec: FeatureCodec | None,
    fingerprint: str,
    *,
    shares_pixels: bool = False,
) -> Stage:
    """Build the inputs shared by all units."""
    return Stage(
        root=Path(config.cache.path),
        backend=config.cache.backend,
        fingerprint=fingerprint,
        source=source,
        views=config.views,
        teacher=teacher,
        codec=codec,
        logit_codec=logit_codec,
        second_codec=second_codec,
        batch_size=config.teacher.batch_size,
        shares_pixels=shares_pixels,
        features_every=config.cache.features_every,
        device=process.device,
        versions=recorded_versions(process.device),
    )


def _job(stage: Stage, plan: Plan, shared: PixelFacts | None) -> Job:
    units = plan_units([range(start, stop) for start, stop in plan.ranges], plan.facts.groups)
    return Job(stage, plan, units, CommittedUnits(stage.root, plan.units()), shared)


def join_plan(job: Job, options: StoreConfig) -> Job:
    """Update the job with the cache's current plan, and add this job's view groups to it.

    The plan's training options and measured teacher accuracy are kept.

    Raises:
        UserError: the plan is damaged or belongs to a different cache.
    """
    root, facts, ranges = job.stage.root, job.plan.facts, job.plan.ranges
    if not (root / plans.NAME).exists():
        return job
    kept = read_plan(root)
    layout = {name: getattr(facts, name) for name in LAYOUT}
    check_plan(_kept_fields(kept, layout), layout, root, lambda: _keys(job.stage.source))
    if kept.ranges != ranges:
        raise UserError(
            "the dataset's images are not split into the same ranges as the cache's",
            got=counted(len(ranges), "range") + f", {_first_other(ranges, kept.ranges)}",
            expected=counted(len(kept.ranges), "range") + f", {_first_other(kept.ranges, ranges)} (from plan.json)",
            where=root,
            fix="use the tar or parquet files that the cache was made from, or a different --cache",
        )
    groups = _groups(kept.facts.groups, options, job.shared)
    there = dataclasses.replace(
        facts,
        recipe=kept.facts.recipe,
        distill=kept.facts.distill,
        groups=groups,
        teacher=_measured_teacher(facts.teacher, kept.facts.teacher),
        tail_sha256=kept.facts.tail_sha256,
    )
    return _job(job.stage, Plan(facts=there, ranges=ranges), job.shared)._replace(held_out=job.held_out)


def _first_other(ranges: list[list[int]], others: list[list[int]]) -> str:
    """The first range that is not in `others`, such as "including images 0 to 63"."""
    start, stop = next((pair for pair in ranges if pair not in others), ranges[-1])
    return f"including images {start} to {stop - 1}"


def _measured_teacher(teacher: TeacherFacts, kept: TeacherFacts) -> TeacherFacts:
    """The teacher, with the values that a previous job measured."""
    known: TeacherFacts = {**teacher, "top1": teacher["top1"] if kept["top1"] is None else kept["top1"]}
    if "held_out_sha256" in kept:
        known["held_out_sha256"] = kept["held_out_sha256"]
    return known


def check_before_teacher(
    config: CacheTeacherConfig, process: Process, source: Source | PixelCache, shared: PixelFacts | None
) -> None:
    """Compare an existing plan with the options known before the teacher is loaded."""
    root, shared = Path(config.cache.path), source.shared if isinstance(source, PixelCache) else shared
    if (root / plans.NAME).exists():
        asked = {**_layout(config, shared), "fingerprint_fields": _known_fields(config, process, source, shared)}
        kept = read_plan(root)
        check_plan(_kept_fields(kept, asked), asked, root, lambda: _keys(source))
        check_teacher_given(kept.facts.teacher, config.teacher, root)


def _training_options(
    config: CacheTeacherConfig, process: Process, shared: PixelFacts | None
) -> dict[str, dict[str, Any]]:
    """The recipe's training options, from the existing plan, the cache that stores the shared pixels, or the file.

    The file is read only for a new cache, so it can be moved or edited later.
    """
    root = Path(config.cache.path)
    if (root / plans.NAME).exists():
        return dict(read_plan(root).facts.distill)
    if shared and shared.facts.recipe == config.recipe:
        return dict(shared.facts.distill)
    local = local_options(config.recipe)
    if local:
        process.print_rank0(
            f"the cache does not store the machine-specific options of recipe {config.recipe} ({', '.join(local)}): "
            f"pass them, or --recipe {config.recipe}, to `scalekd distill`"
        )
    return kept_options(config.recipe)


def _known_fields(
    config: CacheTeacherConfig, process: Process, source: Source | PixelCache, shared: PixelFacts | None
) -> dict[str, Any]:
    """The fingerprint fields that do not depend on the teacher's weights."""
    every = config.cache.features_every
    return {
        "precision": str(autocast_dtype(config.teacher.precision, process.device)).removeprefix("torch."),
        "views": to_plain(config.views),
        "data": _data_fields(source, shared),
        **({"pixels": "shared"} if shared else {}),
        **({FEATURES_EVERY: every} if every > 1 else {}),
    }


def _data_fields(source: Source | PixelCache, shared: PixelFacts | None) -> dict[str, Any]:
    if shared:
        fields: dict[str, Any] = shared.facts.fingerprint_fields["data"]
        return fields
    assert not isinstance(source, PixelCache)
    return data_facts(source)


def _keys(source: Source | PixelCache) -> list[str]:
    """The dataset's sample keys; empty for images from another cache."""
    return [] if isinstance(source, PixelCache) else [sample.key for sample in source.samples]


def _class_likeness(source: Source | PixelCache, shared: PixelFacts | None) -> list[float]:
    """How often neighboring images, and any two images, have the same class (`order.py`). These fractions determine
    the shuffle window; they are unknown without labels."""
    if shared:
        return list(shared.facts.data.get("class_likeness", (1.0, 1.0)))
    assert not isinstance(source, PixelCache)
    if not source.class_names:
        return [1.0, 1.0]
    found = class_correlation(np.fromiter((sample.label for sample in source.samples), np.int64, len(source.samples)))
    return [round(share, 9) for share in found]


def make_logit_codec(config: StoreConfig, teacher: Teacher, *, exact: bool) -> LogitCodec:
    """Build the logit codec. A teacher without a classifier has no logits."""
    classes = teacher.spec.num_classes
    if classes == 0 or config.logits == "dense":
        return DenseLogits(classes, exact=exact)
    if config.logits == "top_k":
        return TopKLogits(classes, config.top_k)
    return RecomputedLogits(classes, hashlib.sha256(_classifier(teacher)).hexdigest())


def _classifier(teacher: Teacher) -> bytes:
    """Serialize the teacher's classifier after checking it on random input."""
    size = teacher.spec.image_size
    noise = torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    output = teacher(noise)
    return recomputed.classifier_bytes(teacher.model, output.features, output.logits, teacher.autocast_dtype)


def _layout(config: CacheTeacherConfig, shared: PixelFacts | None) -> dict[str, Any]:
    """The cache's layout on disk. With shared pixels, the image ranges match the cache that stores them."""
    shard = config.cache.samples_per_shard
    if shared:
        shard = max(len(positions) for positions in shared.ranges)
    return {"backend": config.cache.backend, "samples_per_shard": shard}


def _kept_fields(kept: Plan, asked: dict[str, Any]) -> dict[str, Any]:
    """The plan fields that correspond to `asked`."""
    there = {name: getattr(kept.facts, name) for name in LAYOUT}
    if "fingerprint" not in asked:
        fields = kept.facts.fingerprint_fields
        own = asked["fingerprint_fields"].keys() | ({"pixels", FEATURES_EVERY} & fields.keys())
        there["fingerprint_fields"] = {name: fields.get(name) for name in own}
    return {name: there[name] for name in asked}


def _groups(groups: list[list[int]], config: StoreConfig, shared: PixelFacts | None) -> list[list[int]]:
    if shared is None:
        return extend_groups(groups, config.num_views, config.views_per_group)
    extended, every = shared.extend_groups(groups, config.num_views), config.features_every
    wrong = [group for group in extended if len(group) % every]
    if wrong:
        raise UserError(
            "--stored-features does not match the view groups of the cache that stores the shared pixels",
            got=f"a group of {counted(len(wrong[0]), 'view')}, features for one in {every} views of every image",
            expected=f"a multiple of {every} views per group",
            where=shared.root,
            fix="change --stored-features or --views, or rebuild that cache with a matching --cache.views_per_group",
        )
    return extended


def extend_groups(groups: list[list[int]], num_views: int, views_per_group: int) -> list[list[int]]:
    """View groups for a cache with at least `num_views` views, starting with the existing `groups`."""
    groups = [list(group) for group in groups]
    first = sum(len(group) for group in groups)
    for start in range(first, num_views, views_per_group):
        groups.append(list(range(start, min(start + views_per_group, num_views))))
    return groups


def with_teacher_top1(job: Job, top1: float | None) -> Job:
    """Add the teacher's accuracy (percent) to the facts in the job's plan."""
    facts = job.plan.facts
    return job._replace(
        plan=dataclasses.replace(job.plan, facts=dataclasses.replace(facts, teacher={**facts.teacher, "top1": top1}))
    )


def create_or_join_plan(job: Job, options: StoreConfig) -> Job:
    """On rank 0: create plan.json or join a plan that another job has just written, then write the related files.

    The plan is written first, so a rejected job changes nothing, and two accepted jobs write the same files.

    Raises:
        UserError: the folder is not writable, or another job has written a different plan.
    """
    with contextlib.suppress(FileExistsError):  # created by a job on another node, on a file system without locks
        return _create_or_join_plan(job, options)
    return _create_or_join_plan(job, options)


def _create_or_join_plan(job: Job, options: StoreConfig) -> Job:
    """As `create_or_join_plan`; raises `FileExistsError` if another job creates the plan at the same moment."""
    root = job.stage.root
    with plans.locked_plan(root):
        job = join_plan(job, options)
        if finished_manifest(job) is not None:
            return job
        facts, tail = job.plan.facts, None
        if not has_sha256(root / TAIL, facts.tail_sha256):
            tail = tail_bytes(split_tail(job.stage.teacher), job.stage.teacher.spec)
            facts = dataclasses.replace(facts, tail_sha256=hashlib.sha256(tail).hexdigest())
        held_out = None if has_held_out(root, facts) else job.held_out
        if held_out is not None:
            digest = hashlib.sha256(held_out).hexdigest()
            facts = dataclasses.replace(facts, teacher={**facts.teacher, "held_out_sha256": digest})
        plan = Plan(facts=facts, ranges=job.plan.ranges)
        if (root / plans.NAME).exists():
            if plan != read_plan(root):
                write_plan(root, plan)
        else:
            check_codec_files(options, root, job.stage.codec)
            for unit in job.units:  # rejects units from a different cache whose plan was lost
                is_committed(job, unit)
            write_plan(root, plan, create=True)
        classifier = codec_files(facts.fingerprint_fields).get(CLASSIFIER)
        if classifier is not None and not has_sha256(root / CLASSIFIER, classifier):
            write_atomically(root / CLASSIFIER, _classifier(job.stage.teacher))
        if tail is not None:
            write_atomically(root / TAIL, tail)
        if held_out is not None:
            write_atomically(root / HELD_OUT, held_out)
    return job._replace(plan=plan)


def has_held_out(root: Path, facts: ManifestFacts) -> bool:
    """Whether the cache already has the teacher's outputs for held-out images or does not need them."""
    return facts.labeled or has_sha256(root / HELD_OUT, facts.teacher_files.get(HELD_OUT, ""))


def finished_manifest(job: Job) -> Manifest | None:
    """The manifest if the cache is complete for this job; otherwise None."""
    root = job.stage.root
    if not (root / MANIFEST).exists() or not (root / TAIL).exists():
        return None
    manifest = read_manifest(root)
    whole = manifest.facts.groups == job.plan.facts.groups and all(is_committed(job, unit) for unit in job.units)
    whole = whole and all((root / name).exists() for name in manifest.facts.teacher_files)
    return manifest if whole else None


def write_final_manifest(job: Job) -> Manifest:
    """On rank 0: write the manifest, unless another job has already added view groups and finished the cache."""
    root, groups = job.stage.root, job.plan.facts.groups
    with plans.locked_plan(root):
        with contextlib.suppress(UserError):  # missing, or currently being replaced
            there = read_manifest(root)
            if there.facts.fingerprint == job.stage.fingerprint and len(there.facts.groups) > len(groups):
                return there
        manifest = build_manifest(root, job.plan.facts, job.plan.ranges)
        write_manifest(root, manifest)
        return manifest


def open_folder(root: Path) -> None:
    """Create the cache folder; raise `UserError` if it is not writable."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise UserError(
            "cannot write to the cache folder", got=error, where=root, fix="choose a different --cache"
        ) from error


def is_committed(job: Job, unit: Unit) -> bool:
    """Whether a unit is in the cache."""
    return job.ledger.committed(unit.group, unit.range_id)


def drop_damaged_units(job: Job, process: Process) -> None:
    """On rank 0: remove and report damaged and mismatched units (`store/resume.py`)."""
    for folder in job.ledger.drop_damaged():
        process.print_rank0(f"{folder} is damaged (correct file sizes, wrong SHA-256) and will be rebuilt")
    drop_mismatched_units(job, process)


def drop_mismatched_units(job: Job, process: Process) -> None:
    """On rank 0: remove and report units whose images differ from those in the first view group."""
    for folder, wrong in job.ledger.drop_mismatched_units().items():
        process.print_rank0(f"{folder} does not contain the same images as view group 0 and will be rebuilt: {wrong}")


def drop_units_unlike(job: Job, first: Job, process: Process) -> None:
    """On rank 0: remove and report units whose images differ from those in the first teacher's complete cache."""
    units = {(view, unit.range_id): unit for unit in first.units for view in unit.views}
    for unit in job.units:
        other = units.get((unit.views[0], unit.range_id))
        if other and is_committed(job, unit) and is_committed(first, other):
            keys = first.ledger.keys_hash(other.group, other.range_id)
            if job.ledger.drop_unlike(unit.group, unit.range_id, keys):
                name = unit_folder(job.stage.root, unit.group, unit.range_id)
                process.print_rank0(
                    f"{name} does not contain the same images as {first.stage.root} and will be rebuilt"
                )
