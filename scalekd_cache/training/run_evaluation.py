"""Evaluates a student on validation images, during a run, after it, or from an exported folder.

In: weights or an exported folder, and a dataset. Out: a `Tally`.
Invariant: no cache is needed, and deepspeed is not imported.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.convert.timm_export import load_export, read_description
from scalekd_cache.data.base import NoSplitError, Source
from scalekd_cache.data.classes import check_classes
from scalekd_cache.data.source import open_cache_source, open_recorded_source, open_source
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError, shell_command
from scalekd_cache.models.evaluate import Tally, evaluate, has_top5, omitted, percent
from scalekd_cache.models.normalize import Normalize
from scalekd_cache.store.manifest import Manifest
from scalekd_cache.training.run_export import State, consolidated_student
from scalekd_cache.training.run_files import classes_of, data_of, read_facts, read_summary, student_options
from scalekd_cache.training.run_folder import is_locked


class Evaluation(NamedTuple):
    """A student's accuracy or, for a cache without labels, its similarity to the teacher."""

    tally: Tally | None = None
    """Accuracies; None without labeled validation images."""
    held_out: dict[str, float] = {}
    """`held_out_evaluation.FIGURES`; empty for a labeled cache."""

    of_teachers: dict[str, dict[str, float]] = {}
    """With multiple teachers, the metrics relative to each teacher, keyed by the teacher's name. `held_out` has their
    means."""

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics to log."""
        tally = self.tally
        apart = {f"{name}/{key}": value for name, found in self.of_teachers.items() for key, value in found.items()}
        accuracies = {"top1": tally.top1_percent, "top5": tally.top5_percent} if tally else {}
        return {**self.held_out, **apart, **{name: value for name, value in accuracies.items() if value is not None}}

    def describe(self) -> str:
        """The accuracies, or the metrics that compare the student with the teachers, as text."""
        if self.tally is None:
            return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in self.held_out.items())
        accuracies = {"top-1": self.tally.top1_percent, "top-5": self.tally.top5_percent}
        return ", ".join(f"{name} {percent(value)}" for name, value in accuracies.items() if value is not None)


def open_validation(manifest: Manifest, data: str | None, say: Callable[[str], object]) -> Source | None:
    """The validation images of a cache's dataset, or None if there are none.

    Args:
        manifest: the cache's manifest.
        data: the dataset that the user gave; None for the path recorded in the cache.
        say: prints a note if there are no validation images.

    Raises:
        UserError: the dataset in `data` is missing or damaged, or has other classes.
    """
    facts = manifest.facts
    try:
        source = open_cache_source(facts.data, data, "val")
        if facts.labeled:
            check_classes(source, facts.class_names, facts.num_classes)
        return source
    except UserError as error:
        if data is not None and not isinstance(error, NoSplitError):
            raise
        what = "accuracy will" if facts.labeled else "similarity to the teacher will"
        hint = "" if data else " (set --data)"
        say(f"no usable validation images found, so {what} not be measured{hint}:\n{error}")
        return None


def make_predictor(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """A function that maps uint8 pixels (B, 3, S, S) to the model's logits (B, K)."""
    device = next(model.parameters()).device
    normalize = Normalize(mean, std).to(device)
    return lambda images: model(normalize(images))


def evaluate_state(
    config: DistillConfig,
    manifest: Manifest,
    state: State,
    validation: Source,
    process: Process,
    stop: Callable[[], bool],
    say: Callable[[str], None],
) -> Tally | None:
    """Accuracy of the student with these weights on the validation images, split across all ranks. None on all ranks
    if `stop` was true on any rank. `say` prints a note about unreadable images."""
    lost: list[int] = []
    size = config.student.image_size or manifest.facts.view_recipe["size"]
    student = consolidated_student(config.student, state, manifest.facts.num_classes, size)
    share = evaluate(
        make_predictor(student.model.to(process.device), config.student.mean, config.student.std),
        validation,
        size,
        process.device,
        rank=process.rank,
        world_size=process.world_size,
        workers=config.train.workers,
        on_unreadable=lost.extend,
        stop=stop,
    )
    counts = torch.tensor([stop(), *(count or 0 for count in share)], dtype=torch.int64, device=process.device)
    dist.all_reduce(counts)
    stopped, *found = counts.tolist()
    if stopped:
        return None
    total = Tally(*found)
    if not has_top5(manifest.facts.num_classes):
        total = total._replace(top5=None)
    if total.unreadable:
        first = torch.tensor(min(lost, default=len(validation.samples)), device=process.device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
        say(omitted(total.unreadable, first=validation.samples[int(first)].key))
    return total


def evaluate_run(run: Path, data: str | None, process: Process, workers: int) -> Tally:
    """The accuracy of a finished run's exported student.

    Raises:
        UserError: the exported student is missing or damaged, or there are no validation images with the student's
            classes.
    """
    student, facts = student_options(run), read_facts(run)
    folder = run / "export"
    if not os.path.lexists(folder):
        state = "is not finished: resume it, or" if read_summary(run) is None else "has no exported student:"
        state = "is still running: wait until it finishes, or" if is_locked(run) else state
        raise UserError(f"the run {run} {state} export its last checkpoint with `{shell_command('export', run=run)}`")
    if not facts["class_names"]:
        raise _no_classes(run)
    model = load_export(folder, facts["image_size"]).to(process.device)
    validation = open_run_source(run, data)
    check_classes(validation, facts["class_names"], classes_of(facts))
    predict = make_predictor(model, student.mean, student.std)
    return evaluate(predict, validation, facts["image_size"], process.device, workers=workers)


def open_run_source(run: Path, data: str | None) -> Source:
    """The validation images of a run, at the recorded path or at `data`."""
    return open_recorded_source(data_of(run, data), "val", None if data else f"the run {run}")


def _no_classes(folder: Path) -> UserError:
    return UserError(
        "cannot compute the accuracy of a student trained without labels",
        where=folder,
        fix=f"evaluate its embeddings on labeled images: {shell_command('probe', backbone=folder, data='DIR')}",
    )


def evaluate_folder(folder: Path, data: str | None, process: Process, workers: int) -> Tally:
    """The accuracy of an exported or imported student without a run. Model, size, mean and std come from config.json.

    Raises:
        UserError: no dataset is given, a file is damaged, or the dataset and the student have different classes.
    """
    if data is None:
        raise UserError("an exported student does not record its dataset", where=folder, fix="set --data")
    description = read_description(folder)
    images = description.pretrained_cfg
    if description.num_classes == 0:
        raise _no_classes(folder)
    size = images.input_size[-1]
    model = load_export(folder, size).to(process.device)
    source = open_source(DataConfig(source=data), "val")
    check_classes(source, description.label_names, description.num_classes)
    predict = make_predictor(model, images.mean, images.std)
    return evaluate(predict, source, size, process.device, workers=workers)
