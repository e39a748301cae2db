"""Stage 2: train a student from a cache, then evaluate and export it.

Every command is resumable: after an interruption, rerun it.
"""

import contextlib
import shlex
from typing import Any

import click

from pipelines.command import WORKERS, Command, Given, Output, run, typed_command
from pipelines.launcher import LaunchConfig, processes_per_node
from scalekd_cache.api import train_students
from scalekd_cache.caching.configure import cache_teacher_config
from scalekd_cache.config.base import flat
from scalekd_cache.config.options import build, take
from scalekd_cache.config.recipes import recipe_section
from scalekd_cache.config.stage2 import DistillConfig, TrainConfig
from scalekd_cache.training.configure import distill_config, distill_config_before_cache


def main(given: Given) -> None:
    """Train a student, or print the plan in a dry run."""
    output, facts = take(given, Output), dict[str, Any]()
    with output.printed(facts):
        config = distill_config(given)
        from scalekd_cache.distributed import this_process
        from scalekd_cache.training.run_files import MAX_RUNS
        from scalekd_cache.training.series import plan_series, single_runs

        runs = single_runs(config)
        process = this_process(config.device)
        if output.dry_run:
            facts["dry_run"] = plan_series(runs, process)
            return
        facts |= train_students(runs, process)
        places = [str(one.run) for one in runs[:MAX_RUNS]]
        folders = {"run": places[0]} if len(places) == 1 else {"runs": shlex.join(places)}
        plugin = click.get_current_context().params["plugin"]
        process.print_rank0(f"next: {typed_command('report', {**folders, 'plugin': plugin})}")


def check_before_cache(given: Given) -> None:
    """Check the options before the cache is created: their values, and the batch size against the dataset."""
    given = dict(given)
    take(given, Output)
    launch = take(given, LaunchConfig)
    train = distill_config_before_cache(given).train
    nproc = processes_per_node(launch, given, lambda given, gpus: _fitting(train, gpus))
    from scalekd_cache.config.stage1 import CacheTeacherConfig
    from scalekd_cache.data.builtin import NotDownloadedError
    from scalekd_cache.data.source import open_source
    from scalekd_cache.loader.batch_size import BatchLimits, micro_batches_of_rank

    with contextlib.suppress(NotDownloadedError):
        chosen = {"data.source": given.get("data"), "recipe": given.get("recipe")}
        stage1 = cache_teacher_config(CacheTeacherConfig, {name: value for name, value in chosen.items() if value})
        images = len(open_source(stage1.data, "train", download=False).samples)
        if train.global_batch_size > images:
            raise BatchLimits.of_dataset(images, train.micro_batch_size, nproc).too_large(train.global_batch_size)
    micro_batches_of_rank(train.global_batch_size, train.micro_batch_size, 0, nproc)


def fit(given: Given, gpus: int) -> int:
    """How many of these GPUs can share the micro-batches of a batch evenly."""
    take(given, Output)
    return gpus if _follows(given) else _fitting(distill_config(given).train, gpus)


def _follows(given: Given) -> bool:
    config: DistillConfig = build(DistillConfig, {"follow": given.get("follow", False)})
    return config.follow


def _fitting(train: TrainConfig, gpus: int) -> int:
    from scalekd_cache.loader.batch_size import usable_ranks

    return usable_ranks(train.global_batch_size // train.micro_batch_size, gpus)


def check(given: Given, nproc: int) -> None:
    """Report mistyped options and names, and a batch that the processes cannot share, before starting any process."""
    take(given, Output)
    if _follows(given):  # the cache may not exist yet
        return
    config = distill_config(given)
    from scalekd_cache.loader.batch_size import micro_batches_of_rank

    micro_batches_of_rank(config.train.global_batch_size, config.train.micro_batch_size, 0, nproc)


COMMAND = Command(
    "distill",
    main,
    [DistillConfig, Output, LaunchConfig],
    __doc__,
    fit=fit,
    check=check,
    check_values=check_before_cache,
    recipe_options=lambda name: flat(recipe_section(name, "distill")),
    defaults={
        "student.name": "required",
        "cache": "default: caches/<name of --data>, or caches/demo without --data",
        "train.workers": WORKERS,
    },
)

if __name__ == "__main__":
    run(COMMAND)
