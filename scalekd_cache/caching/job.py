"""The stage-1 job: prepare and check, make the work units on all ranks, write the manifest.

In: a `CacheTeacherConfig` and this process. Out: a complete cache and its manifest for each teacher.
Invariant: any number of processes can take part, and rank 0 finishes the cache. A rerun makes only the missing units. A
dry run stops after `prepare` and writes nothing. With multiple teachers, each unit that is missing from the first cache
is made for all caches in one pass and committed to the first cache first. Once the first cache is complete, units still
missing from the others (after a kill, or for a new teacher) are made from its stored views, as for any cache that
shares pixels.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from scalekd_cache.caching.job_plan import (
    Job,
    create_or_join_plan,
    drop_damaged_units,
    drop_mismatched_units,
    drop_units_unlike,
    finished_manifest,
    is_committed,
    join_plan,
    open_folder,
    write_final_manifest,
)
from scalekd_cache.caching.make_units import SkipPolicy, Stage, make_units
from scalekd_cache.caching.pixel_cache import PixelCache
from scalekd_cache.caching.prepare import Prepared, prepare
from scalekd_cache.caching.sample_views import Unit
from scalekd_cache.config.stage1 import CacheTeacherConfig
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.data.builtin import BUILTIN
from scalekd_cache.devices import memory_errors
from scalekd_cache.distributed import Peers, Process
from scalekd_cache.errors import UserError, counted, require_folder, shell_command, some_of
from scalekd_cache.models.evaluate import teacher_accuracy
from scalekd_cache.models.teacher_spec import teacher_label
from scalekd_cache.progress import duration_text, progress
from scalekd_cache.store.durable_files import remove_stale
from scalekd_cache.store.manifest import NAME as MANIFEST
from scalekd_cache.store.manifest import Manifest, read_manifest, stored_share
from scalekd_cache.store.plan import NAME as PLAN
from scalekd_cache.store.plan import check_output_folder
from scalekd_cache.store.shared_pixels import open_pixel_cache


def cache_teacher(config: CacheTeacherConfig, process: Process, student: DistillConfig | None = None) -> Manifest:
    """Make or complete the cache for one teacher: `cache_teachers` without `config.teachers`."""
    [manifest] = cache_teachers(config, process, student)
    return manifest


def cache_teachers(
    config: CacheTeacherConfig, process: Process, student: DistillConfig | None = None
) -> list[Manifest]:
    """Make or complete one cache per teacher.

    Args:
        config: all options of stage 1.
        process: this process.
        student: training options to check against the cache, by running one training step before the work starts.

    Returns:
        One manifest per teacher, in order.

    Raises:
        UserError: `prepare` found a problem; no unit has been made.
    """
    lower = "reduce the teacher's batch size: --teacher.batch_size=32"
    configs = config.per_teacher()
    with Peers(process, 60 * config.peer_timeout_minutes) as peers, memory_errors(lower):
        _check_folders(config)
        if process.rank == 0:
            for one in configs:
                remove_stale_files(Path(one.cache.path), process)
        prepared = prepare(configs, peers, student)
        assert prepared is not None  # None only in a dry run
        first, *others = [_start(peers, one) for one in prepared]
        manifests = [_complete(peers, first, others)]
        return manifests + [_complete(peers, _after(peers, one, first.job)) for one in others]


def dry_run(config: CacheTeacherConfig, process: Process, student: DistillConfig | None = None) -> None:
    """Run the checks in `cache_teachers` and report what it would do, without writing anything.

    Raises:
        UserError: any problem that `cache_teachers` would report before it makes the first unit.
    """
    with Peers(process, 60 * config.peer_timeout_minutes) as peers:
        _check_folders(config)
        prepared = prepare(config.per_teacher(), peers, student, dry_run=True)
    for _, job, _ in prepared or ():
        units = [unit for unit in job.units if not is_committed(job, unit)]
        process.print_rank0(
            f"would compute {len(units)} of {counted(len(job.units), 'unit')} "
            f"({counted(sum(unit.num_views for unit in units), 'view')}) in {job.stage.root}; "
            "dry run: nothing was written"
        )


def _check_folders(config: CacheTeacherConfig) -> None:
    """Raise `UserError` if `--cache` is a file, the images or a run, or is a single cache although `--teachers` needs a
    parent folder."""
    root = Path(config.cache.path)
    require_folder(root, "--cache")
    check_output_folder(root, "--cache", may_be_cache=True)
    is_cache = any((root / name).exists() for name in (PLAN, MANIFEST))
    is_data = config.data.source not in BUILTIN and os.path.realpath(root) == os.path.realpath(config.data.source)
    if not is_cache and _is_in_split(root, config.data.source):
        raise UserError(f"--cache {root} is inside the dataset's train/ or val/: choose a different folder")
    if not is_cache and root.is_dir() and (is_data or (root / "config.yaml").is_file()):
        raise UserError(f"--cache {root} is {'the dataset' if is_data else 'a run'}: choose a different folder")
    if config.teachers is None:
        return
    if is_cache:
        raise UserError(
            "with --teachers, --cache must be the parent folder of multiple caches, but this folder is itself a cache",
            where=root,
            fix="choose a different --cache; to reuse this cache's pixels for another teacher: "
            + shell_command("cache-teacher", pixels_from=root, teacher="NAME", cache="FOLDER"),
        )
    for one in config.per_teacher():
        require_folder(Path(one.cache.path), "--cache")


def _is_in_split(root: Path, source: str) -> bool:
    """Whether a folder is the dataset's train or val folder, or in one of them: it would be taken for a class."""
    place = Path(os.path.realpath(root))
    splits = [Path(os.path.realpath(source)) / name for name in ("train", "val")]
    return any(split.is_dir() and split in (place, *place.parents) for split in splits)


