"""Reads the inputs to a run report: run folders, validation images and predictions.

In: folders of finished or ongoing runs. Out: `Run`s, and the teacher's predictions on the same images.
Invariant: runs are only read. A missing input is noted on the page, or is an error if an option names it.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from scalekd_cache.config.base import require
from scalekd_cache.data.classes import check_classes
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError, counted, shell_command
from scalekd_cache.models.evaluate import omitted
from scalekd_cache.reports.charts import Series
from scalekd_cache.reports.predictions import (
    Images,
    Predictions,
    RunStudent,
    load_run_student,
    load_run_teacher,
    predict_images,
    validation_images,
)
from scalekd_cache.training.metrics import read_metrics
from scalekd_cache.training.run_evaluation import open_run_source
from scalekd_cache.training.run_files import (
    METRICS,
    Summary,
    classes_of,
    read_config,
    read_facts,
    read_summary,
)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Options for the run report."""

    images: int = 1000
    """Number of validation images to evaluate, evenly spaced over the dataset (0: none, so no dataset is needed)."""
    data: str | None = None
    """Path of the validation images (None: as recorded in the cache)."""
    teacher_weights: str | None = None
    """The teacher's weights file (None: as recorded in the cache)."""
    quick: bool = False
    """Only what needs no forward pass: no predictions and no inference speed."""

    def __post_init__(self) -> None:
        require(self.images >= 0, "images", self.images, ">= 0")


class Run(NamedTuple):
    """A run, read from its folder."""

    path: Path
    name: str
    options: dict[str, Any]
    facts: dict[str, Any]
    lines: list[dict[str, Any]]
    """The lines in metrics.jsonl."""
    summary: Summary | None
    """None while the run is in progress."""
    student: RunStudent | None
    predictions: Predictions | None

    def series(self, name: str, label: str | None = None) -> Series:
        """A metric's values over steps."""
        rows = [(line["step"], line[name]) for line in self.lines if name in line]
        return Series(label or self.name, [step for step, _ in rows], [value for _, value in rows])


def unique_paths(paths: Sequence[Path]) -> list[Path]:
    """Remove duplicate folders."""
    return list(dict.fromkeys(Path(os.path.realpath(path)) for path in paths)) if len(paths) > 1 else list(paths)


def read_run(
    path: Path, images: Images | None, first: dict[str, Any], process: Process, notes: list[str], *, timed: bool
) -> Run:
    """Read a run, with its student's predictions if its classes and image size are the same as in the `first` run.

    `timed` measures the student's inference speed.
    """
    options, facts = read_config(path), read_facts(path)
    summary = _or_note(lambda: read_summary(path), path, notes)
    student = _or_note(lambda: load_run_student(path, facts["image_size"], process, timed=timed), path, notes)
    lines, damaged = _or_note(lambda: read_metrics(path), path, notes) or ([], 0)
    if summary is not None and not any(line["step"] == summary["steps"] and "loss" not in line for line in lines):
        lines.append(_last_evaluation(summary))  # a run of an earlier version
    if damaged:
        notes.append(f"{path.name}: {counted(damaged, 'damaged line')} in {METRICS} omitted.")
    if summary is not None and not any("loss" in line for line in lines):
        notes.append(f"{path.name} has no lines in {METRICS}: its curves are omitted.")
    predictions = None
    same = (facts["image_size"], facts["class_names"]) == (first["image_size"], first["class_names"])
    if student is None and not (path / "export").exists():
        command = shell_command("export", run=path) if any((path / "checkpoints").glob("*")) else ""
        notes.append(
            f"{path.name} has no exported student yet: its predictions are omitted."
            + (f" Export the last checkpoint: {command}" if command else "")
        )
    elif student is not None and not same:
        notes.append(f"{path.name} differs from the first run in classes or image size: its predictions are omitted.")
    elif student is not None and images is not None:
        predictions = predict_images(student.predict, images, process.device)
    if summary is None:
        notes.append(f"{path.name} is not finished: the report shows the steps so far.")
    return Run(path, path.name, options, facts, lines, summary, student, predictions)


def _last_evaluation(summary: Summary) -> dict[str, Any]:
    """A run's last evaluation as a line of metrics."""
    accuracies = {name: summary[name] for name in ("top1", "top5") if summary[name] is not None}
    return {"step": summary["steps"], **accuracies, **summary.get("held_out", {})}


def _or_note(read: Callable[[], T], path: Path, notes: list[str]) -> T | None:
    """Call `read` and return its result. If one of the run's files is damaged, adds a note and returns None."""
    try:
        return read()
    except UserError as error:
        notes.append(f"{path.name}: {error}")
        return None


def load_validation_images(run: Path, facts: dict[str, Any], report: RunReport, notes: list[str]) -> Images | None:
    """Load a run's validation images. If they are unavailable, adds a note and returns None."""
    try:
        source = open_run_source(run, report.data)
        check_classes(source, facts["class_names"], classes_of(facts))
    except UserError as error:
        if report.data:
            raise
        notes.append(
            f"No validation images are available, so predictions are not compared: {str(error).splitlines()[0]}"
        )
        return None
    images = validation_images(source, facts["image_size"], report.images)
    if images.unreadable:
        notes.append(omitted(images.unreadable))
    return images if images.indices else None


def teacher_predictions(
    run: Run, images: Images | None, report: RunReport, process: Process, notes: list[str]
) -> Predictions | None:
    """Predictions by the teacher from a run's cache. If it is unavailable, adds a note and returns None."""
    if images is None:
        return None
    try:
        return predict_images(load_run_teacher(run.path, report.teacher_weights, process), images, process.device)
    except UserError as error:
        if report.teacher_weights:
            raise
        notes.append(f"The teacher is omitted: {str(error).splitlines()[0]}")
        return None
