"""The complete stage-2 job, from a cache and a student to a run folder.

In: a `DistillConfig`. Out: a trained, evaluated and exported student, and a summary.
Invariant: invalid input is reported before the first step. The summary is written last, so a run with a summary is
finished and is not repeated.
"""

import functools
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import nn

from scalekd_cache.config.base import to_plain
from scalekd_cache.config.machine import describe_workers
from scalekd_cache.config.places import cache_places
from scalekd_cache.config.stage2 import DistillConfig, TrainConfig
from scalekd_cache.convert.timm_export import check_export_place
from scalekd_cache.data.base import Source
from scalekd_cache.devices import describe_setup, restored_launcher_variables
from scalekd_cache.distributed import Process, SignalHandler, interrupted_by
from scalekd_cache.errors import UserError, counted
from scalekd_cache.loader.batch_size import views_note
from scalekd_cache.loader.loader import CacheLoader
from scalekd_cache.models.student import check_student_name
from scalekd_cache.models.tail import Tail
from scalekd_cache.store.growing import read_cache_facts
from scalekd_cache.store.manifest import joint_fingerprint
from scalekd_cache.store.remote.remote_path import open_place
from scalekd_cache.training.checkpoint import Checkpoint, checkpoint_folder, latest_checkpoint, prune_checkpoints
from scalekd_cache.training.held_out_evaluation import TeacherComparisons, open_comparisons
from scalekd_cache.training.init_weights import load_init_weights, normalization_note
from scalekd_cache.training.model_card import model_card
from scalekd_cache.training.optim import describe_extension, describe_lr
from scalekd_cache.training.run_cache import RunCache, check_ranks_agree, open_run_cache
from scalekd_cache.training.run_evaluation import Evaluation, evaluate_state, open_validation
from scalekd_cache.training.run_export import State, consolidated_student, export_state, facts_of
from scalekd_cache.training.run_files import FACTS, METRICS, OPTIONS, SUMMARY, Summary
from scalekd_cache.training.run_folder import (
    RunFolder,
    check_same_cache,
    finished_summary,
    started_epochs,
    with_weights_of_run,
)
from scalekd_cache.training.run_summary import make_summary, summary_table
from scalekd_cache.training.targets import (
    describe_targets,
    heads_note,
    live_teachers,
    load_tails,
    make_all_heads,
    make_loader,
    make_student,
    samples_with_features,
    target_sources,
    weights_note,
)
from scalekd_cache.training.trackers import Logger, check_tracker, start_tracker
from scalekd_cache.training.trainer import DistillModel, Spent, Trainer, start_processes


def distill(config: DistillConfig, process: Process, log: Logger | None = None) -> Summary:
    """Train a student from a cache and return the run's summary. If the run is finished, only return the summary.

    With `extend`, a run with fewer epochs resumes from its last checkpoint.

    Args:
        config: all options of stage 2.
        process: this process.
        log: called on rank 0 with (step, values) for every line written to metrics.jsonl.
    """
    run = Path(config.run or "runs/student")
    check_student_name(config.student.name)  # before a folder is created
    config = with_weights_of_run(config, run)
    folder = RunFolder(run, to_plain(config)) if process.rank == 0 else None
    try:
        if folder is not None:
            folder.add_logger(log)
        with restored_launcher_variables():
            return _distill(config, run, folder, process)
    finally:
        if folder is not None:
            folder.close()


class _Session(NamedTuple):
    """One session of a run: what training and evaluation need."""

    config: DistillConfig
    """The options, with the values that depend on the dataset."""
    run: Path
    folder: RunFolder | None
    """None on other ranks than 0."""
    run_cache: RunCache
    validation: Source | None
    comparison: TeacherComparisons | None
    """Without labels, compares the student with the teachers on the validation images."""
    trainer: Trainer
    first: int
    """Number of steps that earlier sessions have trained."""
    say: Callable[[str], None]
    """Prints a note on rank 0; the same note only once, not after every epoch."""


