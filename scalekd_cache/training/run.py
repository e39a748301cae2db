"""Stage 2: a cache and a student -> a run folder.

In: a `DistillConfig`. Out: a trained, evaluated and exported student, and a summary.
Invariant: everything that can be refused is refused before the first step; a finished run is not done again.
"""

import time
from pathlib import Path

import torch
import torch.distributed as dist

from scalekd_cache.config.base import to_plain
from scalekd_cache.config.stage2 import DistillConfig, TrainConfig
from scalekd_cache.convert.timm_export import check_export_place
from scalekd_cache.data.base import Source
from scalekd_cache.data.source import open_cache_source
from scalekd_cache.distributed import Process, SignalHandler, interrupted_by
from scalekd_cache.errors import UserError
from scalekd_cache.loader.loader import CacheLoader
from scalekd_cache.models.evaluate import Tally, evaluate
from scalekd_cache.models.student import build_student
from scalekd_cache.models.teacher import cache_teacher_config, load_cache_teacher
from scalekd_cache.models.teacher_spec import TeacherSpec
from scalekd_cache.store.growing import read_cache_facts
from scalekd_cache.store.manifest import Manifest
from scalekd_cache.store.remote.remote_path import open_place
from scalekd_cache.training.checkpoint import Checkpoint, latest_checkpoint, prune_checkpoints
from scalekd_cache.training.finished import classifier, consolidated_student, export_state, facts_of, model_card
from scalekd_cache.training.init_weights import load_start
from scalekd_cache.training.optim import describe_lr, synchronize_batchnorm
from scalekd_cache.training.run_cache import RunCache, check_ranks_agree, open_run_cache
from scalekd_cache.training.run_files import FACTS, METRICS, OPTIONS, Summary, read_summary
from scalekd_cache.training.run_folder import RunFolder, check_same_cache, closing_table
from scalekd_cache.training.targets import kept_classifier, make_heads, order_of, tail_of
from scalekd_cache.training.trainer import DistillModel, Trainer, start_processes


def distill(config: DistillConfig, process: Process) -> Summary:
    """Train a student from a cache, or return the summary of the run when it is finished already."""
    run = Path(config.run or "runs/student")
    finished = read_summary(run)
    folder = RunFolder(run, to_plain(config)) if process.rank == 0 else None
    if finished is not None:
        _check_finished(config, run, finished, folder, process)
        process.print_rank0(f"{run} is finished; nothing to do\n{closing_table(run, finished)}")
        return finished
    check_export_place(run / "export")
    reads = open_run_cache(config, run, process)
    cache = reads.cache
    validation = _validation(cache.manifest, config.data, process)
    checkpoint = _checkpoint(run, process)
    trainer = _make_trainer(config, process, reads, checkpoint)
    if trainer.loader.step:
        process.print_rank0(f"resuming {run} at step {trainer.loader.step + 1} of {trainer.loader.total_steps}")
    if folder is not None:
        folder.keep_facts(facts_of(cache.manifest, reads.views))
        prune_checkpoints(folder.checkpoints, checkpoint.folder if checkpoint else None, config.train.keep_checkpoints)
        damaged = folder.start_metrics(trainer.loader.step)
        if damaged:
            process.print_rank0(f"{damaged} damaged lines of {run / METRICS} are left out")
    first, started, tally = trainer.loader.step, time.perf_counter(), None
    if config.train.log_samples:
        trainer.watch.log_samples(run)
    with SignalHandler() as signals, trainer.watch.guard(60 * config.train.timeout_minutes):
        for step in trainer.train(folder):
            signal = trainer.strongest(signals.received)
            if signal or _saves(config.train, step, trainer.loader):
                trainer.save(run / "checkpoints")
            if signal:
                dist.barrier()  # a launcher ends all processes once one has ended, and process 0 is still writing
                raise interrupted_by(signal, step, trainer.loader.total_steps)
            if _evaluates(config.train, step, trainer.loader):
                tally = judge(config, cache.manifest, trainer.student_state(), validation, process)
                if folder is not None and tally is not None:
                    folder.log(step, {"top1": tally.top1_percent, "top5": tally.top5_percent})
    seconds = time.perf_counter() - started
    state = trainer.student_state()
    tally = judge(config, cache.manifest, state, validation, process)
    summary = _summary(config, reads, trainer, tally)
    summary["minutes"] = round(seconds / 60, 2)
    images = (trainer.loader.total_steps - first) * config.train.global_batch_size
    summary["images_per_s"] = round(images / seconds, 1) if images else 0.0
    if folder is not None:
        kept, export = facts_of(cache.manifest, reads.views), run / "export"
        card = model_card(config.student, to_plain(config), kept, summary, export)
        summary["export_max_logit_difference"] = export_state(config.student, state, kept, export, card)
        folder.finish(summary)  # the last thing: a run with a summary is whole
        process.print_rank0(closing_table(run, summary))
    dist.barrier()
    return summary


def _check_finished(
    config: DistillConfig, run: Path, summary: Summary, folder: RunFolder | None, process: Process
) -> None:
    """A finished run is of this cache; files of it that were removed because they were damaged are written again."""
    root = open_place(config.cache, config.remote)
    facts = read_cache_facts(root, config.follow, 60 * config.follow_timeout_minutes, process.print_rank0)
    check_same_cache(run, facts.fingerprint, root)
    there = all((run / name).exists() for name in (OPTIONS, FACTS))
    if folder is not None and not there and facts.fingerprint == summary["cache_fingerprint"]:
        folder.keep_facts(facts_of(facts, summary["views"]))


