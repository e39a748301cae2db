"""Stage 1 as a job: prepare and check, make the work units on all ranks, write the manifest.

In: a `CacheTeacherConfig` and this process. Out: a complete cache and its manifest.
Invariant: any number of processes can take part, and rank 0 finishes the cache. A rerun makes only what is missing.
A dry run stops after `prepare`, which writes nothing then.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from scalekd_cache.caching.codec_selection import load_or_select_codec
from scalekd_cache.caching.job_plan import (
    Job,
    check_before_teacher,
    create_or_join_plan,
    drop_damaged_units,
    drop_mismatched_units,
    finished_manifest,
    has_held_out,
    is_committed,
    join_plan,
    make_plan,
    open_folder,
    remove_stale_files,
    with_teacher_top1,
    write_final_manifest,
)
from scalekd_cache.caching.make_units import SkipPolicy, Stage, make_units
from scalekd_cache.caching.pixel_cache import PixelCache, open_shared_views
from scalekd_cache.caching.preflight import (
    PROBE_IMAGES,
    check_batches,
    check_before_weights,
    check_disk_space,
    check_student,
    check_teacher,
    probe_views,
)
from scalekd_cache.caching.sample_views import Unit, check_worker_memory
from scalekd_cache.caching.size_probe import measure_sizes
from scalekd_cache.config.stage1 import CacheTeacherConfig, TeacherConfig
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.data.base import Source
from scalekd_cache.data.builtin import NotDownloadedError
from scalekd_cache.data.source import describe_source, open_source
from scalekd_cache.devices import describe_setup, memory_errors
from scalekd_cache.distributed import Peers, Process
from scalekd_cache.errors import UserError, counted, require_folder
from scalekd_cache.models.demo_teacher import train_demo_teacher
from scalekd_cache.models.evaluate import Tally, evaluate, teacher_accuracy
from scalekd_cache.models.teacher import Teacher, TeacherOutput, load_teacher
from scalekd_cache.models.teacher_classes import Answers
from scalekd_cache.models.teacher_outputs import held_out_bytes, run_held_out
from scalekd_cache.models.teacher_spec import teacher_label
from scalekd_cache.models.timm_models import DEMO_TEACHER
from scalekd_cache.models.weights import find_weights, weights_file
from scalekd_cache.progress import progress, size_text
from scalekd_cache.store.durable_files import check_writable
from scalekd_cache.store.manifest import Manifest, read_manifest, stored_share

CHECKED_IMAGES = 512
"""Approximate number of images used to check the order of the classes; if there are fewer validation images, training
images are added."""


class Prepared(NamedTuple):
    """A job that is ready to start."""

    job: Job
    manifest: Manifest | None
    """The manifest if the cache is already complete, else None."""


def cache_teacher(config: CacheTeacherConfig, process: Process, student: DistillConfig | None = None) -> Manifest:
    """Make a cache, or the missing part of it.

    Args:
        config: all options of stage 1.
        process: this process.
        student: training options to check against the cache, with one training step before the work starts.

    Raises:
        UserError: any problem that `prepare` finds, before the first unit is made.
    """
    root = Path(config.cache.path)
    lower = "lower the teacher's batch: --teacher.batch_size=32"
    with Peers(process, 60 * config.peer_timeout_minutes) as peers, memory_errors(lower):
        require_folder(root, "--cache")
        if process.rank == 0:
            remove_stale_files(root, process)
        prepared = prepare(config, peers, student)
        assert prepared is not None  # None: a dry run only
        job, manifest = prepared
        if manifest is None:
            job = _start(config, peers, job)
            manifest = finished_manifest(job)  # another job may have finished it in the meantime
        if manifest is not None:
            return _report_complete(peers, job, manifest)
        _make(config, peers, job)
        return _finish(peers, job)


def dry_run(config: CacheTeacherConfig, process: Process, student: DistillConfig | None = None) -> None:
    """Run all checks of `cache_teacher`, report what it would do, and write nothing.

    Raises:
        UserError: any problem that `cache_teacher` would find before its first unit.
    """
    root = Path(config.cache.path)
    with Peers(process, 60 * config.peer_timeout_minutes) as peers:
        require_folder(root, "--cache")
        prepared = prepare(config, peers, student, dry_run=True)
    if prepared is not None:
        job = prepared.job
        units = [unit for unit in job.units if not is_committed(job, unit)]
        process.print_rank0(
            f"would make {len(units)} of {counted(len(job.units), 'unit')}, "
            f"{counted(sum(map(_views, units)), 'view')}, in {root}; this was a dry run, nothing was written"
        )


def prepare(
    config: CacheTeacherConfig, peers: Peers, student: DistillConfig | None = None, *, dry_run: bool = False
) -> Prepared | None:
    """Open the data set, load the teacher, get the codec, plan the units, and run all checks.

    Checks that need no teacher weights run before the weights are trained or downloaded.

    Args:
        config: all options of stage 1.
        peers: the processes of this job.
        student: training options to check against the cache.
        dry_run: write nothing: no demo teacher is trained, a codec that must be fitted is replaced by int8, and the
            teacher's accuracy is measured on about `CHECKED_IMAGES` images.

    Returns:
        The job, and the manifest if the cache is complete; None for a dry run whose data set is not downloaded or whose
        demo teacher is not trained yet.

    Raises:
        UserError: any problem that would otherwise show up hours later.
    """
    process = peers.process
    process.print_rank0(describe_setup(process.device, config.teacher.precision, process.world_size, config.workers))
    try:
        source = _open_images(config, process, download=not dry_run)
    except NotDownloadedError as error:
        process.print_rank0(f"would first download the data set: {error}\ndry run: nothing was written")
        return None
    check_before_weights(config, source, student, process)
    validation = _open_validation(config, dry_run=dry_run) if process.rank == 0 else None
    teacher_config = _prepare_weights(config, peers, dry_run)
    if teacher_config is None:
        return None
    config = dataclasses.replace(config, teacher=teacher_config)
    teacher = _load_teacher(config, process, source)
    codec = load_or_select_codec(config, peers, source, teacher, dry_run=dry_run)
    job = make_plan(config, process, source, teacher, codec)
    _report_kept_views(config, process, job)
    manifest = finished_manifest(job)
    if manifest is None:
        _check(config, process, job, student)
        if process.rank == 0 and job.plan.facts.teacher["top1"] is None:
            top1 = _teacher_top1(config, job.stage, validation, dry_run=dry_run)
            job = with_teacher_top1(job, top1)
        if process.rank == 0 and not dry_run and validation is not None:
            job = _with_held_out(config, job, validation)
    return Prepared(job, manifest)


def _open_images(config: CacheTeacherConfig, process: Process, *, download: bool) -> Source | PixelCache:
    """The data set, or the cache whose pixels are shared. Files that are left out are reported."""
    if config.cache.pixels_from:
        return open_shared_views(config, download=download)
    source = open_source(config.data, "train", download=download)
    for message in source.ignored if source.class_names else (describe_source(source), *source.ignored):
        process.print_rank0(message)
    return source


def _prepare_weights(config: CacheTeacherConfig, peers: Peers, dry_run: bool) -> TeacherConfig | None:
    """The teacher's options with the file of its weights, if there is one. Rank 0 trains a missing demo teacher; a dry
    run reports that and returns None."""
    teacher = config.teacher
    if teacher.name == DEMO_TEACHER and teacher.pretrained and not teacher.weights:
        file = weights_file(teacher.weights_dir, teacher.name)
        if dry_run:
            if not file.exists():
                peers.process.print_rank0(
                    f"would first train the demo teacher (about a minute) into {file}; dry run: nothing was written"
                )
                return None
        else:
            if peers.process.rank == 0:
                if not file.exists():
                    train_demo_teacher(file, config.data)
                peers.publish("demo teacher")
            peers.wait("demo teacher")
    return find_weights(teacher)


def _load_teacher(config: CacheTeacherConfig, process: Process, source: Source | PixelCache) -> Teacher:
    """The frozen teacher. If it cannot be loaded and the cache has other options, the error names the options."""
    torch.manual_seed(config.views.seed)  # random weights (--pretrained false) are the same on every process
    try:
        return load_teacher(
            config.teacher, image_size=config.views.size, num_classes=len(source.class_names), device=process.device
        )
    except UserError:
        check_before_teacher(config, process, source)
        raise


def _report_kept_views(config: CacheTeacherConfig, process: Process, job: Job) -> None:
    if config.cache.num_views < job.plan.num_views:
        asked, there = config.cache.num_views, job.plan.num_views
        process.print_rank0(
            f"{counted(asked, 'view')} requested, but {job.stage.root} is planned with {there}; no view is removed. "
            f"To train on the first {asked}: scalekd distill ... --train.views={asked}"
        )


def _check(config: CacheTeacherConfig, process: Process, job: Job, student: DistillConfig | None) -> None:
    """Check now for problems that would otherwise show up hours later (`preflight.py`)."""
    stage = job.stage
    check_worker_memory(job.units, stage.views, config.workers)
    pixels = probe_views(stage.source, stage.views)
    check_teacher(stage.teacher, stage.source.class_names, pixels.to(stage.device))
    if not stage.teacher.spec.has_classifier:
        process.print_rank0(f"teacher {stage.teacher.spec.name} has no classifier: features only, without a logit loss")
    if process.rank == 0:
        check_writable(stage.root, "--cache")
        _check_disk_space(config, job)
        if student is not None:
            output = stage.teacher(pixels[:2].to(stage.device))
            recipe = check_batches(
                student.train, job.plan.facts.fingerprint_fields["data"]["samples"], process.world_size
            )
            check_student(student, stage.teacher, len(stage.source.class_names), output)
            print(f"student {student.student.name} and {recipe} are compatible with this cache", flush=True)


def _check_disk_space(config: CacheTeacherConfig, job: Job) -> None:
    """Check that the missing units fit on the disk; sizes are measured as in `scalekd plan`, on fewer images."""
    units = [unit for unit in job.units if not is_committed(job, unit)]
    missing = sum(map(_views, units))
    if not missing:
        return
    sizes = measure_sizes(job.stage, config.cache, num_views=PROBE_IMAGES, pixel_images=4 * PROBE_IMAGES)
    needed = sum(sum(sizes.bytes_of([unit.positions], len(unit.views)).values()) for unit in units)
    check_disk_space(job.stage.root, missing, needed)
    print(
        f"{counted(missing, 'view')} to make, about {needed / missing:,.0f} bytes each, {size_text(needed)}", flush=True
    )


def _start(config: CacheTeacherConfig, peers: Peers, job: Job) -> Job:
    """Rank 0 writes the plan and the tail, and drops damaged units. From then on a student can train with --follow."""
    if peers.process.rank == 0:
        open_folder(job.stage.root)
        job = create_or_join_plan(job, config.cache)
        drop_damaged_units(job, peers.process)
        peers.publish("planned")
    peers.wait("planned")
    return job if peers.process.rank == 0 else join_plan(job, config.cache)


def _make(config: CacheTeacherConfig, peers: Peers, job: Job) -> None:
    """Make units until none are left, with one progress bar for all processes.

    Rank 0 finishes last. It redoes the units of lost ranks, and the deferred ones (`SkipPolicy`).
    """
    stage, rank = job.stage, peers.process.rank
    skips = SkipPolicy(stage.root, stage.source, job.ledger)
    total = sum(_views(unit) for unit in job.units)
    there = sum(_views(unit) for unit in job.units if is_committed(job, unit)) if rank == 0 else 0
    bar = progress("cache", total, "view", rank=rank, initial=there)

    committed, in_work = 0, 0  # views of all processes; of this one

    def show() -> None:
        nonlocal committed
        committed = peers.add("views", 0)
        arrived(0)

    def arrived(views: int) -> None:
        nonlocal in_work
        in_work += views
        bar.update(max(0, min(total, there + committed + in_work) - bar.n))

    def count(unit: Unit) -> None:
        nonlocal in_work
        in_work -= _views(unit)
        peers.add("views", _views(unit))
        show()

    with torch.no_grad():
        make_units(stage, job.units, _claims(peers, job), config.workers, count, skips, arrived)
        peers.publish(f"rank {rank} has no more units")
        if rank == 0:
            for peer in range(1, peers.process.world_size):
                if not peers.wait(f"rank {peer} has no more units", peer, show):
                    peers.process.print_rank0(
                        f"no heartbeat from rank {peer} for {peers.heartbeat_timeout_s:.0f} s; rank 0 redoes its unit"
                    )
            skips.start_last_pass()
            for first in (True, False):  # the first view group decides which images the others skip
                if not first:
                    drop_mismatched_units(job, peers.process)
                left = [n for n, u in enumerate(job.units) if (u.group == 0) is first and not is_committed(job, u)]
                if left:
                    make_units(stage, job.units, iter(left), config.workers, count, skips, arrived)
            skips.check()
            bar.update(total - bar.n)
    bar.close()


def _views(unit: Unit) -> int:
    return len(unit.positions) * len(unit.views)


def _claims(peers: Peers, job: Job) -> Iterator[int]:
    """Numbers of the units that this process claims, one at a time. Committed units are skipped."""
    while (number := peers.add("claims", 1) - 1) < len(job.units):
        if not is_committed(job, job.units[number]):
            yield number


def _report_complete(peers: Peers, job: Job, manifest: Manifest) -> Manifest:
    """Finish a job whose cache was already complete; returns the manifest."""
    process = peers.process
    peers.publish(f"rank {process.rank} has no more units")  # rank 0 may still wait for this rank
    images = f"{counted(manifest.num_samples, 'image')} x {counted(manifest.num_views, 'view')}"
    process.print_rank0(f"{job.stage.root} is complete: {images}; nothing to do")
    return manifest


def _finish(peers: Peers, job: Job) -> Manifest:
    """Rank 0 writes the manifest; every rank returns it."""
    root = job.stage.root
    if peers.process.rank == 0:
        manifest = write_final_manifest(job)
        peers.publish("manifest")
        _report_cache(root, manifest)
    peers.wait("manifest")
    return read_manifest(root)


def _open_validation(config: CacheTeacherConfig, *, dry_run: bool) -> Source | None:
    """The validation images; None, with a note, if there are none. A dry run downloads nothing."""
    try:
        return open_source(config.data, "val", download=not dry_run)
    except UserError as error:
        print(f"no validation images: the teacher's accuracy is not measured:\n{error}", flush=True)
        return None


def _teacher_top1(
    config: CacheTeacherConfig, stage: Stage, validation: Source | None, *, dry_run: bool
) -> float | None:
    """The teacher's accuracy on the validation images (in a dry run, on some of them); None when there are none,
    or no labels.

    The order of the classes is checked on these images, and on training images if they are few.

    Raises:
        UserError: its classes are in another order than the data set's, or its accuracy is near chance.
    """
    spec = stage.teacher.spec
    if not spec.has_classifier or not stage.source.class_names:
        return None
    top1 = None
    answers = Answers(spec.name, stage.source.class_names)
    if validation is not None:
        sample = CHECKED_IMAGES if dry_run else None
        top1 = round(_evaluate(config, stage, validation, "evaluate the teacher", sample, answers).top1_percent, 4)
    if config.teacher.pretrained or config.teacher.weights is not None:
        if len(answers) < CHECKED_IMAGES:
            source = stage.source
            images = source.sample_images(CHECKED_IMAGES) if isinstance(source, PixelCache) else source
            _evaluate(config, stage, images, "check the order of classes", CHECKED_IMAGES - len(answers), answers)
        try:
            answers.check(config.cache.pixels_from)
        except UserError as error:
            if config.teacher.check_classes:
                raise
            print(f"warning: {error}", flush=True)
    return top1


def _with_held_out(config: CacheTeacherConfig, job: Job, validation: Source) -> Job:
    """The job with the teacher's outputs on held-out images, if the cache needs them and does not have them."""
    if has_held_out(job.stage.root, job.plan.facts):
        return job
    size, workers = config.teacher.batch_size, config.workers
    found = run_held_out(job.stage.teacher, validation, batch_size=size, workers=workers)
    return job._replace(held_out=held_out_bytes(found, validation))