def _distill(config: DistillConfig, run: Path, folder: RunFolder | None, process: Process) -> Summary:
    """`distill` in a locked folder."""
    finished = finished_summary(run, config.train.epochs, config.extend)
    if finished is not None:
        _check_finished(config, run, finished, folder, process)
        longer = f" (to extend it, set --epochs above {finished['epochs']})" if config.extend else ""
        process.print_rank0(f"{run} is finished; nothing to do{longer}\n{summary_table(run, finished)}")
        return finished
    session = _start(config, run, folder, process)
    trainer = session.trainer
    timeout_s = 60 * session.config.train.timeout_minutes
    with SignalHandler() as signals, closing(trainer), trainer.watchdog.guard(timeout_s):
        _train(session, signals)
        spent, state = trainer.spent(), trainer.student_state()
        found = _evaluate(session, trainer.loader.total_steps, state, signals, final=True)
    return _finish(session, spent, state, found)


def _start(config: DistillConfig, run: Path, folder: RunFolder | None, process: Process) -> _Session:
    """Check everything, build the trainer, and open the run's files."""
    train, before = config.train, started_epochs(run)
    process.print_rank0(
        describe_setup(process.device, train.precision, process.world_size, describe_workers(train.workers))
    )
    check_export_place(run / "export")
    check_tracker(train.tracker)
    run_cache = open_run_cache(config, run, process)
    for line in run_cache.describe():
        process.print_rank0(line)
    config = config.on_data(classes=len(run_cache.facts[0].class_names))
    if folder is not None:
        folder.set_weights(config.scalekd)
    validation = open_validation(run_cache.cache.manifest, config.data, process.print_rank0)
    checkpoint = checkpoint_to_resume(run, process.print_rank0)
    comparison = open_comparisons(run_cache, validation, process)
    trainer = _make_trainer(config, process, run_cache, checkpoint)
    _check_nodes_agree(trainer, run, validation)
    first = trainer.loader.step
    if before is not None and before < train.epochs:
        process.print_rank0(describe_extension(config, before, first, trainer.loader.steps_per_epoch))
    elif first:
        process.print_rank0(f"resuming {run} after step {first} of {trainer.loader.total_steps}")
    elif before is not None:
        process.print_rank0(f"{run} has no checkpoint, so the run starts again at its first step")
    if folder is not None:
        _open_files(config, folder, run_cache, checkpoint, first, process)
    if train.log_samples:
        trainer.watchdog.log_samples(run)
    say = functools.cache(process.print_rank0)
    return _Session(config, run, folder, run_cache, validation, comparison, trainer, first, say)


def _check_nodes_agree(trainer: Trainer, run: Path, validation: Source | None) -> None:
    """Check that all nodes found the same files; different numbers of collectives would hang.

    Raises:
        UserError: they found different validation images or checkpoints; raised on every rank.
    """
    images = -1 if validation is None else len(validation.samples)
    for what, number, where, fix in (
        ("number of validation images", images, None, "set --data to a path that all nodes have"),
        ("step to resume from", trainer.loader.step, run, "set --run to a folder that all nodes share"),
    ):
        least, most = trainer.range_over_ranks(number)
        if least != most:
            got = f"{max(least, 0):,.0f} on one process, {most:,.0f} on another"
            raise UserError(f"the {what} is not the same on all nodes", got=got, where=where, fix=fix)


def _train(session: _Session, signals: SignalHandler) -> None:
    """Train, evaluate and save checkpoints. A signal saves a checkpoint and stops all ranks."""
    config, folder, trainer, first = session.config, session.folder, session.trainer, session.first
    due = first > 0 and _is_evaluation_due(config.train, first, trainer.loader)
    if due and trainer.true_on_any_rank(folder is not None and not folder.is_evaluated(first)):
        _evaluate(session, first, trainer.student_state(), signals)  # the evaluation was interrupted
    for step in trainer.train(folder):
        signal = trainer.signal_of_any_rank(signals.received)
        if signal or _is_checkpoint_due(config.train, step, trainer.loader):
            trainer.save(session.run / "checkpoints")
        if signal:
            _stop(trainer, signals, step)
        if _is_evaluation_due(config.train, step, trainer.loader):
            _evaluate(session, step, trainer.student_state(), signals)


def _evaluate(session: _Session, step: int, state: State, signals: SignalHandler, *, final: bool = False) -> Evaluation:
    """Evaluate after this step and log the result. On a signal, save a checkpoint if this step has none, and stop all
    ranks."""
    config, folder, trainer, first = session.config, session.folder, session.trainer, session.first
    found = _measure(session, state, signals, final=final)
    if found is None:
        if step != first and not _is_checkpoint_due(config.train, step, trainer.loader):
            trainer.save(session.run / "checkpoints")
        _stop(trainer, signals, step)
    if folder is not None and found.metrics and not (step == first and folder.is_evaluated(step)):
        folder.log(step, found.metrics)
    if found.metrics and not final:
        epoch = step // trainer.loader.steps_per_epoch
        trainer.process.print_rank0(f"epoch {epoch} of {config.train.epochs}: {found.describe()}")
    return found


