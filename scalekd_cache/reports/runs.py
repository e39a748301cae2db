"""The run report: curves over time, student and teacher errors, and a comparison of multiple students.

In: folders of finished or ongoing runs. Out: HTML.
Invariant: runs are only read. Missing data is noted on the page.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scalekd_cache import __version__
from scalekd_cache.config.base import flat
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError, counted, shell_command
from scalekd_cache.models.evaluate import percent, teacher_accuracy
from scalekd_cache.models.teacher_spec import RANDOM
from scalekd_cache.progress import duration_text
from scalekd_cache.reports.charts import Chart, Series, curves, matrix
from scalekd_cache.reports.comparison import LABELS, compare_runs, format_figure, heads_of
from scalekd_cache.reports.neighbors import read_spaces
from scalekd_cache.reports.page import Picture, picture, render
from scalekd_cache.reports.predictions import (
    Images,
    Predictions,
    confusion,
)
from scalekd_cache.reports.run_data import (
    Run,
    RunReport,
    load_validation_images,
    read_run,
    teacher_predictions,
    unique_paths,
)
from scalekd_cache.scalekd.losses import FeatureTerms, LossTerms
from scalekd_cache.training.run_files import MAX_RUNS, read_facts, text_option
from scalekd_cache.training.run_summary import baseline_summary

DETAILED = 4
"""Maximum number of runs with their own section."""
MATRIX_CLASSES = 30
"""Maximum number of classes in a confusion matrix, which shows the classes with the most errors."""
DISAGREEMENTS = 8
"""Maximum number of disagreements between student and teacher to show."""


CURVES = (
    (("held_out_loss",), "feature loss", "Feature loss on held-out images"),
    (
        ("cosine_patch", "cosine_pooled", "retrieval"),
        "cosine, fraction",
        "Agreement with the teacher on held-out images",
    ),
    (("knn", "teacher_knn"), "k-NN accuracy, percent", "k-NN accuracy on held-out labels"),
)
"""Charts for a run on a cache without labels: metrics, axis label, title."""


class Disagreement(NamedTuple):
    """An image for which student and teacher predict different classes."""

    picture: Picture
    key: str
    label: str
    student: str
    teacher: str


def run_report(paths: Sequence[Path], options: RunReport, process: Process) -> str:
    """Build the page for one run, or the comparison of multiple runs.

    Raises:
        UserError: a folder does not contain a run, or there are too many runs.
    """
    if not 1 <= len(paths) <= MAX_RUNS:
        raise UserError(
            "wrong number of runs for a report", got=len(paths), expected=f"1 to {MAX_RUNS}", fix="correct --runs"
        )
    notes: list[str] = []
    first = read_facts(paths[0])
    labeled = bool(first["class_names"])
    evaluated = options.images > 0 and not options.quick
    if options.quick:
        several = {"runs": shlex.join(map(str, paths))}
        command = shell_command("report", **({"run": paths[0]} if len(paths) == 1 else several))
        notes.append(
            f"Written at the end of training, without predictions on validation images. To add them: {command}"
        )
    images = load_validation_images(paths[0], first, options, notes) if evaluated and labeled else None
    timed = len(paths) > 1 and not options.quick  # only a comparison shows the speed
    runs = [read_run(path, images, first, process, notes, timed=timed) for path in unique_paths(paths)]
    teacher = teacher_predictions(runs[0], images, options, process, notes)
    names = first["class_names"]
    sections = [_section(run, teacher, images, names) for run in runs[: DETAILED if len(runs) > 1 else 1]]
    for run, section in zip(runs, sections, strict=False):
        held_out = evaluated and run.summary is not None and run.summary.get("held_out")
        section["spaces"] = read_spaces(run.path, options.data, process, notes) if held_out else None
    title = f"Run {runs[0].name}" if len(runs) == 1 else "Runs " + ", ".join(run.name for run in runs)
    return render(
        "run.html",
        title=title,
        version=__version__,
        notes=notes,
        comparison=compare_runs(runs, teacher, images) if len(runs) > 1 else None,
        sections=sections,
        left_out=[run.name for run in runs[len(sections) :]],
    )


def _section(run: Run, teacher: Predictions | None, images: Images | None, names: list[str]) -> dict[str, Any]:
    """Build the section for one run."""
    matrices: list[Chart] = []
    if images is not None and run.predictions is not None:
        matrices.append(_matrix(run.predictions, images, names, f"Predictions of {run.name}"))
        if teacher is not None:
            matrices.append(_matrix(teacher, images, names, "Predictions of the teacher"))
    return {
        "name": run.name,
        "facts": _facts(run),
        "big": _headline(run),
        "teachers": _teachers(run),
        "curves": _curves(run),
        "matrices": matrices,
        **_teacher_comparison(run.predictions, teacher, images, names),
    }


def _teacher_comparison(
    student: Predictions | None, teacher: Predictions | None, images: Images | None, names: list[str]
) -> dict[str, Any]:
    """Compare student and teacher, if both have predictions."""
    if student is None or teacher is None or images is None:
        return {"agreement": None, "differing": []}
    shares = agreement(student, teacher, images.labels)
    words = {"same": "same prediction", "both_right": "both correct", "only_teacher": "only the teacher correct",
             "only_student": "only the student correct", "both_wrong": "both wrong"}  # fmt: skip
    return {
        "agreement": [
            {"student and teacher": words[name], "images": f"{share:.1f}%"} for name, share in shares._asdict().items()
        ],
        "differing": _disagreements(student, teacher, images, names),
    }


def _facts(run: Run) -> list[tuple[str, str]]:
    student, options = run.student, flat(run.options)
    rows = [
        ("student", str(options.get("student.name"))),
        ("teacher", _teacher(run)),
        ("targets", str(options.get("train.targets"))),
        ("heads", heads_of(run.options)),
        ("recipe", str(options.get("recipe"))),
        ("initial weights", str(options.get("init") or "random")),
        (
            "cache",
            f"{options.get('cache')}, fingerprint {run.facts['fingerprint'][:16]}, "
            f"{counted(run.facts['views'], 'view')}",
        ),
        ("epochs", str(options.get("train.epochs"))),
        ("global batch", str(options.get("train.global_batch_size"))),
        ("optimizer", _optimizer(options)),
        ("seed", str(options.get("train.seed"))),
        ("folder", str(run.path)),
    ]
    if student is not None:
        rows.insert(1, ("size", f"{student.parameters / 1e6:.2f}M parameters, {student.bytes / 1e6:.1f} MB"))
    return rows


def _optimizer(options: dict[str, Any]) -> str:
    """The optimizer with its learning rate, which is scaled to the batch (`training/optim.py` `scaled_lr`)."""
    name, lr = str(options.get("optim.name")), options.get("optim.lr")
    batch, base = options.get("train.global_batch_size"), options.get("optim.base_batch_size")
    if not (isinstance(lr, int | float) and isinstance(batch, int) and isinstance(base, int) and base > 0):
        return name
    return f"{name}, learning rate {lr * batch / base:g} (base rate {lr:g} x batch {batch} / {base})"


def _teacher(run: Run) -> str:
    """Name and accuracy of the cache's teacher. Runs of earlier versions have it only in the summary."""
    text, summary = run.facts.get("teacher"), run.summary
    if text is None and summary is not None:
        classifier = {"spec": {"has_classifier": summary.get("has_classifier", True)}, "top1": summary["teacher_top1"]}
        text = f"{summary['teacher']}, {teacher_accuracy(classifier, labeled='held_out' not in summary)}"
    text = text or "not known until the run is finished"
    return f"{text} (not used)" if text_option(run.options, "train.targets") == "none" else text


