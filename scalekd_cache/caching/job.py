"""Stage 1 as a job: check, share out the work units, finish with tail and manifest.

In: a `CacheTeacherConfig`, this process among its peers. Out: a complete cache and its manifest.
Invariant: any number of processes may take part, and one of them finishes; a job started again does only what is
missing.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalekd_cache.caching.codec_selection import AUTO, load_or_select_codec
from scalekd_cache.caching.job_plan import (
    Job,
    check_before_teacher,
    create_or_join_plan,
    drop_damaged_units,
    drop_mismatched_units,
    finished_manifest,
    is_committed,
    join_plan,
    make_plan,
    open_folder,
    remove_stale_files,
    write_final_manifest,
)
from scalekd_cache.caching.make_units import Stage, make_units
from scalekd_cache.caching.pixel_cache import PixelCache, open_shared_views
from scalekd_cache.caching.preflight import (
    PROBE_IMAGES,
    check_batches,
    check_disk_space,
    check_student,
    check_teacher,
    probe_views,
)
from scalekd_cache.caching.sample_views import Unit, check_worker_memory
from scalekd_cache.caching.size_probe import measure_sizes
from scalekd_cache.caching.skips import SkipPolicy
from scalekd_cache.codec import FITTED, codec_from_config, make_codec
from scalekd_cache.config.stage1 import CacheTeacherConfig
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.data.base import Source
from scalekd_cache.data.source import open_source
from scalekd_cache.distributed import Peers, Process
from scalekd_cache.errors import UserError, require_folder
from scalekd_cache.models.demo_teacher import train_demo_teacher
from scalekd_cache.models.evaluate import evaluate, teacher_accuracy
from scalekd_cache.models.teacher import Teacher, TeacherOutput, load_teacher
from scalekd_cache.models.teacher_classes import check_class_order
from scalekd_cache.models.timm_models import DEMO_TEACHER
from scalekd_cache.models.weights import find_weights, weights_file
from scalekd_cache.progress import progress
from scalekd_cache.store.manifest import Manifest, read_manifest
from scalekd_cache.store.plan import NAME as PLAN
from scalekd_cache.store.plan import read_plan

CHECKED_IMAGES = 512
"""About so many training images, or validation images of a dry run, show whether the classes are in order."""


def cache_teacher(config: CacheTeacherConfig, process: Process, student: DistillConfig | None = None) -> Manifest:
    """Make a cache, or what is missing of it.

    Args:
        config: all options of stage 1.
        process: this process.
        student: training options that shall fit the cache; tried by one real step before the work starts.

    Raises:
        UserError: whatever does not fit, before the first unit is made.
    """
    with Peers(process, 60 * config.peer_timeout_minutes) as peers:
        return _cache_teacher(config, process, peers, student)


def _cache_teacher(
    config: CacheTeacherConfig, process: Process, peers: Peers, student: DistillConfig | None
) -> Manifest:
    root = Path(config.cache.path)
    require_folder(root, "CACHE")
    if process.rank == 0:
        remove_stale_files(root, process)
    source = _source(config, process)
    config = dataclasses.replace(config, teacher=_with_weights(config, peers))
    teacher = _teacher(config, process, source)
    job = make_plan(config, process, source, teacher, load_or_select_codec(config, peers, source, teacher))
    _say_more_views(config, process, job)
    if finished_manifest(job) is not None:
        return _say_complete(process, peers, job)
    _check(config, process, job, student)
    job = _begin(config, peers, job)
    if finished_manifest(job) is not None:  # by another job, in the meantime
        return _say_complete(process, peers, job)
    _make(config, peers, job)
    return _finish(process, peers, job)


def dry_run(config: CacheTeacherConfig, process: Process, student: DistillConfig | None = None) -> None:
    """Say what `cache_teacher` would do, after all its checks; nothing is written.

    Raises:
        UserError: whatever `cache_teacher` would refuse before its first unit.
    """
    root, asked = Path(config.cache.path), config.teacher
    require_folder(root, "CACHE")
    source = _source(config, process)
    config = dataclasses.replace(config, teacher=find_weights(asked))
    if asked.name == DEMO_TEACHER and asked.pretrained and not config.teacher.weights:
        file = weights_file(asked.weights_dir, asked.name)
        process.print_rank0(f"would train the demo's teacher first (about a minute), into {file}; nothing was written")
        return
    teacher = _teacher(config, process, source)
    name, shape = config.cache.codec, teacher.spec.feature_shape
    if name not in (*FITTED, AUTO):
        codec = make_codec(name, shape)
    elif (root / PLAN).exists():
        codec = codec_from_config(read_plan(root).facts.codec, root)
    else:
        process.print_rank0(f"codec {name} is fitted when the cache is made; sizes here are those of int8")
        codec = make_codec("int8", shape)
    job = make_plan(config, process, source, teacher, codec)
    if finished_manifest(job) is None:
        _check(config, process, job, student)
        if process.rank == 0 and job.plan.facts.teacher["top1"] is None:
            _teacher_top1(config, job.stage, CHECKED_IMAGES)
    units = [unit for unit in job.units if not is_committed(job, unit)]
    process.print_rank0(
        f"would make {len(units)} of {len(job.units)} units, {sum(map(_views, units)):,} views, in {root}; "
        "this was a dry run, nothing was written"
    )


def _source(config: CacheTeacherConfig, process: Process) -> Source | PixelCache:
    """The images, or the cache that has their pixels; what is not taken is reported."""
    if config.cache.pixels_from:
        return open_shared_views(config)
    source = open_source(config.data, "train")
    for message in source.ignored:
        process.print_rank0(message)
    return source


def _teacher(config: CacheTeacherConfig, process: Process, source: Source | PixelCache) -> Teacher:
    """The frozen teacher; when it cannot be had, other options than those of the cache are the better explanation."""
    torch.manual_seed(config.views.seed)  # random weights (PRETRAINED=0) are the same on every process
    try:
        return load_teacher(
            config.teacher, image_size=config.views.size, num_classes=len(source.class_names), device=process.device
        )
    except UserError:
        check_before_teacher(config, process, source)
        raise


def _say_more_views(config: CacheTeacherConfig, process: Process, job: Job) -> None:
    if config.cache.num_views < job.plan.num_views:
        asked, there = config.cache.num_views, job.plan.num_views
        process.print_rank0(
            f"asked for {asked} views; {job.stage.root} has, or will have, {there}, and nothing is removed. "
            f'To train on the first {asked}: make distill ... SET="train.views={asked}"'
        )


def _with_weights(config: CacheTeacherConfig, peers: Peers) -> Any:
    """The teacher's options with the file of its weights, where there is one; the demo's teacher is trained first."""
    teacher = config.teacher
    if teacher.name == DEMO_TEACHER and teacher.pretrained and not teacher.weights:
        if peers.process.rank == 0:
            file = weights_file(teacher.weights_dir, teacher.name)
            if not file.exists():
                train_demo_teacher(file, config.data)
            peers.publish("demo teacher")
        peers.wait("demo teacher")
    return find_weights(teacher)


def _say_complete(process: Process, peers: Peers, job: Job) -> Manifest:
    """The manifest of a finished cache."""
    manifest = read_manifest(job.stage.root)
    peers.publish(f"rank {process.rank} has no more units")  # a repair may have ended before this rank looked
    images = f"{manifest.num_samples:,} images x {manifest.num_views} views"
    process.print_rank0(f"{job.stage.root} is complete: {images}; nothing to do")
    return manifest


def _check(config: CacheTeacherConfig, process: Process, job: Job, student: DistillConfig | None) -> None:
    """What would otherwise go wrong hours later (`preflight.py`)."""
    stage = job.stage
    check_worker_memory(job.units, stage.views, config.workers)
    pixels = probe_views(stage.source, stage.views)
    check_teacher(stage.teacher, stage.source.class_names, pixels.to(stage.device))
    if not stage.teacher.spec.has_classifier:
        process.print_rank0(f"teacher {stage.teacher.spec.name} has no classifier: features only, without a logit loss")
    if process.rank == 0:
        _check_space(config, job)
        if student is not None:
            output = stage.teacher(pixels[:2].to(stage.device))
            recipe = check_batches(
                student.train, job.plan.facts.fingerprint_fields["data"]["samples"], process.world_size
            )
            check_student(student, stage.teacher, len(stage.source.class_names), output)
            print(f"student {student.student.name} and {recipe} fit this cache", flush=True)


def _check_space(config: CacheTeacherConfig, job: Job) -> None:
    """What is missing fits on the disk: measured as `make plan` measures it, on fewer images."""
    stage, units = job.stage, [unit for unit in job.units if not is_committed(job, unit)]
    missing = sum(map(_views, units))
    if not missing:
        return
    found = measure_sizes(
        config,
        stage.source,
        stage.teacher,
        stage.codec,
        stage.logit_codec,
        stage.device,
        num_views=PROBE_IMAGES,
        pixel_images=4 * PROBE_IMAGES,
    )
    needed = sum(sum(found.bytes_of([unit.positions], len(unit.views)).values()) for unit in units)
    check_disk_space(stage.root, missing, needed)
    print(f"{missing:,} views to make, about {needed / missing:,.0f} bytes each, {needed / 1e9:.2f} GB", flush=True)


def _begin(config: CacheTeacherConfig, peers: Peers, job: Job) -> Job:
    """Rank 0: the teacher's accuracy, the plan and the tail, before the first unit: a student may follow from now on.

    What an earlier session or another job left is kept as it is.
    """
    if peers.process.rank == 0:
        open_folder(job.stage.root)
        top1 = job.plan.facts.teacher["top1"]
        job = create_or_join_plan(job, config.cache, _teacher_top1(config, job.stage) if top1 is None else top1)
        drop_damaged_units(job, peers.process)
        peers.publish("planned")
    peers.wait("planned")
    return job if peers.process.rank == 0 else join_plan(job, config.cache)


def _make(config: CacheTeacherConfig, peers: Peers, job: Job) -> None:
    """Make units until none is left, with one progress bar for all processes.

    Process 0 ends last and makes what is left: what processes had claimed that are gone, and what was put off
    (`skips.py`).
    """
    stage, rank = job.stage, peers.process.rank
    skips = SkipPolicy(stage.root, stage.source, job.ledger)
    total = sum(_views(unit) for unit in job.units)
    there = sum(_views(unit) for unit in job.units if is_committed(job, unit)) if rank == 0 else 0
    bar = progress("cache", total, "view", rank=rank, initial=there)

    def show() -> None:
        bar.update(there + peers.add("views", 0) - bar.n)

    def count(unit: Unit) -> None:
        peers.add("views", _views(unit))
        show()

    with torch.no_grad():
        make_units(stage, job.units, _claims(peers, job), config.workers, count, skips)
        peers.publish(f"rank {rank} has no more units")
        if rank == 0:
            for peer in range(1, peers.process.world_size):
                if not peers.wait(f"rank {peer} has no more units", peer, show):
                    lost = f"no heartbeat from rank {peer} for {peers.heartbeat_timeout_s:.0f} s"
                    peers.process.print_rank0(f"{lost}; its unit is made here")
            skips.last_try()
            for first in (True, False):  # the first view group decides what the others leave out
                if not first:
                    drop_mismatched_units(job, peers.process)
                left = [n for n, u in enumerate(job.units) if (u.group == 0) is first and not is_committed(job, u)]
                if left:
                    make_units(stage, job.units, iter(left), config.workers, count, skips)
            skips.check()
            bar.update(total - bar.n)
    bar.close()


def _views(unit: Unit) -> int:
    return len(unit.positions) * len(unit.views)


def _claims(peers: Peers, job: Job) -> Iterator[int]:
    """Numbers of units that this process claims, one at a time; units that are there already are passed over."""
    while (number := peers.add("claims", 1) - 1) < len(job.units):
        if not is_committed(job, job.units[number]):
            yield number


def _finish(process: Process, peers: Peers, job: Job) -> Manifest:
    """Rank 0: the manifest."""
    root = job.stage.root
    if process.rank == 0:
        manifest = write_final_manifest(job)
        peers.publish("manifest")
        _say_what_it_is(root, manifest)
    peers.wait("manifest")
    return read_manifest(root)


def _teacher_top1(config: CacheTeacherConfig, stage: Stage, sample: int | None = None) -> float | None:
    """The teacher's accuracy on the validation images (about `sample` of them), None when there are none.

    Raises:
        UserError: its classes are in another order than the data set's, or its accuracy is near chance.
    """
    spec = stage.teacher.spec
    if not spec.has_classifier:
        return None
    try:
        images, title = open_source(config.data, "val"), "evaluate the teacher"
    except UserError as error:
        print(f"no validation images, so the teacher's accuracy is not measured:\n{error}", flush=True)
        if isinstance(stage.source, PixelCache):
            return None
        images, title, sample = stage.source, "check the order of classes", CHECKED_IMAGES
    pairs: list[Tensor] = []

    def predict(pixels: Tensor) -> Tensor:
        output: TeacherOutput = stage.teacher(pixels)
        return output.logits

    def keep(logits: Tensor, labels: Tensor) -> None:
        pairs.append(torch.stack([labels, logits.argmax(1).cpu()]))

    every = max(1, len(images.samples) // sample) if sample else 1
    tally = evaluate(
        predict, images, config.views.size, stage.device, world_size=every, workers=config.workers, title=title,
        seen=keep,
    )  # fmt: skip
    trained = config.teacher.pretrained or config.teacher.weights is not None
    if pairs and trained:
        labels, guesses = torch.cat(pairs, 1).numpy()
        try:
            check_class_order(labels, guesses, stage.source.class_names, spec.name)
        except UserError as error:
            if config.teacher.check_classes:
                raise
            print(f"warning: {error}", flush=True)
    return None if images is stage.source else round(tally.top1_percent, 4)


def _say_what_it_is(root: Path, manifest: Manifest) -> None:
    top1, sizes = teacher_accuracy(manifest.teacher), manifest.bytes_per_view
    close = "; ".join(
        f"{name.replace('_', ' ')} {row['mean']:.5f}, 1st percentile {row['p1']:.5f}"
        for name, row in manifest.fidelity.items()
    )
    skipped = manifest.fingerprint_fields["data"]["samples"] - manifest.num_samples
    print(
        f"{root}: {manifest.num_samples:,} images x {manifest.num_views} views, "
        f"{sizes['total']:,.0f} bytes a view ({sizes['features']:,.0f} features, {sizes['pixels']:,.0f} pixels"
        + (f", shared with {manifest.pixels_from['path']})" if manifest.pixels_from else ")")
        + (f"; {skipped} images could not be decoded (listed in units/*/unit.json)" if skipped else "")
        + f"\nteacher {manifest.teacher['spec']['name']}: "
        f"{top1}; decoded features: {close}",
        flush=True,
    )