def _finish(session: _Session, spent: Spent, state: State, found: Evaluation) -> Summary:
    """Export the student and write the summary, which marks the run as finished."""
    config, run, folder, run_cache, trainer = (
        session.config, session.run, session.folder, session.run_cache, session.trainer)  # fmt: skip
    summary = make_summary(config, run_cache, trainer.loader, trainer.process.world_size, found)
    summary["minutes"] = round(spent.total_s / 60, 2)
    summary["images_per_s"] = round(summary["steps"] * config.train.global_batch_size / spent.steps_s, 1)
    if folder is not None:
        facts, export = facts_of(run_cache.facts, run_cache.views, config.student), run / "export"
        card = model_card(config.student, to_plain(config), facts, summary, export)
        summary["export_max_logit_difference"] = export_state(config.student, state, facts, export, card)
        last = checkpoint_folder(folder.checkpoints, trainer.loader.total_steps)
        if config.train.keep_checkpoints is None and last.exists():
            prune_checkpoints(folder.checkpoints, last, 1)
        folder.finish(summary)
        trainer.process.print_rank0(summary_table(run, summary))
    trainer.wait_for_all_ranks()
    return summary


def _open_files(
    config: DistillConfig,
    folder: RunFolder,
    run_cache: RunCache,
    checkpoint: Checkpoint | None,
    first: int,
    process: Process,
) -> None:
    """Open the run's files for a session that resumes after step `first`. A tracker that cannot be started stops a new
    run before it writes its options."""
    folder.add_logger(start_tracker(config.train.tracker, folder.path, to_plain(config), process.print_rank0))
    for name, source in ((OPTIONS, "this command's options"), (FACTS, "the cache")) if first else ():
        if not (folder.path / name).exists():
            process.print_rank0(f"{folder.path / name} was missing: recreated it from {source}")
    folder.write_facts(facts_of(run_cache.facts, run_cache.views, config.student))
    prune_checkpoints(folder.checkpoints, checkpoint.folder if checkpoint else None, config.train.keep_checkpoints)
    damaged = folder.start_metrics(first)
    folder.reopen()
    if damaged:
        process.print_rank0(f"dropped {counted(damaged, 'damaged line')} from {folder.path / METRICS}")


def _stop(trainer: Trainer, signals: SignalHandler, step: int) -> NoReturn:
    """Stop all ranks after a signal. The checkpoint for this step has already been saved."""
    signal = trainer.signal_of_any_rank(signals.received, now=True)
    trainer.wait_for_all_ranks()  # launchers kill all ranks once one has exited, and rank 0 may still be writing
    raise interrupted_by(signal, step, trainer.loader.total_steps)


def _check_finished(
    config: DistillConfig, run: Path, summary: Summary, folder: RunFolder | None, process: Process
) -> None:
    """Check that a finished run used this cache, and recreate missing files."""
    places = [open_place(place, config.remote) for place in cache_places(config.cache)]
    wait_s = 60 * config.follow_timeout_minutes
    facts = [read_cache_facts(place, config.follow, wait_s, process.print_rank0) for place in places]
    joint = joint_fingerprint(facts)
    check_same_cache(run, joint, ", ".join(map(str, places)))
    complete = all((run / name).exists() for name in (OPTIONS, FACTS))
    if folder is not None and not complete and joint == summary["cache_fingerprint"]:
        folder.set_weights(config.on_data(classes=len(facts[0].class_names)).scalekd)
        folder.write_facts(facts_of(facts, summary["views"], config.student))