def _evaluate(
    config: CacheTeacherConfig, stage: Stage, images: Source, title: str, sample: int | None, answers: Answers
) -> Tally:
    """Run the teacher on the images (on about `sample` of them) and record its predictions."""

    def predict(pixels: Tensor) -> Tensor:
        output: TeacherOutput = stage.teacher(pixels)
        return output.logits

    return evaluate(
        predict,
        images,
        config.views.size,
        stage.device,
        world_size=max(1, len(images.samples) // sample) if sample else 1,  # one rank of many, so every n-th image
        workers=config.workers,
        title=title,
        on_batch=answers.add,
    )


def _report_cache(root: Path, manifest: Manifest) -> None:
    sizes = manifest.bytes_per_view
    shared = f", shared with {manifest.facts.pixels_from['path']}" if manifest.facts.pixels_from else ""
    skipped = manifest.facts.fingerprint_fields["data"]["samples"] - manifest.num_samples
    fidelity = "; ".join(
        f"{name.replace('_', ' ')} {row['mean']:.5f}, 1st percentile {row['p1']:.5f}"
        for name, row in manifest.fidelity.items()
    )
    print(
        f"{root}: {counted(manifest.num_samples, 'image')} x {counted(manifest.num_views, 'view')}, "
        f"{sizes['total']:,.0f} bytes per view ("
        f"{sizes['features']:,.0f} features, {sizes['pixels']:,.0f} pixels{shared})"
        + (f"; features {share}" if (share := stored_share(manifest.facts.features_every)) else "")
        + (f"; {counted(skipped, 'image')} could not be decoded (listed in units/*/unit.json)" if skipped else "")
        + f"\nteacher {teacher_label(manifest.facts.teacher)}: "
        + f"{teacher_accuracy(manifest.facts.teacher, labeled=manifest.facts.labeled)}; "
        f"decoded features: {fidelity}",
        flush=True,
    )
