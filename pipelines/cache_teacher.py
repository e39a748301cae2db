"""Stage 1: run the teacher once over augmented views and cache the targets for students.

Every command is resumable: after an interruption, rerun it.
"""

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from pipelines.command import STAGE1_DEFAULTS, Command, Given, Output, run, typed_command
from pipelines.launcher import LaunchConfig
from scalekd_cache.caching.cache_info import caches_info
from scalekd_cache.caching.configure import cache_teacher_config, checked_student, stored_place
from scalekd_cache.config.base import flat
from scalekd_cache.config.options import build, take
from scalekd_cache.config.recipes import recipe_section, training_options
from scalekd_cache.config.stage1 import CacheTeacherConfig
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.loader.batch_size import BatchLimits, views_note
from scalekd_cache.store.locks import lock, open_lock
from scalekd_cache.store.manifest import Manifest


def main(given: Given) -> None:
    """Run stage 1, or only its checks in a dry run."""
    output, facts = take(given, Output), dict[str, Any]()
    with output.printed(facts):
        config = cache_teacher_config(CacheTeacherConfig, given)
        student = checked_student(config)
        from scalekd_cache.caching.job import cache_teachers, dry_run
        from scalekd_cache.distributed import this_process

        facts |= {"cache": config.cache.path, "dry_run": output.dry_run}
        process = this_process(config.device)
        if output.dry_run:
            dry_run(config, process, student)
            return
        manifests = cache_teachers(config, process, student)
        found = caches_info(config, manifests)
        train = _training_of(manifests[0]).train
        if note := views_note(train.epochs, manifests[0].num_views):
            process.print_rank0(f"note: with recipe {manifests[0].facts.recipe}, {note}")
        process.print_rank0(f"next: {next_command(found.place, manifests[0], process.world_size, config.student)}")
        facts |= found.to_json()


@contextlib.contextmanager
def one_job_per_node(given: Given) -> Iterator[None]:
    """Lock the cache, so that two commands on one node never write it at the same time.

    The lock file is in the node's temporary folder, so a failed command leaves no file next to the cache. A multi-node
    job takes no lock, because its nodes may be containers on one machine and would wait for each other.
    """
    if take(dict(given), Output).dry_run or str(given.get("nnodes", "1")) != "1":  # a dry run writes nothing
        yield
        return
    root = stored_place(given)
    name = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"scalekd-locks-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        file = open_lock(folder / name)
    except OSError as error:
        print(
            f"warning: cannot create a lock in {folder} ({error.strerror}): do not run two commands that write to "
            f"{root} at the same time",
            file=sys.stderr,
            flush=True,
        )
        yield
        return
    with file:
        try:
            lock(file, folder / name, wait=False)
        except BlockingIOError:
            print(f"waiting for another command that is writing to {root}", file=sys.stderr, flush=True)
            lock(file, folder / name)
        yield


def next_command(place: str, manifest: Manifest, world_size: int = 1, student: str | None = None) -> str:
    """The `distill` command for these caches, to be run from the current folder.

    It sets a smaller batch, for this number of processes, if the recipe's batch is too large for the dataset.
    """
    training = _training_of(manifest)
    limits = BatchLimits.of_dataset(
        manifest.num_samples,
        training.train.micro_batch_size,
        world_size,
        share=training.scalekd.share_of(),
        every=manifest.facts.features_every,
        ranges=sum(row.group == 0 for row in manifest.units),
    )
    given = training.train.global_batch_size
    batch = limits.suitable(given)
    plugin = click.get_current_context().params.get("plugin")
    options = {"student": student or "resnet50", "cache": place, "plugin": plugin}
    return typed_command("distill", {**options, "batch": None if batch == given else batch})


def _training_of(manifest: Manifest) -> DistillConfig:
    """The training options that `distill` reads from this cache."""
    return build(DistillConfig, training_options(None, manifest.facts.recipe, manifest.facts.distill))


def check(given: Given, nproc: int) -> None:
    """Report mistyped options and names before starting any process."""
    take(given, Output)
    config = cache_teacher_config(CacheTeacherConfig, given)
    student = checked_student(config)
    from scalekd_cache.caching.preflight import check_names

    for one in config.per_teacher():
        check_names(one, student)


COMMAND = Command(
    "cache-teacher",
    main,
    [CacheTeacherConfig, Output, LaunchConfig],
    __doc__,
    one_job_per_node,
    check,
    recipe_options=lambda name: flat(recipe_section(name, "cache")),
    defaults=STAGE1_DEFAULTS,
)

if __name__ == "__main__":
    run(COMMAND)