def checkpoint_to_resume(run: Path, say: Callable[[str], object]) -> Checkpoint | None:
    """The checkpoint to resume from: the newest undamaged one. `say` prints a line about each damaged one.

    Raises:
        UserError: all checkpoints are damaged, or a finished run to be extended has no checkpoint.
    """
    checkpoint, problems = latest_checkpoint(run / "checkpoints")
    for problem in problems:
        say(f"skipped: {problem}")
    finished = os.path.lexists(run / SUMMARY)
    new_run = f"to start a new run from its weights, set --init {run} and a different --run"
    if problems and checkpoint is None:
        raise UserError(
            "all checkpoints of this run are damaged",
            where=run / "checkpoints",
            fix=f"restore the folder; {new_run}"
            if finished
            else "restore the folder, or remove it to train from step 1",
        )
    if checkpoint is None and finished:
        raise UserError(f"cannot extend {run}: it has no checkpoint", fix=new_run)
    return checkpoint


def _is_checkpoint_due(train: TrainConfig, step: int, loader: CacheLoader) -> bool:
    """Whether a checkpoint is due after this step."""
    epoch, inside = divmod(step, loader.steps_per_epoch)
    at_epoch = inside == 0 and epoch % train.checkpoint_epochs == 0
    at_step = train.checkpoint_steps > 0 and step % train.checkpoint_steps == 0
    return at_epoch or at_step or step == loader.total_steps


def _is_evaluation_due(train: TrainConfig, step: int, loader: CacheLoader) -> bool:
    """Whether an evaluation is due after this step; the final one follows training."""
    epoch, inside = divmod(step, loader.steps_per_epoch)
    return inside == 0 and epoch % train.eval_epochs == 0 and step != loader.total_steps


def _measure(session: _Session, state: State, signals: SignalHandler, *, final: bool) -> Evaluation | None:
    """Evaluate the student with these weights on the validation images, split across all ranks. The result is empty
    without images, and None on all ranks if any rank received a signal during the evaluation."""
    config, run_cache, trainer, validation = session.config, session.run_cache, session.trainer, session.validation
    process, facts = trainer.process, run_cache.facts[0]

    def stop() -> bool:  # called after every batch
        trainer.watchdog.progressed()
        return signals.received > 0

    if session.comparison is not None and trainer.tails:
        size = config.student.image_size or facts.view_recipe["size"]
        student = consolidated_student(config.student, state, run_cache.num_classes, size)
        heads = make_all_heads(config, student, trainer.tails, run_cache)
        heads.load_state_dict(trainer.heads_state())
        model = DistillModel(config, student, heads).to(process.device).eval()
        return session.comparison.evaluate(model, trainer.tails, final=final, stop=stop)
    if validation is None or not facts.labeled:
        return Evaluation()
    tally = evaluate_state(config, run_cache.cache.manifest, state, validation, process, stop, session.say)
    return None if tally is None else Evaluation(tally if tally.images else None)


def _make_trainer(
    config: DistillConfig, process: Process, run_cache: RunCache, checkpoint: Checkpoint | None
) -> Trainer:
    """Build and check the trainer on each rank."""
    train, device = config.train, process.device
    features = samples_with_features(config, run_cache)
    torch.manual_seed(train.seed)
    student = make_student(config, run_cache, process)
    process.print_rank0(describe_lr(config))
    if note := views_note(train.epochs, run_cache.views):
        process.print_rank0(note)
    tails: list[Tail] = []
    heads = nn.ModuleList()
    if train.targets != "none":
        for line in describe_targets(config, run_cache):
            process.print_rank0(line)
        tails = [tail.to(device) for tail in load_tails(config.scalekd, run_cache.caches)]
        heads = make_all_heads(config, student, tails, run_cache)
        notes = [heads_note(config, student, some) for some in heads]
        for note in (*notes, weights_note(config.scalekd, len(run_cache.facts[0].class_names))):
            if note is not None:
                process.print_rank0(note)
    if config.init is not None and checkpoint is None:
        loaded = load_init_weights(config.init, student.model, heads[0] if len(heads) else None)
        process.print_rank0("initial weights: " + ", ".join(loaded))
        if note := normalization_note(config.init, config.student):
            process.print_rank0(f"note: {note}")
    teachers = live_teachers(config, run_cache, device)
    loader = make_loader(config, run_cache, features, process)
    if note := loader.limits.note(train.global_batch_size):
        process.print_rank0(f"note: {note}")
    start_processes(process, train.timeout_minutes)
    check_ranks_agree(run_cache, process)
    model = DistillModel(config, student, heads)
    sources = target_sources(config, run_cache, loader, features, teachers, process) if tails else []
    return Trainer(config, process, loader, model, tails, sources, checkpoint)
