"""Exports a run's student, without a training engine or a cache.

In: a run folder, or a consolidated state dict. Out: a folder that plain timm can load, or a file in another format.
Invariant: weights are read from a checkpoint with verified digests, and an older export is replaced atomically.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from scalekd_cache.config.stage2 import StudentConfig
from scalekd_cache.convert.formats import SUFFIXES, check_format, export_file
from scalekd_cache.convert.timm_export import check_not_in_run, export_student
from scalekd_cache.errors import UserError, counted, shell_command
from scalekd_cache.models.evaluate import describe_teacher
from scalekd_cache.models.student import Student, build_student
from scalekd_cache.models.weights import check_tensors
from scalekd_cache.store.manifest import ManifestFacts, joint_fingerprint
from scalekd_cache.training.checkpoint import STUDENT, latest_checkpoint
from scalekd_cache.training.model_card import card_facts, model_card
from scalekd_cache.training.run_files import classes_of, read_config, read_facts, read_summary, student_options

State = dict[str, Tensor]


def facts_of(caches: Sequence[ManifestFacts], views: int, student: StudentConfig) -> dict[str, Any]:
    """A run's cache facts, which are needed to resume and to export. `views` is the number of views used by the run,
    and the image size is the student's."""
    first = caches[0]
    return {
        "fingerprint": joint_fingerprint(caches),
        "views": views,
        "image_size": student.image_size or first.view_recipe["size"],
        "class_names": first.class_names,
        "num_classes": next((facts.num_classes for facts in caches if facts.num_classes), 0),
        "data": first.data,
        "teacher": "; ".join(describe_teacher(facts.teacher, labeled=facts.labeled) for facts in caches),
    }


def consolidated_student(config: StudentConfig, state: State, num_classes: int, image_size: int) -> Student:
    """A student with these weights, in eval mode."""
    student = build_student(config, num_classes=num_classes, image_size=image_size)
    found, wanted = (
        {name: tuple(value.shape) for name, value in tensors.items()} for tensors in (state, student.model.state_dict())
    )
    check_tensors(found, wanted, f"{config.name} with {counted(num_classes, 'class')}")
    student.model.load_state_dict(state)
    return student.eval()


def export_state(
    config: StudentConfig, state: State, facts: dict[str, Any], folder: Path, card: str | None = None
) -> float:
    """Export a student with its model card. Returns the largest logit difference after reloading it."""
    size, names = facts["image_size"], facts["class_names"]
    student = consolidated_student(config, state, classes_of(facts), size)
    return export_student(student, config, folder, image_size=size, class_names=names, card=card)


class Exported(NamedTuple):
    """A finished export."""

    path: Path
    """The output folder (timm) or file (other formats)."""
    difference: float | None
    """The largest logit difference after reloading; None for mmpretrain, which is not used to reload the file."""


def export_run(run: Path, out: Path | None, form: str = "timm") -> Exported:
    """Export the student from a run's last checkpoint. The run need not be finished.

    Args:
        run: the run folder.
        out: output folder (timm) or file (None: <run>/export, or <run>/<student> with the format's suffix).
        form: one of `formats.FORMATS`.

    Raises:
        UserError: the folder does not contain a run, the run has no checkpoint yet, its newest checkpoint is damaged,
            or the format does not support the student.
    """
    check_format(form)
    options, facts = read_config(run), read_facts(run)
    checkpoint, problems = latest_checkpoint(run / "checkpoints")
    finished, exported = read_summary(run) is not None, f"use the exported student in {run / 'export'}"
    if checkpoint is None:
        where = run / "checkpoints"
        if finished:
            what = "this finished run has no usable checkpoint"
            raise UserError(what, got="; ".join(problems) or None, where=where, fix=exported)
        if problems:
            fix = "restore the folder, or train again with a different --run"
            raise UserError("all checkpoints of this run are damaged", got="; ".join(problems), where=where, fix=fix)
        resume = f"{shell_command('distill', run=run)} --resume"
        fix = f"if the run is in progress, wait for its first checkpoint; otherwise, resume it: {resume}"
        raise UserError("the run has no checkpoint yet", where=where, fix=fix)
    if problems:  # never silently export an older student
        raise UserError(
            "the run's newest checkpoint is damaged",
            got="; ".join(problems),
            fix=(exported if finished else f"rerun `scalekd distill` to train again from {checkpoint.folder.name}")
            + f", or delete the damaged {'folder' if len(problems) == 1 else 'folders'} to export "
            + (f"{checkpoint.folder.name}, which is older" if finished else "that older checkpoint"),
        )
    state, config = checkpoint.tensors(STUDENT), student_options(run)
    if form == "timm":
        folder = out or run / "export"
        check_not_in_run(folder, run)
        card = model_card(config, options, facts, read_summary(run), folder)
        return Exported(folder, export_state(config, state, facts, folder, card))
    student = consolidated_student(config, state, classes_of(facts), facts["image_size"])
    file = out or run / f"{config.name.replace('/', '_')}{SUFFIXES[form]}"
    if file.is_dir():
        raise UserError("the output path is a folder", where=file, expected="a file", fix="set --out to a file name")
    about = card_facts(options, facts, read_summary(run))
    return Exported(file, export_file(student, form, file, image_size=facts["image_size"], facts=about))
