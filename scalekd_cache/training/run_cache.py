"""The cache of a run: targets, number of views, pixels.

In: a `DistillConfig`, the run's folder, this process. Out: a `RunCache`, the same on every rank.
Invariant: epoch e reads view e mod V. V is fixed when the run starts, even if the cache grows later.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError, counted
from scalekd_cache.store.growing import GrowingCache, open_growing_cache
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.remote.remote_path import open_place
from scalekd_cache.store.shared_pixels import open_shared_pixels
from scalekd_cache.training.checkpoint import latest_checkpoint
from scalekd_cache.training.run_files import FACTS, read_facts
from scalekd_cache.training.run_folder import check_same_cache


class RunCache(NamedTuple):
    """An open cache, as one run reads it."""

    cache: Cache
    """Targets, labels, view records; pixels too, unless they are shared."""
    views: int
    """V: number of views that the epochs cycle through."""
    pixels: Cache | None
    """The cache with the pixels, if they are in another one."""


def open_run_cache(config: DistillConfig, run: Path, process: Process) -> RunCache:
    """Open the cache of a run; with `follow`, wait until the first views are ready.

    Raises:
        UserError: the cache is not finished and not followed; the run started with another cache; the cache has too
            few views; or the cache that its pixels are shared from is missing.
    """
    root = open_place(config.cache, config.remote)
    if config.follow:
        cache = open_growing_cache(root, 60 * config.follow_timeout_minutes, process.print_rank0)
    else:
        cache = Cache(root, read_manifest(root))
    manifest = cache.manifest
    check_same_cache(run, manifest.facts.fingerprint, root)
    views = _views(config, run, cache)
    pixels = open_shared_pixels(cache, config.pixels_from, views, config.remote)
    process.print_rank0(
        f"{root}: {counted(manifest.num_samples, 'image')} x {counted(manifest.num_views, 'view')} expected "
        + ("by its plan, still growing" if isinstance(cache, GrowingCache) else "by its manifest")
        + ("" if views == manifest.num_views else f"; this run reads the first {views}")
        + ("" if pixels is None else f"; pixels from {pixels.root}")
    )
    return RunCache(cache, views, pixels)


def _views(config: DistillConfig, run: Path, cache: Cache) -> int:
    """V: the value the run started with; for a new run `train.views`, or all views."""
    available, requested = cache.manifest.num_views, config.train.views
    started = _views_of_started_run(run)
    views: int = started or requested or available
    if views > available:
        raise UserError(
            "the cache has fewer views than the run needs",
            got=f"{counted(available, 'view')} in its manifest",
            expected=f"{counted(views, 'view')}, "
            + ("as when the run started" if started else "as set by train.views"),
            where=cache.root,
            fix=f"wait for the writer with --follow, or add views: scalekd cache-teacher --views {views}",
        )
    return views


def _views_of_started_run(run: Path) -> int | None:
    """V of a run that was started before: from cache.json or, where that is gone, from its newest checkpoint."""
    if (run / FACTS).exists():
        return int(read_facts(run)["views"])
    checkpoint, _ = latest_checkpoint(run / "checkpoints")
    views = checkpoint.facts["loader"].get("views") if checkpoint else None
    return views if isinstance(views, int) else None


def check_ranks_agree(run_cache: RunCache, process: Process) -> None:
    """Check that all ranks opened the cache in the same state; a growing cache may differ.

    Raises:
        UserError: on every rank, when they differ.
    """
    if process.world_size == 1:
        return
    pixels = run_cache.pixels.manifest.facts.fingerprint if run_cache.pixels is not None else ""
    manifest = run_cache.cache.manifest
    text = f"{manifest.facts.fingerprint} {manifest.num_samples} {manifest.facts.groups} {run_cache.views} {pixels}"
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8).to(process.device)
    gathered = [torch.empty_like(digest) for _ in range(process.world_size)]
    dist.all_gather(gathered, digest)
    if not all(torch.equal(digest, other) for other in gathered):
        raise UserError(
            "the ranks opened the cache in different states",
            got=f"rank {process.rank}: {counted(manifest.num_views, 'view')}, {run_cache.views} of them used",
            where=run_cache.cache.root,
            fix="the cache grew while the ranks started: rerun",
        )
