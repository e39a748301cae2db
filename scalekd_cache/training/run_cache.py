"""What a run reads: the cache, how many of its views, and whose pixels.

In: a `DistillConfig`, the run's folder, this process. Out: a `RunCache`, the same on every process.
Invariant: epoch e of a run reads view e mod V from its first session to its last: V is fixed when the run starts,
whatever the cache grows to.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError
from scalekd_cache.store.growing import GrowingCache, follow_cache
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.remote.remote_path import open_place
from scalekd_cache.store.shared_pixels import pixels_of
from scalekd_cache.training.run_files import FACTS, read_facts
from scalekd_cache.training.run_folder import check_same_cache


class RunCache(NamedTuple):
    """What a run reads."""

    cache: Cache
    """Targets, labels, view records; pixels too, unless they are shared."""
    views: int
    """V: views of the cycle of epochs."""
    pixels: Cache | None
    """The cache that holds the pixels, when it is another one."""


def open_run_cache(config: DistillConfig, run: Path, process: Process) -> RunCache:
    """Open what a run reads; with `follow`, wait until it can begin.

    Raises:
        UserError: not finished and not followed; another cache than the run began with; fewer views than it needs;
            or the pixels that the cache shares are not there.
    """
    root = open_place(config.cache, config.remote)
    if config.follow:
        cache = follow_cache(root, 60 * config.follow_timeout_minutes, process.print_rank0)
    else:
        cache = Cache(root, read_manifest(root))
    manifest = cache.manifest
    check_same_cache(run, manifest.fingerprint, root)
    views = _views(config, run, cache)
    pixels = pixels_of(cache, config.pixels_from, views, config.remote)
    process.print_rank0(
        f"{root}: {manifest.num_samples:,} images x {manifest.num_views} views expected "
        + ("by its plan, it is still growing" if isinstance(cache, GrowingCache) else "by its manifest")
        + ("" if views == manifest.num_views else f"; this run reads the first {views}")
        + ("" if pixels is None else f"; pixels from {pixels.root}")
    )
    return RunCache(cache, views, pixels)


def _views(config: DistillConfig, run: Path, cache: Cache) -> int:
    """V: of a run that has begun, what it began with; else as asked, or all."""
    there, asked = cache.manifest.num_views, config.train.views
    begun = read_facts(run).get("views") if (run / FACTS).exists() else None
    views: int = begun or asked or there
    if views > there:
        raise UserError(
            "the cache has fewer views than the run reads",
            got=f"{there} views in its manifest",
            expected=f"{views} views, " + ("as when the run began" if begun else "as train.views asks for"),
            where=cache.root,
            fix="wait for the writer with FOLLOW=1, or add views: make cache-teacher VIEWS=" + str(views),
        )
    return views


def check_ranks_agree(reads: RunCache, process: Process) -> None:
    """All processes read the same cache in the same state: one that grows may be met in two.

    Raises:
        UserError: on every process, when they do not.
    """
    if process.world_size == 1:
        return
    pixels = reads.pixels.manifest.fingerprint if reads.pixels is not None else ""
    manifest = reads.cache.manifest
    text = f"{manifest.fingerprint} {manifest.num_samples} {manifest.groups} {reads.views} {pixels}"
    mine = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8).to(process.device)
    all_of_them = [torch.empty_like(mine) for _ in range(process.world_size)]
    dist.all_gather(all_of_them, mine)
    if not all(torch.equal(mine, theirs) for theirs in all_of_them):
        raise UserError(
            "the processes see the cache in different states",
            got=f"process {process.rank}: {manifest.num_views} views, of which it reads {reads.views}",
            where=reads.cache.root,
            fix="it grew while they started: start again",
        )
