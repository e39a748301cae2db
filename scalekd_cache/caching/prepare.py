"""Prepares a stage-1 job: opens the dataset, loads the teachers, plans the units, and runs all checks.

In: one `CacheTeacherConfig` per teacher, and the job's processes. Out: one `Prepared` per teacher.
Invariant: problems that would stop the job hours later are reported here. A dry run writes nothing; a real run writes
only the demo teacher's weights and fitted codecs. All teachers get the same views, and the dataset is opened once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scalekd_cache.caching.codec_selection import load_or_select_codec
from scalekd_cache.caching.job_plan import (
    Job,
    check_before_teacher,
    finished_manifest,
    has_held_out,
    is_committed,
    make_plan,
    with_teacher_top1,
)
from scalekd_cache.caching.make_units import Stage, unit_ranges
from scalekd_cache.caching.pixel_cache import PixelCache, PixelFacts, open_shared_views
from scalekd_cache.caching.preflight import (
    PROBE_IMAGES,
    PROBE_TEACHER_S,
    check_batches,
    check_before_weights,
    check_disk_space,
    check_student,
    check_teacher,
    probe_views,
)
from scalekd_cache.caching.sample_views import check_worker_memory
from scalekd_cache.caching.size_probe import group_views, images_within, measure_sizes
from scalekd_cache.config.machine import describe_workers
from scalekd_cache.config.stage1 import CacheTeacherConfig, TeacherConfig
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.data.base import Source
from scalekd_cache.data.builtin import NotDownloadedError
from scalekd_cache.data.source import describe_source, open_source
from scalekd_cache.devices import describe_setup
from scalekd_cache.distributed import Peers, Process
from scalekd_cache.errors import UserError, counted
from scalekd_cache.models.demo_teacher import train_demo_teacher
from scalekd_cache.models.evaluate import Tally, evaluate, omitted
from scalekd_cache.models.teacher import Teacher, TeacherOutput, load_teacher
from scalekd_cache.models.teacher_classes import Answers
from scalekd_cache.models.teacher_outputs import held_out_bytes, held_out_images, run_held_out
from scalekd_cache.models.teacher_spec import label_of, random_note
from scalekd_cache.models.timm_models import DEMO_TEACHER
from scalekd_cache.models.weights import find_weights, weights_available, weights_file
from scalekd_cache.progress import size_text
from scalekd_cache.store.durable_files import check_writable
from scalekd_cache.store.manifest import Manifest

CHECKED_IMAGES = 512
"""Approximate number of images used to check the class order. If there are fewer validation images, training images
are added."""


class Prepared(NamedTuple):
    """One teacher's job, ready to start."""

    config: CacheTeacherConfig
    job: Job
    manifest: Manifest | None
    """The manifest if the cache is already complete; otherwise None."""


def prepare(
    configs: Sequence[CacheTeacherConfig], peers: Peers, student: DistillConfig | None = None, *, dry_run: bool = False
) -> list[Prepared] | None:
    """Open the dataset, load the teachers, get their codecs, plan the units, and run all checks.

    Checks that need no teacher weights run before the weights are trained or downloaded.

    Args:
        configs: one configuration per teacher, with all options for stage 1. They differ only in teacher and folder.
        peers: the processes in this job.
        student: training options to check against the caches.
        dry_run: write nothing. The demo teacher is not trained, int8 replaces codecs that must be fitted, and teacher
            accuracy is measured on about `CHECKED_IMAGES` images.

    Returns:
        The job for each teacher, with the manifest if its cache is complete. In a dry run, None if the dataset is not
        downloaded or the demo teacher is not trained yet.

    Raises:
        UserError: a problem that would otherwise surface hours later.
    """
    process, config = peers.process, configs[0]
    process.print_rank0(
        describe_setup(process.device, config.teacher.precision, process.world_size, describe_workers(config.workers))
    )
    if note := random_note(label_of(one.teacher.name, vars(one.teacher)) for one in configs):
        process.print_rank0(note)
    try:
        source = _open_images(config, process, download=not dry_run)
    except NotDownloadedError as error:
        process.print_rank0(f"would first download the dataset: {error}\ndry run: nothing was written")
        return None
    for one in configs:
        check_before_weights(one, source, student, process)
    validation = open_validation(config, dry_run=dry_run) if process.rank == 0 else None
    found: list[Prepared] = []
    for one in configs:
        with peers.scope(one.cache.path):
            ready = _prepare(one, peers, source, _pixels(found[0].job) if found else None, dry_run)
        if ready is None:
            return None
        found.append(ready)
        _check_distinct(found)
        if ready.manifest is None:
            _check(ready, process, student)
    if process.rank != 0:
        return found
    _check_disk_space([one for one in found if one.manifest is None])
    return [
        one if one.manifest is not None else one._replace(job=_with_outputs(one, validation, dry_run)) for one in found
    ]