def _start(peers: Peers, prepared: Prepared) -> Prepared:
    """On rank 0: write the plan and the tail and drop damaged units. From then on, `distill --follow` can start."""
    config, job, manifest = prepared
    with peers.scope(config.cache.path):
        if peers.process.rank == 0:
            if manifest is None:
                open_folder(job.stage.root)
                job = create_or_join_plan(job, config.cache)
                drop_damaged_units(job, peers.process)
            peers.publish("planned")
        if manifest is not None:
            return prepared
        peers.wait("planned")
    job = job if peers.process.rank == 0 else join_plan(job, config.cache)
    return Prepared(config, job, finished_manifest(job))  # another job may have finished it in the meantime


def _after(peers: Peers, ready: Prepared, first: Job) -> Prepared:
    """The job for one of the other teachers once the first cache is complete. It reads its views from that cache."""
    config, job, _ = ready
    if peers.process.rank == 0:
        drop_units_unlike(job, first, peers.process)
    source = job.stage.source
    if job.stage.shares_pixels and not isinstance(source, PixelCache):
        source = PixelCache(open_pixel_cache(first.stage.root))
    job = job._replace(stage=dataclasses.replace(job.stage, source=source), first=first.ledger)
    return Prepared(config, job, finished_manifest(job))


def _complete(peers: Peers, ready: Prepared, others: Sequence[Prepared] = ()) -> Manifest:
    """Make the units missing from the first cache, also for the other caches, then write the first manifest."""
    config, job, manifest = ready
    with peers.scope(config.cache.path):
        if manifest is not None:
            return _report_complete(peers, job, manifest)
        if job.first is None or not all(is_committed(job, unit) for unit in job.units):
            _make(config, peers, job, [other.job for other in others])
        return _finish(peers, job)


def _make(config: CacheTeacherConfig, peers: Peers, job: Job, others: Sequence[Job]) -> None:
    """Make units until none are left, with one progress bar for all processes.

    Rank 0 finishes last: it redoes the units of lost ranks and the deferred ones (`SkipPolicy`).
    """
    stage, rank = job.stage, peers.process.rank
    skips = SkipPolicy(stage.root, stage.source, job.first or job.ledger, follows=job.first is not None)
    also = _same_units(others)
    total = sum(unit.num_views for unit in job.units)
    there = sum(unit.num_views for unit in job.units if is_committed(job, unit)) if rank == 0 else 0
    bar = progress("cache", total, "view", rank=rank, initial=there)

    committed, in_work = 0, 0  # views committed by all processes; views in progress here

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
        in_work -= unit.num_views
        peers.add("views", unit.num_views)
        show()

    with torch.no_grad():
        make_units(stage, job.units, _claims(peers, job), config.workers, count, skips, arrived, also)
        peers.publish(f"rank {rank} has no more units")
        if rank == 0:
            for peer in range(1, peers.process.world_size):
                if not peers.wait(f"rank {peer} has no more units", peer, show):
                    peers.process.print_rank0(
                        f"no heartbeat from rank {peer} for {peers.heartbeat_timeout_s:.0f} s; "
                        "rank 0 redoes that rank's unit"
                    )
            skips.start_last_pass()
            for first in (True, False):  # the first view group determines which images the other groups skip
                if not first:
                    drop_mismatched_units(job, peers.process)
                left = [n for n, u in enumerate(job.units) if (u.group == 0) is first and not is_committed(job, u)]
                if left:
                    make_units(stage, job.units, iter(left), config.workers, count, skips, arrived, also)
            skips.check()
            bar.update(total - bar.n)
    bar.close()


