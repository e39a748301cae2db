"""The stage-2 dry run.

In: a `DistillConfig`. Out: lines of text.
Invariant: a dry run makes every check that a run makes before its first step. It writes no files and starts no process
group or DeepSpeed engine.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from scalekd_cache.config.base import to_plain
from scalekd_cache.config.machine import describe_workers
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.convert.timm_export import check_export_place
from scalekd_cache.devices import describe_setup
from scalekd_cache.distributed import Process
from scalekd_cache.errors import counted
from scalekd_cache.loader.batch_size import views_note
from scalekd_cache.models.student import Student
from scalekd_cache.scalekd.heads import make_heads
from scalekd_cache.store.durable_files import check_writable
from scalekd_cache.training.held_out_evaluation import open_comparisons
from scalekd_cache.training.init_weights import load_init_weights, normalization_note
from scalekd_cache.training.optim import deepspeed_config, describe_extension, describe_lr
from scalekd_cache.training.run import checkpoint_to_resume
from scalekd_cache.training.run_cache import RunCache, open_run_cache
from scalekd_cache.training.run_evaluation import open_validation
from scalekd_cache.training.run_folder import check_config, finished_summary, started_epochs, with_weights_of_run
from scalekd_cache.training.targets import (
    describe_targets,
    heads_note,
    live_options,
    load_cache_tail,
    load_classifiers,
    make_loader,
    make_student,
    pooled_width,
    samples_with_features,
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
    check_export_place(run / "export")
    features = samples_with_features(config, reads)
    with torch.device("cpu"):
        student = make_student(config, reads, process)
    setup = describe_setup(process.device, train.precision, process.world_size, describe_workers(train.workers))
    lines = [setup, *reads.describe(), f"student {config.student.name}: {_millions(student.model)}M parameters"]
    head_lines, first_heads = _heads(config, reads, student, features)
    lines += head_lines
    if train.targets != "none":
        lines += filter(None, [weights_note(config.scalekd, len(manifest.facts.class_names))])
    loader = make_loader(config, reads, features, process)
    load_classifiers(config, reads, loader, process)
    lines.append(
        f"{counted(train.epochs, 'epoch')}, {counted(loader.steps_per_epoch, 'step')} per epoch, "
        f"{counted(train.global_batch_size, 'image')} per step, "
        f"{counted(len(loader.micros), 'micro-batch')} of {train.micro_batch_size} per process"
    )
    if note := loader.limits.note(train.global_batch_size):
        lines.append(f"note: {note}")
    open_comparisons(reads, open_validation(manifest, config.data, lines.append), process)
    deepspeed_config(config, process)
    check_writable(run, "--run")
    skipped: list[str] = []
    checkpoint = checkpoint_to_resume(run, skipped.append)
    if checkpoint is not None:
        loader.load_state_dict(checkpoint.facts["loader"])
    elif config.init is not None:
        load_init_weights(config.init, student.model, first_heads)
        lines += filter(None, [normalization_note(config.init, config.student)])
    start = f"resume after step {loader.step}" if checkpoint else "start at step 1"
    lines += describe_targets(config, reads) if train.targets != "none" else []
    if train.targets == "live":
        live_options(config, reads)
    lines += filter(None, [views_note(train.epochs, reads.views)])
    lines += [describe_lr(config), *skipped]
    if before is not None and before < train.epochs:
        lines.append(describe_extension(config, before, loader.step, loader.steps_per_epoch))
    return [*lines, f"would {start} in {run}; dry run: nothing was written"]


def _heads(
    config: DistillConfig, reads: RunCache, student: Student, features: Sequence[int]
) -> tuple[list[str], torch.nn.Module | None]:
    """Lines about the heads for each teacher, and the first teacher's heads; neither without distillation."""
    train, lines, built = config.train, [], []
    if train.targets == "none":
        return [], None
    names = reads.names() if len(reads.caches) > 1 else [""]
    for cache, name, samples in zip(reads.caches, names, features, strict=True):
        of = f" ({name})" if name else ""
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