def _prepare(
    config: CacheTeacherConfig, peers: Peers, source: Source | PixelCache, shared: PixelFacts | None, dry_run: bool
) -> Prepared | None:
    """Load one teacher and plan its units. In a dry run, returns None if the demo teacher is not trained."""
    process = peers.process
    if not weights_available(find_weights(config.teacher)):
        check_before_teacher(config, process, source, shared)
    teacher_config = _prepare_weights(config, peers, dry_run)
    if teacher_config is None:
        return None
    config = dataclasses.replace(config, teacher=teacher_config)
    teacher = _load_teacher(config, process, source, shared)
    codec = load_or_select_codec(config, peers, source, teacher, dry_run=dry_run)
    job = make_plan(config, process, source, teacher, codec, shared)
    _report_kept_views(config, process, job)
    return Prepared(config, job, finished_manifest(job))


def _pixels(first: Job) -> PixelFacts | None:
    """The cache that stores the pixels for all teachers; None if no pixels are shared (`views.pixels`)."""
    if first.shared is not None or first.stage.views.pixels == "replayed":
        return first.shared
    return PixelFacts(first.stage.root, first.plan.facts, [range(start, stop) for start, stop in first.plan.ranges])


def _check_distinct(found: Sequence[Prepared]) -> None:
    """Raise `UserError` if the last teacher has the same weights as an earlier one."""
    *others, last = found
    for other in others:
        if other.job.stage.teacher.spec.weights_sha256 == last.job.stage.teacher.spec.weights_sha256:
            raise UserError(
                "two teachers have identical weights",
                got=" and ".join(
                    f"{one.config.teacher.name} ({one.config.teacher.weights or 'no weights file'})"
                    for one in (other, last)
                ),
                fix="correct --teachers and --teacher-weights",
            )


def _open_images(config: CacheTeacherConfig, process: Process, *, download: bool) -> Source | PixelCache:
    """Open the dataset, or the cache that stores the shared pixels. Omitted files are reported."""
    if config.cache.pixels_from:
        return open_shared_views(config, download=download)
    source = open_source(config.data, "train", download=download)
    for message in source.ignored if source.class_names else (describe_source(source), *source.ignored):
        process.print_rank0(message)
    return source


def _prepare_weights(config: CacheTeacherConfig, peers: Peers, dry_run: bool) -> TeacherConfig | None:
    """The teacher's options with its weights file, if any. Rank 0 trains a missing demo teacher; a dry run prints a
    note instead and returns None."""
    teacher = config.teacher
    if teacher.name == DEMO_TEACHER and teacher.pretrained and not teacher.weights:
        file = weights_file(teacher.weights_dir, teacher.name)
        if dry_run:
            if not file.exists():
                peers.process.print_rank0(
                    f"would first train the demo teacher (about a minute) and write it to {file}; "
                    "dry run: nothing was written"
                )
                return None
        else:
            if peers.process.rank == 0:
                if not file.exists():
                    train_demo_teacher(file, config.data)
                peers.publish("demo teacher")
            peers.wait("demo teacher")
    return find_weights(teacher)


