"""Opens the cache or caches used by a run.

In: a `DistillConfig`, the run folder, and this process. Out: a `RunCache`, the same on every rank.
Invariant: epoch e reads view e mod V. V is fixed when the run starts, even if a cache grows later.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from scalekd_cache.config.places import cache_places, teacher_folders
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError, counted, shell_command
from scalekd_cache.loader.target_cache import check_joinable
from scalekd_cache.scalekd.losses import check_loss
from scalekd_cache.store.growing import GrowingCache, open_growing_cache
from scalekd_cache.store.manifest import ManifestFacts, joint_fingerprint, read_manifest
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.remote.remote_path import open_place
from scalekd_cache.store.shared_pixels import open_shared_pixels
from scalekd_cache.training.checkpoint import latest_checkpoint
from scalekd_cache.training.run_files import FACTS, read_facts
from scalekd_cache.training.run_folder import check_same_cache


class RunCache(NamedTuple):
    """A run's open caches, one per teacher, with the same views."""

    caches: tuple[Cache, ...]
    """The caches with the targets. The first one also provides the order, labels, view records and, unless shared, the
    pixels."""
    views: int
    """V: the number of views that the epochs cycle through."""
    pixels: Cache | None
    """The cache that stores the pixels of the first cache, if they are shared."""

    @property
    def cache(self) -> Cache:
        """The first cache."""
        return self.caches[0]

    @property
    def facts(self) -> list[ManifestFacts]:
        """Each cache's facts, from its manifest."""
        return [cache.manifest.facts for cache in self.caches]

    @property
    def num_classes(self) -> int:
        """The student's number of classes: the dataset's or, without labels, that of the first teacher with logits."""
        return next((facts.num_classes for facts in self.facts if facts.num_classes), 0)

    def shares_classes(self, number: int) -> bool:
        """Whether a teacher's logits refer to the student's classes. With labels, they always do. Without labels,
        this holds only for the first teacher with logits, because the class order of other teachers is unknown."""
        return self.facts[0].labeled or not any(facts.num_classes for facts in self.facts[:number])

    def names(self) -> list[str]:
        """The teachers' names with unsafe characters replaced, and -2, -3, ... appended to repeated names."""
        return teacher_folders([str(facts.teacher["spec"]["name"]) for facts in self.facts])

    def describe(self) -> list[str]:
        """One line of text for each cache."""
        lines = []
        for cache in self.caches:
            manifest = cache.manifest
            lines.append(
                f"{cache.root}: {counted(manifest.num_samples, 'image')} x {counted(manifest.num_views, 'view')}"
                + (" planned (still growing)" if isinstance(cache, GrowingCache) else "")
                + ("" if self.views == manifest.num_views else f"; this run reads the first {self.views}")
                + ("" if self.pixels is None or cache is not self.cache else f"; pixels from {self.pixels.root}")
            )
        return lines


def open_run_cache(config: DistillConfig, run: Path, process: Process) -> RunCache:
    """Open the caches for a run; with `follow`, wait until the first views are ready.

    Raises:
        UserError: a cache is unfinished and `follow` is off, or has too few views; the run started with a different
            cache; the caches have different views; the cache that stores the shared pixels is missing; or the caches
            and the options leave no loss.
    """
    caches = []
    for place in cache_places(config.cache):
        root = open_place(place, config.remote)
        if config.follow:
            caches.append(open_growing_cache(root, 60 * config.follow_timeout_minutes, process.print_rank0))
        else:
            caches.append(Cache(root, read_manifest(root)))
    places = ", ".join(str(cache.root) for cache in caches)
    joint = joint_fingerprint(cache.manifest.facts for cache in caches)
    check_same_cache(run, joint, places)
    config.scalekd.check_teachers(len(caches))
    check_caches(caches)
    views = _views(config, run, min(caches, key=lambda cache: cache.manifest.num_views))
    pixels = open_shared_pixels(caches[0], config.pixels_from, views, config.remote)
    facts = caches[0].manifest.facts
    config = config.on_data(classes=len(facts.class_names))
    logits = has_logits(cache.manifest.facts for cache in caches)
    check_loss(config.scalekd, config.train, labeled=facts.labeled, logits=logits)
    return RunCache(tuple(caches), views, pixels)


def has_logits(facts: Iterable[ManifestFacts]) -> bool:
    """Whether any of the caches has logits."""
    return any(one.logit_codec.get("num_classes") for one in facts)


def check_caches(caches: Sequence[Cache]) -> None:
    """Check that a single student can be trained on the targets from all these caches.

    Raises:
        UserError: a cache is listed twice, or the caches have different views or images.
    """
    if len({cache.manifest.facts.fingerprint for cache in caches}) < len(caches):
        listed = ", ".join(str(cache.root) for cache in caches)
        fix = "list each cache once; a copy of a cache counts as the same cache"
        raise UserError("a cache is listed twice", got=listed, fix=fix)
    for cache in caches[1:]:
        check_joinable(caches[0], cache)


def _views(config: DistillConfig, run: Path, cache: Cache) -> int:
    """V: for a resumed run, the value it started with; for a new run, `train.views` or else the smallest number of
    views in any of the caches."""
    available, requested = cache.manifest.num_views, config.train.views
    started = _views_of_started_run(run)
    views: int = started or requested or available
    if views > available:
        raise UserError(
            "the cache has fewer views than the run needs",
            got=f"{counted(available, 'view')} in its manifest",
            expected=f"{counted(views, 'view')}, "
            + ("the same as when the run started" if started else "as set with train.views"),
            where=cache.root,
            fix=("" if started else f"set --train.views to at most {available}, or ")
            + f"add views: {shell_command('cache-teacher', cache=cache.root, views=views)}"
            + ("" if config.follow else "; to train while they are being written, set --follow"),
        )
    return views


def _views_of_started_run(run: Path) -> int | None:
    """V for an existing run, read from cache.json or, if that file is missing, from the newest checkpoint."""
    if (run / FACTS).exists():
        return int(read_facts(run)["views"])
    checkpoint, _ = latest_checkpoint(run / "checkpoints")
    views = checkpoint.facts["loader"].get("views") if checkpoint else None
    return views if isinstance(views, int) else None


def check_ranks_agree(run_cache: RunCache, process: Process) -> None:
    """Check that all ranks opened the cache in the same state, because a growing cache can change in between.

    Raises:
        UserError: the states differ; raised on every rank.
    """
    if process.world_size == 1:
        return
    manifests = [cache.manifest for cache in (*run_cache.caches, run_cache.pixels) if cache is not None]
    states = [(one.facts.fingerprint, one.num_samples, one.facts.groups) for one in manifests]
    text = f"{states} {run_cache.views}"
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8).to(process.device)
    gathered = [torch.empty_like(digest) for _ in range(process.world_size)]
    dist.all_gather(gathered, digest)
    if not all(torch.equal(digest, other) for other in gathered):
        raise UserError(
            "the cache changed while the ranks were opening it",
            got=f"rank {process.rank}: {counted(manifests[0].num_views, 'view')}, {run_cache.views} of them used",
            where=", ".join(str(cache.root) for cache in run_cache.caches),
            fix="rerun this command",
        )