def _headline(run: Run) -> list[tuple[str, str]]:
    """The headline numbers."""
    summary = run.summary
    if summary is None:
        return [(f"{run.lines[-1]['step']}" if run.lines else "none", "last logged step")]
    baseline = baseline_summary(run.path, summary) if summary["targets"] != "none" else None
    speed = [(f"{summary['images_per_s']:,.0f}", "images/s"), (duration_text(60 * summary["minutes"]), "time")]
    if "held_out" in summary:
        return [
            *((format_figure(name, summary["held_out"][name]), LABELS[name]) for name in summary["held_out"]),
            *speed,
        ]
    rows = [(percent(summary["top1"]), "top-1")]
    rows += [(percent(summary["top5"]), "top-5")] if summary["top5"] is not None else []
    best = "best teacher's top-1" if "teachers" in summary else "teacher's top-1"
    rows.append((percent(summary["teacher_top1"]), best + (RANDOM if RANDOM in summary["teacher"] else "")))
    if baseline:
        rows.append((percent(baseline["top1"]), "top-1 without distillation"))
    return [*rows, *speed]


def _curves(run: Run) -> list[Chart]:
    if not any("loss" in line for line in run.lines):
        return []
    terms = [run.series(name, name.replace("_", " ")) for name in LossTerms._fields]
    shown = [one for one in terms if any(one.y)]
    found = [
        curves(shown, "step", "weighted loss", "Loss terms, weighted"),
        curves([run.series("lr", "learning rate")], "step", "learning rate", "Learning rate"),
        curves([run.series("images_per_s", "images/s")], "step", "images/s", "Throughput"),
        curves([run.series("data_wait", "waiting")], "step", "fraction of time", "Waiting for data", percent=True),
    ]
    accuracy = run.series("top1", "top-1")
    if len(accuracy.x):
        found.append(curves([accuracy], "step", "top-1, percent", "Accuracy on the validation images"))
    return found + _teacher_curves(run) + _held_out_curves(run)


