"""The stage-2 dry run.

In: a `DistillConfig`. Out: lines of text.
Invariant: a dry run makes every check that a run makes before its first step. It writes no files and starts no process
group or DeepSpeed engine.
"""

from pathlib import Path

import torch

from scalekd_cache.config.base import to_plain
from scalekd_cache.config.machine import describe_workers
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.devices import describe_setup
from scalekd_cache.distributed import Process
from scalekd_cache.errors import counted
from scalekd_cache.loader.loader import check_workers
from scalekd_cache.loader.order import micro_batches_of_rank, small_dataset_note, steps_per_epoch, views_note
from scalekd_cache.loader.target_cache import target_codecs
from scalekd_cache.models.student import Student, build_student
from scalekd_cache.scalekd.heads import make_heads
from scalekd_cache.store.durable_files import check_writable
from scalekd_cache.training.checkpoint import latest_checkpoint
from scalekd_cache.training.init_weights import load_init_weights
from scalekd_cache.training.optim import deepspeed_config, describe_extension, describe_lr
from scalekd_cache.training.run_cache import RunCache, open_run_cache
from scalekd_cache.training.run_evaluation import open_validation
from scalekd_cache.training.run_folder import check_config, finished_summary, started_epochs, with_weights_of_run
from scalekd_cache.training.targets import (
    describe_targets,
    feature_samples,
    heads_note,
    live_options,
    load_cache_tail,
    make_order,
    pooled_width,
    weights_note,
)
from scalekd_cache.training.trackers import check_tracker


def plan_distill(config: DistillConfig, process: Process) -> list[str]:
    """Lines of text that describe what `scalekd distill` would do.

    Raises:
        UserError: any error that the run would raise before its first step.
    """
    run, train = Path(config.run or "runs/student"), config.train
    config = with_weights_of_run(config, run)
    check_config(run, to_plain(config))
    reads = open_run_cache(config, run, process)
    check_tracker(train.tracker)
    before = started_epochs(run)
    if finished_summary(run, train.epochs, config.extend) is not None:
        return [f"{run} is finished; nothing to do"]
    manifest = reads.cache.manifest
    config = config.on_data(classes=len(manifest.facts.class_names))
    with torch.device("cpu"):
        student = build_student(
            config.student, num_classes=reads.num_classes, image_size=manifest.facts.view_recipe["size"]
        )
    setup = describe_setup(process.device, train.precision, process.world_size, describe_workers(train.workers))
    lines = [setup, *reads.describe(), f"student {config.student.name}: {_millions(student.model)}M parameters"]
    head_lines, first_heads = _heads(config, reads, student)
    lines += head_lines
    if train.targets != "none":
        lines += filter(None, [weights_note(config.scalekd, len(manifest.facts.class_names))])
    order = make_order(train, reads.cache, process, reads.caches[1:])
    check_workers(reads.cache, [target_codecs(cache) for cache in reads.caches], train.micro_batch_size, train.workers)
    micros = micro_batches_of_rank(train.global_batch_size, train.micro_batch_size, process.rank, process.world_size)
    per_epoch = steps_per_epoch(order, train.global_batch_size, train.micro_batch_size, process.world_size)
    lines.append(
        f"{counted(train.epochs, 'epoch')}, {counted(per_epoch, 'step')} per epoch, "
        f"{counted(train.global_batch_size, 'image')} per step, "
        f"{counted(len(micros), 'micro-batch')} of {train.micro_batch_size} per process"
    )
    if note := small_dataset_note(order, train.global_batch_size, train.micro_batch_size, process.world_size):
        lines.append(f"note: {note}")
    open_validation(manifest, config.data, lines.append)
    deepspeed_config(config, process)
    check_writable(run, "--run")
    checkpoint, problems = latest_checkpoint(run / "checkpoints")
    if config.init is not None and checkpoint is None:
        load_init_weights(config.init, student.model, first_heads)
    start = f"resume after step {checkpoint.facts['loader']['step']}" if checkpoint else "start at step 1"
    lines += describe_targets(config, reads) if train.targets != "none" else []
    if train.targets == "live":
        live_options(config, reads)
    lines += filter(None, [views_note(train.epochs, reads.views)])
    lines += [describe_lr(config), *(f"skipped: {problem}" for problem in problems)]
    if before is not None and before < train.epochs:
        first = checkpoint.facts["loader"]["step"] if checkpoint else 0
        lines.append(describe_extension(config, before, first, per_epoch))
    return [*lines, f"would {start} in {run}; dry run: nothing was written"]


def _heads(config: DistillConfig, reads: RunCache, student: Student) -> tuple[list[str], torch.nn.Module | None]:
    """Lines about the heads for each teacher, and the first teacher's heads; neither without distillation."""
    train, lines, built = config.train, [], []
    if train.targets == "none":
        return [], None
    names = reads.names() if len(reads.caches) > 1 else [""]
    for number, (cache, name) in enumerate(zip(reads.caches, names, strict=True)):
        of = f" ({name})" if name else ""
        samples = feature_samples(config.scalekd, cache, train.micro_batch_size, number)
        if samples < train.micro_batch_size:
            total = counted(train.micro_batch_size, "sample")
            lines.append(f"feature losses on {samples} of {total} per micro-batch{of}")
        tail = load_cache_tail(cache)
        heads = make_heads(config, student, tail, pooled_width(cache.manifest.facts))
        built.append(heads)
        lines.append(f"projectors{of}: {_millions(heads)}M parameters, not exported")
        lines += filter(None, [heads_note(config, student, heads)])
    return lines, built[0]


def _millions(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f}"