def _checkpoint(run: Path, process: Process) -> Checkpoint | None:
    """Where the run goes on; a damaged checkpoint is said, and the one before is taken."""
    checkpoint, problems = latest_checkpoint(run / "checkpoints")
    for problem in problems:
        process.print_rank0(f"not used: {problem}")
    if problems and checkpoint is None:
        raise UserError(
            "no checkpoint of this run is whole",
            where=run / "checkpoints",
            fix="restore the folder, or remove it to train from the first step",
        )
    return checkpoint


def _saves(train: TrainConfig, step: int, loader: CacheLoader) -> bool:
    """Whether a checkpoint is due after this step."""
    epoch, inside = divmod(step, loader.steps_per_epoch)
    whole = inside == 0 and epoch % train.checkpoint_epochs == 0
    within = train.checkpoint_steps > 0 and step % train.checkpoint_steps == 0
    return whole or within or step == loader.total_steps


def _evaluates(train: TrainConfig, step: int, loader: CacheLoader) -> bool:
    """Whether an evaluation is due after this step; the last one comes after training."""
    epoch, inside = divmod(step, loader.steps_per_epoch)
    return inside == 0 and epoch % train.eval_epochs == 0 and step != loader.total_steps


def _validation(manifest: Manifest, data: str | None, process: Process) -> Source | None:
    """The validation images; their absence is said at the start, not after hours."""
    try:
        return open_cache_source(manifest.data, data, "val")
    except UserError as error:
        process.print_rank0(f"no validation images here, so accuracy will not be measured (give DATA=):\n{error}")
        return None


def _make_trainer(config: DistillConfig, process: Process, reads: RunCache, checkpoint: Checkpoint | None) -> Trainer:
    """Everything a run needs, built and checked on each rank."""
    cache, manifest, train = reads.cache, reads.cache.manifest, config.train
    torch.manual_seed(train.seed)
    student = build_student(
        config.student, num_classes=len(manifest.class_names), image_size=manifest.view_recipe["size"]
    )
    if train.sync_bn:
        student.model = synchronize_batchnorm(student.model, process)
    process.print_rank0(describe_lr(config))
    spec = TeacherSpec.from_json(manifest.teacher["spec"])
    tail, teacher, heads = None, None, None
    if train.targets != "none":
        tail = tail_of(cache, spec).to(process.device)
        if config.scalekd.tail_drop_path:
            tail.enable_drop_path()
        heads = make_heads(config, student, tail)
    if config.init is not None and checkpoint is None:
        process.print_rank0("starting from " + ", ".join(load_start(config.init, student.model, heads)))
    if train.targets == "live":
        options = cache_teacher_config(manifest.teacher["config"], config.teacher_weights)
        teacher = load_cache_teacher(manifest, options, process.device)
    loader = CacheLoader(
        cache,
        order_of(train, cache, process),
        epochs=train.epochs,
        global_batch=train.global_batch_size,
        micro_batch=train.micro_batch_size,
        rank=process.rank,
        world_size=process.world_size,
        workers=train.workers,
        views=reads.views,
        pixels=reads.pixels,
        data=config.data,
        pin_memory=process.device.type == "cuda",
    )
    start_processes(process, train.timeout_minutes)
    check_ranks_agree(reads, process)
    model = DistillModel(config, student, heads)
    classifier = kept_classifier(config, cache, loader.logit_codec, process)
    return Trainer(config, process, loader, model, tail, teacher, loader.codec, checkpoint, classifier)


def judge(
    config: DistillConfig,
    manifest: Manifest,
    state: dict[str, torch.Tensor],
    validation: Source | None,
    process: Process,
) -> Tally | None:
    """Accuracy of the student with these weights on the validation images, shared by all ranks."""
    if validation is None:
        return None
    size = manifest.view_recipe["size"]
    student = consolidated_student(config.student, state, len(manifest.class_names), size)
    share = evaluate(
        classifier(student.model.to(process.device), config.student.mean, config.student.std),
        validation,
        size,
        process.device,
        rank=process.rank,
        world_size=process.world_size,
        workers=config.train.workers,
    )
    counts = torch.tensor(share, device=process.device)
    dist.all_reduce(counts)
    return Tally(*counts.tolist())


def _summary(config: DistillConfig, reads: RunCache, trainer: Trainer, tally: Tally | None) -> Summary:
    manifest = reads.cache.manifest
    return {
        "student": config.student.name,
        "teacher": manifest.teacher["spec"]["name"],
        "targets": config.train.targets,
        "top1": round(tally.top1_percent, 4) if tally else None,
        "top5": round(tally.top5_percent, 4) if tally else None,
        "val_images": tally.images if tally else 0,
        "teacher_top1": manifest.teacher["top1"],
        "has_classifier": manifest.teacher["spec"]["has_classifier"],
        "epochs": config.train.epochs,
        "steps": trainer.loader.total_steps,
        "seed": config.train.seed,
        "zero": config.train.zero,
        "world_size": trainer.process.world_size,
        "views": reads.views,
        "codec": trainer.codec.id,
        "bytes_per_view": manifest.bytes_per_view["total"],
        "cache_fingerprint": manifest.fingerprint,
    }