def _teachers(run: Run) -> list[dict[str, str]]:
    """Table rows for a run's teachers; empty if there is only one teacher or the run is not finished."""
    rows = []
    for one in (run.summary or {}).get("teachers", ()):
        last: dict[str, float] = next((line for line in reversed(run.lines) if f"{one['name']}/s4_spatial" in line), {})
        loss = sum(last.get(f"{one['name']}/{term}", 0.0) for term in FeatureTerms._fields)
        figures = {
            LABELS[name]: format_figure(name, value) for name, value in one["held_out"].items() if name in LABELS
        }
        row = {"teacher": one.get("label", one["name"]), "top-1": percent(one["top1"]), "weight": f"{one['share']:.3g}"}
        rows.append({**row, "last feature loss": f"{loss:.4g}" if last else "", **figures})
    return rows


def _teacher_curves(run: Run) -> list[Chart]:
    """For a run with multiple teachers, each teacher's feature loss over steps."""
    names = dict.fromkeys(name.rpartition("/")[0] for line in run.lines for name in line if "/" in name)
    shown = []
    for name in names:
        columns = [f"{name}/{term}" for term in FeatureTerms._fields]
        rows = [(line["step"], sum(line[column] for column in columns)) for line in run.lines if columns[0] in line]
        shown.append(Series(name, [step for step, _ in rows], [value for _, value in rows]))
    return [curves(shown, "step", "feature loss", "Unweighted feature loss for each teacher")] if shown else []


def _held_out_curves(run: Run) -> list[Chart]:
    """Held-out metrics over steps."""
    charts = []
    for names, unit, title in CURVES:
        shown = [one for name in names if len((one := run.series(name, LABELS[name])).x)]
        if shown:
            charts.append(curves(shown, "step", unit, title))
    return charts


def _matrix(predictions: Predictions, images: Images, names: list[str], title: str) -> Chart:
    counts = confusion(images.labels, predictions, len(names))
    chosen = np.arange(len(names))
    accuracy = f"{predictions.accuracy(images.labels):.2f}% of {counted(len(images.labels), 'image')} correct"
    if len(names) > MATRIX_CLASSES:
        errors = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
        chosen = np.sort(np.argsort(-errors, kind="stable")[:MATRIX_CLASSES])
        accuracy += f"; the {MATRIX_CLASSES} classes with the most errors"
    shown = [names[number] for number in chosen]
    return matrix(counts[np.ix_(chosen, chosen)], shown, shown, ("label", "prediction"), f"{title}: {accuracy}")


class PredictionAgreement(NamedTuple):
    """How often student and teacher agree, in percent of the images."""

    same: float
    both_right: float
    only_teacher: float
    only_student: float
    both_wrong: float


def agreement(student: Predictions, teacher: Predictions, labels: NDArray[np.int64]) -> PredictionAgreement:
    """Measure how often student and teacher agree."""
    s, t = student.classes == labels, teacher.classes == labels
    shares = (student.classes == teacher.classes, s & t, ~s & t, s & ~t, ~s & ~t)
    return PredictionAgreement(*(100 * float(share.mean()) for share in shares))


def _disagreements(student: Predictions, teacher: Predictions, images: Images, names: list[str]) -> list[Disagreement]:
    """Images with different predictions, sorted by descending probability."""
    rows = np.flatnonzero(student.classes != teacher.classes)
    rows = rows[np.argsort(-(student.percent + teacher.percent)[rows], kind="stable")][:DISAGREEMENTS]
    found = []
    for row in rows.tolist():
        label, key = _name(names, images.labels[row]), images.key(row)
        words = [
            f"{_name(names, predictions.classes[row])} ({predictions.percent[row]:.1f}%)"
            for predictions in (student, teacher)
        ]
        shown = picture(images.pixels(row), f"The validation image {key}, labeled {label}")
        found.append(Disagreement(shown, key, label, *words))
    return found


def _name(names: Sequence[str], number: Any) -> str:
    return names[int(number)] if 0 <= int(number) < len(names) else f"class {int(number)}"