def _load_teacher(
    config: CacheTeacherConfig, process: Process, source: Source | PixelCache, shared: PixelFacts | None
) -> Teacher:
    """Load the frozen teacher. If this fails and the cache was made with different options, the error lists them."""
    torch.manual_seed(config.views.seed)  # make random weights (--pretrained false) the same in every process
    try:
        return load_teacher(
            config.teacher, image_size=config.views.size, num_classes=len(source.class_names), device=process.device
        )
    except UserError:
        check_before_teacher(config, process, source, shared)
        raise


def _report_kept_views(config: CacheTeacherConfig, process: Process, job: Job) -> None:
    if config.cache.num_views < job.plan.num_views:
        asked, there = config.cache.num_views, job.plan.num_views
        process.print_rank0(
            f"{counted(asked, 'view')} requested, but the plan of {job.stage.root} has {there}; views are never "
            f"removed. To train on the first {counted(asked, 'view')}: scalekd distill ... --train.views={asked}"
        )


def _check(ready: Prepared, process: Process, student: DistillConfig | None) -> None:
    """Check for problems that would otherwise surface hours later (`preflight.py`)."""
    config, job, stage = ready.config, ready.job, ready.job.stage
    check_worker_memory(job.units, stage.views, config.workers)
    pixels = probe_views(stage.source, stage.views)
    check_teacher(stage.teacher, stage.source.class_names, pixels.to(stage.device))
    if not stage.teacher.spec.has_classifier:
        process.print_rank0(
            f"teacher {stage.teacher.spec.name} has no classifier: only features are cached, and there is no logit loss"
        )
    if process.rank == 0:
        check_writable(stage.root, "--cache")
        if student is not None:
            output = stage.teacher(pixels[:2].to(stage.device))
            facts, ranges = job.plan.facts, len(job.plan.ranges)
            samples = facts.fingerprint_fields["data"]["samples"]
            note = check_batches(student, samples, process.world_size, facts.features_every, ranges)
            check_student(student, stage.teacher, len(stage.source.class_names), output)
            print(f"student {student.student.name} is compatible with this cache{note}", flush=True)


def _check_disk_space(found: Sequence[Prepared]) -> None:
    """Check that the missing units fit on the disk. Sizes are measured as in `scalekd plan` but on fewer images."""
    views, needed = 0, 0.0
    for config, job, _ in found:
        units = [unit for unit in job.units if not is_committed(job, unit)]
        missing = sum(unit.num_views for unit in units)
        if not missing:
            continue
        sizes = measure_sizes(
            job.stage, config.cache, num_views=PROBE_IMAGES, pixel_images=4 * PROBE_IMAGES, teacher_s=PROBE_TEACHER_S
        )
        size = sum(sum(sizes.bytes_of([unit.positions], len(unit.views)).values()) for unit in units)
        place = f"{job.stage.root}: " if len(found) > 1 else ""
        each = f"about {size / missing:,.0f} bytes each, {size_text(size)} in total"
        print(f"{place}{counted(missing, 'view')} to compute, {each}")
        views, needed = views + missing, needed + size
    if not views:
        return
    check_disk_space(found[0].job.stage.root, views, needed)
    if len(found) > 1:
        print(f"all teachers: {counted(views, 'view')} to compute, {size_text(needed)}", flush=True)