def _same_units(others: Sequence[Job]) -> Callable[[Unit], list[Stage]]:
    """Return a function that takes a unit and lists the stages of all jobs that still need it."""
    known = [set(other.units) for other in others]

    def lacking(unit: Unit) -> list[Stage]:
        jobs = [job for job, units in zip(others, known, strict=True) if unit in units]
        return [job.stage for job in jobs if not is_committed(job, unit)]

    return lacking


def _claims(peers: Peers, job: Job) -> Iterator[int]:
    """Claim units for this process and yield their numbers one at a time, skipping committed units."""
    while (number := peers.add("claims", 1) - 1) < len(job.units):
        if not is_committed(job, job.units[number]):
            yield number


def _report_complete(peers: Peers, job: Job, manifest: Manifest) -> Manifest:
    """Finish a job whose cache is already complete and return the manifest."""
    process = peers.process
    peers.publish(f"rank {process.rank} has no more units")  # rank 0 may still be waiting for this rank
    images = f"{counted(manifest.num_samples, 'image')} x {counted(manifest.num_views, 'view')}"
    if process.rank == 0:
        peers.publish("manifest")
    process.print_rank0(f"{job.stage.root} is complete: {images}; nothing to do")
    return manifest


def _finish(peers: Peers, job: Job) -> Manifest:
    """Write the manifest on rank 0 and return it on every rank."""
    root, rank = job.stage.root, peers.process.rank
    peers.publish(f"rank {rank} has no more units")
    if rank == 0:
        manifest = write_final_manifest(job)
        peers.publish("manifest")
        _report_cache(root, manifest, sorted(job.ledger.skipped_images() or {}))
    peers.wait("manifest")
    return read_manifest(root)


def _report_cache(root: Path, manifest: Manifest, undecodable: list[str]) -> None:
    sizes = manifest.bytes_per_view
    skipped = manifest.facts.fingerprint_fields["data"]["samples"] - manifest.num_samples
    keys = f": {some_of(undecodable)}" if undecodable else ""
    shared = f", shared with {manifest.facts.pixels_from['path']}" if manifest.facts.pixels_from else ""
    fidelity = "; ".join(
        f"{name.replace('_', ' ')} {row['mean']:.5f}, 1st percentile {row['p1']:.5f}"
        for name, row in manifest.fidelity.items()
    )
    print(
        f"{root}: {counted(manifest.num_samples, 'image')} x {counted(manifest.num_views, 'view')}, "
        f"{sizes['total']:,.0f} bytes per view ("
        f"{sizes['features']:,.0f} for features, {sizes['pixels']:,.0f} for pixels{shared})"
        + (f"; features {share}" if (share := stored_share(manifest.facts.features_every)) else "")
        + (f"; {counted(skipped, 'image')} could not be decoded{keys} (listed in units/*/unit.json)" if skipped else "")
        + f"\nteacher {teacher_label(manifest.facts.teacher)}: "
        + f"{teacher_accuracy(manifest.facts.teacher, labeled=manifest.facts.labeled)}; "
        f"decoded features: {fidelity}",
        flush=True,
    )


def remove_stale_files(root: Path, process: Process) -> None:
    """On rank 0: remove temporary files left by killed writers, and report those whose writer may still be running."""
    others = [*remove_stale(root), *remove_stale(root / "units")]
    if others:
        oldest = max(others, key=lambda leftover: leftover.age_s)
        process.print_rank0(
            f"{root}: kept {counted(len(others), 'temporary file or folder', 'temporary files or folders')} written by "
            f"other machines or before this machine's last boot; the oldest is {oldest.path.relative_to(root)}, last "
            f"modified {duration_text(oldest.age_s)} ago. "
            f"Delete {'it' if len(others) == 1 else 'them'} once no job is writing to this cache."
        )