def images_besides(config: CacheTeacherConfig, stage: Stage, pass_s: float, validation: Source | None) -> int:
    """For the forecast: number of images that the teacher processes for checks and evaluation, besides the views.

    Args:
        config: all options for stage 1.
        stage: the inputs shared by all units.
        pass_s: the teacher's seconds per image.
        validation: the validation images, if any.
    """
    teacher, views = stage.teacher, len(group_views(config.cache))
    small_unit = min(max(4, -(-PROBE_IMAGES // views)), images_within(stage, views, PROBE_TEACHER_S, pass_s)) * views
    checks = min(4, teacher.images_per_pass) + (1 if pass_s > 1 else 2) + small_unit + (2 if config.student else 0)
    if not stage.source.class_names:
        return checks + (0 if validation is None else len(held_out_images(validation)))
    if not teacher.spec.has_classifier:
        return checks
    evaluated = 0 if validation is None else len(validation.samples)
    known = config.teacher.pretrained or config.teacher.weights is not None
    wanted, there = max(0, CHECKED_IMAGES - evaluated) if known else 0, sum(map(len, unit_ranges(stage.source, 1)))
    if isinstance(stage.source, PixelCache):
        there = min(there, CHECKED_IMAGES)  # as in `PixelCache.sample_images`
    return checks + evaluated + (-(-there // max(1, there // wanted)) if wanted else 0)


def _with_outputs(ready: Prepared, validation: Source | None, dry_run: bool) -> Job:
    """Add the teacher's accuracy and its outputs for held-out images to the job, if missing."""
    config, job, _ = ready
    if job.plan.facts.teacher["top1"] is None:
        job = with_teacher_top1(job, _teacher_top1(config, job.stage, validation, dry_run=dry_run))
    return job if dry_run or validation is None else _with_held_out(config, job, validation)


def open_validation(config: CacheTeacherConfig, *, dry_run: bool) -> Source | None:
    """Open the validation images. If there are none, prints a note and returns None. A dry run downloads nothing."""
    try:
        return open_source(config.data, "val", download=not dry_run)
    except UserError as error:
        print(f"no usable validation images, so the teacher's accuracy is not measured:\n{error}", flush=True)
        return None


def _teacher_top1(
    config: CacheTeacherConfig, stage: Stage, validation: Source | None, *, dry_run: bool
) -> float | None:
    """The teacher's accuracy on the validation images (a sample of them in a dry run), or None without labeled ones.

    The class order is checked on the same images. If there are too few, training images are added.

    Raises:
        UserError: the teacher's class order differs from the dataset's, or its accuracy is near chance.
    """
    spec = stage.teacher.spec
    if not spec.has_classifier or not stage.source.class_names:
        return None
    top1 = None
    answers = Answers(spec.name, stage.source.class_names)
    if validation is not None:
        sample = CHECKED_IMAGES if dry_run else None
        lost: list[int] = []
        tally = _evaluate(config, stage, validation, "evaluate the teacher", sample, answers, lost.extend)
        if lost:
            print(omitted(len(lost), first=validation.samples[lost[0]].key), flush=True)
        top1 = round(tally.top1_percent, 4) if tally.images else None
    if config.teacher.pretrained or config.teacher.weights is not None:
        if len(answers) < CHECKED_IMAGES:
            source = stage.source
            images = source.sample_images(CHECKED_IMAGES) if isinstance(source, PixelCache) else source
            _evaluate(config, stage, images, "check the class order", CHECKED_IMAGES - len(answers), answers)
        try:
            answers.check(config.cache.pixels_from)
        except UserError as error:
            if config.teacher.check_classes:
                raise
            print(f"warning: {error}", flush=True)
    return top1


def _with_held_out(config: CacheTeacherConfig, job: Job, validation: Source) -> Job:
    """Add the teacher's outputs for held-out images to the job, if the cache needs them and they are missing."""
    if has_held_out(job.stage.root, job.plan.facts):
        return job
    size, workers = config.teacher.batch_size, config.workers
    found = run_held_out(job.stage.teacher, validation, batch_size=size, workers=workers)
    lost = sorted(set(held_out_images(validation)).difference(found.indices.tolist()))
    if lost:
        print(omitted(len(lost), "held-out image", validation.samples[lost[0]].key), flush=True)
    return job._replace(held_out=held_out_bytes(found, validation))


def _evaluate(
    config: CacheTeacherConfig,
    stage: Stage,
    images: Source,
    title: str,
    sample: int | None,
    answers: Answers,
    on_unreadable: Callable[[list[int]], None] = lambda indices: None,
) -> Tally:
    """Run the teacher on the images (or on about `sample` of them) and record its predictions."""

    def predict(pixels: Tensor) -> Tensor:
        output: TeacherOutput = stage.teacher(pixels)
        return output.logits

    return evaluate(
        predict,
        images,
        config.views.size,
        stage.device,
        world_size=max(1, len(images.samples) // sample)
        if sample
        else 1,  # act as one of n ranks to take every n-th image
        workers=config.workers,
        title=title,
        on_batch=answers.add,
        on_unreadable=on_unreadable,
    )
